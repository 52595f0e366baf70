"""Files: written whole or not at all, and read with errors that name the file.

Files that are read may come from anywhere: no code in them runs, and what is damaged is a ValueError. This module knows
nothing of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import uuid
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAX_JSON = 2**26  # bytes; the largest configuration that is read has some thousands
_MAX_EXPANSION = 8  # of a compressed torch file; numbers seldom become half as large
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


# Writing -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context that writes a file whole or not at all.

    The new content goes to another file in the same folder. At the end of the context it is flushed to the disk, and
    takes the place of `path` in one step. After an exception it is removed, and `path` stays as it was. A process that
    is killed leaves a hidden file whose name ends in ".part"; the next one that writes `path` removes it, if
    the machine was not restarted since.

    Args:
        path: the file to write. Its folder is created. If it is a link, the file that it points to is replaced.

    Yields:
        The path of the new file, which does not exist yet.

    Raises:
        ValueError: `path` exists and is no regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: give the name of a file to write")
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    part = _beside(target)
    try:
        yield part
        _flush(part)
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all, see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write a file in UTF-8, whole or not at all, see `replacing`."""
    write_bytes(path, content.encode())


@contextlib.contextmanager
def replacing_folder(path: str | Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """Context that writes a folder whole or not at all.

    The new files go to another folder beside it. At the end of the context that folder gets what is in the old one and
    is neither written anew nor to be dropped (hard links, copies where there can be none). Then the two are exchanged:
    in one step on Linux, by two renames elsewhere. After an exception the new folder is removed, and `path` stays as it
    was. A process that is killed leaves a hidden folder whose name ends in ".part"; the next one that writes `path`
    removes it, if the machine was not restarted since.

    Args:
        path: the folder to write; it may exist. Its parent is created.
        drop: names in the old folder that the new one does not get.

    Yields:
        The path of the new folder, which is empty.

    Raises:
        ValueError: `path` exists and is no folder, or it is a mount point, which cannot be renamed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and (not target.is_dir() or os.path.ismount(target)):
        reason = "a mount point, which cannot be exchanged" if target.is_dir() else "not a folder"
        raise ValueError(f"{path} is {reason}: give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    part = _beside(target)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _flush(file)
        if target.is_dir():
            _keep(target, part, drop)
            shutil.copymode(target, part)
            _exchange(part, target)
        else:
            part.rename(target)
    finally:  # after the exchange this is the old folder
        shutil.rmtree(part, ignore_errors=True)


def _beside(target: Path, suffix: str = "part") -> Path:
    """A new hidden path in the same folder, whose name says which process made it."""
    return target.with_name(f"{_prefix(target)}{os.getpid()}.{secrets.token_hex(4)}.{suffix}")


def _prefix(target: Path) -> str:
    """How the names of hidden paths for a target begin, until the next start of this machine or container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    booted = boot.read_text() if boot.is_file() else uuid.getnode()
    numbering = namespace.readlink() if namespace.is_symlink() else ""  # containers number their processes themselves
    machine = hashlib.sha256(f"{booted} {platform.node()} {numbering}".encode()).hexdigest()[:8]
    return f".{target.name[:40]}.{machine}."


def _remove_left_behind(target: Path) -> None:
    """Remove the ".part" paths of processes that have ended."""
    if os.name != "posix":  # elsewhere os.kill ends the process
        return
    pattern = re.compile(re.escape(_prefix(target)) + r"(\d+)\.[0-9a-f]{8}\.part")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except (PermissionError, OverflowError):  # it runs, as another user; or the name is not ours
            continue


def _flush(file: Path) -> None:
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _keep(old: Path, new: Path, drop: Collection[str]) -> None:
    mounted = [folder for folder, _, _ in os.walk(old) if os.path.ismount(folder)]
    if mounted:  # no hard links lead there, and what is left of the old folder is deleted
        raise ValueError(f"{old} has mount points inside, {mounted}: give another folder")
    for item in old.iterdir():
        copy = new / item.name
        if item.name in drop or copy.exists():
            continue
        if item.is_symlink():
            copy.symlink_to(item.readlink())
        elif item.is_dir():
            shutil.copytree(item, copy, symlinks=True, copy_function=_link)
        else:
            _link(item, copy)


def _link(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        if rename is not None and rename(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
            return
    aside = _beside(old, "old")  # not removed by others: for a moment it is the only copy
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


# Reading -------------------------------------------------------------------------------------------------------------


def check_regular(path: Path) -> None:
    """Refuse what is no file: reading from a FIFO or a device may never end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a FIFO or a device.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")


def parse_json(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: in UTF-8.
        where: what contains it, for messages.

    Raises:
        ValueError: the text is not JSON, or not an object.
    """
    try:
        content = json.loads(text.decode() if isinstance(text, bytes) else text)
        json.dumps(content, ensure_ascii=False).encode()  # halves of characters could not be written or printed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} contains a {type(content).__name__}: expected a JSON object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, not JSON, not an object, or larger than any configuration.
    """
    check_regular(path)
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: expected a configuration of at most {_MAX_JSON:,}")
    return parse_json(path.read_bytes(), path)


def load_pickle(path: Path) -> Any:
    """Load what `torch.save` wrote: tensors and plain containers only, memory-mapped where the format allows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file contains anything else, is damaged, or is so compressed that it might fill the memory.
    """
    check_regular(path)
    try:
        zipped, compressed = zipfile.is_zipfile(path), False
        if zipped:
            with zipfile.ZipFile(path) as archive:
                expanded = sum(item.file_size for item in archive.infolist())
                compressed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
        if compressed and expanded > _MAX_EXPANSION * path.stat().st_size:
            problem = (
                f"expands from {path.stat().st_size:,} to {expanded:,} bytes, which is refused: torch.save does not "
                "compress; load it with torch.load if you trust it, and save it again"
            )
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors, which the caller refuses by name
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and not compressed)
    except Exception as error:  # damaged bytes raise whatever the code that they reach happens to raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is not a torch file, is truncated, or contains more than tensors, which is not loaded "
            f"(weights_only=True; save the model's state_dict() instead): {reason}"
        ) from error
    raise ValueError(f"{path} {problem}")


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened by `safetensors.safe_open`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or truncated.
    """
    from safetensors import safe_open

    check_regular(path)
    return named(path, lambda: safe_open(path, framework="pt"))


def named(path: Path, read: Callable[[], Any]) -> Any:
    """Call a function of safetensors, whose errors do not name the file.

    Raises:
        ValueError: the file is not a safetensors file, or is truncated.
    """
    try:
        return read()
    except Exception as error:  # also dtypes that torch lacks
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from error


def reason_against(value: Tensor, numbers: bool = True) -> str | None:
    """Why a tensor from a file cannot be a weight; None if it can.

    Args:
        value: the tensor.
        numbers: also look for NaN and infinity, which reads all of it.
    """
    if value.is_meta:
        return "on the meta device, without numbers"
    if value.is_quantized or not value.is_floating_point():
        return f"{value.dtype}, not floating-point (quantised?)"
    if value.layout is not torch.strided or value.is_nested:
        return "sparse or nested"
    if numbers and value.numel() and not all(bool(torch.isfinite(end)) for end in value.detach().aminmax()):
        return "not finite: it has NaN or infinity"
    return None
