"""Triton kernels for `matching.complete_graph` and for the ensembles, which otherwise take many small CUDA kernels.

`usable` says whether they are used. Their results are deterministic. Once tile sizes are chosen, the CPU never waits
for the GPU.

Shapes: B batch, T tokens, C channels, r removed, N = T - r kept.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_lock = threading.Lock()
_launching = threading.Lock()  # Triton's autotuner stores the arguments of a call on itself.
_disabled = 0

OLDEST_TRITON = (3, 4)  # In the interpreter of 3.0 the kernels compute wrong results; 3.1 to 3.3 are not tested.


def usable(tensor: Tensor) -> bool:
    """Whether the kernels are used for `tensor`; otherwise plain tensor operators are.

    The kernels need CUDA (compute capability 8.0 or higher), Triton, and float32, float16 or bfloat16. They are not
    used where something records operators, as a kernel is not an operator: while tracing, compiling or exporting,
    inside `torch.func` and dispatch modes (such as those that count FLOPs). Nor are they for tensors without data.
    `disabled` and the environment variable CROSSGET_TRITON=0 switch them off.
    """
    # Compilation is tested first, so that the other conditions are not traced.
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
    """Context in which `usable` is False, in all threads: autograd recomputes checkpointed blocks in another thread."""
    global _disabled
    with _lock:
        _disabled += 1
    try:
        yield
    finally:
        with _lock:
            _disabled -= 1


def complete_graph(
    keys: Tensor,
    protected: Tensor,
    r: int,
    importance: Tensor | None,
    pick: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`matching.complete_graph` with `ties="stable"`, without any [T, T] matrix in memory.

    The similarities are computed three times, tile by tile: for the row maxima, for the priorities, and for the r rows
    of the sources. By the number of operations and bytes, computing them a second time on tensor cores costs about as
    much as writing a [B, T, T] matrix and loading it again, and it needs no memory.

    The first call with a new C, a new dtype, or a new power of two above T or r measures the time of a few tile
    sizes, and waits for the GPU.

    Args:
        keys: [B, T, C] float32, float16 or bfloat16, of any norm and strides; copied unless channels are contiguous.
        protected: [B, T] true for tokens that are neither source nor destination.
        r: number of sources, at most `Candidates.limit(r)`.
        importance: [B, T] scores; None: the choice of sources uses none.
        pick: `Candidates.sources`, for rows with padding, whose tokens are protected; None: there is no padding.

    Returns:
        Sources [B, r] in the order in which they were picked, and their destinations [B, r].
    """
    kernels = _kernels()
    keys = _contiguous_channels(keys.detach())
    batch, tokens, channels = keys.shape
    source = torch.empty(batch, r, dtype=torch.long, device=keys.device)
    if source.numel() == 0:
        return source, source.clone()
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    best, priority = torch.empty_like(norms), torch.empty_like(norms)
    group = torch.empty(batch, tokens, dtype=torch.int8, device=keys.device)
    is_source = torch.empty_like(group)
    bucket, r_bucket = _power_of_two(tokens), _power_of_two(r)
    strides = keys.stride()[:2]

    def tiles(rows: int) -> Any:
        return lambda meta: (batch * -(-rows // meta["BLOCK_M"]),)

    with _launching, _device_of(keys):
        kernels.row_max[tiles(tokens)](
            keys, norms, protected, best, group, is_source, tokens, bucket, *strides, *protected.stride(), channels,
        )  # fmt: skip
        kernels.priority[tiles(tokens)](
            keys, norms, best, group, importance, priority, tokens, bucket, *strides,
            *((0, 0) if importance is None else importance.stride()), channels,
        )  # fmt: skip
        source = torch.topk(priority, r, dim=1, largest=False, sorted=True).indices
        source = source if pick is None else pick(source, r)
        is_source.scatter_(1, source, 1)
        destination = torch.empty_like(source)
        kernels.nearest[tiles(r)](
            keys, norms, group, is_source, source, destination, tokens, r, bucket, r_bucket, *strides, channels
        )
    return source, destination


def pull(
    tokens: Tensor,
    kept: Tensor,
    source: Tensor,
    destination: Tensor,
    new_destination: Tensor,
    taken: Tensor,
    given: Tensor,
) -> Tensor:
    """The kept tokens, each with its sources merged into it; summed in float32, rounded once.

    out[b, n] = tokens[b, kept[b, n]] + sum over sources a with new_destination[b, a] == n of
    taken[b, a] * tokens[b, source[b, a]] - given[b, a] * tokens[b, destination[b, a]]

    Args:
        tokens: [B, T, C] float32, float16 or bfloat16. It is the only input with a gradient, and has no second one.
        kept: [B, N] positions of the kept tokens. `kept` and `source` hold every position exactly once.
        source: [B, r] positions of the tokens that are removed.
        destination: [B, r] position of the token that each source is merged into. Not used, as it is equal to `kept`
            at `new_destination`.
        new_destination: [B, r] position of each destination among the kept tokens; -1 for a source that is dropped.
        taken: [B, r] float32, the weight of each source.
        given: [B, r] float32, the weight that its destination loses.

    Returns:
        [B, N, C] in the dtype of `tokens`.
    """
    out: Tensor = _Pull.apply(tokens, kept, source, new_destination, taken, given)
    return out


class _Pull(torch.autograd.Function):
    """`pull`, with `push` as its gradient."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, kept: Tensor, source: Tensor, new_destination: Tensor, taken: Tensor, given: Tensor
    ) -> Tensor:
        plan = [_contiguous_channels(x) for x in (kept, source, new_destination, taken, given)]
        ctx.save_for_backward(*plan)
        return _move("pull", tokens, plan, rows=int(kept.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, source, *_ = plan = ctx.saved_tensors
        return _move("push", grad, plan, rows=int(kept.shape[1] + source.shape[1])), *[None] * 5


def _move(kernel: str, x: Tensor, plan: list[Tensor], rows: int) -> Tensor:
    """[B, rows, C] the output of the kernel `pull` or `push` on `x` [B, T or N, C]."""
    x = _contiguous_channels(x)
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
        and type(tensor) in (Tensor, torch.nn.Parameter)  # no fake, functional or distributed tensor
        and torch.version.hip is None
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
        and _kernels() is not None
    )


@functools.cache
def _kernels() -> Any:
    """The module with the kernels; None if there is no Triton, which is a dependency of only some builds of torch."""
    if importlib.util.find_spec("triton") is None:
        return None
    major, minor, *_ = importlib.import_module("triton").__version__.split(".")
    if (int(major), int(minor)) < OLDEST_TRITON:
        return None
    return importlib.import_module("crossget.methods._triton")


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
