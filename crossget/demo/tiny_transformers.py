"""Tiny random models of transformers, of every family with images, audio or text encoders, by rules for names.

No family has code of its own: a configuration is made from its default values, with smaller numbers.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossget.integrations._support import NumbersOnCPU

IMAGE, PATCH, LAYERS = 64, 8, 4  # image and patch size in pixels, largest number of layers
MAX_PARAMETERS = 120e6

# Source text of families that take images or audio, or have a text encoder.
_TAKES = re.compile("pixel_values|input_features|input_values|audio_values|flattened_patches|ForMaskedLM|EncoderModel")
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
# Which of the classes with the same configuration is taken: the first of these ends, and then the shortest name.
_ENDS = ("Model", "VisionModel", "ForConditionalGeneration", "Encoder", "Backbone", "ForObjectDetection", "")

# The largest value of an integer, by its name. The first pattern that is found counts; without one, the value stays.
_DEPTHS = (
    ("num_feat_extract_layers|num_kv_shared_layers|^index_", None),  # these depend on each other
    (r"(layers?|depth|num_blocks)$", LAYERS),
    (r"experts?_per_tok|topk$|top_k", 2),
    ("experts$|queries$|latents$|query_tokens$", 8),
)
_WIDTHS = (
    ("rope_head_dim|rotary_dim", PATCH),
    ("head_dim|d_kv$|rank$", 16),
    ("heads$|n_head$", 4),
    ("intermediate|ffn|feed_?forward|mlp_dim|mlp_hidden|d_ff|inner", 128),
    ("max_position|max_seq|max_source|max_target|n_positions", 1024),
    ("position_embedding_size|num_position_embeddings|num_positions", (IMAGE // PATCH) ** 2),
    (r"(hidden|embed(ding)?|proj(ection)?|output)_(size|dim)s?$|(^|_)(d_model|width|n_embd|dim|hidden_channels)$", 64),
    ("model_dim|dim_model|d_latents|d_embed|emb_dim", 64),
)
# A configuration with such a list has a width per stage; its widths are kept, as they depend on each other.
_STAGES = ("depths", "hidden_sizes", "embed_dims", "stage_dims", "conv_dim", "blocks_per_stage", "stages")
_STAGE_NAMES = ("out_features", "stage_names", "_out_features", "_out_indices")
_INDICES = re.compile("index|indices|fullatt|layer$|layers$|attn_blocks|attention_blocks|neck_ignore")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
_AS_IS = re.compile("query_dict|id2label|label2id|quantization_config|task_specific_params|rope_|ignore_keys")
_OF_THE_LIBRARY = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def families() -> dict[str, str]:
    """The source text of each family's models, by the family's name."""
    import transformers

    found = {}
    for folder in sorted((Path(transformers.__file__).parent / "models").iterdir()):
        path = folder / f"modeling_{folder.name}.py"
        if path.is_file() and _TAKES.search(text := path.read_text(encoding="utf-8")):
            found[folder.name] = text
    return found


def classes(family: str, source: str, pattern: str = "*") -> Iterator[str]:
    """One class for each class of configurations of a family, of those whose names match the pattern.

    Args:
        family: its name in transformers.models.
        source: text of its models, which are imported only if a name matches.
        pattern: as in fnmatch.

    Raises:
        ImportError: a package that the family needs is not installed.
    """
    if not fnmatch.filter(_CLASS.findall(source), pattern):
        return
    groups: dict[type, list[str]] = {}
    for name, cls in inspect.getmembers(module(family), inspect.isclass):
        config = getattr(cls, "config_class", None)
        own = cls.__module__.endswith(f".modeling_{family}") and "PreTrained" not in name
        if own and config is not None and issubclass(cls, nn.Module) and fnmatch.fnmatchcase(name, pattern):
            groups.setdefault(config, []).append(name)
    for names in groups.values():
        # Language models and decoders are the last choice: what is looked for are encoders.
        encoders = [name for name in names if "ForCausalLM" not in name and "Decoder" not in name] or names
        yield min(encoders, key=lambda name: (next(i for i, end in enumerate(_ENDS) if name.endswith(end)), len(name)))


def module(family: str) -> Any:
    """The module with the models of a family."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def builders(cls: Any) -> Iterator[Callable[[], nn.Module]]:
    """Functions that build a tiny model in evaluation mode: the smallest first, then with widths as the library has.

    They raise what transformers raises where the smaller numbers do not fit together, and ValueError for a model with
    more than `MAX_PARAMETERS` parameters.
    """
    for widths in (True, False):
        yield partial(build, cls, widths)


def build(cls: Any, widths: bool = True, values: Mapping[str, Any] | None = None) -> nn.Module:
    """A tiny model, see `builders`.

    Args:
        cls: its class.
        widths: make widths smaller, too.
        values: of the configuration, and of those inside, which no rule for names knows.
    """
    config = tiny(cls.config_class, widths, values)
    try:
        with torch.device("meta"), NumbersOnCPU():
            size = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception:  # some constructors compute with values, which the meta device has not
        size = 0
    if size > MAX_PARAMETERS:
        raise ValueError(f"too big: {size / 1e6:.0f} million parameters, more than {MAX_PARAMETERS / 1e6:.0f}")
    torch.manual_seed(0)
    model: nn.Module = cls(config).eval()
    add_noise(model)
    return model


@torch.no_grad()
def add_noise(model: nn.Module) -> None:
    """Change all parameters. Tables and branches that start with zeros would hide that they are not reduced."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            zero = parameter.abs().max() < 1e-3
            scale = 0.1 if zero else 0.05 if parameter.ndim > 1 else 0.01
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def tiny(config_class: Any, widths: bool, changes: Mapping[str, Any] | None = None) -> Any:
    """A configuration from its default values with fewer layers and, optionally, smaller widths.

    Args:
        config_class: its class.
        widths: make widths smaller, too.
        changes: values of it, and of those inside, that count instead.
    """
    values = _changed(_smaller(config_class().to_dict(), widths, {}), changes or {})
    given = {key: value for key, value in values.items() if key not in _OF_THE_LIBRARY}
    try:
        return config_class(**given)
    except Exception:  # some take no None for what is None by default
        return config_class(**{key: value for key, value in given.items() if value is not None})


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(values)
    for key, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(new.get(key), Mapping)
        new[key] = _changed(new[key], value) if inside else value
    return new


def _smaller(values: Mapping[str, Any], widths: bool, ids: dict[int, int]) -> dict[str, Any]:
    """The values of a configuration, and of those inside, with smaller numbers.

    Args:
        values: by name.
        widths: whether widths get smaller, too.
        ids: of special tokens: the old and the new ones, which is added to.
    """
    stages = any(isinstance(values.get(name), list | tuple) and len(values[name]) > 1 for name in _STAGES)
    depth = next((values[name] for name in _DEPTH if isinstance(values.get(name), int)), 0)
    new: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and len(value) == depth > LAYERS and not stages:
            if isinstance(value[0], str):
                new[key] = list(value)[-LAYERS:]  # kinds of layers; of numbers the configuration makes a list itself
        elif key == "per_layer_config" or (not stages and key in _STAGE_NAMES):
            pass  # the configuration makes it from the number of layers
        elif isinstance(value, dict):
            new[key] = _rotary(value, values) if _AS_IS.search(key) else _smaller(value, widths, ids)
        elif isinstance(value, bool) or not isinstance(value, int | list | tuple):
            new[key] = value
        elif "token" in key and re.search("_(id|index)$|image_token$|oi_token$", key):
            new[key] = _token(value, ids)
        elif isinstance(value, int):
            new[key] = _integer(key, value, widths, stages, "conv_dim" in values)
        else:
            new[key] = value if stages or not widths else _list(key, list(value))
    return new


def _integer(key: str, value: int, widths: bool, stages: bool, audio: bool) -> int:
    if "vocab_size" in key:
        return min(value, 100)
    if stages and not (audio and widths and re.search("^(num_hidden_layers|.*_size|num_attention_heads)$", key)):
        return value  # a list of widths of an audio model is of the convolutions before its Transformer
    if widths and re.search("(image|img|input_image)_size$|^resolution$", key):
        return min(value, IMAGE)
    if widths and key.endswith("patch_size"):
        return PATCH if value > 10 else value
    rules = (*_DEPTHS, *_WIDTHS) if widths else _DEPTHS
    limit = next((limit for pattern, limit in rules if re.search(pattern, key)), None)
    return value if limit is None else min(value, limit)


def _list(key: str, value: list[Any]) -> list[Any]:
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value[:LAYERS] if len(value) > 8 and isinstance(value[0], str) else value
    if re.search("image_size|img_size|spatial_shapes", key):
        return [IMAGE] * len(value)
    if "patch_size" in key:
        return [min(item, PATCH) for item in value]
    if _INDICES.search(key):
        return [min(value[0], 2)] if len(value) == 1 else list(range(min(len(value), LAYERS)))
    return value


def _token(value: Any, ids: dict[int, int]) -> Any:
    """The id of a special token inside the smaller vocabulary: ids that differ stay different."""
    if isinstance(value, int):
        return value if value < 90 else ids.setdefault(value, 60 + len(ids) % 38)
    return [_token(item, ids) for item in value]


def _rotary(values: dict[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """Three rotary axes (time, height, width) share the frequencies of a head: half as many as it has channels."""
    section = [1, 1, 2] if "qk_rope_head_dim" in around else [2, 3, 3]
    return {**values, "mrope_section": section} if "mrope_section" in values else values
