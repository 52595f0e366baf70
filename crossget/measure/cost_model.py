"""What a schedule costs, in closed form: multiply-adds of a forward as polynomials in the tokens of each block.

Of a block that `tokens` enter and `left` leave, the layers in front of the reduction cost something times `tokens`, the
attention times `tokens^2`, the layers behind the reduction times `left`; a matching adds its own polynomial where it
removes something, and one that deals tokens into two sets has another constant for odd numbers of them. What stands
outside the blocks costs the same for every schedule, or, where the host reads the tower's tokens reduced, a polynomial
in their number. The coefficients come from the meter (flops.py): a few schedules are counted, chosen such that they
determine every schedule's count, and the equations are solved in fractions. So they are exact, for every host and every
reducer whose cost has this form; for one that has not, the equations contradict each other, and that is an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.attachment import Attachment
from crossget.measure.flops import Inputs, as_call, count_once
from crossget.methods.schedules import PerLayer, planned_tokens

Tokens = Sequence[int]
"""Tokens entering each block, and those behind the last one."""


@dataclass(frozen=True)
class Frame:
    """Which schedules a tower allows.

    Attributes:
        depth: blocks.
        start: tokens entering the first block, the cross token included.
        reserved: of these, those that always stay.
        read: the block behind which the host reads the tokens; it is the last one that needs to remove any.
    """

    depth: int
    start: int
    reserved: int
    read: int

    def plan(self, r: Sequence[int]) -> list[int]:
        """Tokens entering each block, and those behind the last one."""
        return planned_tokens(PerLayer(tuple(r)), self.depth, self.start, self.reserved)

    def strongest(self) -> list[int]:
        """As many as possible, in every block."""
        return self.plan([self.start] * self.depth)


class Trial:
    """An attached model that is run, or counted, with one schedule after the other.

    Args:
        model: the model.
        inputs: what it is called with.
        attachment: its attachment.
        tower: the tower whose schedule changes.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, attachment: Attachment, tower: str) -> None:
        self.model, self.inputs, self.attachment, self.name = model, inputs, attachment, tower
        self.tower = attachment.towers[tower]

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return as_call(self.inputs).tensors[0].device

    def use(self, r: Sequence[int]) -> None:
        """Remove so many tokens in each block from now on."""
        reducers = self.attachment.reducers
        self.attachment.reducer = {**reducers, self.name: replace(reducers[self.name], r=tuple(r))}

    def count(self, r: Sequence[int]) -> tuple[list[int], int]:
        """Multiply-adds of each block, and of all that is outside them."""
        self.use(r)
        count = count_once(self.model, self.inputs, self.attachment.parameters())
        names = {module: name for name, module in self.model.named_modules()}
        blocks = [count.by_module.get(names[block], 0) for block in self.tower.blocks]
        return blocks, count.total - sum(blocks)

    @property
    def entered(self) -> list[int]:
        """Tokens that entered each block in the last forward."""
        return self.attachment.tokens[self.name]


def block_terms(tokens: int | Tensor, left: int | Tensor) -> list[Any]:
    """What a block's cost is a sum of, each times a coefficient; of numbers, or of tensors of them."""
    r = tokens - left
    m: Any = (r > 0) * 1
    return [
        1 + 0 * r,
        tokens,
        tokens * tokens,
        r,
        m,
        m * tokens,
        m * tokens * tokens,
        m * (tokens % 2),
        r * tokens,
        r * r,
    ]


def rest_terms(left: int | Tensor) -> list[Any]:
    """The same of what is outside the blocks; `left` is what the host reads."""
    return [1 + 0 * left, left, left * left]


class Polynomial:
    """A sum of terms with fractions for coefficients, whose values are integers wherever it is asked for one."""

    def __init__(self, coefficients: Sequence[Fraction]) -> None:
        self.denominator = lcm(*(c.denominator for c in coefficients))
        self.numerators = [int(c * self.denominator) for c in coefficients]

    def __call__(self, terms: Sequence[int]) -> int:
        """The value, exactly."""
        return sum(c * term for c, term in zip(self.numerators, terms, strict=True)) // self.denominator

    def of(self, terms: Sequence[Tensor]) -> Tensor:
        """The values as float64, for comparing many schedules."""
        parts = [term.double() * (c / self.denominator) for c, term in zip(self.numerators, terms, strict=True) if c]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(terms[0], dtype=torch.float64)


@dataclass(frozen=True)
class Costs:
    """The cost of every schedule of one tower in one forward that removes nothing behind the block that is read.

    Attributes:
        frame: the schedules.
        blocks: one polynomial in `block_terms` for each block.
        rest: one in `rest_terms`.
        counted: how many schedules were counted for it.
    """

    frame: Frame
    blocks: Sequence[Polynomial]
    rest: Polynomial
    counted: int

    def total(self, tokens: Tokens) -> int:
        """Multiply-adds of the whole forward, exactly what `crossget.count_flops` counts."""
        blocks = sum(self.blocks[i](block_terms(tokens[i], tokens[i + 1])) for i in range(self.frame.depth))
        return blocks + self.rest(rest_terms(tokens[self.frame.read + 1]))

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """Of many pairs at once: what block `layer` costs, and the reading behind it. Float64, of the pairs' shape."""
        tokens, left = torch.broadcast_tensors(tokens, left)
        cost = self.blocks[layer].of(block_terms(tokens, left))
        return cost + self.rest.of(rest_terms(left)) if layer == self.frame.read else cost


def derive(trial: Trial, frame: Frame) -> Costs:
    """Find the coefficients.

    Args:
        trial: what is counted.
        frame: its schedules.

    Raises:
        RuntimeError: the counts are no such polynomials.
    """
    nothing = (0,) * frame.depth
    counts = {nothing: trial.count(nothing)}
    # Blocks that look alike share their coefficients, unless the counts contradict it.
    for groups in (alike(trial.tower.blocks, counts[nothing][0]), [[i] for i in range(frame.depth)]):
        solved = _solve(trial, frame, groups, counts)
        if solved is not None:
            return solved
    raise no_polynomial(trial)


def no_polynomial(trial: Trial) -> RuntimeError:
    """What to say where the meter and the closed form differ."""
    return RuntimeError(
        f"the multiply-adds of {type(trial.model).__name__} are no polynomial in the tokens of the blocks of tower "
        f"{trial.name!r}: a reducer, or code between the blocks, costs something else. Above 2^26 pairs of tokens the "
        "matching works in tiles, which does that: give fewer inputs at a time; the share hardly depends on it"
    )


def alike(blocks: Sequence[nn.Module], marks: Sequence[int | bool]) -> list[list[int]]:
    """The blocks in groups of one class, with parameters of the same shapes and the same mark."""
    keys = [
        (type(block), tuple(p.shape for p in block.parameters()), mark)
        for block, mark in zip(blocks, marks, strict=True)
    ]
    return [[i for i, key in enumerate(keys) if key == kind] for kind in dict.fromkeys(keys)]


def _solve(
    trial: Trial, frame: Frame, groups: list[list[int]], counts: dict[tuple[int, ...], tuple[list[int], int]]
) -> Costs | None:
    """The coefficients, if blocks of a group have the same; counts what is missing in `counts`."""
    for r in _probes(trial, frame, groups, list(counts)):
        if r not in counts:
            counts[r] = trial.count(r)
            if trial.entered != frame.plan(r)[:-1]:
                raise RuntimeError(
                    f"tower {trial.name!r} ran its blocks on {trial.entered} tokens, and {frame.plan(r)[:-1]} were "
                    "planned: its number of tokens depends on more than the schedule"
                )
    plans = {r: frame.plan(r) for r in counts}
    blocks: list[Polynomial | None] = [None] * frame.depth
    for group in groups:
        rows = [(block_terms(plans[r][i], plans[r][i + 1]), counts[r][0][i]) for r in counts for i in group]
        found = solve(rows)
        if found is None:
            return None
        for i in group:
            blocks[i] = Polynomial(found)
    rest = solve([(_rest(trial, frame, plans[r]), counts[r][1]) for r in counts])
    if rest is None:
        return None
    return Costs(frame, [block for block in blocks if block is not None], Polynomial(rest), len(counts))


def _rest(trial: Trial, frame: Frame, plan: Tokens) -> list[int]:
    """Where the host gets all tokens back, what comes behind the blocks does not depend on the schedule."""
    return rest_terms(plan[frame.read + 1]) if not trial.tower.restore else [1, 0, 0]


def _probes(
    trial: Trial, frame: Frame, groups: list[list[int]], known: list[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """Schedules whose counts determine all others, as few as a greedy choice among some finds; `known` are counted."""
    chance = random.Random(0)
    pool = [_some(chance, frame) for _ in range(60)]
    owner = {i: number for number, group in enumerate(groups) for i in group}

    def rows(r: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        plan = frame.plan(r)
        for i in range(frame.depth):
            yield owner[i], block_terms(plan[i], plan[i + 1])
        yield -1, _rest(trial, frame, plan)

    wanted = {number: Span() for number in [*owner.values(), -1]}
    for r in pool:
        for number, row in rows(r):
            wanted[number].add(row)
    have = {number: Span() for number in wanted}
    for r in known:
        for number, row in rows(r):
            have[number].add(row)
    while any(have[number].rank < wanted[number].rank for number in wanted):
        gains = []
        for r in pool:
            spans = {number: span.copy() for number, span in have.items() if span.rank < wanted[number].rank}
            gains.append(sum(spans[number].add(row) for number, row in rows(r) if number in spans))
        best = pool[gains.index(max(gains))]
        for number, row in rows(best):
            have[number].add(row)
        yield best


def _some(chance: random.Random, frame: Frame) -> tuple[int, ...]:
    """A schedule by chance: blocks that remove nothing, a little and a lot."""
    left, r, strength = frame.start, [], chance.choice((0.05, 0.15, 0.5))
    for layer in range(frame.depth):
        most = (left - frame.reserved) // 2 if layer <= frame.read else 0
        few = max(0, min(most, round(strength * left)))
        r.append(chance.choice((0, chance.randint(0, few), chance.randint(0, most) if chance.random() < 0.2 else few)))
        left -= r[-1]
    return tuple(r)


# Equations in fractions -----------------------------------------------------------------------------------------------


class Span:
    """Rows of integers, as far as they are independent, in echelon form.

    Modulo a prime: no fractions to carry along. That hides an independent row with a chance of one in the prime.
    """

    PRIME = 2**61 - 1

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    @property
    def rank(self) -> int:
        """How many are independent."""
        return len(self.rows)

    def copy(self) -> Span:
        """Another one with the same rows."""
        new = Span()
        new.rows = dict(self.rows)
        return new

    def add(self, row: Sequence[int]) -> bool:
        """Add a row; returns whether it is independent of those before."""
        rest = list(row)
        for place, known in self.rows.items():
            if factor := rest[place] % self.PRIME:
                rest = [(a - factor * b) % self.PRIME for a, b in zip(rest, known, strict=True)]
        first = next((i for i, value in enumerate(rest) if value % self.PRIME), None)
        if first is None:
            return False
        inverse = pow(rest[first], -1, self.PRIME)
        self.rows[first] = [value * inverse % self.PRIME for value in rest]
        return True


def solve(equations: Sequence[tuple[Sequence[int], int]]) -> list[Fraction] | None:
    """Coefficients c with sum(c * terms) = value for all (terms, value), 0 where free; None: there are none."""
    width = len(equations[0][0])
    rows: dict[int, list[Fraction]] = {}  # place of the leading 1 -> row, the value last
    for terms, value in equations:
        rest = [Fraction(number) for number in (*terms, value)]
        for place, known in rows.items():
            if factor := rest[place]:
                rest = [a - factor * b for a, b in zip(rest, known, strict=True)]
        place = next((i for i, number in enumerate(rest) if number), width + 1)
        if place == width:  # 0 = 1
            return None
        if place < width:
            rows[place] = [number / rest[place] for number in rest]
    found = [Fraction(0)] * width
    for place in sorted(rows, reverse=True):
        found[place] = rows[place][width] - sum(rows[place][i] * found[i] for i in range(place + 1, width))
    return found
