"""The host's attention masks, brought to the tokens that are left: functions of tensors and the tokens' state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossget.core.state import TokenState

# An additive mask hides with -inf, with the smallest number, or, as BERT once did, with -10000, which bfloat16 rounds.
_HIDDEN = -9000.0


def visible(mask: Tensor, batch: int) -> Tensor:
    """[B, T] which tokens any query may see under a mask [B or 1, H or 1, T or 1, T], boolean or additive."""
    seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
    return seen.any(2).any(1).expand(batch, -1)


def find_padding(mask: Tensor, state: TokenState) -> Tensor:
    """[B, T] which tokens any query (in a causal tower: the last one) may see; the cross token is one of them."""
    batch, tokens = state.positions.shape
    mask = _four_axes(mask)
    seen = visible(mask[:, :, -1:] if state.forward.causal else mask, batch)
    return seen if seen.shape[1] == tokens else torch.cat([seen, torch.ones_like(seen[:, :1])], 1)


def fit_mask(mask: Tensor, state: TokenState) -> Tensor:
    """A mask that was made for the host's tokens, for the tokens that are left.

    Args:
        mask: [.., T0 or 1, T0] of up to four axes, boolean or additive; or [.., T0 + 1, T0 + 1], made inside a block
            which took the cross token for one more of the host's.
        state: of the tokens. While they are exactly the host's, the mask is returned as it came: the number of its
            axes decides which kernel runs.

    Returns:
        [B, H or 1, T or 1, T].

    Raises:
        RuntimeError: it was made for another number of tokens.
    """
    batch, tokens = state.positions.shape
    if state.pristine and mask.shape[-1] == tokens:
        return mask
    mask, cross, length = _four_axes(mask), state.forward.cross, state.forward.length
    total = length + int(cross)
    if cross and mask.shape[-1] == total:
        mask = mask[..., :length, :length] if mask.shape[-2] == total else mask[..., :length]
    if cross and mask.shape[-1] == length:
        mask = _with_cross_token(mask, state)
    if mask.shape[-1] != total or mask.shape[-2] not in (1, total):
        raise RuntimeError(
            f"the attention got a mask of shape {list(mask.shape)} in a block with {tokens} tokens of "
            f"originally {length}: expected {length} keys. The tower's mask cannot follow "
            "its tokens; detach, or give the tower's adapter a way to make the mask"
        )
    heads, kept = mask.shape[1], state.positions
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.shape[2] != 1:
        mask = mask.gather(2, kept[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    return mask.gather(3, kept[:, None, None, :].expand(-1, heads, mask.shape[2], -1))


def _four_axes(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask


def _with_cross_token(mask: Tensor, state: TokenState) -> Tensor:
    """A row and a column for the cross token.

    A cross token that copies the class token has the class token's row and column. Any other is seen by all tokens and
    sees what the first token sees. In a causal tower no token sees it, and it sees what the last token sees.
    """
    causal = state.forward.causal
    like_first = state.forward.class_token and not causal
    shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, -math.inf)
    column = mask[..., :1] if like_first else torch.full_like(mask[..., :1], hidden if causal else shown)
    mask = torch.cat([mask, column], -1)
    if mask.shape[-2] == 1:
        return mask
    row = mask[..., -1:, :] if causal else mask[..., :1, :]
    if not like_first:
        row = torch.cat([row[..., :-1], torch.full_like(row[..., :1], shown)], -1)
    return torch.cat([mask, row], -2)
