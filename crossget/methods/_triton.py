# mypy: ignore-errors
# Written in Triton's language, which shares Python's grammar but not its types. Only `crossget.methods.kernels` imports
# this file, where Triton exists.
"""The Triton kernels: three for complete-graph matching, two for the ensembles and their gradient.

`crossget.methods.kernels` describes the arguments and their shapes. Strides are in elements, not bytes. An index that
is multiplied by a stride has 64 bits.
"""

import torch
import triton
import triton.language as tl

# Matching -------------------------------------------------------------------------------------------------------------


@triton.jit
def _cosines(
    row, column, row_norm, column_norm, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_M, BLOCK_N] of the keys that start at `row` and at `column`.

    The products are scaled, rather than the keys, so that bfloat16 keys are not rounded again. S_ij and S_ji are equal
    to the last bit, so that mutual nearest neighbours tie: both sums run over the channels in the same order, and the
    two scales are multiplied with each other first. (tf32x3 would be faster than ieee, but its sums differ.) If S_ij
    and S_ji differed, the token with the larger maximum would rank higher; nothing else depends on it.
    """
    k = tl.arange(0, BLOCK_K)
    dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, C, BLOCK_K):
        if C % BLOCK_K == 0:
            a = tl.load(row[:, None] + (start + k)[None, :])
            b = tl.load(column[None, :] + (start + k)[:, None])
        else:
            inside = start + k < C
            a = tl.load(row[:, None] + (start + k)[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(column[None, :] + (start + k)[:, None], mask=inside[:, None], other=0.0)
        dot = tl.dot(a, b, dot, input_precision="ieee")
    # As in torch.nn.functional.normalize: a key of norm zero has a cosine of 0 with every other.
    row_scale = 1.0 / tl.maximum(row_norm, 1e-12)
    column_scale = 1.0 / tl.maximum(column_norm, 1e-12)
    return dot * (row_scale[:, None] * column_scale[None, :])


@triton.jit
def _groups(protected, protected_t, t, T):
    """0 for tokens that are matched, -1 for others."""
    return -tl.load(protected + t * protected_t, mask=t < T, other=1).to(tl.int32)


@triton.jit
def _load(keys, norms, group, keys_t, t, T):
    """The addresses of the keys of some tokens, the norms of these keys, and the tokens' groups."""
    start = keys + tl.minimum(t, T - 1).to(tl.int64) * keys_t
    return start, tl.load(norms + t, mask=t < T, other=1.0), tl.load(group + t, mask=t < T, other=-1).to(tl.int32)


def row_max(
    keys, norms, protected, best, group, is_source, T, bucket, keys_b, keys_t, protected_b, protected_t,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """best [B, T]: the largest similarity of each token. Also sets `group`, and `is_source` to 0."""
    tiles = tl.cdiv(T, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys += b * keys_b
    norms += b * T
    protected += b * protected_b
    # Rows beyond the end load the last token, so that the inner loop needs no mask. They are not matched, as their
    # group is -1.
    row = keys + tl.minimum(i, T - 1).to(tl.int64) * keys_t
    row_norm = tl.load(norms + i, mask=i < T, other=1.0)
    row_group = _groups(protected, protected_t, i, T)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for start in range(0, T, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        column = keys + tl.minimum(j, T - 1).to(tl.int64) * keys_t
        column_norm = tl.load(norms + j, mask=j < T, other=1.0)
        column_group = _groups(protected, protected_t, j, T)
        s = _cosines(row, column, row_norm, column_norm, C, BLOCK_M, BLOCK_N, BLOCK_K)
        allowed = (row_group[:, None] == column_group[None, :]) & (row_group[:, None] >= 0)
        allowed = allowed & (i[:, None] != j[None, :])
        top = tl.maximum(top, tl.max(tl.where(allowed, s, float("-inf")), 1))
    tl.store(best + b * T + i, top, mask=i < T)
    tl.store(group + b * T + i, row_group.to(tl.int8), mask=i < T)
    tl.store(is_source + b * T + i, tl.zeros((BLOCK_M,), dtype=tl.int8), mask=i < T)


def priority(
    keys, norms, best, group, importance, out, T, bucket, keys_b, keys_t, importance_b, importance_t, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, T]: importance minus the largest similarity to a token below in the ranking."""
    tiles = tl.cdiv(T, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys += b * keys_b
    norms += b * T
    best += b * T
    group += b * T
    row, row_norm, row_group = _load(keys, norms, group, keys_t, i, T)
    row_best = tl.load(best + i, mask=i < T, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for start in range(0, T, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        column, column_norm, column_group = _load(keys, norms, group, keys_t, j, T)
        column_best = tl.load(best + j, mask=j < T, other=0.0)
        s = _cosines(row, column, row_norm, column_norm, C, BLOCK_M, BLOCK_N, BLOCK_K)
        below = column_best[None, :] < row_best[:, None]
        # Mutual nearest neighbours have the same largest similarity. The earlier one ranks higher.
        below = below | ((column_best[None, :] == row_best[:, None]) & (j[None, :] > i[:, None]))
        allowed = (row_group[:, None] == column_group[None, :]) & (row_group[:, None] >= 0) & below
        top = tl.maximum(top, tl.max(tl.where(allowed, s, float("-inf")), 1))
    value = -top
    if importance is not None:
        at = importance + b * importance_b + i * importance_t
        value = tl.load(at, mask=i < T, other=0.0).to(tl.float32) - top
    tl.store(out + b * T + i, value, mask=i < T)


def nearest(
    keys, norms, group, is_source, source, out, T, R, bucket, r_bucket, keys_b, keys_t, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, R]: the most similar kept token of each source; of equally similar ones, the first."""
    tiles = tl.cdiv(R, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    a = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys += b * keys_b
    norms += b * T
    group += b * T
    is_source += b * T
    i = tl.load(source + b * R + a, mask=a < R, other=0).to(tl.int32)
    row, row_norm, row_group = _load(keys, norms, group, keys_t, i, T)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    at = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, T, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        column, column_norm, column_group = _load(keys, norms, group, keys_t, j, T)
        stays = tl.load(is_source + j, mask=j < T, other=1) == 0
        s = _cosines(row, column, row_norm, column_norm, C, BLOCK_M, BLOCK_N, BLOCK_K)
        allowed = (row_group[:, None] == column_group[None, :]) & (row_group[:, None] >= 0) & stays[None, :]
        value, place = tl.max(tl.where(allowed, s, float("-inf")), 1, return_indices=True)
        at = tl.where(value > top, start + place, at)
        top = tl.maximum(top, value)
    tl.store(out + b * R + a, at.to(tl.int64), mask=a < R)


# Ensemble -------------------------------------------------------------------------------------------------------------


# For every output row, all r sources are searched for those that are merged into it. That reads r numbers from the
# cache, while the row itself has hundreds of channels. A row has r / N sources on average, fewer than one, so the loop
# over them seldom runs. Sorting the sources by destination would save the search, but two more launches cost more.

# Not specialised: the number of tokens differs between blocks, and a new number must not compile a new kernel.
_VARYING = ["N", "R", "kept_b", "source_b", "new_destination_b", "taken_b", "given_b"]


@triton.jit(do_not_specialize=_VARYING)
def pull(
    tokens, kept, source, new_destination, taken, given, out, N, R, tokens_b, tokens_t, kept_b, source_b,
    new_destination_b, taken_b, given_b, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, N, C]: one program per row and part of the channels. Sources are added in the order of `source`."""
    b = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens += b * tokens_b
    t = tl.load(kept + b * kept_b + n)
    itself = tl.load(tokens + t * tokens_t + c, mask=c < C, other=0.0).to(tl.float32)
    gain = tl.zeros((BLOCK_C,), dtype=tl.float32)
    share = 1.0
    a = tl.arange(0, BLOCK_R)
    for start in range(0, R, BLOCK_R):
        is_mine = tl.load(new_destination + b * new_destination_b + start + a, mask=start + a < R, other=-1) == n
        share -= tl.sum(tl.load(given + b * given_b + start + a, mask=is_mine, other=0.0), 0)
        last = -1
        for _ in range(tl.sum(is_mine.to(tl.int32), 0)):
            last = tl.min(tl.where(is_mine & (a > last), a, BLOCK_R), 0)
            t = tl.load(source + b * source_b + start + last)
            x = tl.load(tokens + t * tokens_t + c, mask=c < C, other=0.0).to(tl.float32)
            gain += tl.load(taken + b * taken_b + start + last) * x
    total = share * itself + gain
    tl.store(out + (b * N + n) * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_VARYING)
def push(
    grad, kept, source, new_destination, taken, given, out, N, R, grad_b, grad_n, kept_b, source_b,
    new_destination_b, taken_b, given_b, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, N + R, C]: the gradient of `pull`. The first N programs are those of kept tokens, the others of sources.

    A token is kept or a source, so every row of `out` is written once. A dropped source has no destination, and gets 0.
    """
    slot = tl.program_id(0) % (N + R)
    b = (tl.program_id(0) // (N + R)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if slot < N:
        n = slot.to(tl.int64)
        t = tl.load(kept + b * kept_b + n)
        share = 1.0
        a = tl.arange(0, BLOCK_R)
        for start in range(0, R, BLOCK_R):
            is_mine = tl.load(new_destination + b * new_destination_b + start + a, mask=start + a < R, other=-1) == n
            share -= tl.sum(tl.load(given + b * given_b + start + a, mask=is_mine, other=0.0), 0)
    else:
        n = tl.load(new_destination + b * new_destination_b + slot - N)
        t = tl.load(source + b * source_b + slot - N)
        share = tl.load(taken + b * taken_b + slot - N)
    row = tl.load(grad + b * grad_b + n * grad_n + c, mask=(c < C) & (n >= 0), other=0.0).to(tl.float32)
    tl.store(out + (b * (N + R) + t) * C + c, (share * row).to(out.dtype.element_ty), mask=c < C)


# Choice of tiles ------------------------------------------------------------------------------------------------------


def _tiles(*sizes):
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]


def _suited(configs, named_args, **others):
    """Small tiles for float32, whose products are unrolled without tensor cores; large ones for half precision."""
    full = named_args["keys"].dtype == torch.float32
    return [config for config in configs if (config.kwargs["BLOCK_K"] == 32) == full]


# Few, since each is measured for every tuning key. Triton skips those that do not fit a device's shared memory.
_SQUARE = _tiles((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4),
                 (64, 64, 32, 8, 2), (32, 64, 32, 4, 3))  # fmt: skip
# There are only r rows, one or two programs per image. So tiles have few rows, and many columns for fewer steps.
_FLAT = _tiles((16, 128, 64, 4, 4), (32, 128, 64, 4, 3), (64, 64, 64, 4, 4), (16, 64, 32, 4, 3), (32, 64, 32, 4, 3))


def _tuned(function, configs, key):
    # Not specialised, as _VARYING.
    names = ["T", "R", "bucket", "r_bucket", "protected_b", "importance_b"]
    kernel = triton.jit(do_not_specialize=[name for name in names if name in function.__code__.co_varnames])(function)
    if not isinstance(kernel, triton.JITFunction):
        # Triton's interpreter, where time has no meaning: small tiles, so that small inputs need several.
        return triton.autotune(_tiles((16, 32, 32, 1, 1)), key=key)(kernel)
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": _suited})(kernel)


row_max = _tuned(row_max, _SQUARE, ["bucket", "C"])
priority = _tuned(priority, _SQUARE, ["bucket", "C"])
nearest = _tuned(nearest, _FLAT, ["bucket", "r_bucket", "C"])
