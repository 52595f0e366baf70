"""The two models and their images: a ViT-Tiny on ImageNet photographs, a ViT of four blocks on CIFAR-10."""

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.lib.files import file_digest


@dataclass(frozen=True)
class Setting:
    """A model with what its images need.

    Attributes:
        title: how reports call it.
        build: the model without trained weights.
        pretrained: the model with weights from the network; None where there are none to get.
        classes: number of classes.
        size: side of the square the model sees, in pixels.
        resize: length the shorter side is brought to before the centre crop; None: images are `size` already.
        mean, std: per channel, of values in [0, 1].
    """

    title: str
    build: Callable[[], nn.Module]
    pretrained: Callable[[], nn.Module] | None
    classes: int
    size: int
    resize: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """Return the function from a PIL image to a tensor [3, size, size].

        For training with crops and mirroring: of 50 to 100 % of the area, or by up to an eighth of images that have
        the model's size already. What chance it takes is torch's.
        """
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        steps: list[Callable[[Any], Any]] = []
        if self.resize is None:
            steps += [transforms.RandomCrop(self.size, padding=self.size // 8)] if train else []
        elif train:
            steps += [transforms.RandomResizedCrop(self.size, scale=(0.5, 1.0), interpolation=bicubic)]
        else:
            steps += [transforms.Resize(self.resize, interpolation=bicubic), transforms.CenterCrop(self.size)]
        steps += [transforms.RandomHorizontalFlip()] if train else []
        steps += [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        composed: Callable[[Any], Tensor] = transforms.Compose(steps)
        return composed


def vit_tiny(pretrained: bool = False) -> nn.Module:
    """Return timm's vit_tiny_patch16_224: 12 blocks, 197 tokens."""
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=pretrained)
    return model


def vit_cifar() -> nn.Module:
    """Return a ViT of four blocks for 32-pixel images: 65 tokens of 128 channels."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
    )


SETTINGS = {
    "imagenet": Setting(
        title="ViT-Tiny/16, ImageNet photographs",
        build=vit_tiny,
        pretrained=lambda: vit_tiny(pretrained=True),
        classes=1000,
        size=224,
        resize=248,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    "cifar10": Setting(
        title="ViT of 4 blocks, CIFAR-10",
        build=vit_cifar,
        pretrained=None,
        classes=10,
        size=32,
        resize=None,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
}


def load_model(setting: Setting, weights: Path | None) -> nn.Module:
    """Return the setting's model with trained weights, in float32 and evaluation mode.

    Args:
        setting: which model.
        weights: a safetensors file with exactly the model's parameters, in any precision; None downloads.

    Raises:
        ValueError: no file is given and there is nothing to download.
        RuntimeError: the file's parameters are not the model's (from `load_state_dict`).
    """
    if weights is not None:
        from safetensors.torch import load_file

        model = setting.build()
        model.load_state_dict({name: value.float() for name, value in load_file(weights).items()}, strict=True)
        return model.eval()
    if setting.pretrained is None:
        raise ValueError(
            f"no weights are published for {setting.title}: train the model and give the file by --weights "
            "(experiments/README.md has the recipe)"
        )
    return setting.pretrained().eval()


@dataclass(frozen=True)
class Measuring:
    """What every program takes that measures one of the two models on a folder of images."""

    setting: Literal["imagenet", "cifar10"]
    """Model and preprocessing."""
    data: Path
    """Folder with labels.csv (file,label), or with one folder of images per class."""
    weights: Path | None = None
    """Safetensors file with the model's parameters; without it timm's are downloaded."""
    batch: int = 50
    """Images per forward."""
    limit: int | None = None
    """Take this many images only."""
    device: str = "cpu"
    """Where the model runs."""
    overwrite: bool = False
    """Run again what has a result file."""

    def load(self) -> tuple[nn.Module, "Images"]:
        """Return the model, on its device, and the images; see `load_model` and `load_images`."""
        setting = SETTINGS[self.setting]
        return load_model(setting, self.weights).to(self.device), load_images(setting, self.data, self.limit)

    def given(self, images: "Images") -> dict[str, Any]:
        """Return what a result file says of the weights, the images and the batch."""
        weights = self.weights
        digest = {"file": weights.name, "sha256": file_digest(weights)} if weights else None
        return {"weights": digest, "data": images.source, "batch": self.batch}


def list_samples(folder: Path) -> list[tuple[str, int]]:
    """Return (file relative to the folder, label) of every image, sorted by file.

    Args:
        folder: either holds labels.csv with the columns `file` and `label`, or one folder of images per class, whose
            sorted names are the labels 0, 1, ...

    Raises:
        ValueError: no image is found.
    """
    table = folder / "labels.csv"
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            samples = [(row["file"], int(row["label"])) for row in csv.DictReader(file)]
    else:
        classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        samples = [
            (file.relative_to(folder).as_posix(), label)
            for label, entry in enumerate(classes)
            for file in entry.iterdir()
            if file.suffix.lower() in {".png", ".jpg", ".jpeg"}
        ]
    if not samples:
        raise ValueError(f"no image in {folder}: expected labels.csv (file,label), or one folder of images per class")
    return sorted(samples)


@dataclass(frozen=True)
class Samples:
    """Images that are not read yet.

    Attributes:
        files: of all images.
        labels: of all images.
        source: name of the folder and a digest of the list, for the result files.
    """

    files: list[Path]
    labels: list[int]
    source: dict[str, Any]


def find_samples(setting: Setting, folder: Path, limit: int | None = None) -> Samples:
    """Return what `list_samples` finds, as it suits the setting.

    Args:
        setting: the number of classes.
        folder: see `list_samples`.
        limit: take this many images, spread evenly over the sorted list; None takes all.

    Raises:
        ValueError: a label is not one of the model's classes.
    """
    samples = list_samples(folder)
    if limit is not None and limit < len(samples):
        samples = [samples[i * len(samples) // limit] for i in range(limit)]
    largest = max(label for _, label in samples)
    if largest >= setting.classes:
        raise ValueError(f"{folder} has a label {largest}, but {setting.title} has {setting.classes} classes")
    listing = "\n".join(f"{file},{label}" for file, label in samples)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    source = {"folder": folder.name, "n": len(samples), "list_sha256": digest}
    return Samples([folder / file for file, _ in samples], [label for _, label in samples], source)


@dataclass(frozen=True)
class Images:
    """All images of a run, ready for the model.

    Attributes:
        pixels: [N, 3, size, size].
        labels: [N].
        source: see `Samples`.
    """

    pixels: Tensor
    labels: Tensor
    source: dict[str, Any]


def load_images(setting: Setting, folder: Path, limit: int | None = None) -> Images:
    """Read and transform all images once; see `find_samples`."""
    from PIL import Image

    samples = find_samples(setting, folder, limit)
    transform = setting.transform()
    pixels = torch.empty(len(samples.files), 3, setting.size, setting.size)
    for i, file in enumerate(tqdm(samples.files, desc="images", disable=None, unit="image")):
        with Image.open(file) as image:
            pixels[i] = transform(image.convert("RGB"))
    return Images(pixels, torch.tensor(samples.labels), samples.source)
