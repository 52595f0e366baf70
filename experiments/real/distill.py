"""Train a reduced CLIP to give the dense tower's features again, on photographs without labels.

There is no text tower in this study, so the alignment loss of cross tokens and texts takes no part. The loss is one
minus the cosine with the dense features. The dense control gets the same training, though it begins at a loss of zero:
what it loses or gains is what training alone does. Measured zero-shot, and by the nearest centroid of classes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.core.files import replacing
from crossget.core.training import parameter_groups
from experiments.ablation.presets import TRAINED
from experiments.ablation.run import cost, described
from experiments.ablation.settings import Setting, find_samples, load_model
from experiments.ablation.train import sizes
from experiments.lib import processes, training
from experiments.lib.data import Dataset, Labelled, Skipping, collate, read_image
from experiments.lib.files import Json, check_names
from experiments.lib.study import Study, measured_device
from experiments.real.clip import RESULTS, Clip, Measuring, classified, encode, evenly, setting_of

RECIPE = training.Recipe(
    epochs=1, batch=8, lr=3e-6, weight_decay=0.05, warmup=0.2, clip=1.0, lr_factors={"model.crossget": 100.0}
)
"""The best of three rates for CrossGET, by 24 of the photographs to train on after 12 steps on 96 others: a cosine with
the dense features of 0.956 at 3e-6, 0.947 at 1e-5, 0.906 at 3e-5, from 0.873. Cross tokens begin at zero and have few
steps: they learn faster, by a factor that was not compared with others."""
PRESETS = ("dense", "tome_untrained", "crossget_untrained", "crossget", "tome", "control")
"""Of `experiments.ablation.presets.TRAINED`, in the order in which they are run; the others can be asked for."""
ENDINGS = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Run:
    """One row of `TRAINED` at one r."""

    task: str
    preset: str
    r: int
    seed: int | None

    @property
    def slug(self) -> str:
        """The result file's name."""
        r = f"_r{self.r}" if TRAINED[self.preset].preset.swept else ""
        return f"{self.task}/{self.preset}{r}" + ("" if self.seed is None else f"_seed{self.seed}")


@dataclass(frozen=True, kw_only=True)
class Options(training.TrainingOptions, Clip):
    """What to train, on which photographs, and what to measure with."""

    train: tuple[Path, ...]
    """Folders of photographs to train on; all images in them and below count, labels or not."""
    data: Path
    """Measure zero-shot on all of this folder: labels.csv (file,label), or one folder of images per class."""
    texts: Path
    """Safetensors file with embeddings [classes, E] of its classes' texts, by the name of the set."""
    sets: tuple[str, ...] = ()
    """Sets of that file; all, where none is named."""
    classes: Path | None = None
    """Measure centroids on this folder with `train/CLASS` and `test/CLASS`; none without it."""
    presets: tuple[str, ...] = PRESETS
    """Rows to run."""
    r: tuple[int, ...] = (16,)
    """Tokens removed per block."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the order."""
    images: int = 400
    """So many photographs to train on, evenly spread over the sorted list."""
    centroids_of: int = 250
    """So many photographs of each split of `classes`, likewise."""
    eval_batch: int = 25
    """Images per forward when measuring."""
    work: Path | None = None
    """Folder for checkpoints, from which a stopped run goes on, and for what is trained towards; none without it."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for; a program that is stopped has all rows at the first seed.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, TRAINED)
    runs = [
        Run("trained", name, r if TRAINED[name].preset.swept else 0, seed if TRAINED[name].train else None)
        for r in options.r
        for seed in options.seeds
        for name in options.presets
    ]
    return list(dict.fromkeys(runs))


class DistillationTask(nn.Module):
    """One minus the cosine of a tower's features with given ones.

    Args:
        model: the tower; its forward gives features [B, E].
        targets: [N, E] of unit length, of all photographs to train on.
    """

    targets: Tensor

    def __init__(self, model: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("targets", targets, persistent=False)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of one batch: `loss`.

        Args:
            pixels: [B, 3, H, W].
            labels: [B] which photographs they are.
        """
        features = F.normalize(self.model(pixels).float(), dim=-1)
        return {"loss": (1 - (features * self.targets[labels]).sum(1)).mean()}


def photographs(folders: Sequence[Path], count: int) -> list[Path]:
    """Return so many of all images in the folders and below, evenly spread over the sorted list.

    Raises:
        ValueError: there is none.
    """
    found = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(f"no image in {[str(folder) for folder in folders]}: expected folders of .jpg or .png files")
    return [found[i] for i in evenly(range(len(found)), count)]


def encode_files(tower: nn.Module, files: Sequence[Path], setting: Setting, batch: int, device: str) -> Tensor:
    """Return the features [N, E] of image files, of unit length; only a batch is in memory at a time."""
    transform = setting.transform()
    parts = [
        encode(tower, torch.stack([read_image(file, transform) for file in files[i : i + batch]]), batch, device)
        for i in range(0, len(files), batch)
    ]
    return torch.cat(parts)


def stored(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return the tensor of a file, which is made and written first if it does not exist."""
    if not file.exists():
        with replacing(file) as new:
            save_file({"targets": make()}, new)
    return load_file(file)["targets"]


@dataclass(frozen=True)
class Centroids:
    """Photographs with classes: centroids of some are compared with others.

    Attributes:
        setting: their preprocessing.
        files, labels: by split, `train` and `test`.
        source: what a result file says of them.
    """

    setting: Setting
    files: dict[str, list[Path]]
    labels: dict[str, Tensor]
    source: Json

    def measure(self, tower: nn.Module, batch: int, device: str) -> Json:
        """Return how many test photographs have their class's centroid of training photographs as the nearest."""
        features = {split: encode_files(tower, self.files[split], self.setting, batch, device) for split in self.files}
        known = self.labels["train"].unique()
        means = torch.stack([features["train"][self.labels["train"] == label].mean(0) for label in known])
        answers = known[(features["test"] @ F.normalize(means, dim=-1).T).argmax(1)]
        right = (answers == self.labels["test"]).tolist()
        return {
            "top1": round(100 * sum(right) / len(right), 4),
            "n": len(right),
            "correct": "".join("1" if one else "0" for one in right),
        }


def find_centroids(setting: Setting, folder: Path, limit: int) -> Centroids:
    """Return the photographs of both splits; test photographs of classes without a training photograph are left out."""
    files: dict[str, list[Path]] = {}
    labels: dict[str, Tensor] = {}
    source: Json = {}
    for split in ("train", "test"):
        samples = find_samples(setting, folder / split, limit)
        known = set(samples.labels) if split == "train" else set(labels["train"].tolist())
        kept = [i for i, label in enumerate(samples.labels) if label in known]
        files[split] = [samples.files[i] for i in kept]
        labels[split] = torch.tensor([samples.labels[i] for i in kept])
        source[split] = samples.source
    return Centroids(setting, files, labels, source)


def load(options: Options) -> Callable[[Run], Json | None]:
    """Return the function that trains and measures one run."""
    device = measured_device()
    measuring = Measuring(
        data=options.data, texts=options.texts, sets=options.sets, weights=options.weights, model=options.model,
        batch=options.eval_batch, device=device,
    )  # fmt: skip
    loaded = measuring.load()  # both halves, since the recipe is chosen on photographs to train on
    images = loaded.images
    setting = setting_of(options.model, 1 << 30)
    centroids = find_centroids(setting, options.classes, options.centroids_of) if options.classes else None
    files = photographs(options.train, options.images)
    dense = encode(loaded.tower, images.pixels, options.eval_batch, device)
    given = {
        **measuring.given(loaded), "trained_on": len(files), "measured_on": len(images.labels),
        "folders": [folder.name for folder in options.train], "centroids": centroids and centroids.source,
    }  # fmt: skip

    @cache
    def targets() -> Tensor:
        def encoded() -> Tensor:
            return encode_files(loaded.tower, files, setting, options.eval_batch, device)

        if options.work is None:
            return encoded()
        known = json.dumps([given["model"], given["weights"], *map(str, files)])
        return stored(options.work / f"targets_{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors", encoded)

    def build(run: Run) -> tuple[nn.Module, crossget.Attachment | None]:
        model = load_model(setting, options.weights)
        reducer = TRAINED[run.preset].preset.make(run.r, 0)
        return model, None if reducer is None else crossget.attach(model, reducer)

    def measured(run: Run) -> Json | None:
        row, result = TRAINED[run.preset], Json()
        model, attached = build(run)
        if row.train is not None:
            assert run.seed is not None
            recipe = options.applied(RECIPE, run.seed)
            data: Dataset = Labelled(files, range(len(files)), setting.transform(), run.seed)
            if options.skip_bad:
                data = Skipping(data)
            if attached is not None:
                attached.register_parameters(model)
            groups = parameter_groups(model, attached, train=row.train)
            folder = None if options.work is None else options.work / run.slug
            task = DistillationTask(model, targets())
            fitted = training.fit(task, groups, data, collate, recipe, folder, trackers=options.trackers, name=run.slug)
            if not processes.is_main():
                return None
            model, attached = build(run)
            training.take(model, attached, fitted.state)
            result.update(history=fitted.history, recipe=asdict(recipe), cross_tokens=sizes(attached))
        model.to(device)
        features = encode(model, images.pixels, options.eval_batch, device)
        result.update(classified(features, dense, loaded), **cost(model, attached, images.pixels[:1].to(device)))
        if centroids is not None:
            result["centroids"] = centroids.measure(model, options.eval_batch, device)
        config = {**asdict(run), "train": row.train, "reducer": described(row.preset.make(run.r, 0)), **given}
        return {"run": config, "result": result}

    return measured


def select(run: Run) -> dict[str, object]:
    """Return the options that choose one run alone."""
    return {"presets": (run.preset,), "r": (run.r,), **({} if run.seed is None else {"seeds": (run.seed,)})}


STUDY = Study("real-trained", Options, grid, load, select)
