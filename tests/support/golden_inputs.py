"""The rule by which the weights and inputs behind the recorded outputs in golden/ follow from their names."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def array(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)).astype("float32"))


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    z = array(name, shape, seed)
    if name.endswith("logit_scale"):
        return torch.full(shape, math.log(1 / 0.07))
    if "cross_" in name:
        return 0.5 * z
    if len(shape) == 1:
        return 1 + 0.1 * z if name.endswith(".weight") else 0.1 * z
    return z / math.sqrt(math.prod(shape[1:]))
