"""Methods that choose the tokens that stay: by their distances, by a determinant, or by pooling of the image grid.

They are baselines of the literature on image tokens behind the connector of a model of images and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods.indexing import size_of, take
from crossget.methods.matching import MergePlan
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
            distances = 1 - units @ units.transpose(1, 2)
            distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            nearest = distances.amin(2)
            distances.diagonal(dim1=1, dim2=2).fill_(0)

            def step(nearest: Tensor, new: Tensor, first: bool) -> Tensor:
                added = take(distances, new[:, None])[:, 0]
                return added if first else torch.minimum(nearest, added)

            plan = _plan(view, r, nearest, step)
        return _dropped(view, plan)


@dataclass(frozen=True, kw_only=True, repr=False)
class Determinantal(Reducer):
    """Pruning by a determinantal point process that is conditioned on a text.

    The tokens that stay are a greedy maximum of the determinant of relevance_i * cosine_ij * relevance_j. The relevance
    of a token is its cosine with the text, scaled to [0, 1] over the tokens. The text is the prompt, behind the
    connector, or the features given to `Attachment.set_text_features`. Once the determinant is 0 whatever is added, the
    most relevant tokens stay.

    Args: as for `Reducer`.

    Source: CDPruner (NeurIPS 2025, https://arxiv.org/abs/2506.10967), section 3; the greedy maximum is that of Chen et
    al. (NeurIPS 2018, https://arxiv.org/abs/1709.05135), algorithm 1.
    """

    @property
    def needs_text(self) -> bool:
        return True

    def check(self, tower: TowerFacts) -> None:
        if not tower.embeds:
            raise ValueError(f"Determinantal compares tokens with a text, and on {tower.name} no text is known")

    def reduce(self, view: View, r: int) -> Reduced | None:
        if view.relevance is None:
            raise RuntimeError("Determinantal has no text: call Attachment.set_text_features(features) first")
        with torch.no_grad():
            units = F.normalize(view.tokens.float(), dim=-1)
            relevance = view.relevance(view.tokens).float()
            low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
            relevance = (relevance - low) / (high - low).clamp(min=1e-6)
            view.score = relevance
            kernel = relevance[:, :, None] * (units @ units.transpose(1, 2)) * relevance[:, None, :]
            own = kernel.diagonal(dim1=1, dim2=2).clone()
            least = 1e-6 * own  # a gain below it is a rounding error: the token lies in the span of those that stay
            rows: list[Tensor] = []  # of the Cholesky factor

            def step(gains: Tensor, new: Tensor, first: bool) -> Tensor:
                at = new[:, None]
                row = take(kernel, at)[:, 0]
                if rows:
                    before = torch.stack(rows, 1)  # [B, N, T]
                    row = row - (before.gather(2, at[:, None].expand(-1, len(rows), 1)) * before).sum(1)
                gain = gains.gather(1, at)
                row = torch.where(gain > least.gather(1, at), row / gain.sqrt(), 0)
                rows.append(row)
                return torch.maximum(gains - row.square(), least)

            plan = _plan(view, r, own, step)
        return _dropped(view, plan)


@dataclass(frozen=True, kw_only=True, repr=False)
class AveragePool(Joining):
    """Average pooling: neighbours on the image grid become their size-weighted mean, whatever they show.

    The grid is divided into bands of rows, and each band into cells, so that exactly the wanted number of cells
    results. Without a known grid, runs of neighbouring tokens are pooled. Padding is pooled with padding only.

    Args: as for `Joining` and `Reducer`.

    Source: a control, as in VTC-Bench (https://arxiv.org/abs/2510.07143).
    """

    def reduce(self, view: View, r: int) -> Reduced | None:
        tokens = size_of(view.tokens, 1)
        free = tokens - view.n_protected
        r = _limit(view, r)
        if r <= 0:
            return None
        with torch.no_grad():
            rank = view.protected.long() * 2
            if view.valid is not None:
                rank = torch.where(view.valid | view.protected, rank, 1)
            order = rank.argsort(stable=True, dim=1)[:, :free]  # the unprotected tokens, in order, padding last
            place = torch.arange(free, device=order.device)
            if view.grid is not None and view.n_protected == 0:
                cell = _cells(*view.grid, free - r).to(order.device)[None]
            else:
                real = free if view.valid is None else (rank.gather(1, order) == 0).sum(1, keepdim=True)
                cell = _runs(place, real, free, free - r)
            first = torch.full_like(cell, free).scatter_reduce(1, cell, place.expand_as(cell), "amin").gather(1, cell)
            first = first.expand_as(order)
            leaving = (first != place).nonzero()[:, 1].view(len(order), r)
            plan = MergePlan(order.gather(1, leaving), order.gather(1, first.gather(1, leaving)), tokens)
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


def _runs(place: Tensor, real: Tensor | int, free: int, cells: int) -> Tensor:
    """[B, T] or [1, T] the number of the cell of each of T places: runs of about equal length.

    Args:
        place: [T] 0, 1, ...
        real: [B, 1] the number of places in front of the padding. The padding has a run of its own, or more if there
            are fewer real places than cells.
        free: T.
        cells: the number of runs.
    """
    real = torch.as_tensor(real, device=place.device).view(-1, 1)
    padding = free - real
    of_padding = torch.where(padding == 0, 0, (cells - real).clamp(min=1))
    of_real = cells - of_padding
    in_padding = of_real + (place - real) * of_padding // padding.clamp(min=1)
    return torch.where(place < real, place * of_real // real.clamp(min=1), in_padding)


def _limit(view: View, r: int) -> int:
    """How many tokens may leave, of `r`: half of the unprotected ones at most, unless the view allows more."""
    free = size_of(view.tokens, 1) - view.n_protected
    n_kept = view.n_kept if view.valid is None else max(view.n_kept, 2)  # one of the padding, as in `Candidates`
    return min(r, free - max(n_kept, 1) if view.beyond_half else (free - n_kept) // 2)


def _dropped(view: View, plan: MergePlan | None) -> Reduced | None:
    """The tokens that stay."""
    if plan is None:
        return None
    sizes = None if view.sizes is None else view.sizes.gather(1, plan.kept)
    return take(view.tokens, plan.kept), sizes, plan


def _plan(view: View, r: int, gains: Tensor, step: Callable[[Tensor, Tensor, bool], Tensor]) -> MergePlan | None:
    """Keep one token after the other, always the one with the largest gain, and drop the last `r`.

    Protected tokens are kept first, and padding last.

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
    chosen = torch.zeros_like(view.protected)
    for number in range(tokens - r):
        free = gains.masked_fill(view.protected, torch.inf)
        if view.valid is not None:
            free = free.masked_fill(~view.valid & ~view.protected, torch.finfo(gains.dtype).min)
        new = free.masked_fill(chosen, -torch.inf).argmax(1)
        chosen = chosen.scatter(1, new[:, None], True)
        gains = step(gains, new, number == 0)
    return MergePlan((~chosen).nonzero()[:, 1].view(len(chosen), r), None, tokens)
