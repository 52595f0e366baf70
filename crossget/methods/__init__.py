"""The methods: functions of tensors and the dataclasses made of them. Nothing here knows a model."""
