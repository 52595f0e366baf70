"""Multiply-adds of generating text from images, by stage: image tower, prefill, one decoding step.

`count_flops` counts one forward. A model that generates runs two kinds of forward: the prefill, over the prompt with
its image tokens, and a decoding step for each new token, with the cache of keys and values that the prefill filled.
Both are counted as `generate` runs them, dense and reduced, on any device. On the meta device no memory is needed for
weights, so that models of 13 billion parameters can be counted anywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from crossget.core.adapters import Prefilled, Stages, load_integrations
from crossget.core.attach import find_attachment
from crossget.measure.flops import count_once

REST = "language model"
"""The part that the multiply-adds outside of all other parts belong to."""


@dataclass(frozen=True)
class GenerationCost:
    """What generating costs.

    Attributes:
        image_tokens: tokens that the language model gets for one image.
        prompt: tokens of the prefill.
        parts: name of the part -> its multiply-adds in the prefill, from the image tower to the language model.
        step: multiply-adds of one decoding step after the prompt.
        cache: numbers (not bytes) in the cache of keys and values after the prefill.
    """

    image_tokens: int
    prompt: int
    parts: Mapping[str, int]
    step: int
    cache: int

    @property
    def prefill(self) -> int:
        """Multiply-adds until the first new token, those of the image tower included."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class StageReport:
    """The costs of generating with a model: dense and, where a reducer is attached, reduced.

    Attributes:
        model: class of the model.
        images: number of images in the prompt.
        text_tokens: number of text tokens in the prompt.
        dense: the cost without any reducer.
        reduced: the cost with the reducers; None if nothing is attached.
        reducers: tower name -> reducer, as text.
    """

    model: str
    images: int
    text_tokens: int
    dense: GenerationCost
    reduced: GenerationCost | None
    reducers: Mapping[str, str]

    @property
    def speedup(self) -> float:
        """Multiply-adds of image tower and prefill, dense over reduced: the speed-up that is to be expected."""
        return 1.0 if self.reduced is None else self.dense.prefill / self.reduced.prefill

    def table(self) -> str:
        """A table with one stage per line."""
        costs = [self.dense] if self.reduced is None else [self.dense, self.reduced]
        rows = [
            *(_row(part, [cost.parts[part] for cost in costs]) for part in self.dense.parts),
            _row("image tower and prefill", [cost.prefill for cost in costs]),
            _row("one decoding step", [cost.step for cost in costs]),
            _row("tokens of an image", [cost.image_tokens for cost in costs]),
            _row("tokens of the prompt", [cost.prompt for cost in costs]),
            _row("cache at 16 bits, bytes", [2 * cost.cache for cost in costs]),
        ]
        headers = ["", "dense", "reduced", "ratio"][: len(rows[0])]
        title = f"{self.model}, {self.images} image(s) and {self.text_tokens} text tokens: multiply-adds"
        body = tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(rows[0]) - 1))
        lines = [title, *(f"{tower}: {reducer}" for tower, reducer in self.reducers.items()), "", body]
        if self.reduced is not None:
            lines += ["", f"predicted speed-up of image tower and prefill: {self.speedup:.2f}x"]
        return "\n".join(lines)

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report, as JSON."""
        prefills = {"dense": self.dense.prefill, "reduced": None if self.reduced is None else self.reduced.prefill}
        return json.dumps({**dataclasses.asdict(self), "prefill": prefills, "speedup": self.speedup}, indent=indent)

    def __str__(self) -> str:
        return self.table()


def _row(name: str, values: Sequence[int]) -> list[str]:
    row = [name, *(f"{value:,}" for value in values)]
    return [*row, f"{values[1] / values[0]:.1%}"] if len(values) == 2 else row


def count_stages(
    model: nn.Module, text_tokens: int = 64, images: int = 1, *, image_size: tuple[int, int] | None = None,
    tiles: int | None = None,
) -> StageReport:  # fmt: skip
    """Multiply-adds of generating text with a model of images and text.

    Args:
        model: a model whose integration defines its stages (LLaVA-1.5, BLIP, BLIP-2), or one of transformers whose
            connector can be reduced; attached or not, on any device.
        text_tokens: number of text tokens in the prompt.
        images: number of images in the prompt.
        image_size: height and width of an image in pixels, for a tower that takes images of any size: rounded to whole
            merged patches. None: 1024 x 1024.
        tiles: number of tiles of an image, for a model that cuts images into tiles; None: 1.

    Raises:
        TypeError: the model's stages are not defined.
        ValueError: there is no text, or no image, or the size or the tiles have no effect.
    """
    if text_tokens < 1 or images < 1:
        raise ValueError(f"text_tokens={text_tokens}, images={images}: a prompt has at least one of each")
    stages = _stages(model, image_size, tiles)
    attachment = find_attachment(model)
    name = type(model).__name__
    if attachment is None:
        return StageReport(name, images, text_tokens, _cost(model, stages, text_tokens, images), None, {})
    with attachment.paused():
        dense = _cost(model, stages, text_tokens, images)
    with attachment.generating():
        reduced = _cost(model, stages, text_tokens, images, list(attachment.parameters()))
    reducers = {tower: str(reducer) for tower, reducer in attachment.reducers.items()}
    return StageReport(name, images, text_tokens, dense, reduced, reducers)


def has_stages(model: nn.Module) -> bool:
    """Whether the stages of the model are known, so that `count_stages` can count them."""
    if _find_stages(model) is None:
        try:
            _stages(model)
        except TypeError:
            return False
    return True


def _stages(model: nn.Module, image_size: tuple[int, int] | None = None, tiles: int | None = None) -> Stages:
    """The stages that the integration of the model's class defines, or those of a model with a connector."""
    attachment = find_attachment(model)
    found = None if attachment is not None and attachment.connector is not None else _find_stages(model)
    if found is not None:
        if (image_size, tiles) != (None, None):
            raise ValueError(f"{type(model).__name__} takes images of one size, without tiles: leave both out")
        return found(model)
    generic = next((module for cls in type(model).__mro__ if (module := _with_connectors(cls)) is not None), None)
    if generic is None:
        raise TypeError(
            f"the stages of {type(model).__name__} are not defined: expected LLaVA-1.5, BLIP (captions), BLIP-2 or a "
            "model of transformers with a connector; crossget.count_flops counts one forward of any model"
        )
    stages: Stages = generic.stages(model, image_size, tiles)
    return stages


def _find_stages(model: nn.Module) -> Callable[[Any], Stages] | None:
    for cls in type(model).__mro__:
        for module in load_integrations(cls):
            known: Mapping[type, Callable[[Any], Stages]] = getattr(module, "STAGES", {})
            if cls in known:
                return known[cls]
    return None


def _with_connectors(cls: type) -> Any:
    """The module that knows the stages of models with a connector; None: the class is of another host."""
    if cls.__module__.split(".")[0] != "transformers":
        return None
    return importlib.import_module("crossget.integrations.hf_connector")


class _Stage(nn.Module):
    """One stage as a module, which can be counted."""

    def __init__(self, model: nn.Module, stage: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(numbers_in(self.stage(*tensors)))


def _cost(
    model: nn.Module, stages: Stages, text_tokens: int, images: int, parameters: Sequence[nn.Parameter] = ()
) -> GenerationCost:
    device = next(model.parameters()).device
    pixels = torch.zeros(images, *stages.pixels, device=device)
    ids = torch.zeros(1, text_tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        prefilled = stages.prefill(pixels, ids)
        cache = sum(tensor.numel() for tensor in numbers_in(prefilled.cache))
    prefill = count_once(_Stage(model, stages.prefill), (pixels, ids), parameters)
    step = count_once(_Stage(model, partial(_step, stages, prefilled)), ids[:, -1:], parameters)
    names = {module: name for name, module in _Stage(model, stages.prefill).named_modules()}
    parts = {part: sum(prefill.by_module.get(names[m], 0) for m in modules) for part, modules in stages.parts.items()}
    parts[REST] = prefill.total - sum(parts.values())
    return GenerationCost(prefilled.image_tokens, prefilled.prompt, parts, step.total, cache)


def _step(stages: Stages, prefilled: Prefilled, token: Tensor) -> Any:
    return stages.step(token, prefilled)


def numbers_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, those in a cache of keys and values included."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from numbers_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from numbers_in(value)
    else:
        for name in _IN_A_CACHE:
            yield from numbers_in(getattr(tree, name, ()))


# The attributes of transformers' caches that hold tensors: newer versions hold layers, older ones lists, and the cache
# of an encoder-decoder holds two caches.
_IN_A_CACHE = ("layers", "keys", "values", "key_cache", "value_cache", "self_attention_cache", "cross_attention_cache")
