"""Small random models of transformers that several test files use."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
IMAGE, DENSE, WIDTH = 5, 16, 32  # token id, features of an image, hidden size of all towers
VISION = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip


def built(cls: Any, config: Any, attention: str = "sdpa") -> nn.Module:
    """A model whose every part uses this kind of attention, in evaluation mode."""
    model: nn.Module = cls._from_config(config, attn_implementation=attention)
    return model.eval()


def llava(attention: str = "sdpa", **settings: Any) -> Any:
    """A LLaVA of four image blocks, of which three are read, and three language blocks."""
    vision = CLIPVisionConfig(**VISION, projection_dim=16, hidden_act="quick_gelu")
    chosen = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **settings}
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, **chosen
    )  # fmt: skip
    return built(LlavaForConditionalGeneration, config, attention)


def paligemma(attention: str = "sdpa") -> Any:
    """A PaliGemma of four image blocks and three language blocks."""
    config = transformers.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return built(transformers.PaliGemmaForConditionalGeneration, config, attention)


def prompts(*rows: str, left: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask: a word per letter, "#" being an image and "^" the beginning of text.

    Shorter rows are filled up.
    """
    ids = [
        [t for c in row for t in ([IMAGE] * DENSE if c == "#" else [1 if c == "^" else 6 + ord(c) % 54])]
        for row in rows
    ]
    width = max(map(len, ids))
    padded = [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in ids]
    tensor = torch.tensor(padded)
    return tensor, (tensor != 0).long()


def images(count: int) -> Tensor:
    """Made-up pixels."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))
