"""The attention that the tokens of an image tower receive, brought to the features behind the connector.

The attention is read from one block while the host encodes its images. Between tower and connector the host drops the
class token, reorders tokens, joins neighbours and inserts separators, each host in its own way. So the host's own code
is run once more on the attention in place of the tokens: in a copy of its modules, without weights, every block of the
tower returns the attention in all channels, and linear layers return the mean of their input's channels. What comes out
is the attention of each feature: the mean over the tokens that it was made of, and 0 for a separator.

Shapes: B images, T tokens of an image (1 and those of all images, in a packed tower), N features of all images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crossget.core.carried import ThreadValue
from crossget.core.watch import SDPA, SOFTMAX, additive
from crossget.methods.importance import mean_attention

_POINTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations")


@dataclass(eq=False)
class ScoredTower:
    """The blocks of an image tower, one of which scores its tokens.

    Attributes:
        blocks: of the tower.
        number: of the block whose attention scores the tokens.
        has_class_token: token 0 is a class token, whose query scores the others. Otherwise all queries do, on average.
        apart: modules that the image features do not come from: the language model.
    """

    blocks: Sequence[nn.Module]
    number: int
    has_class_token: bool
    apart: Sequence[nn.Module] = ()
    _watching: ThreadValue[_Watching] = field(default_factory=ThreadValue)

    def hook(self) -> list[Callable[[], Any]]:
        """Register hooks on the block. Returns functions that undo it."""
        block = self.blocks[self.number]
        return [
            block.register_forward_pre_hook(self._before).remove,
            block.register_forward_hook(self._after).remove,
        ]

    def _before(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled tower shows no attention, and its graph is not broken
            return
        watching = self._watching.get()
        if watching is not None:
            watching.begin()

    def _after(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        watching = self._watching.get()
        if watching is not None:
            watching.end()

    def encode(self, parts: nn.Module, method: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
        """Call a method of the host that encodes images.

        Args:
            parts: whose method it is.
            method: its name.
            given: its arguments.

        Returns:
            What it returns, and the same with the attention in place of the features, in all channels.

        Raises:
            RuntimeError: the block showed no attention.
        """
        watching = _Watching(self.has_class_token)
        self._watching.set(watching)
        try:
            out = getattr(parts, method)(**given)
        finally:
            watching.end()  # an error in the block keeps `_after` from it
            self._watching.set(None)
        if not watching.received:
            raise RuntimeError(
                f"{type(self.blocks[self.number]).__name__} showed no attention that can be recognised: use SDPA, as "
                "by model.set_attn_implementation('sdpa'), or another importance"
            )
        attention = torch.cat(watching.received, -1)
        forwards: dict[int, Callable[..., Any]] = {id(block): partial(_scored, attention) for block in self.blocks}
        forwards |= {
            id(module): partial(_one, module.out_features)
            for name, module in parts.named_modules()
            if name.endswith("gate_proj") and isinstance(module, nn.Linear)
        }
        apart = {id(module) for module in self.apart}
        without_weights = _without_weights(parts, forwards, apart, attention.device)
        with torch.no_grad():
            return out, getattr(without_weights, method)(**given)


class _Watching(TorchFunctionMode):
    """Keeps the attention that tokens receive.

    Attributes:
        received: [B, T] of each attention.
    """

    def __init__(self, has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        self.received: list[Tensor] = []
        self._active = False

    def begin(self) -> None:
        """Enter the mode."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._active = True

    def end(self) -> None:
        """Leave the mode, if it was entered."""
        if self._active:
            self._active = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is SDPA:
            with torch.no_grad():
                self.received.append(self._of_fused(*args, **(kwargs or {})))
        elif func in SOFTMAX and out.dim() == 4 and out.shape[-2] == out.shape[-1]:
            self.received.append(self._of_probabilities(out.detach()))
        return out

    def _rows(self, rows: Tensor) -> Tensor:
        """The rows of a tensor [B, H, T, ..] for the queries that score the tokens."""
        return rows[:, :, :1] if self.has_class_token and rows.shape[2] > 1 else rows

    def _of_probabilities(self, probabilities: Tensor) -> Tensor:
        """Of probabilities [B, H, T, T]. A query that does not attend to itself is padding."""
        rows = self._rows(probabilities)
        real = (probabilities.diagonal(dim1=2, dim2=3).amax(1) > 0)[:, : rows.shape[2]].to(rows)
        return torch.einsum("bq,bhqt->bt", real, rows) / (rows.shape[1] * real.sum(1, keepdim=True).clamp(min=1))

    def _of_fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """See torch.nn.functional.scaled_dot_product_attention."""
        bias = None
        if attn_mask is not None:
            bias = additive(attn_mask, query.dtype)
            bias = self._rows(bias[(None,) * (4 - bias.dim())])
        scale = float(query.shape[-1]) ** -0.5 if scale is None else scale
        return mean_attention(self._rows(query), key, bias, scale)


def _scored(attention: Tensor, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a block: the attention in all channels."""
    return (
        attention.to(hidden_states.device)
        .reshape(hidden_states.shape[:-1])[..., None]
        .repeat(*[1] * (hidden_states.dim() - 1), hidden_states.shape[-1])
    )


def _without_weights(
    module: nn.Module, forwards: Mapping[int, Callable[..., Any]], apart: set[int], device: torch.device
) -> nn.Module:
    """A copy of a module and those in it, which passes on the mean of all channels.

    Args:
        module: the module.
        forwards: of some modules, by id.
        apart: ids of modules that are not copied.
        device: of the attention.
    """
    own, of_torch = forwards.get(id(module)) or _mean_forward(module), type(module).__module__.startswith("torch.nn.")
    if own is None and of_torch and not module._modules:  # an embedding of patches or places, a pooling
        return module
    new = copy.copy(module)
    if own is not None:
        new.__dict__["forward"] = own
        return new
    new.__dict__.pop("forward", None)  # a bound one, of the module itself
    new.training = False
    if not of_torch:  # whose code asks for its own weights
        new._parameters = {name: _neutral(value, device) for name, value in module._parameters.items()}
    new._modules = {
        name: child if child is None or id(child) in apart else _without_weights(child, forwards, apart, device)
        for name, child in module._modules.items()
    }
    return new


def _mean_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that passes on the mean of the channels; None: the module's own does, or its modules' do."""
    if isinstance(module, nn.Linear):
        return partial(_mean, module.out_features)
    if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride and module.padding == (0, 0):
        return partial(_pooled, module.out_channels, module.kernel_size)
    if isinstance(module, nn.MultiheadAttention):  # of a pool beside the features
        return _same_query
    kind = type(module)
    if "Norm" in kind.__name__ or (kind.__module__ in _POINTWISE and not module._modules):
        return _same
    return None


def _mean(channels: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.mean(-1, keepdim=True).repeat(*[1] * (x.dim() - 1), channels)


def _one(channels: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a gate, which is multiplied with the tokens."""
    return x.new_ones(*x.shape[:-1], channels)


def _pooled(channels: int, kernel: Any, x: Tensor) -> Tensor:
    """The forward of a convolution of areas beside each other."""
    return F.avg_pool2d(x.mean(-3, keepdim=True), kernel).repeat(*[1] * (x.dim() - 3), channels, 1, 1)


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _same_query(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return query, None


def _neutral(value: Tensor | None, device: torch.device) -> Any:
    """A matrix that a host multiplies with itself, [in, out], as one that takes the mean. 0 for all others."""
    if value is None:
        return None
    fill = 1 / len(value) if value.dim() == 2 else 0.0
    device = device if value.is_meta else value.device  # an offloaded weight is on the meta device between calls
    return nn.Parameter(torch.full((1,) * value.dim(), fill, device=device).expand(value.shape), False)
