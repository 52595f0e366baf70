"""transformers' BLIP: the image tower and the text encoder.

What follows the image tower in one model attends to its tokens, so it gets the reduced ones, and a mask for as many. A
text encoder reads out its first token; its tokens are merged in front of the attention to the image. A text decoder
generates with a cache of keys and values, and is not reduced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip import modeling_blip as blip

from crossget.core.adapters import Prefilled, Stages, TextInput, Tower, register
from crossget.core.state import TokenState
from crossget.integrations import hf
from crossget.integrations._support import project

_CACHE = ("past_key_value", "past_key_values", "cache")  # a block's argument; the name has changed between versions
_DECODES = (
    "BLIP's text decoder generates with a cache of keys and values of all its tokens, so these are not merged; it gets "
    "faster by the reduced image tokens, in the model that it is part of"
)


@register(blip.BlipModel)
def contrastive(model: Any) -> list[Tower]:
    """Both towers. Either's pooler stands between its first token and the joint space."""
    norm, pooler = model.vision_model.post_layernorm, model.text_model.pooler
    image = partial(project, nn.Sequential(norm, norm), model, "visual_projection")
    words = partial(project, nn.Sequential(pooler.dense, pooler.activation), model, "text_projection")
    return [_visual(model.vision_model, restore=False, project=image), *_text(model.text_model, project=words)]


@register(blip.BlipForImageTextRetrieval)
def retrieval(model: Any) -> list[Tower]:
    """Both towers."""
    image = partial(project, model.vision_model.post_layernorm, model, "vision_proj")
    words = partial(project, None, model, "text_proj")
    return [_visual(model.vision_model, restore=False, project=image), *_text(model.text_encoder, project=words)]


@register(blip.BlipForQuestionAnswering)
def question_answering(model: Any) -> list[Tower]:
    """The image tower and the encoder of questions, all of whose tokens the decoder attends to."""
    return [_visual(model.vision_model, restore=False), *_text(model.text_encoder)]


@register(blip.BlipForConditionalGeneration)
def captioning(model: Any) -> list[Tower]:
    """The image tower."""
    return [_visual(model.vision_model, restore=False)]


@register(blip.BlipVisionModel)
def visual(model: Any) -> list[Tower]:
    """The image tower alone."""
    return [_visual(model)]


@register(blip.BlipTextModel)
def text(model: Any) -> list[Tower]:
    """The text encoder alone."""
    return _text(model)


def absent(model: Any) -> dict[str, str]:
    """Why there is no text tower."""
    if isinstance(model, blip.BlipForConditionalGeneration):
        return {"text": _DECODES}
    parts = (getattr(model, name, None) for name in ("text_model", "text_encoder"))
    part = next((part for part in parts if part is not None), model)
    reason = _relative(part) if isinstance(part, blip.BlipTextModel) else ""
    return {"text": reason} if reason else {}


def explain(model: nn.Module) -> str:
    """Why a decoder has no adapter."""
    return _DECODES if isinstance(model, blip.BlipTextLMHeadModel) else ""


def _visual(part: Any, **fields: Any) -> Tower:
    return hf.tower("visual", part, prefix=1, class_token=True, **fields)


def _text(part: Any, **fields: Any) -> list[Tower]:
    if _relative(part):
        return []
    ids = TextInput(part.embeddings.word_embeddings, _first)
    return [hf.tower("text", part, text=ids, fit_arguments=_no_cache, **fields)]


def _relative(part: Any) -> str:
    kind = getattr(part.embeddings, "position_embedding_type", "absolute")  # others were possible before 5.0
    if kind == "absolute":
        return ""
    return (
        f"BLIP's text encoder computes {kind!r} positions inside its attention from the current order of tokens, which "
        "changes when tokens merge"
    )


def _first(ids: Tensor) -> tuple[Tensor, None]:
    """What the heads read out. Padding shows in the attention's mask."""
    return torch.zeros_like(ids[:, 0]), None


def _no_cache(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """A block of an encoder gets no cache. A decoder's text model is of the same class, and gives one in its call."""
    if name in _CACHE and value is not None:
        raise RuntimeError(f"this is the text model of a decoder: {_DECODES}. Detach, and attach to that model")
    return value


# Counting ------------------------------------------------------------------------------------------------------------


def stages(model: Any) -> Stages:
    """How BLIP writes captions: one for each image, all of which begin alike."""
    size = model.config.vision_config.image_size
    return Stages(
        parts={"image tower": [model.vision_model]},
        pixels=(3, size, size),
        prefill=partial(_prefill, model),
        step=partial(_step, model),
    )


def _prefill(model: Any, pixels: Tensor, text: Tensor) -> Prefilled:
    image = model.vision_model(pixel_values=pixels)[0]
    cache = _decode(model, image, text.expand(len(pixels), -1))
    return Prefilled(cache, int(image.shape[1]), int(text.shape[1]), image)


def _step(model: Any, token: Tensor, left: Prefilled) -> Any:
    return _decode(model, left.context, token.expand(len(left.context), -1), left.cache)


def _decode(model: Any, image: Tensor, ids: Tensor, cache: Any = None) -> Any:
    text = model.text_decoder
    given = {"encoder_hidden_states": image, "is_decoder": True}
    return hf.run_decoder(text.bert, text.cls, cache, input_ids=ids, **given)


STAGES = {blip.BlipForConditionalGeneration: stages}
