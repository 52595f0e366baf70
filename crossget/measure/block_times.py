"""What a schedule takes in time: seconds of every block, fitted to a few measured schedules."""

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

from crossget.measure.allocation import Family, even, removed
from crossget.measure.cost_model import Frame, Trial, alike
from crossget.measure.flops import as_call


@dataclass(frozen=True)
class Times:
    """Seconds of each block, fitted to measured ones.

    Attributes:
        frame: the tower's schedules.
        laws: of each block, [7] one factor for each of `_time_terms`.
        rest: [3] the same for what is outside the blocks.
        dense: seconds of the dense model's forward.
        totals: schedule -> seconds of the whole forward, as measured.
    """

    frame: Frame
    laws: Sequence[Tensor]
    rest: Tensor
    dense: float
    totals: Mapping[tuple[int, ...], float]

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        cost = (_time_terms(self.frame, tokens, left) @ self.laws[layer]).clamp_min(0)
        if layer == self.frame.read:
            cost = cost + (_rest_terms(self.frame, left) @ self.rest).clamp_min(0)
        return cost


def _time_terms(frame: Frame, tokens: Tensor, left: Tensor) -> Tensor:
    """[.., 7] what a block's time is a sum of."""
    t, r = torch.broadcast_tensors(tokens.double() / frame.start, (tokens - left).double() / frame.start)
    m = (r > 0).double()
    return torch.stack([torch.ones_like(t), t, t * t, r, m, m * t, m * t * t], -1)


def _rest_terms(frame: Frame, left: Tensor) -> Tensor:
    t = left.double() / frame.start
    return torch.stack([torch.ones_like(t), t, t * t], -1)


def time_blocks(trial: Trial, frame: Frame, rounds: int) -> Times:
    """Time the blocks at some token counts, in turns with the dense model, and fit their times by least squares."""
    family, front = Family(frame, even(frame)), Family(frame, [1.0] + [0.0] * (frame.depth - 1))
    wanted = [front[len(front) // 2], front[len(front) - 1], frame.plan([0] * frame.depth)]
    for share in (0.8, 0.6, 0.4, 0.2, 0.0):
        left = frame.reserved + share * (frame.start - frame.reserved)
        wanted.append(family[int((family.tokens[:, -1] - left).abs().argmin())])
    plans = {tuple(removed(plan)): plan for plan in wanted}
    spent: dict[tuple[int, ...], list[list[float]]] = {r: [] for r in plans}
    dense = []
    for _ in range(max(3, rounds // 2)):
        with trial.attachment.paused():
            dense.append(math.fsum(_stamped(trial)))
        for r in plans:
            trial.use(r)
            spent[r].append(_stamped(trial))
    medians = {r: [statistics.median(part) for part in zip(*spent[r], strict=True)] for r in plans}
    laws: list[Tensor] = [torch.zeros(7, dtype=torch.float64)] * frame.depth
    for group in alike(trial.tower.blocks, [i > frame.read for i in range(frame.depth)]):
        pairs = [(plans[r][i], plans[r][i + 1], medians[r][i]) for r in plans for i in group]
        entered, behind, took = (torch.tensor(column) for column in zip(*pairs, strict=True))
        law = _least_squares(_time_terms(frame, entered, behind), took)
        for i in group:
            laws[i] = law
    handed = torch.tensor([plan[frame.read + 1] for plan in plans.values()])
    terms = _rest_terms(frame, handed)
    if trial.tower.restore:
        terms = terms * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rest = _least_squares(terms, torch.tensor([medians[r][-1] for r in plans]))
    totals = {r: statistics.median(math.fsum(seconds) for seconds in spent[r]) for r in plans}
    return Times(frame, laws, rest, statistics.median(dense), totals)


def _least_squares(terms: Tensor, seconds: Tensor) -> Tensor:
    found: Tensor = torch.linalg.lstsq(terms, seconds.double()[:, None], rcond=1e-9, driver="gelsd").solution
    return found[:, 0]


def _stamped(trial: Trial) -> list[float]:
    """Seconds of each block in one forward, and of the rest; the second of two, as in `crossget.benchmark`."""
    given, device = as_call(trial.inputs), trial.device
    stamps: list[Any] = []

    def stamp(*_: Any) -> None:
        if device.type == "cuda":  # on the device's own clock: waiting for it would change what is measured
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            stamps.append(event)
        else:
            stamps.append(time.perf_counter())

    trial.model(*given.args, **given.kwargs)
    # Hooks behind blocks would make the reducer more careful than it is without: all but the last stand in front.
    hooks = [block.register_forward_pre_hook(stamp) for block in trial.tower.blocks]
    hooks.append(trial.tower.blocks[-1].register_forward_hook(stamp))
    try:
        stamp()
        trial.model(*given.args, **given.kwargs)
        stamp()
    finally:
        for hook in hooks:
            hook.remove()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if len(stamps) != len(trial.tower.blocks) + 3:
        raise RuntimeError(
            f"the blocks of tower {trial.name!r} did not run once each in a forward, so they cannot be timed one by one"
        )
    seconds = [_between(a, b) for a, b in pairwise(stamps)]
    return [*seconds[1:-1], seconds[0] + seconds[-1]]


def _between(a: Any, b: Any) -> float:
    return float(b - a) if isinstance(a, float) else float(a.elapsed_time(b)) / 1e3
