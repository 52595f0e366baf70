"""transformers' SigLIP2: the towers of SigLIP, for padded batches of images of several shapes."""

from __future__ import annotations

from transformers.models.siglip2 import modeling_siglip2 as siglip2

from crossget.core.adapters import register
from crossget.integrations.hf_siglip import TEXT, VISUAL

register(siglip2.Siglip2Model, towers=[VISUAL, TEXT])
register(siglip2.Siglip2VisionModel, siglip2.Siglip2ForImageClassification, towers=[VISUAL])
register(siglip2.Siglip2TextModel, towers=[TEXT])
