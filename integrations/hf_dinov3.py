"""transformers' DINOv3, with rotary positions, and with registers after the class token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from crossget.core.adapters import read, register
from crossget.core.state import TokenState
from crossget.integrations import hf
from crossget.integrations._support import remaining_rows

_BACKBONE = getattr(dinov3, "DINOv3ViTBackbone", None)  # only in newer versions


def _rows(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """The two rotary tables (cosines, sines), [N, D] each, for the remaining tokens. Only patches have rows."""
    if name != "position_embeddings":
        return value
    cosine, sine = (table[None, None] for table in value)
    ones, zeros = torch.ones_like(cosine[:, :, :1]), torch.zeros_like(sine[:, :, :1])  # the cross token is not rotated
    return remaining_rows(cosine, ones, state), remaining_rows(sine, zeros, state)


register(
    dinov3.DINOv3ViTModel,
    *filter(None, [_BACKBONE]),
    towers=[replace(hf.VIT, prefix=read("config.num_register_tokens", add=1), fit_arguments=_rows)],
)
