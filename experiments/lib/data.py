"""What the experiments that train share about their data: samples by (epoch, index), bad ones named, images read."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Draw = tuple[int, int]
"""(epoch, index): what a sample looks like depends on these and the seed only."""
Batch = dict[str, Any]
T = TypeVar("T")


class BadData(ValueError):
    """A sample that cannot be used; the message names it, or its file."""


class Dataset(Protocol):
    """Samples, drawn anew in each epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Any:
        """Return one sample.

        Raises:
            BadData: it cannot be used.
        """
        ...


def generator(*numbers: int) -> torch.Generator:
    """Return a source of chance that depends on these numbers only."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def chance(seed: int, draw: Draw) -> Iterator[int]:
    """Inside, torch's own chance depends on the seed and the draw only; yields a number that does, too."""
    number = int(torch.randint(2**62, (), generator=generator(seed, *draw)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield number


def first_good(read: Callable[[int], T], index: int, size: int) -> T:
    """Return sample `index` of `size`, or the next one that can be used; a warning names those that cannot.

    Raises:
        BadData: none can.
    """
    for offset in range(size):
        try:
            return read((index + offset) % size)
        except BadData as error:  # noqa: PERF203
            warnings.warn(f"skipped: {error}", stacklevel=2)
    raise BadData("no sample of the data set can be used")


class Skipping:
    """A data set with the next good sample in the place of each bad one."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw
        return first_good(lambda i: self.data[epoch, i], index, len(self.data))


def read_image(file: Path, transform: Callable[[Any], T]) -> T:
    """Return what `transform` makes of an image in RGB.

    Raises:
        BadData: it is missing, truncated or no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
    # What PIL raises for broken files; a SyntaxError is one of PNG's.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(f"{file}: the image cannot be read ({type(error).__name__}: {error})") from error
    return transform(rgb)


class Labelled:
    """Images with their labels, for training.

    Args:
        files: of all images.
        labels: of all images.
        transform: from a PIL image to [3, H, W]; what chance it takes is torch's.
        seed: of that chance.
    """

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], transform: Callable[[Any], Tensor], seed: int
    ) -> None:
        self.files, self.labels, self.transform, self.seed = files, labels, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        with chance(self.seed, draw):
            return read_image(self.files[draw[1]], self.transform), self.labels[draw[1]]


def collate(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    """Return a batch of labelled images: `pixels` [B, 3, H, W] and `labels` [B]."""
    pixels, labels = zip(*samples, strict=True)
    return {"pixels": torch.stack(pixels), "labels": torch.tensor(labels)}
