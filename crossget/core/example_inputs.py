"""Random inputs for models of known libraries whose configuration tells their size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.inputs import AnyInputs

BATCH = 2
# Where configurations of transformers hold those of their image tower.
_VISION_CONFIGS = ("vision_config", "image_config", "vision_tower_config", "backbone_config")


def example_inputs(model: nn.Module) -> AnyInputs | None:
    """Two random images (or texts, for a model of texts) for a model; None: their form is not known.

    Raises:
        TypeError: the model is on the meta device, where nothing can be compared.
    """
    host = next((cls.__module__.split(".")[0] for cls in type(model).__mro__ if _host(cls) in _MAKERS), "")
    if not host:
        return None
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return None
    if parameter.is_meta:
        raise TypeError(
            f"{type(model).__qualname__} has no adapter and is on the meta device, so that no forward can be watched: "
            "load its weights first"
        )

    def images(*shape: int) -> Tensor:
        made = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))
        return made.to(parameter.device, parameter.dtype)

    return _MAKERS[host](model, images)


def _host(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _timm(model: Any, images: Callable[..., Tensor]) -> AnyInputs | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size") if isinstance(config, Mapping) else None
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if shape is None:
        return None
    return images(shape[0], *_pair(shape[1:] if size is None else size))


def _torchvision(model: Any, images: Callable[..., Tensor]) -> AnyInputs | None:
    size = getattr(model, "image_size", None)
    return None if size is None else images(3, *_pair(size))


def _open_clip(model: Any, images: Callable[..., Tensor]) -> AnyInputs | None:
    visual = getattr(model, "visual", model)
    size = getattr(visual, "image_size", None)
    if size is None:
        return None
    made = images(3, *_pair(size))
    return partial(model.encode_image, made) if hasattr(model, "encode_image") else made


def _transformers(model: Any, images: Callable[..., Tensor]) -> AnyInputs | None:
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "")
    parts = [config, *(getattr(config, name, None) for name in _VISION_CONFIGS)]
    sized = next((part for part in parts if getattr(part, "image_size", None) is not None), None)
    if sized is not None:
        channels = getattr(sized, "num_channels", None) or getattr(sized, "in_channels", 3)
        size: Any = sized.image_size
        size = (size["height"], size["width"]) if isinstance(size, Mapping) else size
        pixels = images(int(channels or 3), *_pair(size))
        if main == "pixel_values":
            return {"pixel_values": pixels}
        features = getattr(model, "get_image_features", None)
        if features is not None and "pixel_values" in inspect.signature(features).parameters:
            return partial(features, pixel_values=pixels)
        return None
    words = getattr(config, "vocab_size", None)
    if main == "input_ids" and words:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(words, (BATCH, 16), generator=generator)
        return {"input_ids": ids.to(next(model.parameters()).device)}
    return None


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


_MAKERS = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip, "transformers": _transformers}
