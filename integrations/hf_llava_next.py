"""transformers' LLaVA-NeXT. It packs the tokens of image tiles by their grid, so it gets the full grid."""

from __future__ import annotations

from typing import Any

from transformers.models.llava_next import modeling_llava_next as llava_next

from crossget.core.adapters import Tower, register
from crossget.integrations import hf

_CLASSES = [llava_next.LlavaNextForConditionalGeneration, *filter(None, [getattr(llava_next, "LlavaNextModel", None)])]


@register(*_CLASSES)
def llava(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    return hf.on_the_grid(model, "get_image_features")
