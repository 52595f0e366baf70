"""`crossget demo`: a model dense, and reduced by Ward, ToMe-style merging and CrossGET, side by side.

Photographs go through the dense model and through each reduced one (`Row`). The results become a table, a JSON file and
a picture. Ward comes first, as the method for models that were not trained for reduction. It removes a share of the
tokens that rises from block to block, at the FLOPs of ToMe-style merging with `r` tokens per block.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from crossget.core import files
from crossget.core.attach import attach, find_towers
from crossget.core.attachment import Attachment
from crossget.demo import figures
from crossget.demo.backbones import DEFAULT, Backbone, make
from crossget.demo.outputs import MARK, NUMBERS, PICTURE, check_output, save_figure
from crossget.measure.environment import environment
from crossget.measure.fit import fit_schedule
from crossget.measure.flops import count_flops, count_once
from crossget.measure.speed import DENSE, BenchmarkReport, benchmark
from crossget.methods.reducers import CrossGET, Reducer, ToMe, Ward
from crossget.methods.schedules import Aligned, Ratio, Schedule, as_schedule

if TYPE_CHECKING:
    from PIL.Image import Image

WARD, TOME, CROSSGET = METHODS = "Ward", "ToMe-style", "CrossGET"
VISUAL, TEXT = "visual", "text"
Reduction = int | Sequence[int] | Schedule
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_IMAGES = 32  # of a folder
MAX_16_BITS = 2**16 - 1
MAX_SHOWN = 4  # in the picture
MEASURING_SECONDS = 30.0
NO_WEIGHTS = (
    "random weights, so no similarity is shown: --checkpoint FILE loads your own weights, --pretrained TAG the host's"
)
# Captions of things that are in no photograph, as wrong answers of the zero-shot classification.
DISTRACTORS = ("a photo of a dog", "a photo of a street full of cars", "a photo of a bowl of fruit", "a map of a city")


@dataclass(frozen=True)
class Photograph:
    """A photograph.

    Attributes:
        name: short, for tables.
        caption: its content, in the form of CLIP's prompts.
        credit: its author and licence; empty for the user's own.
        image: the pixels.
    """

    name: str
    caption: str
    credit: str
    image: Image


# Photographs in scikit-image's wheel (skimage/data); authors and licences as its documentation states them.
SHIPPED = (
    ("chelsea.png", "a photo of a cat", "Stefan van der Walt, CC0"),
    ("coffee.png", "a photo of a cup of coffee", "Rachel Michetti, Pikolo Espresso Bar, CC0"),
    ("rocket.jpg", "a photo of a rocket launch", "SpaceX (DSCOVR on Falcon 9), public domain"),
    ("astronaut.png", "a photo of an astronaut", "NASA (Eileen Collins), public domain"),
)


@dataclass(frozen=True)
class CompareOptions:
    """Options of `crossget demo`.

    Attributes:
        model: a name of open_clip or timm.
        r: tokens to remove per block of the vision tower; Ward is fitted to the FLOPs of ToMe-style with this r.
        text_r: the same for the text tower; 0 leaves it dense.
        checkpoint: a file of weights, see `crossget.demo.backbones.make`.
        pretrained: a tag of the host, see there.
        images: a folder of photographs; None uses those of scikit-image.
        batch: images per call in the speed measurement.
        rounds: of the speed measurement; 0 skips it, None runs for about half a minute.
        out: the picture to write, *.png, *.svg or *.pdf; None writes none. A file that no command wrote is not
            replaced.
        json: the JSON file to write, *.json; None writes none.
        device: where the model runs.
        seed: of random weights.
    """

    model: str = "ViT-B-16"
    r: Reduction = 16
    text_r: Reduction = 0
    checkpoint: Path | None = None
    pretrained: str = DEFAULT
    images: Path | None = None
    batch: int = 8
    rounds: int | None = None
    out: Path | None = Path("crossget_demo.png")
    json: Path | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("rounds", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} {value}: expected {least} or more")
        for name in ("checkpoint", "images"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                raise ValueError(f"--{name} {path}: no such file or folder")
        for name, suffixes in (("out", PICTURE), ("json", NUMBERS)):
            path = getattr(self, name)
            if path is not None:
                check_output(f"--{name}", path, suffixes)


@dataclass
class Row:
    """The results of one method, or of the dense model.

    Attributes:
        name: the method.
        tokens: tokens entering each block, per tower.
        gflops: of one image, or of one image with its caption where the text tower is reduced too.
        parameters: number of parameters that the method adds.
        cosine: mean cosine similarity with the dense model's features, per kind of feature; empty for random weights.
        captions: [photographs, captions] zero-shot probabilities as nested lists; empty without a text tower and for
            random weights.
        images_per_second: measured; None if not.
        speed: the same as a ratio to dense.
        speed_quartiles: first and third quartile of `speed` over the rounds.
        peak_memory: in bytes on top of weights and inputs.
        sources: by block, [B, T0] the token that each input token is in after it; the middle and the last block.
    """

    name: str
    tokens: dict[str, list[int]]
    gflops: float
    parameters: int
    cosine: dict[str, float]
    captions: list[list[float]] = field(default_factory=list)
    images_per_second: float | None = None
    speed: float | None = None
    speed_quartiles: tuple[float, float] | None = None
    peak_memory: int | None = None
    sources: dict[int, Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Comparison:
    """The results of all methods, and how they are shown.

    Attributes:
        options: of the command.
        backbone: the model.
        photographs: its inputs.
        rows: the results; the first row is the dense model's.
        notes: lines below the table.
        pixels: [B, H, W, 3] in 0 to 1, the photographs after the model's resizing and cropping.
        prefix: number of tokens before the first patch.
        grid: rows and columns of patches; None where the tokens are no grid, and no merges can be drawn.
        seconds: duration of the comparison.
    """

    options: CompareOptions
    backbone: Backbone
    photographs: list[Photograph]
    rows: list[Row]
    notes: list[str]
    pixels: Tensor
    prefix: int
    grid: tuple[int, int] | None
    seconds: float = 0.0

    @property
    def pairs(self) -> bool:
        """Whether the text tower is reduced too: an input is then an image with its caption."""
        return TEXT in self.rows[0].tokens

    def table(self) -> str:
        """The results as text."""
        parts = [self._heading(), self._costs(), self._tokens(), self._captions(), *(f"note: {n}" for n in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def to_json(self) -> str:
        """The results as JSON, with the environment of the measurement."""
        backbone = {
            "name": self.backbone.name, "host": self.backbone.host, "weights": self.backbone.weights,
            "random_weights": self.backbone.random,
        }  # fmt: skip
        names = [f.name for f in dataclasses.fields(Row) if f.name != "sources"]
        rows = [{name: getattr(row, name) for name in names} for row in self.rows]
        options = dataclasses.asdict(self.options)
        content = {
            "origin": MARK, "command": shlex.join(["crossget", *sys.argv[1:]]),
            "backbone": backbone, "options": options, "methods": rows, "notes": self.notes,
            "photographs": [{"name": p.name, "caption": p.caption, "credit": p.credit} for p in self.photographs],
            "environment": environment(self.options.device), "seconds": round(self.seconds, 1),
        }  # fmt: skip
        return json.dumps(content, indent=2, default=str) + "\n"

    def picture(self) -> Any:
        """A matplotlib figure."""
        curves = [
            figures.Curve(row.name, row.tokens[VISUAL], row.gflops, row.cosine.get("image"), row.speed)
            for row in self.rows
        ]
        name = f"{self.backbone.host} {self.backbone.name}" + (" (random weights)" if self.backbone.random else "")
        title = f"crossget demo: {name}, {r_text(self.options.r)} tokens removed per block (Ward: at ToMe-style's cost)"
        rows = self._panels()
        shown = self.photographs[: len(rows)]
        credits = "; ".join(f"{p.name}: {p.credit}" for p in shown if p.credit)
        footer = [
            *(["Right: patches merged into one token are outlined and drawn in their mean colour; they need not be "
               "adjacent. Patches that are not merged are unchanged."] if rows else []),
            *([f"Photographs: {credits}"] if credits else []),
        ]  # fmt: skip
        item = "image-caption pair" if self.pairs else "image"
        return figures.draw_summary(figures.Summary(title, self._weights(), curves, rows, item, footer))

    def _weights(self) -> str:
        if self.backbone.random:
            return "Random weights: costs only. The merged patches are not those of a trained model."
        name = self.backbone.weights if self.options.checkpoint is None else self.options.checkpoint.name
        return f"Weights: {name}; the cross tokens are untrained."

    def _heading(self) -> str:
        backbone, options = self.backbone, self.options
        text = f", {r_text(options.text_r)} per text block" if self.pairs else ""
        return (
            f"{backbone.title}, {r_text(options.r)} tokens removed per block{text} (Ward: at ToMe-style's cost); "
            f"{len(self.photographs)} photographs, {options.device}, batch {options.batch}"
        )

    def _costs(self) -> str:
        unit = "image + caption" if self.pairs else "image"
        kinds = list(self.rows[0].cosine)
        headers = ["method", f"GFLOPs per {unit}", "parameters added", "speed to dense", "images/s", "peak memory",
                   *(f"{kind} cosine to dense" for kind in kinds)]  # fmt: skip
        dense = self.rows[0].gflops
        body = [
            [
                row.name,
                f"{row.gflops:.2f}" + ("" if row is self.rows[0] else f" ({row.gflops / dense - 1:+.0%})"),
                f"{row.parameters:,}",
                _speed(row),
                "-" if row.images_per_second is None else f"{row.images_per_second:.1f}",
                "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB",
                *(f"{row.cosine[kind]:.3f}" for kind in kinds),
            ]
            for row in self.rows
        ]
        headers = [_two_lines(header) for header in headers]
        table = tabulate(body, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1))
        if self.rows[0].speed is None:
            return table
        return f"{table}\nspeed: median of the rounds [quartiles]; memory: of one batch, on top of weights and inputs"

    def _tokens(self) -> str:
        body = [
            [row.name if len(row.tokens) == 1 else f"{row.name}, {tower}", " ".join(f"{n:3d}" for n in counts)]
            for tower in self.rows[0].tokens
            for row in self.rows
            for counts in [row.tokens[tower]]
        ]
        return tabulate(body, ["", "tokens entering each block"], disable_numparse=True)

    def _captions(self) -> str:
        if not self.rows[0].captions:
            return ""
        body = []
        for i, photograph in enumerate(self.photographs):
            body.append([photograph.name, photograph.caption, *(_verdict(row.captions[i], i) for row in self.rows)])
        headers = ["zero-shot", "its caption", *(row.name for row in self.rows)]
        choices = len(self.photographs) + len(DISTRACTORS)
        rows = body[: 2 * MAX_SHOWN]
        return tabulate(rows, headers) + f"\nprobability of the photograph's own caption among {choices}"

    def _panels(self) -> list[list[figures.Panel]]:
        if self.grid is None:
            return []
        return [self._row_of_panels(i, self.grid) for i in range(min(len(self.photographs), MAX_SHOWN))]

    def _row_of_panels(self, i: int, grid: tuple[int, int]) -> list[figures.Panel]:
        image, reduced = self.pixels[i], self.rows[1:]
        panels = [figures.Panel(image, _shorten(self.photographs[i].name, 28))]
        for depth in reduced[0].sources:
            for row in reduced:
                source = row.sources[depth][i]
                colour = figures.colour_of(row.name)
                left = len(source[self.prefix :].unique())
                # The captions of the first row serve as column titles: token counts are the same for all photographs.
                head = f"{row.name}, after block {depth}:\n{left} tokens for {grid[0] * grid[1]} patches"
                drawn = figures.merge_map(image, source, grid, self.prefix, outline=colour)
                panels.append(figures.Panel(drawn, head if i == 0 else "", colour))
        return panels


def run(options: CompareOptions, log: Callable[[str], None] = print) -> Comparison:
    """Run the comparison, and write the files that the options name.

    Args:
        options: of the command.
        log: called with lines for the user.

    Raises:
        ValueError, TypeError, RuntimeError: the request cannot be carried out; the message says what can.
    """
    start = time.perf_counter()
    if options.out is not None:
        figures.require_matplotlib()
    photographs = load_photographs(options.images)
    with _steps(3 + 2 * len(METHODS) + (options.rounds != 0) + (options.out is not None)) as step:
        step(f"making {options.model}")
        backbone = make(options.model, pretrained=options.pretrained, checkpoint=options.checkpoint,
                        device=options.device, seed=options.seed)  # fmt: skip
        if backbone.random_reason:
            log(f"{backbone.random_reason}: random weights are used")
        demo = _Comparer(options, backbone, photographs).demo(step)
        demo.seconds = time.perf_counter() - start
        if options.out is not None:
            step("drawing")
            save_figure(demo.picture(), options.out)
    if options.json is not None:
        files.write_text(options.json, demo.to_json())
    return demo


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


def load_photographs(folder: Path | None) -> list[Photograph]:
    """The user's photographs, or those that scikit-image ships.

    Raises:
        ValueError: there is no image in the folder.
        RuntimeError: scikit-image is not installed, or lacks them.
    """
    if folder is None:
        return [_open_photograph(_shipped_folder() / name, caption, credit) for name, caption, credit in SHIPPED]
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: expected a folder of images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"--images {folder}: no image in it; looked for {', '.join(SUFFIXES)}")
    return [_open_photograph(path, f"a photo of {_words(path.stem)}", "") for path in paths[:MAX_IMAGES]]


def load_photograph(name: Path | None) -> Photograph:
    """One photograph: a file, or one of scikit-image's by its name; the first of these if None.

    Raises:
        ValueError: there is no such file or name, or Pillow cannot read it.
        RuntimeError: scikit-image is not installed, or lacks them.
    """
    if name is not None and name.is_file():
        return _open_photograph(name, f"a photo of {_words(name.stem)}", "")
    shipped = {Path(file).stem: (file, caption, credit) for file, caption, credit in SHIPPED}
    chosen = next(iter(shipped)) if name is None else str(name)
    if chosen not in shipped:
        raise ValueError(f"no image {chosen}: expected a file, or one of {', '.join(shipped)} (from scikit-image)")
    file, caption, credit = shipped[chosen]
    return _open_photograph(_shipped_folder() / file, caption, credit)


def _words(stem: str) -> str:
    return stem.replace("_", " ").replace("-", " ")


def read_image(file: Path | BinaryIO) -> Image:
    """A picture in RGB, turned as its EXIF data say.

    Raises:
        Exception: whatever the code that damaged bytes reach happens to raise.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
        with Image.open(file) as opened:
            return _upright(opened)


def _open_photograph(path: Path, caption: str, credit: str) -> Photograph:
    files.check_regular(path)
    try:
        image = read_image(path)
    except Exception as error:  # damaged bytes raise whatever the code that they reach happens to raise
        raise ValueError(f"{path} is not an image that Pillow can read: {error or type(error).__name__}") from error
    return Photograph(path.stem, caption, credit, image)


def _upright(image: Image) -> Image:
    """An image in RGB, turned as its EXIF data say.

    Raises:
        ValueError: its numbers are neither of 8 nor of 16 bits.
    """
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):  # convert() would cut these off at 255
        pixels = np.asarray(upright)
        if upright.mode == "F" or pixels.min() < 0 or pixels.max() > MAX_16_BITS:
            raise ValueError(f"its pixels go from {pixels.min()} to {pixels.max()}: expected 8 or 16 bits")
        upright = Image.fromarray((pixels * (255 / MAX_16_BITS)).round().astype(np.uint8))
    return upright.convert("RGB")


def _shipped_folder() -> Path:
    # find_spec does not import the package: its files are all that is needed.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError('no photographs: pip install "crossget[demo]", or give your own with --images FOLDER')
    folder = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name, _, _ in SHIPPED if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"{folder} lacks {', '.join(missing)}: give photographs of your own with --images FOLDER")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


class _Comparer:
    """Runs a model, dense and reduced, on the same inputs."""

    def __init__(self, options: CompareOptions, backbone: Backbone, photographs: list[Photograph]) -> None:
        self.options, self.backbone, self.photographs = options, backbone, photographs
        self.notes: list[str] = []
        self.r = schedules(backbone, options.r, options.text_r)
        (self.tower,) = (tower for tower in find_towers(backbone.model) if tower.name == VISUAL)
        self.images = torch.stack([backbone.preprocess(p.image) for p in photographs]).to(options.device)
        self.ids = self._caption_ids()

    def demo(self, step: Callable[[str], None]) -> Comparison:
        """The results; no files are written."""
        step("dense")
        rows = [self._dense()]
        step(f"{WARD}: fitting")
        self.methods = reducers(self.backbone, self.r, self._inputs(1), self.notes.append)
        for name in METHODS:
            step(name)
            rows.append(self._reduced(name))
            step(f"{name}: counting")
            rows[-1].gflops = self._gflops(name)
        if self.options.rounds != 0:
            step("measuring")
            self._measure(rows)
        if self.backbone.random:
            self.notes.append(NO_WEIGHTS)
        pixels, prefix, grid = (
            denormalize(self.images, self.backbone.preprocess),
            self.tower.prefix,
            self._grid(rows[1]),
        )
        return Comparison(self.options, self.backbone, self.photographs, rows, self.notes, pixels, prefix, grid)

    def _grid(self, row: Row) -> tuple[int, int] | None:
        patches = int(next(iter(row.sources.values())).shape[1]) - self.tower.prefix
        try:
            return figures.patch_grid(patches, *(int(n) for n in self.images.shape[2:]))
        except ValueError as error:
            self.notes.append(f"no picture of merged patches: {error}")
            return None

    @property
    def _kinds(self) -> list[str]:
        """The features of the towers that are reduced."""
        return ["image", *(["text"] if TEXT in self.r else [])]

    def _dense(self) -> Row:
        self.dense = self._features()
        # r = 0 without cross token is the dense model, with its tokens counted.
        with attach(self.backbone.model, {tower: ToMe(r=0) for tower in self.r}) as attached, torch.no_grad():
            self.backbone.model(*self._inputs(1))
            tokens = attached.tokens
        gflops = count_once(self.backbone.model, self._inputs(1)).total / 1e9
        return Row(DENSE, tokens, gflops, 0, self._similarities(self.dense), self._choices(self.dense))

    def _reduced(self, name: str) -> Row:
        with attach(self.backbone.model, self.methods[name]) as attached:
            features = self._features()
            parameters = sum(p.numel() for p in attached.parameters())
            similarities = self._similarities(features)
            row = Row(name, attached.tokens, 0.0, parameters, similarities, self._choices(features))
            row.sources = self._sources(attached)
        return row

    @torch.no_grad()
    def _features(self) -> dict[str, Tensor]:
        features = {"image": self.backbone.image_features(self.images)}
        if self.ids is not None:
            features["text"] = self.backbone.text_features(self.ids)
        return features

    def _inputs(self, batch: int) -> tuple[Tensor, ...]:
        """The photographs, repeated to fill the batch; with their captions where the text tower is reduced too."""
        repeat = -(-batch // len(self.images))
        images = self.images.repeat(repeat, 1, 1, 1)[:batch]
        if TEXT not in self.r or self.ids is None:
            return (images,)
        return images, self.ids[: len(self.images)].repeat(repeat, 1)[:batch]

    def _caption_ids(self) -> Tensor | None:
        if not self.backbone.has_text_tower or (self.backbone.random and TEXT not in self.r):
            return None  # with random weights the zero-shot classification is not shown
        captions = [p.caption for p in self.photographs] + list(DISTRACTORS)
        try:
            return self.backbone.tokenize(captions)
        except ConnectionError as error:
            if TEXT in self.r:
                raise
            self.notes.append(f"no zero-shot classification: {error}")
            return None

    def _similarities(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Cosine similarity with the dense features; none for random weights, where it is close to 1 for any method."""
        return {} if self.backbone.random else {kind: _cosine(features[kind], self.dense[kind]) for kind in self._kinds}

    def _choices(self, features: Mapping[str, Tensor]) -> list[list[float]]:
        """Probabilities of the zero-shot classification; none for random weights."""
        if self.backbone.random or "text" not in features:
            return []
        scale = getattr(self.backbone.model, "logit_scale", None)
        images, texts = (F.normalize(features[kind].float(), dim=-1) for kind in ("image", "text"))
        logits = images @ texts.T * (100.0 if scale is None else float(scale.detach().exp()))
        return [[float(p) for p in row] for row in logits.softmax(-1)]

    def _gflops(self, name: str) -> float:
        """GFLOPs of the reduced model."""
        with attach(self.backbone.model, self.methods[name]) as attached:
            return count_once(self.backbone.model, self._inputs(1), attached.parameters()).total / 1e9

    @torch.no_grad()
    def _sources(self, attached: Attachment) -> dict[int, Tensor]:
        """The source maps of the last forward: after the last block, and, by another forward, after the middle one."""
        depth, whole = self.tower.depth, attached.reducers
        sources = {depth: attached.source[VISUAL][:MAX_SHOWN].cpu()}
        middle = max(1, depth // 2)
        attached.reducer = {
            **whole,
            VISUAL: dataclasses.replace(whole[VISUAL], r=_FirstBlocks(as_schedule(whole[VISUAL].r), middle)),
        }
        self.backbone.image_features(self.images[:MAX_SHOWN])
        return {middle: attached.source[VISUAL].cpu(), **sources}

    def _measure(self, rows: Sequence[Row]) -> None:
        report = measure(self.backbone.model, self._inputs(self.options.batch), self.methods, self.options.rounds)
        for row in rows:
            measured = report[row.name]
            row.images_per_second, row.peak_memory = measured.images_per_second, measured.peak_memory
            row.speed, row.speed_quartiles = measured.median_speed, measured.speed_quartiles


def schedules(backbone: Backbone, r: Reduction, text_r: Reduction) -> dict[str, Reduction]:
    """What each tower removes; the text tower is left out where it removes nothing.

    Raises:
        ValueError: the model has no such tower.
    """
    wanted = {VISUAL: r}
    if any(text_r) if isinstance(text_r, Sequence) else text_r != 0:
        wanted[TEXT] = text_r
    found = [tower.name for tower in find_towers(backbone.model)]
    who = f"{backbone.host} {backbone.name}"
    for name, option in ((VISUAL, "--r"), (TEXT, "--text-r")):
        if name in wanted and name not in found:
            raise ValueError(
                f"{option} is for a {name} tower, and of {who} only {' and '.join(found)} can be reduced: "
                "choose another model (`crossget models`)" + (" or leave it out" if name == TEXT else "")
            )
    return wanted


def reducers(
    backbone: Backbone, wanted: Mapping[str, Reduction], inputs: tuple[Tensor, ...], note: Callable[[str], None]
) -> dict[str, dict[str, Reducer]]:
    """The reducers of the methods that are compared, per tower, at about the same cost.

    ToMe-style and CrossGET remove `r` tokens in every block. Ward removes a share of the tokens that rises from block
    to block, and needs at most as many multiply-adds as ToMe-style.

    Args:
        backbone: the model.
        wanted: what each tower removes, see `schedules`.
        inputs: an example of the model's inputs.
        note: called with a line where Ward cannot be fitted.
    """
    return {
        WARD: {tower: _ward(backbone.model, tower, r, inputs, note) for tower, r in wanted.items()},
        TOME: {tower: ToMe(r) for tower, r in wanted.items()},
        CROSSGET: {tower: CrossGET(r) for tower, r in wanted.items()},
    }


def _ward(
    model: nn.Module, tower: str, r: Reduction, inputs: tuple[Tensor, ...], note: Callable[[str], None]
) -> Reducer:
    """Ward at the FLOPs of ToMe-style with `r`, each reducing this tower alone."""
    with attach(model, {tower: ToMe(r)}):
        report = count_flops(model, inputs)
    share = min(1.0, report.total / report.dense.total)  # matching may cost more than it saves
    try:
        found = fit_schedule(model, inputs, flops=share, reducer=Ward(r=0), tower=tower, distribution="ramped")
    except ValueError as error:
        note(f"Ward is not fitted to ToMe-style's FLOPs in the {tower} tower; it removes r tokens per block: {error}")
        return Ward(r)
    return Ward(found.schedule)


def measure(
    model: nn.Module, inputs: tuple[Tensor, ...], methods: Mapping[str, Mapping[str, Reducer]], rounds: int | None
) -> BenchmarkReport:
    """`crossget.benchmark` with a progress bar that counts calls of the model.

    Args:
        model: as for `crossget.benchmark`.
        inputs: as for `crossget.benchmark`.
        methods: as for `crossget.benchmark`.
        rounds: None runs for about half a minute, with at least 3 and at most 20 rounds.
    """
    on_cpu = inputs[0].device.type == "cpu"
    rounds = _rounds_in_time(model, inputs, len(methods) + 1) if rounds is None else rounds
    warmup = 0 if on_cpu else 2  # each timed call follows an untimed one; GPUs need more, to select their kernels
    calls = (len(methods) + 1) * (2 * (rounds + warmup) + 2)
    with tqdm(total=calls, disable=None, leave=False, desc="measuring speed", unit=" calls") as bar:

        def count(*_: object) -> None:
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            return benchmark(model, inputs, rounds=rounds, warmup=warmup, methods=methods)
        finally:
            hook.remove()


@torch.no_grad()
def _rounds_in_time(model: nn.Module, inputs: tuple[Tensor, ...], turns: int) -> int:
    start = time.perf_counter()
    model(*inputs)
    if inputs[0].device.type != "cpu":
        torch.get_device_module(inputs[0].device).synchronize()
    elapsed = time.perf_counter() - start
    return int(min(max(MEASURING_SECONDS / (2 * turns * elapsed), 3), 20))


@dataclass(frozen=True)
class _FirstBlocks:
    """A schedule that removes nothing after the first blocks."""

    schedule: Schedule
    blocks: int

    def removed(self, layer: int, depth: int, tokens: int) -> int:
        return self.schedule.removed(layer, depth, tokens) if layer < self.blocks else 0


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.float(), b.float()).mean())


def denormalize(images: Tensor, preprocess: Any) -> Tensor:
    """[B, H, W, 3] in 0 to 1: images after the model's preprocessing, without its normalisation."""
    for transform in getattr(preprocess, "transforms", ()):
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            mean, std = (torch.as_tensor(v).to(images).reshape(-1, 1, 1) for v in (transform.mean, transform.std))
            images = images * std + mean
    return images.permute(0, 2, 3, 1).clamp(0, 1).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _verdict(probabilities: Sequence[float], right: int) -> str:
    best = max(range(len(probabilities)), key=lambda i: probabilities[i])
    return f"{probabilities[right]:.0%}" + ("" if best == right else " (another is higher)")


def _shorten(name: str, most: int) -> str:
    """A file name, its middle cut out where it is long."""
    return name if len(name) <= most else f"{name[: most - 9]}...{name[-6:]}"


def _speed(row: Row) -> str:
    if row.speed is None or row.speed_quartiles is None:
        return "-"
    low, high = row.speed_quartiles
    return f"{row.speed:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if row.name != DENSE else "")


def r_text(r: object) -> str:
    """`r` in the form of the command line."""
    if isinstance(r, Aligned):
        return f"{r_text(r.r)}/{r.n}"
    if isinstance(r, Ratio):
        return f"{100 * r.share:g}%"
    return ",".join(map(str, r)) if isinstance(r, tuple | list) else str(r)


def _two_lines(header: str) -> str:
    """Break a long column title in the middle."""
    words = header.split()
    if len(header) < 10 or len(words) == 1:
        return header
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]) + "\n" + " ".join(words[middle:])


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal and nothing elsewhere; call it with the name of the next step."""
    with tqdm(total=total, disable=None, leave=False, bar_format="{desc:<28} {bar:20} {n}/{total} {elapsed}") as bar:

        def step(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        yield step
