"""Score photographs against texts while the merging knows the text.

Nothing is trained. Two tasks: photographs and one caption of each, or photographs and the names of their classes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import crossget
from crossget.measure.flops import count_once
from experiments.ablation.run import described
from experiments.conditioned.presets import PRESETS, Target
from experiments.coop import datasets
from experiments.lib.data import read_image
from experiments.lib.files import Json, check_names, file_digest, pack
from experiments.lib.study import Study
from experiments.retrieval import data
from experiments.retrieval.models import Clip, load_clip

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One row at one r."""

    task: str
    preset: str
    r: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.preset}" + ("" if self.preset == "dense" else f"_r{self.r}")


@dataclass(frozen=True)
class Options:
    """What to measure, and with what."""

    task: Literal["captions", "classes"]
    """Find the caption of a photograph and the photograph of a caption, or the class of a photograph."""
    images: Path
    """Folder of photographs; for classes one with `test/CLASS/*.jpg` and `train/CLASS/*.jpg`."""
    weights: Path
    """State dict of the model."""
    annotations: Path | None = None
    """Captions in Karpathy's layout; the first one of each photograph is taken."""
    split: str = "test"
    """Of the captions' photographs."""
    model: str = "small"
    """A CLIP of open_clip, or "small": what experiments/retrieval trains."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    r: tuple[int, ...] = (4,)
    """Tokens removed per block of the image tower."""
    limit: int = 250
    """How many photographs, evenly over the sorted list; rows that score every pair by itself take as many times as
    long as there are texts."""
    batch: int = 128
    """Photographs at a time."""
    device: str = "cpu"
    """Where the model runs."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


@dataclass(frozen=True)
class Task:
    """What is scored.

    Attributes:
        files: [N] photographs.
        texts: [M].
        owner: [N] which text is right for each photograph.
        names: a digest of them all, for the result file.
    """

    files: list[Path]
    texts: list[str]
    owner: Tensor
    names: Json


def load_task(options: Options) -> Task:
    """Read photographs and texts.

    Raises:
        ValueError: captions are asked for and none are given.
    """
    if options.task == "captions":
        if options.annotations is None:
            raise ValueError("--task captions needs --annotations: captions in Karpathy's layout")
        photos = evenly(data.read_karpathy(options.annotations, options.images, options.split), options.limit)
        return Task(
            [photo.file for photo in photos], [photo.captions[0] for photo in photos], torch.arange(len(photos)),
            data.fingerprint(photos),
        )  # fmt: skip
    listed = datasets.read("caltech101", options.images)
    some = evenly(listed.splits["test"], options.limit)
    texts = [listed.template.format(name.replace("_", " ")) for name in listed.names]
    owner = torch.tensor([photo.label for photo in some])
    return Task([photo.file for photo in some], texts, owner, datasets.fingerprint(some, listed.names))


def evenly(items: Any, limit: int) -> list[Any]:
    """Return so many of the items, evenly spread over them; all if there are fewer."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def score(
    encode: Callable[[Tensor], Tensor], set_text_features: Callable[[Tensor], None], texts: Tensor, target: Target
) -> Tensor:
    """Return [N, M] cosines of photographs and texts.

    Args:
        encode: texts [M', E] -> [N, M'], of all photographs as the model sees them now.
        set_text_features: says which text [E] the merging is to know from now on.
        texts: [M, E] of unit length.
        target: see `Preset`.
    """
    if target == "none":
        return encode(texts)
    if target == "all":
        set_text_features(F.normalize(texts.mean(0), dim=0))
        return encode(texts)
    known = texts if target == "own" else texts.roll(len(texts) // 2, 0)
    columns = []
    for text, looked_for in zip(texts, known, strict=True):
        set_text_features(looked_for)
        columns.append(encode(text[None]))
    return torch.cat(columns, 1)


def measure(cosines: Tensor, owner: Tensor, scale: float, both_ways: bool) -> Json:
    """Return what cosines [N, M] say.

    Args:
        cosines: of photographs and texts.
        owner: [N] the right text of each photograph.
        scale: the model's inverse temperature.
        both_ways: each text is that of one photograph too, in the same order.

    Returns:
        for "text" (from photographs) and, both ways, "photo" (from texts): `right`, a mark for each question,
        `accuracy` in %, and `losses`, the cross-entropy of each, packed, with their mean `loss`.
    """
    directions = {"text": (cosines, owner)}
    if both_ways:
        directions["photo"] = (cosines.T, torch.arange(len(cosines)))
    result: Json = {"n": len(cosines), "texts": int(cosines.shape[1])}
    for name, (logits, answer) in directions.items():
        losses = F.cross_entropy(scale * logits.double(), answer, reduction="none")
        right = logits.argmax(1) == answer
        result[name] = {
            "accuracy": round(100 * float(right.double().mean()), 4),
            "loss": round(float(losses.mean()), 6),
            "right": "".join("1" if mark else "0" for mark in right.tolist()),
            "losses": pack(losses.numpy()),
        }
    return result


def cost(clip: Clip, attached: crossget.Attachment, one: Tensor, dense: int) -> Json:
    """Return multiply-adds of the image tower for one photograph, in G, and the tokens entering each block."""
    counted = count_once(clip.model.visual, one).total
    return {"tokens": attached.tokens["visual"], "gflops": {"dense": dense / 1e9, "reduced": counted / 1e9}}


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, PRESETS)
    return [Run(options.task, name, r) for name in options.presets for r in (options.r if name != "dense" else (0,))]


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    task, clip = load_task(options), load_clip(options.model, options.weights)
    clip.model.eval().to(options.device)
    transform = clip.transform(train=False)
    pixels = torch.stack([read_image(file, transform) for file in task.files])
    with torch.no_grad():
        texts = torch.cat([clip.encode_text(clip.tokenize([text]).to(options.device)) for text in task.texts])
    texts = F.normalize(texts.float(), dim=-1)

    dense = count_once(clip.model.visual, pixels[:1].to(options.device)).total

    @torch.no_grad()
    def encode(against: Tensor) -> Tensor:
        parts = [clip.encode_image(part.to(options.device)).float() for part in pixels.split(options.batch)]
        return torch.cat([F.normalize(part, dim=-1) @ against.T for part in parts]).cpu()

    def measured(run: Run) -> Json:
        preset = PRESETS[run.preset]
        config: Json = {**asdict(run), "data": task.names, "weights": file_digest(options.weights)}
        if preset.method is None:
            cosines, spent = encode(texts), {}
        else:
            reducer = replace(preset.method, r=run.r)
            config["reducer"] = described(reducer)
            with crossget.attach(clip.model, {"visual": reducer}) as attached:
                cosines = score(encode, attached.set_text_features, texts, preset.target)
                spent = cost(clip, attached, pixels[:1].to(options.device), dense)
        scale = float(clip.model.logit_scale.detach().exp())
        return {"run": config, "result": {**measure(cosines, task.owner, scale, options.task == "captions"), **spent}}

    return measured


STUDY = Study("conditioned", Options, grid, load, lambda run: {"presets": (run.preset,), "r": (run.r,)})
