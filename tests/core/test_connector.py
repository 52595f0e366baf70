"""The reduction of one unit's features behind the connector, by itself."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import crossget
import reference
from crossget.core.connector import FACTS, AttachedConnector, Connector, reduce_features
from crossget.methods.reducers import Reducer

N, C = 24, 8
MERGING: dict[str, Any] = {
    "ward": crossget.Ward(1),
    "ward, by attention": crossget.Ward(1, importance="attention"),  # the ensemble "normalized"
    "tome": crossget.ToMe(1),
    "random": crossget.Random(1),
    "average pool": crossget.AveragePool(1),
    "crossget": crossget.CrossGET(1),
    "crossget, normalized": crossget.CrossGET(1, ensemble="normalized"),
}
DROPPING: dict[str, Any] = {
    "top k": crossget.TopK(1, importance="attention"),
    "max min": crossget.MaxMin(1),
    "determinantal": crossget.Determinantal(1),
}
METHODS = {name: method.resolved(FACTS) for name, method in (MERGING | DROPPING).items()}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("k", [23, 9, 1])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_wanted_number(name: str, k: int) -> None:
    x, text = random(N, C), random(C)
    unit = reduce_features(METHODS[name], x, k, text=text, grid=(4, 6), recording=True)
    assert unit.tokens.shape == (k, C)
    assert unit.kept.tolist() == sorted(set(unit.kept.tolist()))
    counts = torch.stack([(unit.source == new).sum() for new in range(k)])
    assert torch.equal(unit.source[unit.kept], torch.arange(k))
    record = unit.record
    assert record is not None
    assert torch.equal(record.source, unit.source[None])
    assert torch.equal(record.features, unit.tokens[None])
    assert record.weights is not None
    assert record.weights.shape == (1, N)
    assert record.score is None or record.score.shape == (1, N)
    if name in DROPPING:
        assert torch.equal(unit.tokens, x[unit.kept])
        assert torch.equal(unit.sizes, torch.ones(k))
        assert torch.equal(record.weights[0] > 0, unit.source >= 0)
        return
    assert torch.equal(unit.sizes, counts.float())
    members = torch.nn.functional.one_hot(unit.source, k).T * record.weights  # [k, N]
    torch.testing.assert_close(unit.tokens, members @ x, rtol=0, atol=1e-5)
    if METHODS[name].__dict__.get("ensemble") != "guided":
        torch.testing.assert_close(members.sum(1), torch.ones(k), rtol=0, atol=1e-6)
    expanded = crossget.unmerge(unit.tokens[None], unit.source[None])[0]
    assert torch.equal(expanded, unit.tokens[unit.source])


@pytest.mark.parametrize("name", METHODS)
def test_further_features_are_merged_with_the_same_weights(name: str) -> None:
    x, text, one, two = random(N, C), random(C), random(C, 5), random(C, 3)
    unit = reduce_features(METHODS[name], x, 5, text=text, carried=[x @ one, x @ two])
    for carried, matrix in zip(unit.carried, (one, two), strict=True):
        torch.testing.assert_close(carried, unit.tokens @ matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_protected_features_stay_and_are_not_counted(name: str) -> None:
    x, text = random(N, C), random(C)
    protected = torch.arange(N) % 6 == 5
    unit = reduce_features(METHODS[name], x, 3, text=text, protected=protected, grid=(4, 6))
    assert len(unit.kept) == 3 + 4
    at = torch.isin(unit.kept, protected.nonzero()[:, 0])
    assert int(at.sum()) == 4
    assert torch.equal(unit.tokens[at], x[protected])
    assert torch.equal(unit.sizes[at], torch.ones(4))
    assert unit.source[protected].unique().numel() == 4
    everything = reduce_features(METHODS[name], x, 0, text=text, protected=torch.ones(N, dtype=torch.bool))
    assert torch.equal(everything.tokens, x)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_features_and_no_text(name: str) -> None:
    x, text = random(N, C).requires_grad_(), random(C).requires_grad_()
    unit = reduce_features(METHODS[name], x, 5, text=text, carried=[x * 2])
    (unit.tokens.sum() + unit.carried[0].sum()).backward()
    assert x.grad is not None
    touched = (x.grad.abs().sum(1) > 0).sum()
    assert touched == (5 if name in DROPPING else N)
    assert text.grad is None or not text.grad.any()  # the text guides, and joins nothing


@settings(max_examples=20)
@given(st.integers(2, 20), st.integers(0, 2**31))
def test_crossget_is_guided_by_the_text_of_the_prompt(n: int, seed: int) -> None:
    """Against rounds of loops over the tokens, to which the text is appended as a token."""
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(n, C, generator=generator), torch.randn(C, generator=generator)
    k = 1 + seed % (n - 1)
    unit = reduce_features(crossget.CrossGET(1, ties="stable").resolved(FACTS), x, k, text=text)
    tokens, sizes = torch.cat([x, text[None]]), [1.0] * (n + 1)
    while len(tokens) > k + 1:
        free = len(tokens) - 1
        directions = tokens / tokens.norm(dim=-1, keepdim=True)
        image = reference.Image(
            tokens, sizes, [False] * free + [True], directions @ directions.T,
            reference.guide_importance(directions, tokens, free),
        )  # fmt: skip
        pairs = reference.complete_graph(image, min(free - k, free // 2), True, "stable")
        rows, sizes = reference.ensemble(image, pairs, "guided")
        tokens = rows.float()
    torch.testing.assert_close(unit.tokens, tokens[:-1], rtol=0, atol=1e-4)
    assert unit.sizes.tolist() == sizes[:-1]
    other = reduce_features(crossget.CrossGET(1, ties="stable").resolved(FACTS), x, k, text=-text)
    assert n < 6 or k > n - 2 or not torch.equal(unit.tokens, other.tokens)


def test_a_method_without_a_text_to_guide_it() -> None:
    with pytest.raises(RuntimeError, match="guided by the text of the prompt"):
        reduce_features(METHODS["crossget"], random(N, C), 3)


def test_a_method_that_stops_early() -> None:
    class Stops(Reducer):
        def reduce(self, view: Any, r: int) -> Any:
            return None

    with pytest.raises(RuntimeError, match="cannot reduce 24 features to 3: it left 24"):
        reduce_features(Stops(1), random(N, C), 3)


def test_half_precision_features() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for name, method in METHODS.items():
            unit = reduce_features(method, random(N, C).to(dtype), 3, text=random(C), carried=[random(N, C).to(dtype)])
            assert unit.tokens.dtype == unit.carried[0].dtype == dtype, name
            assert unit.sizes.dtype == torch.float32


# The attached connector ---------------------------------------------------------------------------------------------


class Host(nn.Module):
    """As much of a model as a connector asks for."""

    def get_rope_index(self) -> None: ...


def connector(**settings: Any) -> Connector:
    host = nn.Linear(1, 1)
    return Connector(host, host, {"image": 5}, **{"attentions": [], **settings})


@pytest.mark.parametrize(
    ("keep", "settings", "message"),
    [
        (crossget.Keep(3, separators=True), {}, "no separators"),
        (crossget.Keep(3, per="image"), {"units": "run"}, "which tiles are of one image"),
        (crossget.Keep(3, positions="renumbered"), {"parts": Host()}, "positions are those of the image grid"),
    ],
    ids=str,
)
def test_what_a_connector_cannot_do_is_refused(keep: Any, settings: dict[str, Any], message: str) -> None:
    parts = settings.pop("parts", None)
    place = connector(**settings)
    place.parts = parts or place.parts
    with pytest.raises(ValueError, match=message):
        AttachedConnector(place, crossget.Ward(keep))
    attached = AttachedConnector(place, crossget.Ward(crossget.Keep(3)))
    with pytest.raises(ValueError, match=message):
        attached.set_reducer(crossget.Ward(keep))
    assert attached.reducer.r == crossget.Keep(3)


@pytest.mark.parametrize(
    "method",
    [crossget.ToMe(4, keys="mean_heads"), crossget.Ward(4, keys="tokens"), crossget.CrossGET(4, keys="all_heads"),
     crossget.TopK(4, importance="cross_token", cross_token=True, keys="all_heads")],
)  # fmt: skip
def test_features_have_no_keys(method: Any) -> None:
    with pytest.raises(ValueError, match="has no effect on the connector: image features are compared as they are"):
        AttachedConnector(connector(), method)
    resolved = AttachedConnector(connector(), dataclasses.replace(method, keys=None)).reducer
    assert AttachedConnector(connector(), resolved).reducer == resolved  # as after save and load


def test_sizes_need_scores_in_every_layer() -> None:
    method = crossget.Ward(crossget.Keep(3), proportional_attention=True)
    with pytest.raises(ValueError, match="those of Linear take none: no scores; or leave it out"):
        AttachedConnector(connector(attentions="no scores"), method)
    AttachedConnector(connector(), method)


@pytest.mark.parametrize(
    ("r", "kept"),
    [
        (crossget.Keep(5), 5),
        (crossget.Keep(5, multiple=4), 8),
        (crossget.Keep(0.5), 12),
        (4, 20),
        (crossget.Ratio(0.25), 18),
        (99, 1),
    ],
)
def test_how_many_stay_with_each_schedule(r: Any, kept: int) -> None:
    attached = AttachedConnector(connector(), crossget.Ward(r))
    unit = attached.reduce(random(N, C), text=None, separators=None, grid=None, carried=[])
    assert len(unit.kept) == kept


# What the host returns -------------------------------------------------------------------------------------------


def test_determinantal_keeps_more_tokens_than_there_are_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(60, 4, generator=generator), torch.randn(4, generator=generator)
    reducer = crossget.Determinantal(crossget.Keep(0.5)).resolved(FACTS)
    unit = reduce_features(reducer, features, 30, text=text)
    assert len(unit.kept.unique()) == 30
    assert torch.equal(unit.tokens, features[unit.kept])


def test_features_for_layers_alone() -> None:
    layers = [(2, [torch.ones(3, 4), torch.zeros(2, 4)]), (5, [torch.full((3, 4), 2.0), torch.zeros(2, 4)])]
    connector = Connector(None, None, {"image": 9}, field="deepstack_features")
    out = SimpleNamespace(deepstack_features=layers)
    assert [len(entry) for entry in connector.features(out)] == [3, 2]
    new = connector.replaced(out, torch.ones(3, 4), [layer[[0, 1, 3]] for layer in connector.layers(out)], [2, 1])
    assert [number for number, _ in new.deepstack_features] == [2, 5]
    assert [len(part) for part in new.deepstack_features[1][1]] == [2, 1]
    assert out.deepstack_features is layers
    assert len(layers[0][1][0]) == 3


def test_a_tensor_keeps_its_axes() -> None:
    connector = Connector(None, None, {"image": 9})
    out = SimpleNamespace(pooler_output=torch.zeros(3, 2, 4, 8), deepstack_features=None)
    assert [len(entry) for entry in connector.features(out)] == [8] * 3
    assert connector.replaced(out, torch.zeros(12, 8), [], [6, 6]).pooler_output.shape == (2, 2, 3, 8)
    assert connector.replaced(out, torch.zeros(11, 8), [], [6, 5]).pooler_output.shape == (1, 11, 8)
