"""Blocks that are compiled one by one share their graphs: nothing inside a block depends on its layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plain_host import TOKENS, Plain, registered

import crossget
from contract import COMPILES
from crossget.methods.reducers import Reducer

plain = pytest.fixture(autouse=True)(registered)


@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
@pytest.mark.parametrize(
    "reducer",
    [
        crossget.ToMe(2),
        *(pytest.param(method(2), marks=pytest.mark.slow) for method in (crossget.CrossGET, crossget.Ward)),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
def test_a_stack_has_at_most_three_graphs(reducer: Reducer) -> None:
    """One for the first block, whose tokens have no sizes yet, one for those in the middle, and one for the last."""
    torch.manual_seed(0)
    model = Plain(depth=6).eval()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad(), crossget.attach(model, reducer) as attached:
        expected = model(TOKENS)
        tokens = attached.tokens
        torch._dynamo.reset()
        for block in model.stages:
            block.compile(backend=backend, dynamic=True, fullgraph=True)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert attached.tokens == tokens
        assert 1 <= len(graphs) <= 3
        before = len(graphs)
        model(torch.cat([TOKENS, TOKENS[:1] + 1]))  # another batch size
        model(TOKENS[:, :17].contiguous())  # another image size
        attached.reducer = dataclasses.replace(reducer, r=1)
        model(TOKENS)
        assert attached.tokens["visual"] != tokens["visual"]
        assert len(graphs) == before
