"""Time `crossget embed`: images a second by Ray Data on one machine, dense and reduced in turns.

Each timed run starts its actors, reads JPEG files, embeds them and writes Parquet. A run with one batch of pictures for
each actor tells how long the start takes. The pictures are noise and the weights random, so nothing is downloaded.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from crossget.demo.embedding import EmbedOptions, make_encoder
from crossget.integrations import ray_data
from crossget.measure.speed import quartiles
from experiments.lib.files import Json, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results"
DENSE, REDUCED = "dense", "Ward"


@dataclass(frozen=True)
class Run:
    """One line of the queue: a model."""

    model: str
    r: int
    pictures: int
    pixels: int
    actors: int
    batch: int
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    rounds: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        name = self.model.replace(":", "-").lower()
        return f"embed/{name}_{self.device}_{self.dtype}_actors{self.actors}_r{self.r}"


@dataclass(frozen=True)
class Options:
    """What to time."""

    models: tuple[str, ...] = ("open_clip:ViT-B-16",)
    """Names of open_clip or timm."""
    r: int = 16
    """Tokens that Ward removes per block."""
    pictures: int = 512
    """Files of a timed run."""
    pixels: int = 256
    """Height and width of each."""
    actors: int = 1
    """Processes that hold a model."""
    batch: int = 32
    """Pictures of a forward."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""
    rounds: int = 3
    """Timed runs of each form."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: there would be nothing to time behind the start.
    """
    if options.rounds < 1 or options.pictures < 2 * options.actors * options.batch:
        raise ValueError(
            f"--rounds {options.rounds} --pictures {options.pictures}: expected at least 1, and two batches per actor"
        )
    return [
        Run(
            model, options.r, options.pictures, options.pixels, options.actors, options.batch, options.dtype,
            options.device, options.rounds,
        )
        for model in options.models
    ]  # fmt: skip


def write_pictures(folder: Path, count: int, pixels: int) -> None:
    """Write JPEG files of noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(count):
        small = chance.integers(0, 255, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((pixels, pixels)).save(folder / f"{number:06}.jpg")


def execute(run: Run) -> Json:
    """Time one model."""
    import ray

    start = run.actors * run.batch
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch, "few"), Path(scratch, "many")
        write_pictures(few, start, run.pixels)
        write_pictures(many, run.pictures, run.pixels)
        how = ray_data.Options(
            actors=run.actors, batch=run.batch, device=run.device, shard_rows=run.pictures, sample=0
        )  # fmt: skip
        forms = {
            name: make_encoder(
                EmbedOptions("", "", run.model, r=r, pretrained="none", dtype=run.dtype), log=lambda line: None
            )
            for name, r in ((DENSE, 0), (REDUCED, run.r))
        }
        seconds: dict[str, dict[str, list[float]]] = {name: {"start": [], "rounds": []} for name in forms}
        ray.init("local", num_cpus=run.actors + 2, include_dashboard=False, logging_level="WARNING")
        try:
            for turn in range(run.rounds):
                for name, encoder in forms.items():
                    for kind, folder in (("start", few), ("rounds", many)):
                        report = ray_data.embed(folder, Path(scratch, f"{turn} {name} {kind}"), encoder, how)
                        seconds[name][kind].append(report.seconds)
        finally:
            ray.shutdown()
    rows = [row(run, name, seconds) for name in forms]
    return {"run": asdict(run), "result": {"ray": metadata.version("ray"), "rows": rows}}


def row(run: Run, name: str, seconds: dict[str, dict[str, list[float]]]) -> Json:
    """Return what was measured of one form.

    Args:
        run: the run.
        name: of the form.
        seconds: by form, "start" of the runs with one batch per actor, and "rounds" of those with all pictures.
    """

    def beyond_start(form: str) -> list[float]:
        """Seconds per picture, in each round."""
        start = statistics.median(seconds[form]["start"])
        return [(whole - start) / (run.pictures - run.actors * run.batch) for whole in seconds[form]["rounds"]]

    ratios = [dense / own for dense, own in zip(beyond_start(DENSE), beyond_start(name), strict=True)]
    low, high = quartiles(tuple(ratios))
    return {
        "method": name,
        "images_per_second": round(run.pictures / statistics.median(seconds[name]["rounds"]), 3),
        "images_per_second_beyond_start": round(1 / statistics.median(beyond_start(name)), 3),
        "start_seconds": round(statistics.median(seconds[name]["start"]), 3),
        "speed": round(statistics.median(ratios), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "rounds": [round(value, 3) for value in seconds[name]["rounds"]],
    }


COLUMNS = ["", "images/s, start included", "images/s beyond the start", "start, s", "speed beyond the start"]


def tables(contents: Sequence[Json]) -> str:
    """Return the results as text, one table each."""
    parts = []
    for content in contents:
        run = content["run"]
        cells = [
            [
                found["method"], f"{found['images_per_second']:.1f}", f"{found['images_per_second_beyond_start']:.1f}",
                f"{found['start_seconds']:.1f}",
                f"{found['speed']:.2f}x [{found['quartiles'][0]:.2f}, {found['quartiles'][1]:.2f}]",
            ]
            for found in content["result"]["rows"]
        ]  # fmt: skip
        parts.append(
            f"{run['model']}, r = {run['r']}, {run['pictures']} files of {run['pixels']} x {run['pixels']} pixels, "
            f"{run['actors']} actors with batches of {run['batch']}, {run['dtype']}, Ray {content['result']['ray']}, "
            f"{measured_on(content['environment'])}; medians of {run['rounds']} rounds, quartiles in brackets\n\n"
            + markdown(cells, COLUMNS, 1)
        )
    return "\n\n".join(parts)


STUDY = Study("speed-embed", Options, grid, lambda options: execute, lambda run: {"models": (run.model,)}, tables)
