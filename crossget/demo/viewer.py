"""`crossget show`: one photograph, block by block, as a web page in one file.

Each method runs once on the photograph, inside `Attachment.recording`. The records become plain numbers
(`ViewerReport.data`), which the page show.html draws; `ViewerReport.picture` draws the same as a picture.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget import __version__
from crossget.core import files
from crossget.core.adapters import Tower
from crossget.core.attach import attach, find_towers
from crossget.core.attachment import Attachment
from crossget.core.state import BlockRecord
from crossget.demo import figures
from crossget.demo.backbones import DEFAULT, Backbone, make
from crossget.demo.compare import VISUAL, Photograph, Reduction, denormalize, load_photograph, r_text, schedules
from crossget.demo.outputs import PAGE, PICTURE, check_output, save_figure
from crossget.measure.flops import Count, count_once
from crossget.methods.reducers import CrossGET, Random, Reducer, ToMe, TopK, Ward

Method = Literal["ward", "crossget", "tome", "random", "topk"]
METHODS: Mapping[str, Callable[[Reduction], Reducer]] = {
    "ward": Ward,
    "crossget": CrossGET,
    "tome": ToMe,
    "random": Random,
    "topk": partial(TopK, importance=None),  # importance: class token, or attention where there is none
}
NAMES: Mapping[str, str] = {
    "ward": "Ward",
    "crossget": "CrossGET",
    "tome": "ToMe-style",
    "random": "Random",
    "topk": "TopK",
}
ABOUT: Mapping[str, str] = {
    "ward": "merges the tokens whose mean loses least",
    "crossget": "merges similar tokens, guided by a cross token",
    "tome": "merges the most similar tokens",
    "random": "merges at random",
    "topk": "drops the least important tokens",
}
MAX_METHODS, MAX_TEXTS = 4, 6
MAX_COLUMNS = 4  # blocks in the picture
DIGITS = 4  # of the numbers in the page
_SCRIPT = re.compile(r"<script>\n(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class ViewerOptions:
    """Options of `crossget show`.

    Attributes:
        image: a file, or the name of a photograph of scikit-image; None is the first of these.
        model: a name of open_clip or timm.
        r: tokens to remove per block of the image tower.
        methods: names from `METHODS`, shown side by side.
        text: texts to compare the tokens with; for models with a text tower.
        checkpoint: a file of weights, see `crossget.demo.backbones.make`.
        pretrained: a tag of the host, see there.
        out: the page to write, *.html. A file that no command wrote is not replaced.
        png: the picture to write, *.png, *.svg or *.pdf; None writes none.
        device: where the model runs.
        seed: of random weights.
    """

    image: Path | None = None
    model: str = "ViT-B-16"
    r: Reduction = 16
    methods: Sequence[str] = ("ward", "tome")
    text: Sequence[str] = ()
    checkpoint: Path | None = None
    pretrained: str = DEFAULT
    out: Path = Path("crossget_show.html")
    png: Path | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods {name}: choose from {', '.join(METHODS)}")
        for name, most in (("methods", MAX_METHODS), ("text", MAX_TEXTS)):
            given: Sequence[str] = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"--{name} {shlex.join(given)}: one of them is given twice")
            if len(given) > most:
                raise ValueError(f"--{name}: {len(given)} given, a page shows at most {most}")
        if not self.methods:
            raise ValueError(f"--methods: choose at least one of {', '.join(METHODS)}")
        if any(not text.strip() for text in self.text):
            raise ValueError("--text: a text is empty: give words such as 'a cat'")
        if self.checkpoint is not None and not self.checkpoint.exists():
            raise ValueError(f"--checkpoint {self.checkpoint}: no such file")
        check_output("--out", self.out, PAGE)
        if self.png is not None:
            check_output("--png", self.png, PICTURE)


@dataclass
class Run:
    """One forward of one method.

    Attributes:
        tokens: tokens entering each block, and those after the last one.
        records: one per block, of one image.
        count: multiply-adds of the forward.
        features: [E] the output feature of the image.
        groups: [blocks + 1, P] the group of each patch, see `crossget.demo.figures.follow_groups`.
    """

    tokens: list[int]
    records: list[BlockRecord]
    count: Count
    features: Tensor
    groups: Tensor


@dataclass
class ViewerReport:
    """The forwards of all methods on one photograph, and how they are shown.

    Attributes:
        options: of the command.
        backbone: the model.
        photograph: its input.
        tower: the image tower.
        pixels: [H, W, 3] in 0 to 1, the photograph after the model's resizing and cropping.
        grid: rows and columns of patches.
        texts: [texts, E] text features of unit length; None without texts.
        dense: the forward of the dense model.
        runs: the forward of each method.
    """

    options: ViewerOptions
    backbone: Backbone
    photograph: Photograph
    tower: Tower
    pixels: Tensor
    grid: tuple[int, int]
    texts: Tensor | None
    dense: Run
    runs: dict[str, Run]

    # Numbers ---------------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """What the page shows, as plain numbers and strings.

        `methods[m].blocks[l]` describes the tokens after block l. For each patch, row by row: `group` (its id;
        -1 if dropped), `size` (of its token), `score` (importance of the token that it entered the block in; None if
        not scored), and for each text `relevance` (cosine of its token with the text).
        """
        options, backbone = self.options, self.backbone
        return {
            "version": __version__,
            "command": self._command(),
            "model": {
                "name": backbone.name, "host": backbone.host, "weights": self._weights(), "random": backbone.random,
                "random_reason": backbone.random_reason,
            },
            "image": {
                "name": self.photograph.name, "credit": self.photograph.credit, "width": int(self.pixels.shape[1]),
                "height": int(self.pixels.shape[0]), "src": _data_uri(self.pixels),
                "patches": _patch_colours(self.pixels, self.grid),
            },
            "grid": list(self.grid),
            "prefix": self.tower.prefix,
            "r": r_text(options.r),
            "seed": options.seed,
            "palette": figures.GROUP_COLOURS,
            "texts": list(options.text),
            "dense": {
                **self._costs(self.dense),
                "accent": figures.colour_of("dense"),
                "similarity": self._similarity(self.dense),
                "relevance": [self._relevance(record) for record in self.dense.records],
            },
            "methods": [self._method(name, run) for name, run in self.runs.items()],
        }  # fmt: skip

    def _command(self) -> str:
        """The command that makes the same page."""
        options = self.options
        words = ["crossget", "show", self.photograph.name if options.image is None else str(options.image)]
        words += ["--model", options.model, "--r", r_text(options.r), "--methods", *options.methods]
        words += ["--text", *options.text] if options.text else []
        words += ["--pretrained", options.pretrained] if options.checkpoint is None else []
        words += [] if options.checkpoint is None else ["--checkpoint", str(options.checkpoint)]
        return shlex.join([*words, "--seed", str(options.seed)])

    def _weights(self) -> str:
        if self.options.checkpoint is not None and not self.backbone.random:
            return self.options.checkpoint.name
        return self.backbone.weights

    def _method(self, name: str, run: Run) -> dict[str, Any]:
        colours = self.colours(name)
        return {
            "key": name,
            "name": NAMES[name],
            "about": ABOUT[name],
            "accent": figures.colour_of(NAMES[name]),
            "colours": {str(group): colour for group, colour in colours.items()},
            "labels": {str(group): number for number, group in enumerate(sorted(colours), 1)},
            **self._run(run),
        }

    def _run(self, run: Run) -> dict[str, Any]:
        blocks = []
        for layer, record in enumerate(run.records):
            previous = None if layer == 0 else run.records[layer - 1]
            relevance = self._relevance(record)
            dense = self._relevance(self.dense.records[layer])
            blocks.append(
                {
                    "group": run.groups[layer + 1].tolist(),
                    "size": [int(s) for s in self._of_patches(record.source, record.sizes)],
                    "score": None if record.score is None else self._scores(record.score, previous),
                    "relevance": relevance,
                    "dense_correlation": [correlation(a, b) for a, b in zip(relevance, dense, strict=True)],
                }
            )
        return {
            **self._costs(run),
            "cosine": _rounded(F.cosine_similarity(run.features, self.dense.features, dim=0)),
            "similarity": self._similarity(run),
            "blocks": blocks,
        }

    def _costs(self, run: Run) -> dict[str, Any]:
        """Tokens, and GFLOPs of each block and of the whole forward."""
        module_names = {id(module): name for name, module in self.backbone.model.named_modules()}
        blocks = [run.count.by_module[module_names[id(block)]] for block in self.tower.blocks]
        return {
            "tokens": run.tokens,
            "gflops": [round(flops / 1e9, 6) for flops in blocks],
            "total": round(run.count.total / 1e9, 6),
        }

    def _of_patches(self, source: Tensor, values: Tensor) -> list[float]:
        """For each patch the value [1, T] of its token; 0 for dropped patches."""
        places = source[0, self.tower.prefix :]
        return [float(values[0, place]) if place >= 0 else 0.0 for place in places.tolist()]

    def _scores(self, score: Tensor, previous: BlockRecord | None) -> list[float | None]:
        patches = self.grid[0] * self.grid[1]
        first = self.tower.prefix
        places = list(range(first, first + patches)) if previous is None else previous.source[0, first:].tolist()
        return [_rounded(score[0, place]) if place >= 0 else None for place in places]

    def _relevance(self, record: BlockRecord) -> list[list[float | None]]:
        """For each text its cosine with the token of each patch after the block; None for dropped patches."""
        if self.texts is None or self.tower.embed is None:
            return []
        with torch.no_grad():
            tokens = F.normalize(self.tower.embed(record.features[0]).float(), dim=-1)
        cosines = self.texts.to(tokens.device) @ tokens.T
        places = record.source[0, self.tower.prefix :].tolist()
        return [[_rounded(row[place]) if place >= 0 else None for place in places] for row in cosines]

    def _similarity(self, run: Run) -> list[float]:
        """The cosine of the image's feature with each text."""
        if self.texts is None:
            return []
        return [_rounded(cosine) for cosine in self.texts.to(run.features.device) @ F.normalize(run.features, dim=0)]

    def colours(self, name: str) -> dict[int, int]:
        """The colours of a method's groups."""
        return figures.colour_groups(self.runs[name].groups, self.grid)

    # Files -----------------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """The web page: one file, whose content security policy forbids loading anything else."""
        return render(self.data())

    def picture(self) -> Any:
        """A matplotlib figure with the same groups in the same colours."""
        blocks = _columns(self.tower.depth)
        rows = [self._row(name, run, blocks) for name, run in self.runs.items()]
        curves = [figures.Curve("dense", self.dense.tokens[:-1], self.dense.count.total / 1e9, 1.0, None)]
        for name, run in self.runs.items():
            cosine = float(F.cosine_similarity(run.features, self.dense.features, dim=0))
            curves.append(figures.Curve(NAMES[name], run.tokens[:-1], run.count.total / 1e9, cosine, None))
        who = f"{self.backbone.host} {self.backbone.name}" + (" (random weights)" if self.backbone.random else "")
        footer = [
            "Patches of one colour and outline are merged into one token; a group keeps its colour in later blocks.",
            "Groups that are not adjacent may share a colour. Unmarked patches are not merged; dark ones are dropped.",
        ]
        if self.photograph.credit:
            footer.append(f"Photograph: {self.photograph.name}, {self.photograph.credit}")
        title = f"{who}, {r_text(self.options.r)} tokens removed per block"
        return figures.draw_block_sheet(figures.BlockSheet(title, self._subtitle(), self.pixels, curves, rows, footer))

    def _subtitle(self) -> str:
        if self.backbone.random:
            return "Random weights: the merged patches are not those of a trained model."
        untrained = "; the cross tokens are untrained" if "crossget" in self.options.methods else ""
        return f"Weights: {self._weights()}{untrained}."

    def _row(self, name: str, run: Run, blocks: Sequence[int]) -> tuple[str, list[figures.Panel]]:
        colours, who = self.colours(name), NAMES[name]
        gflops, dense = run.count.total / 1e9, self.dense.count.total / 1e9
        panels = [
            figures.Panel(
                figures.group_map(self.pixels, run.groups[block], colours, self.grid),
                f"after block {block}: {run.tokens[block]} tokens",
                figures.colour_of(NAMES[name]),
            )
            for block in blocks
        ]
        return f"{who}: {gflops:.3g} GFLOPs ({gflops / dense - 1:+.0%})", panels


def run(options: ViewerOptions, log: Callable[[str], None] = print) -> ViewerReport:
    """Run all methods on the photograph, and write the files that the options name.

    Args:
        options: of the command.
        log: called with lines for the user.

    Raises:
        ValueError, TypeError, RuntimeError: the request cannot be carried out; the message says what can.
        ConnectionError: with texts, the tokenizer is neither installed nor cached, and the hub does not answer.
    """
    if options.png is not None:
        figures.require_matplotlib()
    photograph = load_photograph(options.image)
    backbone = make(options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, device=options.device,
                    seed=options.seed)  # fmt: skip
    if backbone.random_reason:
        log(f"{backbone.random_reason}: random weights are used")
    report = _Recorder(options, backbone, photograph).report()
    files.write_text(options.out, report.page())
    if options.png is not None:
        save_figure(report.picture(), options.png)
    return report


class _Recorder:
    """Runs a model on one photograph with every method."""

    def __init__(self, options: ViewerOptions, backbone: Backbone, photograph: Photograph) -> None:
        self.options, self.backbone, self.photograph = options, backbone, photograph
        self.r = schedules(backbone, options.r, 0)[VISUAL]
        (self.tower,) = (tower for tower in find_towers(backbone.model) if tower.name == VISUAL)
        who = f"{backbone.host} {backbone.name}"
        if options.text and not backbone.has_text_tower:
            raise ValueError(
                f"--text needs a model with a text tower, which {who} does not have: choose a CLIP of open_clip"
            )
        if options.text and self.tower.embed is None:
            raise ValueError(
                f"--text: {who} ends in an attention pool, so its patches cannot be compared with a text: choose "
                "another CLIP, such as ViT-B-16"
            )
        self.image = backbone.preprocess(photograph.image)[None].to(options.device)

    def report(self) -> ViewerReport:
        """The report; no files are written."""
        texts = self._texts()
        with attach(self.backbone.model, {VISUAL: ToMe(r=0)}) as attached:
            dense = self._run(attached)
        runs = {name: self._reduced(name) for name in self.options.methods}
        pixels = denormalize(self.image, self.backbone.preprocess)[0]
        return ViewerReport(
            self.options, self.backbone, self.photograph, self.tower, pixels, self._grid(dense), texts, dense, runs
        )

    def _grid(self, dense: Run) -> tuple[int, int]:
        height, width = (int(n) for n in self.image.shape[2:])
        return figures.patch_grid(int(dense.groups.shape[1]), height, width)

    @torch.no_grad()
    def _texts(self) -> Tensor | None:
        if not self.options.text:
            return None
        return F.normalize(self.backbone.text_features(self.backbone.tokenize(self.options.text)).float(), dim=-1)

    def _reduced(self, name: str) -> Run:
        with attach(self.backbone.model, {VISUAL: METHODS[name](self.r)}) as attached:
            return self._run(attached)

    @torch.no_grad()
    def _run(self, attached: Attachment) -> Run:
        with attached.recording():
            features = self.backbone.image_features(self.image)[0].float()
        records = attached.records[VISUAL]
        tokens = [*attached.tokens[VISUAL], int(records[-1].features.shape[1])]
        groups = figures.follow_groups([record.source[0, self.tower.prefix :].cpu() for record in records])
        count = count_once(self.backbone.model, self.image, attached.parameters())
        return Run(tokens, records, count, features, groups)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Pearson's correlation over the patches where both have a value; None where it is not defined."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < 2:
        return None
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return None if scale == 0 else round(float(x @ y) / scale, DIGITS)


def _rounded(number: Tensor) -> float:
    return round(float(number), DIGITS)


def _columns(depth: int) -> list[int]:
    """The blocks in the picture, evenly spaced up to the last one."""
    return sorted({max(1, round(depth * (i + 1) / MAX_COLUMNS)) for i in range(MAX_COLUMNS)})


def _patch_colours(pixels: Tensor, grid: tuple[int, int]) -> list[str]:
    """The mean colour of each patch as "#rrggbb"."""
    means = F.adaptive_avg_pool2d(pixels.permute(2, 0, 1)[None], grid)[0].flatten(1).T
    return ["#" + "".join(f"{round(float(part) * 255):02x}" for part in patch) for patch in means]


def _data_uri(pixels: Tensor) -> str:
    from PIL import Image

    image = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The page


def render(data: Mapping[str, Any]) -> str:
    """The page for `ViewerReport.data`: the template with the data, and a policy that allows only its own script."""
    template = importlib.resources.files("crossget.demo").joinpath("show.html").read_text(encoding="utf-8")
    (script,) = _SCRIPT.findall(template)
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    title = f"{data['image']['name']}, {data['model']['name']}: crossget show"
    values = {"TITLE": html.escape(title), "SCRIPT_HASH": f"sha256-{digest}", "DATA": to_script(data)}
    # In one pass, so that placeholders inside the data are not replaced.
    return re.sub(r"\{\{(TITLE|SCRIPT_HASH|DATA)\}\}", lambda match: values[match[1]], template)


def to_script(data: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    unsafe = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return "".join(unsafe.get(char, char) for char in text)
