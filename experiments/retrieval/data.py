"""Photographs with captions, in Karpathy's layout: Flickr8k, Flickr30k, COCO."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.lib.data import BadData, Batch, Draw, chance, read_image

# COCO's photographs that are in neither of Karpathy's small splits are for training, too.
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


@dataclass(frozen=True)
class Photo:
    """One photograph and what people wrote about it."""

    file: Path
    captions: tuple[str, ...]


def read_karpathy(annotations: Path, images: Path, split: str, *, skip_bad: bool = False) -> list[Photo]:
    """Return the photographs of a split.

    Args:
        annotations: such as `dataset_flickr30k.json`: `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, of
            which an image may have a `filepath`, the folder inside `images` (COCO has).
        images: the folder.
        split: "train", "val" or "test".
        skip_bad: leave photographs out that are not there or have no caption.

    Raises:
        ValueError: the file has another layout or no photograph of this split.
        BadData: a photograph is missing, or a caption is empty.
    """
    entries = _entries(annotations)
    photos, bad = [], []
    for entry in entries:
        if entry["split"] not in SPLITS.get(split, (split,)):
            continue
        file = images / entry.get("filepath", "") / entry["filename"]
        captions = tuple(sentence["raw"].strip() for sentence in entry["sentences"])
        if not file.is_file():
            bad.append(f"{file} is named in {annotations} and is not there")
        elif not captions or not all(captions):
            bad.append(f"{file} has an empty caption in {annotations}: {list(captions)}")
        else:
            photos.append(Photo(file, captions))
    if bad and not skip_bad:
        raise BadData(
            f"{bad[0]}{f' (and {len(bad) - 1} more like it)' if len(bad) > 1 else ''}: give the folder that the file's "
            "names are relative to, or leave such photographs out with --skip-bad"
        )
    if not photos:
        splits = sorted({str(entry["split"]) for entry in entries})
        raise ValueError(f"{annotations} has no photograph of the split {split!r} in {images}; it has splits {splits}")
    return photos


def _entries(annotations: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(annotations.read_text(encoding="utf-8"))["images"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{annotations} is not a caption file in Karpathy's layout: {error!r}") from None
    for position, entry in enumerate(entries):
        absent = {"filename", "split", "sentences"} - set(entry)
        if absent:
            raise ValueError(f"{annotations}: image {position} has no {sorted(absent)}, it has {sorted(entry)}")
    return entries


def fingerprint(photos: Sequence[Photo]) -> dict[str, Any]:
    """Return the number of photographs and a digest of their names and captions."""
    listing = "\n".join("\t".join((photo.file.name, *photo.captions)) for photo in photos)
    return {"photos": len(photos), "list_sha256": hashlib.sha256(listing.encode()).hexdigest()}


class Pairs:
    """Pairs of a photograph and a caption, for training.

    Args:
        photos: all of them.
        transform: from a PIL image to [3, H, W]; what chance it takes is torch's.
        captions: "all": each caption makes a pair, as in the reference; "one": one caption of each photograph, drawn
            anew in every epoch.
        seed: of the draws.
    """

    def __init__(
        self, photos: Sequence[Photo], transform: Callable[[Any], Tensor], captions: Literal["all", "one"], seed: int
    ) -> None:
        self.photos, self.transform, self.captions, self.seed = photos, transform, captions, seed
        self.pairs = [(i, j) for i, photo in enumerate(photos) for j in range(len(photo.captions))]

    def __len__(self) -> int:
        return len(self.pairs) if self.captions == "all" else len(self.photos)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, str, int]:
        index = draw[1]
        with chance(self.seed, draw) as number:
            if self.captions == "all":
                image, caption = self.pairs[index]
            else:
                image, caption = index, number % len(self.photos[index].captions)
            pixels = read_image(self.photos[image].file, self.transform)
        return pixels, self.photos[image].captions[caption], image


def collate(samples: Sequence[tuple[Tensor, str, int]], tokenize: Callable[[list[str]], Tensor]) -> Batch:
    """Return a batch of pairs: `pixels` [B, 3, H, W], `ids` [B, T] and `image` [B], which photograph each is of."""
    return {
        "pixels": torch.stack([pixels for pixels, _, _ in samples]),
        "ids": tokenize([caption for _, caption, _ in samples]),
        "image": torch.tensor([image for _, _, image in samples]),
    }
