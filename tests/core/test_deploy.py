"""Attached models are traced, exported, vectorised and deployed like any others, or say why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hf_models
import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor

import crossget
import unregistered_models
from crossget.methods.reducers import Reducer

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


@dataclass(frozen=True)
class Host:
    """A small model that takes one tensor with a batch axis.

    Attributes:
        make: a function that makes it.
        inputs: a function of the batch size that makes its input.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def texts(batch: int) -> Tensor:
    """Token ids [B, 16]. The highest id, 59, ends each text, at other places."""
    ids = torch.randint(3, 58, (batch, 16), generator=torch.Generator().manual_seed(batch))
    ends = torch.arange(batch) % 5 + 11
    return ids.scatter(1, ends[:, None], 59) * (torch.arange(16) <= ends[:, None])


class Part(nn.Module):
    """One method of a model, as a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


def small_clip() -> nn.Module:
    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    return open_clip.CLIP(24, vision, CLIPTextCfg(context_length=16, vocab_size=60, width=32, heads=4, layers=3))


def of_transformers(name: str, **settings: Any) -> nn.Module:
    """A small model by the name of its class without "Model", such as CLIPVision."""
    config = getattr(transformers, f"{name.removesuffix('WithProjection').removesuffix('Model')}Config")
    return hf_models.built(getattr(transformers, name), config(**settings))


def hf_text() -> nn.Module:
    text = {key: value for key, value in hf_models.TEXT.items() if key != "num_key_value_heads"}
    return of_transformers("CLIPTextModelWithProjection", **text | {"max_position_embeddings": 16, "eos_token_id": 59})


HOSTS = {
    "timm": Host(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3), images),
    "open_clip images": Host(lambda: Part(small_clip(), "encode_image"), images),
    "open_clip texts": Host(lambda: Part(small_clip(), "encode_text"), texts),
    "CLIPVision": Host(lambda: of_transformers("CLIPVisionModelWithProjection", **hf_models.VISION), images),
    "CLIPText": Host(hf_text, texts),
    "Dinov2": Host(lambda: of_transformers("Dinov2Model", **hf_models.VISION), images),
    "torchvision": Host(lambda: VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5), images),
}
