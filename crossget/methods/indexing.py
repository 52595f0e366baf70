"""Sizes and rows of tensors, written so that they work eagerly, traced and compiled.

Shapes: B batch, T tokens, C channels, N selected rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_of(x: Tensor, dim: int) -> int:
    """The size of one dimension: symbolic while torch compiles or exports, otherwise a plain int.

    A symbolic size lets one compiled graph serve every number of tokens. `torch.jit.trace` gives sizes as tensors, on
    which Python's arithmetic and comparisons differ from those on ints. So a size becomes a constant there.
    """
    size = x.shape[dim]
    return size if type(size) is int or torch.compiler.is_compiling() else int(size)


def exceeds(number: int, limit: int) -> bool:
    """Whether a product of sizes is above a limit. False while exporting, as one graph serves every batch size."""
    return not isinstance(number, torch.SymInt) and not _exporting() and number > limit


def _exporting() -> bool:
    """Whether `torch.export` traces. torch before 2.7 does not tell; its sizes are no plain ints then."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` traces."""
    return (torch.compiler.is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


# Dynamo calls these functions, and does not trace them: it would take is_in_onnx_export for false and, in some
# versions, is_exporting for true. torch.compiler.assume_constant_result sets the same attribute, but imports Dynamo,
# which takes seconds.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def take(x: Tensor, index: Tensor, numbers: Tensor | None = None) -> Tensor:
    """The rows [B, N, C] of `x` [B, T, C] at `index` [B, N]. `numbers`: as for `flat`."""
    # index_select copies whole rows of a flat tensor; a gather would need one index per element.
    batch, tokens, width = (size_of(x, dim) for dim in range(3))
    picked = x.reshape(batch * tokens, width).index_select(0, flat(index, tokens, numbers))
    return picked.view(batch, size_of(index, 1), width)


def flat(index: Tensor, tokens: int, numbers: Tensor | None = None) -> Tensor:
    """Positions [B, N] in sequences of `tokens` tokens, as positions [B * N] in the concatenation of all sequences.

    Args:
        index: [B, N] positions.
        tokens: T.
        numbers: what `sequence_numbers` returns for B, where several calls share it; None: it is made here.
    """
    batch = size_of(index, 0)
    if batch == 1:
        return index.reshape(-1)
    numbers = sequence_numbers(batch, index.device) if numbers is None else numbers
    return torch.add(index, numbers, alpha=tokens).view(-1)


def sequence_numbers(batch: int, device: torch.device) -> Tensor:
    """[B, 1] the number of each sequence of a batch, from 0."""
    return torch.arange(batch, device=device)[:, None]


def in_vmap(values: Tensor) -> bool:
    """Whether a tensor is one of many in `torch.vmap`, whose values cannot decide on shapes."""
    return bool(torch._C._functorch.is_batchedtensor(values))
