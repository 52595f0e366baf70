"""transformers' CLIP: both towers, in one model or alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.models.clip import modeling_clip as clip

from crossget.integrations import hf
from crossget.integrations._support import project
from crossget.registry import TextInput, Tower, register


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


def _visual(model: Any, tower: Any) -> Tower:
    projects = hasattr(model, "visual_projection")
    return Tower(
        "visual",
        blocks=hf.blocks(tower),
        width=tower.config.hidden_size,
        prefix=1,
        class_token=True,
        project=partial(project, tower.pre_layrnorm, model, "visual_projection") if projects else None,
        meanwhile=hf.kernel(tower.config),
    )


def _text(model: Any, tower: Any) -> Tower:
    projects = hasattr(model, "text_projection")
    return Tower(
        "text",
        blocks=hf.blocks(tower),
        width=tower.config.hidden_size,
        prefix=1,
        causal=True,
        padding=True,
        text=TextInput(tower.embeddings.token_embedding, partial(_end, tower.config.eos_token_id)),
        project=partial(project, tower.final_layer_norm, model, "text_projection") if projects else None,
        meanwhile=hf.kernel(tower.config),
    )


def _end(eos: int, ids: Tensor) -> tuple[Tensor, None]:
    """Position of the end of text, as the tower itself looks for it. Padding shows in the attention's mask, if any."""
    if eos == 2:  # what old configurations say; the end of text is the largest id then
        return ids.argmax(-1), None
    return ids.eq(eos).int().argmax(-1), None
