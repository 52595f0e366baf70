"""Tiny models of transformers: their sizes, their parameters, and the ways to call them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from crossget.demo import tiny_inputs, tiny_transformers

# Images, two towers, packed patches, a random mask in the forward, audio with convolutions before it, and texts.
MODELS = {
    "vit": "ViTModel",
    "clip": "CLIPModel",
    "qwen2_vl": "Qwen2VisionTransformerPretrainedModel",
    "vit_mae": "ViTMAEModel",
    "wav2vec2": "Wav2Vec2Model",
    "bert": "BertModel",
}


def build(family: str) -> Any:
    return next(tiny_transformers.builders(getattr(tiny_transformers.module(family), MODELS[family])))()


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in an output."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, list | tuple) else ()
    return [leaf for item in items for leaf in leaves(item)]


def test_one_class_for_each_configuration() -> None:
    sources = tiny_transformers.families()
    assert MODELS.keys() <= sources.keys()
    assert "llama" not in sources
    assert set(tiny_transformers.classes("clip", sources["clip"])) == {"CLIPModel", "CLIPTextModel", "CLIPVisionModel"}
    assert list(tiny_transformers.classes("clip", sources["clip"], "*WithProjection")) == [
        "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection",
    ]  # fmt: skip
    assert list(tiny_transformers.classes("clip", sources["clip"], "ViT*")) == []


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_small_and_none_of_its_parameters_is_constant(family: str) -> None:
    model = build(family)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert max(len(part) for part in model.modules() if isinstance(part, nn.ModuleList)) <= 7  # wav2vec2: convolutions
    assert [name for name, p in model.named_parameters() if p.numel() > 1 and p.max() == p.min()] == []


def test_special_tokens_stay_different_and_inside_the_vocabulary() -> None:
    video_llava = tiny_transformers.module("video_llava").VideoLlavaForConditionalGeneration
    config = tiny_transformers.tiny(video_llava.config_class, widths=True)
    special = [config.image_token_index, config.video_token_index]
    assert len(set(special)) == 2
    assert max(special) < config.text_config.vocab_size == 100


@pytest.mark.parametrize("family", MODELS)
def test_a_call_repeats_exactly_and_its_inputs_differ(family: str) -> None:
    model = build(family)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for way in itertools.islice(tiny_inputs.ways(model), 200):
        try:
            with torch.no_grad():
                outputs, again = leaves(way.call()), leaves(way.call())
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            continue  # a layout of another family
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, outputs, again))
        first = outputs[0].float()
        halves = first.chunk(2) if first.shape[0] % 2 == 0 else (first[0], first[1])
        assert not torch.allclose(*halves)
        assert ("(input_ids)" in way.method) == (family == "bert"), "images and audio come first"
        return
    pytest.fail("no way to call it was found")
