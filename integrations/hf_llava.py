"""transformers' LLaVA-1.5, reduced as in the CrossGET authors' code, with shorter prompts.

The image tower's tokens after `vision_feature_layer` become image features. The language model gets the reduced ones,
including the cross token. In the language model, the cross token replaces the first token.
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
from crossget.integrations._support import project

_CLASSES = [llava.LlavaForConditionalGeneration, *filter(None, [getattr(llava, "LlavaModel", None)])]

# Since 5.0 get_image_features returns all outputs of the image tower, including the last hidden state.
_RETURNS_FEATURES_ONLY = "Output" not in str(inspect.signature(_CLASSES[-1].get_image_features).return_annotation)


@register(*_CLASSES)
def conditional_generation(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    parts = hf.parts_of(model)
    return [_visual(model, parts), hf.language_model(parts.language_model)]


def _visual(model: Any, parts: Any) -> Tower:
    config = model.config
    tower = hf.image_tower(parts)
    layers = partial(hf.layers_used, config, len(tower.blocks))
    several = not isinstance(
        config.vision_feature_layer, int
    )  # features of several blocks are concatenated, so each is the full grid
    features = partial(_features, config, hf.grid_tokens(config.vision_config) + tower.prefix, layers)
    return dataclasses.replace(
        tower,
        prefix=max(tower.prefix, 1),  # the strategy "default" drops the first token, class token or not
        restore=several,
        importance="attention",
        keys="mean_heads",
        project=None if several else partial(project, [(parts, "multi_modal_projector")]),
        intermediates=[
            IntermediatesHook(parts, "get_image_features", layers, grid=several, hides_rest=_RETURNS_FEATURES_ONLY)
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
    """The stages of LLaVA. They run one by one, as its forward reads the values of ids, which the meta device lacks."""
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
