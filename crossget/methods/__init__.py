"""The methods: functions of tensors, and the dataclasses that combine them. Nothing here depends on a model."""
