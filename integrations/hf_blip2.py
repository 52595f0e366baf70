"""transformers' BLIP-2 and InstructBLIP: the image tower, to whose reduced tokens the Q-Former attends.

The Q-Former gives the language model one feature per query, so that prompts do not change. Its few queries are not
reduced.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip_2 import modeling_blip_2 as blip2
from transformers.models.instructblip import modeling_instructblip as instructblip

from crossget.core.adapters import Prefilled, Stages, register
from crossget.integrations import hf

VISUAL = hf.encoder("visual", "vision_model", prefix=1, class_token=True)

register(
    blip2.Blip2Model, blip2.Blip2ForConditionalGeneration, blip2.Blip2ForImageTextRetrieval,
    blip2.Blip2VisionModelWithProjection, instructblip.InstructBlipForConditionalGeneration,
    *filter(None, [getattr(instructblip, "InstructBlipModel", None)]),
    towers=[replace(VISUAL, restore=False)],
)  # fmt: skip
register(blip2.Blip2VisionModel, instructblip.InstructBlipVisionModel, towers=[VISUAL])


def impossible(model: nn.Module) -> str:
    """Why no tower can be found in a Q-Former without an image tower."""
    if hasattr(model, "qformer") or "QFormer" in type(model).__name__:
        return "the Q-Former's tokens are its queries and a text, which are not reduced, and it has no image tower"
    return ""


# Counting ------------------------------------------------------------------------------------------------------------


def stages(model: Any) -> Stages:
    """The stages of BLIP-2 with a decoder-only language model (OPT).

    Raises:
        TypeError: the language model has an encoder (T5).
    """
    if model.config.text_config.is_encoder_decoder:
        raise TypeError("the stages of BLIP-2 with a language model that has an encoder (T5) are not known: take OPT")
    size = model.config.vision_config.image_size
    return Stages(
        parts={"image tower": [model.vision_model], "Q-Former": [model.qformer, model.language_projection]},
        pixels=(3, size, size),
        prefill=partial(_prefill, model),
        step=partial(_step, model),
    )


def _prefill(model: Any, pixels: Tensor, text: Tensor) -> Prefilled:
    image = model.vision_model(pixel_values=pixels)[0]
    queries = model.query_tokens.expand(len(image), -1, -1)
    asked = model.qformer(query_embeds=queries, encoder_hidden_states=image)[0]
    features = model.language_projection(asked).flatten(0, 1)
    prompt = torch.cat([features, model.get_input_embeddings()(text)[0]])[None]
    cache = hf.run_language_model(model, model.language_model, inputs_embeds=prompt)
    return Prefilled(cache, int(image.shape[1]), int(prompt.shape[1]))


def _step(model: Any, token: Tensor, left: Prefilled) -> Any:
    return hf.run_language_model(model, model.language_model, left.cache, input_ids=token)


STAGES = {blip2.Blip2ForConditionalGeneration: stages}
