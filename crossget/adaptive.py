"""Every image at a strength of its own: a batch is dealt out on the rungs of a ladder.

Images differ in how many tokens they can spare, but a tensor has one length. So behind the first block the images of
a batch are ranked by how many of their tokens have a near copy, and dealt out evenly: the first rung of the ladder
removes `ladder[0]` times as many tokens per block as the schedule says, the next `ladder[1]` times as many, and so on.
Their mean is one, so the batch as a whole removes what the schedule says. Where a rung would ask for more tokens than
there are, it would fall short of its share and harm its images; there the ladder is drawn in towards its middle until
the batch keeps its budget. How many images a rung gets, and how far the ladder is drawn in, depends on the shape of the
batch alone: shapes are static, nothing waits for the device, and compiled graphs are reused.

From the second block on, the block's own `forward` runs once for each rung. What the host sees between the blocks and
behind them is the full grid, in the batch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossget.state import TokenState

STEPS, OVER = 8, 0.005
"""In how many steps a ladder is drawn in, and the share of tokens by which a batch may exceed its budget: rounding."""


class Rung(NamedTuple):
    """The images of a batch that lose tokens at the same strength.

    Attributes:
        rows: [N] which of the batch.
        tokens: [N, T, C].
        state: the history of these tokens.
    """

    rows: Tensor
    tokens: Tensor
    state: TokenState


def sizes(batch: int, rungs: int) -> list[int]:
    """How many of `batch` images each rung gets: evenly, and from the middle if there are fewer images than rungs."""
    counts = [0] * rungs
    for rank in range(batch):
        counts[(2 * rank + 1) * rungs // (2 * batch)] += 1
    return counts


def drawn_in(ladder: Sequence[float], counts: Sequence[int], spent: Callable[[float], int]) -> tuple[float, ...]:
    """A ladder, drawn in towards one as far as its batch needs to keep the budget of a batch without a ladder.

    Args:
        ladder: what the schedule is multiplied with, ascending, one on average.
        counts: how many images are on each rung.
        spent: factor -> how many tokens all blocks together get for an image whose schedule is multiplied with it.
    """
    budget = sum(counts) * spent(1.0) * (1 + OVER)
    for step in range(STEPS, 0, -1):
        narrow = tuple(1 + (factor - 1) * step / STEPS for factor in ladder)
        if sum(count * spent(factor) for count, factor in zip(counts, narrow, strict=True)) <= budget:
            return narrow
    return (1.0,) * len(ladder)


def deal(tokens: Tensor, state: TokenState, redundancy: Tensor, ladder: Sequence[float]) -> list[Rung]:
    """Deal the images of a batch out on a ladder: those with the least redundancy on its first rung.

    Args:
        tokens: [B, T, C].
        state: their history.
        redundancy: [B] how much each image can spare, see `crossget.reducers.Merging.redundancy`.
        ladder: what each rung multiplies the schedule with, ascending.
    """
    order = torch.sort(redundancy, stable=True).indices
    rungs, first = [], 0
    for count, factor in zip(sizes(int(tokens.shape[0]), len(ladder)), ladder, strict=True):
        if count:
            rows = order[first : first + count]
            rungs.append(Rung(rows, tokens.index_select(0, rows), state.of_rows(rows, factor)))
            first += count
    return rungs


def gathered(parts: Sequence[Tensor], rungs: Sequence[Rung]) -> Tensor:
    """What belongs to the images of each rung [N, ..], in the batch's order: [B, ..]."""
    return torch.cat(list(parts)).index_select(0, torch.cat([rung.rows for rung in rungs]).argsort())


def rows_of(value: Any, rows: Tensor, batch: int, tokens: int) -> Any:
    """Some images' part of a block's argument: of a tensor whose first axis is the batch.

    Args:
        value: of the whole batch; what is no tensor, and what has no batch, is for all images.
        rows: [N].
        batch: B.
        tokens: how many the host has per image.

    Raises:
        RuntimeError: that the first axis is the batch cannot be told, as there are as many tokens.
    """
    if isinstance(value, tuple | list):
        return type(value)(rows_of(one, rows, batch, tokens) for one in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or batch == 1:
        return value
    if value.dim() == 3 and value.shape[1] == value.shape[2] and int(value.shape[0]) % batch == 0:
        return value.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)  # a mask [B * H, T, T]
    if int(value.shape[0]) != batch:
        return value
    if batch == tokens:
        raise RuntimeError(
            f"a block gets a tensor of shape {list(value.shape)} beside its {tokens} tokens of {batch} images: whether "
            "its first axis is images or tokens cannot be told; use another batch size, or threshold=None"
        )
    return value.index_select(0, rows)
