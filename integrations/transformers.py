"""transformers: which models have an adapter, and the reasons why others have none.

The adapters are in one file per family (hf_clip and so on). Functions that they share are in hf.py.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from crossget.core.adapters import FAMILIES, adapted_towers, is_registered
from crossget.integrations._support import NumbersOnCPU, SupportRow, support_row

NO_DEFAULT = "it has an adapter, but in this version no model can be made from its configuration's default values"


def support_matrix(pattern: str | None = None) -> Iterator[SupportRow]:
    """One row for each class of transformers that has an adapter."""
    for cls in _adapted():
        if fnmatch.fnmatch(cls.__name__, pattern or "*"):
            try:
                model = skeleton(cls)
            except (TypeError, ValueError) as error:  # some versions have default values that do not fit together
                reason = f"{NO_DEFAULT}: {error}"
                yield SupportRow(cls.__name__, cls.__name__, False, reason=reason)
            else:
                yield support_row(cls.__name__, model, adapted_towers(model))


def skeleton(cls: Any) -> nn.Module:
    """A model of this class on the meta device, from its configuration's default values."""
    with torch.device("meta"), NumbersOnCPU():
        model: nn.Module = cls(cls.config_class())
    return model


def _adapted() -> Iterator[type]:
    """The classes with an adapter."""
    for family, adapter in FAMILIES.items():
        home = _home(family)
        if home is not None:
            importlib.import_module(f"crossget.integrations.{adapter}")
            yield from (cls for cls in _models(home) if is_registered(cls))


def _models(home: ModuleType) -> Iterator[type]:
    """The classes of models in a module."""
    for _, cls in inspect.getmembers(home, inspect.isclass):
        # Classes with a configuration of their own, and no base classes or layers.
        if cls.__module__ == home.__name__ and "PreTrained" not in cls.__name__ and hasattr(cls, "config_class"):
            yield cls


def _home(family: str) -> ModuleType | None:
    """The module with a family's models; None if the installed version has none."""
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError:
        return None
