from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import crossget
from crossget.methods.schedules import as_schedule, planned_tokens


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


def test_a_list_must_have_one_number_per_block() -> None:
    with pytest.raises(ValueError, match="2 layers.*3 blocks"):
        as_schedule([1, 2]).removed(0, 3, 10)
