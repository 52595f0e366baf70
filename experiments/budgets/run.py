"""Fit a model to budgets on a few images, and measure on others."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import crossget
from crossget.measure.fit import FittedSchedule
from crossget.methods.reducers import Reducer
from experiments.ablation.run import measure, predict
from experiments.ablation.settings import Images, Measuring
from experiments.lib.files import Json, check_names
from experiments.lib.study import Study

RESULTS = Path(__file__).parent / "results"

METHODS: dict[str, Reducer] = {"crossget": crossget.CrossGET(r=0), "tome": crossget.ToMe(r=0)}
SHARES = (0.8, 0.69, 0.58, 0.5)
DISTRIBUTIONS: tuple[Literal["measured", "constant"], ...] = ("measured", "constant")


@dataclass(frozen=True)
class Run:
    """A method at a budget of multiply-adds, or of time, which have no accuracy measured."""

    setting: str
    method: str
    budget: str
    share: float

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.setting}/{self.method}_{self.budget}_{100 * self.share:.0f}"


@dataclass(frozen=True)
class Options(Measuring):
    """What to measure, and on which images."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Which reducers."""
    shares: tuple[float, ...] = SHARES
    """Budgets of multiply-adds, as shares of the dense model's."""
    latencies: tuple[float, ...] = (0.8, 0.6)
    """Budgets of time."""
    fitted_on: int = 32
    """Images to fit on, spread evenly over the list; they are not measured on."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("methods", options.methods, METHODS)
    budgets = {"flops": options.shares, "latency": options.latencies}
    return [
        Run(options.setting, method, budget, share)
        for budget, shares in budgets.items()
        for method in options.methods
        for share in shares
        if budget == "flops" or method == options.methods[0]
    ]


def split(images: Images, fitted_on: int) -> tuple[Tensor, Images]:
    """Return the images to fit on, and the others."""
    n = len(images.labels)
    chosen = torch.tensor([i * n // fitted_on for i in range(fitted_on)])
    others = torch.ones(n, dtype=torch.bool).index_fill(0, chosen, False)
    return images.pixels[chosen], Images(images.pixels[others], images.labels[others], images.source)


def described(fitted: FittedSchedule, seconds: float) -> Json:
    """Return a fit for a result file."""
    entries = {**asdict(replace(fitted, reducer=crossget.ToMe(r=0))), "schedule": list(fitted.schedule.r)}
    return {**{name: value for name, value in entries.items() if name != "reducer"}, "seconds": round(seconds, 2)}


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that fits and measures one run."""
    model, images = options.load()
    seen, images = split(images, options.fitted_on)
    seen = seen.to(options.device)
    dense = predict(model, images.pixels, options.batch, options.device)
    given = options.given(images)

    def measured(run: Run) -> Json:
        config = {
            **asdict(run), **given, "fitted_on": options.fitted_on, "measured_on": len(images.labels),
        }  # fmt: skip
        made: dict[str, Json] = {}
        for distribution in DISTRIBUTIONS:
            start = time.perf_counter()
            budget: dict[str, Any] = {run.budget: run.share}
            try:
                fitted = crossget.fit_schedule(
                    model, seen, reducer=METHODS[run.method], distribution=distribution, **budget
                )
            except ValueError as refusal:  # what cannot be kept is a result, too
                made[distribution] = {"refused": str(refusal)}
                continue
            made[distribution] = {"fit": described(fitted, time.perf_counter() - start)}
            if run.budget == "flops":
                with crossget.attach(model, fitted.reducer):
                    logits = predict(model, images.pixels, options.batch, options.device)
                made[distribution]["accuracy"] = measure(logits, images.labels, dense)
        if run.budget == "flops":
            made["dense"] = {"accuracy": measure(dense, images.labels, dense)}
        return {"run": config, "result": made}

    return measured


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    budgets = {"shares": "flops", "latencies": "latency"}
    chosen = {option: (run.share,) if run.budget == budget else () for option, budget in budgets.items()}
    return {"methods": (run.method,), **chosen}


STUDY = Study("budgets", Options, grid, load, select)
