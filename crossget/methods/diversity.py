"""Methods that choose the tokens that stay: by their distances, by a determinant, or by pooling of the image grid.

They are baselines of the literature on image tokens behind the connector of a model of images and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods import pairs
from crossget.methods.indexing import size_of, take
from crossget.methods.matching import Candidates, MergePlan
from crossget.methods.merging import size
from crossget.methods.reducers import Joining, Reduced, Reducer, TowerFacts, View


@dataclass(frozen=True, kw_only=True, repr=False)
class MaxMin(Reducer):
    """Diversity pruning: each further token that stays is the one whose most similar staying token is least similar.

    The first one is the token whose most similar other token is least similar. Distances are 1 - cosine.

    Args: as for `Reducer`.

    Source: DivPrune (CVPR 2025, https://arxiv.org/abs/2503.02175), section 3.2: the max-min diversity problem.
    """

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            units = F.normalize(view.tokens.float(), dim=-1)

            def step(nearest: Tensor, new: Tensor, first: bool) -> Tensor:
                added = 1 - _cosines(units, new)
                return added if first else torch.minimum(nearest, added)

            plan = _plan(view, r, _nearest(units, view.valid), step)
        return _dropped(view, plan)


@dataclass(frozen=True, kw_only=True, repr=False)
class Determinantal(Reducer):
    """Pruning by a determinantal point process that is conditioned on a text.

    The tokens that stay are a greedy maximum of the determinant of relevance_i * cosine_ij * relevance_j. The relevance
    of a token is its cosine with the text of the prompt, scaled to [0, 1] over the tokens. So the method is for image
    features behind the connector alone. Once the determinant is 0 whatever is added, the most relevant tokens stay.

    Args: as for `Reducer`.

    Source: CDPruner (NeurIPS 2025, https://arxiv.org/abs/2506.10967), section 3; the greedy maximum is that of Chen et
    al. (NeurIPS 2018, https://arxiv.org/abs/1709.05135), algorithm 1.
    """

    @property
    def needs_text(self) -> bool:
        return True

    def check(self, tower: TowerFacts) -> None:
        if not tower.connector:
            raise ValueError(
                f"Determinantal compares tokens with the prompt, and on {tower.name} none is known: use it behind the "
                'connector of a model of images and text, as in {"connector": Determinantal(crossget.Keep(64))}'
            )

    def reduce(self, view: View, r: int) -> Reduced | None:
        if view.relevance is None:
            raise RuntimeError(
                "Determinantal compares tokens with the text of the prompt, and there is none beside the image: use "
                "another method"
            )
        with torch.no_grad():
            units = F.normalize(view.tokens.float(), dim=-1)
            relevance = view.relevance(view.tokens).float()
            if view.valid is not None:  # padding takes the place of the first token, which is real or protected
                relevance = relevance.where(view.valid | view.protected, relevance[:, :1])
            low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
            relevance = (relevance - low) / (high - low).clamp(min=1e-6)
            view.score = relevance
            own = relevance.square() * units.square().sum(-1)
            least = 1e-6 * own  # a gain below it is a rounding error: the token lies in the span of those that stay
            factor, count = own.new_empty(len(own), 64, size_of(own, 1)), 0  # rows of the Cholesky factor

            def step(gains: Tensor, new: Tensor, first: bool) -> Tensor:
                nonlocal factor, count
                at = new[:, None]
                row = relevance * _cosines(units, new) * relevance.gather(1, at)
                before = factor[:, :count]
                row = row - (before.gather(2, at[:, None].expand(-1, count, 1)).transpose(1, 2) @ before)[:, 0]
                gain = gains.gather(1, at)
                row = torch.where(gain > least.gather(1, at), row / gain.sqrt(), 0)
                if count == size_of(factor, 1):
                    factor = torch.cat([factor, torch.empty_like(factor)], 1)
                factor[:, count], count = row, count + 1
                return torch.maximum(gains - row.square(), least)

            plan = _plan(view, r, own, step)
        return _dropped(view, plan)


@dataclass(frozen=True, kw_only=True, repr=False)
class AveragePool(Joining):
    """Average pooling: neighbours on the image grid become their size-weighted mean, whatever they show.

    The grid is divided into bands of rows, and each band into cells, so that exactly the wanted number of cells
    results. Without a known grid, runs of neighbouring tokens are pooled.

    Args: as for `Joining` and `Reducer`.

    Source: a control, as in VTC-Bench (https://arxiv.org/abs/2510.07143).
    """

    def reduce(self, view: View, r: int) -> Reduced | None:
        r = _limit(view, r)
        if r <= 0:
            return None
        with torch.no_grad():
            candidates = _candidates(view)
            rank = candidates.protected.long()  # of padding, too
            order = rank.argsort(stable=True, dim=1)
            place = torch.arange(size_of(order, 1), device=order.device)
            if view.grid is not None and view.n_protected == 0 and view.valid is None:
                cell = _cells(*view.grid, size_of(order, 1) - r).to(order.device).expand_as(order)
                free = torch.ones_like(order, dtype=torch.bool)
            else:
                count = (rank == 0).sum(1, keepdim=True)
                removed = candidates.removed(r)
                cells = count - (r if removed is None else removed[:, None])
                free = place < count
                cell = torch.where(free, place * cells // count.clamp(min=1), place)
            first = torch.full_like(cell, size_of(order, 1)).scatter_reduce(1, cell, place.expand_as(cell), "amin")
            first = first.gather(1, cell)
            at = (~(free & (first != place))).long().argsort(stable=True, dim=1)[:, :r]
            source = candidates.sources(order.gather(1, at), r)
            plan = candidates.plan(source, order.gather(1, first.gather(1, at)))
        sizes = view.sizes_or_ones()
        return *size(view.tokens, sizes, sizes, plan), plan


def _cells(height: int, width: int, cells: int) -> Tensor:
    """[height * width] the number of the cell of each place of a grid, of so many cells that are nearly square."""
    bands = min(height, max(-(-cells // width), round((cells * height / width) ** 0.5)))
    band = torch.arange(height) * bands // height
    starts = torch.arange(bands + 1) * cells // bands
    start, count = starts[band][:, None], (starts[1:] - starts[:-1])[band][:, None]
    places: Tensor = start + torch.arange(width) * count // width
    return places.flatten()


def _cosines(units: Tensor, new: Tensor) -> Tensor:
    """[B, T] cosines of vectors [B, T, C] of unit length with one of each row, [B]."""
    return (units @ take(units, new[:, None]).transpose(1, 2))[:, :, 0]


def _nearest(units: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T] the smallest distance, 1 - cosine, of each vector [B, T, C] to another one that is no padding."""
    parts, tokens = [], size_of(units, 1)
    step = max(1, pairs.BUDGET // (2 * size_of(units, 0) * tokens))
    for start in range(0, tokens, step):
        distances = 1 - units[:, start : start + step] @ units.transpose(1, 2)
        distances.diagonal(start, 1, 2).fill_(torch.inf)
        if valid is not None:
            distances.masked_fill_(~valid[:, None], 3.0)
        parts.append(distances.amin(2))
    return torch.cat(parts, 1)


def _limit(view: View, r: int) -> int:
    """How many tokens may leave, of `r`: half of the unprotected ones at most, unless the view allows more."""
    free = size_of(view.tokens, 1) - view.n_protected
    return min(r, free - 1 if view.beyond_half and view.valid is None else free // 2)


def _candidates(view: View) -> Candidates:
    return Candidates(view.tokens, view.protected, view.n_protected, view.valid, wanted=view.wanted)


def _dropped(view: View, plan: MergePlan | None) -> Reduced | None:
    """The tokens that stay."""
    if plan is None:
        return None
    sizes = None if view.sizes is None else view.sizes.gather(1, plan.kept)
    return take(view.tokens, plan.kept), sizes, plan


def _plan(view: View, r: int, gains: Tensor, step: Callable[[Tensor, Tensor, bool], Tensor]) -> MergePlan | None:
    """Keep one token after the other, always the one with the largest gain, and drop the last `r`.

    Protected tokens are kept first. A row with padding drops as many tokens as without it.

    Args:
        view: the input of the reducer.
        r: number of tokens to drop.
        gains: [B, T] what each token gains if it is the first.
        step: a function of the gains [B, T], the token [B] that is kept next, and whether it is the first. It returns
            the new gains [B, T].
    """
    tokens = size_of(view.tokens, 1)
    r = _limit(view, r)
    if r <= 0:
        return None
    candidates = _candidates(view)
    padding, lengths, removed = candidates.padding, candidates.lengths, candidates.removed(r)
    kept = torch.full_like(gains[:, 0], tokens - r, dtype=torch.long)
    if lengths is not None and removed is not None:
        kept = lengths - removed
    n_steps = tokens - r if padding is None else int(kept.max())
    rank = torch.full_like(view.protected, tokens, dtype=torch.long)  # the step in which a token was kept
    for number in range(n_steps):
        free = gains.masked_fill(view.protected, torch.inf)
        if padding is not None:
            free = free.masked_fill(padding, torch.finfo(gains.dtype).min)
        new = free.masked_fill(rank < tokens, -torch.inf).argmax(1)
        rank = rank.scatter(1, new[:, None], number)
        gains = step(gains, new, number == 0)
    stays = rank < kept[:, None]
    if padding is not None:
        stays = stays | padding
    return candidates.plan(candidates.sources(stays.long().argsort(stable=True, dim=1), r), None)
