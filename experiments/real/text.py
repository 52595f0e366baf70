"""Classify photographs while merging knows a text: that of the true class, of a wrong one, or of the predicted one.

`importance="text"` keeps patches that are near to a text. With the true class's text it has an advantage that no user
has (an oracle). With a wrong class's text it shows what any such importance gives. With the class that a first pass
predicts it is what a user can do, for the multiply-adds of two passes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget import CrossGET
from crossget.methods.reducers import Reducer
from experiments.ablation.run import cost, described
from experiments.lib.files import Json, check_names, pack
from experiments.lib.study import Study
from experiments.real.clip import RESULTS, SCALE, Measuring, classified, encode
from experiments.real.presets import ROWS, Row, fit

Target = Literal["none", "true", "wrong", "predicted"]
TARGETS: tuple[Target, ...] = ("none", "true", "wrong", "predicted")
METHODS: dict[str, Row] = {
    "crossget": Row("CrossGET without cross token", CrossGET(0, cross_token=False)),
    "ward": ROWS["ward_reading"],
}
"""The methods while they know no text. With one they remove the same numbers of tokens."""


@dataclass(frozen=True)
class Run:
    """A method at a budget, knowing one kind of text."""

    task: str
    preset: str
    target: str
    budget: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.preset}_{self.target}_{self.budget}"


@dataclass(frozen=True)
class Options(Measuring):
    """What to measure, and with what."""

    presets: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    targets: tuple[Target, ...] = TARGETS
    """Which text merging knows."""
    budgets: tuple[int, ...] = (50, 69)
    """Multiply-adds without a text, in % of the dense model's."""
    half: Literal["odd", "even"] = "odd"
    """Every second photograph of the sorted list."""
    limit: int | None = None
    """So many of that half only, evenly spread."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("presets", options.presets, METHODS)
    return [
        Run("text", name, target, budget)
        for budget in options.budgets
        for name in options.presets
        for target in options.targets
    ]


@torch.no_grad()
def encode_with(
    tower: nn.Module, attached: crossget.Attachment, pixels: Tensor, known: Tensor, batch: int, device: str
) -> Tensor:
    """Return the features [N, E] of all images, each merged while its own text [N, E] is known."""
    parts = []
    for images, texts in zip(pixels.split(batch), known.split(batch), strict=True):
        attached.set_text_features(texts.to(device))
        parts.append(tower(images.to(device)).float().cpu())
    return F.normalize(torch.cat(parts), dim=-1)


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    loaded = options.load().part(options.half, options.limit)
    tower, pixels, labels = loaded.tower, loaded.images.pixels, loaded.images.labels
    texts, one = next(iter(loaded.texts.values())), pixels[:1].to(options.device)
    dense = encode(tower, pixels, options.batch, options.device)
    given = options.given(loaded)

    @cache
    def first_pass(name: str, budget: int) -> tuple[Reducer, Tensor, Json]:
        """The method fitted to a budget without a text, its features and its cost."""
        reducer = fit(tower, one, METHODS[name], budget)
        with crossget.attach(tower, reducer) as attached:
            return reducer, encode(tower, pixels, options.batch, options.device), cost(tower, attached, one)

    def measured(run: Run) -> Json:
        reducer, features, spent = first_pass(run.preset, run.budget)
        if run.target != "none":
            reducer = replace(reducer, importance="text")  # type: ignore[call-arg]  # a field of both methods
            classes = {
                "true": labels,
                "wrong": (labels + len(texts) // 2) % len(texts),
                "predicted": (features @ texts.T).argmax(1),
            }[run.target]
            with crossget.attach(tower, reducer) as attached:
                features = encode_with(tower, attached, pixels, texts[classes], options.batch, options.device)
                attached.set_text_features(texts[0].to(options.device))
                spent = cost(tower, attached, one)
        losses = F.cross_entropy(SCALE * features @ texts.T, labels, reduction="none").double()
        config = {**asdict(run), "half": options.half, "n": len(labels), "reducer": described(reducer), **given}
        result = {**classified(features, dense, loaded), "loss": float(losses.mean()), "losses": pack(losses.numpy())}
        return {"run": config, "result": {**result, **spent}}

    return measured


STUDY = Study(
    "real-text", Options, grid, load,
    lambda run: {"presets": (run.preset,), "targets": (run.target,), "budgets": (run.budget,)},
)  # fmt: skip
