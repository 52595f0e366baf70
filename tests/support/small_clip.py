"""A small CLIP that open_clip knows by name, for a while."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip


@contextlib.contextmanager
def registered(name: str, config: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Inside, `open_clip.create_model(name)` makes the model of `config`, which is written to `folder`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    try:
        yield
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
        del open_clip.factory._MODEL_CONFIGS[name]
