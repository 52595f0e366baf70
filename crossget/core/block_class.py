"""Swapping a block's class, and wrapping a method of one module, without touching the module tree.

`swap_in` gives a block a subclass of its own class. Its `__call__` and its `forward` ask the block's `Runner`, outside
and inside of the block's hooks. `wrap` puts something around one method of one module. Both are undone exactly; neither
changes parameters, names or `isinstance`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import nn

_ATTACHED = "_crossget_attached"
_BASE = "_crossget_base"
_RUN = "crossget_run"
# Where a bound forward may lie on the instance: transformers 4.57 to 5.1 leaves one there after it has recorded hidden
# states, accelerate keeps one behind its hook. Both are to run the class that the block has now.
_BOUND = ("forward", "_old_forward")


class Runner(Protocol):
    """Runs a block in its own way, in two steps."""

    def call(self, block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block, with all hooks on it: `call(*args, run=what run() is to get, **kwargs)`."""
        ...

    def run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, run: Any) -> Any:
        """Run `forward`, the block's own, with the arguments that its hooks have left."""
        ...


class Attached(NamedTuple):
    """What a swapped block knows.

    Attributes:
        owner: who swapped it.
        runner: who runs it.
        key: its number among the blocks of its tower, when it was swapped.
    """

    owner: object
    runner: Runner
    key: int


def swap_in(block: nn.Module, owner: object, runner: Runner, key: int) -> None:
    """Let `runner` run the block, which is number `key` of its tower."""
    block.__dict__[_ATTACHED] = Attached(owner, runner, key)
    _become(block, _subclass(type(block)))


def swap_out(block: nn.Module) -> None:
    """Give the block its class back."""
    _become(block, base_of(block))
    del block.__dict__[_ATTACHED]


def owner_of(block: nn.Module) -> Any:
    """Who swapped the block; None if nobody did."""
    found = block.__dict__.get(_ATTACHED)
    return None if found is None else found.owner


def runner_of(block: nn.Module) -> Any:
    """Who runs the block; None if nobody but itself."""
    found = block.__dict__.get(_ATTACHED)
    return None if found is None else found.runner


def key_of(block: nn.Module) -> int:
    """The number that a swapped block got; -1 for any other."""
    found = block.__dict__.get(_ATTACHED)
    return -1 if found is None else found.key


def is_intact(block: nn.Module) -> bool:
    """Whether a swapped block still has the class it was given."""
    return _ATTACHED in block.__dict__ and _SUBCLASSES.get(base_of(block)) is type(block)


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
            own: Callable[..., Any] = super(swapped, self).forward
            found = self.__dict__.get(_ATTACHED)
            if found is None:  # swapped out, but a host that broke off while it recorded still calls this
                return own(*args, **kwargs)
            run = kwargs.pop(_RUN, None)
            if run is not None:
                return found.runner.run(self, own, args, kwargs, run)

            # Called without `__call__`: by Dynamo, or by a host.
            def call(*args: Any, run: Any, **kwargs: Any) -> Any:
                return found.runner.run(self, own, args, kwargs, run)

            return found.runner.call(self, call, args, kwargs)

        def whole(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hooked: Callable[..., Any] = super(swapped, self).__call__
            found = self.__dict__.get(_ATTACHED)
            if found is None:
                return hooked(*args, **kwargs)

            def call(*args: Any, run: Any, **kwargs: Any) -> Any:
                return hooked(*args, **kwargs, **{_RUN: run})

            return found.runner.call(self, call, args, kwargs)

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            # The subclass cannot be imported by name: pickle its base, and swap again while unpickling.
            state = super(swapped, self).__reduce_ex__(protocol)[2]
            return _blank, (base,), state

        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body = {"forward": forward, "__call__": whole, "__reduce_ex__": reduce, _BASE: base, **names}
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
