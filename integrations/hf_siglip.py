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

from crossget.core.adapters import TextInput, read, register
from crossget.integrations import hf
from crossget.integrations._support import project


def _text(model: Any) -> TextInput:
    return TextInput(hf.inner(model, "text_model").embeddings.token_embedding, _last)


def _last(ids: Tensor) -> tuple[Tensor, None]:
    return torch.full_like(ids[:, 0], ids.shape[1] - 1), None


def _projection(model: Any) -> Any:
    part = hf.inner(model, "text_model")
    return partial(project, [(part, "final_layer_norm"), (part, "head")])


# Single tokens of images cannot be projected, as the image tower's head is an attention pool.
VISUAL = hf.encoder("visual", "vision_model")
# The first token of a text is protected as in other text towers, though it is no start-of-text token.
TEXT = hf.encoder("text", "text_model", prefix=1, text=read(_text), project=read(_projection))

register(siglip.SiglipModel, towers=[VISUAL, TEXT])
register(siglip.SiglipVisionModel, siglip.SiglipForImageClassification, towers=[VISUAL])
register(siglip.SiglipTextModel, towers=[TEXT])
