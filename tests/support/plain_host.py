"""A small backbone whose blocks can attend and add in every way that the watcher knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget

TOKENS = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
ATTENTIONS = ["sdpa", "mha", "mha_weights", "eager", "bmm"]
RESIDUALS = ["plus", "reversed", "add", "in_place"]


class Block(nn.Module):
    """A block with every choice the watcher knows, for the tests below."""

    def __init__(self, width: int = 32, attention: str = "sdpa", residual: str = "plus") -> None:
        super().__init__()
        self.attention, self.residual = attention, residual
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mha = nn.MultiheadAttention(width, 4, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        if self.attention.startswith("mha"):
            return self.mha(x, x, x, need_weights=self.attention == "mha_weights")[0]  # type: ignore[no-any-return]
        q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.attention == "is_causal":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.attention == "causal_mask":
            mask = torch.ones(20, 20, dtype=torch.bool).tril()  # the host's, made for its own tokens
            out = F.scaled_dot_product_attention(q, k, v, mask)
        elif self.attention == "eager":
            out = F.softmax(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)), dim=-1) @ v
        elif self.attention == "bmm":
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))
            out = torch.bmm(torch.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, -1), v).unflatten(0, (-1, 4))
        elif self.attention == "own_softmax":
            scores = (q @ k.mT * q.shape[-1] ** -0.5).exp()
            out = scores / scores.sum(-1, keepdim=True) @ v
        else:
            return x.cumsum(1)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(self.norm(x))
        if self.residual == "plus":
            x = x + y
        elif self.residual == "reversed":
            x = y + x
        elif self.residual == "add":
            x = torch.add(x, y)
        elif self.residual == "in_place":
            y += x
            x = y
        elif self.residual == "statement":
            y.add_(x)
            x = y
        elif self.residual == "onto":
            x = x.clone() + y
        return x + self.mlp(x)


class Plain(nn.Module):
    def __init__(self, depth: int = 3, **kwargs: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Block(**kwargs) for _ in range(depth)])
        self.wide = nn.Linear(3, 32)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x.mean(1)


def registered() -> Iterator[None]:
    """The adapter of `Plain`, as a fixture: `plain = pytest.fixture(autouse=True)(registered)`."""

    @crossget.register(Plain)
    def adapter(model: Plain) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=list(model.stages), width=32, prefix=1, class_token=True)]

    yield
    crossget.unregister(Plain)
