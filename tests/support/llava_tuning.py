"""A small LLaVA with a tokenizer of Llama's kind, and instruction data for it, as folders on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is in the image? ASSISTANT: A dog and a cat. How many are "
    "there? Two of them, on a red chair."
)


def backend(texts: Iterable[str], legacy: bool, size: int = 600) -> Tokenizer:
    """A byte-pair tokenizer as Llama's.

    Args:
        texts: to learn it from.
        legacy: a text behind a special token begins with a space, as at the beginning; otherwise only there.
        size: of the vocabulary.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # To learn from, words as sentencepiece has them: with the space in front.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    alphabet = sorted({c for c in WORDS if c != " "} | {"▁"})
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *bytes_], show_progress=False, initial_alphabet=alphabet,
        limit_alphabet=120,
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS, *texts], trainer)
    content = json.loads(tokenizer.to_str())
    # Bytes are pieces like any other, not special.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers has it, with LLaVA's two more tokens."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # otherwise older versions make token types
    )  # fmt: skip
    more: list[str | AddedToken] = [AddedToken(t, special=True, normalized=False) for t in ("<image>", "<pad>")]
    made.add_tokens(more, special_tokens=True)
    made.pad_token = "<pad>"
    return made


def write_model(folder: Path, **text: Any) -> None:
    """A folder that LlavaForConditionalGeneration and AutoProcessor read."""
    tokenizer = wrapped(backend([], legacy=True))
    image = tokenizer.convert_tokens_to_ids("<image>")
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**common, num_hidden_layers=4, image_size=32, patch_size=8, projection_dim=16)
    language = LlamaConfig(
        **common, num_hidden_layers=3, num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id, **text,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=image, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def write_data(folder: Path, images: int = 12, texts: int = 6) -> Path:
    """Samples with and without images, of several lengths; returns the file."""
    (folder / "images").mkdir(parents=True)
    chance = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for i in range(images + texts):
        words = [["A dog", "a cat", "two chairs", "red"][j % 4] for j in range(1 + i % 5)]
        turns = [("human", "What is in the image?"), ("gpt", " and ".join(words)), ("human", "How many?"), ("gpt", "2")]
        sample: dict[str, Any] = {
            "id": i,
            "conversations": [{"from": a, "value": b} for a, b in turns[: 2 + i % 2 * 2]],
        }
        if i < images:
            sample["image"] = f"images/{i}.png"
            sample["conversations"][0]["value"] = ["<image>\nWhat is it?", "What is it?\n<image>"][i % 2]
            pixels = chance.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / sample["image"])
        samples.append(sample)
    file = folder / "mix.json"
    file.write_text(json.dumps(samples))
    return file
