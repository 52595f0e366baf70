"""Tools that replace functions of torch, and blocks that fail on fewer tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import plain_host
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget

plain = pytest.fixture(plain_host.registered)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "linear", "softmax"])
def test_a_wrapped_function_is_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, calls = vit(), getattr(F, name), []
    for block in model.blocks:
        block.attn.fused_attn = name != "softmax"

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    with crossget.attach(model, crossget.Ward(8)) as attached:
        expected = model(IMAGES)
        monkeypatch.setattr(F, name, counted)
        assert torch.equal(model(IMAGES), expected)
        assert attached.tokens["visual"] == [65, 57, 49]
    assert calls or name == "softmax"  # timm calls the method of the tensor


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Replace what counters of FLOPs replace: functions, and methods of torch.Tensor."""
    calls: Counter[str] = Counter()

    def replace(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, wrapper)

    for name in ("linear", "softmax", "scaled_dot_product_attention"):
        replace(F, name)
    for name in ("matmul", "bmm", "add", "mul"):
        replace(torch, name)
    for name in ("matmul", "bmm", "add", "add_", "mul", "div", "sub", "softmax", "view", "reshape"):
        replace(torch.Tensor, name)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("residual", plain_host.RESIDUALS)
@pytest.mark.parametrize("attention", plain_host.ATTENTIONS)
def test_counters_that_replace_methods_count_the_same(
    attention: str, residual: str, monkeypatch: pytest.MonkeyPatch, plain: None
) -> None:
    model = plain_host.Plain(attention=attention, residual=residual).eval()
    with crossget.attach(model, crossget.ToMe(4)) as attached:
        expected = model(plain_host.TOKENS)
        attached.reducer = crossget.ToMe(0)
        monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
        calls = counted(monkeypatch)
        dense, seen = model(plain_host.TOKENS), Counter(calls)
        with attached.paused():
            calls.clear()
            torch.testing.assert_close(model(plain_host.TOKENS), dense)
        names = ("linear", "scaled_dot_product_attention", "matmul", "bmm", "softmax", "add")
        if attention != "mha_weights":  # its parts are computed without the functions that it calls
            assert {name: seen[name] for name in names} == {name: calls[name] for name in names}
        attached.reducer = crossget.ToMe(4)
        assert torch.equal(model(plain_host.TOKENS), expected)
        assert attached.tokens["visual"] == [20, 16, 12]


@torch.no_grad()
def test_a_search_for_towers_sees_through_replaced_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_host.Plain(attention="eager").eval()
    counted(monkeypatch)
    (tower,) = crossget.find_towers(model, plain_host.TOKENS)
    assert tower.depth == 3


@torch.no_grad()
def test_a_kernel_that_hides_the_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return v.detach().clone()

    model = vit()
    with crossget.attach(model, crossget.Ward(8)):
        expected = model(IMAGES)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", kernel)
            with pytest.raises(RuntimeError, match=r"F\.scaled_dot_product_attention is replaced by .*kernel"):
                model(IMAGES)
        assert torch.equal(model(IMAGES), expected)


class Tables(nn.Module):
    """A block with a table of positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.norm = nn.Parameter(torch.randn(20, 16)), nn.Linear(16, 48), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.qkv(self.norm(x)) * self.table.repeat(1, 3))[:, None].chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]


class WithTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Tables() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_a_table_in_a_block_is_named_and_can_be_declared() -> None:
    model, tokens = WithTables().eval(), torch.randn(2, 20, 16)
    for makes_tables in (False, True):
        tower = crossget.Tower("visual", crossget.Blocks("layers"), 16, makes_tables=makes_tables)
        crossget.register(WithTables, towers=[tower])
        try:
            with crossget.attach(model, crossget.ToMe(2)) as attached:
                if makes_tables:
                    assert model(tokens).shape == tokens.shape
                    assert attached.tokens["visual"] == [20, 18, 16]
                else:
                    with pytest.raises(RuntimeError, match=r"block 1 \(Tables\) of tower 'visual' got 18 tokens .* 20"):
                        model(tokens)
        finally:
            crossget.unregister(WithTables)
