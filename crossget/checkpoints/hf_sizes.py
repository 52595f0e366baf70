"""Published models of transformers by their sizes: for counting FLOPs, and for timing with random weights.

Nothing is downloaded: the configurations are copied from the models' repositories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Preset:
    """A model: the name of its class in transformers, and its configuration.

    Attributes:
        architecture: name of the model's class.
        config: creates the configuration.
        source: the repository on the hub that the configuration is from.
    """

    architecture: str
    config: Callable[[], Any]
    source: str


def build(name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta") -> nn.Module:
    """A model with random weights in evaluation mode; on the meta device it takes no memory.

    Args:
        name: one of `PRESETS`.
        dtype: of the weights.
        device: where the weights are created.

    Raises:
        ValueError: no such preset.
        RuntimeError: transformers is not installed.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    transformers = import_transformers()
    preset = PRESETS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = getattr(transformers, preset.architecture)(preset.config())
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def import_transformers() -> Any:
    """The transformers package.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RuntimeError('transformers is not installed: pip install "crossget[transformers]"') from error
    return transformers


def _clip_vision() -> dict[str, Any]:
    """ViT-L/14 for images of 336 x 336 pixels."""
    return {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
    }  # fmt: skip


def _llava(width: int, inner: int, depth: int, heads: int) -> Any:
    transformers = import_transformers()
    text = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
        pad_token_id=32001,
    )  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_clip_vision()), text_config=text, image_token_index=32000,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def _llava_7b() -> Any:
    return _llava(4096, 11008, 32, 32)


def _llava_13b() -> Any:
    return _llava(5120, 13824, 40, 40)


def _clip() -> Any:
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return import_transformers().CLIPConfig(
        vision_config=_clip_vision(), text_config={**text, "projection_dim": 768}, projection_dim=768
    )


def _blip() -> Any:
    return import_transformers().BlipConfig(vision_config={"image_size": 384}, text_config={"vocab_size": 30524})


def _blip2() -> Any:
    transformers = import_transformers()
    text = transformers.OPTConfig(
        hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560,
        vocab_size=50304,
    )  # fmt: skip
    config = transformers.Blip2Config(text_config=text.to_dict(), num_query_tokens=32, image_token_index=50265)
    config.image_token_id = 50265
    return config


PRESETS = {
    "llava-1.5-7b": Preset("LlavaForConditionalGeneration", _llava_7b, "llava-hf/llava-1.5-7b-hf"),
    "llava-1.5-13b": Preset("LlavaForConditionalGeneration", _llava_13b, "llava-hf/llava-1.5-13b-hf"),
    "clip-vit-large-patch14-336": Preset("CLIPModel", _clip, "openai/clip-vit-large-patch14-336"),
    "blip-base-384": Preset("BlipForConditionalGeneration", _blip, "Salesforce/blip-image-captioning-base"),
    "blip2-opt-2.7b": Preset("Blip2ForConditionalGeneration", _blip2, "Salesforce/blip2-opt-2.7b"),
}
