"""Inputs that no photograph gives: NaN, an empty batch, other dtypes, a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_host import TOKENS, Plain, registered

import crossget
from crossget.methods.reducers import Reducer

plain = pytest.fixture(autouse=True)(registered)

METHODS = [
    crossget.CrossGET(3),
    crossget.CrossGET(3, ties="stable", ensemble="normalized"),
    crossget.CrossGET(3, importance="attention"),
    crossget.ToMe(3),
    crossget.Ward(3),
    crossget.Ward(3, matching="ward"),
    crossget.Ward(3, importance="class_attention"),
    crossget.TopK(3),
    crossget.Random(3),
]


def model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return Plain(attention=attention).eval()


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
def test_an_image_of_nan_is_nan_alone(reducer: Reducer) -> None:
    host = model()
    broken = torch.cat([TOKENS[:1], TOKENS[:1] * torch.nan, TOKENS[1:]])
    with torch.no_grad(), crossget.attach(host, reducer):
        out = host(broken)
        whole = host(torch.cat([TOKENS[:1], TOKENS[:1], TOKENS[1:]]))
    assert torch.equal(out[[0, 2]], whole[[0, 2]])
    assert out[1].isnan().all()


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
@pytest.mark.parametrize("attention", ["sdpa", "mha", "mha_weights", "eager"])
def test_an_empty_batch(reducer: Reducer, attention: str) -> None:
    host = model(attention)
    with torch.no_grad(), crossget.attach(host, reducer) as attached:
        assert host(TOKENS[:0]).shape == (0, 32)
        empty = attached.tokens
        host(TOKENS)
        assert attached.tokens == empty


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(reducer: Reducer, dtype: torch.dtype) -> None:
    host = model().to(dtype)
    with torch.no_grad(), crossget.attach(host, reducer):
        out = host(TOKENS.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_computes_what_the_model_computes(reducer: Reducer) -> None:
    host = model()
    with torch.no_grad(), crossget.attach(host, reducer):
        expected = host(TOKENS)
        traced = torch.jit.trace(host, (TOKENS,), check_trace=False)
        torch.testing.assert_close(traced(TOKENS), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(traced(TOKENS.flip(0)), host(TOKENS.flip(0)), rtol=1e-5, atol=1e-6)
