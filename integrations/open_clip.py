"""open_clip: both towers of CLIP, CustomTextCLIP and CoCa, native, timm and Hugging Face."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.registry import TextInput, Tower, find_towers, register


@register(open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)
def clip(model: Any) -> list[Tower]:
    """The vision tower (if it is a transformer) and the text tower."""
    return [*_visual(model.visual), _text(model)]


def _visual(visual: Any) -> list[Tower]:
    if hasattr(visual, "trunk"):
        return _trunk(visual.trunk)
    if not hasattr(visual, "transformer"):
        return []
    project = None if visual.attn_pool is not None else partial(_project, visual.ln_pre, visual, "proj")
    return [
        Tower(
            "visual",
            blocks=_blocks(visual.transformer),
            width=int(visual.class_embedding.shape[0]),
            prefix=1,
            class_token=True,
            project=project,
            readers=_readers(visual.transformer),
        )
    ]


def _trunk(trunk: nn.Module) -> list[Tower]:
    try:
        return find_towers(trunk)
    except TypeError:  # a convolutional or windowed trunk: only the text can be reduced
        return []


def _text(model: Any) -> Tower:
    text = getattr(model, "text", model)
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax")
    eos = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    class_embedding = getattr(text, "cls_emb", None) is not None
    return Tower(
        "text",
        blocks=_blocks(text.transformer),
        width=int(text.positional_embedding.shape[1]),
        prefix=1,
        causal=text.attn_mask is not None,
        padding=class_embedding or getattr(text, "use_pad_mask", False),
        text=TextInput(text.token_embedding, partial(_behind if class_embedding else _end, pool, eos)),
        project=partial(_project, text.ln_final, text, "text_projection"),
        readers=_readers(text.transformer),
    )


def _blocks(transformer: Any) -> list[nn.Module]:
    if not getattr(transformer, "batch_first", True):
        raise TypeError(
            "cannot reduce an open_clip tower made with batch_first=False: its blocks pass [T, B, C]; make the model "
            "with batch_first=True"
        )
    return list(transformer.resblocks)


def _readers(transformer: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(transformer, "forward_intermediates")] if hasattr(transformer, "forward_intermediates") else []


def _end(pool: str, eos: int | None, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Position of the token that the text tower pools."""
    if pool == "argmax":
        return ids.argmax(-1), None
    if pool == "eos":
        return (ids == eos).int().argmax(-1), None
    last = 0 if pool == "first" else ids.shape[1] - 1
    return torch.full_like(ids[:, 0], last), None


def _behind(pool: str, eos: int | None, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """CoCa appends a class embedding behind the text and pools that."""
    return torch.full_like(ids[:, 0], ids.shape[1]), None


def _project(norm: nn.Module, owner: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """Cross tokens [N, C] into the joint space [N, E], without gradient for the parameters on the way."""
    if isinstance(norm, nn.LayerNorm):
        weight, bias = (None if p is None else p.detach() for p in (norm.weight, norm.bias))
        tokens = F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)
    projection = getattr(owner, name)
    if projection is None:
        return tokens
    if isinstance(projection, nn.Linear):
        bias = None if projection.bias is None else projection.bias.detach()
        return F.linear(tokens, projection.weight.detach(), bias)
    return tokens @ projection.detach()
