"""Train the dense model that the rows of a setting start from: `python -m experiments.retrieval.pretrain --help`."""

import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from experiments.lib import processes, training
from experiments.lib.files import environment, file_digest, write_json
from experiments.lib.study import measured_device
from experiments.retrieval import data, models
from experiments.retrieval.presets import SETTINGS
from experiments.retrieval.run import RESULTS, measure, save_weights, train


@dataclass(frozen=True)
class Options:
    """What to train on, and where to write the model."""

    annotations: Path
    """Captions in Karpathy's layout."""
    images: Path
    """Folder of photographs."""
    out: Path
    """Safetensors file to write."""
    vision_weights: Path | None = None
    """Safetensors file of timm's vit_tiny_patch16_224, in any precision; without it timm's are downloaded."""
    setting: Literal["flickr8k"] = "flickr8k"
    """Model and recipe."""
    epochs: int | None = None
    """Other than the recipe's."""
    seed: int = 0
    """Of initial weights, order and augmentation."""
    workers: int = 0
    """Processes that load data."""
    trackers: tuple[str, ...] = ()
    """Loggers: tensorboard, wandb, ..."""
    work: Path = Path("work/retrieval")
    """Folder for checkpoints and logs."""
    results: Path = field(default=RESULTS)
    """Where the result file goes."""


@processes.ending_group
def main(options: Options) -> None:
    """Train, evaluate, and write the model and a result file."""
    setting = SETTINGS[options.setting]
    if setting.pretrain is None:
        raise ValueError(f"the setting {options.setting!r} starts from published weights")
    photos = {name: data.read_karpathy(options.annotations, options.images, name) for name in ("train", "val")}
    torch.manual_seed(options.seed)
    clip = models.load_clip(setting.model, options.vision_weights)
    if options.vision_weights is None:
        models.load_published_tower(clip)
    recipe = replace(setting.pretrain, seed=options.seed, workers=options.workers)
    recipe = recipe if options.epochs is None else replace(recipe, epochs=options.epochs)
    start, where = time.perf_counter(), environment(measured_device())
    folder = options.work / options.setting / "pretrain"
    fitted = train(clip, photos["train"], recipe, setting.captions, folder, trackers=options.trackers, name="pretrain")
    if not processes.is_main():
        return
    training.take(clip.model, None, fitted.state)
    save_weights(clip, options.out)
    result = {"history": fitted.history, "recipe": asdict(recipe), **measure(clip, photos["val"], 128)}
    vision = options.vision_weights and file_digest(options.vision_weights)
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    content = {
        "run": {
            "setting": options.setting, "preset": "pretrain", "seed": options.seed, "vision_weights": vision,
            "data": {name: data.fingerprint(some) for name, some in photos.items()},
            "weights": {"file": options.out.name, "sha256": file_digest(options.out)},
        },
        "command": shlex.join(["python", "-m", "experiments.retrieval.pretrain", *words]),
        "environment": where,
        "result": result,
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    write_json(options.results / options.setting / "pretrain.json", content)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
