"""transformers' DINOv2, with and without registers."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers

from crossget.core.adapters import Tower, register
from crossget.integrations import hf


@register(
    dinov2.Dinov2Model, dinov2.Dinov2ForImageClassification,
    registers.Dinov2WithRegistersModel, registers.Dinov2WithRegistersForImageClassification,
)  # fmt: skip
def tower(model: Any) -> list[Tower]:
    """The image tower of a model that uses the last block's tokens."""
    return [hf.vit(model, _prefix(model))]


@register(dinov2.Dinov2Backbone, registers.Dinov2WithRegistersBackbone)
def backbone(model: Any) -> list[Tower]:
    """The image tower of a backbone, which uses the tokens of several blocks."""
    return [hf.vit(model, _prefix(model))]


def _prefix(model: Any) -> int:
    return 1 + int(getattr(model.config, "num_register_tokens", 0))
