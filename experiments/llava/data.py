"""LLaVA-1.5's instruction data: samples, batches, and the order they come in.

In a batch every row has one image, also those of samples that have none: the image tower has to run in every process
(ZeRO-3 and FSDP2 wait for each other there), and the reference lets these blank images take part in the alignment loss.
Their tokens stand behind the text, where nothing that is learnt sees them.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.lib.data import BadData, first_good, read_image
from experiments.llava.conversation import IGNORED, Encoder

Sample = dict[str, Any]


def read_samples(file: Path, skip_bad: bool = False) -> list[Sample]:
    """Return the samples of a JSON list, or of a file with one JSON object per line (.jsonl).

    Raises:
        BadData: a sample is not what LLaVA's data has. With `skip_bad` it is left out, with a warning.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        text = "[" + text.removesuffix("\n").replace("\n", ",") + "]"  # JSON holds no line break as such in its texts
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{file}: expected a JSON list of samples, got a {type(found).__name__}")
    samples = []
    for number, sample in enumerate(found):
        if _is_sample(sample):
            samples.append(sample)
            continue
        message = (
            f"{file}, sample {number}: expected an object with conversations, each of them with the texts from and "
            f"value, and at most one image, got {str(sample)[:80]}"
        )
        if not skip_bad:
            raise BadData(f"{message}. Correct it, or leave such samples out with --skip-bad")
        warnings.warn(f"skipped: {message}", stacklevel=2)
    return samples


def _is_sample(sample: Any) -> bool:
    if not isinstance(sample, dict) or not isinstance(sample.get("image", ""), str):
        return False
    turns = sample.get("conversations")
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    )


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return the image in the middle of a square of one colour."""
    size = max(image.size)
    filled = Image.new("RGB", (size, size), colour)
    filled.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return filled


@dataclass(frozen=True)
class Conversations(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples as the model takes them: input_ids [T], labels [T], pixel_values [3, H, W].

    Attributes:
        samples: of `read_samples`.
        images: folder that their paths begin in.
        encoder: makes tokens of conversations.
        image_processor: makes pixel values of images.
        placeholders: image tokens that stand for an image, as the model's processor writes them.
        features: how many of them are left in the language model, where `encoder.limit` holds.
        skip_bad: put the next good sample in the place of a bad one, with a warning.
    """

    samples: list[Sample]
    images: Path
    encoder: Encoder
    image_processor: Any
    placeholders: int
    features: int
    skip_bad: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample.

        Raises:
            BadData: it cannot be used.
        """
        if self.skip_bad:
            return first_good(lambda i: self._read(self.samples[i]), index, len(self.samples))
        try:
            return self._read(self.samples[index])
        except BadData as error:
            raise BadData(f"{error}. Correct it, or leave such samples out with --skip-bad") from error

    def lengths(self) -> list[int]:
        """Return the words of each sample, negative where there is no image."""
        counts = [max(1, sum(len(turn["value"].split()) for turn in s["conversations"])) for s in self.samples]
        return [n if "image" in s else -n for n, s in zip(counts, self.samples, strict=True)]

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        has_image = "image" in sample
        name = f"sample {sample.get('id')!r}"
        if has_image:
            name += f" with the image {self.images / sample['image']}"
        try:
            ids, labels = self.encoder(sample["conversations"], has_image)
        except BadData as error:
            raise BadData(f"{name}: {error}") from None
        token, limit = self.encoder.image, self.encoder.limit
        if has_image:
            found = ids.count(token)
            ids = ids[: limit - self.features + 1]
            if found != 1 or token not in ids:
                where = "behind the longest text" if found == 1 else f"{found} times"
                raise BadData(f"{name}: expected <image> once, in one of its turns; it stands there {where}")
            place = ids.index(token)
        else:
            ids = [*ids[:limit], token]
            place = len(ids) - 1
        labels = [*labels[:place], *[IGNORED] * self.placeholders, *labels[place + 1 : len(ids)]]
        ids = [*ids[:place], *[token] * self.placeholders, *ids[place + 1 :]]
        pixels = self._pixels(self.images / sample["image"], name) if has_image else self._blank()
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}

    def _pixels(self, path: Path, name: str) -> Tensor:
        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        try:
            return read_image(path, lambda image: self._process(square(image, colour)))
        except BadData as error:
            raise BadData(f"{name}: {error}") from error

    def _process(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def _blank(self) -> Tensor:
        """Zeros, which is the mean colour, as in the original."""
        size = self.image_processor.crop_size
        return torch.zeros(3, size["height"], size["width"])


@dataclass(frozen=True)
class Collator:
    """Makes a batch, filled up on the right: input_ids, labels and attention_mask [B, T], pixel_values [B, 3, H, W].

    Attributes:
        pad: token that rows are filled up with.
    """

    pad: int

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        def rows(name: str, fill: int) -> Tensor:
            return pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=fill)

        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        ids = rows("input_ids", self.pad)
        return {
            "input_ids": ids,
            "labels": rows("labels", IGNORED),
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        }


class GroupedSampler(torch.utils.data.Sampler[int]):
    """An order in which a step's samples either all have images or all have none, and a batch's are of like lengths.

    As in the original: shuffled samples of a kind are cut into steps; within a step they are sorted by length and dealt
    to its batches so that these come out equally long; then the steps are shuffled. What is left over of the two kinds
    makes one more step, the first, if there is enough. Other than there, less than a step is left out in this epoch.

    What a step is made of depends on the seed, the epoch and the samples per step only, so that any number of processes
    makes the same steps, and a run goes on where it stopped.

    Args:
        lengths: of all samples, negative for those without image.
        batch: samples per forward.
        batches: per step: processes times forwards.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, batches: int, seed: int) -> None:
        self.lengths, self.batch, self.batches, self.seed, self.epoch = lengths, batch, batches, seed, 0
        self.step = batch * batches

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's order is wanted."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.step * self.step

    def __iter__(self) -> Iterator[int]:
        chance = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        steps: list[list[int]] = []
        rest: list[int] = []
        for kind in (True, False):
            indices = [i for i, length in enumerate(self.lengths) if (length > 0) == kind]
            shuffled = [indices[i] for i in torch.randperm(len(indices), generator=chance).tolist()]
            whole = len(shuffled) // self.step * self.step
            steps += [shuffled[i : i + self.step] for i in range(0, whole, self.step)]
            rest += shuffled[whole:]
        order = [steps[i] for i in torch.randperm(len(steps), generator=chance).tolist()]
        if len(rest) >= self.step:
            order.insert(0, rest[: self.step])
        return iter([index for step in order for index in self._dealt(step)])

    def _length(self, index: int) -> int:
        return abs(self.lengths[index])

    def _dealt(self, indices: list[int]) -> list[int]:
        """A step: the longest first, each to the batch that is shortest so far and not full."""
        hands: list[list[int]] = [[] for _ in range(self.batches)]
        for index in sorted(indices, key=self._length, reverse=True):
            open_ = [hand for hand in hands if len(hand) < self.batch]
            min(open_, key=lambda hand: sum(map(self._length, hand))).append(index)
        return [index for hand in hands for index in hand]
