"""transformers' SigLIP2: the towers of SigLIP, for padded batches of images of several shapes."""

from __future__ import annotations

from transformers.models.siglip2 import modeling_siglip2 as siglip2

from crossget.core.adapters import register
from crossget.integrations import hf_siglip

register(siglip2.Siglip2Model)(hf_siglip.both)
register(siglip2.Siglip2VisionModel, siglip2.Siglip2ForImageClassification)(hf_siglip.visual)
register(siglip2.Siglip2TextModel)(hf_siglip.text)
