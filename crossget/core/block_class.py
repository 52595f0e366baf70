"""Taking a module's place without touching the module tree: a block's class, and methods of one instance.

`swap_in` gives a block a subclass of its own class whose `forward` asks whoever sits in the block's seat. `wrap` puts
something around one method of one module. Both are undone exactly; neither changes parameters, names or `isinstance`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

_SEAT = "_crossget_seat"
_BASE = "_crossget_base"
# Where a bound forward may lie on the instance: transformers 4.57 to 5.1 leaves one there after it has recorded hidden
# states, accelerate keeps one behind its hook. Both are to run the class that the block has now.
_BOUND = ("forward", "_old_forward")


class Sitter(Protocol):
    """Runs a block in its own way."""

    def call(self, block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block, with all hooks on it: between here and `run` they may exchange its arguments."""
        ...

    def run(self, block: nn.Module, layer: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `forward`, the block's own, or not."""
        ...


def swap_in(block: nn.Module, owner: object, sitter: Sitter, layer: int) -> None:
    """Let `sitter` run the block, as number `layer`; `owner` is what `owner_of` finds there."""
    block.__dict__[_SEAT] = (owner, sitter, layer)
    _become(block, _subclass(type(block)))


def swap_out(block: nn.Module) -> None:
    """Give the block its class back."""
    _become(block, base_of(block))
    del block.__dict__[_SEAT]


def owner_of(block: nn.Module) -> Any:
    """Who swapped the block; None if nobody did."""
    return block.__dict__.get(_SEAT, (None,))[0]


def is_intact(block: nn.Module) -> bool:
    """Whether a swapped block still has the class it was given."""
    return _SEAT in block.__dict__ and _SUBCLASSES.get(base_of(block)) is type(block)


def base_of(block: nn.Module) -> Any:
    """The class that the host gave the block."""
    return getattr(type(block), _BASE, type(block))


def has_own_forward(block: nn.Module) -> bool:
    """Whether somebody put a forward on the instance that does not lead to the class's own."""
    found = [block.__dict__[name] for name in _BOUND if name in block.__dict__]
    return bool(found) and not any(_leads_to_class(block, forward) for forward in found)


def _leads_to_class(block: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(block).forward


def _become(block: nn.Module, cls: type) -> None:
    bound = [name for name in _BOUND if _leads_to_class(block, block.__dict__.get(name))]
    block.__class__ = cls
    for name in bound:
        block.__dict__[name] = types.MethodType(cls.forward, block)  # type: ignore[attr-defined]


# Classes ------------------------------------------------------------------------------------------------------------

_SUBCLASSES: dict[type, type] = {}


def _subclass(base: type) -> Any:
    """The swapped subclass of a block's class: one per class, so that compiled code sees a single type."""
    if base not in _SUBCLASSES:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # `swapped`, not type(self): others (FSDP2) may subclass the block again.
            if _SEAT not in self.__dict__:  # swapped out, but a host that broke off while it recorded still calls this
                return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
            _, sitter, layer = self.__dict__[_SEAT]
            return sitter.run(self, layer, super(swapped, self).forward, args, kwargs)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            whole = super(swapped, self).__call__
            if _SEAT not in self.__dict__ or torch.compiler.is_compiling():
                return whole(*args, **kwargs)
            return self.__dict__[_SEAT][1].call(self, whole, args, kwargs)

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            # The subclass cannot be imported by name: pickle its base, and swap again while unpickling.
            state = super(swapped, self).__reduce_ex__(protocol)[2]
            return _blank, (base,), state

        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body = {"forward": forward, "__call__": call, "__reduce_ex__": reduce, _BASE: base, **names}
        swapped: Any = type(base.__name__, (base,), body)
        _SUBCLASSES[base] = swapped
    return _SUBCLASSES[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    swapped = _subclass(base)
    block: nn.Module = swapped.__new__(swapped)
    return block


# Methods ------------------------------------------------------------------------------------------------------------

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Wrapped:
    """A method of one module with something around it.

    Args:
        module, method: whose and which.
        around: called with the method itself and the arguments of the call.
    """

    def __init__(self, module: nn.Module, method: str, around: Around) -> None:
        self.module, self.method, self.around = module, method, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self._original, args, kwargs)

    @property
    def _original(self) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(type(self.module), self.method).__get__(self.module)
        return original

    @property
    def __signature__(self) -> inspect.Signature:
        """Hosts ask which arguments a method takes."""
        return inspect.signature(self._original)


def wrap(module: nn.Module, method: str, around: Around) -> None:
    """Put `around` around a method, on this instance."""
    module.__dict__[method] = Wrapped(module, method, around)


def unwrap(module: nn.Module, method: str) -> None:
    """Take it off again."""
    del module.__dict__[method]


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Parameter names of an unbound method, without self."""
    return [parameter.name for parameter in inspect.signature(function).parameters.values()][1:]
