"""Schedules for a budget: `fit_schedule(model, images, flops=0.58)`.

It finds how many tokens each block has to remove so that a forward takes 58 % of the dense model's multiply-adds. The
other budgets are a number of tokens behind the tower, and time. The cost of a schedule is known before it is tried:
multiply-adds exactly (cost_model.py), time from a few schedules that are timed (block_times.py). How the tokens are
shared out among the blocks (allocation.py) depends on how far the model's output on the given inputs moves.
docs/measuring.md explains the search and shows what was measured.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from crossget.core.attach import attach, find_attachment
from crossget.core.connector import NAME as CONNECTOR
from crossget.core.inputs import Inputs, as_call, tensors_in
from crossget.measure.allocation import (
    Cost,
    Family,
    FewestTokens,
    OutputLoss,
    RampedFamily,
    ScheduleSpace,
    allocate,
    closest_within,
    constant_weights,
    removed_tokens,
    total_cost,
)
from crossget.measure.block_times import BlockTimes, time_blocks
from crossget.measure.cost_model import ScheduledModel, derive, no_polynomial
from crossget.measure.flops import count_once
from crossget.measure.speed import calling, in_eval_mode, quartiles, take_turns
from crossget.methods.reducers import Reducer, Ward
from crossget.methods.schedules import PerLayer, planned_tokens

__all__ = ["FittedSchedule", "fit_schedule"]

Distribution = Literal["measured", "constant", "ramped"]
Budget = Literal["flops", "tokens_out", "latency"]
Output = Callable[[Any], Tensor]
"""What the model returns -> the tensor [B, ...] that is compared, one row per input."""


@dataclass(frozen=True)
class FittedSchedule:
    """A reducer that keeps a budget: `crossget.attach(model, fitted.reducer)`.

    Attributes:
        reducer: the reducer to attach; a dict by tower name if a tower was named.
        tower: name of the tower whose schedule was fitted.
        schedule: the tokens that each block removes.
        tokens: the tokens that enter each block, and those behind the last one, the cross token included.
        budget: which budget was given.
        asked: its value: a share of the dense model's cost, or a number of tokens.
        predicted: what the schedule should take, in the same unit. For multiply-adds it comes from the closed form, for
            a latency from the times of the blocks.
        measured: what the schedule takes, counted or timed in the end.
        spread: first and third quartile of the measurement; both equal `measured` where it does not vary.
        distribution: how the tokens are shared out among the blocks.
        losses: distribution -> loss of the output on the inputs: its squared distance from the dense model's output
            over the squared norm of that. Empty if no outputs were compared.
    """

    reducer: Reducer | Mapping[str, Reducer]
    tower: str
    schedule: PerLayer
    tokens: tuple[int, ...]
    budget: Budget
    asked: float
    predicted: float
    measured: float
    spread: tuple[float, float]
    distribution: Distribution
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the budget is kept within the precision of the measurement: its first quartile is not above it."""
        return self.spread[0] <= self.asked

    def __str__(self) -> str:
        show = partial(_show, self.budget)
        spread = "" if self.spread[0] == self.spread[1] else f" [{show(self.spread[0])}, {show(self.spread[1])}]"
        missed = "" if self.met else ": MISSED, by more than the spread of the measurement"
        lines = [
            f"{self.budget}: asked {show(self.asked)}, predicted {show(self.predicted)}, "
            f"measured {show(self.measured)}{spread}{missed}",
            f"tower {self.tower!r}, {self.distribution} distribution: r = {list(self.schedule.r)}",
            f"tokens: {' '.join(map(str, self.tokens))}",
        ]
        if self.losses:
            lines.append("loss on the inputs: " + ", ".join(f"{name} {loss:.3g}" for name, loss in self.losses.items()))
        return "\n".join(lines)


def _show(budget: Budget, value: float) -> str:
    return f"{value:g}" if budget == "tokens_out" else f"{value:.2%}"


def fit_schedule(
    model: nn.Module,
    inputs: Inputs,
    *,
    flops: float | None = None,
    tokens_out: int | None = None,
    latency: float | None = None,
    reducer: Reducer | Sequence[Reducer] | None = None,
    tower: str | None = None,
    distribution: Distribution = "measured",
    output: Output | None = None,
    rounds: int = 10,
) -> FittedSchedule:
    """Find a schedule with which the model keeps a budget. The model is left as it was.

    Give exactly one budget. Shares are of the dense model's whole forward, `model(*inputs)`, in eval mode, on the
    present device and with the batch of the inputs.

    Args:
        model: the model, not attached.
        inputs: the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. For
            the distribution "measured" give 16 to 32 typical examples, without labels.
        flops: share of the multiply-adds that `crossget.count_flops` counts, in (0, 1]. The schedule takes at most this
            share, and no block could keep one more token within it.
        tokens_out: patch tokens of an image that are left behind the last block, without class token, registers and
            cross token. For a model with images in its prompts: the image tokens that the language model gets, see
            `Attachment.image_tokens`.
        latency: share of the time, in (0, 1].
        reducer: the method, whose `r` is replaced; `Ward(r=0)` if None. CrossGET needs its trained cross tokens: name
            it when you load some. Of several methods each is fitted, and the one with the least loss of the output is
            returned.
        tower: name of the tower; None: the tower that `attach` reduces if it gets one reducer.
        distribution: how the tokens are shared out among the blocks. "constant": the same number in every block.
            "ramped": as by `crossget.RampedRatio`. "measured": with the least loss of the output on the inputs, or
            "constant" where that is not clearly better.
        output: a function from what the model returns to the tensor [B, ...] that is compared for "measured", such as
            `lambda out: out.pooler_output`. None: its `logits`, or else all its tensors.
        rounds: timed calls of dense and of reduced model, for a latency.

    Raises:
        TypeError: the model is not supported, or an argument has a wrong type.
        ValueError: not exactly one budget is given; it is out of range or cannot be kept (the message names the nearest
            one that can); the model is attached; it is a pyramid and `tower` names no stage; or something is to be
            measured and the inputs are on the meta device.
        RuntimeError: the multiply-adds are no polynomial in the tokens, see `crossget.measure.cost_model.derive`.
    """
    budget, asked = _chosen_budget({"flops": flops, "tokens_out": tokens_out, "latency": latency})
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution is {distribution!r}: choose 'measured', 'constant' or 'ramped'")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1 round")
    if tower == CONNECTOR:
        raise ValueError(f"tower={tower!r}: a schedule is for the blocks of a tower; give crossget.Keep there")
    methods = _methods(reducer)
    previous = find_attachment(model)
    if previous is not None:
        raise ValueError(f"already attached: {previous}. Detach it first: a budget is a share of the dense model")
    call = as_call(inputs)
    if any(tensor.is_meta for tensor in (*call.tensors, *model.parameters())):
        if budget == "latency":
            raise ValueError("latency cannot be measured on the meta device: give flops or tokens_out there")
        if distribution == "measured" or len(methods) > 1:
            raise ValueError(
                "on the meta device nothing can be measured: set distribution='constant' or 'ramped', and give one "
                "reducer"
            )
    if budget == "latency" and not call.tensors:
        raise ValueError("inputs hold no tensor: expected at least one, which tells the device")
    results: list[FittedSchedule] = []
    with in_eval_mode(model), torch.no_grad():
        for method in methods:
            with attach(model, method if tower is None else {tower: method}, inputs) as attachment:
                name = next(iter(attachment.towers)) if tower is None else tower
                stages = [one for one in attachment.towers if one.partition(".")[0] == name.partition(".")[0]]
                if tower is None and len(stages) > 1:
                    raise ValueError(
                        f"the model is a pyramid with the stages {stages}, and a schedule is fitted for one tower: "
                        f"name the stage, as in tower={stages[-1]!r}; the others stay as they are"
                    )
                search = _Search(ScheduledModel(model, inputs, attachment, name), output, distribution, rounds)
                found = search.run(budget, asked)
                schedule = PerLayer(tuple(removed_tokens(found.tokens)))
                losses = found.losses
                if len(methods) > 1 and found.distribution not in losses:
                    losses = {**losses, found.distribution: float(search.output_loss(schedule.r).mean())}
            fitted = replace(method, r=schedule)
            results.append(FittedSchedule(
                fitted if tower is None else {tower: fitted}, name, schedule, tuple(found.tokens), budget, asked,
                found.predicted, found.measured, found.spread, found.distribution, losses,
            ))  # fmt: skip
    best = results[0] if len(results) == 1 else min(results, key=lambda one: one.losses[one.distribution])
    if not best.met:
        warnings.warn(f"the budget was missed. {best}", stacklevel=2)
    return best


def _methods(given: Reducer | Sequence[Reducer] | None) -> list[Reducer]:
    """The methods to fit, with r = 0."""
    methods = [Ward(r=0)] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if not methods or not all(isinstance(method, Reducer) for method in methods):
        raise TypeError(
            f"reducer is {given!r}: give a reducer such as crossget.Ward(r=0), whose r will be found, or several"
        )
    return [replace(method, r=0) for method in methods]


def _chosen_budget(budgets: Mapping[Budget, float | None]) -> tuple[Budget, float]:
    """The one budget that is given, and its value."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one budget of {', '.join(budgets)}; got {given or 'none'}")
    ((budget, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{budget} is {value!r}: expected a number")
    if budget == "tokens_out":
        if not isinstance(value, int):
            raise TypeError(f"tokens_out is {value!r}: the number of tokens is an int")
        if value < 1:
            raise ValueError(f"tokens_out is {value}: expected at least 1")
    elif not 0 < value <= 1:
        raise ValueError(f"{budget} is {value}: expected a share of the dense model's, in (0, 1]")
    return budget, value


# The search -----------------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """A schedule, and how it was chosen.

    Attributes:
        tokens: of each block.
        distribution: how they are shared out.
        losses: of the output, by distribution, where it was measured.
    """

    tokens: list[int]
    distribution: Distribution
    losses: Mapping[str, float]


@dataclass(frozen=True)
class _Result:
    """A schedule with its predicted and its measured cost; the attributes are those of `FittedSchedule`."""

    tokens: list[int]
    distribution: Distribution
    losses: Mapping[str, float]
    predicted: float
    measured: float
    spread: tuple[float, float]


class _Search:
    """The search for one reducer's schedule.

    Args:
        model: the attached model.
        output, distribution, rounds: see `fit_schedule`.

    Raises:
        ValueError: no token of the tower can be merged, or the inputs do not reach it.
    """

    def __init__(self, model: ScheduledModel, output: Output | None, distribution: Distribution, rounds: int) -> None:
        self.model, self.output, self.distribution, self.rounds = model, output, distribution, rounds
        self.dense_output: Any = None
        tower, reducer = model.tower, model.attachment.reducers[model.name]
        if not tower.reducible:
            raise ValueError(f"tower {model.name!r} is a language model that generates: its tokens are not merged")
        depth, cross_token = tower.depth, int(bool(reducer.cross_token))
        model.set_removed([0] * depth)
        self.unmerged_output = self.run_model()
        if len(model.entered) != depth:
            raise ValueError(f"tower {model.name!r} did not run on these inputs: give inputs that reach it")
        n_tokens = model.entered[0]
        n_reserved = tower.n_reserved(bool(cross_token))
        self.check_reserved(n_reserved, n_tokens)
        if n_tokens - n_reserved < 2:
            raise ValueError(
                f"tower {model.name!r} has {n_tokens} tokens, of which {n_reserved} always stay: nothing can be "
                "merged, so no budget can be kept"
            )
        last, self.besides_patches = depth - 1, tower.prefix + cross_token
        if tower.prompt is not None:  # the model takes the tokens behind another block, and perhaps the cross token
            features = tower.prompt.features(model.call.kwargs)
            passes_cross_token = tower.keeps_cross_token and not reducer.strip_cross_token
            last, self.besides_patches = features.layer, features.dropped + cross_token * (not passes_cross_token)
        elif reducer.class_token_only and depth > 1 and self.last_block_merges_nothing(n_tokens):
            last -= 1
        self.space = ScheduleSpace(depth, n_tokens, n_reserved, last)
        # The distribution that is used as it is, or that the measured one has to be better than.
        self.simple: Distribution = "ramped" if distribution == "ramped" else "constant"
        self.family = (
            RampedFamily(self.space) if self.simple == "ramped" else Family(self.space, constant_weights(self.space))
        )

    def check_reserved(self, n_reserved: int, n_tokens: int) -> None:
        """Raise a RuntimeError unless `n_reserved` tokens stay in a forward that removes as many as possible."""
        depth = self.model.tower.depth
        self.run_model([n_tokens] * depth)
        tokens = planned_tokens(PerLayer((n_tokens,) * depth), depth, n_tokens, n_reserved)
        if tokens[:-1] == self.model.entered:
            return
        raise RuntimeError(
            f"tower {self.model.name!r} ran its blocks on {self.model.entered} tokens, unlike planned: its number of "
            "tokens depends on more than the schedule"
        )

    def last_block_merges_nothing(self, n_tokens: int) -> bool:
        """Whether the last block keeps all tokens when it is told to remove them, after another has removed one."""
        depth = self.model.tower.depth
        self.model.set_removed([1] + [0] * (depth - 2) + [n_tokens])
        return self.model.run_and_count_left() == self.model.entered[-1]

    def run(self, budget: Budget, asked: float) -> _Result:
        """Find the schedule for a budget."""
        if budget == "flops":
            return self.by_flops(asked)
        return self.by_tokens(int(asked)) if budget == "tokens_out" else self.by_latency(asked)

    # The budgets

    def by_flops(self, asked: float) -> _Result:
        """The schedule that takes at most a share of the dense model's multiply-adds."""
        with self.model.attachment.paused():
            dense = count_once(self.model.model, self.model.inputs).total
        cost = derive(self.model, self.space)
        choice = self.within(cost, asked, dense, "flops")
        blocks, rest = self.model.count(removed_tokens(choice.tokens))
        counted = sum(blocks) + rest
        if counted != cost.total(choice.tokens):
            raise no_polynomial(self.model)
        share = counted / dense
        return _Result(*choice, share, share, (share, share))

    def by_tokens(self, asked: int) -> _Result:
        """The schedule that leaves so many patch tokens behind the last block that may remove tokens."""
        place, goal = self.space.last_layer + 1, asked + self.besides_patches
        left = self.family.tokens[:, place]
        if not left.min() <= goal <= left.max():
            possible = left.min() if goal < left.min() else left.max()
            raise _impossible("tokens_out", asked, int(possible) - self.besides_patches)
        tokens = self.family[int((left <= goal).nonzero()[0])]
        r, too_many = removed_tokens(tokens), goal - tokens[place]
        for layer in reversed(range(place)):  # a family may leave numbers out: the last blocks remove fewer then
            fewer = min(too_many, r[layer])
            r[layer], too_many = r[layer] - fewer, too_many - fewer
        simple = self.space.tokens(r)
        choice = _Choice(simple, self.simple, {})
        if self.distribution == "measured":
            found = [allocate(self.space, loss, FewestTokens(), math.inf, goal) for loss in self.block_losses()]
            choice = self.choose(simple, found)
        self.model.set_removed(removed_tokens(choice.tokens))
        measured = float(self.model.run_and_count_left() - self.besides_patches)
        return _Result(*choice, asked, measured, (measured, measured))

    def by_latency(self, asked: float) -> _Result:
        """The schedule that takes at most a share of the dense model's time."""
        times = time_blocks(self.model, self.space, self.rounds)
        least = min(times.measured.values()) / times.dense
        if least >= 1:
            raise ValueError(
                f"latency={asked:g} cannot be kept: no schedule is faster than the dense model here, the best takes "
                f"{least:.2f} of its time. The time does not fall with the tokens (few tokens, a small batch, a device "
                "that waits for its launches): give a larger batch, or budget flops"
            )
        if asked < least:
            raise _impossible("latency", asked, least)
        choice = self.within(times, asked, times.dense, "latency")
        result = self.measure_latency(times, choice)
        low, high = result.spread
        r = removed_tokens(choice.tokens)
        if not low <= asked <= high and any(r):  # the prediction is off: correct the aim by the factor it is off
            aim = asked * times.dense * result.predicted / result.measured
            tokens = closest_within(times, Family(self.space, r), aim)
            if tokens is not None:
                again = self.measure_latency(times, choice._replace(tokens=tokens))
                if abs(again.measured - asked) < abs(result.measured - asked):
                    result = again
        return result

    def measure_latency(self, times: BlockTimes, choice: _Choice) -> _Result:
        """Time a schedule against the dense model, in turns."""
        run, model = self.model.run, self.model
        model.set_removed(removed_tokens(choice.tokens))
        turns = {"dense": partial(calling, run, model.attachment.paused), "reduced": partial(calling, run)}
        seconds = take_turns(turns, model.call.device, self.rounds, warmup=1)
        shares = tuple(a / b for a, b in zip(seconds["reduced"], seconds["dense"], strict=True))
        predicted = float(total_cost(times, torch.tensor([choice.tokens]))) / times.dense
        return _Result(*choice, predicted, statistics.median(shares), quartiles(shares))

    def within(self, cost: Cost, asked: float, dense: float, budget: Budget) -> _Choice:
        """The schedule that costs at most the share `asked` of `dense`, and as much of it as possible."""
        limit = asked * dense
        simple = closest_within(cost, self.family, limit)
        if self.distribution != "measured":
            if simple is None:
                raise _impossible(budget, asked, float(total_cost(cost, self.family.tokens).min()) / dense)
            return _Choice(simple, self.simple, {})
        if simple is None and allocate(self.space, FewestTokens(), cost, limit) is None:
            cheapest = allocate(self.space, cost, cost, math.inf) or self.space.strongest()
            least = min(total_cost(cost, torch.tensor([cheapest])).min(), total_cost(cost, self.family.tokens).min())
            raise _impossible(budget, asked, float(least) / dense)
        found = [allocate(self.space, loss, cost, limit) for loss in self.block_losses()]
        families = [Family(self.space, removed_tokens(tokens)) for tokens in found if tokens]
        return self.choose(simple, [closest_within(cost, family, limit) for family in families])

    # The measured distribution

    def block_losses(self) -> list[OutputLoss]:
        """What each block alone costs the output, as three power laws.

        Each block removes a quarter, then half of the tokens. The loss is relative to the output without any removed,
        so that the effect of a cross token does not count.
        """
        free = self.space.n_tokens - self.space.n_reserved
        points = []
        for layer in range(self.space.last_layer + 1):
            of_block = []
            for r in sorted({max(1, free // 4), free // 2}):
                moved = self.run_model([r if i == layer else 0 for i in range(self.space.depth)])
                of_block.append((self.space.n_tokens - r, float(distance(moved, self.unmerged_output).mean())))
            points.append(of_block)
        return [OutputLoss(self.space, points, least_power) for least_power in (1.0, 2.0, 3.0)]

    def choose(self, constant: list[int] | None, allocated: Sequence[list[int] | None]) -> _Choice:
        """The best of the allocated schedules on the inputs, or the constant one.

        The constant one stays unless the other is better by more than the standard error of the difference.
        """
        different = dict.fromkeys(tuple(tokens) for tokens in allocated if tokens and tokens != constant)
        candidates = [list(tokens) for tokens in different]
        if not candidates:
            return _Choice(constant or [], "constant", {})
        losses = [self.output_loss(removed_tokens(tokens)) for tokens in candidates]
        best = min(range(len(candidates)), key=lambda i: float(losses[i].mean()))
        measured = float(losses[best].mean())
        if constant is None:
            return _Choice(candidates[best], "measured", {"measured": measured})
        of_constant = self.output_loss(removed_tokens(constant))
        both = {"measured": measured, "constant": float(of_constant.mean())}
        difference = losses[best] - of_constant
        error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        if float(difference.mean()) < -error:
            return _Choice(candidates[best], "measured", both)
        return _Choice(constant, "constant", both)

    def output_loss(self, r: Sequence[int]) -> Tensor:
        """[B] distance of the output from the dense model's, for each input, with a schedule."""
        if self.dense_output is None:
            with self.model.attachment.paused():
                self.dense_output = self.run_model()
        return distance(self.run_model(r), self.dense_output)

    def run_model(self, r: Sequence[int] | None = None) -> Any:
        """The part of the model's output that is compared, with a schedule; None: the one that is set."""
        if r is not None:
            self.model.set_removed(r)
        out = self.model.run()
        if self.output is not None:
            return self.output(out)
        # Besides logits, models of transformers return features and caches, which no decision depends on.
        logits = getattr(out, "logits", None)
        return logits if isinstance(logits, Tensor) else out


def _impossible(budget: Budget, asked: float, possible: float) -> ValueError:
    """The error for a budget that cannot be kept; `possible` is the nearest that can."""
    if budget == "tokens_out":
        return ValueError(f"tokens_out={asked:g} cannot be kept: the nearest possible is {possible:g}")
    shown = math.ceil(possible * 1e4) / 1e4
    if shown >= 1:
        return ValueError(
            f"{budget}={asked:g} cannot be kept: even the cheapest schedule takes {shown:g} of the dense model's. "
            "Here the matching costs more than fewer tokens save"
        )
    return ValueError(
        f"{budget}={asked:g} cannot be kept: the nearest possible is {shown:g}. A block removes at most half of its "
        "tokens, and what is outside the blocks is not reduced"
    )


def distance(output: Any, dense: Any) -> Tensor:
    """[B] squared distance of two outputs over the squared norm of the second, for each row, averaged over tensors.

    Where a tensor [B, T, ...] has another number of tokens than the dense model's, their last tokens are compared.

    Raises:
        ValueError: the outputs hold no tensors that can be compared.
    """
    found = []
    pairs = list(zip(tensors_in(output), tensors_in(dense), strict=False))
    rows = next((int(b.shape[0]) for _, b in pairs if b.is_floating_point() and b.dim() > 1), 0)
    for a, b in pairs:
        if not b.is_floating_point() or b.dim() < 2 or a.shape[0] != rows or b.shape[0] != rows:
            continue
        if a.dim() == b.dim() > 2 and a.shape[2:] == b.shape[2:] and a.shape[1] != b.shape[1]:
            a, b = a[:, -1], b[:, -1]
        if a.shape == b.shape:
            a, b = a.cpu().double().flatten(1), b.cpu().double().flatten(1)
            found.append((a - b).square().sum(1) / b.square().sum(1).clamp_min(1e-30))
    if not found:
        raise ValueError(
            "what the model returns cannot be compared with the dense model's: expected a tensor of floating point "
            "[B, ...] among it. Give output=, a function that takes one out of it, or distribution='constant'"
        )
    return torch.stack(found).mean(0)
