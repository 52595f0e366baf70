"""Small random models of images and text of several families of transformers, and their prompts.

An image has a number, which says what it shows and its size. So a row of a batch gets the same images if it runs alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import hf_models
import torch
import transformers
from hf_models import IMAGE, TEXT, WIDTH
from torch import Tensor

VIDEO, START, END = 4, 3, 3  # token ids; every word of a prompt is above 5
PATCH, SIDE = 7, 28
IMAGES, TOWER = {"image_size": SIDE, "patch_size": PATCH}, {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SIZES = [(28, 56), (56, 56), (56, 30), (40, 56)]  # height and width in pixels, by number of the image
GRIDS = [(4, 8), (8, 4), (6, 6), (4, 4)]  # in patches
GRID_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
GRID_TOWER = {
    "depth": 2, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 4, "patch_size": PATCH,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH, "in_channels": 3,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
SLIDING = {
    "head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
TILED = ("llava_next", "llava_onevision")


def build(family: str, attention: str = "sdpa", scale: float = 0.2) -> Any:
    """A model in evaluation mode.

    Args:
        family: as transformers names it, see `_config`.
        attention: kernel of all its attentions.
        scale: deviation of its weights. The usual 0.02 makes all images, and all answers, alike.
    """
    torch.manual_seed(0)
    if family == "llava":
        model = hf_models.llava(attention)
    else:
        name, config = _config(family)
        model = hf_models.built(getattr(transformers, f"{name}ForConditionalGeneration"), config, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
    return model


def _config(family: str) -> tuple[str, Any]:
    """The name of a family's classes, and its configuration."""
    tf: Any = transformers
    siglip = {**TOWER, **IMAGES}
    rotated = {**TEXT, "rope_parameters": ROPE}
    if family == "llava_next":
        vision = tf.CLIPVisionConfig(**siglip, projection_dim=16)
        return "LlavaNext", tf.LlavaNextConfig(
            vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip
    if family == "llava_onevision":
        return "LlavaOnevision", tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**siglip), text_config=tf.Qwen2Config(**TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip
    if family == "internvl":
        vision = {**TOWER, "image_size": [56, 56], "patch_size": [PATCH, PATCH]}
        text = tf.Qwen2Config(**TEXT).to_dict()
        return "InternVL", tf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    if family == "qwen2_5_vl":
        vision = {**GRID_TOWER, "window_size": SIDE, "fullatt_block_indexes": [1]}
        return "Qwen2_5_VL", tf.Qwen2_5_VLConfig(vision_config=vision, text_config=rotated, **GRID_IDS)
    if family == "qwen3_vl":
        vision = {**GRID_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
        return "Qwen3VL", tf.Qwen3VLConfig(vision_config=vision, text_config=text, **GRID_IDS)
    if family == "qwen3_5":
        linear = {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8,
            "rope_parameters": {**ROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        }  # fmt: skip
        vision = {**GRID_TOWER, "num_position_embeddings": 64}
        return "Qwen3_5", tf.Qwen3_5Config(vision_config=vision, text_config={**TEXT, **linear}, **GRID_IDS)
    if family == "smolvlm":
        vision = {**TOWER, "image_size": 56, "patch_size": PATCH}
        return "SmolVLM", tf.SmolVLMConfig(
            vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2,
            pad_token_id=0,
        )  # fmt: skip
    if family == "paligemma":
        vision = tf.SiglipVisionConfig(**siglip, projection_dim=WIDTH, vision_use_head=False)
        return "PaliGemma", tf.PaliGemmaConfig(
            vision_config=vision, text_config=tf.GemmaConfig(**TEXT, head_dim=8), image_token_index=IMAGE,
            projection_dim=WIDTH, hidden_size=WIDTH,
        )  # fmt: skip
    if family == "gemma3":
        vision = tf.SiglipVisionConfig(**{**siglip, "image_size": 56})
        text = tf.Gemma3TextConfig(**TEXT, **SLIDING, query_pre_attn_scalar=8)
        return "Gemma3", tf.Gemma3Config(
            vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_index=IMAGE
        )
    raise KeyError(family)


def pixels(family: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the model gets of the images with these numbers, of each row of a batch."""
    numbers = [number for row in rows for number in row]
    if family.startswith("qwen"):
        grids = torch.tensor([[1, *GRIDS[number % 4]] for number in numbers])
        patches = [
            _random(number, int(grid.prod()), 3 * 2 * PATCH * PATCH)
            for number, grid in zip(numbers, grids, strict=True)
        ]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grids}
    if family in TILED:
        sizes = torch.tensor([SIZES[number % 4] for number in numbers])
        values = torch.stack([_random(number, 5, 3, SIDE, SIDE) for number in numbers])
        more = {"batch_num_images": torch.ones(len(numbers), dtype=torch.long)} if family == "llava_onevision" else {}
        return {"pixel_values": _without_spare_tiles(values, sizes), "image_sizes": sizes, **more}
    side = {"llava": 32, "paligemma": SIDE}.get(family, 56)
    if family == "smolvlm":
        values = torch.zeros(len(rows), max(map(len, rows)), 3, side, side)
        for row, of_row in enumerate(rows):
            for place, number in enumerate(of_row):
                values[row, place] = _random(number, 3, side, side)
        return {"pixel_values": values}
    return {"pixel_values": torch.stack([_random(number, 3, side, side) for number in numbers])}


def _random(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + number))


def _without_spare_tiles(values: Tensor, sizes: Tensor) -> Tensor:
    """The tiles [N, P, 3, S, S] of N images, of which no one has more."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = [image_size_to_num_patches(tuple(size), PINPOINTS, SIDE) for size in sizes.tolist()]
    return values[:, : max(counts)]


def features(model: Any, family: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The dense features [n, C] of each image, in the order of the rows."""
    parts = model.base_model if hasattr(model.base_model, "get_image_features") else model
    names = inspect.signature(parts.get_image_features).parameters
    given = {name: value for name, value in pixels(family, rows).items() if name in names}
    with torch.no_grad():
        entries = parts.get_image_features(**given, return_dict=True).pooler_output
    entries = [entry.reshape(-1, entry.shape[-1]) for entry in entries]
    if family == "smolvlm":  # an entry holds the images of a row
        return [image for entry, row in zip(entries, rows, strict=True) if row for image in entry.chunk(len(row))]
    return entries


def batch(
    model: Any, family: str, *rows: str, left: bool = True, numbers: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """The arguments of a call.

    Args:
        model: it tells how many features an image has.
        family: of the model.
        rows: a word per letter, "#" being an image and "^" the beginning of text.
        left: shorter rows are filled up in front.
        numbers: of the images of each row; None: they are counted on from 0.
    """
    if numbers is None:
        counts = [row.count("#") for row in rows]
        numbers = [list(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(len(rows))]
    has_images = any(numbers)
    lengths = iter([len(image) for image in features(model, family, numbers)] if has_images else [])
    ids = []
    for row in rows:
        tokens: list[int] = []
        for letter in row:
            tokens += [IMAGE] * next(lengths) if letter == "#" else [1 if letter == "^" else 6 + ord(letter) % 54]
        ids.append(tokens)
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in ids])
    arguments = {"input_ids": padded, "attention_mask": (padded != 0).long(), **types(model, padded)}
    return arguments | (pixels(family, numbers) if has_images else {})


def types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The token types [B, T] that go with ids."""
    names = inspect.signature(type(model).forward).parameters
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    if "mm_token_type_ids" in names:
        return {"mm_token_type_ids": kinds}
    kind = model.config.model_type  # a prompt of PaliGemma is all prefix, which is type 0
    return {"token_type_ids": kinds * (kind == "gemma3")} if kind in ("gemma3", "paligemma") else {}
