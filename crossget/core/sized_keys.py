"""log(size) of the keys as one more channel of queries and keys, for attention kernels that take no bias.

FlashAttention gets no mask that a bias could be added to. The scores of a softmax are `scaling * q . k`. With one more
channel they are `scaling * [q, c] . [k, log(size) / (scaling * c)]`, which is `scaling * q . k + log(size)`. c is the
power of two that is nearest to 1 / scaling, so that it is exact in half precision.

A host finds its kernel by the name in the configuration of its attention. While sizes wait for an attention, its
configuration names `NAME` instead, which is `attend`.

Shapes: B rows, H heads of queries, G heads of keys, T queries, S keys, D channels of a head.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.core.adapters import RECOGNISED_KERNELS
from crossget.core.carried import ThreadValue

NAME = "crossget_sized_keys"


class KeySizes(NamedTuple):
    """The sizes of a prompt's tokens.

    Attributes:
        log_sizes: [rows, W] log(size) of the prompt's tokens. Tokens behind the prompt have the size 1.
        total: number of tokens so far, in the cache and new.
    """

    log_sizes: Tensor
    total: int

    def of_keys(self, batch: int, keys: int) -> Tensor:
        """[B, keys] log(size) of the keys of an attention.

        Args:
            batch: B, a multiple of the rows (beams).
            keys: number of keys: fewer than `total` in a sliding window, more in a static cache.
        """
        sizes = self.log_sizes.repeat_interleave(batch // len(self.log_sizes), 0)
        more = max(self.total, keys) - int(sizes.shape[1])
        if more > 0:
            sizes = torch.cat([sizes, sizes.new_zeros(batch, more)], 1)
        if keys < self.total:
            return sizes[:, self.total - keys : self.total]
        return torch.cat([sizes[:, : self.total], sizes.new_zeros(batch, keys - self.total)], 1)


class SizedConfig:
    """The configuration of an attention, which names `NAME` as the kernel while sizes wait in this thread.

    All else is that of the configuration that it stands for, also what is set.

    Args:
        config: the configuration.
        host: name of the Python module of the attention.
    """

    def __init__(self, config: Any, host: str) -> None:
        self.__dict__.update(_config=config, _host=host, _waiting=ThreadValue())
        kernels_of(host)[NAME] = attend
        _in_use.add(self)
        weakref.finalize(self, _forget, host).atexit = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy is made by __reduce__
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return SizedConfig, (self._config, self._host)

    @property
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what waits is not part of a graph
    def _attn_implementation(self) -> str:
        kernel: str = self._config._attn_implementation
        return kernel if self._waiting.get() is None else NAME


_in_use: weakref.WeakSet[SizedConfig] = weakref.WeakSet()


def _forget(host: str) -> None:
    kernels = kernels_of(host)  # several modules share them
    if not any(kernels_of(config._host) is kernels for config in _in_use):
        kernels.pop(NAME, None)


def kernels_of(host: str) -> MutableMapping[str, Any]:
    """The kernels by name that the attentions of a Python module choose from; empty: they do not choose by name."""
    kernels: MutableMapping[str, Any] = getattr(sys.modules.get(host), "ALL_ATTENTION_FUNCTIONS", {})
    return kernels


def set_sizes(attention: Any, sizes: KeySizes | None) -> None:
    """Let sizes wait for the next call of an attention in this thread; None: there are none."""
    config = getattr(attention, "config", None)
    if not isinstance(config, SizedConfig):
        if sizes is None:
            return
        attention.config = config = SizedConfig(config, type(attention).__module__)
    config._waiting.set(sizes)


def check_taken(attention: Any) -> None:
    """Check that an attention whose call ended has taken the sizes that waited for it.

    Raises:
        RuntimeError: it has not.
    """
    config = getattr(attention, "config", None)
    if isinstance(config, SizedConfig) and config._waiting.get() is not None:
        config._waiting.set(None)
        raise RuntimeError(
            f"{type(attention).__name__} did not call the kernel {config._attn_implementation!r} by its name, so that "
            "log(size) could not be added: use SDPA, as by model.set_attn_implementation('sdpa'), or leave "
            "proportional_attention out"
        )


def restore(attention: Any) -> None:
    """Give an attention its own configuration again."""
    config = getattr(attention, "config", None)
    if isinstance(config, SizedConfig):
        attention.config = config._config


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Call the kernel of an attention with the sizes that wait for it.

    Args:
        module: the attention.
        query: [B, H, T, D].
        key: [B, G, S, D].
        value: [B, G, S, D'].
        attention_mask: as the kernel takes it.
        scaling: factor of the scores; None: 1 / sqrt(D).
        more: further arguments of the kernel.

    Returns:
        What the kernel returns: [B, T, H, D'], and probabilities or None.
    """
    config = module.config
    sizes = config._waiting.get()
    config._waiting.set(None)  # from here on the configuration names the kernel
    bias = sizes.of_keys(len(key), int(key.shape[2]))
    return _with_bias(module, query, key, value, attention_mask, bias, scaling=scaling, **more)


def _with_bias(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, bias: Tensor, *,
    scaling: float | None, **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """See `attend`; `bias` [B, S] is added to the scores."""
    channels = int(value.shape[-1])
    scaling = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
    factor = 2.0 ** round(-math.log2(scaling))
    extra = (bias.float() / (scaling * factor)).to(key)[:, None, :, None].expand(*key.shape[:-1], 1)
    kernel = kernels_of(type(module).__module__)[module.config._attn_implementation]
    out, probabilities = kernel(
        module, torch.cat([query, torch.full_like(query[..., :1], factor)], -1), torch.cat([key, extra], -1),
        F.pad(value, (0, 1)), attention_mask, scaling=scaling, **more,
    )  # fmt: skip
    return out[..., :channels], probabilities


class SizedKernels:
    """Which kernels of attentions take sizes. Each is asked once."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, int, torch.dtype, torch.device], str | None] = {}

    def refusal(self, attentions: Sequence[Any], model: Any) -> str | None:
        """The reason why the kernel of one of the attentions takes no sizes; None: all do.

        Eager attention and SDPA take a bias. Another kernel is called with one more channel, for one query and a few
        keys, and its result is compared with the formula.

        Args:
            attentions: of a language model.
            model: tells the dtype and the device of its activations.
        """
        for attention in attentions:
            name = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
            if name in RECOGNISED_KERNELS:
                continue
            key = name, _channels(attention), model.dtype, model.device
            if key not in self._reasons:
                self._reasons[key] = _refusal(attention, name, model.dtype, model.device)
            if (reason := self._reasons[key]) is not None:
                return f"{reason}; use SDPA, as by model.set_attn_implementation('sdpa')"
        return None


def _channels(attention: Any) -> int:
    """D, the number of channels of a head's queries and keys; 0: it is not known."""
    return int(getattr(attention, "head_dim", None) or getattr(attention, "qk_head_dim", None) or 0)


def _refusal(attention: Any, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `SizedKernels.refusal`."""
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        return f"its kernel {name!r} takes no bias behind a cap of the scores"
    if name not in kernels_of(type(attention).__module__):
        return f"its kernel {name!r} is not found by its name"
    if _channels(attention) == 0:
        return f"its kernel {name!r} takes no bias, and the number of channels of its heads is not known"
    channels, keys, heads = _channels(attention), 4, int(getattr(attention, "num_key_value_groups", 1))
    scaling = float(getattr(attention, "scaling", channels**-0.5))
    # Numbers that half precision holds exactly. No random ones: the state of the generator stays.
    numbers = [
        ((torch.arange(count * channels, device=device) * step % 16 - 8) / 16).to(dtype).view(1, -1, count, channels)
        for count, step in ((heads, 7), (keys, 5), (keys, 3))
    ]
    query, key, value = numbers[0].transpose(1, 2), numbers[1], numbers[2]
    bias = torch.tensor([[0.0, 3.0, 1.0, 2.0]], device=device)
    scores = scaling * query.float() @ key.float().transpose(2, 3) + bias[:, None, None]
    expected = (scores.softmax(-1) @ value.float()).transpose(1, 2)
    try:
        with torch.no_grad():
            out = _with_bias(attention, query, key, value, None, bias, scaling=scaling)[0].float()
    except Exception as error:  # whatever a kernel raises is the reason
        return f"its kernel {name!r} takes no bias and no further channel ({type(error).__name__}: {error})"
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if out.shape != expected.shape or not torch.allclose(out, expected, atol=tolerance, rtol=tolerance):
        return f"its kernel {name!r} takes no bias, and a further channel changes its results"
    return None
