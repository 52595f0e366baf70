"""Classify photographs by the nearest text, with a CLIP whose image tower is reduced and not trained.

Every row is fitted to the same multiply-adds by `crossget.fit_schedule`, as near as whole tokens allow, and never above
them. Nothing is chosen on photographs: one of them gives the shapes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor

import crossget
from crossget.methods.reducers import Reducer
from experiments.ablation.run import cost, described
from experiments.lib.files import Json, check_names
from experiments.lib.study import Study
from experiments.real.clip import Loaded, Measuring, classified, encode
from experiments.real.presets import BUDGETS, ROWS, fit


@dataclass(frozen=True)
class Run:
    """One row at one budget, on one half of the photographs."""

    task: str
    half: str
    preset: str
    budget: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.half}/{self.preset}" + ("" if self.preset == "dense" else f"_{self.budget}")


@dataclass(frozen=True, kw_only=True)
class Options(Measuring):
    """What to measure, and with what."""

    presets: tuple[str, ...] = tuple(ROWS)
    """Rows to run."""
    budgets: tuple[int, ...] = BUDGETS
    """Multiply-adds, in % of the dense model's."""
    halves: tuple[Literal["odd", "even"], ...] = ("odd", "even")
    """Every second photograph of the sorted list."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for; a program that is stopped has all rows at the first budgets.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, ROWS)
    runs = [
        Run("zero-shot", half, name, 100 if name == "dense" else budget)
        for half in options.halves
        for budget in options.budgets
        for name in options.presets
    ]
    return list(dict.fromkeys(runs))


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that fits and measures one run."""
    everything = options.load()
    tower, one = everything.tower, everything.images.pixels[:1].to(options.device)
    given = options.given(everything)

    @cache
    def half(name: str) -> tuple[Loaded, Tensor]:
        loaded = everything.part(name)
        return loaded, encode(tower, loaded.images.pixels, options.batch, options.device)

    @cache
    def fitted(preset: str, budget: int) -> tuple[Reducer | None, Json]:
        """The reducer of a row, and what it costs."""
        row = ROWS[preset]
        if row.method is None:
            return None, cost(tower, None, one)
        reducer = fit(tower, one, row, budget)
        with crossget.attach(tower, reducer) as attached:
            return reducer, cost(tower, attached, one)

    def measured(run: Run) -> Json:
        (loaded, dense), (reducer, spent) = half(run.half), fitted(run.preset, run.budget)
        features = dense
        if reducer is not None:
            with crossget.attach(tower, reducer):
                features = encode(tower, loaded.images.pixels, options.batch, options.device)
        config = {**asdict(run), "reducer": described(reducer), **given}
        return {"run": config, "result": {**classified(features, dense, loaded), **spent}}

    return measured


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    return {
        "presets": (run.preset,),
        "halves": (run.half,),
        **({} if run.preset == "dense" else {"budgets": (run.budget,)}),
    }


STUDY = Study("real-zero-shot", Options, grid, load, select)
