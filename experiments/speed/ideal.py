"""Run a dense model's blocks at given token counts: how fast a reducer could be that costs nothing.

Behind the attention the sequence is cut, which is the cheapest way to have fewer tokens. The blocks' forwards are
written out here, for the three hosts that are timed, so that nothing of the library's own mechanism takes part.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens of a block. Fields of an object are no constants of compiled code, so that blocks share it.

    Attributes:
        entering: the block works on so many.
        left: so many are behind its attention.
    """

    entering: int
    left: int


def cut(blocks: Sequence[nn.Module], counts: Sequence[int]) -> None:
    """Give every block a forward that works on so many tokens.

    Args:
        blocks: of timm, open_clip or transformers' CLIP.
        counts: tokens that enter each block, and those that leave the last one. The first may be one more than the
            host has: a token is appended then. Blocks beyond are left out.
    """
    for layer, block in enumerate(blocks):
        forward = FORWARDS.get(type(block).__name__)
        if forward is None:
            raise TypeError(f"no ideal is known for a {type(block).__name__}; there is one for {', '.join(FORWARDS)}")
        if layer + 1 < len(counts):
            block.forward = partial(forward, block, Counts(counts[layer], counts[layer + 1]))
        else:
            block.forward = partial(_nothing, block)


def _nothing(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return (x,) if _returns_tuple(block) else x


def _returns_tuple(block: nn.Module) -> bool:
    """Say whether this is a layer of an older transformers, which returns its attention too if it is asked for it."""
    return "output_attentions" in inspect.signature(type(block).forward).parameters


def _entered(x: Tensor, tokens: int) -> Tensor:
    return torch.cat([x, x[:, :1]], 1) if x.shape[1] < tokens else x


def timm_block(block: Any, counts: Counts, x: Tensor, **kwargs: Any) -> Tensor:
    """Run timm's Block."""
    x = _entered(x, counts.entering)
    x = x[:, : counts.left] + block.drop_path1(block.ls1(block.attn(block.norm1(x))))[:, : counts.left]
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def open_clip_block(block: Any, counts: Counts, q_x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run open_clip's ResidualAttentionBlock."""
    tokens = counts.entering
    x, mask = _entered(q_x, tokens), kwargs.get("attn_mask")
    if mask is not None and len(mask) < tokens:  # causal: nobody sees the token at the end, which sees all
        mask = F.pad(F.pad(mask, (0, 1), value=-torch.inf), (0, 0, 0, 1))
    elif mask is not None:
        mask = mask[:tokens, :tokens]
    x = x[:, : counts.left] + block.ls_1(block.attention(q_x=block.ln_1(x), attn_mask=mask))[:, : counts.left]
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def clip_layer(block: Any, counts: Counts, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a layer of transformers' CLIP."""
    x = _entered(hidden_states, counts.entering)
    x = x[:, : counts.left] + block.self_attn(block.layer_norm1(x), attention_mask=None)[0][:, : counts.left]
    x = x + block.mlp(block.layer_norm2(x))
    return (x,) if _returns_tuple(block) else x


FORWARDS: dict[str, Callable[..., Any]] = {
    "Block": timm_block,
    "ResidualAttentionBlock": open_clip_block,
    "CLIPEncoderLayer": clip_layer,
}
