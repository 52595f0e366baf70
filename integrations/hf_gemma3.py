"""transformers' Gemma 3. Its projector pools image tokens on their grid, so it gets the full grid."""

from __future__ import annotations

from typing import Any

from transformers.models.gemma3 import modeling_gemma3 as gemma3

from crossget.core.adapters import Tower, register
from crossget.integrations import hf

_CLASSES = ("Gemma3ForConditionalGeneration", "Gemma3Model")  # the latter since 4.52


@register(*(getattr(gemma3, name) for name in _CLASSES if hasattr(gemma3, name)))
def conditional_generation(model: Any) -> list[Tower]:
    """The image tower and the language model."""
    parts = hf.parts_of(model)
    return [hf.image_tower(parts), hf.language_model(parts.language_model)]
