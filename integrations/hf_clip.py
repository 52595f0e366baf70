"""transformers' CLIP: both towers, in one model or alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.models.clip import modeling_clip as clip

from crossget.core.adapters import TextInput, read, register
from crossget.integrations import hf
from crossget.integrations._support import embed, project


def _projection(apply: Any, path: str, model: Any) -> Any:
    """How a token gets into the joint space: a norm and a projection; None without the latter.

    Args:
        apply: `project` or `embed`.
        path: the path to the norm, in a model with both towers.
        model: the model.
    """
    part, norm = path.split(".")
    name = {"vision_model": "visual_projection", "text_model": "text_projection"}[part]
    return partial(apply, [(hf.inner(model, part), norm), (model, name)]) if hasattr(model, name) else None


def _text(model: Any) -> TextInput:
    part = hf.inner(model, "text_model")
    return TextInput(part.embeddings.token_embedding, partial(_end, part.config.eos_token_id))


def _end(eos: int, ids: Tensor) -> tuple[Tensor, None]:
    """Position of the end-of-text token, as the host finds it. Padding is found in the attention's mask, if any."""
    if eos == 2:  # a wrong value in old configurations; the host then takes the largest id
        return ids.argmax(-1), None
    return ids.eq(eos).int().argmax(-1), None


VISUAL = hf.encoder(
    "visual", "vision_model", prefix=1, class_token=True,
    project=read(partial(_projection, project, "vision_model.pre_layrnorm")),
    embed=read(partial(_projection, embed, "vision_model.post_layernorm")),
)  # fmt: skip
TEXT = hf.encoder(
    "text", "text_model", prefix=1, causal=True, text=read(_text),
    project=read(partial(_projection, project, "text_model.final_layer_norm")),
)  # fmt: skip

register(clip.CLIPModel, towers=[VISUAL, TEXT])
register(clip.CLIPVisionModel, clip.CLIPVisionModelWithProjection, clip.CLIPForImageClassification, towers=[VISUAL])
register(clip.CLIPTextModel, clip.CLIPTextModelWithProjection, towers=[TEXT])
