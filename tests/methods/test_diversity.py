"""Methods that choose the tokens that stay: against loops over numbers, without any of their code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import crossget
from crossget.methods.reducers import Reduced, Reducer, TowerFacts, View

CHOOSING: list[type[Reducer]] = [crossget.MaxMin, crossget.Determinantal]
METHODS = [*CHOOSING, crossget.AveragePool]
PLACE = TowerFacts(
    "the connector", has_class_token=False, keeps_cross_token=False, corrects_norms=False, connector=True
)


@dataclass
class Similarity:
    """Cosines with a text [C]."""

    text: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.cosine_similarity(tokens, self.text, dim=-1)


@st.composite
def views(draw: Any, padded: bool = False) -> tuple[View, int]:
    """Tokens of a batch, and how many of them leave. The dimension is above their number: no determinant is 0."""
    batch, tokens, prefix = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, text = torch.randn(batch, tokens, 16, generator=generator), torch.randn(16, generator=generator)
    protected = (torch.arange(tokens) < prefix).expand(batch, tokens)
    sizes = None if draw(st.booleans()) else torch.randint(1, 9, (batch, tokens), generator=generator).float()
    valid = None
    if padded:
        valid = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    view = View(
        x, x[:, None], x[:, None], None, sizes, protected, min(prefix, tokens), valid, relevance=Similarity(text),
        beyond_half=draw(st.booleans()),
    )  # fmt: skip
    return view, draw(st.integers(1, 12))


def most(view: View) -> int:
    """The largest number of tokens that may leave."""
    free = view.tokens.shape[1] - view.n_protected
    return free - 1 if view.beyond_half and view.valid is None else free // 2


def unit(tokens: Tensor) -> Any:
    wide = tokens.double().numpy()
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def max_min(view: View, row: int, allowed: list[int], count: int) -> list[int]:
    x = unit(view.tokens[row])
    chosen = [i for i in range(len(x)) if view.protected[row, i]]
    while len(chosen) < count:
        others = {
            i: [1 - float(x[i] @ x[j]) for j in (chosen or range(len(x))) if j != i] for i in allowed if i not in chosen
        }
        chosen.append(max(others, key=lambda i: min(others[i], default=2.0)))
    return sorted(chosen)


def determinantal(view: View, row: int, allowed: list[int], count: int) -> list[int]:
    x, text = unit(view.tokens[row]), unit(view.relevance.text[None])[0]  # type: ignore[union-attr]
    cosines = [float(token @ text) for token in x]
    span = max(1e-6, max(cosines) - min(cosines))
    weights = [(value - min(cosines)) / span for value in cosines]

    def volume(places: list[int]) -> float:
        kernel = [[weights[i] * float(x[i] @ x[j]) * weights[j] for j in places] for i in places]
        return float(np.linalg.det(np.array(kernel)))

    chosen = [i for i in range(len(x)) if view.protected[row, i]]
    while len(chosen) < count:
        open_places = [i for i in allowed if i not in chosen]
        chosen.append(max(open_places, key=lambda i: volume([*chosen, i])))
    return sorted(chosen)


ORACLES = {crossget.MaxMin: max_min, crossget.Determinantal: determinantal}


@pytest.mark.parametrize("method", CHOOSING)
@settings(max_examples=40)
@given(views())
def test_the_tokens_that_stay_are_those_of_a_loop(method: type[Reducer], case: tuple[View, int]) -> None:
    view, r = case
    if method is crossget.Determinantal and view.n_protected:  # the least relevant token may be protected: volume 0
        view.n_protected, view.protected = 0, torch.zeros_like(view.protected)
    reduced = method(r).reduce(view, r)
    r = min(r, most(view))
    if r <= 0:
        assert reduced is None
        return
    assert reduced is not None
    tokens, sizes, plan = reduced
    count = view.tokens.shape[1]
    for row in range(len(view.tokens)):
        kept = plan.kept[row].tolist()
        assert kept == ORACLES[method](view, row, list(range(count)), count - r)
        assert torch.equal(tokens[row], view.tokens[row, kept])
        assert (sizes is None) == (view.sizes is None)
        if sizes is not None and view.sizes is not None:
            assert torch.equal(sizes[row], view.sizes[row, kept])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(views(padded=True))
def test_a_padded_row_loses_what_it_loses_alone(method: type[Reducer], case: tuple[View, int]) -> None:
    view, r = case
    reduced = method(r).reduce(view, r)
    r = min(r, most(view))
    if r <= 0:
        assert reduced is None
        return
    assert reduced is not None
    assert view.valid is not None
    tokens, _, plan = reduced
    for row in range(len(tokens)):
        assert len(set(plan.source[row].tolist())) == r
        real = view.valid[row] | view.protected[row]
        alone = dataclasses.replace(
            view, tokens=view.tokens[row, real][None], protected=view.protected[row, real][None], valid=None,
            sizes=None if view.sizes is None else view.sizes[row, real][None], beyond_half=False,
        )  # fmt: skip
        expected = method(r).reduce(alone, r)
        wanted = alone.tokens if expected is None else expected[0]
        left = tokens[row, real[plan.kept[row]]]
        torch.testing.assert_close(left, wanted[0], atol=1e-6, rtol=1e-5)


def pooled(reduced: Reduced | None, view: View) -> list[list[int]]:
    """The members of each new token, which is their mean weighted by size."""
    assert reduced is not None
    tokens, sizes, plan = reduced
    members = [(plan.index[0] == new).nonzero()[:, 0].tolist() for new in range(tokens.shape[1])]
    weights = view.sizes_or_ones()[0]
    for new, group in enumerate(members):
        mean = np.average(view.tokens[0, group].numpy(), axis=0, weights=weights[group].numpy())
        assert np.abs(tokens[0, new].numpy() - mean).max() < 1e-5
        assert sizes is not None
        assert sizes[0, new] == weights[group].sum()
    return members


@pytest.mark.parametrize("height", [1, 2, 5, 6])
def test_average_pooling_gives_the_wanted_number_of_rectangles(height: int) -> None:
    for width in range(1, 7):
        n = height * width
        x, sizes = torch.randn(1, n, 4), torch.randint(1, 5, (1, n)).float()
        for k in range(1, n):
            view = View(
                x, x[:, None], x[:, None], None, sizes, torch.zeros(1, n, dtype=torch.bool), 0, grid=(height, width),
                beyond_half=True,
            )  # fmt: skip
            groups = pooled(crossget.AveragePool(1).reduce(view, n - k), view)
            assert len(groups) == k
            areas = []
            for group in groups:
                rows, columns = sorted({i // width for i in group}), sorted({i % width for i in group})
                assert group == [row * width + column for row in rows for column in columns]  # a rectangle ..
                assert rows == list(range(rows[0], rows[-1] + 1))  # .. without holes
                assert columns == list(range(columns[0], columns[-1] + 1))
                areas.append(len(group))
            assert sum(areas) == n
            assert max(areas) <= 4 * n / k  # none is much larger than the others


@settings(max_examples=40)
@given(views())
def test_average_pooling_without_a_grid_pools_runs(case: tuple[View, int]) -> None:
    view, r = case
    view = View(
        view.tokens[:1], view.queries[:1], view.keys[:1], None, None, view.protected[:1], view.n_protected,
        beyond_half=True,
    )  # fmt: skip
    free, prefix = view.tokens.shape[1] - view.n_protected, view.n_protected
    r = min(r, free - 1)
    if r <= 0:
        assert crossget.AveragePool(1).reduce(view, 1) is None
        return
    groups = pooled(crossget.AveragePool(1).reduce(view, r), view)
    assert [place for group in groups for place in group] == list(range(prefix + free))
    assert groups[:prefix] == [[place] for place in range(prefix)]
    lengths = [len(group) for group in groups[prefix:]]
    assert len(lengths) == free - r
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_block_of_a_tower_gives_up_half_of_its_tokens_at_most(method: type[Reducer]) -> None:
    x = torch.randn(1, 9, 4)
    view = partial(View, x, x[:, None], x[:, None], None, None, torch.arange(9)[None] < 1, 1)
    reduced = method(8).reduce(view(relevance=Similarity(torch.randn(4))), 8)
    assert reduced is not None
    assert reduced[0].shape[1] == 5
    assert reduced[2].kept[0, 0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_tokens_that_stay(method: type[Reducer]) -> None:
    x = torch.randn(1, 8, 4, requires_grad=True)
    view = View(
        x, x[:, None], x[:, None], None, None, torch.zeros(1, 8, dtype=torch.bool), 0,
        relevance=Similarity(torch.randn(4)),
    )  # fmt: skip
    reduced = method(4).reduce(view, 4)
    assert reduced is not None
    reduced[0].sum().backward()
    assert x.grad is not None
    touched = int((x.grad.abs().sum(-1) > 0).sum())
    assert touched == (8 if method is crossget.AveragePool else 4)


def test_more_tokens_than_dimensions() -> None:
    """Any four tokens span the space: behind them the most relevant ones stay."""
    x, text = torch.randn(1, 20, 4), torch.randn(4)
    cosines = Similarity(text)(x)[0]
    view = View(
        x, x[:, None], x[:, None], None, None, torch.zeros(1, 20, dtype=torch.bool), 0, relevance=Similarity(text),
        beyond_half=True,
    )  # fmt: skip
    first = determinantal(view, 0, list(range(20)), 4)
    for k in (5, 12, 19):
        reduced = crossget.Determinantal(1).reduce(view, 20 - k)
        assert reduced is not None
        others = [i for i in cosines.argsort(descending=True).tolist() if i not in first]
        assert reduced[2].kept[0].tolist() == sorted(first + others[: k - 4])


def test_a_determinant_needs_a_text() -> None:
    x = torch.randn(1, 8, 4)
    view = View(x, x[:, None], x[:, None], None, None, torch.zeros(1, 8, dtype=torch.bool), 0)
    with pytest.raises(RuntimeError, match="text of the prompt, and there is none"):
        crossget.Determinantal(2).reduce(view, 2)
    with pytest.raises(ValueError, match="on tower 'visual' none is known.*connector"):
        crossget.Determinantal(2).resolved(TowerFacts("tower 'visual'"))


# Keep -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 50))
def test_a_number_keeps_that_many_or_all(tokens: int, features: int) -> None:
    assert features - crossget.Keep(tokens).removed(0, 1, features) == min(tokens, features)


@settings(max_examples=40)
@given(st.floats(0.001, 1.0), st.integers(1, 50))
def test_a_share_keeps_at_least_one(share: float, features: int) -> None:
    kept = features - crossget.Keep(share).removed(0, 1, features)
    assert 1 <= kept <= features
    assert kept == max(1, round(share * features))
    assert crossget.Keep(1.0).removed(0, 1, features) == 0


def test_integers_and_floats_of_other_libraries() -> None:
    assert crossget.Keep(np.int64(5)) == crossget.Keep(5)
    assert crossget.Keep(np.float32(0.5)) == crossget.Keep(0.5)
    assert crossget.Keep(1) != crossget.Keep(1.0)  # one token, and all of them
    assert type(crossget.Keep(np.int64(5)).tokens) is int


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "at least one"),
        ((-3,), ValueError, "at least one"),
        ((0.0,), ValueError, "above 0"),
        ((1.5,), ValueError, "write an int"),
        ((float("nan"),), ValueError, "above 0"),
        ((True,), TypeError, "number of tokens"),
        (("8",), TypeError, "number of tokens"),
        ((None,), TypeError, "number of tokens"),
        ((8, "tile"), ValueError, "'unit', 'image'"),
        ((8, "unit", 1), TypeError, "True or False"),
        ((8, "unit", False, "kept"), ValueError, "'original', 'renumbered'"),
    ],
    ids=str,
)
def test_wrong_numbers_to_keep(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        crossget.Keep(*arguments)


def test_keep_is_refused_in_towers() -> None:
    with pytest.raises(ValueError, match=r"connector.*Ward\(Keep\(8\)\)"):
        crossget.Ward(crossget.Keep(8)).resolved(TowerFacts("tower 'visual'"))


@pytest.mark.parametrize("method", [crossget.Ward, crossget.ToMe, crossget.Random, crossget.AveragePool])
def test_sizes_are_off_behind_the_connector_and_on_in_a_tower(method: type[Reducer]) -> None:
    behind, tower = method(crossget.Keep(8)).resolved(PLACE), method(8).resolved(TowerFacts("tower 'visual'"))
    assert (behind.proportional_attention, tower.proportional_attention) == (False, True)
    assert (behind.norm_correction, tower.norm_correction) == (False, method is crossget.Ward)
    asked: Any = method
    assert asked(crossget.Keep(8), proportional_attention=True).resolved(PLACE).proportional_attention is True
    with pytest.raises(ValueError, match="norm_correction=True.*no effect"):
        asked(crossget.Keep(8), norm_correction=True).resolved(PLACE)
