"""Which schedule of all that cost no more than they may: families of schedules, and sharing tokens out among blocks.

A price says what a schedule costs, a loss what it costs the model's output, both as sums over the blocks; where they
come from is not asked here (costs.py and timing.py have prices, budget.py measures losses).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from crossget.measure.cost_model import Frame, Tokens
from crossget.methods.schedules import RampedRatio, planned_tokens

# Families of schedules ------------------------------------------------------------------------------------------------


class Family:
    """Schedules that differ in strength only: number n removes n tokens, shared out among the blocks by weights.

    Never is more removed than half of what a block may touch. A stronger schedule leaves no block with more tokens.

    Args:
        frame: the tower's schedules.
        weights: one per block, not negative.
    """

    def __init__(self, frame: Frame, weights: Sequence[float]) -> None:
        self.frame = frame
        share = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        share = share / share[-1]
        strongest = frame.depth * frame.start
        n = torch.arange(strongest + 1, dtype=torch.float64)
        until = (n[:, None] * share + 1e-6).floor().long()  # [N, L] tokens that the blocks up to each should remove
        tokens = [torch.full_like(until[:, 0], frame.start)]
        for layer in range(frame.depth):
            most = ((tokens[-1] - frame.reserved) // 2).clamp(min=0) * (weights[layer] > 0)
            # What was too much for a block is left to those behind it.
            wish = torch.minimum(frame.start - until[:, layer], tokens[-1])
            tokens.append(torch.maximum(wish, tokens[-1] - most))
        every = torch.stack(tokens, 1)
        self.tokens = torch.unique_consecutive(every, dim=0)
        """[N, L + 1] tokens entering each block and behind the last one, the weakest first."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, n: int) -> list[int]:
        """Number n."""
        return [int(count) for count in self.tokens[n]]


class Rises(Family):
    """Schedules as `crossget.RampedRatio` makes them, up to the block that is read.

    Args:
        frame: the tower's schedules.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        plans: dict[tuple[int, ...], None] = {}
        for step in range(2 * frame.depth * frame.start + 1):  # fine enough for every number of tokens in every block
            share = step / (2 * frame.depth * frame.start)
            tokens = planned_tokens(RampedRatio(share), frame.depth, frame.start, frame.reserved)[: frame.read + 2]
            tokens += tokens[-1:] * (frame.depth - frame.read - 1)
            plans[tuple(tokens)] = None
        self.tokens = torch.tensor(list(plans))


def even(frame: Frame) -> list[float]:
    """The same weight for every block up to the one that is read."""
    return [1.0 if layer <= frame.read else 0.0 for layer in range(frame.depth)]


def removed(tokens: Tokens) -> list[int]:
    """Tokens that each block removes."""
    return [a - b for a, b in pairwise(tokens)]


class Price(Protocol):
    """What schedules cost, as a sum over the blocks."""

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """What block `layer` costs for each of many pairs, as float64."""
        ...


def prices(price: Price, tokens: Tensor) -> Tensor:
    """[N] of schedules [N, L + 1]."""
    depth = tokens.shape[1] - 1
    return torch.stack([price.block(i, tokens[:, i], tokens[:, i + 1]) for i in range(depth)]).sum(0)


def nearest(price: Price, family: Family, most: float) -> list[int] | None:
    """The schedule that costs as much as possible, but at most `most`; None if there is none.

    It is the member of the family that is nearest, and then blocks get single tokens back as long as that is within the
    price: in the end there is no block that could keep one more.
    """
    cost = prices(price, family.tokens)
    cost = torch.where(cost <= most, cost, -math.inf)
    best = int(cost.argmax())
    if not math.isfinite(float(cost[best])):
        return None
    tokens, frame = family[best], family.frame
    while True:
        r = removed(tokens)
        more = [frame.plan([*r[:i], r[i] - 1, *r[i + 1 :]]) for i in range(frame.depth) if r[i]]
        if not more:
            return tokens
        cost = prices(price, torch.tensor(more))
        cost = torch.where(cost <= most, cost, -math.inf)
        best = int(cost.argmax())
        if not math.isfinite(float(cost[best])):
            return tokens
        tokens = more[best]


# Sharing out by what it costs the output ------------------------------------------------------------------------------


class Loss:
    """What the output loses when one block alone leaves fewer tokens, as a function of how few: a u^b.

    u is the logarithm of the factor by which the tokens that may be merged have become fewer. If tokens were lost in
    earlier blocks already, what block l adds is the difference: the redundancy that they used is gone.

    Args:
        frame: the tower's schedules.
        points: of each block, (tokens left, what the output lost), from many tokens to few.
        least: the smallest b. What was measured says little about fewer tokens than half, and a larger b expects more
            of a loss there.
    """

    def __init__(self, frame: Frame, points: Sequence[Sequence[tuple[int, float]]], least: float = 1.0) -> None:
        self.frame, self.least = frame, least
        self.laws = [self._law(of_block) for of_block in points]

    def _law(self, points: Sequence[tuple[int, float]]) -> tuple[float, float]:
        (left, little), (fewer, most) = points[0], points[-1]
        u1, u2 = (float(self._u(torch.tensor(count))) for count in (left, fewer))
        if most <= 0 or u2 <= 0:
            return 0.0, self.least
        steep = math.log(most / little) / math.log(u2 / u1) if little > 0 and u2 > u1 else self.least
        steep = min(4.0, max(self.least, steep))
        return most / u2**steep, steep

    def _u(self, left: Tensor) -> Tensor:
        free = self.frame.start - self.frame.reserved
        return (math.log(free) - torch.log((left - self.frame.reserved).double())).clamp_min(0)

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """What block `layer` adds, for each of many pairs."""
        if layer >= len(self.laws):
            return torch.zeros(torch.broadcast_shapes(tokens.shape, left.shape), dtype=torch.float64)
        factor, power = self.laws[layer]
        return factor * (self._u(left) ** power - self._u(tokens) ** power)


def allocate(frame: Frame, loss: Price, price: Price, most: float, out: int | None = None) -> list[int] | None:
    """The schedule that loses least among those that cost at most `most`; None: there is none.

    Of all schedules on a grid of token numbers the least sum of loss + c * cost, by dynamic programming from the last
    block to the first; c is the smallest with which the cost is low enough.

    Args:
        frame: the tower's schedules.
        loss: what a schedule loses.
        price: what it costs.
        most: see above.
        out: tokens that the block that is read has to leave; None: any number.
    """
    step = max(1, (frame.start - frame.reserved) // 200)
    counts = {*range(frame.start, frame.reserved, -step), *([] if out is None else [out])}
    grid = torch.tensor(sorted(counts, reverse=True))
    into, left = grid[:, None], grid[None, :]
    removed = into - left
    allowed = (removed >= 0) & (2 * removed <= into - frame.reserved)
    losses, costs = [], []
    for layer in range(frame.depth):
        ok = allowed if layer <= frame.read else removed == 0
        if layer == frame.read and out is not None:
            ok = ok & (left == out)
        hidden = torch.zeros(ok.shape, dtype=torch.float64).masked_fill(~ok, math.inf)
        losses.append(loss.block(layer, into, left) + hidden)
        costs.append(price.block(layer, into, left))
    scale = float(losses[0][losses[0].isfinite()].abs().max()) + 1e-30

    def path(weight: float) -> tuple[list[int], float] | None:
        value, steps = torch.zeros(len(grid), dtype=torch.float64), []
        for one, cost in zip(reversed(losses), reversed(costs), strict=True):
            value, choice = (one + weight * cost + value).min(1)
            steps.append(choice)
        if not math.isfinite(float(value[0])):
            return None
        at, tokens, total = 0, [frame.start], 0.0
        for choice, cost in zip(reversed(steps), costs, strict=True):
            total += float(cost[at, choice[at]])
            at = int(choice[at])
            tokens.append(int(grid[at]))
        return tokens, total

    unit = scale / (float(costs[0][0, 0]) + 1e-30) if out is None else 0.0
    low, high = -20.0, 20.0  # of the weight, as a power of ten
    best = path(unit * 10**high)
    if best is None or best[1] > most:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        found = path(unit * 10**middle)
        if found is not None and found[1] <= most:
            high, best = middle, found
        else:
            low = middle
    return best[0]


class Free:
    """Costs nothing to speak of: the fewer tokens, the less, so that equals are told apart."""

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        return (0 * tokens + left).double() * 1e-12
