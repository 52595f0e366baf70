"""Search for schedules: families of schedules, and the one that loses least among those within a budget.

A `Cost` says what a schedule costs, in multiply-adds or seconds, and an `OutputLoss` how far it moves the model's
output. Both are sums over the blocks. This module knows no model: cost_model.py and block_times.py make costs, fit.py
measures losses.

A schedule is written as tokens: a list of `depth + 1` numbers, those that enter each block and those behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from crossget.methods.schedules import PerLayer, RampedRatio, planned_tokens

Tokens = Sequence[int]
"""The tokens that enter each block, and those behind the last one."""


@dataclass(frozen=True)
class ScheduleSpace:
    """The schedules that are possible in one tower.

    Attributes:
        depth: number of blocks.
        n_tokens: tokens that enter the first block, the cross token included.
        n_reserved: how many of them are never merged.
        last_layer: the last block that may remove tokens. The model takes the tower's tokens behind it, so that later
            removals would be of no use.
    """

    depth: int
    n_tokens: int
    n_reserved: int
    last_layer: int

    def tokens(self, r: Sequence[int]) -> list[int]:
        """The tokens of each block if `r[i]` are to be removed in block i; no block removes more than it can."""
        return planned_tokens(PerLayer(tuple(r)), self.depth, self.n_tokens, self.n_reserved)

    def strongest(self) -> list[int]:
        """The tokens of each block if every block removes as many as it can."""
        return self.tokens([self.n_tokens] * self.depth)


def removed_tokens(tokens: Tokens) -> list[int]:
    """How many tokens each block removes."""
    return [entering - left for entering, left in pairwise(tokens)]


# Families of schedules ------------------------------------------------------------------------------------------------


class Family:
    """Schedules that share the tokens out among the blocks by the same weights: number n removes n tokens in all.

    No block removes more than half of the tokens that may be merged in it. A higher number leaves no block with more
    tokens.

    Args:
        space: the tower's schedules.
        weights: one per block, not negative.
    """

    def __init__(self, space: ScheduleSpace, weights: Sequence[float]) -> None:
        self.space = space
        share = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        share = share / share[-1]
        n = torch.arange(space.depth * space.n_tokens + 1, dtype=torch.float64)
        wanted = (n[:, None] * share + 1e-6).floor().long()  # [N, L] tokens to remove up to and in each block
        tokens = [torch.full_like(wanted[:, 0], space.n_tokens)]
        for layer in range(space.depth):
            most = ((tokens[-1] - space.n_reserved) // 2).clamp(min=0) * (weights[layer] > 0)
            # Where a block cannot remove its share, the blocks behind it remove the difference.
            left = torch.minimum(space.n_tokens - wanted[:, layer], tokens[-1])
            tokens.append(torch.maximum(left, tokens[-1] - most))
        self.tokens = torch.unique_consecutive(torch.stack(tokens, 1), dim=0)
        """[N, L + 1] the tokens of each schedule, the weakest schedule first."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, n: int) -> list[int]:
        """The tokens of schedule `n`."""
        return [int(count) for count in self.tokens[n]]


class RampedFamily(Family):
    """The schedules that `crossget.RampedRatio` gives, up to the last block that may remove tokens.

    Args:
        space: the tower's schedules.
    """

    def __init__(self, space: ScheduleSpace) -> None:
        self.space = space
        steps = 2 * space.depth * space.n_tokens  # fine enough for every number of tokens in every block
        found: dict[tuple[int, ...], None] = {}
        for step in range(steps + 1):
            schedule = RampedRatio(step / steps)
            tokens = planned_tokens(schedule, space.depth, space.n_tokens, space.n_reserved)[: space.last_layer + 2]
            found[tuple(tokens + tokens[-1:] * (space.depth - space.last_layer - 1))] = None
        self.tokens = torch.tensor(list(found))


def constant_weights(space: ScheduleSpace) -> list[float]:
    """The same weight for every block that may remove tokens."""
    return [1.0 if layer <= space.last_layer else 0.0 for layer in range(space.depth)]


# Costs ----------------------------------------------------------------------------------------------------------------


class Cost(Protocol):
    """What schedules cost, as a sum over the blocks."""

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """What block `layer` costs that `tokens` enter and `left` leave: float64, elementwise for many pairs."""
        ...


class FewestTokens:
    """Prefers schedules with fewer tokens, by so little that it decides only where everything else is equal."""

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        return (0 * tokens + left).double() * 1e-12


def total_cost(cost: Cost, tokens: Tensor) -> Tensor:
    """[N] the cost of each schedule in `tokens` [N, L + 1]."""
    depth = tokens.shape[1] - 1
    costs = torch.stack([cost.block(i, tokens[:, i], tokens[:, i + 1]) for i in range(depth)]).sum(0)
    unreduced: float | None = getattr(cost, "unreduced", None)
    return costs if unreduced is None else torch.where(tokens[:, -1] == tokens[:, 0], float(unreduced), costs)


def closest_within(cost: Cost, family: Family, limit: float) -> list[int] | None:
    """The schedule that costs as much as possible, but at most `limit`; None if all cost more.

    It starts from the closest member of the family. Then blocks get single tokens back, as long as the cost stays
    within the limit. In the end no block could keep one more token.
    """
    costs = total_cost(cost, family.tokens)
    costs = torch.where(costs <= limit, costs, -math.inf)
    best = int(costs.argmax())
    if not math.isfinite(float(costs[best])):
        return None
    tokens, space = family[best], family.space
    while True:
        r = removed_tokens(tokens)
        weaker = [space.tokens([*r[:i], r[i] - 1, *r[i + 1 :]]) for i in range(space.depth) if r[i]]
        if not weaker:
            return tokens
        costs = total_cost(cost, torch.tensor(weaker))
        costs = torch.where(costs <= limit, costs, -math.inf)
        best = int(costs.argmax())
        if not math.isfinite(float(costs[best])):
            return tokens
        tokens = weaker[best]


# Allocation by what it costs the output -------------------------------------------------------------------------------


class OutputLoss:
    """What the output loses if one block alone leaves fewer tokens, as a power law a u^b.

    u is the logarithm of n / m, if m of the n tokens that may be merged are left. A block that gets tokens which were
    merged before adds the difference of two points on its curve: their redundancy is used up.

    Args:
        space: the tower's schedules.
        points: for each block, pairs of the tokens left and the loss that was measured, from many tokens to few.
        least_power: the smallest b. The measurements go down to half of the tokens only, and a larger b expects more
            loss below that.
    """

    def __init__(
        self, space: ScheduleSpace, points: Sequence[Sequence[tuple[int, float]]], least_power: float = 1.0
    ) -> None:
        self.space, self.least_power = space, least_power
        self.laws = [self._law(of_block) for of_block in points]

    def _law(self, points: Sequence[tuple[int, float]]) -> tuple[float, float]:
        """a and b: the law goes through the last point, and as steeply as the first one says."""
        (many, little), (few, much) = points[0], points[-1]
        u1, u2 = (float(self._u(torch.tensor(count))) for count in (many, few))
        if much <= 0 or u2 <= 0:
            return 0.0, self.least_power
        power = math.log(much / little) / math.log(u2 / u1) if little > 0 and u2 > u1 else self.least_power
        power = min(4.0, max(self.least_power, power))
        return much / u2**power, power

    def _u(self, left: Tensor) -> Tensor:
        free = self.space.n_tokens - self.space.n_reserved
        return (math.log(free) - torch.log((left - self.space.n_reserved).double())).clamp_min(0)

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """What block `layer` adds to the loss, elementwise for many pairs."""
        if layer >= len(self.laws):
            return torch.zeros(torch.broadcast_shapes(tokens.shape, left.shape), dtype=torch.float64)
        factor, power = self.laws[layer]
        return factor * (self._u(left) ** power - self._u(tokens) ** power)


def allocate(
    space: ScheduleSpace, loss: Cost, cost: Cost, limit: float, tokens_out: int | None = None
) -> list[int] | None:
    """The schedule that loses least among those that cost at most `limit`; None if there is none.

    Dynamic programming from the last block to the first finds, on a grid of token counts, the schedule with the least
    sum of loss + w * cost. w is the smallest with which the cost is within the limit, by bisection.

    Args:
        space: the tower's schedules.
        loss: what a schedule loses.
        cost: what it costs.
        limit: the most that it may cost.
        tokens_out: how many tokens are to be left behind `space.last_layer`; None: any number.
    """
    step = max(1, (space.n_tokens - space.n_reserved) // 200)
    counts = {*range(space.n_tokens, space.n_reserved, -step), *([] if tokens_out is None else [tokens_out])}
    grid = torch.tensor(sorted(counts, reverse=True))
    entering, left = grid[:, None], grid[None, :]
    removed = entering - left
    allowed = (removed >= 0) & (2 * removed <= entering - space.n_reserved)
    losses, costs = [], []
    for layer in range(space.depth):
        possible = allowed if layer <= space.last_layer else removed == 0
        if layer == space.last_layer and tokens_out is not None:
            possible = possible & (left == tokens_out)
        barrier = torch.zeros(possible.shape, dtype=torch.float64).masked_fill(~possible, math.inf)
        losses.append(loss.block(layer, entering, left) + barrier)
        costs.append(cost.block(layer, entering, left))
    scale = float(losses[0][losses[0].isfinite()].abs().max()) + 1e-30

    def best_path(weight: float) -> tuple[list[int], float] | None:
        """The tokens with the least loss + weight * cost, and their cost."""
        value, choices = torch.zeros(len(grid), dtype=torch.float64), []
        for block_loss, block_cost in zip(reversed(losses), reversed(costs), strict=True):
            value, choice = (block_loss + weight * block_cost + value).min(1)
            choices.append(choice)
        if not math.isfinite(float(value[0])):
            return None
        at, tokens, total = 0, [space.n_tokens], 0.0
        for choice, block_cost in zip(reversed(choices), costs, strict=True):
            total += float(block_cost[at, choice[at]])
            at = int(choice[at])
            tokens.append(int(grid[at]))
        return tokens, total

    unit = scale / (float(costs[0][0, 0]) + 1e-30) if tokens_out is None else 0.0
    low, high = -20.0, 20.0  # of the weight, as a power of ten
    best = best_path(unit * 10**high)
    if best is None or best[1] > limit:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        found = best_path(unit * 10**middle)
        if found is not None and found[1] <= limit:
            high, best = middle, found
        else:
            low = middle
    return best[0]
