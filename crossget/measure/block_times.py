"""The time of a forward by schedule: seconds of every block, fitted to a few schedules that are timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from crossget.core.hooks import counting
from crossget.measure.allocation import Family, ScheduleSpace, constant_weights, removed_tokens
from crossget.measure.cost_model import ScheduledModel, alike_blocks


@dataclass(frozen=True)
class BlockTimes:
    """Predicted seconds of each block, for every schedule.

    Attributes:
        space: the tower's schedules.
        blocks: for each block, [7] a coefficient for each of `_block_terms`.
        rest: [3] the same for what is outside the blocks.
        dense: seconds of a forward of the dense model.
        measured: tokens that each block removes -> seconds of the whole forward, for the schedules that were timed.
    """

    space: ScheduleSpace
    blocks: Sequence[Tensor]
    rest: Tensor
    dense: float
    measured: Mapping[tuple[int, ...], float]

    @property
    def unreduced(self) -> float | None:
        """Seconds of the schedule that removes nothing, as they were measured."""
        return self.measured.get((0,) * self.space.depth)

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        """Seconds of block `layer`, see `Cost`; those of `space.last_layer` include what is outside the blocks."""
        cost = (_block_terms(self.space, tokens, left) @ self.blocks[layer]).clamp_min(0)
        if layer == self.space.last_layer:
            cost = cost + (_rest_terms(self.space, left) @ self.rest).clamp_min(0)
        return cost


def _block_terms(space: ScheduleSpace, tokens: Tensor, left: Tensor) -> Tensor:
    """[.., 7] the terms of a block's time, which is their sum with a coefficient each."""
    t, r = torch.broadcast_tensors(tokens.double() / space.n_tokens, (tokens - left).double() / space.n_tokens)
    merges = (r > 0).double()
    return torch.stack([torch.ones_like(t), t, t * t, r, merges, merges * t, merges * t * t], -1)


def _rest_terms(space: ScheduleSpace, left: Tensor) -> Tensor:
    """[.., 3] the same for what is outside the blocks."""
    t = left.double() / space.n_tokens
    return torch.stack([torch.ones_like(t), t, t * t], -1)


def time_blocks(model: ScheduledModel, space: ScheduleSpace, rounds: int) -> BlockTimes:
    """Time the blocks with eight schedules, in turns with the dense model, and fit their times by least squares.

    Args:
        model: the attached model.
        space: the schedules of its tower.
        rounds: as in `crossget.fit_schedule`; every schedule is timed half as often, at least 3 times.

    Raises:
        RuntimeError: the blocks do not run once each in a forward.
    """
    constant = Family(space, constant_weights(space))
    first = Family(space, [1.0] + [0.0] * (space.depth - 1))
    chosen = [first[len(first) // 2], first[len(first) - 1], space.tokens([0] * space.depth)]
    for share in (0.8, 0.6, 0.4, 0.2, 0.0):
        left = space.n_reserved + share * (space.n_tokens - space.n_reserved)
        chosen.append(constant[int((constant.tokens[:, -1] - left).abs().argmin())])
    tokens = {tuple(removed_tokens(schedule)): schedule for schedule in chosen}
    seconds: dict[tuple[int, ...], list[list[float]]] = {r: [] for r in tokens}
    dense = []
    for _ in range(max(3, rounds // 2)):
        with model.attachment.paused():
            dense.append(math.fsum(_time_parts(model)))
        for r in tokens:
            model.set_removed(r)
            seconds[r].append(_time_parts(model))
    medians = {r: [statistics.median(part) for part in zip(*seconds[r], strict=True)] for r in tokens}
    blocks: list[Tensor] = [torch.zeros(7, dtype=torch.float64)] * space.depth
    for group in alike_blocks(model.tower.blocks, [i > space.last_layer for i in range(space.depth)]):
        # A last block that computes one token computes all of them where no block removes one.
        timed = [(r, i) for r in tokens for i in group if i <= space.last_layer or any(r)]
        measured = [(tokens[r][i], tokens[r][i + 1], medians[r][i]) for r, i in timed]
        entering, leaving, took = (torch.tensor(column) for column in zip(*measured, strict=True))
        coefficients = _least_squares(_block_terms(space, entering, leaving), took)
        for i in group:
            blocks[i] = coefficients
    terms = _rest_terms(space, torch.tensor([schedule[space.last_layer + 1] for schedule in tokens.values()]))
    if model.tower.restore:  # the model gets all tokens back: the rest takes the same time for every schedule
        terms = terms * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rest = _least_squares(terms, torch.tensor([medians[r][-1] for r in tokens]))
    totals = {r: statistics.median(math.fsum(parts) for parts in seconds[r]) for r in tokens}
    return BlockTimes(space, blocks, rest, statistics.median(dense), totals)


def _least_squares(terms: Tensor, seconds: Tensor) -> Tensor:
    found: Tensor = torch.linalg.lstsq(terms, seconds.double()[:, None], rcond=1e-9, driver="gelsd").solution
    return found[:, 0]


def _time_parts(model: ScheduledModel) -> list[float]:
    """Seconds of each block in one forward, then of the rest. Of two forwards the second is timed."""
    device = model.call.device
    stamps: list[Any] = []

    def stamp(*_: Any) -> None:
        if device.type == "cuda":  # an event, because waiting for the device would change what is measured
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            stamps.append(event)
        else:
            stamps.append(time.perf_counter())

    model.run()
    # Hooks in front of the blocks, because one behind a block makes the tower show all its tokens there.
    hooks = [block.register_forward_pre_hook(stamp) for block in model.tower.blocks]
    hooks.append(model.tower.blocks[-1].register_forward_hook(stamp))
    try:
        with counting():  # the hook behind the last block reads no tokens
            stamp()
            model.run()
            stamp()
    finally:
        for hook in hooks:
            hook.remove()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if len(stamps) != len(model.tower.blocks) + 3:
        raise RuntimeError(
            f"the blocks of tower {model.name!r} did not run once each in a forward, so they cannot be timed one by "
            "one: give flops or tokens_out instead of latency"
        )
    seconds = [_between(a, b) for a, b in pairwise(stamps)]
    return [*seconds[1:-1], seconds[0] + seconds[-1]]


def _between(a: Any, b: Any) -> float:
    """Seconds between two stamps."""
    return float(b - a) if isinstance(a, float) else float(a.elapsed_time(b)) / 1e3
