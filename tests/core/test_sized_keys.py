"""log(size) of keys as one more channel of queries and keys, against the formula."""

import math
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossget.core import sized_keys
from crossget.core.sized_keys import KeySizes, SizedKernels, check_taken, restore, set_sizes


class Attention:
    """As transformers' ones: its kernel is found by the name in its configuration."""

    head_dim, num_key_value_groups = 5, 2

    def __init__(self, kernel: str = "plain", scaling: float = 0.3) -> None:
        self.config, self.scaling = SimpleNamespace(_attn_implementation=kernel), scaling

    def __call__(self, *tensors: Tensor) -> Tensor:
        out: Tensor = KERNELS[self.config._attn_implementation](self, *tensors, None, scaling=self.scaling)[0]
        return out


def plain(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float) -> tuple[Tensor, None]:
    return attention(q, k, v, torch.zeros(k.shape[2], dtype=k.dtype), scaling), None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return ((q @ k.transpose(2, 3) * scaling + bias).softmax(-1) @ v).transpose(1, 2)


KERNELS: dict[str, Any] = {"plain": plain}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_host")
    module.ALL_ATTENTION_FUNCTIONS = KERNELS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_host", module)
    monkeypatch.setattr(Attention, "__module__", "a_host")


def tensors(dtype: torch.dtype, queries: int, keys: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, queries, 5), (2, 2, keys, 5), (2, 2, keys, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(
    scaling=st.floats(0.01, 4), queries=st.integers(1, 4), past=st.integers(0, 5), window=st.integers(0, 3),
    spare=st.integers(0, 3), rows=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_channel_is_the_bias(
    scaling: float, queries: int, past: int, window: int, spare: int, rows: int, seed: int
) -> None:
    """Also where the keys are the last ones of a window, or some of a static cache are not filled yet."""
    total, module = past + queries, Attention(scaling=scaling)
    keys = max(queries, total - window) if window else total + spare
    log_sizes = torch.randint(1, 500, (rows, max(1, past)), generator=torch.Generator().manual_seed(seed)).log()
    of_all = [*log_sizes.T[:total], *[torch.zeros(rows)] * (max(total, keys) - min(total, log_sizes.shape[1]))]
    start = max(0, total - keys)
    bias = torch.stack(of_all, 1)[:, start : start + keys].repeat_interleave(2 // rows, 0)
    q, k, v = tensors(torch.float64, queries, keys, seed)
    set_sizes(module, KeySizes(log_sizes.double(), total))
    found = module(q, k, v)
    torch.testing.assert_close(found, attention(q, k, v, bias[:, None, None].double(), scaling), rtol=1e-6, atol=1e-6)
    check_taken(module)
    torch.testing.assert_close(
        module(q, k, v), attention(q, k, v, torch.zeros(keys, dtype=k.dtype), scaling), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 80, 96, 128, 256])
def test_in_half_precision_only_the_channel_of_the_keys_is_rounded(
    dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As log(size) is in a mask of that precision: the factor of the queries is a power of two."""
    seen: list[Tensor] = []

    def kernel(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float) -> tuple[Tensor, None]:
        seen.append(q[:, :2, :, -1:].double() @ k[..., -1:].double().transpose(2, 3) * scaling)
        return plain(module, q, k, v, mask, scaling=scaling)

    monkeypatch.setitem(KERNELS, "plain", kernel)
    log_sizes = torch.arange(1, 41).log()[None]
    module = Attention(scaling=channels**-0.5)
    set_sizes(module, KeySizes(log_sizes, 40))
    module(*tensors(dtype, 3, 40, 0))
    expected = log_sizes.double()[:, None, None].expand_as(seen[0])
    torch.testing.assert_close(seen[0], expected, rtol=torch.finfo(dtype).eps / 2, atol=0)


def test_nothing_of_it_stays() -> None:
    module = Attention()
    config, before = module.config, dict(KERNELS)
    set_sizes(module, None)
    assert module.config is config
    set_sizes(module, KeySizes(torch.zeros(1, 3), 3))
    assert module.config._attn_implementation == sized_keys.NAME
    module.config.other = 3
    assert config.other == 3
    with pytest.raises(RuntimeError, match="Attention did not call the kernel 'plain'"):
        check_taken(module)
    assert module.config._attn_implementation == "plain"
    assert KERNELS.keys() != before.keys()
    restore(module)
    assert module.config is config
    assert before == KERNELS


def test_hosts_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken from the kernels with one attention stays for an attention of another module."""
    other = ModuleType("another_host")
    other.ALL_ATTENTION_FUNCTIONS = KERNELS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "another_host", other)
    first, second = Attention(), type("Other", (Attention,), {"__module__": "another_host"})()
    for module in (first, second):
        set_sizes(module, KeySizes(torch.zeros(1, 3), 3))
    restore(first)
    assert sized_keys.NAME in KERNELS
    restore(second)
    assert sized_keys.NAME not in KERNELS


def refusal(kernel: str, **fields: Any) -> str | None:
    module = Attention(kernel)
    vars(module).update(fields)
    state = torch.get_rng_state()
    found = SizedKernels().refusal([module], SimpleNamespace(dtype=torch.float32, device=torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)
    return found


@pytest.mark.parametrize("name", ["eager", "sdpa", "plain"])
@pytest.mark.parametrize("channels", [{}, {"head_dim": None, "qk_head_dim": 7}], ids=str)
def test_kernels_that_take_sizes(name: str, channels: dict[str, Any]) -> None:
    assert refusal(name, **channels) is None


def _raises(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise ValueError("heads of 6 channels")


def _caps(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float) -> tuple[Tensor, None]:
    return plain(module, q, (k * scaling).tanh() / scaling, v, mask, scaling=scaling)


def _all_channels(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float) -> tuple[Tensor, None]:
    return plain(module, q, k, v, mask, scaling=1 / math.sqrt(q.shape[-1]))


@pytest.mark.parametrize(
    ("kernel", "fields", "reason"),
    [
        (_raises, {}, "no further channel \\(ValueError: heads of 6 channels\\)"),
        (_caps, {}, "changes its results"),
        (_all_channels, {}, "changes its results"),
        (None, {}, "is not found by its name"),
        (plain, {"head_dim": None}, "channels of its heads is not known"),
        (plain, {"attn_logit_softcapping": 30.0}, "behind a cap of the scores"),
    ],
)
def test_kernels_that_take_none(kernel: Any, fields: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel is not None:
        monkeypatch.setitem(KERNELS, "wrong", kernel)
    found = refusal("wrong", **fields)
    assert found is not None
    assert re.search(f"'wrong'.*{reason}.*use SDPA", found)
