"""What towers that tests write out block by block have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from crossget.methods.matching import MergePlan


def followed(source: Tensor, plan: MergePlan) -> Tensor:
    """[B, T0] where each input token is after a block, from where it was before: -1 if it was dropped."""
    return torch.where(source < 0, source, plan.index.gather(1, source.clamp(min=0)))


def on_the_grid(x: Tensor, source: Tensor, valid: Tensor | None, prefix: int, cross_token: bool) -> Tensor:
    """[B, T0, C] the tokens [B, T, C] at `source` [B, T0]; at dropped ones the mean of real tokens after the prefix."""
    part = slice(prefix, x.shape[1] - int(cross_token))
    real = torch.ones_like(x[:, part, :1]) if valid is None else valid[:, part, None].to(x.dtype)
    mean = (x[:, part] * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    at = source.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2])
    return torch.where(source[:, :, None] < 0, mean, x.gather(1, at))
