"""Time a published CLIP's image tower, dense and reduced, with the schedules of `real-zero-shot`.

All methods at one budget of multiply-adds take turns in one run. The schedules depend on shapes alone, and so does the
speed; the photographs and weights are those whose accuracy stands beside it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import crossget
from experiments.ablation.run import cost, described
from experiments.ablation.settings import load_images, load_model
from experiments.lib.files import Json, check_names, file_digest
from experiments.lib.study import Study
from experiments.real.clip import Clip, Photographs, setting_of
from experiments.real.presets import ROWS, fit


@dataclass(frozen=True)
class Run:
    """The methods at one budget, on one batch of photographs."""

    task: str
    budget: int
    images: int
    rounds: int
    presets: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.budget}_batch{self.images}"


@dataclass(frozen=True, kw_only=True)
class Options(Clip, Photographs):
    """What to time, and with what."""

    presets: tuple[str, ...] = ("tome", "crossget", "ward")
    """Rows to time, beside the dense model."""
    budgets: tuple[int, ...] = (69, 50)
    """Multiply-adds, in % of the dense model's."""
    images: int = 8
    """Photographs per forward."""
    rounds: int = 11
    """Timed turns of each method."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist, or is the dense model.
    """
    check_names("presets", options.presets, [name for name, row in ROWS.items() if row.method is not None])
    return [Run("speed", budget, options.images, options.rounds, options.presets) for budget in options.budgets]


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that fits and times one run."""
    setting = setting_of(options.model, 1 << 30)
    tower = load_model(setting, options.weights).to(options.device)
    photographs = load_images(setting, options.data, options.images)
    pixels = photographs.pixels.to(options.device)
    weights = options.weights
    given = {
        "model": options.model, "data": photographs.source,
        "weights": {"file": weights.name, "sha256": file_digest(weights)} if weights else None,
    }  # fmt: skip

    def measured(run: Run) -> Json:
        fitted = {name: fit(tower, pixels[:1], ROWS[name], run.budget) for name in run.presets}
        report = crossget.benchmark(tower, pixels, rounds=run.rounds, methods=fitted)
        promised = {"dense": 1.0}
        for name, reducer in fitted.items():
            with crossget.attach(tower, reducer) as attached:
                counted = cost(tower, attached, pixels[:1])["gflops"]
            promised[name] = counted["dense"] / counted["reduced"]
        rows = [
            {
                "method": timed.name,
                "seconds": round(timed.median_seconds, 6),
                "speed": round(timed.median_speed, 4),
                "quartiles": [round(value, 4) for value in timed.speed_quartiles],
                "promised": round(promised[timed.name], 4),
                "rounds": [round(seconds, 6) for seconds in timed.seconds],
            }
            for timed in report.measurements
        ]
        reducers = {name: described(reducer) for name, reducer in fitted.items()}
        return {"run": {**asdict(run), **given, "reducers": reducers}, "result": {"rows": rows}}

    return measured


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    return {"presets": run.presets, "budgets": (run.budget,), "images": run.images, "rounds": run.rounds}


STUDY = Study("real-speed", Options, grid, load, select)
