"""Paired statistics: bootstrap intervals of differences and ratios of two measurements of the same items."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def times(self, factor: float) -> "Interval":
        """Return the same in another unit; the factor is positive."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


def paired_bootstrap(values: Values, reference: Values, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Return the mean difference of two measurements of the same items and its percentile bootstrap interval.

    Args:
        values: [n], one value per item.
        reference: [n], the same items in the same order.
        resamples: how often the items are drawn anew, with replacement.
        level: confidence level.

    Raises:
        ValueError: the two do not have the same items.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values need the same items, got {values.shape} and {reference.shape}")
    difference = values - reference
    n = len(difference)
    counts, weights = _resampled(n, resamples), difference[:, None]
    # Items that do not differ add nothing, and most marks of right answers do not.
    differs = np.flatnonzero(difference)
    if len(differs) < n / 2:
        counts, weights = counts[:, differs], weights[differs]
    means = _weighted_sums(counts, weights)[:, 0] / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def paired_ratio(values: Values, reference: Values, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Return the ratio of two means over the same items, as `paired_bootstrap` does their difference.

    Raises:
        ValueError: the two do not have the same items.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values need the same items, got {values.shape} and {reference.shape}")
    both = np.stack([values, reference], 1)
    sums = _weighted_sums(_resampled(len(values), resamples), both)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean() / reference.mean()), float(low), float(high))


Seeds = Mapping[int | None, Values]
"""Values per item, by the seed that gave them; None: no seed took part, so that they stand beside any."""


def compare_seeds(one: Seeds, other: Seeds) -> Interval | None:
    """Return the paired bootstrap of two rows over the seeds that both have, averaged; None if they share none.

    What is trained from the same start and in the same order differs by less than what is not, and a row with fewer
    seeds must not be compared with the others' seeds.
    """
    seeds = sorted(({*one} | {*other}) - {None}, key=str)
    shared = [seed for seed in seeds or [None] if all(seed in row or None in row for row in (one, other))]
    if not shared:
        return None
    means = [np.mean([row[seed] if seed in row else row[None] for seed in shared], 0) for row in (one, other)]
    return paired_bootstrap(means[0], means[1])


def _weighted_sums(counts: npt.NDArray[np.uint8], weights: Values) -> Values:
    """Return for each resample the sum of the items' weights, each as often as the item is drawn.

    Args:
        counts: [resamples, n].
        weights: [n, columns].

    Returns:
        [resamples, columns].
    """
    # In pieces that fit a cache, widened by hand: numpy's product of mixed types is many times slower.
    pieces = np.array_split(counts, max(1, len(counts) // 100))
    return np.concatenate([piece.astype(np.float64) @ weights for piece in pieces])


@functools.lru_cache(maxsize=4)
def _resampled(n: int, resamples: int) -> npt.NDArray[np.uint8]:
    """How often each item is drawn, [resamples, n]: the same draws for all comparisons, on every machine."""
    chance = np.random.default_rng(0)
    counts = np.empty((resamples, n), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(chance.integers(0, n, n), minlength=n)
    return counts
