"""Small random models of images and text, saved as vLLM loads them, and their prompts.

vLLM's kernels for CPUs need heads of 32 channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

# Of every family: the words for an image, a video, and what stands in front of an image and behind it.
NAMES = {"internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"), "llava": ("<image>", "<video>", "", "")}
NAMES |= dict.fromkeys(
    ("qwen2_5_vl", "qwen3_vl"), ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
)
NAMES |= dict.fromkeys(("llava_next", "llava_onevision"), NAMES["llava"])
IMAGE, VIDEO, START, END = 4, 5, 6, 7  # their ids
WORDS = 64
WIDTH = 64
WEIGHTS = "model.safetensors"
TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 2048, "head_dim": 32,
}  # fmt: skip
TOWER = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
GRID_TOWER = {
    "depth": 2, "hidden_size": WIDTH, "intermediate_size": 96, "num_heads": 2, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH, "in_channels": 3,
}  # fmt: skip
GRID_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
SIZES = [(224, 112), (224, 224), (196, 140)]  # width and height in pixels, by number of the picture
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}IMAGE{% endif %} {% endfor %}{% endfor %}"
)


def image_text(family: str) -> str:
    """What stands in a prompt for an image."""
    image, _, start, end = NAMES[family]
    return f"{start}{image}{end}"


def save(family: str, folder: Path) -> Any:
    """Save a model with its processor; returns the model."""
    name, settings = config(family)
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{name}ForConditionalGeneration")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 makes all images, and all answers, alike
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family.startswith("llava"):  # published checkpoints have the names from before transformers 5
        weights = load_file(folder / WEIGHTS)
        nested = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in weights.items()}
        save_file(nested, folder / WEIGHTS, {"format": "pt"})
    _processor(family).save_pretrained(folder)
    return model


def _tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    image, video, start, end = NAMES[family]
    special = ["<pad>", "<s>", "</s>", "<unk>", image, video, start or "<start>", end or "<end>"]
    words = special + [f"w{number}" for number in range(WORDS - len(special))]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"image_token": image, "video_token": video}
    if family == "internvl":
        tokens = {"start_image_token": start, "end_image_token": end, "context_image_token": image, **tokens}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={**tokens, "start": special[6], "end": special[7]},
    )  # fmt: skip


def config(family: str) -> tuple[str, Any]:
    """The name of a family's classes, and its configuration."""
    tf: Any = transformers
    clip = tf.CLIPVisionConfig(**TOWER, image_size=56, patch_size=7, projection_dim=16)
    llama = tf.LlamaConfig(**TEXT)
    if family == "llava":
        return "Llava", tf.LlavaConfig(
            vision_config=clip, text_config=llama, image_token_index=IMAGE, image_seq_length=64
        )
    if family == "llava_next":
        return "LlavaNext", tf.LlavaNextConfig(
            vision_config=clip, text_config=llama, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
        )
    if family == "llava_onevision":
        return "LlavaOnevision", tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**TOWER, image_size=56, patch_size=7),
            text_config=tf.Qwen2Config(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip
    if family == "internvl":
        vision = {**TOWER, "image_size": [56, 56], "patch_size": [7, 7]}
        text = tf.Qwen2Config(**TEXT).to_dict()
        return "InternVL", tf.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16
        )
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        vision = {**GRID_TOWER, "window_size": 56, "fullatt_block_indexes": [1]}
        return "Qwen2_5_VL", tf.Qwen2_5_VLConfig(
            vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **GRID_IDS
        )
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        vision = {**GRID_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return "Qwen3VL", tf.Qwen3VLConfig(
            vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **GRID_IDS
        )
    raise KeyError(family)


def _processor(family: str) -> Any:
    tf: Any = transformers
    words = _tokenizer(family)
    chat = CHAT.replace("IMAGE", image_text(family))
    if family == "internvl":
        images = tf.GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        )
        return tf.InternVLProcessor(
            images, words, tf.InternVLVideoProcessor(size={"height": 56, "width": 56}), image_seq_length=16,
            chat_template=chat,
        )  # fmt: skip
    if family.startswith("qwen"):
        sizes = {"min_pixels": 56 * 56, "max_pixels": 224 * 224, "patch_size": 14}
        classes = ("Qwen2_5_VLProcessor",) if family == "qwen2_5_vl" else ("Qwen3VLProcessor",)
        videos = tf.Qwen2VLVideoProcessor if family == "qwen2_5_vl" else tf.Qwen3VLVideoProcessor
        return getattr(tf, classes[0])(
            tf.Qwen2VLImageProcessor(**sizes), words, videos(patch_size=14), chat_template=chat
        )
    shape = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        return tf.LlavaProcessor(tf.CLIPImageProcessor(**SQUARE), words, chat_template=chat, **shape)
    if family == "llava_next":
        images = tf.LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS)
        return tf.LlavaNextProcessor(images, words, chat_template=chat, **shape)
    images = tf.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS)
    return tf.LlavaOnevisionProcessor(
        images, words, tf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}), num_image_tokens=64,
        vision_feature_select_strategy="full", chat_template=chat,
    )  # fmt: skip


def picture(number: int) -> Image.Image:
    """A picture of random colours, of one of several sizes."""
    width, height = SIZES[number % len(SIZES)]
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.to(torch.uint8).numpy())
