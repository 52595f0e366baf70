"""timm: every architecture whose blocks pass one sequence [B, T, C]."""

from __future__ import annotations

from typing import Any

import timm.models.vision_transformer as vision_transformer
from torch import nn

from crossget.registry import Tower, register


@register(vision_transformer.VisionTransformer)
def vit(model: Any) -> list[Tower]:
    """ViT, DeiT, DINOv2, SigLIP and their kin."""
    return [
        Tower(
            "visual",
            blocks=list(model.blocks),
            width=int(model.embed_dim),
            prefix=int(model.num_prefix_tokens),
            class_token=bool(model.has_class_token),
            readers=[(model, "forward_intermediates")],
        )
    ]
