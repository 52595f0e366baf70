"""How tokens are scored: by the query of a guide, by the attention they receive, or by their similarity to a text.

A guide is one token whose query scores all tokens: the cross token, the class token, or the end-of-text token.
A high score keeps a token from becoming a source, and gives it more weight when two tokens are merged.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head. Scores are float32 or wider, without gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from crossget.methods.indexing import size_of


def by_guide(keys: Tensor, inverse_norms: Tensor, query: Tensor) -> Tensor:
    """The cosine of each token's key with the guide's query.

    Args:
        keys: [B, T, C].
        inverse_norms: [B, T] one over the norm of each key.
        query: [B, 1, C] of the guide.

    Returns:
        [B, T] in [-1, 1].

    Source: CrossGET (arXiv 2305.17455), section 3.1.
    """
    query = query.to(keys.dtype)
    norm: Tensor = torch.linalg.vector_norm(query, dim=-1).clamp_min(1e-12)
    return torch.bmm(query, keys.transpose(1, 2)).squeeze(1) * (inverse_norms / norm)


def by_attention(weights: Tensor) -> Tensor:
    """The attention each token receives: the mean over all queries but the last, plus that of the last query.

    The last token is the cross token, if there is one. Otherwise it is an ordinary token whose query weighs more.

    Args:
        weights: [.., T, T] attention probabilities (query, key).

    Returns:
        [.., T].

    Source: the reference implementation for LLaVA-1.5.
    """
    if weights.shape[-2] == 1:
        return weights[..., 0, :]
    return weights[..., :-1, :].mean(-2) + weights[..., -1, :]


def by_class_attention(attention: Tensor, sizes: Tensor) -> Tensor:
    """log(1 + a), where a is the class token's attention to a token over that token's share of all sizes.

    `matching.ward` and `merging.normalized` weigh a token by its mass, size * exp(score). With this score the mass is
    the token's size, plus the class token's attention to it times the sum of all sizes: half of all mass is spread by
    size, half by attention. Where attention is proportional to size, all masses double, which changes nothing. A token
    that gets no attention has the mass of its size.

    Args:
        attention: [B, T] of the class token, averaged over heads, computed with log(size) added to the scores.
        sizes: [B, T] input tokens per token.

    Returns:
        [B, T], at least 0.
    """
    return (attention * (sizes.sum(1, keepdim=True) / sizes)).log1p()


def attention_received(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`by_attention`, averaged over heads, for a fused attention, which does not return its probabilities.

    Of [B, H, T, T] probabilities one number per token is needed. So they are computed and summed up a few heads at a
    time: on a CPU as many as fit its cache, elsewhere and in a compiled graph as many as bound the memory.

    Args:
        queries: [B, H, T, D], or [B, H, 1, D] for the attention of one token.
        keys: [B, H, T, D].
        bias: [B or 1, H or 1, T or 1, T] added to the scores: mask and log(size). None: nothing is added.
        scale: of the scores.

    Returns:
        [B, T] in float32 or wider.
    """
    batch, heads, tokens = size_of(keys, 0), size_of(keys, 1), size_of(keys, 2)
    cached = queries.device.type == "cpu" and not torch.compiler.is_compiling()
    most = _CACHED if cached else _BOUND
    if batch * heads * tokens**2 <= most:  # Asked first: below it no size enters a compiled graph as a constant.
        return _received(queries, keys, bias, scale) / heads
    at_once = max(1, most // tokens**2)
    rows, heads_at_once = max(1, at_once // heads), min(heads, at_once)
    received = []
    for row in range(0, batch, rows):
        parts = [(slice(row, row + rows), slice(h, h + heads_at_once)) for h in range(0, heads, heads_at_once)]
        sums = [_received(queries[part], keys[part], _part(bias, *part), scale) for part in parts]
        received.append(functools.reduce(torch.add, sums) / heads)
    return received[0] if len(received) == 1 else torch.cat(received)


def by_text(cosines: Tensor, free: Tensor) -> Tensor:
    """The similarity of each token to a text, scaled to [0, 1] within each row.

    A CLIP's cosines between tokens and a text span a small range, far below that of the similarities between tokens
    from which a matching subtracts them. So they are scaled: the least similar free token of a row gets 0, the most
    similar one 1.

    Args:
        cosines: [B, T] of tokens, in the space of texts, with the text.
        free: [B, T] false for protected tokens and padding, which do not count here.

    Returns:
        [B, T] in [0, 1] for free tokens; 0 for all others, and where all free ones are equally similar.
    """
    low = cosines.masked_fill(~free, torch.inf).amin(1, keepdim=True)
    high = cosines.masked_fill(~free, -torch.inf).amax(1, keepdim=True)
    span = high - low
    return torch.where(free & (span > 0), (cosines - low) / span, torch.zeros_like(cosines))


_CACHED, _BOUND = 1 << 20, 1 << 27  # scores at a time


def _received(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[B, T] attention received, summed over heads."""
    scores = (queries * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return by_attention(wide.softmax(-1)).sum(1)


def _part(bias: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    """The part of a bias for some images and heads; an axis of size 1 is for all of them."""
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[rows]
    return bias if bias.shape[1] == 1 else bias[:, heads]
