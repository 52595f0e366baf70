"""The image tower of a CLIP, its photographs and its texts: what every study of this folder measures with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.ablation.settings import Images, Setting, load_images, load_model
from experiments.lib.files import Json, file_digest

RESULTS = Path(__file__).parent / "results"
HALVES = {"odd": 1, "even": 0}
"""Every second photograph of the sorted list, from here on: what is chosen on photographs is chosen on the even ones,
and reported on the odd ones."""
SCALE = 100.0
"""Inverse temperature of OpenAI's CLIP models."""


def image_tower(name: str, pretrained: str | None = None) -> nn.Module:
    """Return the image tower of a model that open_clip knows by name; its forward gives features [B, E]."""
    import open_clip

    return cast(nn.Module, open_clip.create_model(name, pretrained=pretrained).visual)


def setting_of(name: str, classes: int) -> Setting:
    """Return what images of a CLIP need.

    Args:
        name: of the model in open_clip.
        classes: number of texts.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip knows no model {name!r}: see open_clip.list_models()")
    size = config["vision_cfg"]["image_size"]
    return Setting(
        title=name,
        build=partial(image_tower, name),
        pretrained=partial(image_tower, name, "openai"),
        classes=classes,
        size=size,
        resize=size,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
    )


def load_texts(file: Path, sets: tuple[str, ...]) -> dict[str, Tensor]:
    """Return embeddings of the classes' texts [classes, E], of unit length, by the name of the set.

    Raises:
        ValueError: a set is not in the file, or they have different shapes.
    """
    from safetensors.torch import load_file

    found = load_file(file)
    missing = sorted(set(sets) - set(found))
    if missing:
        raise ValueError(f"{file} has no sets {missing}; it has {sorted(found)}")
    texts = {name: F.normalize(found[name].float(), dim=-1) for name in sets or tuple(sorted(found))}
    shapes = {tuple(one.shape) for one in texts.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"{file}: sets of the shapes {sorted(shapes)}; name those of the photographs' classes by --sets"
        )
    return texts


@dataclass(frozen=True)
class Loaded:
    """Model, photographs and texts.

    Attributes:
        tower: the image tower, on its device.
        images: all photographs.
        texts: [classes, E] of unit length, by the name of the set.
    """

    tower: nn.Module
    images: Images
    texts: dict[str, Tensor]

    def part(self, half: str, limit: int | None = None) -> "Loaded":
        """Return the same with one of `HALVES` of the photographs, or with so many of it, see `evenly`."""
        chosen = evenly(range(HALVES[half], len(self.images.labels), 2), limit)
        images = self.images
        return replace(self, images=Images(images.pixels[chosen], images.labels[chosen], images.source))


def evenly(items: Sequence[int], limit: int | None) -> list[int]:
    """Return so many of the items, evenly spread over them; all if there are fewer, or without a limit."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """What every study takes that trains nothing."""

    data: Path
    """Folder of photographs with labels.csv (file,label), or with one folder of images per class."""
    device: str = "cpu"
    """Where the model runs."""
    overwrite: bool = False
    """Run again what has a result file."""
    results: Path = RESULTS
    """Where the result files go."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Which CLIP."""

    weights: Path | None = None
    """Safetensors file of the image tower's parameters; without it open_clip downloads OpenAI's."""
    model: str = "ViT-B-16-quickgelu"
    """Name of the model in open_clip."""


@dataclass(frozen=True, kw_only=True)
class Measuring(Clip, Photographs):
    """What every study takes that classifies photographs by texts."""

    texts: Path
    """Safetensors file with embeddings [classes, E] of the classes' texts, by the name of the set."""
    sets: tuple[str, ...] = ()
    """Sets of that file; all, where none is named."""
    batch: int = 25
    """Images per forward when measuring."""

    def load(self) -> Loaded:
        """Read everything.

        Raises:
            ValueError: the files do not fit together.
        """
        texts = load_texts(self.texts, self.sets)
        setting = setting_of(self.model, len(next(iter(texts.values()))))
        images = load_images(setting, self.data)
        return Loaded(load_model(setting, self.weights).to(self.device), images, texts)

    def given(self, loaded: Loaded) -> dict[str, Any]:
        """Return what a result file says of model, weights, photographs and texts."""
        weights = self.weights
        return {
            "model": self.model,
            "weights": {"file": weights.name, "sha256": file_digest(weights)} if weights else None,
            "data": loaded.images.source,
            "texts": {"file": self.texts.name, "sha256": file_digest(self.texts), "sets": list(loaded.texts)},
            "batch": self.batch,
        }


@torch.no_grad()
def encode(tower: nn.Module, pixels: Tensor, batch: int, device: str) -> Tensor:
    """Return the features [N, E] of all images, of unit length, on the CPU."""
    parts = [tower(images.to(device)).float().cpu() for images in pixels.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


def classified(features: Tensor, dense: Tensor, loaded: Loaded) -> Json:
    """Return how well features classify, and how near they are to the dense model's.

    Args:
        features: [N, E] of unit length.
        dense: [N, E] those of the untouched model.
        loaded: the labels and the texts.

    Returns:
        `cosine`: mean cosine with the dense features. `sets`: by set of texts, see `experiments.ablation.run.measure`.
    """
    from experiments.ablation.run import measure

    texts = loaded.texts
    return {
        "cosine": round(float((features * dense).sum(1).mean()), 6),
        "sets": {
            name: measure(SCALE * features @ one.T, loaded.images.labels, SCALE * dense @ one.T)
            for name, one in texts.items()
        },
    }
