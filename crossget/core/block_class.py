"""Swapping a block's class, and wrapping a method of one module, without changes to the module tree.

`swap_in` replaces a block's class by a subclass of it. The subclass's `__call__`, which runs outside of the block's
hooks, and its `forward`, which runs inside of them, call the block's `Runner`. `wrap` replaces one method of one module
by a function that gets the original method. Both can be undone exactly. Neither changes parameters, names or
`isinstance`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.fx import Proxy

_ATTACHED = "_crossget_attached"
_BASE = "_crossget_base"
_CALL = "crossget_call"
# Attributes of an instance that may hold its bound forward: transformers 4.57 to 5.1 leaves one there after it has
# recorded hidden states, and accelerate calls one from its hook. They must lead to the block's present class.
_BOUND_FORWARDS = ("forward", "_old_forward")


class Call:
    """What a runner hands from `call_block` to `run_forward`.

    Attributes:
        uncompiled: the block runs eagerly, even if it is compiled by itself.
    """

    uncompiled: bool = False


class Runner(Protocol):
    """Runs a block in two steps: `call_block` outside of the block's hooks, `run_forward` inside of them."""

    def call_block(self, block: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block with its hooks, by `proceed(*args, block_call=..., **kwargs)`.

        Args:
            block: the swapped block.
            proceed: runs the hooks and then `run_forward`, which gets the same `block_call`.
            args: positional arguments of the block's call.
            kwargs: keyword arguments of the block's call.
        """
        ...

    def run_forward(
        self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, block_call: Any
    ) -> Any:
        """Run `forward`, the block's own, with the arguments that its hooks have returned."""
        ...

    def weights_loaded(self) -> None:
        """A state dict is loaded into a block."""
        ...


class Attached(NamedTuple):
    """What a swapped block holds.

    Attributes:
        owner: the object on whose behalf it was swapped (an `Attachment`).
        runner: runs the block (an `AttachedTower`).
        key: number of the block in its tower when it was swapped, from 0.
    """

    owner: object
    runner: Runner
    key: int


def swap_in(block: nn.Module, owner: object, runner: Runner, key: int) -> None:
    """Let `runner` run the block, which is number `key` of its tower. See `Attached` for the arguments."""
    block.__dict__[_ATTACHED] = Attached(owner, runner, key)
    _become(block, _subclass(type(block)))


def swap_out(block: nn.Module) -> None:
    """Give a swapped block its original class."""
    _become(block, base_of(block))
    del block.__dict__[_ATTACHED]


def owner_of(block: nn.Module) -> Any:
    """The owner of a swapped block; None for any other."""
    found = block.__dict__.get(_ATTACHED)
    return None if found is None else found.owner


def key_of(block: nn.Module) -> int:
    """The number of a swapped block in its tower; -1 for any other."""
    found = block.__dict__.get(_ATTACHED)
    return -1 if found is None else found.key


def is_intact(block: nn.Module) -> bool:
    """Whether a block still has the subclass that `swap_in` gave it."""
    return _ATTACHED in block.__dict__ and _SUBCLASSES.get(base_of(block)) is type(block)


def base_of(block: nn.Module) -> Any:
    """The host's class of the block, swapped or not."""
    return getattr(type(block), _BASE, type(block))


def has_own_forward(block: nn.Module) -> bool:
    """Whether the instance has a forward of its own, other than its class's forward (another patch, say)."""
    found = [block.__dict__[name] for name in _BOUND_FORWARDS if name in block.__dict__]
    return bool(found) and not any(_leads_to_class(block, forward) for forward in found)


def _leads_to_class(block: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(block).forward


def _become(block: nn.Module, cls: type) -> None:
    """Set the block's class, and bind its bound forwards to that class."""
    bound = [name for name in _BOUND_FORWARDS if _leads_to_class(block, block.__dict__.get(name))]
    block.__class__ = cls
    for name in bound:
        block.__dict__[name] = types.MethodType(cls.forward, block)  # type: ignore[attr-defined]


# Classes ------------------------------------------------------------------------------------------------------------

_SUBCLASSES: dict[type, type] = {}
_REFUSED = (
    "{} is a block of an attached model, which cannot be {}: use torch.export, torch.jit.trace, torch.onnx.export or "
    "torch.compile on the attached model (docs/deploy.md), or detach first"
)


def _subclass(base: type) -> Any:
    """The subclass of a block's class. There is one per class, so that compiled code meets a single type."""
    if base not in _SUBCLASSES:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # `swapped`, not type(self): FSDP2 and others may subclass the block again.
            own: Callable[..., Any] = super(swapped, self).forward
            found = self.__dict__.get(_ATTACHED)
            if (
                found is None
            ):  # swapped out, but still called by a host that was interrupted while it recorded hidden states
                return own(*args, **kwargs)
            if _is_symbolic(args, kwargs):
                raise RuntimeError(_REFUSED.format(type(self).__name__, "traced by torch.fx"))
            block_call = kwargs.pop(_CALL, None)
            if block_call is not None:
                return found.runner.run_forward(self, own, args, kwargs, block_call)

            # `forward` was called without `__call__`: by Dynamo, or by a host.
            def proceed(*args: Any, block_call: Any, **kwargs: Any) -> Any:
                return found.runner.run_forward(self, own, args, kwargs, block_call)

            return found.runner.call_block(self, proceed, args, kwargs)

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            call_with_hooks: Callable[..., Any] = super(swapped, self).__call__
            found = self.__dict__.get(_ATTACHED)
            if found is None or _is_symbolic(args, kwargs):  # a block that torch.fx takes for a leaf runs later
                return call_with_hooks(*args, **kwargs)

            def proceed(*args: Any, block_call: Call, **kwargs: Any) -> Any:
                run: Callable[..., Any] = self._call_impl if block_call.uncompiled else call_with_hooks
                return run(*args, **kwargs, **{_CALL: block_call})

            return found.runner.call_block(self, proceed, args, kwargs)

        def load(self: Any, *args: Any, **kwargs: Any) -> None:
            found = self.__dict__.get(_ATTACHED)
            if found is not None:
                found.runner.weights_loaded()
            super(swapped, self)._load_from_state_dict(*args, **kwargs)

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            # The subclass cannot be imported by name. So its base is pickled, and the block is swapped while
            # unpickling.
            state = super(swapped, self).__reduce_ex__(protocol)[2]
            return _blank, (base,), state

        def prepare_scriptable(self: nn.Module) -> nn.Module:
            # torch.jit.script calls this of every module, before it compiles any.
            if _ATTACHED in self.__dict__:
                raise RuntimeError(_REFUSED.format(type(self).__name__, "compiled by torch.jit.script"))
            return self

        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        methods = {"__call__": call, "__reduce_ex__": reduce, "__prepare_scriptable__": prepare_scriptable}
        methods["_load_from_state_dict"] = load
        body = {"forward": forward, **methods, _BASE: base, **names}
        swapped: Any = type(base.__name__, (base,), body)
        _SUBCLASSES[base] = swapped
    return _SUBCLASSES[base]


def _is_symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch.fx traces the call, with values that are no tensors."""
    return not torch.compiler.is_compiling() and any(isinstance(x, Proxy) for x in (*args, *kwargs.values()))


def _blank(base: type[nn.Module]) -> nn.Module:
    """A swapped block without attributes, which unpickling sets."""
    swapped = _subclass(base)
    block: nn.Module = swapped.__new__(swapped)
    return block


# Methods ------------------------------------------------------------------------------------------------------------

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Wrapped:
    """The replacement of a method of one module.

    Args:
        module: the module.
        method: the name of its method.
        around: called instead, with the original method, the positional and the keyword arguments of the call.
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
        """The signature of the original method: hosts look up which arguments a method takes."""
        return inspect.signature(self._original)


def wrap(module: nn.Module, method: str, around: Around) -> None:
    """Replace a method on this instance by `around`, see `Wrapped`."""
    module.__dict__[method] = Wrapped(module, method, around)


def unwrap(module: nn.Module, method: str) -> None:
    """Remove the replacement that `wrap` has made."""
    del module.__dict__[method]


def argument_names(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters of an unbound method, without self."""
    return [parameter.name for parameter in inspect.signature(function).parameters.values()][1:]
