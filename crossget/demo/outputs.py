"""The files that the commands write: whole or not at all, and never in the place of somebody else's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossget.core import files

MARK = "written by crossget"  # in every file that a command writes
PAGE, PICTURE, NUMBERS = (".html", ".htm"), (".png", ".svg", ".pdf"), (".json",)


def check_output(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Check that a command may write a file, before it computes anything.

    Args:
        option: that names the file.
        path: the file.
        suffixes: endings of the file's name, one of which it must have.

    Raises:
        ValueError: the name ends otherwise, there is no such folder, or a file is there that no command wrote.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: expected a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if path.exists() and not (path.is_file() and (path.stat().st_size == 0 or MARK.encode() in path.read_bytes())):
        raise ValueError(
            f"{option} {path}: it exists, and crossget did not write it: move it away, or give another name"
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as one of `PICTURE`."""
    name = "Software" if path.suffix.lower() == ".png" else "Creator"
    with files.replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), metadata={name: MARK})
