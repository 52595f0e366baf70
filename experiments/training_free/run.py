"""Measure every row at every budget.

ToMe removes the whole number of tokens per block that brings it nearest to a budget; every other row is fitted to
ToMe's multiply-adds from below, as far as its tokens allow.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import crossget
from crossget.measure.allocation import ScheduleSpace
from crossget.measure.cost_model import FlopModel, ScheduledModel, derive
from crossget.measure.flops import count_once
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import planned_tokens
from experiments.ablation.run import described, measure, predict
from experiments.ablation.settings import Images, Measuring
from experiments.lib.files import Json, check_names
from experiments.lib.study import Study
from experiments.training_free.presets import BUDGETS, PRESETS

RESULTS = Path(__file__).parent / "results"
HALVINGS = 16
"""How often the range of a fitted strength is halved."""
HALVES = {"choose": 0, "confirm": 1}
"""Which images: every second one of the sorted list, from here on. The parts were chosen with the even ones alone."""


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row at a budget."""

    setting: str
    preset: str
    budget: int
    half: str

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.setting}/{self.half}/{self.preset}" + ("" if self.preset == "dense" else f"_{self.budget}")


@dataclass(frozen=True)
class Options(Measuring):
    """What to measure, and on which images."""

    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    budgets: tuple[int, ...] = BUDGETS
    """Multiply-adds, in % of the dense model's."""
    half: Literal["choose", "confirm"] = "confirm"
    """Every second image: the even ones were chosen with, the odd ones confirm."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, PRESETS)
    return [
        Run(options.setting, name, budget, options.half)
        for name in options.presets
        for budget in (options.budgets if name != "dense" else (100,))
    ]


class Meter:
    """Multiply-adds of a model, by each method's closed form: many schedules are tried.

    Args:
        model: untouched.
        image: [1, 3, H, W].
    """

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        self.model, self.image = model, image
        (self.tower,) = crossget.find_towers(model)
        self.depth = len(self.tower.blocks)
        with crossget.attach(model, crossget.ToMe(0)) as attached, torch.no_grad():
            model(image)
            self.tokens = attached.tokens[self.tower.name][0]
        self.dense = count_once(model, image).total
        self.known: dict[Reducer, FlopModel] = {}

    def costs(self, reducer: Reducer) -> FlopModel:
        """Return what every schedule of a method costs."""
        method = replace(reducer, r=0)
        if method not in self.known:
            cross = bool(method.resolved(self.tower.facts).cross_token)
            space = ScheduleSpace(self.depth, self.tokens + cross, self.tower.n_reserved(cross), self.depth - 1)
            with crossget.attach(self.model, method) as attached, torch.no_grad():
                self.known[method] = derive(ScheduledModel(self.model, self.image, attached, self.tower.name), space)
        return self.known[method]

    def removed(self, reducer: Reducer) -> list[int]:
        """Return how many tokens each block removes."""
        space = self.costs(reducer).space
        plan = planned_tokens(reducer.schedule, space.depth, space.n_tokens, space.n_reserved)
        return [n - left for n, left in itertools.pairwise(plan)]

    def gflops(self, reducer: Reducer) -> Json:
        """Return multiply-adds of one image / 10^9, `dense` and `reduced`."""
        costs = self.costs(reducer)
        return {"dense": self.dense / 1e9, "reduced": costs.total(costs.space.tokens(self.removed(reducer))) / 1e9}

    def share(self, reducer: Reducer) -> float:
        """Return what is left of the multiply-adds."""
        gflops = self.gflops(reducer)
        return float(gflops["reduced"] / gflops["dense"])

    def nearest(self, budget: float) -> crossget.ToMe:
        """Return ToMe with the r whose share is nearest to `budget`."""
        weak, strong = 0, self.tokens // 2
        while strong - weak > 1:
            middle = (weak + strong) // 2
            weak, strong = (middle, strong) if self.share(crossget.ToMe(middle)) > budget else (weak, middle)
        return min((crossget.ToMe(weak), crossget.ToMe(strong)), key=lambda reducer: abs(self.share(reducer) - budget))

    def fit(self, make: Callable[[float], Reducer], strongest: float, most: float) -> Reducer:
        """Return the weakest reducer whose share is not above `most`, with what is left of that given back.

        From the last block to the first each gets back as many tokens as `most` allows: of a small model a single one
        is a percent, and methods are to be compared at equal cost.

        Args:
            make: strength -> reducer; the stronger, the fewer multiply-adds.
            strongest: where the search ends.
            most: share of the dense model's multiply-adds.

        Raises:
            ValueError: the strongest one is above it.
        """
        if self.share(make(strongest)) > most:
            raise ValueError(f"{make(strongest)} leaves more than {100 * most:.1f} % of the multiply-adds")
        weak, strong = 0.0, strongest
        for _ in range(HALVINGS):
            middle = (weak + strong) / 2
            weak, strong = (middle, strong) if self.share(make(middle)) > most else (weak, middle)
        found = make(strong)
        r = self.removed(found)
        for layer in reversed(range(self.depth)):
            while r[layer]:
                one_less, none = ([*r[:layer], count, *r[layer + 1 :]] for count in (r[layer] - 1, 0))
                fitting = [less for less in (none, one_less) if self.share(replace(found, r=tuple(less))) <= most]
                if not fitting:
                    break
                r = fitting[0]
        return replace(found, r=tuple(r))


def reducer_of(run: Run, meter: Meter, fitted: dict[tuple[str, int], Reducer]) -> Reducer | None:
    """Return the run's reducer; what was fitted to a budget is kept in `fitted`."""
    preset = PRESETS[run.preset]
    if preset.method is None:
        return None
    key = (preset.like or run.preset, run.budget)
    target = ("tome", run.budget)
    if target not in fitted:
        fitted[target] = meter.nearest(run.budget / 100)
    if key not in fitted:
        row = PRESETS[key[0]]
        strongest = row.strongest if row.strongest is not None else meter.tokens / 2
        fitted[key] = meter.fit(
            lambda strength: row.make(strength, meter.depth), strongest, meter.share(fitted[target])
        )
    return replace(preset.method, r=fitted[key].r)


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that fits and measures one run."""
    model, images = options.load()
    half = slice(HALVES[options.half], None, 2)
    images = Images(images.pixels[half], images.labels[half], {**images.source, "half": options.half})
    dense = predict(model, images.pixels, options.batch, options.device)
    given = options.given(images)
    meter, fitted = Meter(model, images.pixels[:1].to(options.device)), dict[tuple[str, int], Reducer]()

    def measured(run: Run) -> Json:
        reducer = reducer_of(run, meter, fitted)
        config = {**asdict(run), "reducer": described(reducer), **given}
        # The tokens of a model without a reducer are those of a reducer that removes none.
        attached = reducer or crossget.ToMe(0)
        with crossget.attach(model, attached) as attachment:
            logits = predict(model, images.pixels, options.batch, options.device)
            ((tower, tokens),) = attachment.tokens.items()
            resolved = asdict(attachment.reducers[tower])
        found = measure(logits if reducer else dense, images.labels, dense)
        return {
            "run": config,
            "result": {**found, "resolved": resolved, "tokens": tokens, "gflops": meter.gflops(attached)},
        }

    return measured


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    budgets = {} if run.preset == "dense" else {"budgets": (run.budget,)}
    return {"presets": (run.preset,), "half": run.half, **budgets}


STUDY = Study("training-free", Options, grid, load, select)
