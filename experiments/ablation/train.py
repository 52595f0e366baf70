"""Fine-tune every row of the ablation from one dense model.

The loss is cross-entropy: one tower has nothing to align its cross tokens with.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.core.training import parameter_groups
from experiments.ablation.presets import RECIPES, TRAINED, TRAINED_REDUCTIONS, Trained
from experiments.ablation.run import described, predict, score
from experiments.ablation.settings import SETTINGS, Images, Samples, Setting, find_samples, load_images, load_model
from experiments.lib import processes, training
from experiments.lib.data import Dataset, Labelled, Skipping, collate
from experiments.lib.files import Json, check_names, file_digest
from experiments.lib.study import Study, measured_device

# Beside those without training, not among them: report.py reads these with all subfolders.
RESULTS = Path(__file__).parent / "results_trained"


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row of `presets.TRAINED` at one r."""

    setting: str
    preset: str
    r: int
    seed: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        row = TRAINED[self.preset]
        r = f"_r{self.r}" if row.preset.swept else ""
        seed = "" if row.train is None else f"_seed{self.seed}"
        return f"{self.setting}/{self.preset}{r}{seed}"


@dataclass(frozen=True)
class Options(training.TrainingOptions):
    """What to train, and on which images."""

    setting: Literal["imagenet", "cifar10"]
    """Model, preprocessing and recipe."""
    data: Path
    """Measure on this folder: labels.csv (file,label), or one folder of images per class."""
    train: Path
    """Train on this folder, of the same layout; none of its images may be in `data`."""
    weights: Path | None = None
    """The dense model that all rows start from, a safetensors file; without it timm's is downloaded."""
    presets: tuple[str, ...] = tuple(TRAINED)
    """Rows to run."""
    r: tuple[int, ...] = TRAINED_REDUCTIONS
    """Tokens removed per block."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of order and augmentation; rows that are not trained use the first."""
    eval_batch: int = 200
    """Images per forward when measuring."""
    limit: int | None = None
    """Measure on this many images only."""
    work: Path | None = None
    """Folder for checkpoints, from which a stopped run goes on; without it there are none."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, TRAINED)
    # A program that is stopped early has run every row at the first r.
    runs = [
        Run(
            options.setting,
            name,
            r if TRAINED[name].preset.swept else 0,
            seed if TRAINED[name].train is not None else options.seeds[0],
        )
        for r in options.r
        for seed in options.seeds
        for name in options.presets
    ]
    return list(dict.fromkeys(runs))


def labelled(samples: Samples, setting: Setting, seed: int) -> Labelled:
    """Return images with their labels, as the setting augments them."""
    return Labelled(samples.files, samples.labels, setting.transform(train=True), seed)


class ClassificationTask(nn.Module):
    """Cross-entropy of a classifier, reduced or not, and beside it how many answers are right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of one batch: `loss`, and `top1` in %, which is only looked at.

        Args:
            pixels: [B, 3, size, size].
            labels: [B].
        """
        logits = self.model(pixels)
        return {
            "loss": F.cross_entropy(logits.float(), labels),
            "top1": 100 * (logits.argmax(1) == labels).float().mean(),
        }


def build(row: Trained, run: Run, weights: Path | None) -> tuple[nn.Module, crossget.Attachment | None]:
    """Return the dense model that all rows start from, with the row's reducer attached."""
    model = load_model(SETTINGS[run.setting], weights)
    reducer = row.preset.make(run.r, run.seed)
    return model, None if reducer is None else crossget.attach(model, reducer)


def fit(
    model: nn.Module, attached: crossget.Attachment | None, row: Trained, data: Dataset, recipe: training.Recipe,
    folder: Path | None = None, name: str = "ablation", trackers: Sequence[str] = (),
) -> training.Fitted:  # fmt: skip
    """Train what the row trains, in place; see `training.fit`."""
    if attached is not None:
        attached.register_parameters(model)
    groups = parameter_groups(model, attached, train=row.train or "all")
    return training.fit(ClassificationTask(model), groups, data, collate, recipe, folder, trackers=trackers, name=name)


def execute(options: Options, run: Run, samples: Samples, images: Images, dense: Tensor, device: str) -> Json | None:
    """Train one row, measure it, and return its `result`; None on all processes but the main one.

    Args:
        options: weights and recipe.
        run: which row.
        samples: to train on.
        images: to measure on.
        dense: [N, classes] the dense model's logits of `images` before it is trained on.
        device: where to measure.

    Returns:
        `run.score`'s entries, and of a row that is trained `history` (losses and top-1 in training by epoch), `recipe`
        and `cross_tokens` (see `sizes`).
    """
    row = TRAINED[run.preset]
    model, attached = build(row, run, options.weights)
    result: Json = {}
    if row.train is not None:
        recipe = options.applied(RECIPES[options.setting], run.seed)
        data: Dataset = labelled(samples, SETTINGS[options.setting], run.seed)
        if options.skip_bad:
            data = Skipping(data)
        folder = None if options.work is None else options.work / run.slug
        fitted = fit(model, attached, row, data, recipe, folder, run.slug, options.trackers)
        if not processes.is_main():
            return None
        model, attached = build(row, run, options.weights)
        training.take(model, attached, fitted.state)
        result.update(history=fitted.history, recipe=asdict(recipe), cross_tokens=sizes(attached))
    return {**score(model.to(device), attached, images, dense, options.eval_batch, device), **result}


def sizes(attached: crossget.Attachment | None) -> list[float]:
    """Return the root mean square of each block's cross token, which is zero before training; [] without any."""
    if attached is None:
        return []
    return [float(value) for token in attached.parameters() for value in token.detach().square().mean(1).sqrt()]


def load(options: Options) -> Callable[[Run], Json | None]:
    """Return the function that trains and measures one run."""
    setting, weights, device = SETTINGS[options.setting], options.weights, measured_device()
    samples = find_samples(setting, options.train)
    images = load_images(setting, options.data, options.limit)
    dense = predict(load_model(setting, weights).to(device), images.pixels, options.eval_batch, device)
    origin = {
        "weights": weights and {"file": weights.name, "sha256": file_digest(weights)},
        "data": {"test": images.source, "train": samples.source},
        "eval_batch": options.eval_batch,
    }

    def measured(run: Run) -> Json | None:
        row = TRAINED[run.preset]
        config = {**asdict(run), "train": row.train, "reducer": described(row.preset.make(run.r, run.seed)), **origin}
        result = execute(options, run, samples, images, dense, device)
        return result and {"run": config, "result": result}

    return measured


STUDY = Study(
    "ablation-trained", Options, grid, load, lambda run: {"presets": (run.preset,), "r": (run.r,), "seeds": (run.seed,)}
)
