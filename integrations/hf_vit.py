"""transformers' ViT, and DeiT, which has a distillation token after the class token."""

from __future__ import annotations

from typing import Any

from transformers.models.deit import modeling_deit as deit
from transformers.models.vit import modeling_vit as vit

from crossget.core.adapters import Tower, register
from crossget.integrations import hf


@register(vit.ViTModel, vit.ViTForImageClassification, vit.ViTForMaskedImageModeling)
def vit_tower(model: Any) -> list[Tower]:
    """The image tower of a ViT."""
    return [hf.vit(model)]


@register(
    deit.DeiTModel, deit.DeiTForImageClassification, deit.DeiTForImageClassificationWithTeacher,
    deit.DeiTForMaskedImageModeling,
)  # fmt: skip
def deit_tower(model: Any) -> list[Tower]:
    """The image tower of a DeiT."""
    return [hf.vit(model, prefix=2)]
