"""FlashAttention's functions on a CPU, in plain products: they take no bias, and heads of at most 256 channels."""

import itertools

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """[B, T, H, D], [B, S, G, D] and [B, S, G, D] -> [B, T, H, D]; the last query sees all keys."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    hidden = (behind < 0) & causal
    if window_size[0] >= 0:
        hidden |= behind > window_size[0]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """[N, H, D], [M, G, D] and [M, G, D] -> [N, H, D]: sequences one after the other."""
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_k[-1] == len(k)
    edges = [(int(a), int(b)) for a, b in zip(cu_seqlens_q, cu_seqlens_k, strict=True)]
    parts = [
        flash_attn_func(
            q[a:b][None], k[c:d][None], v[c:d][None], softmax_scale=softmax_scale, causal=causal,
            window_size=window_size,
        )[0]
        for (a, c), (b, d) in itertools.pairwise(edges)
    ]  # fmt: skip
    return torch.cat(parts)
