"""Count the multiply-adds of published models on the meta device: no weights are needed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import crossget
from crossget.checkpoints import hf_sizes as presets
from crossget.measure.generation import count_stages, has_stages
from experiments.lib.files import Json
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One model at one strength."""

    model: str
    r: int
    text_tokens: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.model}_r{self.r}_text{self.text_tokens}"


@dataclass(frozen=True)
class ConnectorRun(Run):
    """One model with fewer image features behind its connector. With r = 0 its image tower is dense."""

    keep: float = 0.25
    image: str = ""
    tiles: int = 0

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{super().slug}_keep{self.keep:g}"


# What the reference does with LLaVA; for the others, strengths that leave about half of the tokens.
RUNS = [
    Run("llava-1.5-7b", 13, 64),
    Run("llava-1.5-13b", 13, 64),
    Run("clip-vit-large-patch14-336", 13, 77),
    Run("blip-base-384", 26, 16),
    Run("blip2-opt-2.7b", 3, 32),
]
CONNECTOR_RUNS = [
    ConnectorRun("qwen2.5-vl-7b", 0, 64, 0.5, "1036x1036"),
    ConnectorRun("qwen2.5-vl-7b", 0, 64, 0.25, "1036x1036"),
    ConnectorRun("qwen2.5-vl-7b", 0, 64, 0.125, "1036x1036"),
    ConnectorRun("qwen3-vl-8b", 0, 64, 0.25, "1024x1024"),
    ConnectorRun("internvl3-8b", 0, 64, 0.25, tiles=13),
    ConnectorRun("smolvlm2-2.2b", 0, 64, 0.25, tiles=17),
    ConnectorRun("gemma3-4b", 0, 64, 0.25),
    ConnectorRun("llava-1.5-7b", 0, 64, 0.25),
    ConnectorRun("llava-1.5-7b", 13, 64, 0.25),
]


@dataclass(frozen=True)
class Options:
    """What to do."""

    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Count again what has a result file."""


def execute(run: Run) -> Json:
    """Count one model, dense and reduced."""
    model: Any = presets.build(run.model)
    reducer: Any = crossget.CrossGET(run.r)
    if isinstance(run, ConnectorRun):
        behind = crossget.Ward(crossget.Keep(run.keep))
        reducer = {"connector": behind, **({"visual": reducer} if run.r else {})}
    with crossget.attach(model, reducer):
        result = _generating(model, run) if has_stages(model) else _embedding(model, run)
    return {"run": dataclasses.asdict(run), "result": result}


def _generating(model: Any, run: Run) -> Json:
    size: Any = None
    if isinstance(run, ConnectorRun) and run.image:
        size = tuple(int(side) for side in run.image.split("x"))
    tiles = run.tiles or None if isinstance(run, ConnectorRun) else None
    report = count_stages(model, run.text_tokens, image_size=size, tiles=tiles)
    costs = {"dense": report.dense, "reduced": report.reduced}
    counted = {name: dataclasses.asdict(cost) | {"total": cost.prefill} for name, cost in costs.items() if cost}
    return {**counted, "speedup": round(report.speedup, 4)}


def _embedding(model: Any, run: Run) -> Json:
    """One image and one text, each through its tower."""
    size = model.config.vision_config.image_size
    pixels = torch.empty(1, 3, size, size, device="meta")
    ids = torch.zeros(1, run.text_tokens, dtype=torch.long, device="meta")
    report = crossget.count_flops(model, {"input_ids": ids, "pixel_values": pixels})
    tokens = {"dense": report.dense, "reduced": report.current}
    counted = {
        name: {"parts": {"image tower": count.by_module["vision_model"]}, "total": count.total}
        for name, count in tokens.items()
    }
    return {**counted, "speedup": round(1 / report.ratio, 4)}


def table(contents: Sequence[Json]) -> str:
    """Return the results as two tables: of towers, and of connectors."""
    order = [run.slug for run in (*RUNS, *CONNECTOR_RUNS)]
    ordered = sorted(contents, key=lambda content: order.index(_run(content).slug))
    towers = [content for content in ordered if "keep" not in content["run"]]
    connectors = [content for content in ordered if "keep" in content["run"]]
    head = ["image tokens", "image tower, G", "in all, G", "predicted", "step, G", "cache, MiB"]
    parts = []
    if towers:
        parts.append(markdown([_row(content) for content in towers], ["dense / CrossGET", *head]))
    if connectors:
        parts.append(markdown([_row(content) for content in connectors], ["dense / Ward behind the connector", *head]))
    return "\n\n".join(parts)


def _row(content: Json) -> list[str]:
    result = content["result"]
    dense, reduced = result["dense"], result["reduced"]
    return [
        _name(_run(content)),
        _pair(dense.get("image_tokens"), reduced.get("image_tokens"), 1, 0),
        _pair(dense["parts"]["image tower"], reduced["parts"]["image tower"], 1e9),
        _pair(dense["total"], reduced["total"], 1e9),
        f"**{result['speedup']:.2f}x**",
        _pair(dense.get("step"), reduced.get("step"), 1e9, 2),
        _pair(dense.get("cache"), reduced.get("cache"), 2**20 / 2),
    ]


def _name(run: Run) -> str:
    text = f"{run.text_tokens} text tokens"
    if not isinstance(run, ConnectorRun):
        return f"{run.model}, r = {run.r}, {text}"
    image = run.image or (f"{run.tiles} tiles" if run.tiles else "")
    tower = f"CrossGET r = {run.r} in the tower" if run.r else ""
    return ", ".join(filter(None, [run.model, image, f"keep {run.keep:g}", tower, text]))


def _pair(dense: float | None, reduced: float | None, unit: float, digits: int = 1) -> str:
    return "" if dense is None or reduced is None else f"{dense / unit:,.{digits}f} / {reduced / unit:,.{digits}f}"


def _run(content: Json) -> Run:
    run = content["run"]
    return ConnectorRun(**run) if "keep" in run else Run(**run)


STUDY = Study(
    "flops", Options, lambda options: [*RUNS, *CONNECTOR_RUNS], lambda options: execute, lambda run: {}, table
)
