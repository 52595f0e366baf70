"""Patch features brought back to the full grid, against the dense model's.

Segmentation, detection and dense matching read a feature at every patch. A reduced tower gives each patch the feature
of the token that it went into; this measures what is left of the dense model's, patch by patch.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import crossget
from experiments.ablation.presets import PRESETS, Preset
from experiments.ablation.run import cost, described
from experiments.ablation.settings import Measuring
from experiments.lib.files import Json, check_names, pack
from experiments.lib.study import Study

RESULTS = Path(__file__).parent / "results"
BASE = "tome"
METHODS = (BASE, "complete_graph", "guided_ensemble", "crossget", "ward")
# The rows of the ablation, and the method for models that are not trained on, with the same number in every block.
ROWS = {**PRESETS, "ward": Preset("Ward", lambda r, seed: crossget.Ward(r, class_token_only=False))}


@dataclass(frozen=True)
class Run:
    """One method at one r."""

    setting: str
    method: str
    r: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.setting}/{self.method}_r{self.r}"


@dataclass(frozen=True)
class Options(Measuring):
    """What to measure, and on which images."""

    methods: tuple[str, ...] = METHODS
    """Rows, by their names in experiments/ablation/presets.py."""
    r: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Tokens removed per block."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


@torch.no_grad()
def patch_features(model: Any, pixels: Tensor, batch: int, device: str) -> Tensor:
    """[N, patches, C] what the tower gives for every patch, behind its last norm."""
    prefix = model.num_prefix_tokens
    return torch.cat(
        [model.forward_features(part.to(device))[:, prefix:].float().cpu() for part in pixels.split(batch)]
    )


def agreement(features: Tensor, dense: Tensor) -> Json:
    """How near features [N, P, C] are to the dense model's.

    Returns:
        `cosine`: mean over patches and images. `within`: % of patches whose feature is nearest, of all patches of its
        image in the dense model, to that of its own place. Both image by image as well, packed.
    """
    unit, reference = F.normalize(features, dim=-1), F.normalize(dense, dim=-1)
    cosines = (unit * reference).sum(-1).mean(1)
    places = torch.arange(dense.shape[1])
    within = torch.stack(
        [((one @ other.T).argmax(1) == places).double().mean() for one, other in zip(unit, reference, strict=True)]
    )
    return {
        "cosine": round(float(cosines.mean()), 6),
        "within": round(100 * float(within.mean()), 4),
        "n": len(dense),
        "cosines": pack(cosines.double().numpy()),
        "withins": pack(within.numpy()),
    }


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("methods", options.methods, ROWS)
    return [Run(options.setting, method, r) for method in options.methods for r in options.r]


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    model, images = options.load()
    dense = patch_features(model, images.pixels, options.batch, options.device)
    given = options.given(images)

    def measured(run: Run) -> Json:
        reducer = ROWS[run.method].make(run.r, 0)
        assert reducer is not None
        with crossget.attach(model, reducer) as attached:
            features = patch_features(model, images.pixels, options.batch, options.device)
            spent = cost(model, attached, images.pixels[:1].to(options.device))
        config = {**asdict(run), "reducer": described(reducer), **given}
        return {"run": config, "result": {**agreement(features, dense), **spent}}

    return measured


STUDY = Study("dense", Options, grid, load, lambda run: {"methods": (run.method,), "r": (run.r,)})
