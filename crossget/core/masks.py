"""Attention masks of the host, selected for the remaining tokens: functions of tensors and of the tokens' state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossget.core.state import TokenState

# An additive mask hides a token by -inf, by the smallest number of its dtype or, in old BERTs, by -10000, which
# bfloat16 rounds.
_HIDDEN = -9000.0


def visible(mask: Tensor, batch: int) -> Tensor:
    """[B, T] true for keys that some query attends to, by a boolean or additive mask [B or 1, H or 1, T or 1, T]."""
    seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
    return seen.any(2).any(1).expand(batch, -1)


def find_padding(mask: Tensor, state: TokenState) -> Tensor:
    """[B, T] false for padding: keys that no query (in a causal tower: not the last one) attends to.

    The cross token is no padding.
    """
    batch, tokens = state.positions.shape
    mask = _four_axes(mask)
    seen = visible(mask[:, :, -1:] if state.forward.causal else mask, batch)
    return seen if seen.shape[1] == tokens else torch.cat([seen, torch.ones_like(seen[:, :1])], 1)


def fit_mask(mask: Tensor, state: TokenState) -> Tensor:
    """A mask of the host's T0 tokens, for the T tokens that remain.

    Args:
        mask: boolean or additive, with up to four axes, [.., T0 or 1, T0]. Or [.., T0 + 1 or 1, T0 + 1], if a block has
            made it inside and counted the cross token as one of the host's tokens.
        state: of the tokens. If they are exactly the host's, the mask itself is returned: torch selects the attention
            kernel by the number of its axes.

    Returns:
        [B, H or 1, T or 1, T].

    Raises:
        RuntimeError: the mask was made for another number of tokens.
    """
    batch, tokens = state.positions.shape
    if state.unmodified and mask.shape[-1] == tokens:
        return mask
    mask, has_cross_token, length = _four_axes(mask), state.forward.has_cross_token, state.forward.length
    total = length + int(has_cross_token)
    if has_cross_token and mask.shape[-1] == total:
        mask = mask[..., :length, :length] if mask.shape[-2] == total else mask[..., :length]
    if has_cross_token and mask.shape[-1] == length:
        mask = _with_cross_token(mask, state)
    if mask.shape[-1] != total or mask.shape[-2] not in (1, total):
        raise RuntimeError(
            f"the attention got a mask of shape {list(mask.shape)} in a block with {tokens} tokens of "
            f"originally {length}: expected {length} keys. So it cannot be selected for "
            "the remaining tokens: name the block's mask arguments in Tower.masks, or detach"
        )
    heads, kept = mask.shape[1], state.positions
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.shape[2] != 1:
        mask = mask.gather(2, kept[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    return mask.gather(3, kept[:, None, None, :].expand(-1, heads, mask.shape[2], -1))


def _four_axes(mask: Tensor) -> Tensor:
    """[.., .., T or 1, T] the mask with leading axes of size 1."""
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


def _with_cross_token(mask: Tensor, state: TokenState) -> Tensor:
    """The mask with a row and a column for the cross token.

    A cross token that is a copy of the class token gets the class token's row and column. Otherwise, all tokens attend
    to the cross token, and it attends to the same tokens as the first token. In a causal tower no other token attends
    to the cross token, and it attends to the same tokens as the last token.
    """
    causal = state.forward.causal
    like_first = state.forward.class_token and not causal
    visible_value, hidden_value = (True, False) if mask.dtype == torch.bool else (0.0, -math.inf)
    column = mask[..., :1] if like_first else torch.full_like(mask[..., :1], hidden_value if causal else visible_value)
    mask = torch.cat([mask, column], -1)
    if mask.shape[-2] == 1:
        return mask
    row = mask[..., -1:, :] if causal else mask[..., :1, :]
    if not like_first:
        row = torch.cat([row[..., :-1], torch.full_like(row[..., :1], visible_value)], -1)
    return torch.cat([mask, row], -2)
