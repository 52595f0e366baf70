"""Writing and reading the reducers and cross tokens of an attached model.

They are saved as one file of tens of kilobytes, `crossget.safetensors`: its tensors are the cross tokens, its metadata
holds the reducers as JSON. So settings and weights cannot be of two different models. Reading executes no code from the
file.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from crossget.core import files
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import Aligned, Constant, Keep, Linear, Part, PerLayer, RampedRatio, Ratio, Schedule

FILE = "crossget.safetensors"
_KEY, _VERSION = "crossget", 1
_INNER = frozenset(("r", "whole"))  # fields of schedules that hold another schedule, or a list
_SCHEDULES = {cls.__name__: cls for cls in (Aligned, Constant, Keep, Linear, Part, PerLayer, Ratio, RampedRatio)}


def write(folder: str | Path, reducers: Mapping[str, Reducer], cross_tokens: Mapping[str, Tensor]) -> None:
    """Write the file for `crossget.load`, whole or not at all.

    Args:
        folder: created if it does not exist.
        reducers: per tower, all fields resolved.
        cross_tokens: per tower [L, C].

    Raises:
        TypeError: a reducer has a schedule or field that cannot be written as JSON.
    """
    from safetensors.torch import save

    towers = {name: _reducer_to_json(reducer) for name, reducer in reducers.items()}
    config = json.dumps({"version": _VERSION, "towers": towers})
    tensors = {name: value.detach().cpu().contiguous() for name, value in cross_tokens.items()}
    files.write_bytes(Path(folder) / FILE, save(tensors, {_KEY: config}))


def read(folder: str | Path) -> tuple[dict[str, Reducer], dict[str, Tensor], str]:
    """Read the file that `write` has written.

    Args:
        folder: a local folder, or the id of a repository on the Hugging Face hub.

    Returns:
        The reducers per tower, the cross tokens [L, C] per tower, and the file's path.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is damaged, was written by a newer version, or names an unknown method; cross tokens are
            not floating-point, or not finite.
    """
    path = _local(folder)
    opened = files.open_safetensors(path)
    text = (opened.metadata() or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{path} has no metadata {_KEY!r}: expected what Attachment.save wrote")
    config = files.parse_json(text, f"the metadata {_KEY!r} of {path}")
    if config.get("version") != _VERSION:
        raise ValueError(f"{path} has version {config.get('version')!r}: this crossget reads {_VERSION}")
    towers = config.get("towers")
    if not isinstance(towers, dict) or not all(isinstance(entry, dict) for entry in towers.values()):
        raise ValueError(f"{path}: towers is {towers!r}, expected an object of one reducer per tower")
    try:
        reducers = {name: _reducer_from_json(entry) for name, entry in towers.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    tensors: dict[str, Tensor] = files.named(path, lambda: {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    bad = [f"{key} is {reason}" for key, value in tensors.items() if (reason := files.reason_against(value))]
    if bad:
        raise ValueError(f"{path}: the cross tokens of {', '.join(bad)}")
    return reducers, tensors, str(path)


def _local(folder: str | Path) -> Path:
    """The file in the folder itself, or in a hub repository's local copy.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(folder)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"{path} has no {FILE}: expected what Attachment.save wrote")
        return path / FILE
    if path.exists():
        raise FileNotFoundError(f"{path} is not a folder: give the folder that Attachment.save wrote {FILE} into")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is no folder here, and to load it from the Hugging Face hub takes huggingface_hub, which is not "
            "installed: pip install huggingface_hub"
        ) from error

    try:
        return Path(hf_hub_download(str(folder), FILE))
    except HFValidationError as error:
        raise FileNotFoundError(f"{folder} is neither a folder here nor the id of a hub repository ({error})") from None
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"the hub repository {folder} has no {FILE}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{folder} is neither a folder here nor a repository of the hub") from error


def _reducer_to_json(reducer: Reducer) -> dict[str, Any]:
    fields = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer)}
    fields["r"] = _schedule_to_json(fields["r"])
    return {"method": type(reducer).__name__, **fields}


def _schedule_to_json(r: Any) -> Any:
    if isinstance(r, int | tuple):
        return r
    if type(r) is not _SCHEDULES.get(type(r).__name__):
        raise TypeError(f"r is {r!r}: only {', '.join(_SCHEDULES)}, ints and lists of ints can be saved")
    values = {field.name: getattr(r, field.name) for field in dataclasses.fields(r)}
    for name in _INNER.intersection(values):
        values[name] = _schedule_to_json(values[name])
    return {"schedule": type(r).__name__, **values}


def _reducer_from_json(entry: Mapping[str, Any]) -> Reducer:
    methods = _methods(Reducer)
    fields = dict(entry)
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in methods:
        raise ValueError(
            f"the saved method {name!r} is not known here: import the module that defines it. Known: {sorted(methods)}"
        )
    if "r" not in fields:
        raise ValueError(f"the saved {name} has no r")
    r = _schedule_from_json(fields.pop("r"))
    _check_types(methods[name], fields)
    return methods[name](r, **fields)


def _schedule_from_json(r: Any) -> int | tuple[int, ...] | Schedule:
    if isinstance(r, int):
        return r
    if isinstance(r, list):
        return tuple(r)
    if not isinstance(r, dict) or not isinstance(r.get("schedule"), str) or r["schedule"] not in _SCHEDULES:
        raise ValueError(f"r is {r!r}: expected an int, a list of ints, or one of the schedules {sorted(_SCHEDULES)}")
    fields = dict(r)
    cls = _SCHEDULES[fields.pop("schedule")]
    for name in _INNER.intersection(fields):
        if cls in (Aligned, Part):
            fields[name] = _schedule_from_json(fields[name])
        elif isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    _check_types(cls, fields)
    schedule: Schedule = cls(**fields)
    return schedule


def _check_types(cls: type[Any], fields: Mapping[str, Any]) -> None:
    """Refuse values of other types than the fields': the text "false" would pass for True.

    Raises:
        ValueError: a field is unknown, or its value is of another type.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a method that is defined inside a function, whose types only that function knows
        hints = {}
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no fields {unknown}: was it saved by a newer version?")
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name} of {cls.__name__} is {value!r}: expected {_hint_text(hints[name])}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type; what JSON has no type for is left to the class."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments and type(value) in {type(argument) for argument in arguments}
    if arguments and origin is not tuple:  # a union
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return type(value) in (int, float)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    return True


def _hint_text(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    if arguments and origin is not tuple:  # a union
        return " or ".join("None" if one is type(None) else _hint_text(one) for one in arguments)
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _methods(base: type[Reducer]) -> dict[str, type[Reducer]]:
    """All methods that are defined in this process, by name. So reading a file imports no module."""
    found = {}
    for cls in base.__subclasses__():
        found.update({cls.__name__: cls, **_methods(cls)})
    return found
