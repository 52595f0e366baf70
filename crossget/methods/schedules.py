"""How many tokens each block gives up: constant, per layer, linear, by ratio, rising.

A schedule answers one question, in plain integers: of the `tokens` that enter block `layer` of `depth`, how many
should leave? The answer is a wish: the matching never removes more than half of what may be touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """What `r` may be, besides an int or a sequence of ints.

    The method is not called `remove`: a list has one, and would pass for a schedule.
    """

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        """Tokens that block `layer` (counted from 0) of `depth` blocks should remove from `tokens`."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same number in every block: the reference's schedule."""

    r: int

    def __post_init__(self) -> None:
        _check_count("r", self.r)

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return self.r


@dataclass(frozen=True)
class PerLayer:
    """One number per block, first block first."""

    r: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", tuple(self.r))
        for layer, count in enumerate(self.r):
            _check_count(f"r[{layer}]", count)

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        if len(self.r) != depth:
            raise ValueError(
                f"r lists {len(self.r)} layers but the tower has {depth} blocks: give one number per block, "
                "or an int for all of them"
            )
        return self.r[layer]


@dataclass(frozen=True)
class Linear:
    """From `start` in the first block to `end` in the last, on a straight line, rounded to whole tokens.

    `Linear(2 * r, 0)` removes as many tokens in all as `r` in every block, but earlier, so it saves more
    multiply-adds and costs more accuracy.
    """

    start: int
    end: int = 0

    def __post_init__(self) -> None:
        _check_count("start", self.start)
        _check_count("end", self.end)

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        if depth == 1:
            return self.start
        # Halves are rounded towards the start, so that start and end may be exchanged without changing the total.
        steps = depth - 1
        product = (self.start - self.end) * (steps - layer)
        return self.end + (2 * product + steps) // (2 * steps)


@dataclass(frozen=True)
class Ratio:
    """A share of the tokens that enter each block, rounded down: `Ratio(0.1)` removes a tenth."""

    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 0.5:
            raise ValueError(f"share is {self.share}: a block can remove between 0 and 0.5 of its tokens")

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return int(self.share * tokens)


@dataclass(frozen=True)
class RampedRatio:
    """A share of the tokens that enter each block, rounded down, which rises over the first third of the blocks.

    `RampedRatio(0.1)` removes a tenth in every block behind the first third, and in block l of those, counted from 0, a
    tenth times (l + 1/2) / (third of the blocks but the last). What is merged early is read by all blocks that follow,
    and what tokens look like there says little yet of what they will mean; what is merged in the last block is read by
    none. Above 0.5 the later blocks remove all they can, half of their tokens, and the first ones still rise.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share is {self.share}: the share of tokens to remove is between 0 and 1")

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return int(min(0.5, self.share * min(1.0, 3 * (layer + 0.5) / max(1, depth - 1))) * tokens)


def as_schedule(r: int | Sequence[int] | Schedule) -> Schedule:
    """The schedule that `r` stands for.

    Raises:
        TypeError: `r` is none of an int, a sequence of ints, a schedule.
        ValueError: a count is negative.
    """
    if isinstance(r, int) and not isinstance(r, bool):
        return Constant(r)
    if isinstance(r, Schedule):  # which takes Python a while to find out
        return r
    if isinstance(r, Sequence) and not isinstance(r, str):
        return PerLayer(tuple(r))
    raise TypeError(f"r is {r!r}: give an int, one int per block, or a schedule such as crossget.Linear(16, 0)")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: the number of tokens to remove is an int")
    if value < 0:
        raise ValueError(f"{name} is {value}: the number of tokens to remove cannot be negative")


def planned_tokens(schedule: Schedule, depth: int, tokens: int, n_protected: int, first: int = 0) -> list[int]:
    """Tokens entering each block, and those behind the last one.

    Args:
        schedule: the wish.
        depth: number of blocks.
        tokens: entering block `first`, the cross token included.
        n_protected: tokens that must stay as they are; of the others, at most half leave in one block.
        first: the block to begin with.

    Returns:
        `depth + 1 - first` numbers.
    """
    counts = [tokens]
    for layer in range(first, depth):
        wish = schedule.removed(layer, depth, counts[-1])
        counts.append(counts[-1] - max(0, min(wish, (counts[-1] - n_protected) // 2)))
    return counts
