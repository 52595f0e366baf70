"""`crossget show`: one photograph, block by block, as a web page in one file.

Each method runs once on the photograph, recorded (`Attachment.recording`), and, of a CLIP, once more for every text
that is looked for. What was recorded becomes plain numbers (`ViewerReport.data`); the page show.html draws them, and
`ViewerReport.picture` draws the same for papers.
"""

from __future__ import annotations

import base64
import dataclasses
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
from crossget.core.adapters import Tower, find_towers
from crossget.core.attachment import Attachment, attach
from crossget.core.state import BlockRecord
from crossget.demo import figures
from crossget.demo.backbones import DEFAULT, Backbone, make
from crossget.demo.compare import VISUAL, Photograph, Reduction, denormalize, load_photograph, r_text, schedules
from crossget.measure.flops import Count, count_once
from crossget.methods.reducers import CrossGET, Random, Reducer, ToMe, TopK, Ward

Method = Literal["ward", "crossget", "tome", "random", "topk"]
METHODS: Mapping[str, Callable[[Reduction], Reducer]] = {
    "ward": Ward,
    "crossget": CrossGET,
    "tome": ToMe,
    "random": Random,
    "topk": partial(TopK, importance=None),  # by the class token, or by attention in towers that have none
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
TEXT_GUIDED = ("ward", "crossget", "topk")  # methods with a field `importance`, which a text can replace
MAX_METHODS, MAX_TEXTS = 4, 6
MAX_COLUMNS = 4  # blocks in the picture
DIGITS = 4
_SCRIPT = re.compile(r"<script>\n(.*?)</script>", re.DOTALL)


@dataclass(frozen=True)
class ViewerOptions:
    """What the command line asks for.

    Attributes:
        image: a file, or the name of one of scikit-image's photographs; None is the first of these.
        model: a name of open_clip or timm.
        r: tokens to remove per block of the image tower.
        methods: names out of `METHODS`, to stand side by side.
        text: what to look for in the photograph; for models that read text.
        checkpoint, pretrained: where weights come from, see `crossget.demo.backbones.make`.
        out: where the page goes.
        png: where the picture goes; None writes none.
        device: where the model runs.
        seed: of random weights.
    """

    image: Path | None = None
    model: str = "ViT-B-16"
    r: Reduction = 16
    methods: Sequence[str] = ("ward", "crossget")
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
                raise ValueError(f"--{name} {shlex.join(given)}: one of them is there twice")
            if len(given) > most:
                raise ValueError(f"--{name}: {len(given)} are more than a page can show; give at most {most}")
        if not self.methods:
            raise ValueError(f"--methods: choose at least one of {', '.join(METHODS)}")
        if any(not text.strip() for text in self.text):
            raise ValueError("--text: a text is empty; give words such as 'a cat'")
        if self.checkpoint is not None and not self.checkpoint.exists():
            raise ValueError(f"--checkpoint {self.checkpoint}: no such file")
        for name in ("out", "png"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{name} {path}: there is no folder {path.parent}")


@dataclass
class Run:
    """One forward of one method.

    Attributes:
        text: which text gave the importance; None: the method chose as it does.
        tokens: entering each block, and those behind the last one.
        records: what each block did; of one image.
        count: what the forward costs.
        features: [E] of the whole image.
        names: [blocks + 1, P] the groups of patches, see `crossget.demo.figures.follow_groups`.
    """

    text: int | None
    tokens: list[int]
    records: list[BlockRecord]
    count: Count
    features: Tensor
    names: Tensor


@dataclass
class ViewerReport:
    """All that was found out about one photograph.

    Attributes:
        options, backbone, photograph: what ran on what.
        tower: that was reduced.
        pixels: [H, W, 3] in 0 to 1, the photograph as the model saw it.
        grid: rows and columns of patches.
        texts: [texts, E] features of unit length; None without texts.
        dense: the untouched model.
        runs: per method, first the method as it is, then once for each text if it can be guided by one.
    """

    options: ViewerOptions
    backbone: Backbone
    photograph: Photograph
    tower: Tower
    pixels: Tensor
    grid: tuple[int, int]
    texts: Tensor | None
    dense: Run
    runs: dict[str, list[Run]]

    # Numbers ---------------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """What the page shows, as plain numbers and strings.

        `methods[m].runs[n].blocks[l]` speaks of the tokens behind block l, for each patch in reading order: `group`
        (its name, -1: dropped), `size` of its token, `score` of the token that it entered the block in (None: not
        scored), and for each text `relevance`, the cosine of its token with the text.
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
            "methods": [self._method(name, runs) for name, runs in self.runs.items()],
        }  # fmt: skip

    def _command(self) -> str:
        """What to type for the same page."""
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

    def _method(self, name: str, runs: Sequence[Run]) -> dict[str, Any]:
        colours = self.colours(name)
        return {
            "key": name,
            "name": NAMES[name],
            "about": ABOUT[name],
            "accent": figures.colour_of(NAMES[name]),
            "colours": {str(group): colour for group, colour in colours.items()},
            "labels": {str(group): number for number, group in enumerate(sorted(colours), 1)},
            "runs": [self._run(run, runs[0]) for run in runs],
        }

    def _run(self, run: Run, plain: Run) -> dict[str, Any]:
        blocks = []
        for layer, record in enumerate(run.records):
            before = None if layer == 0 else run.records[layer - 1]
            relevance = self._relevance(record)
            dense = self._relevance(self.dense.records[layer])
            blocks.append(
                {
                    "group": run.names[layer + 1].tolist(),
                    "size": [int(s) for s in self._of_patches(record.source, record.sizes)],
                    "score": None if record.score is None else self._scores(record.score, before),
                    "relevance": relevance,
                    "dense_correlation": [correlation(a, b) for a, b in zip(relevance, dense, strict=True)],
                    "regrouped": count_regrouped(run.names[layer + 1], plain.names[layer + 1]),
                }
            )
        return {
            **self._costs(run),
            "text": run.text,
            "cosine": _rounded(F.cosine_similarity(run.features, self.dense.features, dim=0)),
            "similarity": self._similarity(run),
            "blocks": blocks,
        }

    def _costs(self, run: Run) -> dict[str, Any]:
        """GFLOPs of each block and of the whole forward, and the tokens."""
        module_names = {id(module): name for name, module in self.backbone.model.named_modules()}
        blocks = [run.count.by_module[module_names[id(block)]] for block in self.tower.blocks]
        return {
            "tokens": run.tokens,
            "gflops": [round(flops / 1e9, 6) for flops in blocks],
            "total": round(run.count.total / 1e9, 6),
        }

    def _of_patches(self, source: Tensor, values: Tensor) -> list[float]:
        """The value [1, T] of each patch's token; 0 for dropped patches."""
        places = source[0, self.tower.prefix :]
        return [float(values[0, place]) if place >= 0 else 0.0 for place in places.tolist()]

    def _scores(self, score: Tensor, before: BlockRecord | None) -> list[float | None]:
        patches = self.grid[0] * self.grid[1]
        first = self.tower.prefix
        places = list(range(first, first + patches)) if before is None else before.source[0, first:].tolist()
        return [_rounded(score[0, place]) if place >= 0 else None for place in places]

    def _relevance(self, record: BlockRecord) -> list[list[float | None]]:
        """For each text, the cosine of each patch's token behind the block with it; None for dropped patches."""
        if self.texts is None or self.tower.embed is None:
            return []
        with torch.no_grad():
            tokens = F.normalize(self.tower.embed(record.features[0]).float(), dim=-1)
        cosines = self.texts.to(tokens.device) @ tokens.T
        places = record.source[0, self.tower.prefix :].tolist()
        return [[_rounded(row[place]) if place >= 0 else None for place in places] for row in cosines]

    def _similarity(self, run: Run) -> list[float]:
        """Of the whole image with each text."""
        if self.texts is None:
            return []
        return [_rounded(cosine) for cosine in self.texts.to(run.features.device) @ F.normalize(run.features, dim=0)]

    def colours(self, name: str) -> dict[int, int]:
        """The colours of a method's groups, the same whatever text guides it."""
        return figures.colour_groups(torch.cat([run.names for run in self.runs[name]]), self.grid)

    # Files -----------------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """The web page: one file that needs nothing else, and by its own policy may load nothing else."""
        return render(self.data())

    def picture(self) -> Any:
        """A matplotlib figure of the same groups in the same colours."""
        blocks = _columns(len(self.tower.blocks))
        rows = [self._row(name, run, blocks) for name, runs in self.runs.items() for run in runs]
        curves = [figures.Curve("dense", self.dense.tokens[:-1], self.dense.count.total / 1e9, 1.0, None)]
        for name, runs in self.runs.items():
            cosine = float(F.cosine_similarity(runs[0].features, self.dense.features, dim=0))
            curves.append(figures.Curve(NAMES[name], runs[0].tokens[:-1], runs[0].count.total / 1e9, cosine, None))
        who = f"{self.backbone.host} {self.backbone.name}" + (" (random weights)" if self.backbone.random else "")
        footer = [
            "Patches of one colour and outline have become one token; a group keeps its colour from block to block.",
            "Groups that are apart may share one of the seven colours. Plain patches are alone, dark ones dropped.",
        ]
        if self.photograph.credit:
            footer.append(f"Photograph: {self.photograph.name}, {self.photograph.credit}")
        title = f"{who}, {r_text(self.options.r)} tokens removed per block"
        return figures.draw_block_sheet(figures.BlockSheet(title, self._subtitle(), self.pixels, curves, rows, footer))

    def _subtitle(self) -> str:
        if self.backbone.random:
            return "Random weights: the costs are real; the merged patches say nothing of a trained model."
        return f"Weights: {self._weights()}; the cross tokens are untrained."

    def _row(self, name: str, run: Run, blocks: Sequence[int]) -> tuple[str, list[figures.Panel]]:
        colours, who = self.colours(name), NAMES[name]
        if run.text is not None:
            who += f", looking for “{self.options.text[run.text]}”"
        gflops, dense = run.count.total / 1e9, self.dense.count.total / 1e9
        panels = [
            figures.Panel(
                figures.group_map(self.pixels, run.names[block], colours, self.grid),
                f"after block {block}: {run.tokens[block]} tokens",
                figures.colour_of(NAMES[name]),
            )
            for block in blocks
        ]
        return f"{who}: {gflops:.3g} GFLOPs ({gflops / dense - 1:+.0%})", panels


def run(options: ViewerOptions, log: Callable[[str], None] = print) -> ViewerReport:
    """Find out everything, and write the files that are asked for.

    Args:
        options: see there.
        say: told, in single lines, what the user should know at once.

    Raises:
        ValueError, TypeError, RuntimeError: what is asked for cannot be done; the message says what can.
        ConnectionError: of texts, the tokenizer is neither installed nor cached, and the hub does not answer.
    """
    if options.png is not None:
        figures.require_matplotlib()
    photograph = load_photograph(options.image)
    backbone = make(options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, device=options.device,
                    seed=options.seed)  # fmt: skip
    if backbone.random_reason:
        log(f"{backbone.random_reason}: random weights are used")
    report = _Recorder(options, backbone, photograph).report()
    options.out.write_text(report.page(), encoding="utf-8")
    if options.png is not None:
        report.picture().savefig(options.png)
    return report


class _Recorder:
    """Runs one model on one photograph, again and again."""

    def __init__(self, options: ViewerOptions, backbone: Backbone, photograph: Photograph) -> None:
        self.options, self.backbone, self.photograph = options, backbone, photograph
        self.r = schedules(backbone, options.r, 0)[VISUAL]
        (self.tower,) = (tower for tower in find_towers(backbone.model) if tower.name == VISUAL)
        who = f"{backbone.host} {backbone.name}"
        if options.text and not backbone.has_text_tower:
            raise ValueError(f"--text is for models that read text, and {who} does not: choose a CLIP of open_clip")
        if options.text and self.tower.embed is None:
            raise ValueError(
                f"--text: {who} ends in an attention pool, so single patches cannot be compared with a text: choose "
                "another CLIP, such as ViT-B-16"
            )
        self.image = backbone.preprocess(photograph.image)[None].to(options.device)

    def report(self) -> ViewerReport:
        """Everything but the files."""
        texts = self._texts()
        with attach(self.backbone.model, {VISUAL: ToMe(r=0)}) as attached:
            dense = self._run(attached, None)
        runs = {name: self._runs(name, texts) for name in self.options.methods}
        pixels = denormalize(self.image, self.backbone.preprocess)[0]
        return ViewerReport(
            self.options, self.backbone, self.photograph, self.tower, pixels, self._grid(dense), texts, dense, runs
        )

    def _grid(self, dense: Run) -> tuple[int, int]:
        height, width = (int(n) for n in self.image.shape[2:])
        return figures.patch_grid(int(dense.names.shape[1]), height, width)

    @torch.no_grad()
    def _texts(self) -> Tensor | None:
        if not self.options.text:
            return None
        return F.normalize(self.backbone.text_features(self.backbone.tokenize(self.options.text)).float(), dim=-1)

    def _runs(self, name: str, texts: Tensor | None) -> list[Run]:
        reducer: Reducer = METHODS[name](self.r)
        with attach(self.backbone.model, {VISUAL: reducer}) as attached:
            runs = [self._run(attached, None)]
            if texts is not None and name in TEXT_GUIDED:
                attached.reducer = {VISUAL: dataclasses.replace(reducer, importance="text")}  # type: ignore[call-arg]
                for i, text in enumerate(texts):
                    attached.set_text_features(text)
                    # What a text costs does not depend on what it says.
                    runs.append(self._run(attached, i, runs[1].count if i else None))
        return runs

    @torch.no_grad()
    def _run(self, attached: Attachment, text: int | None, count: Count | None = None) -> Run:
        with attached.recording():
            features = self.backbone.image_features(self.image)[0].float()
        records = attached.records[VISUAL]
        tokens = [*attached.tokens[VISUAL], int(records[-1].features.shape[1])]
        names = figures.follow_groups([record.source[0, self.tower.prefix :].cpu() for record in records])
        if count is None:
            count = count_once(self.backbone.model, self.image, attached.parameters())
        return Run(text, tokens, records, count, features, names)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Pearson's, over the patches that both have; None where it is not defined."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(pairs) < 2:
        return None
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return None if scale == 0 else round(float(x @ y) / scale, DIGITS)


def count_regrouped(names: Tensor, others: Tensor) -> int:
    """Patches whose token stands for another set of patches in one forward than in another.

    Args:
        names: [P] the group of each patch; -1 for a dropped one.
        others: [P] in the other forward.
    """
    # Of two groups with a patch in common, the sets are the same if neither has a patch that the other lacks.
    same = (names[:, None] == names) == (others[:, None] == others)
    dropped = (names < 0) | (others < 0)
    moved = torch.where(dropped, (names < 0) != (others < 0), ~same.all(1))
    return int(moved.sum())


def _rounded(number: Tensor) -> float:
    return round(float(number), DIGITS)


def _columns(depth: int) -> list[int]:
    """Blocks to show in the picture, the last one among them."""
    return sorted({max(1, round(depth * (i + 1) / MAX_COLUMNS)) for i in range(MAX_COLUMNS)})


def _patch_colours(pixels: Tensor, grid: tuple[int, int]) -> list[str]:
    """Mean colour of each patch, as "#rrggbb"."""
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
    """The page for `ViewerReport.data`: the template with the numbers, and a policy that allows its own script alone."""
    template = importlib.resources.files("crossget.demo").joinpath("show.html").read_text(encoding="utf-8")
    (script,) = _SCRIPT.findall(template)
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    title = f"{data['image']['name']}, {data['model']['name']}: crossget show"
    values = {"TITLE": html.escape(title), "SCRIPT_HASH": f"sha256-{digest}", "DATA": to_script(data)}
    # In one pass: what is put in is not looked at again.
    return re.sub(r"\{\{(TITLE|SCRIPT_HASH|DATA)\}\}", lambda match: values[match[1]], template)


def to_script(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    unsafe = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return "".join(unsafe.get(char, char) for char in text)
