"""transformers' DINOv2, with and without registers."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers

from crossget.core.adapters import read, register
from crossget.integrations import hf

register(dinov2.Dinov2Model, dinov2.Dinov2ForImageClassification, dinov2.Dinov2Backbone, towers=[hf.VIT])
register(
    registers.Dinov2WithRegistersModel, registers.Dinov2WithRegistersForImageClassification,
    registers.Dinov2WithRegistersBackbone,
    towers=[replace(hf.VIT, prefix=read("config.num_register_tokens", add=1))],
)  # fmt: skip
