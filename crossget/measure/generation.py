"""What a model of images and text costs to generate with, stage by stage: image tower, prefill, one decoding step.

`count_flops` counts one forward. A generating model runs two kinds: the prefill, over the prompt with its image tokens,
and a decoding step for each new token, against the cache of keys and values that the prefill left. Both are counted
here as `generate` runs them, dense and reduced, on any device: on "meta" a model of 13 billion parameters takes seconds
and no memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from crossget.core.adapters import Prefilled, Stages, load_integrations
from crossget.core.attachment import find_attachment
from crossget.measure.flops import count_once

REST = "language model"


@dataclass(frozen=True)
class Cost:
    """What generating costs.

    Attributes:
        image_tokens: that the language model gets for an image.
        prompt: tokens of the prefill.
        parts: multiply-adds of the prefill by part, from the image tower to the language model.
        step: multiply-adds of one decoding step behind the prompt.
        cache: numbers in the cache behind the prefill.
    """

    image_tokens: int
    prompt: int
    parts: Mapping[str, int]
    step: int
    cache: int

    @property
    def prefill(self) -> int:
        """Multiply-adds until the first new token, the image tower's among them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class StageReport:
    """The costs of generating with a model: dense and, where a reducer is attached, reduced.

    Attributes:
        model: class of the model.
        images: in the prompt.
        text_tokens: in the prompt.
        dense: without any reducer.
        reduced: with the reducers; None if nothing is attached.
        reducers: tower name -> reducer, as text.
    """

    model: str
    images: int
    text_tokens: int
    dense: Cost
    reduced: Cost | None
    reducers: Mapping[str, str]

    @property
    def speedup(self) -> float:
        """Predicted for image tower and prefill: multiply-adds of dense over those of reduced."""
        return 1.0 if self.reduced is None else self.dense.prefill / self.reduced.prefill

    def table(self) -> str:
        """The stages, one a line."""
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


def count_stages(model: nn.Module, text_tokens: int = 64, images: int = 1) -> StageReport:
    """Multiply-adds of generating with a model of images and text.

    Args:
        model: one whose adapter knows its stages (LLaVA-1.5, BLIP, BLIP-2), attached or not, on any device.
        text_tokens: in the prompt.
        images: in the prompt.

    Raises:
        TypeError: nobody knows its stages.
        ValueError: there is no text, or no image.
    """
    if text_tokens < 1 or images < 1:
        raise ValueError(f"text_tokens={text_tokens}, images={images}: a prompt has at least one of each")
    stages = _stages(model)
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
    """Whether the model generates in stages that its adapter knows."""
    return _find_stages(model) is not None


def _find_stages(model: nn.Module) -> Callable[[Any], Stages] | None:
    for cls in type(model).__mro__:
        for module in load_integrations(cls):
            known: Mapping[type, Callable[[Any], Stages]] = getattr(module, "STAGES", {})
            if cls in known:
                return known[cls]
    return None


def _stages(model: nn.Module) -> Stages:
    found = _find_stages(model)
    if found is None:
        raise TypeError(
            f"how {type(model).__name__} generates is not known here: expected LLaVA-1.5, BLIP (captions) or BLIP-2; "
            "crossget.count_flops counts one forward of any model"
        )
    return found(model)


class _Run(nn.Module):
    """One stage as a module, so that it can be counted."""

    def __init__(self, model: nn.Module, stage: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(numbers_in(self.stage(*tensors)))


def _cost(
    model: nn.Module, stages: Stages, text_tokens: int, images: int, parameters: Sequence[nn.Parameter] = ()
) -> Cost:
    device = next(model.parameters()).device
    pixels = torch.zeros(images, *stages.pixels, device=device)
    ids = torch.zeros(1, text_tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        left = stages.prefill(pixels, ids)
        cache = sum(tensor.numel() for tensor in numbers_in(left.cache))
    prefill = count_once(_Run(model, stages.prefill), (pixels, ids), parameters)
    step = count_once(_Run(model, partial(_step, stages, left)), ids[:, -1:], parameters)
    names = {module: name for name, module in _Run(model, stages.prefill).named_modules()}
    parts = {part: sum(prefill.by_module.get(names[m], 0) for m in modules) for part, modules in stages.parts.items()}
    return Cost(left.image_tokens, left.prompt, {**parts, REST: prefill.total - sum(parts.values())}, step.total, cache)


def _step(stages: Stages, left: Prefilled, token: Tensor) -> Any:
    return stages.step(token, left)


def numbers_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, also those in a cache, which every version of a host keeps elsewhere."""
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


# Attributes that hold a cache's tensors: newer caches hold layers, older ones lists; that of an encoder-decoder, two.
_IN_A_CACHE = ("layers", "keys", "values", "key_cache", "value_cache", "self_attention_cache", "cross_attention_cache")
