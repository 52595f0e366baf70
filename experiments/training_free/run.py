"""Measure every row at every budget: `python -m experiments.training_free.run --help`.

ToMe removes the whole number of tokens per block that brings it nearest to a budget; every other row is fitted to
ToMe's multiply-adds from below, as far as its tokens allow. All images are measured; which half chooses and which
confirms is the report's business.
"""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import crossget
from crossget.reducers import Reducer
from crossget.schedule import planned_tokens
from experiments import common
from experiments.ablation.run import evaluate, predict
from experiments.ablation.settings import SETTINGS, load_images, load_model
from experiments.training_free.presets import BUDGETS, PRESETS

RESULTS = Path(__file__).parent / "results"
STEPS, NEAR = 5, 0.003
"""How often a schedule is counted while it is fitted, at most, and the share below the goal that is near enough."""


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row at a budget."""

    setting: str
    preset: str
    budget: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.setting}/{self.preset}" + ("" if self.preset == "dense" else f"_{self.budget}")


@dataclass(frozen=True)
class Options:
    """What to measure, and on which images."""

    setting: Literal["imagenet", "cifar10"]
    """Model and preprocessing."""
    data: Path
    """Folder with labels.csv (file,label), or with one folder of images per class."""
    weights: Path | None = None
    """Safetensors file with the model's parameters; without it timm's are downloaded."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    budgets: tuple[int, ...] = BUDGETS
    """Multiply-adds, in % of the dense model's."""
    batch: int = 50
    """Images per forward."""
    limit: int | None = None
    """Take this many images only."""
    device: str = "cpu"
    """Where the model runs."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def queue(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist.
    """
    common.check_names("presets", options.presets, PRESETS)
    return [
        Run(options.setting, name, budget)
        for name in options.presets
        for budget in (options.budgets if name != "dense" else (100,))
    ]


class Meter:
    """Multiply-adds of a model, as a share of the dense model's.

    Args:
        model: untouched.
        image: [1, 3, H, W].
    """

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        self.model, self.image = model, image
        (tower,) = crossget.find_towers(self.model)
        self.depth = len(tower.blocks)
        with crossget.attach(self.model, crossget.ToMe(0)) as attached, torch.no_grad():
            self.model(self.image)
            self.tokens = attached.tokens[tower.name][0]
        self.known: dict[Reducer, float] = {}

    def share(self, reducer: Reducer) -> float:
        """Return what is left of the multiply-adds."""
        if reducer not in self.known:
            with crossget.attach(self.model, reducer):
                flops = crossget.count_flops(self.model, self.image)
            self.known[reducer] = flops.total / flops.dense.total
        return self.known[reducer]

    def nearest(self, budget: float) -> crossget.ToMe:
        """Return ToMe with the r whose share is nearest to `budget`."""
        low, high = 0, self.tokens // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.share(crossget.ToMe(middle)) > budget else (low, middle)
        return min(crossget.ToMe(low), crossget.ToMe(high), key=lambda reducer: abs(self.share(reducer) - budget))

    def fit(self, make: Callable[[float], Reducer], strongest: float, most: float) -> Reducer:
        """Return the weakest reducer whose share is not above `most`.

        The share nearly grows with the sum of tokens over blocks, which costs nothing to know: so it is counted only
        where the straight line between two that were counted leads.

        Args:
            make: strength -> reducer; the stronger, the fewer multiply-adds.
            strongest: where the search ends.
            most: share of the dense model's multiply-adds.

        Raises:
            ValueError: the strongest one is above it.
        """
        weak, strong = 0.0, strongest
        if self.share(make(strong)) > most:
            raise ValueError(f"{make(strong)} leaves more than {100 * most:.1f} % of the multiply-adds")
        for _ in range(STEPS):
            if self.share(make(strong)) > most - NEAR:
                break
            above, below = self.share(make(weak)), self.share(make(strong))
            part = (above - most) / (above - below)
            sums = self.sum_of(make(weak)), self.sum_of(make(strong))
            wish, low, high = round(sums[0] + part * (sums[1] - sums[0])), weak, strong
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if self.sum_of(make(middle)) > wish else (low, middle)
            if self.sum_of(make(high)) in sums:  # nothing is left between the two
                high = (weak + strong) / 2
            weak, strong = (high, strong) if self.share(make(high)) > most else (weak, high)
        return make(strong)

    def sum_of(self, reducer: Reducer) -> int:
        """Return the tokens that enter blocks, added up over the blocks."""
        return sum(planned_tokens(reducer.schedule, self.depth, self.tokens, 1))


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


def command_of(options: Options) -> Callable[[Run], str]:
    """Return the function that writes the command which repeats one run; of paths it keeps the name only."""

    def command(run: Run) -> str:
        words = ["python", "-m", "experiments.training_free.run", "--setting", run.setting]
        words += ["--data", options.data.name]
        words += ["--weights", options.weights.name] if options.weights else []
        words += ["--limit", str(options.limit)] if options.limit else []
        words += ["--presets", run.preset, "--batch", str(options.batch)]
        words += [] if run.preset == "dense" else ["--budgets", str(run.budget)]
        return shlex.join(words)

    return command


def main(options: Options) -> int:
    """Work off the queue and return the number of runs executed."""
    runs = queue(options)
    if not common.pending(runs, options.results, options.overwrite):
        return 0
    setting = SETTINGS[options.setting]
    model = load_model(setting, options.weights).to(options.device)
    images = load_images(setting, options.data, options.limit)
    dense = predict(model, images.pixels, options.batch, options.device)
    weights = {"file": options.weights.name, "sha256": common.file_digest(options.weights)} if options.weights else None
    meter, fitted = Meter(model, images.pixels[:1].to(options.device)), dict[tuple[str, int], Reducer]()

    def execute(run: Run) -> common.Json:
        reducer = reducer_of(run, meter, fitted)
        method = None if reducer is None else {"name": type(reducer).__name__, **asdict(reducer)}
        config = {**asdict(run), "reducer": method, "weights": weights, "data": images.source, "batch": options.batch}
        return {"run": config, "result": evaluate(model, images, reducer, dense, options.batch, options.device)}

    return common.work_off(
        runs,
        options.results,
        execute,
        command=command_of(options),
        environment=common.environment(options.device),
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    import tyro

    done = main(tyro.cli(Options, description=__doc__))
    print(f"{done} runs executed")
