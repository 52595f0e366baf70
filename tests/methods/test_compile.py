"""One compiled graph of a method serves every number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

import crossget
from crossget.methods.importance import attention_received
from crossget.methods.indexing import size_of
from crossget.methods.reducers import Reducer, TowerFacts, View

TOWER = TowerFacts("tower 'visual'")
REDUCERS = [
    crossget.ToMe(1),
    crossget.CrossGET(1, cross_token=False, ties="stable"),
    crossget.CrossGET(1, cross_token=False, ties="torch"),
    crossget.Ward(1),
    crossget.Ward(1, importance="class_attention"),
    crossget.Random(1),
    crossget.TopK(1),
]


def inputs(tokens: int) -> tuple[Tensor, ...]:
    chance = torch.Generator().manual_seed(tokens)
    features = torch.randn(2, tokens, 16, generator=chance)
    queries, keys = torch.randn(2, 2, 2, tokens, 8, generator=chance).unbind(0)
    sizes = torch.randint(1, 4, (2, tokens), generator=chance).float()
    protected = (torch.arange(tokens) < 1).expand(2, tokens)
    return features, queries, keys, torch.rand(2, tokens, generator=chance), sizes, protected


def check(function: Callable[..., Any]) -> None:
    """Compare at several numbers of tokens, for which one graph is compiled."""
    torch._dynamo.reset()
    # Dynamo and AOTAutograd trace the sizes; what Inductor adds is code for them, which takes minutes.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    for tokens in (37, 50, 31, 64, 200):
        torch.testing.assert_close(compiled(*inputs(tokens)), function(*inputs(tokens)))
    assert counter.frame_count == 1


pytestmark = pytest.mark.skipif(TorchVersion(torch.__version__) < "2.8", reason="older compilers fix more sizes")


@pytest.mark.slow
@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_a_method_is_compiled_once_for_all_lengths(reducer: Reducer) -> None:
    resolved = reducer.resolved(TOWER)

    def reduce(*given: Any) -> Any:
        out = resolved.reduce(View(*given, n_protected=1, guide=0), 5)
        assert out is not None
        return out[0], out[1], out[2].index

    check(reduce)


@pytest.mark.slow
def test_the_attention_received_is_compiled_once_for_all_lengths() -> None:
    check(lambda _, queries, keys, *__: attention_received(queries, keys, None, 0.3))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python integer")
def test_sizes_are_symbolic_only_while_compiling() -> None:
    x = torch.zeros(2, 7)
    assert type(size_of(x, 1)) is int
    traced = torch.jit.trace(lambda x: x + size_of(x, 1), x, check_trace=False)
    assert torch.equal(traced(x), x + 7)
    compiled = torch.compile(lambda x: x + size_of(x, 1), dynamic=True, backend="eager")
    torch._dynamo.reset()
    for tokens in (7, 9):
        assert torch.equal(compiled(torch.zeros(2, tokens)), torch.full((2, tokens), float(tokens)))
