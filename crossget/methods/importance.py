"""Importance scores of tokens: by the query of a guide, or by the attention received.

The guide is one token whose query is compared with the keys of all tokens: the cross token, the class token, or the
end-of-text token. A token with a high score is less likely to become a source (a token that is removed), and it gets a
larger weight when two tokens are merged.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head. Scores are float32 or float64, without gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from crossget.methods.indexing import exceeds, size_of


def by_guide(keys: Tensor, inverse_norms: Tensor, query: Tensor) -> Tensor:
    """The cosine of each token's key with the guide's query.

    Args:
        keys: [B, T, C].
        inverse_norms: [B, T] reciprocal of the norm of each key.
        query: [B, 1, C] query of the guide.

    Returns:
        [B, T] in [-1, 1].

    Source: CrossGET (arXiv 2305.17455), section 3.1.
    """
    query = query.to(keys.dtype)
    norm: Tensor = torch.linalg.vector_norm(query, dim=-1).clamp_min(1e-12)
    return torch.bmm(query, keys.transpose(1, 2)).squeeze(1) * (inverse_norms / norm)


def by_attention(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """The attention that each token receives: from all queries but the last on average, plus that from the last query.

    The last token is the cross token, if there is one. Without one, the query of an ordinary last token gets the same
    large weight.

    Args:
        weights: [.., T, T] attention probabilities (query, key).
        valid: [B, T] false for padding, whose queries do not count; `weights` is then [B, .., T, T]. None: there is
            none.

    Returns:
        [.., T].

    Source: the CrossGET authors' implementation for LLaVA-1.5.
    """
    if weights.shape[-2] == 1:
        return weights[..., 0, :]
    if valid is not None:
        place = valid.cumsum(1)
        last = valid & (place == place[:, -1:])
        share = (valid & ~last).to(weights.dtype) / (place[:, -1:] - 1).clamp(min=1) + last.to(weights.dtype)
        share = share.reshape(share.shape[0], *[1] * (weights.dim() - 2), share.shape[1])
        return (share @ weights).squeeze(-2)
    return weights[..., :-1, :].mean(-2) + weights[..., -1, :]


def by_class_attention(attention: Tensor, sizes: Tensor, valid: Tensor | None = None) -> Tensor:
    """log(1 + a / s): a is the class token's attention to a token, s is the token's size over the sum of all sizes.

    Behind the connector, a is the share of the tower's attention that the token's members received.

    `matching.ward` and `merging.normalized` weight a token by its mass, size * exp(score). With this score the mass is
    size + a * (sum of all sizes): half of the total mass is distributed by size, and half by attention. If attention is
    proportional to size, all masses double, which has no effect. A token that gets no attention has a mass equal to its
    size.

    Args:
        attention: [B, T] attention probabilities of the class token's query, averaged over heads, computed with
            log(size) added to the attention scores.
        sizes: [B, T] number of input tokens that each token stands for.
        valid: [B, T] false for padding, whose sizes do not count; None: there is none.

    Returns:
        [B, T], at least 0.
    """
    total = (sizes if valid is None else sizes * valid).sum(1, keepdim=True)
    return (attention * (total / sizes)).log1p()


def attention_received(
    queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, valid: Tensor | None = None
) -> Tensor:
    """`by_attention`, averaged over heads, for a fused attention, which does not return its probabilities.

    The [B, H, T, T] probabilities are computed again and reduced to one number per token, a few heads at a time. On a
    CPU, the heads of one step fit the cache. On other devices and in a compiled graph, their number bounds the memory.
    An exported graph computes all of them at once.

    Args:
        queries: [B, H, T, D], or [B, H, 1, D] for the attention of one token.
        keys: [B, H, T, D].
        bias: [B or 1, H or 1, T or 1, T] additive mask plus log(size), added to the attention scores; None for
            neither.
        scale: factor of the attention scores.
        valid: [B, T] false for padding, as in `by_attention`.

    Returns:
        [B, T] in float32 or float64.
    """
    batch, heads, tokens = size_of(keys, 0), size_of(keys, 1), size_of(keys, 2)
    eager_cpu = queries.device.type == "cpu" and not torch.compiler.is_compiling()
    limit = _CPU_SCORES if eager_cpu else _MAX_SCORES
    # Compared first: the code below would fix sizes in a compiled graph.
    if not exceeds(batch * heads * tokens**2, limit):
        return _received(queries, keys, bias, scale, valid) / heads
    at_once = max(1, limit // tokens**2)
    rows, heads_at_once = max(1, at_once // heads), min(heads, at_once)
    received = []
    for row in range(0, batch, rows):
        parts = [(slice(row, row + rows), slice(h, h + heads_at_once)) for h in range(0, heads, heads_at_once)]
        real = None if valid is None else valid[row : row + rows]
        sums = [_received(queries[part], keys[part], _part(bias, *part), scale, real) for part in parts]
        received.append(functools.reduce(torch.add, sums) / heads)
    return received[0] if len(received) == 1 else torch.cat(received)


def mean_attention(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The attention that each token receives, averaged over heads and over queries that are no padding.

    The probabilities are computed for some queries at a time, whose number bounds the memory.

    Args:
        queries: [B, H, Q, D].
        keys: [B, H or a divisor of it, T, D].
        bias: [B or 1, 1, Q or 1, T] additive mask, added to the attention scores; None: there is none. With as many
            queries as keys, a query that does not attend to itself is padding.
        scale: factor of the attention scores.

    Returns:
        [B, T] in float32 or float64.

    Source: VisionZip (CVPR 2025, https://arxiv.org/abs/2412.04467), section 3.2: how dominant tokens are scored.
    """
    heads, count = int(queries.shape[1]), int(queries.shape[2])
    keys = keys.repeat_interleave(heads // int(keys.shape[1]), 1)
    step = max(1, _MEAN_SCORES // (int(queries.shape[0]) * heads * int(keys.shape[2])))
    dtype = torch.promote_types(queries.dtype, torch.float32)
    total = torch.zeros(len(keys), keys.shape[2], dtype=dtype, device=keys.device)
    real = torch.ones(len(keys), count, dtype=dtype, device=keys.device)
    if bias is not None and count == keys.shape[2]:
        own = bias[:, 0, 0] if bias.shape[2] == 1 else bias[:, 0].diagonal(dim1=1, dim2=2)
        real = real * (own > torch.finfo(bias.dtype).min / 2)
    for start in range(0, count, step):
        scores = (queries[:, :, start : start + step] * scale) @ keys.transpose(-1, -2)
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, start : start + step])
        total += torch.einsum("bq,bhqt->bt", real[:, start : start + step], scores.softmax(-1, dtype=dtype))
    return total / (heads * real.sum(1, keepdim=True))


# Attention scores that are computed at a time.
_CPU_SCORES, _MAX_SCORES, _MEAN_SCORES = 1 << 20, 1 << 27, 1 << 24


def _received(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, valid: Tensor | None) -> Tensor:
    """[B, T] attention received, summed over heads."""
    batch, heads, count = (size_of(queries, dim) for dim in range(3))
    if valid is None and count > 1 and exceeds(batch * heads * count * size_of(keys, 2), _MAX_SCORES):
        last = _received(queries[:, :, -1:], keys, None if bias is None else bias[:, :, -1:], scale, None)
        others = bias if bias is None or bias.shape[2] == 1 else bias[:, :, :-1]
        return last + heads * mean_attention(queries[:, :, :-1], keys, others, scale)
    scores = (queries * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return by_attention(wide(scores).softmax(-1), valid).sum(1)


def wide(x: Tensor) -> Tensor:
    """The same in float32, if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _part(bias: Tensor | None, rows: slice, heads: slice) -> Tensor | None:
    """The part of a bias for some images and heads; an axis of size 1 is broadcast, and stays."""
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[rows]
    return bias if bias.shape[1] == 1 else bias[:, heads]
