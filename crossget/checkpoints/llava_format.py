"""LLaVA in its authors' folder layout: what a folder contains, and its tensors, one file at a time.

A file is opened for its keys, shapes and dtypes; a tensor is loaded when it is used. Pickles are loaded with
`weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core import files

Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = (EMBEDDING, HEAD)  # one row per token
PROJECTOR, TOWER = "model.mm_projector.", "model.vision_tower.vision_tower.vision_model."
CROSS = {"visual": TOWER + "encoder.cross_image", "text": "model.cross_text"}
CROSS_FILE = "cross_tokens.bin"

_LORA = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
_SHARDS = {"model.safetensors.index.json": "model*.safetensors", "pytorch_model.bin.index.json": "pytorch_model*.bin"}
_BUFFERS = (".inv_freq", ".position_ids")  # saved by older transformers; they follow from the sizes
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in _FLOATS.items()}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Values that LLaVA's code and transformers' Llama use where config.json has none.
_DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Fits = tuple[Callable[[Any], bool], str]
_SIZE: Fits = (lambda value: type(value) is int and value > 0, "a whole number from 1 up")
_POSITIVE: Fits = (lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a number above 0")
_INT: Fits = (lambda value: type(value) is int, "a whole number")
_BOOL: Fits = (lambda value: type(value) is bool, "true or false")
_TEXT: Fits = (lambda value: isinstance(value, str), "a text")
_IDS: Fits = (
    lambda value: all(type(one) is int for one in (value if isinstance(value, list) else [value])),
    "a token id, or a list of them",
)
_DTYPE: Fits = (
    lambda value: isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype),
    "a dtype of torch, such as 'float16'",
)
_OBJECT: Fits = (lambda value: isinstance(value, dict), "an object")
# What the values of config.json must be; each may also be null, or missing.
_TYPES = {
    **dict.fromkeys((*_SIZES, "num_key_value_heads", "max_position_embeddings"), _SIZE),
    "rms_norm_eps": _POSITIVE, "rope_theta": _POSITIVE, "rope_scaling": _OBJECT, "hidden_act": _TEXT,
    "attention_bias": _BOOL, "bos_token_id": _INT, "eos_token_id": _IDS, "torch_dtype": _DTYPE, "dtype": _DTYPE,
    "mm_vision_select_layer": _INT, "mm_use_im_start_end": _BOOL, "mm_vision_select_feature": _TEXT,
    "mm_vision_tower": _TEXT,
}  # fmt: skip
VISION_TYPES = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
         "num_channels", "projection_dim"), _SIZE),
    "hidden_act": _TEXT, "layer_norm_eps": _POSITIVE,
}  # fmt: skip
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_MAX_NAMES = 10  # in one message


# Files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not loaded yet.

    Attributes:
        path: the file.
        key: its key in the file.
        shape: its shape.
        dtype: its dtype.
    """

    path: Path
    key: str
    shape: Shape
    dtype: torch.dtype


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors or torch file, by key, without buffers that follow from the sizes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither, is truncated, or contains something else than floating-point tensors.
    """
    found: dict[str, tuple[Shape, torch.dtype | None, str | None]]
    if path.suffix == ".safetensors":
        file = files.open_safetensors(path)
        found = files.named(path, lambda: _describe(file))
    else:
        found = {
            key: (tuple(value.shape), value.dtype, _reason_against(value)) for key, value in _open_state(path).items()
        }
    kept = {key: item for key, item in found.items() if not key.endswith(_BUFFERS)}
    bad = [f"{key}: {reason}" for key, (_, _, reason) in kept.items() if reason]
    if bad:
        raise ValueError(f"{path} has weights that cannot be used: {abbreviated(bad)}")
    return {key: StoredTensor(path, key, shape, dtype) for key, (shape, dtype, _) in kept.items() if dtype is not None}


def _describe(file: Any) -> dict[str, tuple[Shape, torch.dtype | None, str | None]]:
    """Shape, dtype and what is wrong, of the tensors in an open safetensors file."""
    found = {}
    for key in file.keys():  # noqa: SIM118 (it is no dict)
        item = file.get_slice(key)
        dtype = _FLOATS.get(item.get_dtype())
        reason = None if dtype else f"{item.get_dtype()}, not floating-point (quantised?)"
        found[key] = (tuple(item.get_shape()), dtype, reason)
    return found


def _reason_against(value: Tensor) -> str | None:
    reason = files.reason_against(value, numbers=False)
    return reason or (None if value.dtype in CODES else f"{value.dtype} (quantised?)")


def load_tensors(stored: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """Load tensors in the given order, with one file open at a time.

    Raises:
        ValueError: a tensor has NaN or infinity, or its file has become unreadable.
    """
    path, load = None, None
    for item in stored:
        if load is None or item.path != path:
            load = None  # closes the file before the next one is opened
            load, path = _open(item.path), item.path
        value = load(item.key)
        reason = files.reason_against(value)
        if reason:
            raise ValueError(f"{item.path}: {item.key} is {reason}")
        yield value


def list_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's files, in their order. Where there are both kinds, safetensors, as in transformers.

    Raises:
        FileNotFoundError: the folder has no weight file, or lacks one that its index names.
        ValueError: two files have the same key, or as for `list_tensors`.
    """
    paths = _files(folder)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        inside = list_tensors(path)
        twice = sorted(set(found) & set(inside))
        if twice:
            raise ValueError(f"{path} and an earlier file have the same keys: {abbreviated(twice)}")
        found.update(inside)
    return found


def _files(folder: Path) -> list[Path]:
    for index, pattern in _SHARDS.items():
        if (folder / index).is_file():
            names = _names(folder, index)
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise FileNotFoundError(f"{folder} has no {abbreviated(absent)}, which its {index} names")
            return [folder / name for name in names]
        paths = sorted(folder.glob(pattern))
        if paths:
            return paths
    raise FileNotFoundError(f"{folder} has no weights: expected {' or '.join(_SHARDS.values())}")


def _names(folder: Path, index: str) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: a name could lead out of the folder.
    """
    entries = files.read_json(folder / index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries.values()):
        raise ValueError(f"{folder / index} has no weight_map of file names by key")
    names = sorted(set(entries.values()))
    # The snapshots in the hub's cache consist of links into the folder "blobs" beside them.
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    wrong = [
        name
        for name in names
        if name in ("", "..") or "\\" in name or PurePath(name).name != name
        or (folder / name).resolve().parent not in homes
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder / index} names {abbreviated(wrong)}: expected files of the same folder, no links")
    return names


def _open(path: Path) -> Callable[[str], Tensor]:
    if path.suffix == ".safetensors":
        file = files.open_safetensors(path)
        return lambda key: files.named(path, lambda: file.get_tensor(key))
    return _open_state(path).__getitem__


def _open_state(path: Path) -> dict[str, Tensor]:
    state = files.load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        found = type(state).__name__
        if isinstance(state, dict):
            found = abbreviated([str(key) for key, value in state.items() if not isinstance(value, Tensor)])
        raise ValueError(f"{path} is not a state dict: expected only tensors, found {found}")
    return state


# A folder ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlavaFolder:
    """A folder in LLaVA's original layout.

    Attributes:
        folder: its path.
        config: its config.json.
        stored: its tensors by key, without the cross tokens.
        cross: the cross tokens by tower, [1, L, C] each; empty if it has none.
        text: the configuration of transformers' Llama.
        settings: the configuration of transformers' LLaVA, apart from its two towers.
    """

    folder: Path
    config: dict[str, Any]
    stored: dict[str, StoredTensor]
    cross: dict[str, StoredTensor]
    text: dict[str, Any]
    settings: dict[str, Any]

    @property
    def has_tower(self) -> bool:
        """Whether the folder contains the weights of the vision tower."""
        return any(key.startswith(TOWER) for key in self.stored)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings; without them, of the first tensor."""
        first = self.stored.get(EMBEDDING) or next(iter(self.stored.values()), None)
        return torch.float32 if first is None else first.dtype

    def cross_tokens(self) -> dict[str, Tensor]:
        """The cross tokens [L, C] by tower."""
        return {
            tower: value.squeeze(0) for tower, value in zip(self.cross, load_tensors(self.cross.values()), strict=True)
        }

    def check_layer(self, depth: int) -> None:
        """Raise where the layer that the image features are taken from is none of an image tower's.

        Args:
            depth: number of blocks of the tower; layer 0 is what enters the first one.

        Raises:
            ValueError: there is no such layer.
        """
        layer = self.settings["vision_feature_layer"]
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"{self.folder / 'config.json'} has mm_vision_select_layer {layer}: the image tower has {depth} "
                f"blocks, so expected {-depth - 1} to {depth}"
            )

    def require_cross_tokens(self, hint: str = "") -> None:
        """Raise where the folder has no cross tokens.

        Args:
            hint: the end of the message: what to use instead.

        Raises:
            ValueError: there are none.
        """
        if not self.cross:
            raise ValueError(
                f"{self.folder} has no {CROSS_FILE} and no cross tokens among its weights: a plain LLaVA?{hint}"
            )


def inspect_folder(folder: Path) -> LlavaFolder:
    """What a folder in LLaVA's original layout contains; no weights are loaded.

    The cross tokens are those in `cross_tokens.bin`, or among the weights where that file is missing. Their keys may
    have a prefix such as "base_model.model.".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder has another layout, an adapter that is not merged, or a damaged file.
    """
    config = _read_config(folder)
    adapter = [name for name in _LORA if (folder / name).exists()]
    if adapter:
        raise ValueError(
            f"{folder} has {abbreviated(adapter)}: a LoRA adapter, which has to be merged into its base model first "
            "(scripts/merge_lora_weights.py of the LLaVA repository), then give the merged folder"
        )
    text, settings = _text(config, folder), _settings(config, folder)
    stored = list_weights(folder)
    cross = _pop_cross_tokens(stored, folder)
    path = folder / CROSS_FILE
    if path.is_file():
        beside = list_tensors(path)
        cross.update(_pop_cross_tokens(beside, path))
        if beside:
            raise ValueError(f"{path}; unexpected: {abbreviated(beside)}; expected only {sorted(CROSS.values())}")
    if cross and len(cross) < len(CROSS):
        absent = [key for tower, key in CROSS.items() if tower not in cross]
        raise ValueError(f"{path if path.is_file() else folder}; missing: {absent}")
    return LlavaFolder(folder, config, stored, cross, text, settings)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one in LLaVA's original layout")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: expected a folder in LLaVA's original layout")
    config = files.read_json(folder / "config.json")
    if "text_config" in config:
        raise ValueError(f"{folder} is in transformers' layout: load it with from_pretrained")
    check_types(config, _TYPES, str(folder / "config.json"))
    return config


def check_types(config: Mapping[str, Any], types: Mapping[str, Fits], where: str) -> None:
    """Raise where a value of a configuration is of another kind than expected.

    Args:
        config: the configuration.
        types: by name, what a value must be if it is there and not None.
        where: the file, for the message.

    Raises:
        ValueError: a value is wrong, or attention heads do not divide the width.
    """
    for name, (fits, expected) in types.items():
        if config.get(name) is not None and not fits(config[name]):
            raise ValueError(f"{where} has {name} {config[name]!r}: expected {expected}")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and (width % heads or heads % (config.get("num_key_value_heads") or heads)):
        raise ValueError(
            f"{where} has hidden_size {width}, num_attention_heads {heads} and num_key_value_heads "
            f"{config.get('num_key_value_heads')}: expected each to divide the one before"
        )


def _text(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if config.get("model_type") not in ("llava", "llava_llama"):
        raise ValueError(
            f"{folder / 'config.json'} has model_type {config.get('model_type')!r}: expected 'llava' or 'llava_llama', "
            "LLaVA with a Llama"
        )
    absent = [name for name in (*_SIZES, "mm_vision_select_layer") if config.get(name) is None]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(absent)}")
    fields = {name: config[name] for name in _SIZES}
    fields["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    for name, default in _DEFAULTS.items():
        fields[name] = default if config.get(name) is None else config[name]
    return fields


def _settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    where = folder / "config.json"
    if config.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"{where} has mm_projector_type {config.get('mm_projector_type')!r}: transformers' LLaVA has 'mlp2x_gelu'"
        )
    if config.get("mm_use_im_start_end"):
        raise ValueError(f"{where} has mm_use_im_start_end: transformers' LLaVA has no such tokens around an image")
    feature = config.get("mm_vision_select_feature") or "patch"
    if feature not in _STRATEGIES:
        raise ValueError(f"{where} has mm_vision_select_feature {feature!r}: expected one of {sorted(_STRATEGIES)}")
    return {
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": _STRATEGIES[feature],
        "projector_hidden_act": "gelu",
    }


def _pop_cross_tokens(stored: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """Remove the cross tokens from `stored` and return them by tower."""
    found = {}
    for tower, name in CROSS.items():
        keys = [key for key in stored if key == name or key.endswith("." + name)]
        if len(keys) > 1:
            raise ValueError(f"{where} has the cross tokens of {tower!r} more than once: {keys}")
        if keys:
            found[tower] = stored.pop(keys[0])
    return found


# Against a model -----------------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of transformers' LlavaForConditionalGeneration (any version) under the original's keys."""
    from crossget.integrations import hf

    whole: Any = model
    parts = hf.parts_of(whole)
    projector = parts.multi_modal_projector
    modules = {
        "model.": hf.inner(parts.language_model, "model"),
        PROJECTOR + "0.": projector.linear_1,
        PROJECTOR + "2.": projector.linear_2,
        TOWER: hf.inner(parts.vision_tower, "vision_model"),
        "lm_head.": whole.get_output_embeddings(),
    }
    return {prefix + name: value for prefix, module in modules.items() for name, value in module.named_parameters()}


def check_shapes(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    where: str,
    target: str,
    action: str = "loaded",
    missing: Sequence[str] = (),
) -> None:
    """Raise where a checkpoint does not fit a model.

    Args:
        expected: the model's shapes, by key.
        found: the checkpoint's shapes, by key.
        where: the checkpoint's name, for the message.
        target: the model's name, for the message.
        action: what did not happen to the weights, for the message.
        missing: further keys that the checkpoint lacks.

    Raises:
        ValueError: keys are missing, unexpected or of another shape.
    """
    absent = [*missing, *sorted(set(expected) - set(found))]
    extra = sorted(set(found) - set(expected))
    bad = [f"{k}: {list(found[k])}, expected {list(s)}" for k, s in expected.items() if k in found and found[k] != s]
    if absent or extra or bad:
        raise ValueError(
            f"{where} does not fit {target}; missing: {abbreviated(absent)}; unexpected: {abbreviated(extra)}; "
            f"wrong shape: {abbreviated(bad)}. Nothing was {action}"
        )


def check_cross_tokens(cross: Mapping[str, StoredTensor], expected: Mapping[str, Shape]) -> None:
    """Raise where cross tokens have another shape than [1, L, C].

    Args:
        cross: the cross tokens by tower.
        expected: (L, C) by tower.

    Raises:
        ValueError: a shape is wrong.
    """
    for tower, stored in cross.items():
        shape = (1, *expected[tower])
        if stored.shape != shape:
            raise ValueError(f"{stored.path}: {stored.key} has shape {stored.shape}, the tower needs {shape}")


def abbreviated(names: Iterable[str]) -> str:
    """Names for a message: the first ten, and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - _MAX_NAMES} more" if len(all_names) > _MAX_NAMES else ""
    return f"{all_names[:_MAX_NAMES]}{more}" if all_names else "none"
