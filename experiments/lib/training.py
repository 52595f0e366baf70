"""The training loop of retrieval, CoOp and the ablation.

Accelerate drives it, so that processes and sharding are launch options.

A *task* is a module whose `forward` takes a batch and returns its losses as a dict with a key "loss"; everything that
depends on parameters happens in there, because DDP and FSDP2 know no other place. Data is drawn as (epoch, index): what
a sample looks like depends on nothing else, so that any number of processes sees the same batches and a run that was
stopped goes on as if it had not been.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

import crossget
from crossget.core import files
from experiments.lib.data import Batch, Dataset, Draw, generator

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    epochs: int
    """Times the data is seen."""
    batch: int
    """Samples per forward, over all processes together."""
    lr: float
    """Learning rate at the start."""
    weight_decay: float = 0.0
    """Of all parameters, as in the reference."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """SGD has momentum 0.9."""
    schedule: Literal["cosine", "cosine_by_epoch", "constant"] = "cosine"
    """To zero along a half cosine, in every step or once per epoch."""
    warmup: float = 0.0
    """Epochs at the start; with `warmup_lr` at that rate, otherwise linearly from zero."""
    warmup_lr: float | None = None
    """Constant rate of the warm-up."""
    accumulate: int = 1
    """Batches per step of the optimiser."""
    clip: float | None = None
    """Largest norm of the gradient."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """By beginning of a parameter's name: factor of its learning rate."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    seed: int = 0
    """Of the order and augmentation of samples."""
    workers: int = 0
    """Processes that load data."""
    save_every: int = 0
    """Steps between checkpoints that a stopped run goes on from; 0: at the end of each epoch."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, as a factor of `lr`."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup:
            return (
                self.warmup_lr / self.lr if self.warmup_lr is not None else (epoch + 1 / steps_per_epoch) / self.warmup
            )
        if self.schedule == "constant":
            return 1.0
        done = math.floor(epoch - self.warmup) / self.epochs
        if self.schedule == "cosine":
            done = min(1.0, (epoch - self.warmup) / (self.epochs - self.warmup))
        return (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What the programs let their users change of a recipe, and where they keep what they do not report."""

    epochs: int | None = None
    """Other than the recipe's."""
    batch: int | None = None
    """Other than the recipe's; over all processes."""
    lr: float | None = None
    """Other than the recipe's."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Other than the recipe's."""
    accumulate: int | None = None
    """Batches per step, other than the recipe's."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    workers: int = 0
    """Processes that load data."""
    save_every: int = 0
    """Steps between checkpoints; 0: one at the end of each epoch."""
    skip_bad: bool = False
    """Put the next good sample in the place of a bad one, with a warning, instead of stopping."""
    trackers: tuple[str, ...] = ()
    """Loggers: tensorboard, wandb, ..."""
    overwrite: bool = False
    """Run again what has a result file."""

    @property
    def changes(self) -> dict[str, Any]:
        """What is other than the recipe's."""
        values = {name: getattr(self, name) for name in ("epochs", "batch", "lr", "precision", "accumulate")}
        return {name: value for name, value in values.items() if value is not None}

    def applied(self, recipe: Recipe, seed: int) -> Recipe:
        """Return the recipe with what is changed of it."""
        return replace(
            recipe, seed=seed, checkpointing=self.checkpointing, workers=self.workers, save_every=self.save_every,
            **self.changes,
        )  # fmt: skip

    def words(self) -> list[str]:
        """Return what repeats these changes on a command line."""
        words = [word for name, value in self.changes.items() for word in (f"--{name}", str(value))]
        return [*words, "--checkpointing"] if self.checkpointing else words


class Shuffled(torch.utils.data.Sampler[Draw]):
    """An epoch's samples, in an order that the seed and the epoch decide: `used` of all `size`."""

    def __init__(self, size: int, used: int, seed: int) -> None:
        self.size, self.used, self.seed, self.epoch = size, used, seed, 0

    def __len__(self) -> int:
        return self.used

    def __iter__(self) -> Iterator[Draw]:
        order = torch.randperm(self.size, generator=generator(self.seed, self.epoch))
        return iter([(self.epoch, index) for index in order[: self.used].tolist()])


@dataclass(frozen=True)
class Fitted:
    """What a training run leaves.

    Attributes:
        history: of each epoch, the mean of every loss.
        steps: the loss of each step since the call, the mean over all processes.
        state: the task's parameters and buffers, whole and on the CPU, however they were sharded. On the main process.
        processes: how many trained.
    """

    history: list[dict[str, float]]
    steps: list[float]
    state: dict[str, Tensor]
    processes: int


@dataclass
class Progress:
    """How far a run is; saved with its checkpoints, as JSON.

    Attributes:
        epoch: the epoch that is trained, from 0.
        batch: batches of it that are done.
        step: steps that are done.
        history: of each epoch that is done, the mean of every loss.
        sums: of this epoch, the sum of every loss.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Progress":
        """Return what was saved.

        Raises:
            ValueError: the file is damaged.
        """
        content = files.read_json(file)
        counts = [content.get(name) for name in ("epoch", "batch", "step")]
        history, sums = content.get("history"), content.get("sums")
        losses = [*history, sums] if isinstance(history, list) else [None]
        good = all(isinstance(one, dict) and {type(v) for v in one.values()} <= {int, float} for one in losses)
        if len(content) != 5 or not all(type(count) is int and count >= 0 for count in counts) or not good:
            raise ValueError(f"{file} is not the progress of a run: {content}")
        return cls(**content)


def fit(
    task: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter]],
    data: Dataset,
    collate: Callable[[list[Any]], Batch],
    recipe: Recipe,
    folder: Path | None = None,
    *,
    trackers: Sequence[str] = (),
    name: str = "run",
) -> Fitted:
    """Train, from where an earlier call with the same folder stopped.

    Args:
        task: its forward takes what `collate` gives, as keyword arguments, and returns losses [] by name; "loss" is
            minimised.
        groups: from `parameter_groups`: what is trained, by name of the group.
        data: what a sample of it is depends on (epoch, index) only.
        collate: a batch from samples; tensors in it are moved to the device.
        recipe: how.
        folder: where checkpoints and logs go; None: nowhere.
        trackers: loggers that Accelerate knows, such as "tensorboard" and "wandb".
        name: how logs call it.

    Raises:
        ValueError: the data is less than a batch, or a batch cannot be split over the processes.
        FloatingPointError: the loss is not finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulate,
        # The batch is that of all processes together: what is learnt does not depend on how many there are.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(trackers) or None,
        project_dir=None if folder is None else str(folder),
    )
    per_step = recipe.batch * recipe.accumulate
    per_epoch = len(data) // per_step
    if per_epoch == 0 or recipe.batch % accelerator.num_processes:
        raise ValueError(
            f"{recipe.accumulate} x {recipe.batch} samples per step, from {len(data)} samples, on "
            f"{accelerator.num_processes} processes: there must be at least one step in an epoch, and a batch must be "
            "a multiple of the processes"
        )
    if recipe.checkpointing:
        enable_checkpointing(task)
    sampler = Shuffled(len(data), per_epoch * per_step, recipe.seed)
    loader: Any = torch.utils.data.DataLoader(
        cast(Any, data), recipe.batch, sampler=cast(Any, sampler), collate_fn=collate, num_workers=recipe.workers
    )
    optimizer = build_optimizer(task, groups, recipe)
    bases = [group["lr"] for group in optimizer.param_groups]
    model, optimizer, loader = accelerator.prepare(task, optimizer, loader)
    progress = Progress()
    if trackers:
        accelerator.init_trackers(name, config=_plain(recipe))
    checkpoints = None if folder is None else folder / "checkpoints"
    if checkpoints is not None and (latest := latest_checkpoint(checkpoints)) is not None:
        # Not among what Accelerate saves: it would read the progress from a pickle, whose code runs.
        progress = Progress.read(latest / PROGRESS)
        accelerator.load_state(str(latest))
    steps = []
    bar = tqdm(
        total=per_epoch * recipe.epochs, initial=progress.step, unit="step", desc=name,
        disable=None if accelerator.is_main_process else True,
    )  # fmt: skip
    model.train()
    for epoch in range(progress.epoch, recipe.epochs):
        sampler.epoch = epoch
        rest = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        for batch in rest:
            with accelerator.accumulate(model):
                for group, base in zip(optimizer.param_groups, bases, strict=True):
                    group["lr"] = base * recipe.factor(progress.step, per_epoch)
                losses = model(**batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and recipe.clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
            seen = accelerator.reduce({key: value.detach().float() for key, value in losses.items()}, "mean")
            values = {key: float(value) for key, value in seen.items()}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is {values['loss']} in step {progress.step}: {values}")
            for key, value in values.items():
                progress.sums[key] = progress.sums.get(key, 0.0) + value
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            steps.append(values["loss"])
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            accelerator.log({**values, "lr": optimizer.param_groups[0]["lr"]}, step=progress.step)
            if checkpoints is not None and recipe.save_every and progress.step % recipe.save_every == 0:
                save_checkpoint(accelerator, checkpoints, progress)
        progress.history.append({name: value / progress.batch for name, value in progress.sums.items()})
        progress.epoch, progress.batch, progress.sums = epoch + 1, 0, {}
        if checkpoints is not None and not recipe.save_every:
            save_checkpoint(accelerator, checkpoints, progress)
    bar.close()
    state = {key: value.detach().cpu() for key, value in accelerator.get_state_dict(model).items()}
    # Not end_training(): that ends the group of processes, too, and the next row of a queue needs it.
    for tracker in accelerator.trackers:
        tracker.finish()
    return Fitted(progress.history, steps, state, accelerator.num_processes)


def take(model: nn.Module, attached: crossget.Attachment | None, state: Mapping[str, Tensor]) -> None:
    """Load what `fit` gathered of a task's `model` into another one of its kind, cross tokens included.

    The model that was trained may lie in pieces on several processes.
    """
    if attached is not None:
        attached.register_parameters(model)
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    if attached is not None:
        attached.unregister_parameters()


def build_optimizer(task: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]], recipe: Recipe) -> Any:
    """Return the optimiser, with a group for each of `groups` and each factor of the learning rate in it."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    sorted_: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group, parameters in groups.items():
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"a parameter of the group {group!r} is not one of the task's: register the cross tokens first, "
                    "with attached.register_parameters(model)"
                )
            factor = next((f for start, f in recipe.lr_factors.items() if name.startswith(start)), 1.0)
            sorted_.setdefault((group, factor), []).append(parameter)
    settings = [
        {"params": parameters, "name": group, "lr": recipe.lr * factor}
        for (group, factor), parameters in sorted_.items()
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(settings, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)


def enable_checkpointing(task: nn.Module) -> None:
    """Turn on the gradient checkpointing of every host model in the task.

    Raises:
        ValueError: none of its modules has any.
    """
    found = False
    module: Any
    for module in task.modules():
        if hasattr(module, "gradient_checkpointing_enable"):  # transformers
            module.gradient_checkpointing_enable({"use_reentrant": False})
            found = True
        elif hasattr(module, "set_grad_checkpointing"):  # timm, open_clip
            with contextlib.suppress(NotImplementedError):
                module.set_grad_checkpointing()
                found = True
    if not found:
        raise ValueError(f"checkpointing=True: no part of {type(task).__name__} can recompute its activations")


def save_checkpoint(accelerator: Any, checkpoints: Path, progress: Progress) -> None:
    """Save the whole state, and then remove what was saved before: a stop in between leaves one of the two."""
    step = progress.step
    part = checkpoints / f"part-{step}"
    accelerator.save_state(str(part), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files.write_text(part / PROGRESS, json.dumps(asdict(progress)))
        part.replace(checkpoints / f"step-{step}")
        for folder in checkpoints.iterdir():
            if folder.name != f"step-{step}":
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest whole checkpoint; None if there is none."""
    return max(checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]), default=None)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in vars(recipe).items()
    }
