"""transformers' SigLIP: both towers, in one model or alone.

The image tower has no class token. The text tower is not causal, and pools the last token, whether it is padding or
not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.siglip import modeling_siglip as siglip

from crossget.core.adapters import TextInput, Tower, register
from crossget.integrations import hf
from crossget.integrations._support import project


@register(siglip.SiglipModel)
def both(model: Any) -> list[Tower]:
    """The image tower and the text tower."""
    return visual(model) + text(model)


@register(siglip.SiglipVisionModel, siglip.SiglipForImageClassification)
def visual(model: Any) -> list[Tower]:
    """The image tower alone. Single tokens cannot be projected, as its head is an attention pool."""
    return [hf.tower("visual", hf.inner(model, "vision_model"))]


@register(siglip.SiglipTextModel)
def text(model: Any) -> list[Tower]:
    """The text tower alone."""
    part = hf.inner(model, "text_model")
    return [
        hf.tower(
            "text",
            part,
            prefix=1,  # the first token is protected as in other text towers, though it is no start-of-text token
            text=TextInput(part.embeddings.token_embedding, _last),
            project=partial(project, [(part, "final_layer_norm"), (part, "head")]),
        )
    ]


def _last(ids: Tensor) -> tuple[Tensor, None]:
    return torch.full_like(ids[:, 0], ids.shape[1] - 1), None
