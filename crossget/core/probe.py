"""One dense forward of a model under hooks: which modules are called with tokens, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossget.core.block_class import argument_names
from crossget.core.layout import packed_lengths
from crossget.core.tower import split_tokens
from crossget.core.watch import MULTI_HEAD_ATTENTION, SDPA, SOFTMAX, replaced_functions

# Layers that make tokens from inputs, by the kind of the inputs.
_STEMS: dict[str, tuple[type[nn.Module], ...]] = {
    "visual": (nn.Conv2d, nn.Conv3d), "audio": (nn.Conv1d,), "text": (nn.Embedding,),
}  # fmt: skip


@dataclass(eq=False)
class ModuleCall:
    """One call of a module whose first argument may be tokens.

    Attributes:
        module: the module.
        path: its path in the model.
        tokens: its first argument, [B, T, C], [T, B, C] or [N, C].
        args, kwargs: the other arguments.
        caller: the call that this one is made in, if that has tokens, too; otherwise None.
        stem: the kind of the last layer that made tokens from inputs before the call: "visual", "audio", "text" or "".
        equal_rows: by layout ("BTC", "TBC", "NC"), [T] true for positions whose tokens are equal for all inputs.
        out: what the module returned, or the first part of it, if it has the shape of `tokens`; otherwise None.
    """

    module: nn.Module
    path: str
    tokens: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: ModuleCall | None
    stem: str
    equal_rows: dict[str, Tensor] = field(default_factory=dict)
    out: Tensor | None = None


class Probe:
    """Notes the calls of a model's modules in one forward.

    Attributes:
        calls: those with tokens, in the order in which they began.
        unlike: path -> why the call of a module with children is none of a block.
        attending: paths of modules in whose calls an attention was seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.calls: list[ModuleCall] = []
        self.unlike: dict[str, str] = {}
        self.attending: set[str] = set()
        self._open: list[ModuleCall | None] = []
        self._open_paths: list[str] = []
        self._stem = ""

    def run(self, run: Callable[[], Any]) -> Any:
        """Run the model under hooks, which are removed afterwards, and return what it returns."""
        hooks: list[Any] = []
        try:
            for module in self.paths:
                kind = next((kind for kind, classes in _STEMS.items() if isinstance(module, classes)), None)
                if kind is not None:
                    hooks.append(module.register_forward_pre_hook(partial(self._on_stem, kind)))
                elif _may_be_block(module):
                    hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                    hooks.append(module.register_forward_hook(self._after, with_kwargs=True))
            with Attentions(lambda *sizes: self.attending.update(self._open_paths)):
                return run()
        finally:
            for hook in hooks:
                hook.remove()

    def _on_stem(self, kind: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        ids = args[0] if args else None
        if kind != "text":
            self._stem = kind
        elif isinstance(ids, Tensor) and ids.dim() > 1 and not bool((ids == ids[:1]).all()):
            self._stem = kind  # other embeddings are looked up with positions, which are equal for all texts

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = argument_names(type(module).forward)
        call = None
        if args or (names and names[0] in kwargs):
            tokens, rest, named = split_tokens(names, args, kwargs)
            if _is_sequence(tokens):
                caller = next((one for one in reversed(self._open) if one is not None), None)
                call = ModuleCall(module, self.paths[module], tokens, tuple(rest), dict(named), caller, self._stem)
                call.equal_rows = _equal_rows(call)
                self.calls.append(call)
            else:
                self.unlike.setdefault(self.paths[module], f"it gets {_describe(tokens)}")
        self._open.append(call)
        self._open_paths.append(self.paths[module])

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = self._open.pop()
        self._open_paths.pop()
        if call is None:
            return
        first = out[0] if isinstance(out, tuple) and out else out
        if isinstance(first, Tensor) and first.shape == call.tokens.shape:
            call.out = first
        else:
            self.unlike.setdefault(call.path, f"it gets {_describe(call.tokens)} and returns {_describe(first)}")


class Attentions(TorchFunctionMode):
    """Sees the attentions in a call of any module.

    Args:
        on_attention: called with the numbers of queries and keys of each.
    """

    def __init__(self, on_attention: Callable[[int, int], Any]) -> None:
        super().__init__()
        self._on_attention = on_attention
        self._replaced = replaced_functions()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self._replaced.get(func, func)
        inputs = [*args, *(kwargs or {}).values()]
        if not (inputs and isinstance(inputs[0], Tensor)) or inputs[0].is_nested:  # which have no number of tokens
            return func(*args, **(kwargs or {}))
        if func is SDPA:
            self._on_attention(int(inputs[0].shape[-2]), int(inputs[1].shape[-2]))
        elif func is MULTI_HEAD_ATTENTION:
            self._on_attention(int(inputs[0].shape[0]), int(inputs[1].shape[0]))
        elif func in SOFTMAX and inputs[0].dim() > 2:
            self._on_attention(int(inputs[0].shape[-2]), int(inputs[0].shape[-1]))
        return func(*args, **(kwargs or {}))


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module can hold an attention: it has children, or is no layer of torch."""
    return next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn")


def _is_sequence(value: Any) -> bool:
    """Whether a value can be the tokens of a block."""
    if not isinstance(value, Tensor) or value.is_nested:  # no axis T: its sequences have lengths of their own
        return False
    return value.dim() in (2, 3) and value.is_floating_point() and value.numel() > 0


def _equal_rows(call: ModuleCall) -> dict[str, Tensor]:
    """See `ModuleCall.equal_rows`. It is computed before the call, as blocks may change their input in place."""
    tokens = call.tokens
    if tokens.dim() == 3:
        return {
            "BTC": (tokens == tokens[:1]).all(-1).all(0),
            "TBC": (tokens == tokens[:, :1]).all(-1).all(1),
        }
    lengths = packed_lengths(tokens, [*call.args, *call.kwargs.values()])
    if lengths is None or len(set(lengths)) != 1:
        return {}
    by_image = tokens.reshape(len(lengths), -1, tokens.shape[1])
    return {"NC": (by_image == by_image[:1]).all(-1).all(0)}


def _describe(value: Any) -> str:
    """What a value is, in a few words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} instead of tokens"
    if value.is_nested:
        return "a nested tensor"
    shape = f"{list(value.shape)}"
    return f"an image grid {shape}" if value.dim() == 4 else f"a tensor {shape}"
