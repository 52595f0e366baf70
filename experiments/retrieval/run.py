"""Fine-tune and evaluate every row of the retrieval table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import crossget
from crossget.core.files import replacing
from crossget.core.training import parameter_groups
from experiments.lib import processes, training
from experiments.lib.data import Dataset, Skipping
from experiments.lib.files import Json, check_names, file_digest, pack
from experiments.lib.study import Study, measured_device
from experiments.retrieval import data, evaluate, models
from experiments.retrieval.presets import PRESETS, SETTINGS, Preset, Setting
from experiments.retrieval.task import RetrievalTask

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row of `presets.PRESETS` at one r."""

    setting: str
    preset: str
    r: int
    seed: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        r = f"_r{self.r}" if PRESETS[self.preset].swept else ""
        seed = "" if PRESETS[self.preset].train is None else f"_seed{self.seed}"
        return f"{self.setting}/{self.preset}{r}{seed}"


@dataclass(frozen=True)
class Options(training.TrainingOptions):
    """What to train, and on which photographs."""

    setting: Literal["flickr30k", "coco", "flickr8k"]
    """Model, recipe and strengths."""
    annotations: Path
    """Captions in Karpathy's layout, such as dataset_flickr30k.json."""
    images: Path
    """Folder of photographs."""
    weights: Path
    """The dense model that all rows start from: a state dict as safetensors or torch.save wrote it."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    r: tuple[int, ...] = ()
    """Tokens removed per block of the image tower; without it, those of the setting."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of rows that are trained."""
    split: str = "val"
    """Evaluate on this split."""
    eval_batch: int = 128
    """Photographs or captions per forward when evaluating."""
    model: str | None = None
    """Another CLIP than the setting's: see experiments/retrieval/models.py."""
    gather: bool = False
    """Contrast with the pairs of all processes; the reference does not."""
    work: Path = Path("work/retrieval")
    """Folder for checkpoints, logs and trained models."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist, or an r is not of the setting.
    """
    setting = SETTINGS[options.setting]
    check_names("presets", options.presets, PRESETS)
    strange = sorted(set(options.r) - set(setting.r))
    if strange:
        raise ValueError(f"r {strange}: {options.setting} has {sorted(setting.r)}")
    # A program that is stopped early has run every row at the first r.
    runs = [
        Run(
            options.setting,
            name,
            r if PRESETS[name].swept else 0,
            seed if PRESETS[name].train is not None else options.seeds[0],
        )
        for r in (options.r or tuple(setting.r))
        for seed in options.seeds
        for name in options.presets
    ]
    return list(dict.fromkeys(runs))


def train(
    clip: models.Clip,
    photos: Sequence[data.Photo],
    recipe: training.Recipe,
    captions: Literal["all", "one"],
    folder: Path | None,
    *,
    attached: crossget.Attachment | None = None,
    preset: Preset = PRESETS["control"],
    gather: bool = False,
    skip_bad: bool = False,
    trackers: Sequence[str] = (),
    name: str = "retrieval",
) -> training.Fitted:
    """Train a CLIP in place; see `training.fit` for what comes back and `task.RetrievalTask` for the loss."""
    if attached is not None:
        attached.register_parameters(clip.model)
    task = RetrievalTask(clip, attached, weight=preset.weight, gather=gather, divergence=preset.divergence)
    groups = parameter_groups(clip.model, attached, train=preset.train or "all")
    pairs: Dataset = data.Pairs(photos, clip.transform(train=True), captions, recipe.seed)
    if skip_bad:
        pairs = Skipping(pairs)
    collate = partial(data.collate, tokenize=clip.tokenize)
    return training.fit(task, groups, pairs, collate, recipe, folder, trackers=trackers, name=name)


def measure(clip: models.Clip, photos: Sequence[data.Photo], batch: int) -> Json:
    """Return the recalls in %, and at which place the right answer came for each item (100: there or later)."""
    device = measured_device()
    to_text, to_image = evaluate.ranks(*evaluate.encode(clip, photos, batch, device))
    return {
        "image_to_text": evaluate.recalls(to_text),
        "text_to_image": evaluate.recalls(to_image),
        "captions": [len(photo.captions) for photo in photos],
        "places": {
            "image_to_text": pack(np.minimum(to_text, 100).astype(np.float64)),
            "text_to_image": pack(np.minimum(to_image, 100).astype(np.float64)),
        },
    }


def count(clip: models.Clip) -> Json:
    """Return multiply-adds of one photograph with one caption, in G, and the tokens entering each block."""
    pixels, ids = torch.zeros(1, 3, clip.size, clip.size), clip.tokenize(["a photograph of a dog"])
    arguments: Any = (ids, pixels) if hasattr(clip.model, "vision_model") else (pixels, ids)
    clip.model.cpu().eval()
    counted = crossget.count_flops(clip.model, arguments)
    try:
        tokens = crossget.attachment(clip.model).tokens
    except ValueError:
        tokens = {}
    return {"gflops": {"dense": counted.dense.total / 1e9, "reduced": counted.total / 1e9}, "tokens": tokens}


def execute(options: Options, run: Run, photos: dict[str, list[data.Photo]], origin: Json) -> Json | None:
    """Train one row, evaluate it, and return what is to be written; None on all processes but the main one."""
    setting, preset = SETTINGS[run.setting], PRESETS[run.preset]
    if preset.train is None and not processes.is_main():
        return None
    name = options.model or setting.model
    clip, attached = build(setting, preset, run, name, options.weights)
    result: Json = {}
    if preset.train is not None:
        recipe = options.applied(setting.recipe, run.seed)
        fitted = train(
            clip, photos["train"], recipe, setting.captions, options.work / run.slug,
            attached=attached, preset=preset, gather=options.gather, skip_bad=options.skip_bad,
            trackers=options.trackers, name=run.slug,
        )  # fmt: skip
        if not processes.is_main():
            return None
        clip, attached = build(setting, preset, run, name, options.weights)
        training.take(clip.model, attached, fitted.state)
        if attached is not None:
            attached.save(options.work / run.slug)
        save_weights(clip, options.work / run.slug / "model.safetensors")
        result.update(history=fitted.history, recipe=asdict(recipe), processes=fitted.processes)
    result.update(measure(clip, photos["eval"], options.eval_batch), **count(clip))
    result["parameters"] = {
        "model": sum(p.numel() for p in clip.model.parameters()),
        "cross_tokens": 0 if attached is None else sum(p.numel() for p in attached.parameters()),
    }
    return {"run": {**asdict(run), "split": options.split, "model": name, **origin}, "result": result}


def build(
    setting: Setting, preset: Preset, run: Run, name: str, weights: Path
) -> tuple[models.Clip, crossget.Attachment | None]:
    """Return the dense model that all rows start from, with the row's reducers attached."""
    torch.manual_seed(run.seed)
    clip = models.load_clip(name, weights)
    reducers = preset.make(run.r, setting.r.get(run.r, 0))
    return clip, None if reducers is None else crossget.attach(clip.model, reducers)


def save_weights(clip: models.Clip, file: Path) -> None:
    """Write the model's state dict, without cross tokens."""
    from safetensors.torch import save_file

    with replacing(file) as part:
        save_file({name: value.contiguous() for name, value in clip.model.state_dict().items()}, part)


def load_photos(options: Options) -> tuple[dict[str, list[data.Photo]], Json]:
    """Return the photographs to train on and to evaluate on, and where everything comes from."""
    read: Callable[[str], list[data.Photo]] = partial(
        data.read_karpathy, options.annotations, options.images, skip_bad=options.skip_bad
    )
    photos = {"train": read("train"), "eval": read(options.split)}
    origin = {
        "data": {name: data.fingerprint(some) for name, some in photos.items()},
        "weights": {"file": options.weights.name, "sha256": file_digest(options.weights)},
    }
    return photos, origin


def load(options: Options) -> Callable[[Run], Json | None]:
    """Return the function that trains and measures one run."""
    photos, origin = load_photos(options)
    return lambda run: execute(options, run, photos, origin)


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    strength = {"r": (run.r,)} if PRESETS[run.preset].swept else {}
    return {"presets": (run.preset,), "seeds": (run.seed,), **strength}


STUDY = Study("retrieval", Options, grid, load, select)
