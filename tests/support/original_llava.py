"""Small folders in the layout in which the authors of CrossGET publish LLaVA, with the weights behind golden/llava."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from golden_inputs import GOLDEN, weight
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LLAVA = json.loads((GOLDEN / "llava.json").read_text())
VISION, LANGUAGE = LLAVA["vision"], LLAVA["language"]
ROWS, IMAGE, PAD = LANGUAGE["vocab_size"], LANGUAGE["vocab_size"], LANGUAGE["vocab_size"] + 1
TOWER = "model.vision_tower.vision_tower.vision_model."
CROSS_IMAGE, CROSS_TEXT = TOWER + "encoder.cross_image", "model.cross_text"
WEIGHTS = {name: weight(name, tuple(shape), LLAVA["seed"]) for name, shape in LLAVA["state_dict_shapes"].items()}
CONFIG: dict[str, Any] = {
    "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "silu",
    "hidden_size": LANGUAGE["hidden_size"], "intermediate_size": LANGUAGE["intermediate_size"],
    "num_hidden_layers": LANGUAGE["layers"], "num_attention_heads": LANGUAGE["heads"],
    "num_key_value_heads": LANGUAGE["heads"], "vocab_size": ROWS, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
    "mm_hidden_size": VISION["hidden_size"], "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad",
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": VISION["hidden_size"], "intermediate_size": VISION["intermediate_size"],
    "num_hidden_layers": VISION["layers"], "num_attention_heads": VISION["heads"], "image_size": VISION["image_size"],
    "patch_size": VISION["patch_size"], "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 32,
}  # fmt: skip
State = dict[str, Tensor]


def write_clip(folder: Path) -> None:
    """As on the hub: a whole CLIP, in a pickle."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    state = {"vision_model." + name.removeprefix(TOWER): value for name, value in tower_of(WEIGHTS).items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    rest = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.tensor(4.6)}
    torch.save({**state, **rest}, folder / "pytorch_model.bin")


def tower_of(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith(TOWER) and name != CROSS_IMAGE}


def write_tokenizer(folder: Path, words: int = ROWS) -> None:
    names = ["<unk>", "<s>", "</s>", "USER", ":", *(f"w{i}" for i in range(5, words))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_weights(folder: Path, state: State, kind: str = "bin", files: int = 3, old: bool = False) -> None:
    """Sharded with an index, or in one file."""
    names = list(state)
    for i in range(files):
        shard = {name: state[name] for name in names[i::files]}
        stem = "pytorch_model" if kind == "bin" else "model"
        name = f"{stem}.{kind}" if files == 1 else f"{stem}-{i + 1:05}-of-{files:05}.{kind}"
        if kind == "bin":
            torch.save(shard, folder / name, _use_new_zipfile_serialization=not old)
        else:
            save_file(shard, folder / name)
    if files > 1:
        index = {name: f"{stem}-{i % files + 1:05}-of-{files:05}.{kind}" for i, name in enumerate(names)}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_original(
    folder: Path,
    *,
    inside: bool = True,
    cross: str = "beside",
    prefix: str = "",
    tokenizer: bool = False,
    changes: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **layout: Any,
) -> Path:
    """A folder in the original's layout.

    `inside`: with the vision tower. `cross`: where the cross tokens are, "beside", "inside" or "nowhere". `changes`: of
    tensors by key, None being without.
    """
    folder.mkdir(parents=True)
    home = folder.parent / "clip"
    if not home.exists():
        write_clip(home)
    content = {**CONFIG, "mm_vision_tower": str(home), **(config or {})}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "max_length": 4096}))
    every = {**WEIGHTS, TOWER + "embeddings.position_ids": torch.arange(50)[None], **(changes or {})}
    tokens = {name: every.pop(name) for name in (CROSS_TEXT, CROSS_IMAGE)}
    state = {name: value for name, value in every.items() if value is not None}
    if not inside:
        state = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    tokens = {prefix + name: value for name, value in tokens.items() if value is not None}
    if cross == "inside":
        state.update(tokens)
    if cross == "beside":
        torch.save(tokens, folder / "cross_tokens.bin")
    write_weights(folder, state, **layout)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def language_shapes(rows: int, width: int, inner: int, depth: int, vision: int) -> dict[str, tuple[int, ...]]:
    """Of a language model and the projector in front of it."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width), "model.norm.weight": (width,),
        "model.mm_projector.0.weight": (width, vision), "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width), "model.mm_projector.2.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        layer = f"model.layers.{i}."
        shapes.update({f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"})
        shapes.update({f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")})
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes.update({f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")})
    return shapes


def hollow(width: int, inner: int, depth: int) -> State:
    """LLaVA-1.5's weights in their real sizes, of one number each."""
    shapes = language_shapes(32000, width, inner, depth, 1024)
    for i in range(24):
        layer = f"{TOWER}encoder.layers.{i}."
        for kind, shape in (("weight", (1024, 1024)), ("bias", (1024,))):
            shapes.update({f"{layer}self_attn.{name}_proj.{kind}": shape for name in ("q", "k", "v", "out")})
        shapes.update({f"{layer}layer_norm{j}.{kind}": (1024,) for j in (1, 2) for kind in ("weight", "bias")})
        shapes.update({f"{layer}mlp.fc1.weight": (4096, 1024), f"{layer}mlp.fc1.bias": (4096,)})
        shapes.update({f"{layer}mlp.fc2.weight": (1024, 4096), f"{layer}mlp.fc2.bias": (1024,)})
    shapes[TOWER + "embeddings.class_embedding"] = (1024,)
    shapes[TOWER + "embeddings.patch_embedding.weight"] = (1024, 3, 14, 14)
    shapes[TOWER + "embeddings.position_embedding.weight"] = (577, 1024)
    norms = ("pre_layrnorm", "post_layernorm")
    shapes.update({f"{TOWER}{name}.{kind}": (1024,) for name in norms for kind in ("weight", "bias")})
    return {name: torch.zeros(1, dtype=torch.float16).expand(shape) for name, shape in shapes.items()}
