"""transformers' ViT, and DeiT, which has a distillation token after the class token."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.deit import modeling_deit as deit
from transformers.models.vit import modeling_vit as vit

from crossget.core.adapters import register
from crossget.integrations import hf

register(vit.ViTModel, vit.ViTForImageClassification, vit.ViTForMaskedImageModeling, towers=[hf.VIT])
register(
    deit.DeiTModel, deit.DeiTForImageClassification, deit.DeiTForImageClassificationWithTeacher,
    deit.DeiTForMaskedImageModeling,
    towers=[replace(hf.VIT, prefix=2)],
)  # fmt: skip
