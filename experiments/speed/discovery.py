"""Time what it costs to find the towers of a model without adapter, in dense forwards of the same model.

The search runs forwards of the whole model and of its blocks (`crossget.core.discovery`). Searches and dense forwards
on the same two images take turns. CPU, random weights: nothing is downloaded.
"""

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from tqdm import tqdm

from crossget.core.discovery import discover
from experiments.lib.files import Json
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results" / "discovery"


@dataclass(frozen=True)
class Options:
    """What to time."""

    models: tuple[str, ...] = ("torchvision/vit_b_16", "timm/vit_small_patch16_224", "timm/pit_s_224")
    """Names, with the library."""
    rounds: int = 11
    """Searches, and as many dense forwards."""
    threads: int = 2
    """Threads of torch."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Measure again what has a result file."""


@dataclass(frozen=True)
class Run:
    """One model."""

    model: str
    rounds: int

    @property
    def slug(self) -> str:
        return self.model.replace("/", "_")


def grid(options: Options) -> list[Run]:
    """Return one run per model."""
    return [Run(model, options.rounds) for model in options.models]


def load(options: Options) -> Any:
    """Return the function that measures one run."""

    def measure(run: Run) -> Json:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        library, _, name = run.model.partition("/")
        made: Any = torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)
        model, images = made.eval(), torch.randn(2, 3, 224, 224)
        times: dict[str, list[float]] = {"forward": [], "search": []}
        blocks = sum(tower.depth for tower in discover(model, images))  # also warms up
        for _ in tqdm(range(run.rounds), disable=None, leave=False):
            start = time.perf_counter()
            with torch.no_grad():
                model(images)
            middle = time.perf_counter()
            discover(model, images)
            times["forward"].append(middle - start)
            times["search"].append(time.perf_counter() - middle)
        ratios = sorted(search / forward for search, forward in zip(times["search"], times["forward"], strict=True))
        quarter = len(ratios) // 4
        return {
            "run": {**asdict(run), "seed": 0},
            "result": {
                "blocks": blocks,
                "forwards": statistics.median(ratios),
                "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                "median_seconds": {name: statistics.median(values) for name, values in times.items()},
            },
        }

    return measure


def table(results: Any) -> str:
    """Return the runs as a table."""
    rows = [
        [
            one["run"]["model"], str(one["result"]["blocks"]), f"{one['result']['forwards']:.1f}",
            " to ".join(f"{value:.1f}" for value in one["result"]["quartiles"]),
        ]
        for one in results
    ]  # fmt: skip
    return markdown(rows, ["model", "blocks", "search in dense forwards, median", "quartiles"])


STUDY = Study("speed-discovery", Options, grid, load, lambda run: {"models": (run.model,)}, table)
