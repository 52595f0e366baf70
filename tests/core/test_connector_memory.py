"""The memory that a reduction behind the connector takes: within a budget, with the same choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crossget
from crossget.core.connector import FACTS, reduce_features
from crossget.methods import importance, pairs

N, C, BUDGET = 600, 16, 1 << 15  # all pairs are 360,000
METHODS: dict[str, Any] = {
    "ward": crossget.Ward(1),
    "ward, by attention": crossget.Ward(1, importance="attention"),
    "crossget": crossget.CrossGET(1, ties="stable"),
    "tome": crossget.ToMe(1),
    "ward, bipartite": crossget.Ward(1, matching="ward"),
    "random": crossget.Random(1),
    "average pool": crossget.AveragePool(1),
    "top k": crossget.TopK(1, importance="attention"),
    "max min": crossget.MaxMin(1),
    "determinantal": crossget.Determinantal(1),
}


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements of a tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # What a view returns takes no memory of its own.
        sizes = [
            value.untyped_storage().nbytes() // value.element_size()
            for value in tree_leaves(out)
            if isinstance(value, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_of_all_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    text = torch.randn(C, generator=torch.Generator().manual_seed(1))
    method, k = METHODS[name].resolved(FACTS), N // 12
    with Largest() as whole:
        expected = reduce_features(method, x, k, text=text, grid=(20, 30))
    monkeypatch.setattr(pairs, "BUDGET", BUDGET)
    for limit in ("_CPU_SCORES", "_MAX_SCORES", "_MEAN_SCORES"):
        monkeypatch.setattr(importance, limit, BUDGET)
    with Largest() as bounded:
        found = reduce_features(method, x, k, text=text, grid=(20, 30))
    assert bounded.elements <= max(BUDGET, 2 * k * N)  # 2 k N: the rows of a determinant
    assert torch.equal(found.source, expected.source)
    torch.testing.assert_close(found.tokens, expected.tokens)
    if name not in ("average pool", "determinantal"):
        assert whole.elements > N * N // 5  # so that the budget is what bounds it
