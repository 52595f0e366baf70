"""The arguments that a model is called with, and the tensors in what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""


AnyInputs = Inputs | Callable[[], Any]
"""`Inputs`, or a function that runs the model, such as `lambda: model.encode_image(images)`."""


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


def as_function(model: nn.Module, inputs: AnyInputs) -> Callable[[], Any]:
    """A function that runs the model on `inputs`, with the same random numbers every time.

    Raises:
        TypeError: `inputs` is no tensor, tuple, mapping or function.
    """
    is_function = callable(inputs) and not isinstance(inputs, Tensor | nn.Module)
    run: Callable[[], Any] = inputs if is_function else partial(as_call(inputs).run, model)  # type: ignore[assignment, arg-type]

    def repeatable() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return run()

    return repeatable


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in eval mode and computes no gradients.

    The fused kernel of nn.MultiheadAttention for inference is off, as it rounds differently from its other kernels.
    """
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True
