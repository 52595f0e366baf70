"""How many tokens each block removes: constant, per layer, linear, a ratio, or a ratio that rises in the first blocks.

`Aligned` follows any of them in steps that leave multiples of a number. `Keep` says how many stay, behind the connector
of a model of images and text.

A schedule maps the number of `tokens` that enter block `layer` of `depth` to the number of tokens to remove there. A
block removes at most half of its unprotected tokens, whatever the schedule asks for.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

_GOLDEN = (math.sqrt(5) - 1) / 2


@runtime_checkable
class Schedule(Protocol):
    """The protocol of a schedule: what `r` may be, besides an int or a sequence of ints."""

    # Not called `remove`: a list has a method of that name, and would pass for a schedule.
    def removed(self, layer: int, depth: int, tokens: int) -> int:
        """Tokens that block `layer` (counted from 0) of `depth` blocks should remove from `tokens`."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same number in every block, as in the CrossGET authors' code. `r=16` stands for `Constant(16)`."""

    r: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", _count("r", self.r))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return self.r


@dataclass(frozen=True)
class PerLayer:
    """One number per block, first block first. `r=(8, 4, 0)` stands for `PerLayer((8, 4, 0))`."""

    r: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", tuple(_count(f"r[{layer}]", count) for layer, count in enumerate(self.r)))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        if len(self.r) != depth:
            raise ValueError(
                f"r lists {len(self.r)} layers but the tower has {depth} blocks: give one number per block, "
                "or an int for all of them"
            )
        return self.r[layer]


@dataclass(frozen=True)
class Linear:
    """Tokens to remove, linear in the layer: `start` in the first block, `end` in the last, rounded to integers.

    `Linear(2 * r, 0)` removes as many tokens in total as `r` in every block, but earlier. So it saves more
    multiply-adds and costs more accuracy.
    """

    start: int
    end: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _count("start", self.start))
        object.__setattr__(self, "end", _count("end", self.end))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        if depth == 1:
            return self.start
        # Halves are rounded towards the start, so that start and end may be exchanged without changing the total.
        steps = depth - 1
        product = (self.start - self.end) * (steps - layer)
        return self.end + (2 * product + steps) // (2 * steps)


@dataclass(frozen=True)
class Ratio:
    """A share of the tokens that enter each block, rounded down: `Ratio(0.1)` removes a tenth.

    Args:
        share: between 0 and 0.5, since a block removes at most half of its tokens.
    """

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _share(self.share, most=0.5))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return int(self.share * tokens)


@dataclass(frozen=True)
class RampedRatio:
    """A share of the tokens that enter each block, rounded down, which rises over the first third of the blocks.

    `RampedRatio(0.1)` removes a tenth in every block after the first third. In block l of that third, counted from 0,
    it removes a tenth times 3 (l + 1/2) / (number of blocks - 1). Tokens that are merged early stay merged in all
    blocks that follow, and the features of early blocks say less about which tokens can be merged without loss.

    Args:
        share: between 0 and 1. Above 0.5, later blocks remove half of their tokens, the most they can, and a larger
            share makes the first ones remove more.
    """

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _share(self.share, most=1.0))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return int(min(0.5, self.share * min(1.0, 3 * (layer + 0.5) / max(1, depth - 1))) * tokens)


@dataclass(frozen=True)
class Aligned:
    """Follows another schedule in steps that leave a multiple of `n` tokens behind each block: `Aligned(16, n=16)`.

    Class token, cross token and registers count among them. Some processors compute multiples of 8 to 64 tokens faster.
    Of what the schedule asks for, a block removes more or less, so that over the blocks the sums agree to about `n`.
    At least `n` tokens stay. A block removes at most half of its unprotected tokens here, too: if more is asked for,
    the number behind it is not a multiple, and the next block makes up for it.

    Args:
        r: the schedule, an int, or one int per block.
        n: 1 or more.

    Raises:
        TypeError: `r` is no schedule, or `n` is no int.
        ValueError: `n` is below 1, or `r` is a `Keep`, which has `multiple` for this.
    """

    r: int | Sequence[int] | Schedule
    n: int

    def __post_init__(self) -> None:
        schedule = as_schedule(self.r)
        if isinstance(schedule, Keep):
            raise ValueError(f"Aligned({self.r!r}): behind the connector, give Keep(..., multiple={self.n!r})")
        object.__setattr__(self, "r", self.r if isinstance(self.r, Schedule) else schedule.r)  # type: ignore[attr-defined]
        object.__setattr__(self, "n", _multiple("Aligned(n", self.n))

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        # What is left over of a multiple is not known here. Multiples of the golden ratio spread evenly over [0, n).
        left_over = int(layer * _GOLDEN % 1 * self.n)
        wanted = as_schedule(self.r).removed(layer, depth, tokens)
        if wanted == 0:
            return 0
        left = -(-(tokens - left_over - wanted) // self.n) * self.n
        return max(0, tokens - max(self.n, left))


@dataclass(frozen=True)
class Keep:
    """The number of features of an image that stay behind the connector: `Keep(128)`, or a share, `Keep(0.25)`.

    Args:
        tokens: an int n keeps n features, or all if there are fewer. A float in (0, 1] keeps that share, rounded, and
            at least one.
        per: "unit": of every unit that the model encodes by itself, such as a tile or an image. "image": of all tiles
            of one image together.
        separators: features that separate rows of an image (newlines) stay as well, and are not counted.
        positions: the positions of the prompt's tokens in the language model. "original": those that they have in the
            full prompt. "renumbered": counted anew; refused where positions are those of an image grid (M-RoPE).
        multiple: the number is rounded up to a multiple of this one, if there are as many features.

    Raises:
        TypeError: `tokens` is neither an int nor a float, or `multiple` is no int.
        ValueError: `tokens` is an int below 1 or a float outside of (0, 1], `multiple` is below 1, or `per` or
            `positions` is not among its choices.
    """

    tokens: int | float
    per: Literal["unit", "image"] = "unit"
    separators: bool = False
    positions: Literal["original", "renumbered"] = "original"
    multiple: int = 1

    def __post_init__(self) -> None:
        count, value = as_int(self.tokens), self.tokens
        if count is None and (isinstance(value, bool | str) or not hasattr(value, "__float__")):
            raise TypeError(
                f"Keep({value!r}): give the number of tokens that stay, or their share, such as 128 or 0.25"
            )
        if count is not None and count < 1:
            raise ValueError(f"Keep({count}): at least one token stays")
        if count is None and not 0.0 < float(value) <= 1.0:
            raise ValueError(f"Keep({float(value):g}): a share is above 0 and at most 1; write an int for a number")
        object.__setattr__(self, "tokens", float(value) if count is None else count)
        for name, choices in (("per", ("unit", "image")), ("positions", ("original", "renumbered"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"Keep({name}={getattr(self, name)!r}): choose one of {', '.join(map(repr, choices))}")
        if not isinstance(self.separators, bool):
            raise TypeError(f"Keep(separators={self.separators!r}): give True or False")
        object.__setattr__(self, "multiple", _multiple("Keep(multiple", self.multiple))

    def __repr__(self) -> str:
        settings = [one for one in fields(self)[1:] if getattr(self, one.name) != one.default]
        return f"Keep({', '.join([repr(self.tokens), *(f'{s.name}={getattr(self, s.name)!r}' for s in settings)])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keep) and repr(self) == repr(other)  # one token, 1, is not all of them, 1.0

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        wanted = self.tokens if isinstance(self.tokens, int) else max(1, round(self.tokens * tokens))
        return max(0, tokens - -(-wanted // self.multiple) * self.multiple)


@dataclass(frozen=True)
class Part:
    """The part of a schedule that is for one stage of a tower: `depth` of `total` blocks, from block `first` on."""

    whole: Schedule
    first: int
    total: int

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return self.whole.removed(self.first + layer, self.total, tokens)


def part_of(schedule: Schedule, first: int, depth: int, total: int) -> int | tuple[int, ...] | Schedule:
    """`r` for one stage of a tower: `depth` of `total` blocks, from block `first` on.

    Raises:
        ValueError: the schedule is for another number of blocks.
    """
    if isinstance(schedule, Constant):
        return schedule.r
    if isinstance(schedule, PerLayer):
        return tuple(schedule.removed(layer, total, 1) for layer in range(first, first + depth))
    return schedule if isinstance(schedule, Ratio) else Part(schedule, first, total)


def as_schedule(r: int | Sequence[int] | Schedule) -> Schedule:
    """The schedule that `r` stands for.

    Raises:
        TypeError: `r` is none of an int, a sequence of ints, a schedule.
        ValueError: a count is negative.
    """
    if as_int(r) is not None:
        return Constant(r)  # type: ignore[arg-type]  # an integer of any library
    if isinstance(r, Schedule):  # an isinstance check of a protocol is slow, so it comes second
        return r
    if isinstance(r, Sequence) and not isinstance(r, str | bytes):
        return PerLayer(tuple(r))
    raise TypeError(f"r is {r!r}: {_suggestion(r)}")


def as_int(value: Any) -> int | None:
    """`value` as a plain int if it is an integer of any library (NumPy's, say); None for booleans and all else."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def by_length(schedule: Schedule, layer: int, depth: int, tokens: int, n_protected: int) -> list[int] | None:
    """How many tokens a row loses in block `layer`, by its number of tokens without padding: 0, 1, .., `tokens`.

    A batch has one number of columns. So a longer row never keeps fewer tokens than a shorter one, and a shorter one
    never loses more than the longest: where a schedule asks for either, the row loses fewer. The schedules here do not.

    Args:
        schedule: how many tokens each block should remove.
        layer: the block.
        depth: number of blocks.
        tokens: number of tokens of the longest row.
        n_protected: as for `planned_tokens`.

    Returns:
        `tokens + 1` numbers; None: the schedule asks for the same number of all rows.
    """
    inner = as_schedule(schedule.r) if isinstance(schedule, Aligned) else schedule
    if isinstance(inner, Constant | PerLayer | Linear):
        return None
    counts, kept = [], 0
    for n in range(tokens + 1):
        kept = max(kept, n - max(0, min(schedule.removed(layer, depth, n), (n - n_protected) // 2)))
        counts.append(n - kept)
    return counts


def planned_tokens(schedule: Schedule, depth: int, tokens: int, n_protected: int, first: int = 0) -> list[int]:
    """The number of tokens that enter each block, and the number after the last block.

    Args:
        schedule: how many tokens each block should remove.
        depth: number of blocks.
        tokens: number of tokens that enter block `first`, including the cross token.
        n_protected: number of tokens that are never removed. Of the others, one block removes at most half.
        first: the block to start from.

    Returns:
        `depth + 1 - first` numbers.
    """
    counts = [tokens]
    for layer in range(first, depth):
        wanted = schedule.removed(layer, depth, counts[-1])
        counts.append(counts[-1] - max(0, min(wanted, (counts[-1] - n_protected) // 2)))
    return counts


def _count(name: str, value: Any) -> int:
    count = as_int(value)
    if count is None:
        raise TypeError(f"{name} is {value!r}: {_suggestion(value)}")
    if count < 0:
        raise ValueError(f"{name} is {count}: the number of tokens to remove cannot be negative; 0 removes none")
    return count


def _multiple(name: str, value: Any) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name}={value!r}): give an int, such as 16")
    if number < 1:
        raise ValueError(f"{name}={number}): a multiple of at least 1 is expected")
    return number


def _suggestion(value: Any) -> str:
    """The part of an error message that says what to give instead of `value`."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if number.is_integer():
            return f"the number of tokens to remove is an int, so write {int(number)}"
        if 0 < number < 1:
            share = min(number, 0.5)
            return f"the number of tokens to remove is an int; for a share of them give crossget.Ratio({share:g})"
    return "give an int, one int per block, or a schedule such as crossget.Ratio(0.1) or crossget.Linear(16, 0)"


def _share(share: Any, most: float) -> float:
    if isinstance(share, bool | str) or not hasattr(share, "__float__"):
        raise TypeError(f"share is {share!r}: give a number between 0 and {most:g}")
    number = float(share)
    if not 0.0 <= number <= most:
        raise ValueError(f"share is {number:g}: a block can remove between 0 and {most:g} of its tokens")
    return number
