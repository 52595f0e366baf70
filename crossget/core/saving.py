"""Writing and reading the reducers and cross tokens of an attached model.

They are saved as a folder with two files of tens of kilobytes: `crossget.safetensors` holds the cross tokens,
`crossget_config.json` the reducers. Reading them executes no code from the files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from crossget.methods.reducers import Reducer
from crossget.methods.schedules import Constant, Linear, Part, PerLayer, RampedRatio, Ratio, Schedule

CONFIG_FILE, WEIGHTS_FILE, _VERSION = "crossget_config.json", "crossget.safetensors", 1
FILES = (CONFIG_FILE, WEIGHTS_FILE)
_SCHEDULES = {cls.__name__: cls for cls in (Constant, Linear, Part, PerLayer, Ratio, RampedRatio)}


def write(folder: str | Path, reducers: Mapping[str, Reducer], cross_tokens: Mapping[str, Tensor]) -> None:
    """Write a folder for `crossget.load`.

    Args:
        folder: created if it does not exist.
        reducers: per tower, all fields resolved.
        cross_tokens: per tower [L, C].

    Raises:
        TypeError: a reducer has a schedule or field that cannot be written as JSON.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    towers = {name: _reducer_to_json(reducer) for name, reducer in reducers.items()}
    config = json.dumps({"version": _VERSION, "towers": towers}, indent=2)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in cross_tokens.items()}, path / WEIGHTS_FILE)
    (path / CONFIG_FILE).write_text(config + "\n")


def open_folder(folder: str | Path) -> tuple[dict[str, Reducer], dict[str, Tensor], str]:
    """Read a folder that `write` has written.

    Args:
        folder: a local folder, or the id of a repository on the Hugging Face hub.

    Returns:
        The reducers per tower, the cross tokens [L, C] per tower, and the path of the file with the cross tokens.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the folder was written by a newer version, or names an unknown method.
    """
    from safetensors.torch import load_file

    path = _local(folder)
    config = json.loads((path / CONFIG_FILE).read_text())
    if config.get("version") != _VERSION:
        raise ValueError(f"{path / CONFIG_FILE} has version {config.get('version')!r}: this crossget reads {_VERSION}")
    reducers = {name: _reducer_from_json(entry) for name, entry in config["towers"].items()}
    return reducers, load_file(path / WEIGHTS_FILE), str(path / WEIGHTS_FILE)


def _local(folder: str | Path) -> Path:
    """The folder itself, or a hub repository's local copy.

    Raises:
        FileNotFoundError: there is neither, or the folder lacks one of the two files.
    """
    path = Path(folder)
    if path.is_dir():
        absent = [name for name in FILES if not (path / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{path} has no {' and no '.join(absent)}: expected what Attachment.save wrote")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is no folder here, and to load it from the Hugging Face hub takes huggingface_hub, which is not "
            "installed: pip install huggingface_hub"
        ) from error

    try:
        return Path(snapshot_download(str(folder), allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise FileNotFoundError(f"{folder} is neither a folder here nor the id of a hub repository ({error})") from None


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
    if isinstance(r, Part):
        values["whole"] = _schedule_to_json(r.whole)
    return {"schedule": type(r).__name__, **values}


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
    if "whole" in fields:
        fields["whole"] = _schedule_from_json(fields["whole"])
    schedule: Schedule = _SCHEDULES[fields.pop("schedule")](**fields)
    return schedule


def _methods(base: type[Reducer]) -> dict[str, type[Reducer]]:
    """All methods that are defined in this process, by name. So reading a file imports no module."""
    found = {}
    for cls in base.__subclasses__():
        found.update({cls.__name__: cls, **_methods(cls)})
    return found
