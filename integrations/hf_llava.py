"""transformers' LLaVA-1.5: the reference's behaviour, and prompts that make room for fewer image features.

The image tower's tokens are read behind `vision_feature_layer` and reach the language model reduced, the cross token
among them. The language model's first token plays the cross token's part there.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava import modeling_llava as llava

from crossget.core.adapters import Features, IntermediatesHook, Prefilled, Stages, Tower, register
from crossget.integrations import hf
from crossget.integrations._support import frozen

_CLASSES = [llava.LlavaForConditionalGeneration, *filter(None, [getattr(llava, "LlavaModel", None)])]

# From 5.0 on get_image_features returns all that the image tower returned, its last hidden state among it.
_GIVES_FEATURES_ALONE = "Output" not in str(inspect.signature(_CLASSES[-1].get_image_features).return_annotation)


@register(*_CLASSES)
def conditional_generation(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    parts = hf.parts_of(model)
    return [_visual(model, parts), hf.language_model(parts.language_model)]


def _visual(model: Any, parts: Any) -> Tower:
    config = model.config
    tower = hf.image_tower(parts)
    layers = partial(hf.layers_used, config, len(tower.blocks))
    several = not isinstance(config.vision_feature_layer, int)  # they are concatenated: the full grid of each
    features = partial(_features, config, hf.grid_tokens(config.vision_config) + tower.prefix, layers)
    return dataclasses.replace(
        tower,
        prefix=max(tower.prefix, 1),  # what "default" drops, class token or not
        restore=several,
        importance="attention",
        keys="mean_heads",
        project=None if several else partial(frozen, parts.multi_modal_projector),
        intermediates=[
            IntermediatesHook(parts, "get_image_features", layers, grid=several, hides_rest=_GIVES_FEATURES_ALONE)
        ],
        keeps_cross_token=True,
        prompt=None if several else hf.prompt(model, parts, features),
    )


def _features(config: Any, tokens: int, layers: Any, arguments: Mapping[str, Any]) -> Features:
    strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    (layer,) = layers(arguments)
    return Features(tokens, layer, dropped=1 if strategy == "default" else 0)


# Counting ------------------------------------------------------------------------------------------------------------


def stages(model: Any) -> Stages:
    """How LLaVA generates. The stages run one by one: between them, its forward looks at the values of ids."""
    parts, size = hf.parts_of(model), model.config.vision_config.image_size
    return Stages(
        parts={"image tower": [parts.vision_tower], "projector": [parts.multi_modal_projector]},
        pixels=(3, size, size),
        prefill=partial(_prefill, model, parts),
        step=partial(_step, model, parts),
    )


def _prefill(model: Any, parts: Any, pixels: Tensor, text: Tensor) -> Prefilled:
    config = model.config
    features = parts.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    features = list(getattr(features, "pooler_output", features))
    prompt = torch.cat([*features, model.get_input_embeddings()(text)[0]])[None]
    cache = hf.run_language_model(model, parts.language_model, inputs_embeds=prompt)
    return Prefilled(cache, int(features[0].shape[0]), int(prompt.shape[1]))


def _step(model: Any, parts: Any, token: Tensor, left: Prefilled) -> Any:
    return hf.run_language_model(model, parts.language_model, left.cache, input_ids=token)


STAGES = {llava.LlavaForConditionalGeneration: stages}
