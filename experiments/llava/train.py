"""Visual instruction tuning of LLaVA-1.5 with CrossGET: `accelerate launch -m experiments.llava.train 7b --help`.

transformers' `Trainer` drives it; one process, several, DDP, FSDP2 and ZeRO-3 are options of `accelerate launch`. The
total loss is that of the language model plus the weighted alignment loss of the cross tokens. Everything is trained but
the image tower's own weights.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

import crossget
from crossget.core.files import replacing
from crossget.core.saving import write
from experiments.lib import processes
from experiments.llava.conversation import IGNORED, Encoder
from experiments.llava.data import Collator, Conversations, GroupedSampler, read_samples

CROSS = "crossget."  # what begins the names of the cross tokens among the model's parameters


@dataclass(frozen=True)
class Options:
    """The recipe. What the presets do not say is the reference's for both sizes."""

    model: str
    """LLaVA-1.5 in transformers' format: a folder, or the id of a repository on the Hugging Face hub."""
    data: Path
    """llava_v1_5_mix67k.json, of make_mix67k."""
    images: Path
    """Folder that the images' paths begin in."""
    out: Path
    """Where checkpoints, logs and the trained model go. A run that stopped goes on from the last checkpoint there."""
    alignment: float
    """Weight of the alignment loss."""
    r: int = 13
    """Tokens removed per block of the image tower."""
    batch: int = 16
    """Samples per forward and process; the reference has 8 processes."""
    accumulate: int = 1
    """Forwards per step."""
    lr: float = 2e-5
    """Highest learning rate of AdamW; it follows half a cosine."""
    weight_decay: float = 0.0
    """Of AdamW."""
    warmup: float = 0.03
    """Part of all steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    epochs: float = 1.0
    """Times the data is seen."""
    max_steps: int = -1
    """Steps after which the run ends, whatever the epochs are; -1: none."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Of the computation; weights are float32."""
    checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    limit: int = 2048
    """Longest sequence of the language model."""
    workers: int = 4
    """Processes that load data, per process that trains."""
    save_steps: int = 100
    """Steps between checkpoints; the last one is kept."""
    log_steps: int = 1
    """Steps between log entries."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """As transformers calls them: tensorboard, wandb, ..., none."""
    seed: int = 42
    """Of the order of the data."""
    skip_bad: bool = False
    """Put the next good sample in the place of a bad one, with a warning, instead of ending the run."""


def preset(size: str, alignment: float) -> Options:
    """Return the recipe of one size of LLaVA-1.5."""
    return Options(f"llava-hf/llava-1.5-{size}-hf", tyro.MISSING, tyro.MISSING, tyro.MISSING, alignment)


PRESETS = {
    "7b": ("LLaVA-1.5-7B", preset("7b", 0.001)),
    "13b": ("LLaVA-1.5-13B", preset("13b", 0.1)),
}


class Totals(NamedTuple):
    """What a step has, over all processes and forwards: labels to learn, and rows."""

    labels: int
    rows: int


class Objective:
    """Makes a model's forward return its two losses instead of its logits.

    They are computed inside of the forward, by hooks, because sharded parameters are whole there and nowhere else. The
    labels are taken from the forward after crossget has cut the prompts, and before the model makes a mean of its own.

    Args:
        model: LLaVA, attached and not yet wrapped for distributed training.
        attached: its attachment.
    """

    def __init__(self, model: nn.Module, attached: crossget.Attachment) -> None:
        self.attached = attached
        self.labels = torch.empty(0)
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Give the model its forward back."""
        for hook in self.hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.labels = kwargs.pop("labels")
        return args, kwargs

    def _after(self, model: nn.Module, args: Any, out: Any) -> dict[str, Tensor]:
        """{"language": sum over the labels, "alignment": mean over rows and blocks}, both []."""
        labels = self.labels[:, 1:]
        learnt = labels != IGNORED
        language = cross_entropy(out.logits[:, :-1][learnt].float(), labels[learnt], reduction="sum")
        return {"language": language, "alignment": self.attached.alignment_loss()}


class InstructionTrainer(Trainer):
    """transformers' trainer with the total loss, the order of the data, and one log entry per loss.

    The language model's loss is the mean over all labels of a step, the alignment loss the mean over all its rows,
    however the step is divided into processes and forwards. (The original takes the mean per forward and process.)

    Args:
        weight: of the alignment loss.
        given: as for `Trainer`; the model has an `Objective`.
    """

    def __init__(self, weight: float, **given: Any) -> None:
        super().__init__(**given)
        self.weight = weight
        self.parts = torch.zeros(3)  # since the last log entry: both losses, and steps
        self.model_accepts_loss_kwargs = True  # compute_loss scales with what get_batch_samples has counted

    def get_batch_samples(self, *given: Any) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(*given)
        self.parts[2] += bool(batches)  # older versions ask once more at the end of an epoch
        return batches, self._count(batches)

    def _count(self, batches: list[dict[str, Tensor]]) -> Totals:
        labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        rows = sum(len(batch["labels"]) for batch in batches)
        counts = torch.tensor([[labels, rows]], device=self.accelerator.device)
        total = self.accelerator.gather(counts).sum(0).tolist()
        return Totals(max(1, total[0]), max(1, total[1]))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this forward's share of the step's loss, for gradients that are averaged over the processes."""
        totals: Totals = num_items_in_batch or self._count([inputs])
        rows = len(inputs["labels"])
        out = model(**inputs)
        share = self.accelerator.num_processes
        language = out["language"] * (share / totals.labels)
        alignment = out["alignment"] * (share * rows / totals.rows)
        self.parts[:2] += torch.stack([language, alignment]).detach().cpu()
        loss = language + self.weight * alignment
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        if "loss" in logs:  # not the summary at the end
            language, alignment, steps = self.parts.tolist()
            mine = torch.tensor([[language / steps, alignment / steps]], device=self.accelerator.device)
            both = self.accelerator.gather(mine).mean(0).tolist()
            logs = {**logs, "language_loss": both[0], "alignment_loss": both[1]}
            self.parts.zero_()
        super().log(logs, *given, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint's weights, by their names in the model.

        From its version 4.52 on, transformers renames LLaVA's weights when it saves them, and a resumed `Trainer` does
        not find them again: it would go on from the weights it started with, with a warning.
        """
        if not self.args.should_save:
            return
        model: Any = self.model
        folder = Path(output_dir or str(self.args.output_dir))
        state = model.state_dict() if state_dict is None else state_dict
        with replacing(folder / SAFE_WEIGHTS_NAME) as part:
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, part)

    def _get_train_sampler(self, *given: Any) -> GroupedSampler:
        forwards = self.args.world_size * self.args.gradient_accumulation_steps
        data: Any = self.train_dataset
        return GroupedSampler(data.lengths(), self.args.train_batch_size, forwards, self.args.seed)


def prepare(model: Any, r: int) -> crossget.Attachment:
    """Attach CrossGET to LLaVA for training: all is trained but the image tower's own weights."""
    model.config.use_cache = False
    model.requires_grad_(True)
    tower = next(m for name, m in model.named_modules() if name.endswith("vision_tower"))
    tower.requires_grad_(False)
    attached = crossget.attach(model, crossget.CrossGET(r=r))
    attached.register_parameters(model)
    # What FSDP2 shards one by one. transformers' own list names classes that this model does not have.
    model._no_split_modules = sorted({type(b).__name__ for t in attached.towers.values() for b in t.blocks})
    return attached


def arguments(options: Options, samples: int) -> TrainingArguments:
    """Return the options as transformers takes them."""
    on_gpu = torch.cuda.is_available()
    # What transformers 5 calls otherwise.
    newer = int(transformers.__version__.split(".")[0]) >= 5
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation" if "activation_checkpointing" in fields else "gradient"
    named: dict[str, Any] = {
        "warmup_steps" if newer else "warmup_ratio": options.warmup,
        f"{checkpointing}_checkpointing": options.checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
    }
    made = TrainingArguments(
        output_dir=str(options.out), seed=options.seed, use_cpu=not on_gpu,
        per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs, max_steps=options.max_steps, learning_rate=options.lr,
        weight_decay=options.weight_decay, lr_scheduler_type="cosine", max_grad_norm=options.clip, optim="adamw_torch",
        bf16=options.precision == "bf16", fp16=options.precision == "fp16",
        tf32=True if on_gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        save_steps=options.save_steps, save_total_limit=1, logging_steps=options.log_steps,
        logging_nan_inf_filter=False, report_to=list(options.loggers), dataloader_num_workers=options.workers,
        remove_unused_columns=False, ddp_find_unused_parameters=False,
        **named,
    )  # fmt: skip
    step = options.batch * options.accumulate * made.world_size
    if samples < step:
        raise ValueError(
            f"{samples} samples in {options.data} are less than one step, {options.batch} x {options.accumulate} on "
            f"{made.world_size} processes: give more data or a smaller --batch"
        )
    return made


def save(trainer: InstructionTrainer, attached: crossget.Attachment, processor: Any, folder: Path) -> None:
    """Write the trained model as transformers and `crossget.load` read it; every process has to call it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        cross = {name.removeprefix(CROSS): value for name, value in state.items() if name.startswith(CROSS)}
        rest = {name: value for name, value in state.items() if not name.startswith(CROSS)}
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.config.use_cache = True
        # In a model of its own: one that ZeRO-3 sharded while it was loaded saves its weights by wrong names.
        unset_hf_deepspeed_config()
        with torch.device("meta"):
            own = type(model)(model.config)
        own.load_state_dict(rest, assign=True)
        own.generation_config = model.generation_config
        own.save_pretrained(folder)
        write(folder, attached.reducers, cross)
        processor.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest whole checkpoint; None if there is none.

    The trainer's state is the last file of a checkpoint that transformers writes.
    """
    whole = [
        path.parent for path in out.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if path.parent.name[11:].isdecimal()
    ]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


@processes.ending_group
def main(options: Options) -> InstructionTrainer:
    """Train, from the last checkpoint if there is one, and write the trained model to `options.out`."""
    samples = read_samples(options.data, options.skip_bad)
    training = arguments(options, len(samples))  # before the model: ZeRO-3 shards it while it is loaded
    transformers.set_seed(options.seed)
    processor = AutoProcessor.from_pretrained(options.model)
    model: Any = LlavaForConditionalGeneration.from_pretrained(options.model, torch_dtype=torch.float32)
    attached = prepare(model, options.r)
    encoder = Encoder(processor.tokenizer, model.config.image_token_index, options.limit)
    written, reaching = attached.image_tokens
    data = Conversations(
        samples, options.images, encoder, processor.image_processor, written, reaching, options.skip_bad
    )
    pad = processor.tokenizer.pad_token_id
    objective = Objective(model, attached)
    trainer = InstructionTrainer(
        options.alignment, model=model, args=training, train_dataset=data,
        data_collator=Collator(0 if pad is None else pad), processing_class=processor,
    )  # fmt: skip
    last = last_checkpoint(options.out)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    save(trainer, attached, processor, options.out)
    objective.remove()
    return trainer


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))
