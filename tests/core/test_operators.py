"""The operators that a step of a reducer takes: few, and none for which the CPU waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from plain_host import TOKENS, Plain, registered
from torch.utils._python_dispatch import TorchDispatchMode

import crossget
from crossget.methods.reducers import Reducer

plain = pytest.fixture(autouse=True)(registered)
# The CPU waits for the device where a shape, or a value in Python, depends on values.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, by name. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in results):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def operators(model: Plain, dtype: torch.dtype = torch.float32) -> Counter[str]:
    with torch.no_grad(), Operators() as mode:
        model(TOKENS.to(dtype))
    return mode.counts


@pytest.mark.parametrize(
    ("reducer", "most"),
    [
        (crossget.ToMe(0), 2),
        (crossget.ToMe(2), 52),
        (crossget.CrossGET(2), 86),
        (crossget.CrossGET(2, importance="attention"), 95),
        (crossget.Ward(2, class_token_only=False), 105),
        (crossget.Ward(2, class_token_only=False, norm_correction=False), 88),
    ],
    ids=repr,
)
def test_a_step_takes_few_operators(reducer: Reducer, most: int) -> None:
    """What a compiler spends its time on, and what an eager model waits for at batch 1."""
    model = Plain(depth=4).eval()
    dense = operators(model)
    with crossget.attach(model, reducer):
        reduced = operators(model)
    assert dense.total() > 4 * 4
    assert (reduced.total() - dense.total()) / 4 <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "reducer",
    [
        crossget.ToMe(crossget.Aligned(2, n=4)),
        crossget.CrossGET(2),
        crossget.Ward(2),
        crossget.Ward(crossget.Ratio(0.2), importance="class_attention"),
        crossget.TopK(2),
        crossget.Random(2),
        crossget.MaxMin(2),
        crossget.AveragePool(2),
    ],
    ids=repr,
)
def test_no_operator_makes_the_cpu_wait(reducer: Reducer, dtype: torch.dtype) -> None:
    model = Plain(depth=3).eval().to(dtype)
    with crossget.attach(model, reducer):
        counts = operators(model, dtype)
    assert counts["aten::addmm"] > 0
    assert not WAITS.intersection(counts)
