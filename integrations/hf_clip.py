"""transformers' CLIP: both towers, in one model or alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.models.clip import modeling_clip as clip

from crossget.core.adapters import TextInput, Tower, register
from crossget.integrations import hf
from crossget.integrations._support import embed, project


@register(clip.CLIPModel)
def both(model: Any) -> list[Tower]:
    """The image tower and the text tower."""
    return [_visual(model, model.vision_model), _text(model, model.text_model)]


@register(clip.CLIPVisionModel, clip.CLIPVisionModelWithProjection, clip.CLIPForImageClassification)
def visual(model: Any) -> list[Tower]:
    """The image tower alone."""
    return [_visual(model, hf.inner(model, "vision_model"))]


@register(clip.CLIPTextModel, clip.CLIPTextModelWithProjection)
def text(model: Any) -> list[Tower]:
    """The text tower alone."""
    return [_text(model, hf.inner(model, "text_model"))]


def _visual(model: Any, part: Any) -> Tower:
    projects = hasattr(model, "visual_projection")
    return hf.tower(
        "visual",
        part,
        prefix=1,
        class_token=True,
        project=partial(project, [(part, "pre_layrnorm"), (model, "visual_projection")]) if projects else None,
        embed=partial(embed, [(part, "post_layernorm"), (model, "visual_projection")]) if projects else None,
    )


def _text(model: Any, part: Any) -> Tower:
    projects = hasattr(model, "text_projection")
    return hf.tower(
        "text",
        part,
        prefix=1,
        causal=True,
        text=TextInput(part.embeddings.token_embedding, partial(_end, part.config.eos_token_id)),
        project=partial(project, [(part, "final_layer_norm"), (model, "text_projection")]) if projects else None,
    )


def _end(eos: int, ids: Tensor) -> tuple[Tensor, None]:
    """Position of the end-of-text token, as the host finds it. Padding is found in the attention's mask, if any."""
    if eos == 2:  # a wrong value in old configurations; the host then takes the largest id
        return ids.argmax(-1), None
    return ids.eq(eos).int().argmax(-1), None
