from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_host import TOKENS, Plain, registered

import crossget
from crossget.methods.reducers import TowerFacts
from crossget.methods.schedules import as_schedule, planned_tokens

plain = pytest.fixture(registered)


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (4, [20, 16, 12, 8, 5]),  # the last block is asked for 4 but may touch only 6 tokens, and half of those leave
        ((5, 0, 2), [20, 15, 15, 13]),
        (crossget.Linear(6, 0), [20, 14, 11, 11]),
        (crossget.Ratio(0.25), [20, 15, 12, 9]),
        (crossget.RampedRatio(0.25), [20, 18, 14, 11, 9]),
        (crossget.RampedRatio(1.0), [20, 14, 8, 5, 4, 3, 3]),
        (crossget.RampedRatio(0.0), [20, 20]),
        (100, [20, 11, 7, 5]),
        (0, [20, 20]),
    ],
    ids=str,
)
def test_planned_tokens(r: object, expected: list[int]) -> None:
    assert planned_tokens(as_schedule(r), len(expected) - 1, 20, 2) == expected  # type: ignore[arg-type]


def test_the_reference_s_token_counts() -> None:
    """CLIP ViT-B/16 with r = 16, as in the logs of the reference: the last block can give up 10 only."""
    counts = planned_tokens(as_schedule(16), 12, 198, 2)
    assert counts == [198, 182, 166, 150, 134, 118, 102, 86, 70, 54, 38, 22, 12]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30))
def test_linear_goes_from_start_to_end_and_removes_what_its_mean_removes(start: int, end: int, depth: int) -> None:
    schedule = crossget.Linear(start, end)
    counts = [schedule.removed(layer, depth, 1000) for layer in range(depth)]
    assert counts[0] == start
    assert depth == 1 or counts[-1] == end
    assert sorted(counts, reverse=start >= end) == counts
    if depth > 1:
        assert abs(sum(counts) - depth * (start + end) / 2) <= depth / 2


REDUCTIONS = st.one_of(
    st.integers(0, 40),
    st.lists(st.integers(0, 40), min_size=8, max_size=8).map(tuple),
    st.builds(crossget.Linear, st.integers(0, 40), st.integers(0, 40)),
    st.builds(crossget.Ratio, st.floats(0, 0.5)),
    st.builds(crossget.RampedRatio, st.floats(0, 1)),
)


@given(REDUCTIONS, st.integers(1, 64), st.integers(8, 600), st.integers(0, 3))
def test_aligned_counts_are_multiples(r: Any, n: int, tokens: int, n_protected: int) -> None:
    aligned = crossget.Aligned(r, n)
    assert eval(repr(aligned), {**vars(crossget), "Aligned": crossget.Aligned}) == aligned
    counts = planned_tokens(aligned, 8, tokens, n_protected)
    for layer, (before, after) in enumerate(itertools.pairwise(counts)):
        asked = as_schedule(r).removed(layer, 8, before)
        most = (before - n_protected) // 2
        assert after <= before
        assert after == before or after % n == 0 or before - after == most
        assert after == before or after >= n
        if asked == 0:
            assert after == before
        if n == 1:
            assert before - after == min(asked, most)


@given(st.integers(0, 30), st.sampled_from([8, 16, 32, 64]), st.integers(400, 800))
def test_aligned_counts_follow_the_schedule(r: int, n: int, tokens: int) -> None:
    aligned = planned_tokens(crossget.Aligned(r, n), 12, tokens, 1)
    for count, plain in zip(aligned, planned_tokens(as_schedule(r), 12, tokens, 1), strict=True):
        assert abs(count - plain) <= 2 * n or min(count, plain) < 2 * n


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: crossget.Aligned(16, 0), ValueError, "Aligned.n=0.*at least 1"),
        (lambda: crossget.Aligned(16, 0.5), TypeError, "Aligned.n=0.5"),
        (lambda: crossget.Aligned(-1, 16), ValueError, "negative"),
        (lambda: crossget.Aligned(crossget.Keep(0.5), 16), ValueError, "Keep.*multiple=16"),
        (lambda: crossget.Keep(0.5, multiple=0), ValueError, "Keep.multiple=0.*at least 1"),
        (lambda: crossget.Keep(0.5, multiple=True), TypeError, "Keep.multiple=True"),
        (lambda: crossget.ToMe(crossget.Keep(0.5, multiple=4)).resolved(TowerFacts("tower")), ValueError, "connector"),
    ],
)
def test_a_multiple_must_be_a_count(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@given(st.one_of(st.integers(1, 300), st.floats(0.01, 1)), st.integers(1, 64), st.integers(1, 300))
def test_what_stays_behind_a_connector_is_rounded_up(tokens: int | float, multiple: int, features: int) -> None:
    plain, rounded = (features - crossget.Keep(tokens, multiple=n).removed(0, 1, features) for n in (1, multiple))
    assert plain <= rounded < plain + multiple
    assert rounded == features or rounded % multiple == 0


@pytest.mark.parametrize("method", [crossget.ToMe, crossget.CrossGET, crossget.Ward])
@pytest.mark.usefixtures("plain")
def test_a_tower_has_aligned_counts(method: Any) -> None:
    model = Plain(depth=4).eval()
    with torch.no_grad(), crossget.attach(model, method(crossget.Aligned(3, n=4))) as attached:
        model(TOKENS)
    first = 21 if method is crossget.CrossGET else 20  # the cross token counts
    assert attached.tokens["visual"] == [first, 20, 16, 16]


def test_a_list_must_have_one_number_per_block() -> None:
    with pytest.raises(ValueError, match="2 layers.*3 blocks"):
        as_schedule([1, 2]).removed(0, 3, 10)
