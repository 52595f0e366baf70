"""transformers' DINOv3: rotary positions, and registers behind the class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from crossget.core.adapters import Tower, register
from crossget.core.state import TokenState
from crossget.integrations import hf
from crossget.integrations._support import rows_left

_BACKBONE = getattr(dinov3, "DINOv3ViTBackbone", None)  # younger than the model


@register(dinov3.DINOv3ViTModel, *filter(None, [_BACKBONE]))
def tower(model: Any) -> list[Tower]:
    """The image tower."""
    intermediates = hf.backbone(model) if _BACKBONE is not None and isinstance(model, _BACKBONE) else []
    return [hf.vit(model, 1 + model.config.num_register_tokens, fit_arguments=_rows, intermediates=intermediates)]


def _rows(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """The tables (cosines, sines), [N, D] each, of which only the patches have rows."""
    if name != "position_embeddings":
        return value
    cosine, sine = (table[None, None] for table in value)
    ones, zeros = torch.ones_like(cosine[:, :, :1]), torch.zeros_like(sine[:, :, :1])  # the cross token is not rotated
    return rows_left(cosine, ones, state), rows_left(sine, zeros, state)
