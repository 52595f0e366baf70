"""Save and load attachments; load the checkpoints of the reference implementation.

A saved attachment is a folder with `crossget.safetensors` (the cross tokens) and `crossget_config.json` (the
reducers): tens of kilobytes. Nothing here unpickles code.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossget.attach import Attachment, attach, find_attachment
from crossget.reducers import CrossGET, Reducer
from crossget.registry import find_towers
from crossget.schedule import Constant, Linear, PerLayer, Ratio, Schedule

_CONFIG, _WEIGHTS, _VERSION = "crossget_config.json", "crossget.safetensors", 1
_SCHEDULES = {cls.__name__: cls for cls in (Constant, Linear, PerLayer, Ratio)}
_REFERENCE_KEYS = {"visual": "visual.transformer.cross_image", "text": "transformer.cross_text"}
# Archives of OpenAI's models carry these integers beside the weights.
_OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}


def save(attachment: Attachment, folder: str | Path) -> None:
    """Write an attachment's reducers and cross tokens.

    Args:
        attachment: to be saved.
        folder: made if it is not there.

    Raises:
        TypeError: a reducer has a schedule or field that JSON cannot hold.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    towers = {name: _reducer_to_json(reducer) for name, reducer in attachment.reducers.items()}
    config = json.dumps({"version": _VERSION, "towers": towers}, indent=2)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in attachment.cross_tokens.items()}, path / _WEIGHTS)
    (path / _CONFIG).write_text(config + "\n")


def load(model: nn.Module, folder: str | Path) -> Attachment:
    """Attach to `model` what `Attachment.save` wrote.

    Args:
        model: of the architecture that was saved, not attached.
        folder: a local folder, or the id of a repository on the Hugging Face hub.

    Returns:
        The attachment.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the file was written by a newer version, names an unknown method, or does not fit the model.
    """
    from safetensors.torch import load_file

    path = _local(folder)
    config = json.loads((path / _CONFIG).read_text())
    if config.get("version") != _VERSION:
        raise ValueError(f"{path / _CONFIG} has version {config.get('version')!r}: this crossget reads {_VERSION}")
    reducers = {name: _reducer_from_json(entry) for name, entry in config["towers"].items()}
    weights = load_file(path / _WEIGHTS)
    attached = attach(model, reducers)
    try:
        _set_cross_tokens(attached, weights, str(path / _WEIGHTS))
    except ValueError:
        attached.detach()
        raise
    return attached


def load_reference(
    model: nn.Module, path: str | Path, reducer: Reducer | Mapping[str, Reducer] | None = None
) -> Attachment:
    """Load a CLIP checkpoint of the reference implementation into open_clip's model, and attach.

    The file is `{"model": state_dict}` with OpenAI's key names plus the cross tokens of both towers. It does not say
    r: an attached model keeps its reducers, otherwise `reducer` is attached, otherwise the reference's (16, 0).

    Args:
        model: an open_clip CLIP of the same architecture (OpenAI's use QuickGELU: "ViT-B-16-quickgelu").
        path: the checkpoint; only tensors are read, never code.
        reducer: as for `crossget.attach`.

    Returns:
        The attachment; the model's own weights are the checkpoint's now.

    Raises:
        ValueError: keys are missing, left over or misshapen (all are named; nothing is loaded then), or `reducer`
            is given for a model that is attached already.
    """
    previous = find_attachment(model)
    if previous is not None and reducer is not None:
        raise ValueError("the model is attached already, so reducer would be ignored: detach first, or leave it out")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f'{path} is not a CLIP checkpoint of the reference: expected {{"model": state_dict}}, found {keys}'
        )
    state = {name: value for name, value in content["model"].items() if name not in _OPENAI_EXTRAS}
    cross = {tower: state.pop(key) for tower, key in _REFERENCE_KEYS.items() if key in state}
    missing = [_REFERENCE_KEYS[tower] for tower in _REFERENCE_KEYS if tower not in cross]
    _check_state(model, state, missing, str(path))
    _check_cross(model, cross, str(path))
    _warn_activation(model, str(path))
    attached = previous or attach(model, CrossGET(r=16) if reducer is None else reducer)
    model.load_state_dict(state)
    _set_cross_tokens(attached, {tower: value.squeeze(0) for tower, value in cross.items()}, str(path))
    return attached


def _local(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        absent = [name for name in (_CONFIG, _WEIGHTS) if not (path / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{path} has no {' and no '.join(absent)}: expected what Attachment.save wrote")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(folder), allow_patterns=[_CONFIG, _WEIGHTS]))
    except HFValidationError as error:
        raise FileNotFoundError(f"{folder} is neither a folder here nor the id of a hub repository ({error})") from None


def _set_cross_tokens(attached: Attachment, weights: Mapping[str, Tensor], where: str) -> None:
    expected = {name: tuple(p.shape) for name, p in attached.cross_tokens.items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if name in expected or name in attached.towers}
    unknown = sorted(set(weights) - set(attached.towers))
    if unknown or any(found.get(name) != shape for name, shape in expected.items()):
        raise ValueError(f"{where} has cross tokens {found} {unknown or ''}: this attachment needs {expected}")
    with torch.no_grad():
        for name, parameter in attached.cross_tokens.items():
            parameter.copy_(weights[name])


def _check_state(model: nn.Module, state: Mapping[str, Tensor], missing_cross: list[str], path: str) -> None:
    own = model.state_dict()
    missing = [*missing_cross, *sorted(set(own) - set(state))]
    extra = sorted(set(state) - set(own))
    bad = [
        f"{k}: {list(state[k].shape)} for {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or bad:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}; missing: {missing or 'none'}; left over: {extra or 'none'}; "
            f"misshapen: {bad or 'none'}. Nothing was loaded"
        )


def _check_cross(model: nn.Module, cross: Mapping[str, Tensor], path: str) -> None:
    towers = {tower.name: tower for tower in find_towers(model)}
    for name, value in cross.items():
        shape = (1, len(towers[name].blocks), towers[name].width)
        if tuple(value.shape) != shape:
            raise ValueError(f"{path}: {_REFERENCE_KEYS[name]} has shape {tuple(value.shape)}, the tower needs {shape}")


def _warn_activation(model: nn.Module, path: str) -> None:
    names = {type(module).__name__ for module in model.modules()}
    if "GELU" in names and "QuickGELU" not in names:
        warnings.warn(
            f"{path} was trained with QuickGELU and this model uses GELU, so features will be off: make the model with "
            'a "-quickgelu" name or force_quick_gelu=True',
            stacklevel=3,
        )


def _reducer_to_json(reducer: Reducer) -> dict[str, Any]:
    fields = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer)}
    fields["r"] = _schedule_to_json(fields["r"])
    return {"method": type(reducer).__name__, **fields}


def _schedule_to_json(r: Any) -> Any:
    if isinstance(r, int | tuple):
        return r
    if type(r) is not _SCHEDULES.get(type(r).__name__):
        raise TypeError(f"r is {r!r}: only {', '.join(_SCHEDULES)}, ints and lists of ints can be saved")
    return {"schedule": type(r).__name__, **dataclasses.asdict(r)}


def _reducer_from_json(entry: Mapping[str, Any]) -> Reducer:
    methods = _methods(Reducer)
    fields = dict(entry)
    name = fields.pop("method")
    if name not in methods:
        raise ValueError(
            f"the saved method {name!r} is not known here: import the module that defines it. Known: {sorted(methods)}"
        )
    fields["r"] = _schedule_from_json(fields["r"])
    return methods[name](**fields)


def _schedule_from_json(r: Any) -> int | tuple[int, ...] | Schedule:
    if isinstance(r, int):
        return r
    if isinstance(r, list):
        return tuple(r)
    fields = dict(r)
    schedule: Schedule = _SCHEDULES[fields.pop("schedule")](**fields)
    return schedule


def _methods(base: type[Reducer]) -> dict[str, type[Reducer]]:
    """Every method that is defined in this process, by name: reading a file imports nothing."""
    found = {}
    for cls in base.__subclasses__():
        found.update({cls.__name__: cls, **_methods(cls)})
    return found
