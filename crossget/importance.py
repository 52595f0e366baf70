"""How tokens are scored: by a guide's query (cross token, class token) or by the attention they receive.

A high score keeps a token from becoming a source, and gives it more weight when two tokens join.
Shapes: B batch, T tokens, C channels, H heads, D channels of a head. Scores are float32 or wider, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def by_guide(unit_keys: Tensor, queries: Tensor, guide: Tensor) -> Tensor:
    """How well each token's key answers the guide's query: a cosine.

    Args:
        unit_keys: [B, T, C] of length one.
        queries: [B, T, C].
        guide: [B] position of the guide: the cross token in vision, the end-of-text token in text, or the class token.

    Returns:
        [B, T] in [-1, 1].

    Source: CrossGET (arXiv 2305.17455), section 3.1.
    """
    query = queries.gather(1, guide[:, None, None].expand(-1, 1, queries.shape[2])).to(unit_keys.dtype)
    return (unit_keys @ F.normalize(query, dim=-1).transpose(1, 2)).squeeze(2)


def by_attention(weights: Tensor) -> Tensor:
    """The attention each token receives: the mean over all queries but the last, plus that of the last query.

    The last token is the cross token; without one it is an ordinary token and simply counts more.

    Args:
        weights: [B, T, T] attention probabilities (query, key), averaged over heads.

    Returns:
        [B, T].

    Source: the reference implementation for LLaVA-1.5.
    """
    if weights.shape[1] == 1:
        return weights[:, 0]
    return weights[:, :-1].mean(1) + weights[:, -1]


def attention_weights(logits: Tensor) -> Tensor:
    """Attention probabilities averaged over heads.

    Args:
        logits: [B, H, T, T] scaled scores, with mask and size bias.

    Returns:
        [B, T, T] in float32 or wider.
    """
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return wide.softmax(-1).mean(1)
