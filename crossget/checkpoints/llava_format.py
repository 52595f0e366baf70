"""LLaVA in its authors' folder layout: what such a folder holds, and its tensors, one file at a time.

Nothing of a file but its table of contents is read before a tensor is asked for, and pickles with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = (EMBEDDING, HEAD)  # one row per token
PROJECTOR, TOWER = "model.mm_projector.", "model.vision_tower.vision_tower.vision_model."
CROSS = {"visual": TOWER + "encoder.cross_image", "text": "model.cross_text"}
CROSS_FILE = "cross_tokens.bin"

_LORA = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
_SHARDS = {"model.safetensors.index.json": "model*.safetensors", "pytorch_model.bin.index.json": "pytorch_model*.bin"}
_BUFFERS = (".inv_freq", ".position_ids")  # older transformers saved these, which follow from the sizes
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in _FLOATS.items()}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What LLaVA's code and transformers' Llama take where config.json says nothing.
_DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_SHOWN = 10  # names of keys in one message


# Files ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet.

    Attributes:
        path, key: where it is.
        shape, dtype: of it.
    """

    path: Path
    key: str
    shape: Shape
    dtype: torch.dtype


def contents(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors or torch file, by key; without buffers that follow from the sizes.

    Raises:
        ValueError: it is neither, it is cut off, or it holds something that is no tensor of floating-point numbers.
    """
    if path.suffix == ".safetensors":
        file = _open_safetensors(path)
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        found = {key: (tuple(s.get_shape()), _FLOATS.get(s.get_dtype())) for key, s in slices.items()}
    else:
        found = {key: (tuple(t.shape), t.dtype if t.dtype in CODES else None) for key, t in _open_state(path).items()}
    kept = {key: (shape, dtype) for key, (shape, dtype) in found.items() if not key.endswith(_BUFFERS)}
    strange = [key for key, (_, dtype) in kept.items() if dtype is None]
    if strange:
        raise ValueError(f"{path} has weights that are no floating-point numbers (quantised?): {listed(strange)}")
    return {key: Stored(path, key, shape, dtype) for key, (shape, dtype) in kept.items() if dtype is not None}


def tensors(wanted: Iterable[Stored]) -> Iterator[Tensor]:
    """Read tensors in this order, with no more than one file open at a time."""
    path, read = None, None
    for one in wanted:
        if read is None or one.path != path:
            read = None  # before the next one is opened
            read, path = _opened(one.path), one.path
        yield read(one.key)


def weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's files, in their order; safetensors if there are both kinds, as transformers does.

    Raises:
        FileNotFoundError: it has none, or not all that its index names.
        ValueError: two files have the same key, or as for `contents`.
    """
    paths = _files(folder)
    found: dict[str, Stored] = {}
    for path in paths:
        inside = contents(path)
        twice = sorted(set(found) & set(inside))
        if twice:
            raise ValueError(f"{path} and an earlier file have the same keys: {listed(twice)}")
        found.update(inside)
    return found


def _files(folder: Path) -> list[Path]:
    for index, pattern in _SHARDS.items():
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            absent = [name for name in names if not (folder / name).is_file()]
            if absent:
                raise FileNotFoundError(f"{folder} has no {listed(absent)}, which its {index} names")
            return [folder / name for name in names]
        paths = sorted(folder.glob(pattern))
        if paths:
            return paths
    raise FileNotFoundError(f"{folder} has no weights: expected {' or '.join(_SHARDS.values())}")


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain containers alone; mapped into memory where its format allows.

    Raises:
        ValueError: it holds anything else, or it is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no torch file, or holds more than tensors: that is not read (weights_only=True)"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no torch file, or is cut off: {error or type(error).__name__}") from error


def _opened(path: Path) -> Callable[[str], Tensor]:
    if path.suffix == ".safetensors":
        get: Callable[[str], Tensor] = _open_safetensors(path).get_tensor
        return get
    return _open_state(path).__getitem__


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is cut off: {error}") from error


def _open_state(path: Path) -> dict[str, Tensor]:
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = type(state).__name__
        if isinstance(state, dict):
            found = listed([key for key, value in state.items() if not isinstance(value, Tensor)])
        raise ValueError(f"{path} is no state dict: expected tensors alone, found {found}")
    return state


# A folder ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """A folder in LLaVA's original layout.

    Attributes:
        folder: itself.
        config: its config.json.
        stored: its tensors by key, without the cross tokens.
        cross: the cross tokens by tower, [1, L, C] each; empty if it has none.
        text: what transformers' Llama needs to know.
        settings: what transformers' LLaVA needs to know beside its two towers.
    """

    folder: Path
    config: dict[str, Any]
    stored: dict[str, Stored]
    cross: dict[str, Stored]
    text: dict[str, Any]
    settings: dict[str, Any]

    @property
    def has_tower(self) -> bool:
        """The vision tower's weights are inside."""
        return any(key.startswith(TOWER) for key in self.stored)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, or of whatever comes first."""
        first = self.stored.get(EMBEDDING) or next(iter(self.stored.values()), None)
        return torch.float32 if first is None else first.dtype

    def cross_tokens(self) -> dict[str, Tensor]:
        """Per tower [L, C]."""
        return {tower: value.squeeze(0) for tower, value in zip(self.cross, tensors(self.cross.values()), strict=True)}

    def require_cross_tokens(self, hint: str = "") -> None:
        """Refuse a folder without them.

        Raises:
            ValueError: there are none.
        """
        if not self.cross:
            raise ValueError(
                f"{self.folder} has no {CROSS_FILE} and no cross tokens among its weights: a plain LLaVA?{hint}"
            )


def read_folder(folder: Path) -> Original:
    """Find out what is in a folder in LLaVA's original layout, without reading weights.

    Cross tokens are taken from `cross_tokens.bin`, or, where that is not there, from among the weights; a prefix such
    as "base_model.model." may stand before their keys.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it is a folder of another kind, an adapter that has not been merged, or cannot be read.
    """
    config = _read_config(folder)
    adapter = [name for name in _LORA if (folder / name).exists()]
    if adapter:
        raise ValueError(
            f"{folder} has {listed(adapter)}: a LoRA adapter, which has to be merged into its base model first "
            "(scripts/merge_lora_weights.py of the LLaVA repository), then give the merged folder"
        )
    text, settings = _text(config, folder), _settings(config, folder)
    stored = weights(folder)
    cross = _take_cross(stored, folder)
    path = folder / CROSS_FILE
    if path.is_file():
        beside = contents(path)
        cross.update(_take_cross(beside, path))
        if beside:
            raise ValueError(f"{path}; left over: {listed(beside)}; expected {sorted(CROSS.values())} alone")
    if cross and len(cross) < len(CROSS):
        absent = [key for tower, key in CROSS.items() if tower not in cross]
        raise ValueError(f"{path if path.is_file() else folder}; missing: {absent}")
    return Original(folder, config, stored, cross, text, settings)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one in LLaVA's original layout")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: expected a folder in LLaVA's original layout")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        raise ValueError(f"{folder} is in transformers' layout already: load it with from_pretrained")
    return config


def _text(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if config.get("model_type") not in ("llava", "llava_llama"):
        raise ValueError(
            f"{folder / 'config.json'} has model_type {config.get('model_type')!r}: expected 'llava' or 'llava_llama', "
            "LLaVA with a Llama"
        )
    absent = [name for name in (*_SIZES, "mm_vision_select_layer") if name not in config]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(absent)}")
    fields = {name: config[name] for name in _SIZES}
    fields["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    return {**fields, **{name: config.get(name, default) for name, default in _DEFAULTS.items()}}


def _settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    where = folder / "config.json"
    if config.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"{where} has mm_projector_type {config.get('mm_projector_type')!r}: transformers' LLaVA has 'mlp2x_gelu'"
        )
    if config.get("mm_use_im_start_end"):
        raise ValueError(f"{where} has mm_use_im_start_end: transformers' LLaVA has no such tokens around an image")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in _STRATEGIES:
        raise ValueError(f"{where} has mm_vision_select_feature {feature!r}: expected one of {sorted(_STRATEGIES)}")
    return {
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": _STRATEGIES[feature],
        "projector_hidden_act": "gelu",
    }


def _take_cross(stored: dict[str, Stored], where: Path) -> dict[str, Stored]:
    """Move the cross tokens out of `stored`."""
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
    """The parameters of transformers' LlavaForConditionalGeneration under the original's keys, in any version."""
    from crossget.integrations import hf

    whole: Any = model
    parts = hf.parts_of(whole)
    projector = parts.multi_modal_projector
    homes = {
        "model.": hf.inner(parts.language_model, "model"),
        PROJECTOR + "0.": projector.linear_1,
        PROJECTOR + "2.": projector.linear_2,
        TOWER: hf.inner(parts.vision_tower, "vision_model"),
        "lm_head.": whole.get_output_embeddings(),
    }
    return {prefix + name: value for prefix, home in homes.items() for name, value in home.named_parameters()}


def check_shapes(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    where: str,
    whom: str,
    done: str = "loaded",
    missing: Sequence[str] = (),
) -> None:
    """Refuse weights that do not fit.

    Args:
        expected: the model's, by key.
        found: the checkpoint's.
        where: the checkpoint's name.
        whom: the model's name.
        done: what was to be done with them.
        missing: keys that are known to be missing.

    Raises:
        ValueError: keys are missing, left over or misshapen.
    """
    absent = [*missing, *sorted(set(expected) - set(found))]
    extra = sorted(set(found) - set(expected))
    bad = [f"{k}: {list(found[k])} for {list(s)}" for k, s in expected.items() if k in found and found[k] != s]
    if absent or extra or bad:
        raise ValueError(
            f"{where} does not fit {whom}; missing: {listed(absent)}; left over: {listed(extra)}; "
            f"misshapen: {listed(bad)}. Nothing was {done}"
        )


def check_cross(cross: Mapping[str, Stored], expected: Mapping[str, Shape]) -> None:
    """Refuse cross tokens of another shape than [1, L, C].

    Args:
        cross: by tower.
        expected: (L, C) by tower.

    Raises:
        ValueError: one is misshapen.
    """
    for tower, one in cross.items():
        shape = (1, *expected[tower])
        if one.shape != shape:
            raise ValueError(f"{one.path}: {one.key} has shape {one.shape}, the tower needs {shape}")


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first ones, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{every[:_SHOWN]}{more}" if every else "none"
