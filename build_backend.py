"""The build backend: setuptools', with sdists whose bytes depend on the content alone."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the other hooks)

YEAR_1980 = 315532800  # in seconds; the first year that the archives of wheels know


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Build an sdist; its times are SOURCE_DATE_EPOCH, or the year 1980, its files are sorted and nobody's."""
    name: str = build_meta.build_sdist(sdist_directory, config_settings)
    path, time = Path(sdist_directory) / name, int(os.environ.get("SOURCE_DATE_EPOCH", YEAR_1980))
    content = io.BytesIO()
    with (
        tarfile.open(path) as old,
        gzip.GzipFile("", "wb", fileobj=content, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for item in sorted(old, key=lambda item: item.name):
            if ".egg-info" in item.name:  # made anew where it is needed; PKG-INFO has the metadata
                continue
            item.mtime, item.uid, item.gid, item.uname, item.gname, item.pax_headers = time, 0, 0, "", "", {}
            item.mode = 0o755 if item.isdir() or item.mode & 0o100 else 0o644
            new.addfile(item, old.extractfile(item) if item.isreg() else None)
    path.write_bytes(content.getvalue())
    return name
