"""transformers' PaliGemma: the image tower's reduced tokens become the first tokens of the prompt.

The language model has no cross token: the first token of its prompts is an image token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.models.paligemma import modeling_paligemma as paligemma

from crossget.core.adapters import Features, Tower, register
from crossget.integrations import hf

_CLASSES = [paligemma.PaliGemmaForConditionalGeneration, *filter(None, [getattr(paligemma, "PaliGemmaModel", None)])]


@register(*_CLASSES)
def conditional_generation(model: Any) -> list[Tower]:
    """The image tower."""
    parts = hf.parts_of(model)
    tower = hf.image_tower(parts)
    features = Features(hf.grid_tokens(model.config.vision_config), layer=len(tower.blocks) - 1, dropped=0)
    prompt = hf.prompt(model, parts, partial(_always, features))
    return [dataclasses.replace(tower, restore=False, prompt=prompt)]


def _always(features: Features, arguments: Mapping[str, Any]) -> Features:
    return features
