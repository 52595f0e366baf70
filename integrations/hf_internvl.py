"""transformers' InternVL. A pixel shuffle follows the image tower, so it gets the full grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.models.internvl import modeling_internvl as internvl

from crossget.core.adapters import Tower, register
from crossget.integrations import hf


@register(internvl.InternVLForConditionalGeneration, internvl.InternVLModel)
def internvl_model(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    return hf.on_the_grid(model, "get_image_features")


register(internvl.InternVLVisionModel, towers=[replace(hf.VIT, masks=(), padding=False)])
