"""How tokens are scored: by a guide's query (cross token, class token), the attention they receive, or a text.

A high score keeps a token from becoming a source, and gives it more weight when two tokens join.
Shapes: B batch, T tokens, C channels, H heads, D channels of a head. Scores are float32 or wider, without gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def by_guide(keys: Tensor, inverse_norms: Tensor, query: Tensor) -> Tensor:
    """How well each token's key answers the guide's query: a cosine.

    Args:
        keys: [B, T, C].
        inverse_norms: [B, T] one over the length of each key.
        query: [B, 1, C] of the guide: the cross token in vision, the end-of-text token in text, or the class token.

    Returns:
        [B, T] in [-1, 1].

    Source: CrossGET (arXiv 2305.17455), section 3.1.
    """
    query = query.to(keys.dtype)
    length: Tensor = torch.linalg.vector_norm(query, dim=-1).clamp_min(1e-12)
    return torch.bmm(query, keys.transpose(1, 2)).squeeze(1) * (inverse_norms / length)


def by_attention(weights: Tensor) -> Tensor:
    """The attention each token receives: the mean over all queries but the last, plus that of the last query.

    The last token is the cross token; without one it is an ordinary token and simply counts more.

    Args:
        weights: [.., T, T] attention probabilities (query, key).

    Returns:
        [.., T].

    Source: the reference implementation for LLaVA-1.5.
    """
    if weights.shape[-2] == 1:
        return weights[..., 0, :]
    return weights[..., :-1, :].mean(-2) + weights[..., -1, :]


def by_reading(attention: Tensor, sizes: Tensor) -> Tensor:
    """How much more of each token is read than its size says: log(1 + (the class token's attention / share of size)).

    Two read a token: the class token, as much as it attends to it, and all the others, of which is known only that they
    count it by its size. With both in equal parts, size * exp(score) is proportional to their sum: the mass that
    `matching.ward` and `ensemble.normalized` weigh a token by. Attention that is spread evenly changes nothing, and the
    mass of a token that the class token overlooks is that of its size.

    Args:
        attention: [B, T] of the class token, sizes included.
        sizes: [B, T] input tokens per token.

    Returns:
        [B, T], at least 0.
    """
    return (attention * (sizes.sum(1, keepdim=True) / sizes)).log1p()


def attention_received(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`by_attention`, averaged over heads, beside a fused attention that does not show its probabilities.

    What is wanted of [B, H, T, T] probabilities is one number per token, so they are computed and summed up a few heads
    at a time: on a CPU as many as stay in its cache, elsewhere as many as bound the memory.

    Args:
        queries: [B, H, T, D], or [B, H, 1, D] for the attention of one token.
        keys: [B, H, T, D].
        bias: [B or 1, H or 1, T or 1, T] added to the scores: mask and sizes.
        scale: of the scores.

    Returns:
        [B, T] in float32 or wider.
    """
    batch, heads, tokens, _ = keys.shape
    at_once = max(1, (_CACHED if queries.device.type == "cpu" else _BOUND) // int(tokens) ** 2)
    rows, heads_at_once = max(1, at_once // int(heads)), min(int(heads), at_once)
    received = []
    for row in range(0, int(batch), rows):
        parts = [(slice(row, row + rows), slice(h, h + heads_at_once)) for h in range(0, int(heads), heads_at_once)]
        heard = [_heard(queries[part], keys[part], _part(bias, *part), scale) for part in parts]
        received.append(functools.reduce(torch.add, heard) / heads)
    return received[0] if len(received) == 1 else torch.cat(received)


def by_text(cosines: Tensor, free: Tensor) -> Tensor:
    """How near each token is to a text, among the tokens of its row.

    A CLIP's cosines of tokens with a text lie close together, far from those of tokens with each other that a matching
    weighs them against. So they are stretched: the farthest free token of a row gets 0, the nearest one 1.

    Args:
        cosines: [B, T] of tokens in the space of texts, with the text.
        free: [B, T] false for protected tokens and padding, which do not count here.

    Returns:
        [B, T] in [0, 1] for free tokens; 0 for all others, and where all free ones are equally near.
    """
    low = cosines.masked_fill(~free, torch.inf).amin(1, keepdim=True)
    high = cosines.masked_fill(~free, -torch.inf).amax(1, keepdim=True)
    span = high - low
    return torch.where(free & (span > 0), (cosines - low) / span, torch.zeros_like(cosines))


_CACHED, _BOUND = 1 << 20, 1 << 27  # scores at a time


def _heard(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[B, T] attention received, summed over heads."""
    scores = (queries * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return by_attention(wide.softmax(-1)).sum(1)


def _part(bias: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    """The part of a bias for some images and heads; an axis of one is for all of them."""
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[rows]
    return bias if bias.shape[1] == 1 else bias[:, heads]
