"""Learn prompts and evaluate every row of the CoOp table."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import crossget
from crossget.core.files import write_bytes
from crossget.core.training import parameter_groups
from crossget.demo.backbones import load_weights
from experiments.coop import datasets
from experiments.coop.presets import PRESETS, SETTINGS, Preset, recipe_of
from experiments.coop.prompts import PromptLearner
from experiments.coop.task import CoopTask, logits
from experiments.lib import processes, training
from experiments.lib.data import BadData, Dataset, Labelled, Skipping, collate, read_image
from experiments.lib.files import Json, check_names, file_digest
from experiments.lib.study import Study, measured_device
from experiments.retrieval import models

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row of `presets.PRESETS` on a data set, at one strength."""

    setting: str
    dataset: str
    preset: str
    percent: int
    seed: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        percent = f"_{self.percent}" if PRESETS[self.preset].swept else ""
        seed = "" if PRESETS[self.preset].prompts == "template" else f"_seed{self.seed}"
        return f"{self.setting}/{self.dataset}/{self.preset}{percent}{seed}"

    @property
    def base(self) -> "Run":
        """The run whose prompts this one starts from."""
        return replace(self, preset="coop", percent=0)


@dataclass(frozen=True)
class Options(training.TrainingOptions):
    """What to train, and on which photographs."""

    setting: Literal["reference", "caltech101_small"]
    """Model, recipes and strengths."""
    data: Path
    """Folder of the data sets in CoOp's layout; or of one with train/CLASS/*.jpg and test/CLASS/*.jpg."""
    dataset: Literal[
        "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft",
        "sun397", "dtd", "eurosat", "ucf101",
    ] = "caltech101"  # fmt: skip
    """Which set."""
    weights: Path | None = None
    """State dict of the dense model that all rows share, as safetensors or torch.save wrote it; None: open_clip's."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    percent: tuple[int, ...] = ()
    """Strengths: % of multiply-adds that are left, as the setting calls them; without it, all."""
    seeds: tuple[int, ...] = ()
    """Without it, those of the setting."""
    shots: int = 16
    """Photographs of each class to train on; 0: all."""
    context: int = 16
    """Context tokens."""
    class_specific: bool = False
    """A context for each class."""
    split: Literal["test", "val"] = "test"
    """Evaluate on this split."""
    eval_batch: int = 100
    """Photographs per forward when evaluating."""
    model: str | None = None
    """Another CLIP than the setting's: see experiments/retrieval/models.py."""
    work: Path = Path("work/coop")
    """Folder for checkpoints, logs, learnt prompts and cross tokens."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for, `coop` of each seed before those that start from its prompts.

    Raises:
        ValueError: a preset does not exist, or a strength is not of the setting.
    """
    setting = SETTINGS[options.setting]
    check_names("presets", options.presets, PRESETS)
    strange = sorted(set(options.percent) - set(setting.r))
    if strange:
        raise ValueError(f"percent {strange}: {options.setting} has {sorted(setting.r)}")
    seeds = options.seeds or setting.seeds
    runs = []
    # A program that is stopped early has run every row at the first strength.
    for percent in options.percent or sorted(setting.r):
        for seed in seeds:
            for name in sorted(options.presets, key=lambda name: name != "coop"):
                of_seed = seed if PRESETS[name].prompts != "template" else seeds[0]
                run = Run(options.setting, options.dataset, name, percent if PRESETS[name].swept else 0, of_seed)
                if PRESETS[name].prompts == "coop" and not prompts_file(options, run.base).is_file():
                    runs.append(run.base)
                runs.append(run)
    return list(dict.fromkeys(runs))


def prompts_file(options: Options, run: Run) -> Path:
    """Return where a run's learnt prompts are."""
    return options.work / run.slug / "prompts.safetensors"


def recipe_for(options: Options, run: Run) -> training.Recipe:
    """Return the row's recipe with what the options change of it."""
    return options.applied(recipe_of(SETTINGS[options.setting], options.dataset, PRESETS[run.preset]), run.seed)


@dataclass(frozen=True)
class Built:
    """A row's model.

    Attributes:
        clip: dense, or attached.
        learner: of its prompts.
        attached: its attachment.
    """

    clip: models.Clip
    learner: PromptLearner
    attached: crossget.Attachment | None


def build(options: Options, run: Run, names: Sequence[str]) -> Built:
    """Return the dense model that all rows share, with the row's reducers attached and its prompts to start from."""
    setting, preset = SETTINGS[run.setting], PRESETS[run.preset]
    name = options.model or setting.model
    if name == "small" and options.weights is None:
        raise ValueError("nobody publishes weights of the small CLIP: give a file of them with --weights")
    clip = models.load_clip(name, options.weights)
    learner = PromptLearner(clip, names, options.context, class_specific=options.class_specific, seed=run.seed)
    if preset.prompts == "coop":
        load_prompts(learner, prompts_file(options, run.base))
    reducers = preset.make(setting.r.get(run.percent, 0))
    return Built(clip, learner, None if reducers is None else crossget.attach(clip.model, reducers))


def load_prompts(learner: PromptLearner, file: Path) -> None:
    """Load what `save_prompts` wrote.

    Raises:
        ValueError: it is damaged, or has another number of context tokens, classes or width.
    """
    context = load_weights(file).get("ctx", torch.empty(0))
    if context.shape != learner.ctx.shape:
        raise ValueError(
            f"{file} has prompts {list(context.shape)}, and {list(learner.ctx.shape)} are wanted: give this --context "
            "and --class-specific another --work and --results"
        )
    with torch.no_grad():
        learner.ctx.copy_(context)


def save_prompts(context: Tensor, file: Path) -> None:
    """Write learnt prompts."""
    from safetensors.torch import save

    write_bytes(file, save({"ctx": context.detach().cpu().contiguous()}))


def train(
    built: Built,
    photos: Sequence[datasets.Photo],
    recipe: training.Recipe,
    preset: Preset,
    crop: float,
    folder: Path | None = None,
    *,
    skip_bad: bool = False,
    trackers: Sequence[str] = (),
    name: str = "coop",
) -> training.Fitted:
    """Train prompts and cross tokens in place; see `training.fit` for what comes back, `task.CoopTask` for the loss."""
    clip, learner, attached = built.clip, built.learner, built.attached
    if attached is not None:
        attached.register_parameters(clip.model)
    task = CoopTask(learner, attached, share=preset.share, alignment=preset.alignment)
    groups = parameter_groups(clip.model, attached, train="prompts", prompts=[learner.ctx])
    look = datasets.transform(clip.size, clip.mean, clip.std, crop)
    files, labels = [photo.file for photo in photos], [photo.label for photo in photos]
    data: Dataset = Labelled(files, labels, look, recipe.seed)
    if skip_bad:
        data = Skipping(data)
    return training.fit(task, groups, data, collate, recipe, folder, trackers=trackers, name=name)


def take(built: Built, state: Mapping[str, Tensor]) -> None:
    """Load what training has changed: the prompts and the cross tokens."""
    with torch.no_grad():
        built.learner.ctx.copy_(state["learner.ctx"])
        for tower, parameter in ({} if built.attached is None else built.attached.cross_tokens).items():
            parameter.copy_(state[f"model.crossget.{tower}"])


@torch.no_grad()
def measure(
    built: Built,
    photos: Sequence[datasets.Photo],
    batch: int,
    *,
    template: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Json:
    """Return top-1 accuracy in % and a mark for each photograph: 1 where the right class is the first.

    Args:
        built: whose prompts are evaluated.
        photos: to be classified.
        batch: of them per forward.
        template: prompts to be used instead, one per class.
        skip_bad: leave out photographs that cannot be read, with a warning, instead of stopping.

    Raises:
        BadData: a photograph cannot be read.
    """
    device = measured_device()
    clip, learner = built.clip, built.learner.to(device)
    clip.model.eval().to(device)
    text = learner() if template is None else clip.encode_text(clip.tokenize(list(template)).to(device))
    look = datasets.transform(clip.size, clip.mean, clip.std)
    marks = ""
    for start in range(0, len(photos), batch):
        pixels, labels = [], []
        for photo in photos[start : start + batch]:
            try:
                pixels.append(read_image(photo.file, look))
            except BadData as error:
                if not skip_bad:
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                continue
            labels.append(photo.label)
        if labels:
            image = clip.encode_image(torch.stack(pixels).to(device))
            right = logits(image, text, clip.model.logit_scale).argmax(-1).cpu() == torch.tensor(labels)
            marks += "".join(map(str, right.int().tolist()))
    return {"top1": 100 * marks.count("1") / len(marks), "correct": marks}


def count(built: Built) -> Json:
    """Return multiply-adds in G, of a photograph and of one with one prompt, and the tokens entering each block."""
    model: Any = built.clip.model.cpu().eval()
    pixels, ids = torch.zeros(1, 3, built.clip.size, built.clip.size), built.learner.ids[:1].cpu()
    image = "visual" if hasattr(model, "visual") else "vision_model"
    counted = crossget.count_flops(model, (pixels, ids) if image == "visual" else (ids, pixels))
    return {
        "gflops": {
            "image": {"dense": counted.dense.by_module[image] / 1e9, "reduced": counted.by_module[image] / 1e9},
            "both": {"dense": counted.dense.total / 1e9, "reduced": counted.total / 1e9},
        },
        "tokens": {} if built.attached is None else built.attached.tokens,
    }


def execute(options: Options, run: Run, data: datasets.Data, origin: Json) -> Json | None:
    """Train one row, evaluate it, and return what is to be written; None on all processes but the main one."""
    setting, preset = SETTINGS[run.setting], PRESETS[run.preset]
    built = build(options, run, data.names)
    evaluated = datasets.existing(data.splits.get(options.split, ()), options.skip_bad)
    fingerprints: Json = {options.split: datasets.fingerprint(evaluated, data.names)}
    result: Json = {}
    if preset.trained:
        drawn = datasets.existing(datasets.few_shot(data, options.shots, run.seed)["train"], options.skip_bad)
        fingerprints["train"] = datasets.fingerprint(drawn, data.names)
        recipe = recipe_for(options, run)
        fitted = train(
            built, drawn, recipe, preset, setting.crop, options.work / run.slug,
            skip_bad=options.skip_bad, trackers=options.trackers, name=run.slug,
        )  # fmt: skip
        if processes.is_main():
            save_prompts(fitted.state["learner.ctx"], prompts_file(options, run))
        processes.wait_for_everyone()  # the next row may start from these prompts, on every process
        if not processes.is_main():
            return None
        # The model in memory may be sharded; what was learnt goes into a new one.
        built = build(options, run, data.names)
        take(built, fitted.state)
        if built.attached is not None:
            built.attached.save(options.work / run.slug)
        result.update(history=fitted.history, recipe=asdict(recipe), processes=fitted.processes)
    elif not processes.is_main():
        return None
    template = None
    if preset.prompts == "template":
        template = [data.template.format(name.replace("_", " ")) for name in data.names]
    result.update(
        measure(built, evaluated, options.eval_batch, template=template, skip_bad=options.skip_bad), **count(built)
    )
    result["parameters"] = {
        "prompts": 0 if template else built.learner.ctx.numel(),
        "cross_tokens": 0 if built.attached is None else sum(p.numel() for p in built.attached.parameters()),
    }
    described = {
        **asdict(run), "r": setting.r[run.percent] if preset.swept else 0, "split": options.split,
        "model": options.model or setting.model, "shots": options.shots, "context": options.context,
        "class_specific": options.class_specific, "data": fingerprints, **origin,
    }  # fmt: skip
    if preset.prompts == "coop":
        described["prompts_sha256"] = file_digest(prompts_file(options, run.base))
    return {"run": described, "result": result}


def load(options: Options) -> Callable[[Run], Json | None]:
    """Return the function that trains and measures one run."""
    dataset, weights = datasets.read(options.dataset, options.data), options.weights
    origin = {"weights": weights and {"file": weights.name, "sha256": file_digest(weights)}}
    return lambda run: execute(options, run, dataset, origin)


def select(run: Run) -> dict[str, Any]:
    """Return the options that choose one run alone."""
    strength = {"percent": (run.percent,)} if PRESETS[run.preset].swept else {}
    return {"presets": (run.preset,), "seeds": (run.seed,), **strength}


def without_prompts(options: Options, runs: list[Run]) -> list[Run]:
    """Return the runs whose result is of no use to the rows that start from their prompts, because these are gone."""
    return [run for run in runs if run.preset == "coop" and not prompts_file(options, run).is_file()]


STUDY = Study("coop", Options, grid, load, select, repeated=without_prompts)
