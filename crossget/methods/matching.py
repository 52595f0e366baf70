"""Matchings, which choose the tokens to merge: complete-graph, bipartite, Ward's and random matching.

A matching picks `r` *sources*, tokens that are removed, and for each source a *destination*, the kept token that the
source is merged into. `Candidates` is its input: the tokens that it may choose from. `MergePlan` is its result: the
pairs, and the new position of every token. The similarities of all pairs are in `crossget.methods.pairs`.

Shapes: B batch, T tokens, C channels, r removed. Matchings are functions of tensors and compute no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crossget.methods import kernels
from crossget.methods.indexing import exceeds, exporting_to_onnx, size_of, take
from crossget.methods.pairs import ALL, BUDGET, Similarity, Square, Tiles, bands, symmetric, unlike

Ties = Literal["torch", "stable"]


class Candidates:
    """The tokens that a matching may choose from, and how they are compared.

    Args:
        vectors: [B, T, C] the vectors that tokens are compared by, of any norm and dtype; usually keys.
        protected: [B, T] true for tokens that are neither source nor destination.
        n_protected: the largest number of protected tokens in a row. It is one int for all rows, so that shapes are
            static.
        valid: [B, T] false for padding, which is matched with padding only. None: there is no padding.
        ties: how equal similarities are ranked, see `complete_graph`.
        seed: seed of the random matching.
        budget: number of similarities that are in memory at a time; without effect while exporting.
        sizes: [B, T] number of input tokens that each token stands for; None: all are 1.
        n_kept: number of other tokens that stay. With padding it is at least 2: one destination among the padding and
            one among the other tokens, as the two are never matched with each other.
    """

    def __init__(
        self,
        vectors: Tensor,
        protected: Tensor,
        n_protected: int,
        valid: Tensor | None = None,
        ties: Ties = "torch",
        seed: int = 0,
        budget: int = BUDGET,
        sizes: Tensor | None = None,
        n_kept: int = 0,
    ) -> None:
        batch, tokens = size_of(vectors, 0), size_of(vectors, 1)
        self.vectors = vectors
        self.sizes = sizes
        self.is_half = vectors.dtype in (torch.float16, torch.bfloat16)
        # In float32 the kernels would not use tensor cores.
        self.by_kernels = self.is_half and kernels.usable(vectors)
        self.in_tiles = exceeds(batch * tokens**2, budget)
        self.protected = protected
        self.n_free = tokens - n_protected
        self.valid = valid
        self.n_kept = n_kept if valid is None else max(n_kept, 2)
        self.ties = ties
        self.seed = seed
        self.budget = budget
        # Computed on demand. Dynamo cannot trace functools.cached_property, which takes a lock in Python 3.10 and 3.11.
        self._keys: Tensor | None = None
        self._inverse_norms: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[B, T, C] `vectors` in float32 or float64: half precision has too few digits to rank cosines."""
        if self._keys is None:
            self._keys = self.vectors.float() if self.is_half else self.vectors
        return self._keys

    @property
    def inverse_norms(self) -> Tensor:
        """[B, T] reciprocal of the norm of each key. Computed once, so that its rounding does not depend on tiles."""
        if self._inverse_norms is None:
            self._inverse_norms = torch.linalg.vector_norm(self.keys, dim=-1).clamp_min(1e-12).reciprocal()
        return self._inverse_norms

    def limit(self, r: int) -> int:
        """The number of tokens that can be removed: `r`, but at most half of the unprotected ones without `n_kept`."""
        most = (self.n_free - self.n_kept) // 2
        # Comparisons instead of min and max: one compiled graph then serves all lengths from which r can be removed.
        return r if r <= most else most if most > 0 else 0

    def cosines(self, rows: Tensor | slice = ALL, columns: Tensor | slice = ALL) -> Tensor:
        """Cosines between the vectors of some tokens and of others, without masks.

        The products are divided by the norms, rather than the vectors, which have more elements. The two reciprocal
        norms are multiplied with each other first. So S_ij and S_ji are equal to the last bit if the matrix product
        gives equal numbers for both, which not every processor does (see `complete_graph` on ties).

        Args:
            rows: the tokens of the rows, as a slice or as positions [B, N].
            columns: the tokens of the columns, in the same form.

        Returns:
            [B, rows, columns].

        Source: S in CrossGET (arXiv 2305.17455), section 3.2.
        """
        (a, a_norms), (b, b_norms) = self._part(rows), self._part(columns)
        products = torch.bmm(a, b.transpose(1, 2))
        if rows is columns:  # All pairs at once: the float32 keys are not needed again, so their memory is freed.
            del a, b
            self._keys = None
        for band in bands(products):
            products[:, band].mul_(a_norms[:, band, None] * b_norms[:, None, :])
        return products

    def _part(self, which: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys [B, N, C] and their reciprocal norms [B, N], of some tokens."""
        if which is ALL:
            return self.keys, self.inverse_norms
        if isinstance(which, slice):
            return self.keys[:, which], self.inverse_norms[:, which]
        return take(self.keys, which), self.inverse_norms.gather(1, which)

    def blocked(self) -> Tensor:
        """[B, T] a term to add to all similarities of a token: -inf for a protected token, otherwise 0."""
        zeros = self.vectors.new_zeros(
            self.protected.shape, dtype=torch.float32 if self.is_half else self.vectors.dtype
        )
        return zeros.masked_fill_(self.protected, -math.inf)

    def argsort(self, values: Tensor, descending: bool = False) -> Tensor:
        """[B, N] indices that sort `values` [B, N] along the last axis; `ties` decides on equal values.

        Raises:
            RuntimeError: with `ties="torch"`, while exporting to ONNX.
        """
        if exporting_to_onnx():
            if self.ties != "stable":
                raise RuntimeError(
                    "ties='torch' cannot be exported to ONNX: it orders equal similarities as torch.argsort happens to "
                    "order them, which ONNX does not; attach a reducer with ties='stable', as in "
                    "crossget.CrossGET(r, ties='stable')"
                )
            # ONNX has no stable sort. Its TopK is one: of equal values, that with the lower index comes first.
            return torch.topk(values, size_of(values, 1), dim=1, largest=descending).indices
        if self.ties == "stable":
            return torch.sort(values, dim=1, descending=descending, stable=True).indices
        return torch.argsort(values, dim=1, descending=descending)

    def noise(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) that depend only on the seed, the shape and the number of tokens.

        They are a hash and come from no random generator. So the recomputation of gradient checkpointing, other
        threads, compiled graphs and other devices all get the same numbers.
        """
        n = torch.arange(math.prod(shape), device=self.vectors.device).view(shape)
        n = n + (7919 * (self.seed + 1) + 104729 * size_of(self.vectors, 1))
        for _ in range(2):
            n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((n ^ (n >> 16)) & 0xFFFFFF).float() / 2**24


class MergePlan:
    """The result of a matching: which tokens are removed, and the new position of every token.

    Kept tokens stay in order.

    Args:
        source: [B, r] positions of the tokens that are removed, without duplicates.
        destination: [B, r] position of the token that each source is merged into; None if sources are dropped.
        tokens: T, the number of tokens before the removal.

    Attributes:
        source, destination: the arguments.
        new_destination: [B, r] position of each destination among the kept tokens; -1 if sources are dropped.
        kept: [B, T - r] positions of the kept tokens, ascending.
        index: [B, T] position among the kept tokens of the token that each token is part of; -1 if it is dropped.
        taken, given: [B, r] float32, set by an ensemble: a destination x_b becomes x_b + sum over its sources a of
            (taken_a x_a - given_a x_b). None before that, and with an ensemble that does not set them.
    """

    taken: Tensor | None = None
    given: Tensor | None = None

    def __init__(self, source: Tensor, destination: Tensor | None, tokens: int) -> None:
        batch, n_kept = size_of(source, 0), tokens - size_of(source, 1)
        order = torch.arange(tokens, device=source.device).expand(batch, tokens)
        # Integers instead of booleans: torch.jit.trace cannot scatter a boolean value.
        new = order - torch.zeros_like(order).scatter(1, source, 1).cumsum(1)
        # All sources are scattered to one extra position, which is cut off. So shapes are static, and the CPU does not
        # wait for the device.
        place = new.scatter(1, source, n_kept)
        self.kept = new.new_empty(batch, n_kept + 1).scatter(1, place, order)[:, :n_kept]
        self.source = source
        self.destination = destination
        self.new_destination = torch.full_like(source, -1) if destination is None else new.gather(1, destination)
        self.index = new.scatter(1, source, self.new_destination)
        self._pairs: Tensor | None = None

    def destinations(self) -> Tensor:
        """`destination`, as a tensor.

        Raises:
            ValueError: it is None, as the plan drops its sources.
        """
        if self.destination is None:
            raise ValueError("the plan drops its sources, so nothing is merged; use a plan with destinations")
        return self.destination

    @property
    def pairs(self) -> Tensor:
        """[B, 2 r] the sources, followed by their destinations."""
        if self._pairs is None:
            self._pairs = torch.cat([self.source, self.destinations()], 1)
        return self._pairs


def shares(plan: MergePlan) -> Tensor | None:
    """[B, T] the weight of each token in the token that it is part of after a merge.

    The weight of a dropped token is 0. The result is None if the ensemble did not set `MergePlan.taken` and `given`.
    """
    kept = torch.ones_like(plan.index, dtype=torch.float32)
    if plan.destination is None:
        return kept.scatter(1, plan.source, 0.0)
    if plan.taken is None or plan.given is None:
        return None
    return kept.scatter(1, plan.source, plan.taken).scatter_add(1, plan.destination, -plan.given)


def complete_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph soft matching: every token may be merged into every other.

    First, tokens are ranked by their largest similarity to any other token. Second, each token gets its largest
    similarity to the tokens below it in this ranking. The `r` tokens with the smallest (importance minus this
    similarity) become sources. Third, the destination of a source is the most similar of all kept tokens.

    Ties are common: two mutual nearest neighbours have the same largest similarity, and their order in the ranking
    decides which of them may become the source. With `ties="torch"` they are ordered by `torch.argsort`, which is not
    stable, as in the authors' code. Its results differ between devices, and between processors whose products S_ij and
    S_ji differ in the last bit. With `ties="stable"` the token that is earlier in the sequence comes first, on every
    device. The Triton kernels (`crossget.methods.kernels`), which are used on a GPU in half precision, always order
    ties in this way.

    Args:
        candidates: the tokens that may be matched.
        r: number of sources, at most `candidates.limit(r)`.
        importance: [B, T] scores; None: the choice of sources uses none.

    Returns:
        Sources [B, r] in the order in which they were picked, and their destinations [B, r].

    Source: CrossGET (arXiv 2305.17455), section 3.2 and algorithm 1.
    """
    if candidates.by_kernels:
        return kernels.complete_graph(candidates.vectors, candidates.protected, candidates.valid, r, importance)
    return _complete_graph_by(candidates, candidates.cosines, r, importance)


def _complete_graph_by(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`complete_graph`, with any similarity between tokens."""
    tokens = size_of(candidates.vectors, 1)
    blocked, valid = candidates.blocked(), candidates.valid
    if candidates.in_tiles:
        pairs: Square | Tiles = Tiles(similar, blocked, valid, candidates.budget)
    else:
        pairs = Square(similar, blocked, valid, mirrored=candidates.ties == "stable")
    best = pairs.best() + blocked
    order = candidates.argsort(best, descending=True)
    places = torch.arange(tokens, device=order.device, dtype=best.dtype).expand_as(order)
    below = pairs.best_below(torch.empty_like(best).scatter(1, order, places)) + blocked
    source = candidates.argsort(_priority(below, importance))[:, :r]
    return source, pairs.nearest(source, blocked.scatter(1, source, -math.inf))


def bipartite(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: tokens are split into two sets, one for sources and one for destinations.

    The unprotected tokens are assigned alternately, in order, to the set of destinations and to the set of sources.
    Every token of the second set is paired with its most similar destination. The `r` best pairs are merged.

    Args and returns: as for `complete_graph`.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    return _bipartite_by(candidates, candidates.cosines, r, importance)


def _bipartite_by(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`bipartite`, with any similarity between tokens."""
    a, b = _split(candidates)
    similarity = similar(a, b)
    if candidates.valid is not None:
        similarity.masked_fill_(unlike(candidates.valid.gather(1, a), candidates.valid.gather(1, b)), -math.inf)
    nearest = similarity.max(-1)
    scores = None if importance is None else importance.gather(1, a)
    best = candidates.argsort(_priority(nearest.values, scores))[:, :r]
    return a.gather(1, best), b.gather(1, nearest.indices.gather(1, best))


def ward(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite matching by Ward's criterion: the `r` pairs are merged whose merging changes the tokens least.

    Tokens are split as in `bipartite`. The mass m of a token is its size times exp(importance). Merging a and b into
    their mean, weighted by mass, changes both by m_a m_b / (m_a + m_b) |x_a - x_b|^2 in total. So close tokens are
    merged, and of equally close ones those with a small mass: a token that stands for many input tokens, or for
    important ones, is seldom merged. Unlike cosines, distances do not depend on an offset that all tokens share.

    Args:
        candidates: the tokens that may be matched, with their sizes.
        r: number of sources, at most `candidates.limit(r)`.
        importance: [B, T] the mass is size * exp(importance); None: the mass is the size.

    Returns:
        Sources [B, r], smallest change first, and their destinations [B, r].

    Source: J. H. Ward, Hierarchical grouping to optimize an objective function, JASA 58 (1963), for pairs of two sets.
    """
    return _bipartite_by(candidates, WardSimilarity(candidates, importance), r)


def ward_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph matching by Ward's criterion: every token may be merged into every other.

    It computes 3/4 T^2 products of vectors, three times as many as `ward`.

    Args and returns: as for `ward`.
    """
    return _complete_graph_by(candidates, WardSimilarity(candidates, importance), r)


class WardSimilarity:
    """A `Similarity`: minus the change that merging two tokens makes, by Ward's criterion, see `ward`.

    Args:
        candidates: the tokens, with their sizes.
        importance: [B, T] as for `ward`.
    """

    def __init__(self, candidates: Candidates, importance: Tensor | None) -> None:
        # Centred: fewer digits cancel when |a - b|^2 is computed as |a|^2 + |b|^2 - 2 a b.
        self.points = candidates.keys - candidates.keys.mean(1, keepdim=True)
        self.squares = self.points.square().sum(-1)
        mass = torch.ones_like(self.squares) if candidates.sizes is None else candidates.sizes.to(self.squares.dtype)
        mass = mass if importance is None else mass * importance.exp()
        self.inverse_mass = mass.reciprocal()  # m_a m_b / (m_a + m_b) is 1 / (1 / m_a + 1 / m_b)

    def __call__(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Args and returns: as for `Candidates.cosines`."""
        (a, a_squares, a_inverse), (b, b_squares, b_inverse) = self._part(rows), self._part(columns)
        # Between all tokens, the product of most pairs is computed once for both orders.
        pairs = symmetric(a) if rows is columns else torch.bmm(a, b.transpose(1, 2))
        for band in bands(pairs):
            part, squares = pairs[:, band], a_squares[:, band, None] + b_squares[:, None, :]
            part.mul_(-2).add_(squares).clamp_min_(0).div_(a_inverse[:, band, None] + b_inverse[:, None, :]).neg_()
        return pairs

    def _part(self, which: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [B, N, C], their squared norms and inverse masses [B, N], of some tokens."""
        if which is ALL:
            return self.points, self.squares, self.inverse_mass
        if isinstance(which, slice):
            return self.points[:, which], self.squares[:, which], self.inverse_mass[:, which]
        return take(self.points, which), self.squares.gather(1, which), self.inverse_mass.gather(1, which)


def random(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Random sources and destinations, as a control.

    The choice depends on the seed, the index in the batch and the number of tokens, but not on the tokens' values.

    Args and returns: as for `complete_graph`; importance is ignored.
    """
    batch, tokens = size_of(candidates.vectors, 0), size_of(candidates.vectors, 1)
    free = ~candidates.protected
    valid = candidates.valid if candidates.valid is not None else torch.ones_like(free)
    # The first token of either group (padding, others) is never a source. So every source has a destination in its
    # group.
    first = _first(free & valid) | _first(free & ~valid)
    draw = candidates.noise(batch, tokens).masked_fill(~free | first, 2.0)
    source = draw.argsort(1)[:, :r]
    removed = torch.zeros(batch, tokens, dtype=torch.long, device=free.device).scatter(1, source, 1) > 0
    allowed = (free & ~removed)[:, None, :] & ~unlike(valid.gather(1, source), valid)
    return source, candidates.noise(batch, r, tokens).masked_fill(~allowed, -1.0).argmax(-1)


Matching = Callable[[Candidates, int, "Tensor | None"], "tuple[Tensor, Tensor]"]
MATCHINGS: dict[str, Matching] = {
    "complete_graph": complete_graph, "bipartite": bipartite, "ward": ward, "ward_graph": ward_graph, "random": random,
}  # fmt: skip


def _split(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The unprotected tokens, alternately in two sets: possible sources [B, n] and destinations [B, m]."""
    free = ~candidates.protected
    turn = free.long().cumsum(1)
    # Sorted by set: sources, destinations, all others. A set has the same size in every row: shapes are static.
    group = torch.where(free & (turn <= candidates.n_free), turn % 2, 2)
    tokens = size_of(group, 1)
    order = (group * tokens + torch.arange(tokens, device=group.device)).argsort(1)
    n_sources = candidates.n_free // 2
    return order[:, :n_sources], order[:, n_sources : candidates.n_free]


def _priority(similarity: Tensor, importance: Tensor | None) -> Tensor:
    """[B, N] the tokens with the smallest values become sources."""
    return -similarity if importance is None else importance - similarity


def _first(mask: Tensor) -> Tensor:
    """[B, T] true for the first true element of each row of `mask` [B, T]."""
    return mask & (mask.long().cumsum(1) == 1)
