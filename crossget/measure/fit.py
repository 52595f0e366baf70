"""Budgets: which schedule makes a model cost what it may cost.

`fit_schedule(model, inputs, flops=0.58)` finds how many tokens each block has to give up so that a forward costs 58 % of the
dense model's multiply-adds; the other budgets are tokens handed on and time. What a schedule costs is known
before it is tried: multiply-adds exactly (costs.py), time from a few timed blocks (timing.py). How the tokens are
shared out among the blocks (allocation.py) is decided by what the model's output loses on the inputs given.
docs/budgets.md tells it all.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from crossget.core.attachment import attach, find_attachment
from crossget.measure.allocation import Family, Free, Loss, Price, Rises, allocate, even, nearest, prices, removed
from crossget.measure.block_times import Times, time_blocks
from crossget.measure.cost_model import Frame, Tokens, Trial, derive, no_polynomial
from crossget.measure.flops import Inputs, as_call, count_once, tensors_in
from crossget.measure.speed import calling, in_eval_mode, quartiles, take_turns
from crossget.methods.reducers import CrossGET, Reducer
from crossget.methods.schedules import PerLayer, planned_tokens

__all__ = ["FittedSchedule", "fit_schedule"]

Distribution = Literal["measured", "constant", "rising"]
Budget = Literal["flops", "tokens_out", "latency"]
Read = Callable[[Any], Tensor]
"""From what the model returns to what counts of it, one row per input: [B, ...]."""


@dataclass(frozen=True)
class FittedSchedule:
    """A reducer that meets a budget: `crossget.attach(model, fitted.reducer)`.

    Attributes:
        reducer: ready to attach; a dict by tower name if a tower was named.
        tower: whose schedule was fitted.
        schedule: tokens that each block removes.
        tokens: entering each block, and behind the last one; the cross token counts.
        budget: which one was given.
        asked: its value: a share of the dense model's, or a number of tokens.
        predicted: what the found schedule should take, in the same unit: for multiply-adds by the closed form, for a
            latency by the times of the blocks.
        measured: what it does take, counted or measured in the end.
        spread: first and third quartile of what was measured; both equal `measured` where it does not vary.
        distribution: how the tokens are shared out among the blocks in what was found.
        losses: what the output loses on the inputs, by distribution: squared distance to the dense model's output over
            its squared norm. Empty if nothing was compared.
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
        """Whether the budget is kept, as far as the measurement can tell: its first quartile is not above."""
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
    read: Read | None = None,
    rounds: int = 10,
) -> FittedSchedule:
    """Find the schedule with which a model keeps a budget. The model itself is left as it was.

    Exactly one budget is given. Shares are of the dense model's whole forward, `model(*inputs)`, in eval mode, on the
    device that model and inputs are on and with the batch that the inputs are.

    Args:
        model: not attached.
        inputs: what to call it with: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. For
            the distribution, 16 to 32 examples of what the model will see, without labels.
        flops: share of the multiply-adds that `crossget.count_flops` counts, in (0, 1]. The schedule found takes at
            most that, and no block could keep one more token within it.
        tokens_out: patch tokens of an image that are left behind the last block, without class token, registers and
            cross token. Where images go into prompts, behind the block that is read: the image tokens that the
            language model gets, as `Attachment.image_tokens` counts them.
        latency: share of the time, in (0, 1].
        reducer: the method; its `r` is put in place. `CrossGET(r=0)` if None. Several: each is fitted, and that comes
            back which the output loses least by on the inputs.
        tower: whose schedule to find; None: the one that `attach` reduces when it gets one reducer.
        distribution: "constant" shares the tokens out evenly among the blocks; "rising" as `crossget.RampedRatio` does;
            "measured" as it costs the output least on the inputs, unless that is not clearly better than evenly.
        read: from what the model returns to what counts of it for "measured", a tensor [B, ...]; None: its `logits`, or
            else all that it returns.
        rounds: timed turns of dense and reduced, for a latency.

    Raises:
        TypeError: the model is not supported, or an argument is of a wrong type.
        ValueError: not exactly one budget, or one that is out of range or cannot be kept (the message names the
            nearest that can); a model that is attached; inputs on the meta device where something is to be measured.
        RuntimeError: the model's multiply-adds are no polynomial in its tokens, see `crossget.measure.cost_model.derive`.
    """
    kind, asked = _asked({"flops": flops, "tokens_out": tokens_out, "latency": latency})
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution is {distribution!r}: choose 'measured', 'constant' or 'rising'")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1 round")
    methods = _methods(reducer)
    previous = find_attachment(model)
    if previous is not None:
        raise ValueError(f"already attached: {previous}. Detach it first: a budget is a share of the dense model")
    call = as_call(inputs)
    if any(tensor.is_meta for tensor in (*call.tensors, *model.parameters())):
        if kind == "latency":
            raise ValueError(f"{kind} cannot be measured on the meta device: give flops or tokens_out there")
        if distribution == "measured" or len(methods) > 1:
            raise ValueError(
                "on the meta device nothing can be measured: set distribution='constant' or 'rising', and give one "
                "reducer"
            )
    if kind == "latency" and not call.tensors:
        raise ValueError("inputs hold no tensor: the device is read from the first one")
    fits: list[FittedSchedule] = []
    with in_eval_mode(model), torch.no_grad():
        for method in methods:
            with attach(model, method if tower is None else {tower: method}) as attachment:
                name = next(iter(attachment.towers)) if tower is None else tower
                search = _Search(Trial(model, inputs, attachment, name), read, distribution, rounds)
                found, (_, chosen, losses) = getattr(search, kind)(asked)
                schedule = PerLayer(tuple(removed(found.tokens)))
                if len(methods) > 1 and chosen not in losses:
                    losses = {**losses, chosen: float(search.lost(schedule.r).mean())}
            fitted = replace(method, r=schedule)
            fits.append(FittedSchedule(
                fitted if tower is None else {tower: fitted}, name, schedule, tuple(found.tokens), kind, asked,
                found.predicted, found.measured, found.spread, chosen, losses,
            ))  # fmt: skip
    result = fits[0] if len(fits) == 1 else min(fits, key=lambda fit: fit.losses[fit.distribution])
    if not result.met:
        warnings.warn(f"the budget was missed. {result}", stacklevel=2)
    return result


def _methods(given: Reducer | Sequence[Reducer] | None) -> list[Reducer]:
    """The methods to fit, with r = 0."""
    methods = [CrossGET(r=0)] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if not methods or not all(isinstance(method, Reducer) for method in methods):
        raise TypeError(
            f"reducer is {given!r}: give a reducer such as crossget.ToMe(r=0), whose r will be found, or several"
        )
    return [replace(method, r=0) for method in methods]


def _asked(budgets: Mapping[Budget, float | None]) -> tuple[Budget, float]:
    """The one budget that is given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one budget of {', '.join(budgets)}; got {given or 'none'}")
    ((kind, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{kind} is {value!r}: expected a number")
    if kind == "tokens_out":
        if not isinstance(value, int):
            raise TypeError(f"tokens_out is {value!r}: the number of tokens is an int")
        if value < 1:
            raise ValueError(f"tokens_out is {value}: expected at least 1")
    elif not 0 < value <= 1:
        raise ValueError(f"{kind} is {value}: expected a share of the dense model's, in (0, 1]")
    return kind, value


# Searching ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A schedule, with what it should cost and what it does cost."""

    tokens: Tokens
    predicted: float
    measured: float
    spread: tuple[float, float]


_Choice = tuple[list[int], Distribution, Mapping[str, float]]
"""Tokens, how they are shared out, and what the output lost by distribution."""


class _Search:
    """What all budgets look for a schedule with.

    Args:
        trial: the attached model.
        read: see `fit`.
        distribution: see `fit`.
        rounds: see `fit`.
    """

    def __init__(self, trial: Trial, read: Read | None, distribution: Distribution, rounds: int) -> None:
        self.trial, self.read, self.distribution, self.rounds = trial, read, distribution, rounds
        tower = trial.tower
        if not tower.reducible:
            raise ValueError(f"tower {trial.name!r} is a language model that generates: its tokens are not merged")
        depth = len(tower.blocks)
        trial.use([0] * depth)
        self.whole = self.run()
        if len(trial.entered) != depth:
            raise ValueError(f"tower {trial.name!r} did not run on these inputs: give some that reach it")
        attached = trial.attachment._towers[trial.name]
        cross = int(bool(attached.reducer.cross_token))
        reserved = self.reserved(tower.n_reserved(bool(cross)), trial.entered[0])
        # Where one token of the last block is read, nothing is merged there.
        layer, self.others = depth - 1 - int(attached.last.class_token_only), tower.prefix + cross
        if tower.prompt is not None:
            features = tower.prompt.features(as_call(trial.inputs).kwargs)
            layer, self.others = features.layer, features.dropped + cross - int(attached.keeps_cross_token)
        self.more = tower.prefix + cross - self.others  # tokens that are handed on besides patches
        self.frame = Frame(depth, trial.entered[0], reserved, layer)
        if layer < 0:
            raise ValueError(
                f"tower {trial.name!r} has one block, whose tokens nobody reads but one: nothing can be merged in it "
                "with class_token_only=True, so no budget can be kept"
            )
        if self.frame.start - reserved < 2:
            raise ValueError(
                f"tower {trial.name!r} has {self.frame.start} tokens, of which {reserved} always stay: nothing can be "
                "merged, so no budget can be kept"
            )
        # What is taken as it is, and what a measured distribution has to be better than.
        self.plain: Distribution = "rising" if distribution == "rising" else "constant"
        self.family = Rises(self.frame) if self.plain == "rising" else Family(self.frame, even(self.frame))

    def reserved(self, least: int, start: int) -> int:
        """How many tokens always stay. Among padded images, as among padded texts, one more of either kind."""
        depth = len(self.trial.tower.blocks)
        self.output([start] * depth)
        for reserved in (least, least + 2):
            if planned_tokens(PerLayer((start,) * depth), depth, start, reserved)[:-1] == self.trial.entered:
                return reserved
        raise RuntimeError(f"tower {self.trial.name!r} ran its blocks on {self.trial.entered} tokens, unlike planned")

    # By multiply-adds

    def flops(self, asked: float) -> tuple[_Found, _Choice]:
        """At most a share of the dense model's multiply-adds."""
        with self.trial.attachment.paused():
            dense = count_once(self.trial.model, self.trial.inputs).total
        costs = derive(self.trial, self.frame)
        choice = self.within(costs, asked, dense, "flops")
        blocks, rest = self.trial.count(removed(choice[0]))
        counted = sum(blocks) + rest
        if counted != costs.total(choice[0]):
            raise no_polynomial(self.trial)
        share = counted / dense
        return _Found(choice[0], share, share, (share, share)), choice

    def within(self, price: Price, asked: float, dense: float, what: Budget) -> _Choice:
        """The schedule that costs at most the share `asked` of `dense`, and is nearest to it."""
        most = asked * dense
        constant = nearest(price, self.family, most)
        if self.distribution != "measured":
            if constant is None:
                raise _impossible(what, asked, float(prices(price, self.family.tokens).min()) / dense)
            return constant, self.plain, {}
        if constant is None and allocate(self.frame, Free(), price, most) is None:
            strongest = allocate(self.frame, price, price, math.inf) or self.frame.strongest()
            least = min(prices(price, torch.tensor([strongest])).min(), prices(price, self.family.tokens).min())
            raise _impossible(what, asked, float(least) / dense)
        found = [allocate(self.frame, loss, price, most) for loss in self.losses()]
        best = [nearest(price, Family(self.frame, removed(tokens)), most) for tokens in found if tokens]
        return self.choose(constant, best)

    # By tokens

    def tokens_out(self, asked: float) -> tuple[_Found, _Choice]:
        """So many patch tokens behind the block that is read."""
        place, goal = self.frame.read + 1, int(asked) + self.others
        left = self.family.tokens[:, place]
        if not left.min() <= goal <= left.max():
            possible = left.min() if goal < left.min() else left.max()
            raise _impossible("tokens_out", asked, int(possible) - self.others)

        tokens = self.family[int((left <= goal).nonzero()[0])]
        weights, back = removed(tokens), goal - tokens[place]
        for layer in reversed(range(place)):  # a rising share may step over a number
            kept = min(back, weights[layer])
            weights[layer], back = weights[layer] - kept, back - kept
        constant = self.frame.plan(weights)
        choice: _Choice = (constant, self.plain, {})
        if self.distribution == "measured":
            found = [allocate(self.frame, loss, Free(), math.inf, goal) for loss in self.losses()]
            choice = self.choose(constant, found)
        self.output(removed(choice[0]))
        source = self.trial.attachment.source[self.trial.name][0, self.trial.tower.prefix :]
        out = float(len(set(source[source >= 0].tolist())) + self.more)
        return _Found(choice[0], asked, out, (out, out)), choice

    # By time

    def latency(self, asked: float) -> tuple[_Found, _Choice]:
        """At most a share of the dense model's time."""
        times = time_blocks(self.trial, self.frame, self.rounds)
        least = min(times.totals.values()) / times.dense
        if least >= 1:
            raise ValueError(
                f"latency={asked:g} cannot be kept: no schedule is faster than the dense model here, the best takes "
                f"{least:.2f} of its time. The time does not fall with the tokens (few tokens, a small batch, a device "
                "that waits for its launches): give a larger batch, or budget flops"
            )
        if asked < least:
            raise _impossible("latency", asked, least)
        choice = self.within(times, asked, times.dense, "latency")
        weights = removed(choice[0])
        found = self.timed(times, choice[0])
        low, high = found.spread
        if not low <= asked <= high and any(weights):  # the prediction is off: aim as much to the other side
            aim = nearest(times, Family(self.frame, weights), asked * times.dense * found.predicted / found.measured)
            again = None if aim is None else self.timed(times, aim)
            if again is not None and abs(again.measured - asked) < abs(found.measured - asked):
                found = again
        return found, choice

    def timed(self, times: Times, tokens: list[int]) -> _Found:
        """Measure a schedule against the dense model, in turns."""
        self.trial.use(removed(tokens))
        turns = {"dense": partial(calling, self.call, self.trial.attachment.paused), "fit": partial(calling, self.call)}
        seconds = take_turns(turns, self.trial.device, self.rounds, warmup=1)
        shares = tuple(fit / dense for fit, dense in zip(seconds["fit"], seconds["dense"], strict=True))
        predicted = float(prices(times, torch.tensor([tokens]))) / times.dense
        return _Found(tokens, predicted, statistics.median(shares), quartiles(shares))

    # Sharing out

    def losses(self) -> list[Loss]:
        """What each block alone costs the output, beside what a cross token costs that removes nothing.

        It is measured where half of the tokens and where a quarter of them leave, and continued in some ways.
        """
        free = self.frame.start - self.frame.reserved
        points = []
        for layer in range(self.frame.read + 1):
            of_block = []
            for r in sorted({max(1, free // 4), free // 2}):
                lost = distance(self.output([r if i == layer else 0 for i in range(self.frame.depth)]), self.whole)
                of_block.append((self.frame.start - r, float(lost.mean())))
            points.append(of_block)
        return [Loss(self.frame, points, least) for least in (1.0, 2.0, 3.0)]

    def choose(self, constant: list[int] | None, best: Sequence[list[int] | None]) -> _Choice:
        """The best of what was allocated, or evenly.

        The inputs say which, and whether that is clearly better than evenly: by more than the standard error of the
        difference.
        """
        found = [
            list(tokens)
            for tokens in dict.fromkeys(tuple(tokens) for tokens in best if tokens)
            if list(tokens) != constant
        ]
        if not found:
            return constant or [], "constant", {}
        lost = [self.lost(removed(tokens)) for tokens in found]
        chosen = min(range(len(found)), key=lambda i: float(lost[i].mean()))
        losses = {"measured": float(lost[chosen].mean())}
        if constant is None:
            return found[chosen], "measured", losses
        other = self.lost(removed(constant))
        losses["constant"] = float(other.mean())
        difference = lost[chosen] - other
        noise = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        better = float(difference.mean()) < -noise
        return (found[chosen], "measured", losses) if better else (constant, "constant", losses)

    def lost(self, r: Sequence[int]) -> Tensor:
        """[B] what a schedule costs the output, input by input."""
        if self.untouched is None:
            with self.trial.attachment.paused():
                self.untouched = self.run()
        return distance(self.output(r), self.untouched)

    untouched: Any = None

    def output(self, r: Sequence[int]) -> Any:
        """What counts of what the model returns with a schedule."""
        self.trial.use(r)
        return self.run()

    def run(self) -> Any:
        """What counts of what the model returns as it is."""
        out = self.call()
        if self.read is not None:
            return self.read(out)
        # Beside its logits, a model of transformers returns features and caches, which nobody decides by.
        logits = getattr(out, "logits", None)
        return logits if isinstance(logits, Tensor) else out

    def call(self) -> Any:
        """Call the model with its inputs."""
        given = as_call(self.trial.inputs)
        return self.trial.model(*given.args, **given.kwargs)


def _impossible(what: Budget, asked: float, possible: float) -> ValueError:
    if what == "tokens_out":
        return ValueError(f"tokens_out={asked:g} cannot be kept: the nearest possible is {possible:g}")
    shown = math.ceil(possible * 1e4) / 1e4
    if shown >= 1:
        return ValueError(
            f"{what}={asked:g} cannot be kept: even the cheapest schedule takes {shown:g} of what dense takes. "
            "Here the matching costs more than fewer tokens save"
        )
    return ValueError(
        f"{what}={asked:g} cannot be kept: the nearest possible is {shown:g}. A block gives up half of its tokens at "
        "most, and what is not in the blocks stays"
    )


def distance(output: Any, dense: Any) -> Tensor:
    """[B] squared distance of two outputs over the squared norm of the second, row by row, averaged over their tensors.

    Of tensors with fewer tokens than the dense model's [B, T, ...] the last ones are compared.

    Raises:
        ValueError: nothing in them can be compared.
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
            "[B, ...] among it. Give read=, a function that takes one out of it, or distribution='constant'"
        )
    return torch.stack(found).mean(0)
