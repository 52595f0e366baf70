"""transformers' BLIP: the image tower and the text encoder.

Inside a larger model, the other parts attend to the image tower's tokens. They get the reduced tokens, and a mask of
the same length. A text encoder pools its first token. Its tokens are merged before the cross-attention to the image. A
text decoder generates with a cache of keys and values, and is not reduced.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip import modeling_blip as blip

from crossget.core.adapters import Prefilled, Stages, TextInput, Tower, register
from crossget.core.state import TokenState
from crossget.integrations import hf
from crossget.integrations._support import project

_CACHE = ("past_key_value", "past_key_values", "cache")  # names of a block's argument in different versions
_DECODES = (
    "BLIP's text decoder generates with a cache of keys and values of all its tokens, so these are not merged; in the "
    "whole model, it attends to the reduced image tokens"
)


@register(blip.BlipModel)
def contrastive(model: Any) -> list[Tower]:
    """The image tower and the text tower. Their poolers are applied to the first token before it is projected."""
    norm, pooler = (model, "vision_model.post_layernorm"), "text_model.pooler"
    image = partial(project, [norm, norm, (model, "visual_projection")])
    words = partial(project, [(model, f"{pooler}.dense"), (model, f"{pooler}.activation"), (model, "text_projection")])
    return [_visual(model.vision_model, restore=False, project=image), *_text(model.text_model, project=words)]


@register(blip.BlipForImageTextRetrieval)
def retrieval(model: Any) -> list[Tower]:
    """The image tower and the text tower."""
    image = partial(project, [(model, "vision_model.post_layernorm"), (model, "vision_proj")])
    words = partial(project, [(model, "text_proj")])
    return [_visual(model.vision_model, restore=False, project=image), *_text(model.text_encoder, project=words)]


@register(blip.BlipForQuestionAnswering)
def question_answering(model: Any) -> list[Tower]:
    """The image tower and the text tower of questions. The decoder attends to all tokens of the latter."""
    return [_visual(model.vision_model, restore=False), *_text(model.text_encoder)]


register(
    blip.BlipForConditionalGeneration,
    towers=[hf.encoder("visual", "vision_model", prefix=1, class_token=True, restore=False)],
)
register(blip.BlipVisionModel, towers=[hf.VIT])


@register(blip.BlipTextModel)
def text(model: Any) -> list[Tower]:
    """The text encoder alone."""
    return _text(model)


def absent(model: Any) -> dict[str, str]:
    """Why there is no text tower, by the tower's name; empty if there is one."""
    if isinstance(model, blip.BlipForConditionalGeneration):
        return {"text": _DECODES}
    parts = (getattr(model, name, None) for name in ("text_model", "text_encoder"))
    part = next((part for part in parts if part is not None), model)
    reason = _relative(part) if isinstance(part, blip.BlipTextModel) else ""
    return {"text": reason} if reason else {}


def impossible(model: nn.Module) -> str:
    """Why no tower can be found in a decoder."""
    return _DECODES if isinstance(model, blip.BlipTextLMHeadModel) else ""


def _visual(part: Any, **fields: Any) -> Tower:
    return replace(hf.VIT, **fields).of(part)


def _text(part: Any, **fields: Any) -> list[Tower]:
    if _relative(part):
        return []
    ids = TextInput(part.embeddings.word_embeddings, _first)
    return [hf.encoder("text", text=ids, fit_arguments=_no_cache, **fields).of(part)]


def _relative(part: Any) -> str:
    """Why a text encoder cannot be reduced; empty if it can."""
    kind = getattr(part.embeddings, "position_embedding_type", "absolute")  # others were possible before 5.0
    if kind == "absolute":
        return ""
    return (
        f"BLIP's text encoder computes {kind!r} positions inside its attention from the current order of tokens, which "
        "changes when tokens merge"
    )


def _first(ids: Tensor) -> tuple[Tensor, None]:
    """Position of the token that the heads pool. Padding is found in the attention's mask."""
    return torch.zeros_like(ids[:, 0]), None


def _no_cache(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """Refuse a cache. A block of an encoder gets none, but that of a decoder does, and both have the same class."""
    if name in _CACHE and value is not None:
        raise RuntimeError(f"this is the text model of a decoder: {_DECODES}. Detach, and attach to that model")
    return value


# Counting ------------------------------------------------------------------------------------------------------------


def stages(model: Any) -> Stages:
    """The stages of captioning: one caption per image, all with the same first tokens."""
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
