"""`crossget.fit_schedule` on published models: is a budget kept, and which distribution is nearest to the dense model?

Schedules are fitted on some of the even photographs and measured on some of the odd ones. Budgets are multiply-adds,
predicted and counted, or time, predicted and measured. The distance is that of `fit_schedule`: squared, of the model's
output, over the squared norm of the dense model's.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import crossget
from crossget.measure.fit import distance
from crossget.methods.reducers import Reducer
from experiments.ablation.run import cost, described
from experiments.ablation.settings import load_images, load_model
from experiments.lib.files import Json, check_names, file_digest, pack
from experiments.lib.study import Study
from experiments.real.clip import HALVES, Clip, Photographs, evenly, setting_of
from experiments.real.presets import ROWS
from experiments.real.saliency import load_backbone, square

TowerName = Literal["clip", "dinov2"]
METHODS = ("tome", "ward")
Distribution = Literal["constant", "ramped", "measured"]


@dataclass(frozen=True)
class Run:
    """A method fitted to a budget, its tokens shared out in one way."""

    task: str
    tower: str
    preset: str
    distribution: Distribution
    budget: str
    share: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.tower}/{self.preset}_{self.distribution}_{self.budget}_{self.share}"


@dataclass(frozen=True, kw_only=True)
class Options(Clip, Photographs):
    """What to measure, and with what."""

    backbone: Path | None = None
    """Safetensors file of a transformers Dinov2Model's parameters; the other model needs none."""
    config: Path | None = None
    """JSON file with what of the Dinov2Config differs from a ViT-S/14 for 518 pixels."""
    towers: tuple[TowerName, ...] = ("clip", "dinov2")
    """Models to fit."""
    presets: tuple[str, ...] = METHODS
    """Methods to fit."""
    distributions: tuple[Distribution, ...] = ("constant", "ramped", "measured")
    """How tokens are shared out, for budgets of multiply-adds; a method's own one for budgets of time."""
    flops: tuple[int, ...] = (58,)
    """Budgets of multiply-adds, in % of the dense model's."""
    latencies: tuple[int, ...] = (80, 60)
    """Budgets of time, likewise."""
    fitted_on: int = 16
    """Photographs to fit on; a budget of time is that of a batch of so many."""
    measured_on: int = 50
    """Photographs to measure on."""
    batch: int = 25
    """Images per forward when measuring."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for, those of time last.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("presets", options.presets, METHODS)
    by_flops = [
        Run("budgets", tower, name, distribution, "flops", share)
        for share in options.flops
        for tower in options.towers
        for name in options.presets
        for distribution in options.distributions
    ]
    by_time = [
        Run("budgets", tower, name, ROWS[name].distribution, "latency", share)
        for tower in options.towers
        for name in options.presets
        for share in options.latencies
    ]
    return by_flops + by_time


@dataclass(frozen=True)
class Fitting:
    """A model with its photographs.

    Attributes:
        model: what is called.
        output: what is compared of what it returns.
        seen: [N, 3, H, W] to fit on.
        others: [M, 3, H, W] to measure on.
        given: what a result file says of them.
    """

    model: nn.Module
    output: Callable[[Any], Tensor]
    seen: Tensor
    others: Tensor
    given: Json

    @torch.no_grad()
    def outputs(self, batch: int) -> Tensor:
        """Return what is compared, of all photographs to measure on."""
        device = self.seen.device
        return torch.cat([self.output(self.model(part.to(device))).cpu() for part in self.others.split(batch)])


def load_fitting(options: Options, tower: str) -> Fitting:
    """Return a model and its photographs.

    Raises:
        ValueError: the DINOv2 is asked for, and no weights of it are given.
    """
    output: Callable[[Any], Tensor]
    if tower == "clip":
        setting, file = setting_of(options.model, 1 << 30), options.weights
        model, title, output = load_model(setting, file), options.model, _itself
    elif options.backbone is None:
        raise ValueError("--towers dinov2 needs --backbone: the parameters of a transformers Dinov2Model")
    else:
        setting, file = square(), options.backbone
        model, title, output = load_backbone(file, options.config), "DINOv2 ViT-S/14", _all_tokens
    images = load_images(setting, options.data)
    seen, others = (
        images.pixels[evenly(range(HALVES[half], len(images.labels), 2), count)]
        for half, count in (("even", options.fitted_on), ("odd", options.measured_on))
    )
    given = {
        "model": title, "weights": None if file is None else {"file": file.name, "sha256": file_digest(file)},
        "data": images.source, "fitted_on": len(seen), "measured_on": len(others),
    }  # fmt: skip
    return Fitting(model.to(options.device), output, seen.to(options.device), others, given)


def _itself(features: Tensor) -> Tensor:
    return features


def _all_tokens(out: Any) -> Tensor:
    tokens: Tensor = out.last_hidden_state
    return tokens


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that fits and measures one run."""

    @cache
    def fitting(tower: str) -> tuple[Fitting, Tensor]:
        loaded = load_fitting(options, tower)
        return loaded, loaded.outputs(options.batch)

    def measured(run: Run) -> Json:
        loaded, dense = fitting(run.tower)
        method = ROWS[run.preset].method
        budget: dict[str, Any] = {run.budget: run.share / 100}
        config: Json = {**asdict(run), **loaded.given}
        start = time.perf_counter()
        try:
            fitted = crossget.fit_schedule(
                loaded.model, loaded.seen, reducer=method, distribution=run.distribution, output=loaded.output, **budget
            )
        except ValueError as refusal:  # what cannot be kept is a result, too
            return {"run": config, "result": {"refused": str(refusal)}}
        seconds = time.perf_counter() - start
        assert isinstance(fitted.reducer, Reducer)
        with crossget.attach(loaded.model, fitted.reducer) as attached:
            spent = cost(loaded.model, attached, loaded.seen[:1])
            distances = distance(loaded.outputs(options.batch), dense)
        result = {
            "asked": fitted.asked, "predicted": fitted.predicted, "measured": fitted.measured,
            "spread": list(fitted.spread), "used": fitted.distribution, "fit_seconds": round(seconds, 2),
            "distance": round(float(distances.mean()), 6), "distances": pack(distances.numpy()), **spent,
        }  # fmt: skip
        return {"run": {**config, "reducer": described(fitted.reducer)}, "result": result}

    return measured


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    budgets = {"flops": (run.share,), "latencies": ()} if run.budget == "flops" else {"latencies": (run.share,)}
    return {
        "towers": (run.tower,), "presets": (run.preset,), "distributions": (run.distribution,), "flops": (), **budgets,
    }  # fmt: skip


STUDY = Study("real-budgets", Options, grid, load, select)
