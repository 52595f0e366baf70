"""How many pairs change, and how much of the result, when tokens are compared with fewer digits or fewer channels.

In every block both matchings choose on the same tokens, the exact one (all channels, float32) and the coarse one. The
coarse pairs are merged, so that features and their distance from the dense model's show what the choice costs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

import crossget
from crossget.methods.matching import (
    MATCHINGS,
    Candidates,
    MergePlan,
    WardSimilarity,
    _bipartite_by,
    _complete_graph_by,
)
from crossget.methods.merging import size
from crossget.methods.pairs import Similarity
from crossget.methods.reducers import Merging, Reduced, View
from crossget.methods.schedules import Schedule
from experiments.ablation.run import described
from experiments.lib.files import Json, check_names
from experiments.lib.study import Study
from experiments.real.clip import Measuring, classified, encode
from experiments.real.presets import ROWS, fit

Rounding = Literal["none", "vectors", "similarities"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Coarse(Merging):
    """Size-weighted merging whose matching sees less of the tokens; it counts the pairs of the exact matching it finds.

    Args:
        rounding: what is rounded to bfloat16: nothing, the vectors that are compared, or these and their similarities.
        channels: how many channels of the vectors are compared, evenly spread; None: all.
        found: of each call, the share of the exact matching's pairs that are merged; appended to.
    """

    rounding: Rounding = "none"
    channels: int | None = None
    found: list[float] = field(default_factory=list, compare=False)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            exact = self._candidates(view, self._compared(view))
            r = exact.limit(r)
            if r == 0:
                return None
            pairs = self._coarse(view, r)
            self.found.append(shared_pairs(MATCHINGS[self.matching](exact, r, None), pairs))
            plan = MergePlan(*pairs, view.tokens.shape[1])
        sizes = view.sizes_or_ones()
        tokens, sizes = size(view.tokens, sizes, sizes, plan)
        return tokens, sizes, plan

    def _compared(self, view: View) -> Tensor:
        """[B, T, C] the vectors that tokens are compared by, with all channels."""
        if self.keys == "tokens":
            return view.tokens
        return view.keys.mean(1) if self.keys == "mean_heads" else view.keys.transpose(1, 2).flatten(2)

    def _candidates(self, view: View, vectors: Tensor) -> Candidates:
        return Candidates(
            vectors, view.protected, view.n_protected, view.valid, ties=self.ties or "torch", sizes=view.sizes,
            wanted=view.wanted,
        )  # fmt: skip

    def _coarse(self, view: View, r: int) -> tuple[Tensor, Tensor]:
        """Sources and destinations of the coarse matching."""
        vectors = self._compared(view)
        if self.channels is not None:
            if self.channels > vectors.shape[2]:
                raise ValueError(f"channels={self.channels}: the vectors that are compared have {vectors.shape[2]}")
            vectors = vectors[:, :, :: vectors.shape[2] // self.channels]
        if self.rounding != "none":
            vectors = vectors.bfloat16()
        candidates = self._candidates(view, vectors)
        if self.rounding != "similarities":
            return MATCHINGS[self.matching](candidates, r, None)
        similar = WardSimilarity(candidates, None) if self.matching == "ward_graph" else candidates.cosines
        match = _bipartite_by if self.matching == "bipartite" else _complete_graph_by
        return match(candidates, rounded(similar), r)


def rounded(similar: Similarity) -> Similarity:
    """Return a similarity whose values are rounded to bfloat16."""
    return lambda rows, columns: similar(rows, columns).bfloat16().float()


def shared_pairs(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return which share of a matching's pairs are another's, whichever token of a pair is the source.

    Args:
        one: sources and destinations [B, r].
        other: likewise.
    """
    first, second = (torch.stack(pairs).sort(0).values for pairs in (one, other))
    same = (first[:, :, :, None] == second[:, :, None, :]).all(0)
    return float(same.any(2).double().mean())


METHODS: dict[str, tuple[Coarse, tuple[int, ...]]] = {
    "tome": (Coarse(0, matching="bipartite", keys="mean_heads"), (32, 16, 8)),
    "complete_graph": (Coarse(0, keys="all_heads"), (384, 64, 32, 16)),
    "ward": (
        Coarse(0, matching="ward_graph", keys="tokens", ties="stable", norm_correction=True, class_token_only=None),
        (384, 64, 32, 16),
    ),
}
"""By row of `presets.ROWS`: the same method with exact comparisons, and numbers of channels to compare instead."""


@dataclass(frozen=True)
class Run:
    """A method whose comparisons are rounded, or of fewer channels."""

    task: str
    preset: str
    rounding: Rounding
    channels: int | None

    @property
    def slug(self) -> str:
        """The result file's name."""
        channels = "" if self.channels is None else f"_{self.channels}"
        return f"{self.task}/{self.preset}_{self.rounding}{channels}"


@dataclass(frozen=True, kw_only=True)
class Options(Measuring):
    """What to measure, and with what."""

    presets: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    roundings: tuple[Rounding, ...] = ("none", "vectors", "similarities")
    """What is rounded to bfloat16, with all channels."""
    channels: tuple[int, ...] = (384, 64, 32, 16, 8)
    """Numbers of channels to compare without rounding, of those that suit a method."""
    budget: int = 58
    """Multiply-adds of the method as it is, in % of the dense model's; all its runs remove the same tokens."""
    limit: int = 100
    """So many of the odd photographs, evenly spread over the sorted list."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a method does not exist.
    """
    check_names("presets", options.presets, METHODS)
    return [
        run
        for name in options.presets
        for run in (
            *(Run("precision", name, rounding, None) for rounding in options.roundings),
            *(Run("precision", name, "none", count) for count in METHODS[name][1] if count in options.channels),
        )
    ]


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    loaded = options.load().part("odd", options.limit)
    tower, pixels = loaded.tower, loaded.images.pixels
    dense = encode(tower, pixels, options.batch, options.device)
    given = {**options.given(loaded), "half": "odd", "n": len(pixels), "budget": options.budget}

    @cache
    def fitted(name: str) -> Schedule:
        """The schedule of the row, which all its runs share."""
        return fit(tower, pixels[:1].to(options.device), ROWS[name], options.budget).schedule

    def measured(run: Run) -> Json:
        method = replace(
            METHODS[run.preset][0], r=fitted(run.preset), rounding=run.rounding, channels=run.channels, found=[]
        )
        with crossget.attach(tower, method) as attached:
            (resolved,) = attached.reducers.values()
            features = encode(tower, pixels, options.batch, options.device)
        assert isinstance(resolved, Coarse)
        shared = 100 * sum(resolved.found) / len(resolved.found)
        reducer = {key: value for key, value in (described(method) or {}).items() if key != "found"}
        config = {**asdict(run), "reducer": reducer, **given}
        return {"run": config, "result": {**classified(features, dense, loaded), "shared": round(shared, 4)}}

    return measured


def select(run: Run) -> dict[str, tuple[str | int, ...]]:
    """Return the options that choose one run alone."""
    if run.channels is None:
        return {"presets": (run.preset,), "roundings": (run.rounding,), "channels": ()}
    return {"presets": (run.preset,), "roundings": (), "channels": (run.channels,)}


STUDY = Study("real-precision", Options, grid, load, select)
