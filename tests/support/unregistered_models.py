"""Small random models of classes that no adapter knows, each built in another way that transformer code is written in.

`KINDS` lists them by name, with the towers that must be found or the reason for which the model must be refused:

    model, inputs = build(KINDS["plain"])
    out = call(model, inputs)

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, N patches. There are two inputs, which differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH = 32, 4, 4
SIDE = 8  # patches along one side of an image of 64 x 64 pixels
PATCHES = SIDE * SIDE
TEXT = 20  # tokens of a text


@dataclass(frozen=True)
class Expected:
    """A tower that must be found.

    Attributes:
        blocks: number of blocks.
        tokens: T0, the number of tokens of one input.
        fixed: positions of protected tokens behind the prefix, counted from the end.
    """

    name: str = "visual"
    blocks: int = DEPTH
    tokens: int = PATCHES
    width: int = WIDTH
    prefix: int = 0
    class_token: bool = False
    causal: bool = False
    fixed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A model of one kind.

    Attributes:
        make: a function that makes the model.
        inputs: a function that makes the inputs: a tensor, or a tuple or dict of arguments.
        towers: the towers that must be found; none: the model is refused.
        others: prefixes of the paths of blocks that may be found as further towers.
        path: where the blocks are that are refused.
        reason: a regular expression that the reason of the refusal matches.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    towers: tuple[Expected, ...] = ()
    others: tuple[str, ...] = ()
    path: str = ""
    reason: str = ""


# Inputs -------------------------------------------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def images() -> Tensor:
    """[2, 3, 64, 64]."""
    return random(2, 3, 8 * SIDE, 8 * SIDE)


def token_ids() -> Tensor:
    """[2, T] token ids. The largest one, 49, ends each text; zeros follow."""
    ids = torch.randint(1, 49, (2, TEXT), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((TEXT - 1, TEXT - 6)):
        ids[row, end:] = 0
        ids[row, end] = 49
    return ids


def kept_patches() -> Tensor:
    """[2, N / 2] the indices of a random half of each image's patches."""
    order = torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order[:, : PATCHES // 2]


def build(kind: Kind) -> tuple[nn.Module, Any]:
    """The model and its inputs. Noise is on every parameter, as a table of zeros would hide what it is for."""
    torch.manual_seed(0)
    model = kind.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, kind.inputs()


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model returns for the inputs. Random numbers in its forward are the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# Attentions ---------------------------------------------------------------------------------------------------------


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, T, C] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, C]."""
    return x.transpose(1, 2).flatten(2)


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, and torch's fused attention."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class Projections(nn.Module):
    """Three projections, for attentions that differ in what follows."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = HEADS, kv_heads, WIDTH // HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(WIDTH, kv_heads * size), nn.Linear(WIDTH, kv_heads * size)
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.scale = size**-0.5

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, T, D] queries, and keys and values with their own number of heads."""
        return (
            split_heads(self.to_q(x)),
            split_heads(self.to_k(x), self.kv_heads),
            split_heads(self.to_v(x), self.kv_heads),
        )


class EagerAttention(Projections):
    """Two matrix products and a softmax, with an optional additive mask [B, 1, 1, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        if mask is not None:
            scores = scores + mask
        return self.to_out(join_heads(torch.matmul(self.dropout(self.attend(scores)), v)))


class EinsumAttention(Projections):
    """The products are torch.einsum, over [B, T, H, D] or [B, H, T, D]."""

    def __init__(self, heads_first: bool = False) -> None:
        super().__init__()
        self.heads_first = heads_first

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        if self.heads_first:
            weights = torch.einsum("b h i d, b h j d -> b h i j", q * self.scale, k).softmax(dim=-1)
            return self.to_out(join_heads(torch.einsum("b h i j, b h j d -> b h i d", weights, v)))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale, -1)
        return self.to_out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class HeadsInBatch(Projections):
    """torch's fused attention over [B * H, T, D]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.flatten(0, 1) for z in self.project(x))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v).unflatten(0, (len(x), HEADS))))


class SequenceFirstAttention(Projections):
    """Products of [B * H, T, D], from tokens [T, B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        q, k, v = (to(x) for to in (self.to_q, self.to_k, self.to_v))
        q, k, v = (z.view(length, batch * HEADS, -1).transpose(0, 1) for z in (q * self.scale, k, v))
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
        return self.to_out(torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, WIDTH))


class CutMaskAttention(Projections):
    """A causal mask for the longest text is cut to the tokens that arrive."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(2 * TEXT, 2 * TEXT, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        mask = self.mask[: x.shape[1], : x.shape[1]]
        return self.to_out(join_heads((q @ k.mT * self.scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v))


class PositionedAttention(Projections):
    """A position embedding [B, T, C] is added to what queries and keys are made of, but not to the values."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        q, k, v = (split_heads(z) for z in (self.to_q(x + pos), self.to_k(x + pos), self.to_v(x)))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class BiasedAttention(Projections):
    """A bias [H, T, T] that all blocks share is passed in."""

    def forward(self, x: Tensor, rel_pos_bias: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.to_out(join_heads((q @ k.mT * self.scale + rel_pos_bias).softmax(-1) @ v))


class TalkingHeads(Projections):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        scores = self.before((q @ k.mT * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.to_out(join_heads(weights @ v))


class EinsumTalkingHeads(Projections):
    """Heads are mixed before and after the softmax, by torch.einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.randn(HEADS, HEADS)), nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        weights = torch.einsum("bhij,hg->bgij", scores, self.before).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.after)
        return self.to_out(join_heads(torch.einsum("bhij,bhjd->bhid", weights, v)))


class GroupedAttention(Projections):
    """Two query heads share one head of keys and values."""

    def __init__(self) -> None:
        super().__init__(kv_heads=HEADS // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class RelativeAttention(Projections):
    """A learned bias for each offset of two patches on the grid, and one for each pair with the class token."""

    index: Tensor

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, offsets = fused, 2 * SIDE - 1
        self.table = nn.Parameter(torch.randn(offsets**2 + 3, HEADS))
        rows, columns = torch.arange(PATCHES) // SIDE, torch.arange(PATCHES) % SIDE
        index = torch.full((PATCHES + 1, PATCHES + 1), offsets**2)
        down, right = (z[:, None] - z[None] + SIDE - 1 for z in (rows, columns))
        index[1:, 1:] = down * offsets + right
        index[1:, 0] += 1
        index[0, 0] += 2
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        bias = self.table[self.index].permute(2, 0, 1)
        if self.fused:
            return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])))
        return self.to_out(join_heads((q @ k.mT * self.scale + bias).softmax(-1) @ v))


class CurrentPositions(Projections):
    """Positions are made from the number of tokens that arrive, for a bias by distance or for a rotation."""

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        place = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        if self.rotary:
            angle = place[:, None] * torch.linspace(0.1, 1.0, WIDTH // HEADS // 2)
            cos, sin = (torch.cat([z, z], -1) for z in (angle.cos(), angle.sin()))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))
        bias = -0.3 * (place[:, None] - place[None]).abs()
        return self.to_out(join_heads((q @ k.mT * self.scale + bias).softmax(-1) @ v))


class WindowAttention(FusedAttention):
    """Each patch attends within its window of half the grid's side."""

    def forward(self, x: Tensor) -> Tensor:
        half = SIDE // 2
        windows = x.unflatten(1, (2, half, 2, half)).transpose(2, 3).reshape(-1, half * half, x.shape[-1])
        out = super().forward(windows)
        return out.reshape(-1, 2, 2, half, half, x.shape[-1]).transpose(2, 3).reshape(x.shape)


class OwnKernel(torch.autograd.Function):
    """Attention as an operator of its own: it reads the keys in parts, so that no product is [T, T]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total, norm = torch.zeros_like(v), torch.zeros_like(v[..., :1])
        for keys, values in zip(k.split(16, -2), v.split(16, -2), strict=True):
            weights = (q @ keys.mT * q.shape[-1] ** -0.5).exp()
            total, norm = total + weights @ values, norm + weights.sum(-1, keepdim=True)
        return total / norm

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class KernelAttention(Projections):
    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(join_heads(OwnKernel.apply(*self.project(x))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[.., D] with pairs of channels rotated."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class RotaryAttention(Projections):
    """Queries and keys of the patches, which are last, are rotated by tables (cos, sin) of [N, D] or [1, N, D]."""

    def __init__(self, unsqueezes: bool) -> None:
        super().__init__()
        self.unsqueezes = unsqueezes

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x)
        first = q.shape[-2] - tables[0].shape[-2]
        cos, sin = (table.unsqueeze(1) if self.unsqueezes else table for table in tables)
        q, k = (torch.cat([z[:, :, :first], rotate(z[:, :, first:], cos, sin)], -2) for z in (q, k))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class OwnTables(Projections):
    """The attention has its tables [N, D] of the patches' rotation as buffers. The class token is not rotated."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.rand(PATCHES, WIDTH // HEADS // 2) * torch.arange(PATCHES)[:, None]
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1))
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, k = (torch.cat([z[:, :, :1], rotate(z[:, :, 1:], self.cos, self.sin)], 2) for z in (q, k))
        return self.to_out(join_heads(F.scaled_dot_product_attention(q, k, v)))


# Blocks -------------------------------------------------------------------------------------------------------------


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Callable[[], nn.Module] = FusedAttention, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention()
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        x = x + self.attn(self.norm1(x), *rest, **options)
        return x + self.mlp(self.norm2(x))


class PostNormBlock(Block):
    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        x = self.norm1(x + self.attn(x, *rest, **options))
        return self.norm2(x + self.mlp(x))


class ParallelBlock(nn.Module):
    """Attention and MLP read the same tokens. Their sum, or one after the other, is added to the input."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.chained, self.norm = chained, nn.LayerNorm(WIDTH)
        self.attn, self.mlp = FusedAttention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.chained:
            return x + self.attn(y) + self.mlp(y)
        return x + (self.attn(y) + self.mlp(y))


class PositionBlock(Block):
    """Every block has a position embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(PATCHES + 1, WIDTH))

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return super().forward(x + self.pos)


class InPlaceBlock(Block):
    """The input is added to the branch, in place."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.attn(self.norm1(x))
        x += shortcut
        shortcut = x
        x = self.mlp(self.norm2(x))
        x += shortcut
        return x


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """In training, the branch of a random half of the images is zero."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * 2 * torch.bernoulli(torch.full((x.shape[0], 1, 1), 0.5, device=x.device))


class ScaledBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale1, self.scale2, self.drop_path = LayerScale(), LayerScale(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Residual(nn.Module):
    """The input plus what a module makes of it."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def residual_block() -> nn.Module:
    """A block of two modules, each with its own residual."""
    return nn.Sequential(Residual(Normed(EagerAttention())), Residual(Normed(mlp())))


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class AddBlock(Block):
    """The additions are modules, as in code that hooks them."""

    def __init__(self) -> None:
        super().__init__(EagerAttention)
        self.add1, self.add2 = Add(), Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(x, self.attn(self.norm1(x)))
        return self.add2(x, self.mlp(self.norm2(x)))


class NamedTokensBlock(Block):
    """Tokens come by name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class DictBlock(Block):
    def forward(self, x: Any, *rest: Any, **options: Any) -> dict[str, Tensor]:
        return {"tokens": super().forward(x["tokens"])}


class TupleBlock(Block):
    def forward(self, x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
        return super().forward(x, *rest, **options), None


class ConvBlock(Block):
    """A depthwise convolution over the sequence, or over the grid, is between attention and MLP."""

    def __init__(self, grid: bool) -> None:
        super().__init__()
        self.grid, conv = grid, nn.Conv2d if grid else nn.Conv1d
        self.conv = conv(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        shape = (SIDE, SIDE) if self.grid else (-1,)
        x = x + self.conv(x.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class SpaceTimeBlock(Block):
    """Patches of one place attend to each other over time, then those of one frame over space."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0, self.temporal = nn.LayerNorm(WIDTH), FusedAttention()

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = len(x), 4
        x = x.unflatten(1, (frames, -1))
        over_time = x.transpose(1, 2).flatten(0, 1)
        x = x + self.temporal(self.norm0(over_time)).unflatten(0, (batch, -1)).transpose(1, 2)
        return super().forward(x.flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)


class MixerBlock(nn.Module):
    """A linear layer across the patches in place of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(WIDTH), mlp(PATCHES)
        self.norm2, self.channels = nn.LayerNorm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


# Image models -------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """[B, 3, 64, 64] -> [B, N, C]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """Patches, positions, blocks, and a head on the class token or, without one, on the mean.

    Subclasses override `encode` for other ways from block to block.
    """

    def __init__(self, block: Callable[[], nn.Module] = Block, class_token: bool = True) -> None:
        super().__init__()
        self.patches: nn.Module = Patches()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, PATCHES + class_token, WIDTH))
        self.make_blocks(block)
        self.norm: nn.Module = nn.LayerNorm(WIDTH)
        self.head: nn.Module = nn.Linear(WIDTH, 5)

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))

    def embed(self, x: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, T, C]."""
        x = self.patches(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.pos_embed

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """[B, T, C] what the heads get."""
        return self.norm(self.encode(self.embed(x)))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])


class NamedTokens(Vit):
    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden_states=x)
        return x


class Dicts(Vit):
    def encode(self, x: Tensor) -> Tensor:
        passed = {"tokens": x}
        for block in self.blocks:
            passed = block(passed)
        return passed["tokens"]


class ConvBetween(Vit):
    """A convolution over the grid behind every block, outside of it."""

    def __init__(self) -> None:
        super().__init__(class_token=False)
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) for _ in range(DEPTH))

    def encode(self, x: Tensor) -> Tensor:
        for block, conv in zip(self.blocks, self.convs, strict=True):
            x = block(x)
            x = x + conv(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)
        return x


class SequenceFirst(Vit):
    """The blocks get [T, B, C]."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.transpose(0, 1)).transpose(0, 1)


def nested(x: Tensor) -> Tensor:
    """[B, T, C] as a nested tensor, in which every image may have its own number of tokens."""
    return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


class NestedBlock(Block):
    """Blocks pass nested tensors."""

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return nested(super().forward(torch.nested.to_padded_tensor(x, 0.0)))


class Nested(Vit):
    def encode(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(super().encode(nested(x)), 0.0)


class QueryKeyPositions(Vit):
    """Every block gets the position embedding again."""

    def __init__(self) -> None:
        super().__init__(partial(Block, PositionedAttention))

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, pos=self.pos_embed.expand(len(x), -1, -1))
        return x


class SharedBias(Vit):
    """One relative bias for all blocks."""

    def __init__(self) -> None:
        super().__init__(partial(Block, BiasedAttention))
        self.bias = nn.Parameter(torch.randn(HEADS, PATCHES + 1, PATCHES + 1))

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, rel_pos_bias=self.bias)
        return x


class TupleVit(Vit):
    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


class SequentialChunks(Vit):
    """Two parts of two blocks each."""

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.encoder = nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block(), block()))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Chunk(nn.ModuleList):
    """A list that runs its own modules."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class ListChunks(Vit):
    """Lists that run themselves. Identities stand for the blocks of earlier lists, so that block i has index i."""

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.blocks = nn.ModuleList(
            Chunk([*(nn.Identity() for _ in range(start)), block(), block()]) for start in range(0, DEPTH, 2)
        )


class Attributes(Vit):
    """Each block is an attribute."""

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.layer1, self.layer2, self.layer3, self.layer4 = block(), block(), block(), block()

    def encode(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class SharedBlock(Vit):
    """One block runs several times."""

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.blocks = nn.ModuleList([block(), block()])

    def encode(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = super().encode(x)
        return x


class ClonedTokens(Vit):
    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.clone()).clone()
        return x


class PositionsBetween(Vit):
    """Every block after the first gets a position embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.randn(DEPTH - 1, PATCHES + 1, WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x if number == 0 else x + self.between[number - 1])
        return x


class DenseHead(Vit):
    """A map of depth from the grids behind the second and the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2 * WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, hidden = self.embed(x), []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return self.read(hidden[1::2])

    def read(self, hidden: Iterable[Tensor]) -> Tensor:
        grids = [self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE)) for x in hidden]
        return self.head(torch.cat(grids, 1))


class HookedBlocks(DenseHead):
    """The grids are collected by hooks on the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: dict[nn.Module, Tensor] = {}
        for number in (1, 3):
            self.blocks[number].register_forward_hook(self.collect)

    def collect(self, block: nn.Module, args: Any, out: Tensor) -> None:
        self.collected[block] = out

    def forward(self, x: Tensor) -> Tensor:
        self.encode(self.embed(x))
        return self.read(self.collected.pop(self.blocks[number]) for number in (1, 3))


class Rotary(Vit):
    """Tables for the patches are made once and passed to every block: [N, D] or [1, N, D].

    Those of [1, N, D] become [1, 1, N, D] in the block, or meet [B, H, N, D] as they are.
    """

    frequencies: Tensor

    def __init__(self, batched: bool, unsqueezes: bool = False) -> None:
        super().__init__(partial(Block, partial(RotaryAttention, unsqueezes)), class_token=not batched)
        self.batched = batched
        self.register_buffer("frequencies", torch.rand(2, WIDTH // HEADS // 2))

    def encode(self, x: Tensor) -> Tensor:
        place = torch.arange(PATCHES, dtype=x.dtype)
        angle = torch.stack([place // SIDE, place % SIDE], -1) @ self.frequencies
        cos, sin = (torch.cat([z, z], -1) for z in (angle.cos(), angle.sin()))
        for block in self.blocks:
            x = block(x, tables=(cos[None], sin[None])) if self.batched else block(x, (cos, sin))
        return x


class Registers(Vit):
    """A class token, a distillation token and four registers in front. Two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.dist_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.register_tokens = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.head_dist = nn.Linear(WIDTH, 5)

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        more = torch.cat([self.dist_token, self.register_tokens], 1).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], more, x[:, 1:]], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


class Detector(Vit):
    """Five detection tokens behind the patches, from which boxes are read."""

    def __init__(self) -> None:
        super().__init__()
        self.detection_tokens = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.embed(x), self.detection_tokens.expand(len(x), -1, -1)], 1)
        x = self.norm(self.encode(x)[:, -5:])
        return {"logits": self.head(x), "boxes": x[..., :4].sigmoid()}


class Frames(Vit):
    """[B, frames, 3, 64, 64]: each frame is an image of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class TwoViews(Vit):
    """[B, 2, 3, 64, 64]: each view of an image runs by itself."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (super(TwoViews, self).forward(view) for view in x.unbind(1))
        return first + second


class Volume(Vit):
    """Patches of three axes: [B, channels, frames or depth, height, width]."""

    def __init__(self, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv3d(channels, WIDTH, patch, stride=patch)

    def embed(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        assert self.cls_token is not None
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed


def torch_encoder(batch_first: bool, norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


class TorchEncoder(Vit):
    """torch's own encoder, of [B, T, C] or of [T, B, C]."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.encoder = torch_encoder(batch_first, norm_first)

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        pass

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.mean(1)))


def one_sequential() -> nn.Module:
    """Everything is an entry of one nn.Sequential."""
    return nn.Sequential(Patches(), *(Block() for _ in range(DEPTH)), Head())


class Normed(nn.Module):
    """A branch with its norm, for stacks that add the residual themselves."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), branch

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class PairStack(nn.Module):
    """A loop over pairs of attention and MLP. No module is a block."""

    def __init__(self, names: Sequence[str] = (), attention: Callable[[], nn.Module] = EagerAttention) -> None:
        super().__init__()
        self.names = names
        self.norm: nn.Module = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(self.pair(Normed(attention()), Normed(mlp())) for _ in range(DEPTH))

    def pair(self, *members: nn.Module) -> nn.Module:
        return nn.ModuleDict(dict(zip(self.names, members, strict=True))) if self.names else nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            attention, feed_forward = (layer[name] for name in self.names or (0, 1))  # type: ignore[index]
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.norm(x)


class RootMeanSquare(nn.Module):
    """A norm of simple functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class NormedPairStack(PairStack):
    """The input of the loop is normalised, and so is every sum in it, of a branch and the scaled tokens."""

    def __init__(self, norm: Callable[[], nn.Module] = RootMeanSquare, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.norm = scale, norm()
        self.norms = nn.ModuleList(norm() for _ in range(2 * DEPTH))

    def pair(self, *members: nn.Module) -> nn.Module:
        return super().pair(*(member.fn for member in members if isinstance(member, Normed)))

    def forward(self, x: Tensor) -> Tensor:
        x, norms = self.norm(x), iter(self.norms)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            x = next(norms)(x * self.scale + attention(x))
            x = next(norms)(x * self.scale + feed_forward(x))
        return x


class Pairs(Vit):
    def __init__(self, stack: Callable[[], nn.Module] = PairStack) -> None:
        super().__init__()
        self.transformer = stack()

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        pass

    def encode(self, x: Tensor) -> Tensor:
        return self.transformer(x)


class Stage(nn.Module):
    """Blocks, after a pooling of the grid that doubles the width."""

    def __init__(self, width: int, pools: bool) -> None:
        super().__init__()
        if pools:
            self.pool = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, groups=width // 2)
            self.widen = nn.Linear(width // 2, width)
        self.pools = pools
        self.blocks = nn.Sequential(*(Block(partial(FusedAttention, width), width) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        if self.pools:
            first, grid = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE))
            x = torch.cat([self.widen(first), self.pool(grid).flatten(2).transpose(1, 2)], 1)
        return self.blocks(x)


class Pyramid(Vit):
    """Two stages of two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 5)

    def make_blocks(self, block: Callable[[], nn.Module]) -> None:
        self.stages = nn.ModuleList([Stage(WIDTH, False), Stage(2 * WIDTH, True)])

    def encode(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class MaskedAutoencoder(Vit):
    """The blocks see a random half of the patches. A decoder predicts the pixels of all, with tokens for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.decoder_embed = nn.Linear(WIDTH, WIDTH)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, PATCHES + 1, WIDTH))
        self.decoder_blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 192)

    def forward(self, x: Tensor) -> Tensor:
        """The pixels [B, N, 192]."""
        kept = torch.rand(len(x), PATCHES).argsort(1)[:, : PATCHES // 2]
        x = self.embed(x)
        rows = kept[:, :, None].expand(-1, -1, WIDTH) + 1
        x = self.norm(self.encode(torch.cat([x[:, :1], x.gather(1, rows)], 1)))
        x = self.decoder_embed(x)
        full = self.mask_token.repeat(len(x), PATCHES + 1, 1).scatter(1, rows, x[:, 1:])
        x = torch.cat([x[:, :1], full[:, 1:]], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(x[:, 1:])


class Predictor(nn.Module):
    """Predicts features of patches that were not seen from those of all that were."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, PATCHES, WIDTH))
        self.layers, self.norm = nn.ModuleList(Block() for _ in range(2)), nn.LayerNorm(WIDTH)

    def forward(self, context: Tensor, kept: Tensor) -> Tensor:
        hidden = torch.ones(len(kept), PATCHES, dtype=torch.bool).scatter(1, kept, False)
        target = hidden.nonzero()[:, 1].reshape(len(kept), -1)
        masks = (self.mask_token + self.pos_embed[0][target]).expand(len(kept), -1, -1)
        x = torch.cat([context + self.pos_embed[0][kept], masks], 1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x[:, kept.shape[1] :])


class JointEmbedding(nn.Module):
    """An encoder of all patches and a predictor, which gets the kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = Vit(class_token=False), Predictor()
        self.encoder.head = nn.Identity()

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The features [B, N, C], and the predicted ones of the patches that were not kept."""
        x = self.encoder.features(x)
        return x, self.predictor(x.gather(1, kept[:, :, None].expand(-1, -1, WIDTH)), kept)


class ConvNet(nn.Module):
    """Residual blocks over an image grid [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.blocks = nn.ModuleList(
            Residual(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU())) for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


# [T, B, C], as OpenAI's CLIP is written -----------------------------------------------------------------------------


class SequenceFirstBlock(nn.Module):
    """Pre-norm with nn.MultiheadAttention, of [T, B, C]."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), mlp()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class SequenceFirstStack(nn.Module):
    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(SequenceFirstBlock(mask) for _ in range(DEPTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ClipImages(nn.Module):
    """The image tower of a CLIP: the class token's output in the joint space [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(PATCHES + 1, WIDTH))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), SequenceFirstStack(), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
        x = self.transformer(x).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class ClipTexts(nn.Module):
    """The text tower of a CLIP: the output at the largest id in the joint space [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(50, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(TEXT, WIDTH))
        self.transformer = SequenceFirstStack(torch.full((TEXT, TEXT), float("-inf")).triu(1))
        self.ln_final, self.text_projection = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(WIDTH, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.token_embedding(ids) + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer(x).permute(1, 0, 2))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


class Clip(nn.Module):
    """Both towers: the similarities [images, texts]."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.textual = ClipImages(), ClipTexts()
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a, b = (F.normalize(z, dim=-1) for z in (self.visual(image), self.textual(text)))
        return self.logit_scale.exp() * a @ b.mT


# Packed images, text, sound -----------------------------------------------------------------------------------------


class PackedAttention(Projections):
    """All images are in one sequence [N, C]; each attends within itself."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (z.unflatten(-1, (HEADS, -1)) for z in (self.to_q(x), self.to_k(x), self.to_v(x)))
        q, k = (rotate(z, *(table[:, None] for table in tables)) for z in (q, k))
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(z.transpose(0, 1)[None].split(lengths, 2) for z in (q, k, v)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        return self.to_out(out[0].transpose(0, 1).flatten(1))


class PackedVit(nn.Module):
    """Patches of images of any sizes, [N, 192] in one sequence, and the grids' sides [B, 2]. 2 x 2 are merged last."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.blocks = nn.ModuleList(Block(PackedAttention) for _ in range(DEPTH))
        self.register_buffer("frequencies", torch.rand(2, WIDTH // HEADS // 2))
        self.norm, self.merger = nn.LayerNorm(WIDTH), mlp(4 * WIDTH)

    def forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        x = self.patch_embed(pixels.view(-1, 3, 8, 8)).flatten(1)
        places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grids.tolist()]
        angle = torch.cat(places).to(x.dtype) @ self.frequencies
        cos, sin = (torch.cat([z, z], -1) for z in (angle.cos(), angle.sin()))
        cu_seqlens = F.pad(grids.prod(-1).cumsum(0, dtype=torch.int32), (1, 0))
        for block in self.blocks:
            x = block(x, cu_seqlens=cu_seqlens, tables=(cos, sin))
        return self.merger(self.norm(x).view(-1, 4 * WIDTH))


def packed(*sides: tuple[int, int]) -> dict[str, Tensor]:
    grids = torch.tensor(sides)
    return {"pixels": random(int(grids.prod(-1).sum()), 192), "grids": grids}


class TextEncoder(nn.Module):
    """BERT-like: post-norm, and a mask [B, T] that is zero for padding. The last states and the pooled first one."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(50, WIDTH), nn.Embedding(TEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.ModuleList(PostNormBlock(EagerAttention) for _ in range(DEPTH))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.word_embeddings(input_ids) + self.position_embeddings(torch.arange(input_ids.shape[1])))
        mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layer:
            x = layer(x, mask)
        return {"last_hidden_state": x, "pooler_output": self.pooler(x[:, 0]).tanh()}


def padded_texts() -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class CausalTextEncoder(nn.Module):
    """Causal blocks, and the last token's output [B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding, self.positions = nn.Embedding(50, WIDTH), nn.Parameter(torch.randn(TEXT, WIDTH))
        self.blocks = nn.ModuleList(Block(CutMaskAttention) for _ in range(DEPTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return x[:, -1]


class AudioEncoder(nn.Module):
    """Two convolutions over a spectrogram [B, 16, time], then blocks: [B, time / 2, C]."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(16, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.randn(PATCHES, WIDTH))
        self.layers, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(spectrogram)))).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ImageTextDecoder(nn.Module):
    """An image tower, a text tower, and a decoder of the patches' pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.image_encoder = TextEncoder(), Vit()
        self.image_encoder.head = nn.Identity()
        self.decoder = nn.Sequential(Block(), Block())
        self.pixels = nn.Linear(WIDTH, 192)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B] the similarities, and [B, N, 192] the pixels."""
        text = self.text_encoder(input_ids, attention_mask)["pooler_output"]
        image = self.image_encoder.features(images)
        return (text * image[:, 0]).sum(-1), self.pixels(self.decoder(image[:, 1:]))


class CausalBlock(Block):
    """Keys and values of earlier calls are kept."""

    attn: Projections

    def __init__(self) -> None:
        super().__init__(Projections)

    def forward(self, x: Tensor, past_key_value: tuple[Tensor, Tensor] | None = None) -> Any:
        q, k, v = self.attn.project(self.norm1(x))
        if past_key_value is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past_key_value is None)
        x = x + self.attn.to_out(join_heads(out))
        return x + self.mlp(self.norm2(x)), (k, v)


class LanguageModel(nn.Module):
    """A causal language model with a cache: logits [B, T, 50], and the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(50, WIDTH), nn.Embedding(128, WIDTH)
        self.layers = nn.ModuleList(CausalBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor, past_key_values: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        return self.decode(self.embedding(ids), past_key_values)

    def decode(self, x: Tensor, past_key_values: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """As `forward`, of embedded tokens [B, T, C]."""
        past = [None] * DEPTH if past_key_values is None else past_key_values
        start = 0 if past[0] is None else past[0][0].shape[2]
        x, cache = x + self.positions(torch.arange(start, start + x.shape[1])), []
        for layer, before in zip(self.layers, past, strict=True):
            x, kept = layer(x, past_key_value=before)
            cache.append(kept)
        return self.head(self.norm(x)), cache


class VisionLanguage(nn.Module):
    """Features of an image's patches are in front of a prompt: logits [B, N + T, 50]."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.projector, self.language_model = Vit(), nn.Linear(WIDTH, WIDTH), LanguageModel()
        self.vision_tower.head = nn.Identity()

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        x = self.projector(self.vision_tower.features(images)[:, 1:])
        return self.language_model.decode(torch.cat([x, self.language_model.embedding(ids)], 1))[0]


class QueryBlock(Block):
    """Queries attend to each other, then to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3, self.cross = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm3(x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class QueryDecoder(nn.Module):
    """A decoder whose 16 queries read a convolution's output: boxes [B, 16, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.queries = Patches(), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.layers, self.boxes = nn.ModuleList(QueryBlock() for _ in range(DEPTH)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory, x = self.backbone(x), self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return self.boxes(x)


# The kinds ----------------------------------------------------------------------------------------------------------

CLASS_TOKEN = Expected(tokens=PATCHES + 1, prefix=1, class_token=True)
TEXTS = Expected("text", tokens=TEXT, prefix=1)
CAUSAL_TEXTS = Expected("text", tokens=TEXT, prefix=1, causal=True)


def vit(attention: Callable[[], nn.Module]) -> Kind:
    """A plain ViT with another attention."""
    return Kind(partial(Vit, partial(Block, attention)), images, (CLASS_TOKEN,))


def with_class_token(make: Callable[[], nn.Module], inputs: Callable[[], Any] = images) -> Kind:
    return Kind(make, inputs, (CLASS_TOKEN,))


def refused(make: Callable[[], nn.Module], path: str, reason: str, inputs: Callable[[], Any] = images) -> Kind:
    return Kind(make, inputs, path=path, reason=reason)


def plain_patches(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A plain ViT without class token."""
    return partial(Vit, partial(Block, attention), False)


KINDS: dict[str, Kind] = {
    "plain": with_class_token(Vit),
    "eager, mean of patches": Kind(plain_patches(EagerAttention), images, (Expected(),)),
    "post-norm": with_class_token(partial(Vit, PostNormBlock)),
    "parallel, one sum": with_class_token(partial(Vit, partial(ParallelBlock, False))),
    "parallel, two sums": with_class_token(partial(Vit, partial(ParallelBlock, True))),
    "layer scale, drop path": with_class_token(partial(Vit, ScaledBlock)),
    "einsum": vit(EinsumAttention),
    "einsum, heads first": vit(partial(EinsumAttention, True)),
    "fused, heads in the batch": vit(HeadsInBatch),
    "talking heads": vit(TalkingHeads),
    "talking heads, einsum": vit(EinsumTalkingHeads),
    "grouped queries": vit(GroupedAttention),
    "relative bias, eager": vit(partial(RelativeAttention, False)),
    "relative bias, fused": vit(partial(RelativeAttention, True)),
    "torch encoder": with_class_token(partial(TorchEncoder, True, False)),
    "torch encoder [T, B, C]": with_class_token(partial(TorchEncoder, False, True)),
    "torch encoder alone": Kind(partial(torch_encoder, True, True), lambda: random(2, PATCHES, WIDTH), (Expected(),)),
    "torch encoder alone [T, B, C]": Kind(
        partial(torch_encoder, False, False), lambda: random(PATCHES, 2, WIDTH), (Expected(),)
    ),
    "products [T, B, C]": with_class_token(partial(SequenceFirst, partial(Block, SequenceFirstAttention))),
    "CLIP's images [T, B, C]": with_class_token(ClipImages),
    "CLIP's texts [T, B, C]": Kind(ClipTexts, token_ids, (CAUSAL_TEXTS,)),
    "CLIP": Kind(Clip, lambda: {"image": images(), "text": token_ids()}, (CLASS_TOKEN, CAUSAL_TEXTS)),
    "pairs": with_class_token(Pairs),
    "pairs, fused": with_class_token(partial(Pairs, partial(PairStack, attention=FusedAttention))),
    "pairs by name": with_class_token(partial(Pairs, partial(PairStack, ("attention", "feed_forward")))),
    "pairs, post-norm": with_class_token(partial(Pairs, partial(NormedPairStack, partial(nn.LayerNorm, WIDTH)))),
    "pairs, scaled": with_class_token(partial(Pairs, partial(NormedPairStack, scale=2.0))),
    "sequential": Kind(one_sequential, images, (Expected(),)),
    "sequential of sequentials": with_class_token(SequentialChunks),
    "chunks": with_class_token(ListChunks),
    "shared blocks": with_class_token(SharedBlock),
    "residual module": with_class_token(partial(Vit, residual_block)),
    "addition module": with_class_token(partial(Vit, AddBlock)),
    "in-place additions": with_class_token(partial(Vit, InPlaceBlock)),
    "tokens by name": with_class_token(partial(NamedTokens, NamedTokensBlock)),
    "tuples": with_class_token(partial(TupleVit, TupleBlock)),
    "attributes": with_class_token(Attributes),
    "video": with_class_token(partial(Volume, 3, (2, 16, 16)), lambda: random(2, 3, 8, 64, 64)),
    "volume": with_class_token(partial(Volume, 1, (8, 8, 8)), lambda: random(2, 1, 32, 32, 32)),
    "two views": with_class_token(TwoViews, lambda: random(2, 2, 3, 64, 64)),
    "frames in the batch": with_class_token(Frames, lambda: random(2, 3, 3, 64, 64)),
    "registers": Kind(Registers, images, (Expected(tokens=PATCHES + 6, prefix=6, class_token=True),)),
    "detection tokens": Kind(
        Detector,
        images,
        (Expected(tokens=PATCHES + 6, prefix=1, class_token=True, fixed=(-5, -4, -3, -2, -1)),),
    ),
    "rotary [N, D]": with_class_token(partial(Rotary, False)),
    "rotary [1, N, D], unsqueezed inside": Kind(partial(Rotary, True, True), images, (Expected(),)),
    "rotary [1, N, D]": Kind(partial(Rotary, True), images, (Expected(),)),
    "rotation of the attention's own": vit(OwnTables),
    "positions of the block's own": with_class_token(partial(Vit, PositionBlock)),
    "positions of queries and keys": with_class_token(QueryKeyPositions),
    "shared bias": with_class_token(SharedBias),
    "positions between blocks": with_class_token(PositionsBetween),
    "cloned tokens": with_class_token(ClonedTokens),
    "dense head": with_class_token(DenseHead),
    "hooks on blocks": with_class_token(HookedBlocks),
    "packed, one size": Kind(PackedVit, partial(packed, (SIDE, SIDE), (SIDE, SIDE)), (Expected(),)),
    "text with padding": Kind(TextEncoder, padded_texts, (TEXTS,)),
    "causal text": Kind(CausalTextEncoder, token_ids, (CAUSAL_TEXTS,)),
    "audio": Kind(AudioEncoder, lambda: random(2, 16, 2 * PATCHES), (Expected("audio"),)),
    "pyramid": Kind(
        Pyramid,
        images,
        (
            Expected("visual.0", 2, PATCHES + 1, prefix=1, class_token=True),
            Expected("visual.1", 2, PATCHES // 4 + 1, 2 * WIDTH, prefix=1, class_token=True),
        ),
    ),
    "masked autoencoder": Kind(
        MaskedAutoencoder,
        images,
        (Expected(tokens=PATCHES // 2 + 1, prefix=1, class_token=True),),
        others=("decoder_blocks",),
    ),
    "encoder and predictor": Kind(
        JointEmbedding, lambda: (images(), kept_patches()), (Expected(),), others=("predictor.",)
    ),
    "image, text, decoder": Kind(
        ImageTextDecoder, lambda: {**padded_texts(), "images": images()}, (CLASS_TOKEN, TEXTS), others=("decoder.",)
    ),
    "vision and language": Kind(VisionLanguage, lambda: {"images": images(), "ids": token_ids()}, (CLASS_TOKEN,)),
    # Refused.
    "convolution over the sequence": refused(
        partial(Vit, partial(ConvBlock, False)), "blocks", r"convolution|\[8, 8\]"
    ),
    "convolution over the grid": refused(
        partial(Vit, partial(ConvBlock, True), False), "blocks", r"convolution|\[8, 8\]"
    ),
    "windows": refused(plain_patches(WindowAttention), "blocks", "window"),
    "space and time": refused(partial(Vit, SpaceTimeBlock, False), "blocks", "attention"),
    "convolutional network": refused(ConvNet, "blocks", "grid"),
    "mixer": refused(partial(Vit, MixerBlock, False), "blocks", "no attention"),
    "positions made inside": refused(plain_patches(partial(CurrentPositions, False)), "blocks", "position"),
    "rotation made inside": refused(plain_patches(partial(CurrentPositions, True)), "blocks", "position"),
    "convolutions between blocks": refused(ConvBetween, "blocks", "between"),
    "dictionaries": refused(partial(Dicts, DictBlock), "blocks", "dict"),
    "queries of a decoder": refused(QueryDecoder, "layers", "quer"),
    "language model": refused(LanguageModel, "layers", "generates", token_ids),
    "packed, several sizes": refused(PackedVit, "blocks", "one size", partial(packed, (SIDE, SIDE), (SIDE, SIDE // 2))),
    **(
        {"nested tensors": refused(partial(Nested, NestedBlock, False), "blocks", "nested")}
        if hasattr(torch.nested, "nested_tensor_from_jagged") and torch.__version__ >= "2.6"
        else {}
    ),
    "own kernel": refused(partial(Vit, partial(Block, KernelAttention)), "blocks", "kernel|no attention"),
}

FOUND = {name: kind for name, kind in KINDS.items() if kind.towers}
REFUSED = {name: kind for name, kind in KINDS.items() if not kind.towers}
