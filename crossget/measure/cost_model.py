"""The multiply-adds of a forward in closed form: polynomials in the tokens of each block.

Let `tokens` enter a block and `left` leave it. The layers in front of the reduction cost a multiple of `tokens`, the
attention a multiple of `tokens^2`, the layers behind the reduction a multiple of `left`. The matching adds a polynomial
of its own where the block removes something; a bipartite matching has another constant for odd numbers of tokens. What
is outside the blocks costs the same for every schedule, or, where the model takes the tower's tokens reduced, a
polynomial in their number.

The coefficients come from `count_flops`: a few schedules are counted, chosen such that they determine the count of
every schedule, and the linear equations are solved in fractions. So the result is exact for every model and reducer
whose cost has this form. For any other the equations contradict each other, which is an error.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.attachment import Attachment
from crossget.core.inputs import Inputs, as_call
from crossget.measure.allocation import ScheduleSpace, Tokens
from crossget.measure.flops import count_once


class ScheduledModel:
    """An attached model that is called, or counted, with one schedule after the other.

    Args:
        model: the model.
        inputs: its arguments, see `crossget.count_flops`.
        attachment: its attachment.
        name: the tower whose schedule changes.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, attachment: Attachment, name: str) -> None:
        self.model, self.inputs, self.attachment, self.name = model, inputs, attachment, name
        self.call = as_call(inputs)
        self.tower = attachment.towers[name]

    def set_removed(self, r: Sequence[int]) -> None:
        """From now on, remove `r[i]` tokens in block i."""
        reducers = self.attachment.reducers
        self.attachment.reducer = {**reducers, self.name: replace(reducers[self.name], r=tuple(r))}

    def run(self) -> Any:
        """Call the model, and return what it returns."""
        with warnings.catch_warnings():  # the search asks for more than there is, on purpose
            warnings.filterwarnings("ignore", "r of .* asks tower")
            return self.call.run(self.model)

    @property
    def entered(self) -> list[int]:
        """The tokens that entered each block in the last call; empty if the tower did not run."""
        try:
            return self.attachment.tokens[self.name]
        except RuntimeError:  # no tower ran
            return []

    def run_and_count_left(self) -> int:
        """Call the model, and return how many tokens were left behind the last block, the cross token included."""
        on_meta = any(tensor.is_meta for tensor in self.call.tensors)
        with self.attachment.recording() if on_meta else contextlib.nullcontext():
            self.run()
        if on_meta:  # there the values of `source` are unknown, while the shapes in the records are known
            return int(self.attachment.records[self.name][-1].sizes.shape[1])
        cross_token = int(bool(self.attachment.reducers[self.name].cross_token))
        return int(self.attachment.source[self.name].max()) + 1 + cross_token

    def count(self, r: Sequence[int]) -> tuple[list[int], int]:
        """The multiply-adds of each block, and of all that is outside the blocks."""
        self.set_removed(r)
        count = count_once(self.model, self.inputs, self.attachment.parameters())
        names = {module: name for name, module in self.model.named_modules()}
        blocks = [count.by_module.get(names[block], 0) for block in self.tower.blocks]
        return blocks, count.total - sum(blocks)


# Polynomials ----------------------------------------------------------------------------------------------------------


def block_terms(tokens: int | Tensor, left: int | Tensor) -> list[Any]:
    """The terms of a block's cost, which is their sum with a coefficient each; for numbers or for tensors of them."""
    r = tokens - left
    merges: Any = (r > 0) * 1
    return [
        1 + 0 * r,
        tokens,
        tokens * tokens,
        r,
        merges,
        merges * tokens,
        merges * tokens * tokens,
        merges * (tokens % 2),
        r * tokens,
        r * r,
    ]


def rest_terms(left: int | Tensor) -> list[Any]:
    """The terms of the cost outside the blocks, where the model takes `left` tokens of the tower."""
    return [1 + 0 * left, left, left * left]


class Polynomial:
    """A sum of terms with fractions as coefficients, whose values are integers."""

    def __init__(self, coefficients: Sequence[Fraction]) -> None:
        self.denominator = lcm(*(c.denominator for c in coefficients))
        self.numerators = [int(c * self.denominator) for c in coefficients]

    def __call__(self, terms: Sequence[int]) -> int:
        """The value, exactly."""
        return sum(c * term for c, term in zip(self.numerators, terms, strict=True)) // self.denominator

    def values(self, terms: Sequence[Tensor]) -> Tensor:
        """Many values at once, as float64."""
        parts = [term.double() * (c / self.denominator) for c, term in zip(self.numerators, terms, strict=True) if c]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(terms[0], dtype=torch.float64)


@dataclass(frozen=True)
class FlopModel:
    """The multiply-adds of every schedule of one tower that removes nothing behind `space.last_layer`.

    Attributes:
        space: the schedules.
        blocks: for each block, a polynomial in `block_terms`.
        rest: for what is outside the blocks, a polynomial in `rest_terms`.
        counted: how many schedules were counted to find the coefficients.
    """

    space: ScheduleSpace
    blocks: Sequence[Polynomial]
    rest: Polynomial
    counted: int

    def total(self, tokens: Tokens) -> int:
        """Multiply-adds of the whole forward, exactly as `crossget.count_flops` counts them."""
        blocks = sum(self.blocks[i](block_terms(tokens[i], tokens[i + 1])) for i in range(self.space.depth))
        return blocks + self.rest(rest_terms(tokens[self.space.last_layer + 1]))

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """The cost of block `layer`, see `Cost`; that of `space.last_layer` includes what is outside the blocks."""
        tokens, left = torch.broadcast_tensors(tokens, left)
        cost = self.blocks[layer].values(block_terms(tokens, left))
        return cost + self.rest.values(rest_terms(left)) if layer == self.space.last_layer else cost


_Counts = dict[tuple[int, ...], tuple[list[int], int]]
"""Tokens that each block removes -> multiply-adds of each block, and outside the blocks."""


def derive(model: ScheduledModel, space: ScheduleSpace) -> FlopModel:
    """Find the coefficients by counting.

    Args:
        model: the attached model.
        space: the schedules of its tower.

    Raises:
        RuntimeError: the counts are no such polynomials, or blocks run on another number of tokens than planned.
    """
    nothing = (0,) * space.depth
    counts = {nothing: model.count(nothing)}
    # Blocks of one class with parameters of the same shapes share their coefficients, unless the counts contradict it.
    for groups in (alike_blocks(model.tower.blocks, counts[nothing][0]), [[i] for i in range(space.depth)]):
        solved = _solve(model, space, groups, counts)
        if solved is not None:
            return solved
    raise no_polynomial(model)


def no_polynomial(model: ScheduledModel) -> RuntimeError:
    """The error where the counts are no polynomials."""
    return RuntimeError(
        f"the multiply-adds of {type(model.model).__name__} are no polynomial in the tokens of the blocks of tower "
        f"{model.name!r}: the cost of the reducer, or of code between the blocks, has another form. So it has above "
        "2^26 pairs of tokens, where the matching works in tiles: give fewer inputs at a time; the share hardly "
        "depends on it"
    )


def alike_blocks(blocks: Sequence[nn.Module], marks: Sequence[int | bool]) -> list[list[int]]:
    """The numbers of the blocks, in groups of one class, with parameters of the same shapes and the same mark."""
    keys = [
        (type(block), tuple(p.shape for p in block.parameters()), mark)
        for block, mark in zip(blocks, marks, strict=True)
    ]
    return [[i for i, key in enumerate(keys) if key == kind] for kind in dict.fromkeys(keys)]


def _solve(model: ScheduledModel, space: ScheduleSpace, groups: list[list[int]], counts: _Counts) -> FlopModel | None:
    """The coefficients, the same for all blocks of a group; None if the counts contradict that.

    Schedules that are counted here are added to `counts`.
    """
    for r in _probes(model, space, groups, list(counts)):
        if r not in counts:
            counts[r] = model.count(r)
            if model.entered != space.tokens(r)[:-1]:
                raise RuntimeError(
                    f"tower {model.name!r} ran its blocks on {model.entered} tokens, and {space.tokens(r)[:-1]} were "
                    "planned: its number of tokens depends on more than the schedule"
                )
    tokens = {r: space.tokens(r) for r in counts}
    blocks: list[Polynomial | None] = [None] * space.depth
    for group in groups:
        found = solve([(block_terms(tokens[r][i], tokens[r][i + 1]), counts[r][0][i]) for r in counts for i in group])
        if found is None:
            return None
        for i in group:
            blocks[i] = Polynomial(found)
    rest = solve([(_rest_terms(model, space, tokens[r]), counts[r][1]) for r in counts])
    if rest is None:
        return None
    return FlopModel(space, [block for block in blocks if block is not None], Polynomial(rest), len(counts))


def _rest_terms(model: ScheduledModel, space: ScheduleSpace, tokens: Tokens) -> list[int]:
    """`rest_terms`; a constant alone where the tower gives the model all its tokens back."""
    return [1, 0, 0] if model.tower.restore else rest_terms(tokens[space.last_layer + 1])


def _probes(
    model: ScheduledModel, space: ScheduleSpace, groups: list[list[int]], counted: list[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """A few schedules whose counts, with those in `counted`, determine the counts of all others.

    A greedy choice among random schedules: the next one is always that which adds most independent equations.
    """
    generator = random.Random(0)
    pool = [_random_schedule(generator, space) for _ in range(60)]
    group_of = {i: number for number, group in enumerate(groups) for i in group}

    def equations(r: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        tokens = space.tokens(r)
        for i in range(space.depth):
            yield group_of[i], block_terms(tokens[i], tokens[i + 1])
        yield -1, _rest_terms(model, space, tokens)

    wanted = {number: Span() for number in [*group_of.values(), -1]}
    for r in pool:
        for number, row in equations(r):
            wanted[number].add(row)
    have = {number: Span() for number in wanted}
    for r in counted:
        for number, row in equations(r):
            have[number].add(row)
    while any(have[number].rank < wanted[number].rank for number in wanted):
        gains = []
        for r in pool:
            spans = {number: span.copy() for number, span in have.items() if span.rank < wanted[number].rank}
            gains.append(sum(spans[number].add(row) for number, row in equations(r) if number in spans))
        best = pool[gains.index(max(gains))]
        for number, row in equations(best):
            have[number].add(row)
        yield best


def _random_schedule(generator: random.Random, space: ScheduleSpace) -> tuple[int, ...]:
    """A schedule with blocks that remove nothing, a little and a lot."""
    left, r, share = space.n_tokens, [], generator.choice((0.05, 0.15, 0.5))
    for layer in range(space.depth):
        most = (left - space.n_reserved) // 2 if layer <= space.last_layer else 0
        few = max(0, min(most, round(share * left)))
        many = generator.randint(0, most) if generator.random() < 0.2 else few
        r.append(generator.choice((0, generator.randint(0, few), many)))
        left -= r[-1]
    return tuple(r)


# Linear equations -----------------------------------------------------------------------------------------------------


class Span:
    """The span of rows of integers, held as independent rows in echelon form.

    It computes modulo a prime, which is faster than in fractions. With a probability of 1 / prime it takes an
    independent row for a dependent one.
    """

    PRIME = 2**61 - 1

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    @property
    def rank(self) -> int:
        """The number of independent rows."""
        return len(self.rows)

    def copy(self) -> Span:
        """A copy, to which rows can be added."""
        new = Span()
        new.rows = dict(self.rows)
        return new

    def add(self, row: Sequence[int]) -> bool:
        """Add a row, and return whether it is independent of those before."""
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
    """Coefficients c with sum(c * terms) = value for all (terms, value), 0 where any would do; None if none fit."""
    width = len(equations[0][0])
    rows: dict[int, list[Fraction]] = {}  # place of the leading 1 -> row, with the value at its end
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
