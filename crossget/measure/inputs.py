"""The arguments that a model is called with, and the tensors in what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and the distinct tensors in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors[0].device

    def run(self, model: nn.Module) -> Any:
        """Call the model, and return what it returns."""
        return model(*self.args, **self.kwargs)

    def replaced(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in place of `self.tensors`."""
        swap = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        args, kwargs = tree_map_only(Tensor, lambda tensor: swap[id(tensor)], (self.args, self.kwargs))
        return args, kwargs


def as_call(inputs: Inputs) -> Call:
    """The call that `inputs` stand for.

    Raises:
        TypeError: `inputs` is no tensor, tuple or mapping.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple):
        args = inputs
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        raise TypeError(
            f"inputs is a {type(inputs).__name__}: expected a tensor, a tuple of positional arguments or a mapping of"
            " keyword arguments; wrap a single argument of another type as (argument,)"
        )
    # A tensor that is given twice (as query and as key) stays one object, because hosts test `query is key`.
    distinct = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    return Call(args, kwargs, tuple(distinct.values()))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: nested containers, and mappings and dataclasses that torch does not know."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, entry.name) for entry in dataclasses.fields(leaf)])
