"""transformers' LLaVA-OneVision. It packs tiles and video frames by their grid, so it gets the full grid."""

from __future__ import annotations

from typing import Any

from transformers.models.llava_onevision import modeling_llava_onevision as onevision

from crossget.core.adapters import Tower, register
from crossget.integrations import hf

_CLASSES = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")  # the latter since 4.52


@register(*(getattr(onevision, name) for name in _CLASSES if hasattr(onevision, name)))
def conditional_generation(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    return hf.on_the_grid(model, "get_image_features", "get_video_features")
