"""The command line: one dataclass of options per command, parsed by tyro; what a command computes lives elsewhere."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tabulate import tabulate
from tqdm import tqdm

import crossget
from crossget.checkpoints import convert, hf_sizes
from crossget.core.adapters import has_adapter
from crossget.demo import backbones, compare, connector_models, connector_view, embedding, transformers_models, viewer
from crossget.demo.compare import CompareOptions, Reduction
from crossget.demo.connector_view import ConnectorOptions
from crossget.demo.embedding import EmbedOptions
from crossget.demo.viewer import ViewerOptions
from crossget.integrations._support import SupportRow
from crossget.measure import generation
from crossget.methods.schedules import Aligned, Keep, Ratio, as_schedule

HELP = """\
usage: crossget COMMAND [OPTIONS]

Token reduction (Ward, ToMe-style, CrossGET) for models of timm, open_clip and transformers. A tour:

  crossget demo                         Ward, ToMe-style and CrossGET beside the dense model: a table and a picture
  crossget show photo.jpg               a web page that shows which patches are merged, block by block
  crossget models --filter '*dino*'     which models can be reduced, and why the others cannot
  crossget flops ViT-B-16 --r 16        multiply-adds by module, dense and reduced; needs no memory and no weights
  crossget flops llava-1.5-7b --r 13    the same for generation: image tower, prefill, decoding step, KV cache
  crossget flops qwen3-vl-8b --keep 0.25  the same with a quarter of the image features behind the connector
  crossget bench vit_base_patch16_224   speed as a ratio to dense, measured on this machine
  crossget doctor vit_base_patch16_224  checks that attaching is exact, takes effect, and can be undone
  crossget embed photos/ out/ --r 8     embeddings of millions of images in Parquet files, with Ray Data
  crossget convert FOLDER OUT           the authors' LLaVA checkpoint, for transformers and crossget.load

crossget COMMAND --help lists the options of a command; crossget --version prints the version.
In Python: crossget.attach(model, crossget.Ward(r=16)).
"""

MODEL_HELP = "a model name of open_clip or timm; where both have it, host:name"
R_FORMS = "a number (16), one per block (16,16,8,...) or a share of the tokens (10%)"
R_ALIGNED = "behind it, /16 leaves multiples of 16 tokens"
R_HELP = f"tokens to remove in each block: {R_FORMS}; {R_ALIGNED}"
KEEP_HELP = "image features that stay behind the connector of a model that generates: number or share"
SAMPLE_NAMES = ", ".join(Path(name).stem for name, _, _ in compare.SHIPPED)
SAMPLE_CREDITS = "; ".join(f"{Path(name).stem} by {credit}" for name, _, credit in compare.SHIPPED)


class ArgumentError(Exception):
    """The value of an option is wrong. No ValueError, which tyro would print over several lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 1 where a check failed; 2 where the request cannot be carried out; 130 after an interrupt.

    Raises:
        SystemExit: after a command's `--help` (code 0); for an unknown option and a missing argument (code 2).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if given[0] == "--version":
        print(f"crossget {crossget.__version__}")
        return 0
    try:
        return _parse(given).run()
    except BrokenPipeError:  # `crossget models | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ArgumentError, ValueError, TypeError, RuntimeError, OSError) as error:
        if "--traceback" in given:
            raise
        print(f"crossget: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> Command:
    classes: tuple[type[Command], ...] = (Demo, Show, Models, Flops, Bench, Doctor, Embed, Convert)
    commands: dict[str, Callable[..., Command]] = {cls.__name__.lower(): cls for cls in classes}
    command: Command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="crossget", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return command


# ---------------------------------------------------------------------------------------------------------------------
# Types of options


def parse_reduction(text: str) -> Reduction:
    """The value of --r.

    Raises:
        ValueError: the text has none of the forms, or a block cannot remove so many tokens.
    """
    whole, slash, n = text.partition("/")
    r: Reduction
    try:
        if whole.endswith("%"):
            r = Ratio(float(whole[:-1]) / 100)
        else:
            numbers = [int(part) for part in whole.split(",")]
            r = numbers[0] if len(numbers) == 1 else tuple(numbers)
        r = Aligned(r, int(n)) if slash else r
        as_schedule(r)
    except ValueError as error:
        reason = "" if "invalid literal" in str(error) or "could not convert" in str(error) else f" ({error})"
        raise ValueError(f"r is {text!r}: expected {R_FORMS}; {R_ALIGNED}{reason}") from None
    return r


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a count: expected a whole number from 1 up")
    return int(text)


def parse_keep(text: str) -> Keep:
    """The value of --keep.

    Raises:
        ValueError: it is neither a whole number from 1 on nor a share.
    """
    try:
        return Keep(int(text) if text.isdecimal() else float(text))
    except ValueError:
        expected = "expected a number of features that stay (64) or their share (0.25, at most 1.0)"
        raise ValueError(f"keep is {text!r}: {expected}") from None


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels, of HxW."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"image is {text!r}: expected height and width in pixels, as in 1036x1036")
    return int(height), int(width)


def _parse_device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise ValueError(f"{text!r} is not a device of torch: expected cpu, cuda, cuda:1 or mps") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {text!r}: torch finds no CUDA device on this machine")
    return text


def _from_word(parse: Callable[[str], Any], to_text: Callable[[Any], str] = str) -> Any:
    """How tyro reads the value of an option from one word of the command line, and prints its default."""

    def convert(words: list[str]) -> Any:
        try:
            return parse(words[0])
        except ValueError as error:
            raise ArgumentError(str(error)) from error

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [to_text(value)],
    )


def _option(help_text: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=help_text, metavar=metavar)


def _optional(help_text: str, metavar: str | None = None) -> Any:
    """An option whose default, None or False, is not worth printing."""
    return tyro.conf.arg(help=help_text, metavar=metavar, help_behavior_hint="")


_REDUCTION, _COUNT, _DEVICE, _KEEP, _SIZE = (
    _from_word(parse_reduction, compare.r_text),
    _from_word(_parse_count),
    _from_word(_parse_device),
    _from_word(parse_keep),
    _from_word(_parse_size),
)

Model = Annotated[str, tyro.conf.Positional, _option(MODEL_HELP, "MODEL")]
R = Annotated[Reduction, _REDUCTION, _option(R_HELP, "R")]
TextR = Annotated[Reduction, _REDUCTION, _option("the same for the text tower; 0 leaves it as it is", "R")]
Device = Annotated[str, _DEVICE, _option("where the model runs: cpu, cuda, cuda:1, mps", "DEVICE")]
Checkpoint = Annotated[Path | None, _optional("your own weights: a safetensors file or a state dict of torch", "FILE")]
Pretrained = Annotated[str, _option("weights of the host: 'default' tries its preferred ones, 'none' is random", "TAG")]
Seed = Annotated[int, _option("of random weights", "N")]
Batch = Annotated[int, _COUNT, _option("images per call in the speed measurement", "N")]
Rounds = Annotated[int | None, _optional("rounds of the speed measurement; if not given, about half a minute", "N")]
JsonFlag = Annotated[bool, _optional("print JSON")]


# ---------------------------------------------------------------------------------------------------------------------
# Commands. The docstring of a command is its help.


@dataclass(frozen=True)
class Command:
    """What all commands share."""

    traceback: Annotated[bool, _optional("show the traceback of an error")] = field(default=False, kw_only=True)

    def run(self) -> int:
        """Carry the command out and return the exit code."""
        raise NotImplementedError


@dataclass(frozen=True)
class Demo(Command):
    """Dense, Ward, ToMe-style and CrossGET side by side on photographs: a table and a picture.

    With random weights only the costs are shown: --checkpoint and --pretrained load trained ones.
    """

    model: Annotated[str, tyro.conf.Positional, _option(MODEL_HELP, "MODEL")] = CompareOptions.model
    r: R = CompareOptions.r
    text_r: TextR = CompareOptions.text_r
    checkpoint: Checkpoint = None
    pretrained: Pretrained = CompareOptions.pretrained
    seed: Seed = CompareOptions.seed
    images: Annotated[
        Path | None, _optional(f"a folder of photographs; if not given, scikit-image's: {SAMPLE_CREDITS}", "FOLDER")
    ] = None
    batch: Batch = CompareOptions.batch
    rounds: Rounds = None
    device: Device = CompareOptions.device
    out: Annotated[Path | None, _option("where the picture goes", "FILE")] = CompareOptions.out
    json: Annotated[Path | None, _optional("where the numbers go", "FILE")] = None

    def run(self) -> int:
        print(compare.run(_options(self, CompareOptions), log=_log).table())
        _log_written(self.out, self.json)
        return 0


@dataclass(frozen=True)
class Show(Command):
    """One photograph, block by block, as a web page in one file: which patches are merged, and what a forward costs.

    The page needs only a browser: no network and no other file.

    With a CLIP of open_clip, --text shows the similarity of each token to each text.

      crossget show cat.jpg --model ViT-B-16 --r 12 --text "a cat" "a cup" --out cat.html

    With --keep, a picture of what stays of the image behind the connector of a model that generates text, whose folder
    or hub id is --model. --text is then the question.

      crossget show cat.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25 --text "what is it?" --png cat.png
    """

    image: Annotated[
        Path | None,
        tyro.conf.Positional,
        _optional(f"a file, or a photograph of scikit-image: {SAMPLE_NAMES}", "IMAGE"),
    ] = None
    model: Annotated[str, _option(MODEL_HELP, "MODEL")] = ViewerOptions.model
    r: R = ViewerOptions.r
    methods: Annotated[tuple[viewer.Method, ...], _option("methods to show side by side")] = ("ward", "tome")
    text: Annotated[tuple[str, ...], _optional("texts to compare the tokens with", "TEXT [TEXT ...]")] = ()
    checkpoint: Checkpoint = None
    pretrained: Pretrained = ViewerOptions.pretrained
    seed: Seed = ViewerOptions.seed
    device: Device = ViewerOptions.device
    out: Annotated[Path, _option("where the page goes", "FILE")] = ViewerOptions.out
    png: Annotated[Path | None, _optional("the same as a picture", "FILE")] = None
    keep: Annotated[Keep | None, _KEEP, _optional(KEEP_HELP, "KEEP")] = None

    def run(self) -> int:
        if self.keep is not None:
            return self._run_connector(self.keep)
        report = viewer.run(_options(self, ViewerOptions), log=_log)
        dense = report.dense.count.total / 1e9
        for name, run in report.runs.items():
            tokens, gflops = run.tokens, run.count.total / 1e9
            print(f"{name}: {tokens[0]} to {tokens[-1]} tokens, {gflops:.3g} of {dense:.3g} GFLOPs")
        _log_written(self.out, self.png)
        return 0

    def _run_connector(self, keep: Keep) -> int:
        """A model that generates text from images."""
        for name in ("r", "checkpoint", "pretrained", "seed", "out"):
            if getattr(self, name) != getattr(ViewerOptions, name):
                raise ArgumentError(f"--{name} is for a model of open_clip or timm, and --keep for one that generates")
        if self.model == ViewerOptions.model:
            raise ArgumentError("--keep: give a folder or hub id of a model that generates text from images as --model")
        if self.png is None or len(self.text) > 1:
            raise ArgumentError("--keep draws a picture: give --png FILE, and one question as --text at most")
        question = self.text[0] if self.text else connector_view.QUESTION
        view = connector_view.run(
            ConnectorOptions(self.image, self.model, keep, self.methods, question, self.png, self.device), log=_log
        )
        for name, units in view.units.items():
            counts = ", ".join(f"{len(unit.source)} to {len(unit.kept)}" for unit in units)
            print(f"{name}: {counts} image features")
        _log_written(self.png)
        return 0


@dataclass(frozen=True)
class Models(Command):
    """Which models can be reduced, and why the others cannot.

    Every model is built on the meta device: seconds for a pattern, minutes for all of them. Of transformers, a tiny
    model of every family is built and run: half an hour for all of them. These need --host transformers or --filter;
    without either, the classes with an adapter are listed alone.

    With --connector, the families of transformers whose image features can be reduced behind the connector: minutes for
    all of them.
    """

    host: Annotated[
        Literal["timm", "open_clip", "transformers"] | None,
        _optional("only this host: timm, open_clip or transformers", "HOST"),
    ] = None
    filter: Annotated[str | None, _optional("only names like this; * is anything; quote it", "PATTERN")] = None
    connector: Annotated[bool, _optional("families of transformers that can be reduced behind the connector")] = False
    supported: Annotated[bool, _optional("leave out the models that cannot be reduced")] = False
    json: JsonFlag = False

    def run(self) -> int:
        if self.connector and self.host not in (None, "transformers"):
            raise ArgumentError(f"--connector is for models of transformers, and --host is {self.host}: leave one out")
        hosts = ["transformers"] if self.connector else [self.host] if self.host else _installed_hosts()
        rows = []
        for host in hosts:
            every = bool(self.host or self.filter)
            matrix = _connectors(self.filter) if self.connector else _support_matrix(host, self.filter, every)
            rows += [{"host": host, **dataclasses.asdict(row)} for row in matrix]
        if self.filter and not rows:
            raise ValueError(
                f"--filter {self.filter!r} matches no name: a pattern covers whole names, as '*dino*' does"
            )
        shown = [row for row in rows if row["supported"] or not self.supported]
        if self.json:
            print(json.dumps(shown, indent=2))
            return 0
        body = [[row["host"], row["name"], row["architecture"], _support(row)] for row in shown]
        print(tabulate(body, ["host", "name", "class", f"{'connector' if self.connector else 'towers'}, or why not"]))
        print(f"\n{sum(row['supported'] for row in rows)} of {len(rows)} can be reduced")
        return 0


@dataclass(frozen=True)
class Flops(Command):
    """Multiply-adds by module, dense and reduced, counted on the meta device.

    One multiply-add counts as one. Nothing is downloaded and nothing is computed, so any size works.

    The method is Ward by default. CrossGET needs its trained cross tokens: name it when you load some.
    """

    model: Annotated[
        str, tyro.conf.Positional, _option(f"{MODEL_HELP}; or of transformers: {', '.join(hf_sizes.PRESETS)}", "MODEL")
    ]
    method: Annotated[viewer.Method, _option("method that reduces the model")] = "ward"
    r: Annotated[Reduction | None, _REDUCTION, _optional(f"{R_HELP}; 16 if neither --r nor --keep is given", "R")] = (
        None
    )
    text_r: TextR = 0
    keep: Annotated[
        Keep | None,
        _KEEP,
        _optional(KEEP_HELP, "KEEP"),
    ] = None
    image: Annotated[
        tuple[int, int] | None,
        _SIZE,
        _optional("height and width in pixels, for a tower that takes images of any size; 1024x1024", "HxW"),
    ] = None
    tiles: Annotated[
        int | None, _COUNT, _optional("tiles of an image, for a model that cuts it into tiles; 1", "N")
    ] = None
    batch: Annotated[int, _COUNT, _option("images, and texts", "N")] = 1
    text_tokens: Annotated[int, _COUNT, _option("text tokens in the prompt of a model that generates", "N")] = 64
    depth: Annotated[int, _option("levels of modules to list; 0 prints the total alone", "N")] = 2
    json: JsonFlag = False

    def run(self) -> int:
        if self.model in hf_sizes.PRESETS:
            return self._run_transformers()
        self._refuse("is a tower")
        backbone = backbones.make(self.model, device="meta")
        reductions = compare.schedules(backbone, self._r, self.text_r)
        reducers = {tower: viewer.METHODS[self.method](r) for tower, r in reductions.items()}
        with crossget.attach(backbone.model, reducers):
            report = crossget.count_flops(
                backbone.model, backbone.random_inputs(self.batch, text=backbone.has_text_tower)
            )
        print(report.to_json() if self.json else report.table(self.depth))
        return 0

    @property
    def _r(self) -> Reduction:
        return 16 if self.r is None else self.r

    def _refuse(self, what: str) -> None:
        """Refuse the options that are for models that generate.

        Raises:
            ArgumentError: one is given.
        """
        for name in ("keep", "image", "tiles"):
            if getattr(self, name) is not None:
                raise ArgumentError(f"--{name} is for a model that generates text from images, and {self.model} {what}")

    def _run_transformers(self) -> int:
        """A model of transformers: by stages where it generates, otherwise one forward."""
        model: Any = hf_sizes.build(self.model)
        if generation.has_stages(model):
            return self._run_stages(model)
        self._refuse("does not generate")
        text, vision = model.config.text_config, model.config.vision_config
        ids = torch.zeros(self.batch, text.max_position_embeddings, dtype=torch.long, device="meta")
        pixels = torch.empty(self.batch, 3, vision.image_size, vision.image_size, device="meta")
        reductions = {"visual": self._r, **({"text": self.text_r} if self.text_r != 0 else {})}
        with crossget.attach(model, {tower: viewer.METHODS[self.method](r) for tower, r in reductions.items()}):
            report = crossget.count_flops(model, {"input_ids": ids, "pixel_values": pixels})
        print(report.to_json() if self.json else report.table(self.depth))
        return 0

    def _run_stages(self, model: Any) -> int:
        """A model that generates text from images."""
        if self.text_r != 0:
            raise ArgumentError(f"--text-r is for a text tower, and {self.model} has none that can be reduced")
        make = viewer.METHODS[self.method]
        reducer: Any = make(self._r)
        if self.keep is not None:
            behind: Any = self.keep
            reducer = {"connector": make(behind), **({} if self.r is None else {"visual": make(self.r)})}
        dense = self.keep is None and self.r is None and not has_adapter(model)  # its tower cannot be reduced here
        with nullcontext() if dense else crossget.attach(model, reducer):
            stages = generation.count_stages(
                model, self.text_tokens, self.batch, image_size=self.image, tiles=self.tiles
            )
        print(stages.to_json() if self.json else stages.table())
        return 0


@dataclass(frozen=True)
class Bench(Command):
    """Speed of dense, Ward (at ToMe-style's FLOPs), ToMe-style and CrossGET, with random inputs and random weights."""

    model: Model
    r: R = 16
    text_r: TextR = 0
    batch: Batch = 8
    rounds: Rounds = None
    device: Device = "cpu"
    json: JsonFlag = False

    def run(self) -> int:
        backbone = backbones.make(self.model, pretrained="none", device=self.device)
        reductions = compare.schedules(backbone, self.r, self.text_r)
        single = backbone.random_inputs(1, text=compare.TEXT in reductions)
        inputs = backbone.random_inputs(self.batch, text=compare.TEXT in reductions)
        report = compare.measure(
            backbone.model, inputs, compare.reducers(backbone, reductions, single, _log), self.rounds
        )
        print(report.to_json() if self.json else report.table())
        return 0


@dataclass(frozen=True)
class Doctor(Command):
    """Check on one model that attaching Ward is exact, takes effect and can be undone; exit code 1 if not."""

    model: Model
    device: Device = "cpu"

    def run(self) -> int:
        backbone = backbones.make(self.model, pretrained="none", device=self.device)
        inputs = backbone.random_inputs(2, text=backbone.has_text_tower)
        diagnosis = crossget.doctor(backbone.model, inputs, crossget.Ward(r=4))
        print(diagnosis)
        return 0 if diagnosis.ok else 1


@dataclass(frozen=True)
class Embed(Command):
    """Embed images with a reduced model, by Ray Data, on this machine or a cluster; OUT gets Parquet files.

    IMAGES is a folder of images, of Parquet files or of WebDataset shards (tar). Their kind is found by their names.

    A run that was stopped goes on when it is started again, and does nothing twice.

    Pictures that cannot be read have an error instead of an embedding. At the end they are counted, and dense and
    reduced embeddings of a sample are compared.

      crossget embed photos out --model ViT-B-16 --r 8 --device cuda
    """

    images: Annotated[str, tyro.conf.Positional, _option("a folder or a file; a path, or a URI of pyarrow", "IMAGES")]
    out: Annotated[str, tyro.conf.Positional, _option("the new folder, or that of a run to go on with", "OUT")]
    model: Annotated[str, _option(f"{MODEL_HELP}; or a folder of transformers", "MODEL")] = CompareOptions.model
    method: Annotated[viewer.Method | None, _optional("method that reduces the model; ward if not given", "METHOD")] = (
        None
    )
    r: Annotated[Reduction | None, _REDUCTION, _optional(f"{R_HELP}; 0 is the dense model", "R")] = None
    saved: Annotated[
        Path | None, _optional("what Attachment.save wrote (trained CrossGET), instead of --method and --r", "FOLDER")
    ] = None
    checkpoint: Checkpoint = None
    pretrained: Pretrained = EmbedOptions.pretrained
    seed: Seed = EmbedOptions.seed
    dtype: Annotated[embedding.DType, _option("of weights and computation")] = EmbedOptions.dtype
    id: Annotated[str | None, _optional("of Parquet files: the column whose values tell the rows apart", "COLUMN")] = (
        None
    )
    image: Annotated[str, _option("of Parquet files: the column with the images' files", "COLUMN")] = EmbedOptions.image
    actors: Annotated[int | None, _COUNT, _optional("processes that hold a model; one per CPU or GPU", "N")] = None
    batch: Annotated[int, _COUNT, _option("images of a forward", "N")] = EmbedOptions.batch
    device: Annotated[Literal["cpu", "cuda"], _option("cuda: each actor gets a GPU")] = EmbedOptions.device
    shard_rows: Annotated[int, _COUNT, _option("rows of an output file, at least", "N")] = EmbedOptions.shard_rows
    sample: Annotated[int, _option("images to compare dense and reduced embeddings of; 0: none", "N")] = (
        EmbedOptions.sample
    )
    address: Annotated[str | None, _optional("a Ray cluster; 'auto' on one of its machines", "ADDRESS")] = None

    def run(self) -> int:
        print(embedding.run(_options(self, EmbedOptions), log=_log))
        _log(f"wrote {self.out}")
        return 0


@dataclass(frozen=True)
class Convert(Command):
    """The authors' LLaVA checkpoint as a folder for transformers, with crossget's own file beside it.

    FOLDER is what the authors publish: config.json, the weights, and cross_tokens.bin (or these among the weights).

    LoRA has to be merged first. Without a tokenizer in FOLDER, no processor is written. Afterwards:

      model = transformers.LlavaForConditionalGeneration.from_pretrained("OUT")
      processor = transformers.AutoProcessor.from_pretrained("OUT")
      crossget.load(model, "OUT")
    """

    folder: Annotated[Path, tyro.conf.Positional, _option("in LLaVA's original layout", "FOLDER")]
    out: Annotated[Path, tyro.conf.Positional, _option("the new folder", "OUT")]
    r: Annotated[Reduction, _REDUCTION, _option(f"in the vision tower, {R_HELP}", "R")] = 13
    vision_tower: Annotated[
        str | None, _optional("a CLIP folder or hub id; if not given, what FOLDER's config.json names", "FOLDER")
    ] = None
    max_shard_size: Annotated[str, _option("of one file of weights, such as 500MB", "SIZE")] = "4GB"
    dtype: Annotated[
        Literal["keep", "float16", "bfloat16", "float32"], _option("of the new weights; keep: as in FOLDER")
    ] = "keep"
    no_cross_tokens: Annotated[bool, _optional("convert the dense LLaVA alone, without cross tokens")] = False
    overwrite: Annotated[bool, _optional("replace what an earlier conversion left in OUT")] = False

    def run(self) -> int:
        print(
            convert.convert(
                self.folder, self.out, r=self.r, vision_tower=self.vision_tower, max_shard_size=self.max_shard_size,
                dtype=convert.DTYPES.get(self.dtype), cross_tokens=not self.no_cross_tokens, overwrite=self.overwrite,
            )
        )  # fmt: skip
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share


def _options(command: Command, options: type[Any]) -> Any:
    """The fields of a command that another module's options have, as those options."""
    return options(**{field.name: getattr(command, field.name) for field in dataclasses.fields(options)})


def _installed_hosts() -> list[str]:
    found = [host for host in backbones.PACKAGES if backbones.installed(host)]
    if not found:
        extras = ",".join(backbones.PACKAGES.values())
        raise RuntimeError(f'none of {", ".join(backbones.PACKAGES)} is installed: pip install "crossget[{extras}]"')
    return found


def _support_matrix(host: str, pattern: str | None, every: bool) -> Iterator[SupportRow]:
    """The rows of a host's support matrix whose names match; `every`: also those that take long."""
    _check_installed(host)
    rows = importlib.import_module(f"crossget.integrations.{host}").support_matrix(pattern)
    if host == "transformers" and every:
        rows = transformers_models.with_adapters_first(rows, pattern)
    yield from tqdm(rows, desc=f"building the models of {host}", disable=None, leave=False, unit=" models")


def _connectors(pattern: str | None) -> Iterator[SupportRow]:
    """The families of transformers whose names match, behind the connector."""
    _check_installed("transformers")
    rows = connector_models.support_matrix([pattern or "*"])
    yield from (row.support() for row in tqdm(rows, desc="building models", disable=None, leave=False, unit=" models"))


def _check_installed(host: str) -> None:
    if not backbones.installed(host):
        raise RuntimeError(f'{host} is not installed: pip install "crossget[{backbones.PACKAGES[host]}]"')


def _support(row: dict[str, Any]) -> str:
    return "; ".join(row["towers"]) if row["supported"] else f"no: {row['reason']}"


def _log(line: str) -> None:
    """Print a line for the user on stderr, above progress bars."""
    tqdm.write(f"crossget: {line}", file=sys.stderr)


def _log_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            _log(f"wrote {path}")
