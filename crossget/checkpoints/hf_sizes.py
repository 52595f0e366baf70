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
        RuntimeError: transformers is not installed, or its version does not have the model's class.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    transformers = import_transformers()
    preset = PRESETS[name]
    if not hasattr(transformers, preset.architecture):
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {preset.architecture}, which {name!r} is: install a newer "
            "version"
        )
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


def _qwen2_5_vl() -> Any:
    text = {
        **_qwen2_7b(152064), "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
    }  # fmt: skip
    return import_transformers().Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656, tie_word_embeddings=False
    )


def _qwen3_vl() -> Any:
    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "patch_size": 16,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24], "out_hidden_size": 4096,
    }  # fmt: skip
    return import_transformers().Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656, tie_word_embeddings=False
    )


def _internvl3() -> Any:
    transformers = import_transformers()
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
    }  # fmt: skip
    text = transformers.Qwen2Config(**_qwen2_7b(151674), tie_word_embeddings=False)
    return transformers.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=151667, tie_word_embeddings=False
    )


def _qwen2_7b(vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": vocabulary,
    }  # fmt: skip


def _siglip(image: int) -> dict[str, Any]:
    """SigLIP-So400m with patches of 14 x 14 pixels."""
    return {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": image, "patch_size": 14,
    }  # fmt: skip


def _smolvlm2() -> Any:
    transformers = import_transformers()
    text = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=49280, max_position_embeddings=8192, pad_token_id=2,
    )  # fmt: skip
    return transformers.SmolVLMConfig(
        text_config=text, vision_config=_siglip(384), scale_factor=3, image_token_id=49190, tie_word_embeddings=False
    )


def _gemma3() -> Any:
    transformers = import_transformers()
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
    }  # fmt: skip
    vision = {**_siglip(896), "vision_use_head": False}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


PRESETS = {
    "llava-1.5-7b": Preset("LlavaForConditionalGeneration", _llava_7b, "llava-hf/llava-1.5-7b-hf"),
    "llava-1.5-13b": Preset("LlavaForConditionalGeneration", _llava_13b, "llava-hf/llava-1.5-13b-hf"),
    "clip-vit-large-patch14-336": Preset("CLIPModel", _clip, "openai/clip-vit-large-patch14-336"),
    "blip-base-384": Preset("BlipForConditionalGeneration", _blip, "Salesforce/blip-image-captioning-base"),
    "blip2-opt-2.7b": Preset("Blip2ForConditionalGeneration", _blip2, "Salesforce/blip2-opt-2.7b"),
    "qwen2.5-vl-7b": Preset("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, "Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3-vl-8b": Preset("Qwen3VLForConditionalGeneration", _qwen3_vl, "Qwen/Qwen3-VL-8B-Instruct"),
    "internvl3-8b": Preset("InternVLForConditionalGeneration", _internvl3, "OpenGVLab/InternVL3-8B-hf"),
    "smolvlm2-2.2b": Preset("SmolVLMForConditionalGeneration", _smolvlm2, "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "gemma3-4b": Preset("Gemma3ForConditionalGeneration", _gemma3, "google/gemma-3-4b-it"),
}
