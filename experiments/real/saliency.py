"""Saliency maps from the patch features of a reduced DINOv2, brought back to the grid, against the dense model's maps.

The decoder is trained on dense features and is not changed. It reads a feature at every patch. A patch that was merged
gets the feature of its token, a patch that TopK dropped the mean of the patches that are left.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget import CrossGET, ToMe, TopK, Ward
from crossget.core.files import read_json
from experiments.ablation.run import cost, described
from experiments.ablation.settings import Setting, load_images
from experiments.lib.files import Json, check_names, file_digest, pack
from experiments.lib.study import Study
from experiments.real.clip import Photographs
from experiments.real.presets import BUDGETS, Row, fit

ROWS: dict[str, Row] = {
    "tome": Row("ToMe", ToMe(0)),
    "crossget": Row("CrossGET, untrained", CrossGET(0)),
    "ward": Row("Ward", Ward(0), "ramped"),
    "topk": Row("TopK, by the class token's query", TopK(0)),
}
SIZE = 224
"""Side of the square that the model sees, and of the maps."""


class Decoder(nn.Module):
    """A map of saliency from patch features: three transposed convolutions, and one of a single pixel.

    Args:
        channels: of the patch features, and behind each transposed convolution.
    """

    def __init__(self, channels: Sequence[int] = (384, 256, 128, 64)) -> None:
        super().__init__()
        for i, (before, behind) in enumerate(itertools.pairwise(channels), 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(before, behind, 4, 2, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(behind))
        self.stages = len(channels) - 1
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return maps [B, SIZE, SIZE] in [0, 1] of patch features [B, P, C]."""
        side = round(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).unflatten(2, (side, side))
        for i in range(1, self.stages + 1):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)))
        x = F.interpolate(self.final_conv(x), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return x.sigmoid()[:, 0]


@dataclass(frozen=True)
class Run:
    """One method at one budget."""

    task: str
    preset: str
    budget: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"{self.task}/{self.preset}_{self.budget}"


@dataclass(frozen=True, kw_only=True)
class Options(Photographs):
    """What to measure, and with what."""

    backbone: Path
    """Safetensors file with the parameters of a transformers Dinov2Model."""
    decoder: Path
    """Safetensors file with the parameters of `Decoder`."""
    config: Path | None = None
    """JSON file with what of the Dinov2Config differs from a ViT-S/14 for 518 pixels."""
    presets: tuple[str, ...] = tuple(ROWS)
    """Methods to run."""
    budgets: tuple[int, ...] = BUDGETS
    """Multiply-adds of the backbone, in % of the dense one's."""
    limit: int | None = None
    """Take this many photographs only, evenly spread over the sorted list."""
    batch: int = 25
    """Images per forward when measuring."""


def load_backbone(weights: Path, config: Path | None = None) -> nn.Module:
    """Return a DINOv2 with its weights, in evaluation mode.

    Args:
        weights: safetensors file with the parameters of a transformers Dinov2Model.
        config: JSON file with what of the Dinov2Config differs from a ViT-S/14 for 518 pixels.

    Raises:
        RuntimeError: the file's parameters are not the model's (from `load_state_dict`).
    """
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model

    small: Json = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
    changes = {} if config is None else read_json(config)
    model: nn.Module = Dinov2Model(Dinov2Config(**{**small, **changes}))
    model.load_state_dict(load_file(weights))
    return model.eval()


def load_decoder(weights: Path, backbone: Any) -> Decoder:
    """Return the decoder of a backbone's features with its weights, in evaluation mode.

    Raises:
        RuntimeError: the file's parameters are not the decoder's (from `load_state_dict`).
    """
    from safetensors.torch import load_file

    decoder = Decoder((backbone.config.hidden_size, 256, 128, 64))
    decoder.load_state_dict(load_file(weights))
    return decoder.eval()


def square() -> Setting:
    """Return what images of the DINOv2 need: resized to a square without a crop, whatever their labels are."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return _Square(
        title="DINOv2", build=nn.Identity, pretrained=None, classes=1 << 30, size=SIZE, resize=SIZE,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
    )  # fmt: skip


class _Square(Setting):
    """A setting whose images are resized to the square without a crop."""

    def transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        """Return the function from a PIL image to a tensor [3, size, size]."""
        from torchvision import transforms

        composed: Callable[[Any], Tensor] = transforms.Compose([
            transforms.Resize((self.size, self.size)), transforms.ToTensor(), transforms.Normalize(self.mean, self.std),
        ])  # fmt: skip
        return composed


@torch.no_grad()
def maps_of(backbone: nn.Module, decoder: nn.Module, pixels: Tensor, batch: int, device: str) -> Tensor:
    """Return the maps [N, SIZE, SIZE] of all images, on the CPU."""
    parts = []
    for images in pixels.split(batch):
        patches = backbone(images.to(device)).last_hidden_state[:, 1:]
        parts.append(decoder(patches).float().cpu())
    return torch.cat(parts)


def agreement(maps: Tensor, dense: Tensor) -> Json:
    """Return how near maps [N, H, W] are to the dense model's.

    Returns:
        `mae`: mean absolute difference. `iou`: intersection over union of what is above 0.5, in %; 100 where nothing is
        in both. Both image by image as well, packed.
    """
    errors = (maps - dense).abs().mean((1, 2))
    one, other = maps > 0.5, dense > 0.5
    union = (one | other).sum((1, 2))
    shared = (one & other).sum((1, 2))
    overlaps = torch.where(union > 0, shared / union.clamp_min(1), torch.ones_like(errors))
    return {
        "mae": round(float(errors.mean()), 6),
        "iou": round(100 * float(overlaps.mean()), 4),
        "n": len(maps),
        "maes": pack(errors.double().numpy()),
        "ious": pack(overlaps.double().numpy()),
    }


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("presets", options.presets, ROWS)
    return [Run("saliency", name, budget) for budget in options.budgets for name in options.presets]


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    backbone = load_backbone(options.backbone, options.config).to(options.device)
    decoder = load_decoder(options.decoder, backbone).to(options.device)
    images = load_images(square(), options.data, options.limit)
    dense = maps_of(backbone, decoder, images.pixels, options.batch, options.device)
    one = images.pixels[:1].to(options.device)
    weights = {name: file_digest(file) for name, file in (("backbone", options.backbone), ("decoder", options.decoder))}

    def measured(run: Run) -> Json:
        reducer = fit(backbone, one, ROWS[run.preset], run.budget)
        with crossget.attach(backbone, reducer) as attached:
            maps = maps_of(backbone, decoder, images.pixels, options.batch, options.device)
            spent = cost(backbone, attached, one)
        config = {
            **asdict(run), "model": "DINOv2 ViT-S/14 with a saliency decoder", "reducer": described(reducer),
            "weights": weights, "data": images.source, "batch": options.batch,
        }  # fmt: skip
        return {"run": config, "result": {**agreement(maps, dense), **spent}}

    return measured


STUDY = Study("real-saliency", Options, grid, load, lambda run: {"presets": (run.preset,), "budgets": (run.budget,)})
