"""Triton kernels that stand in for the many small ones of `matching.complete_graph` and of the ensembles, on CUDA.

Whether they may is asked by `usable`. Everything is deterministic, and once tile sizes are chosen nothing waits.

Shapes: B batch, T tokens, C channels, r removed, N = T - r left.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_lock = threading.Lock()
_launching = threading.Lock()  # Triton's tuner keeps the arguments of a call in itself.
_disabled = 0

OLDEST_TRITON = (3, 4)  # on the interpreter of 3.0 the kernels come out wrong; between the two nothing was tried


def usable(tensor: Tensor) -> bool:
    """Whether the kernels may compute with `tensor`: otherwise plain tensor operators have to.

    They need CUDA (compute capability 8.0), Triton, and float32, float16 or bfloat16. They also step back where
    somebody looks at the operators, to which a kernel says nothing: while tracing, compiling or exporting, inside
    `torch.func` and dispatch modes (which count FLOPs, for one), and for tensors that hold no data. And they can be
    switched off, by `disabled` or by the environment variable CROSSGET_TRITON=0.
    """
    # Compilation first: nothing below it is then traced.
    return (
        not torch.compiler.is_compiling()
        and not _disabled
        and os.environ.get("CROSSGET_TRITON") != "0"
        and _runs_on(tensor)
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside, `usable` is False, in all threads: a backward pass that computes blocks again has one of its own."""
    global _disabled
    with _lock:
        _disabled += 1
    try:
        yield
    finally:
        with _lock:
            _disabled -= 1


def complete_graph(
    keys: Tensor, protected: Tensor, valid: Tensor | None, r: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`matching.complete_graph` with `ties="stable"`, without any [T, T] matrix in memory.

    The similarities are computed three times, tile by tile (row maxima, priorities, and the r rows of the sources).
    Twice the products on tensor cores weigh about as much as writing a [B, T, T] matrix and reading it again would,
    by count of operations and bytes, and the memory is left to the model.

    The first call with a new C, dtype or size of T and r times a few tile sizes, and waits for them.

    Args:
        keys: [B, T, C] float32, float16 or bfloat16, of any length; any strides, best with the channels side by side.
        protected: [B, T] true for tokens that are neither source nor destination.
        valid: [B, T] tokens of different value are not matched; None when all are alike.
        r: how many sources, at most `Candidates.limit`.
        importance: [B, T]; None leaves importance out of the choice.

    Returns:
        sources [B, r] in the order they were picked, and destinations [B, r].
    """
    kernels = _kernels()
    keys = _side_by_side(keys.detach())
    batch, tokens, channels = keys.shape
    source = torch.empty(batch, r, dtype=torch.long, device=keys.device)
    if source.numel() == 0:
        return source, source.clone()
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    best, priority = torch.empty_like(norms), torch.empty_like(norms)
    group = torch.empty(batch, tokens, dtype=torch.int8, device=keys.device)
    leaves = torch.empty_like(group)
    bucket, r_bucket = _power_of_two(tokens), _power_of_two(r)
    strides = keys.stride()[:2]

    def tiles(rows: int) -> Any:
        return lambda meta: (batch * -(-rows // meta["BLOCK_M"]),)

    with _launching, _device_of(keys):
        kernels.row_max[tiles(tokens)](
            keys, norms, protected, valid, best, group, leaves, tokens, bucket, *strides, *protected.stride(),
            *((0, 0) if valid is None else valid.stride()), channels,
        )  # fmt: skip
        kernels.priority[tiles(tokens)](
            keys, norms, best, group, importance, priority, tokens, bucket, *strides,
            *((0, 0) if importance is None else importance.stride()), channels,
        )  # fmt: skip
        source = torch.topk(priority, r, dim=1, largest=False, sorted=True).indices
        leaves.scatter_(1, source, 1)
        destination = torch.empty_like(source)
        kernels.nearest[tiles(r)](
            keys, norms, group, leaves, source, destination, tokens, r, bucket, r_bucket, *strides, channels
        )
    return source, destination


def pull(
    tokens: Tensor, kept: Tensor, source: Tensor, destination: Tensor, arrived: Tensor, take: Tensor, give: Tensor
) -> Tensor:
    """Every token that stays pulls its sources in; sums in float32, rounded once.

    out[b, n] = tokens[b, kept[b, n]] + sum over sources a with arrived[b, a] == n of
    take[b, a] * tokens[b, source[b, a]] - give[b, a] * tokens[b, destination[b, a]]

    Args:
        tokens: [B, T, C] float32, float16 or bfloat16; the only one that carries a gradient, and that only once.
        kept: [B, N] tokens that stay; together with `source` every token exactly once.
        source: [B, r] tokens that leave.
        destination: [B, r] the token each source joins: `kept` at `arrived`, and therefore not read.
        arrived: [B, r] the new position of the destination.
        take: [B, r] float32, what each source adds.
        give: [B, r] float32, what its destination loses.

    Returns:
        [B, N, C] in the dtype of `tokens`.
    """
    out: Tensor = _Pull.apply(tokens, kept, source, arrived, take, give)
    return out


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, kept: Tensor, source: Tensor, arrived: Tensor, take: Tensor, give: Tensor
    ) -> Tensor:
        plan = [_side_by_side(x) for x in (kept, source, arrived, take, give)]
        ctx.save_for_backward(*plan)
        return _move("pull", tokens, plan, rows=int(kept.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, source, *_ = plan = ctx.saved_tensors
        return _move("push", grad, plan, rows=int(kept.shape[1] + source.shape[1])), *[None] * 5


def _move(kernel: str, x: Tensor, plan: list[Tensor], rows: int) -> Tensor:
    x = _side_by_side(x)
    kept, source = plan[:2]
    batch, _, channels = x.shape
    out = torch.empty(batch, rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    r = int(source.shape[1])
    block = min(_power_of_two(channels), 2048)
    with _device_of(x):
        getattr(_kernels(), kernel)[(batch * rows, -(-channels // block))](
            x, *plan, out, int(kept.shape[1]), r, *x.stride()[:2], *[p.stride(0) for p in plan], channels,
            BLOCK_R=min(_power_of_two(r), 1024), BLOCK_C=block, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return out


def _runs_on(tensor: Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.dtype in _DTYPES
        and type(tensor) in (Tensor, torch.nn.Parameter)  # not a fake, functional or distributed one
        and torch.version.hip is None
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
        and _kernels() is not None
    )


@functools.cache
def _kernels() -> Any:
    """The module of the kernels, None without Triton: it comes with some builds of torch only."""
    if importlib.util.find_spec("triton") is None:
        return None
    major, minor, *_ = importlib.import_module("triton").__version__.split(".")
    if (int(major), int(minor)) < OLDEST_TRITON:
        return None
    return importlib.import_module("crossget.methods._triton")


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
