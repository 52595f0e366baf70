"""transformers: packed image towers whose merger joins units of patches, such as those of Qwen-VL and GLM-V."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from crossget.core.merge_units import UnitTower


def find_units(model: nn.Module) -> UnitTower | None:
    """The packed image tower of a model; None: it has none with merge units."""
    for module in model.modules():
        tower: Any = module
        blocks, merger = getattr(tower, "blocks", None), getattr(tower, "merger", None)
        if not isinstance(blocks, nn.ModuleList) or not isinstance(merger, nn.Module) or not len(blocks):
            continue
        size = getattr(tower, "spatial_merge_size", None)
        names = inspect.signature(type(blocks[0]).forward).parameters
        grid = next((name for name in inspect.signature(type(tower).forward).parameters if "grid" in name), None)
        if isinstance(size, int) and grid is not None and "cu_seqlens" in names:
            mergers = [merger, *getattr(tower, "deepstack_merger_list", [])]
            return UnitTower(tower, list(blocks), mergers, size * size, grid)
    return None
