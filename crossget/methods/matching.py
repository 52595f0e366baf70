"""Who joins whom: complete-graph, bipartite, Ward's and random matching as pure tensor functions.

Every matching picks `r` *sources*, tokens that are removed, and for each source a *destination*, a token that stays and
that the source is merged into. `Candidates` holds what a matching chooses from; `MergePlan` holds what it chose and
where every token ends up. Similarities of all pairs are in `crossget.methods.pairs`.

Shapes: B batch, T tokens, C channels, r removed. Nothing here carries a gradient or knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crossget.methods import kernels
from crossget.methods.indexing import size_of, take
from crossget.methods.pairs import ALL, BUDGET, Similarity, Square, Tiles, bands, symmetric, unlike

Ties = Literal["torch", "stable"]


class Candidates:
    """What a matching may choose from.

    Args:
        given: [B, T, C] the vectors that tokens are compared by, of any norm and dtype; usually keys.
        protected: [B, T] true for tokens that are neither source nor destination.
        n_protected: an upper bound of the protected tokens in a row, one for all rows, so that shapes are static.
        valid: [B, T] false for padding. Padding is only ever matched with padding. None: there is no padding.
        ties: how equal similarities are ranked, see `complete_graph`.
        seed: of the random matching.
        budget: similarities to hold at a time.
        sizes: [B, T] input tokens per token; None while all are one.
    """

    def __init__(
        self,
        given: Tensor,
        protected: Tensor,
        n_protected: int,
        valid: Tensor | None = None,
        ties: Ties = "torch",
        seed: int = 0,
        budget: int = BUDGET,
        sizes: Tensor | None = None,
    ) -> None:
        batch, tokens = size_of(given, 0), size_of(given, 1)
        self.given = given
        self.sizes = sizes
        self.is_half = given.dtype in (torch.float16, torch.bfloat16)
        # In float32 the kernels would run without tensor cores.
        self.by_kernels = self.is_half and kernels.usable(given)
        self.in_tiles = batch * tokens**2 > budget
        self.protected = protected
        self.n_free = tokens - n_protected
        self.valid = valid
        self.ties = ties
        self.seed = seed
        self.budget = budget
        # Computed on demand. By hand: Dynamo cannot enter the lock of older Pythons' cached_property.
        self._keys: Tensor | None = None
        self._inverse_norms: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[B, T, C] `given` in float32 or wider: half precision has too few digits to rank cosines."""
        if self._keys is None:
            self._keys = self.given.float() if self.is_half else self.given
        return self._keys

    @property
    def inverse_norms(self) -> Tensor:
        """[B, T] one over the norm of each key, rounded alike with tiles and without."""
        if self._inverse_norms is None:
            self._inverse_norms = torch.linalg.vector_norm(self.keys, dim=-1).clamp_min(1e-12).reciprocal()
        return self._inverse_norms

    def limit(self, r: int) -> int:
        """The number of tokens that can be removed, at most `r`: half of those that are not protected.

        With padding, one destination is reserved for each of the two groups that must not mix.
        """
        most = (self.n_free - (0 if self.valid is None else 2)) // 2
        # Comparisons, not min and max: then a compiled graph that removes r tokens is shared by all lengths that can.
        return r if r <= most else most if most > 0 else 0

    def cosines(self, rows: Tensor | slice = ALL, columns: Tensor | slice = ALL) -> Tensor:
        """Cosines between some tokens and others, nothing masked: S in section 3.2 of the paper.

        The products are scaled, not the keys, which have more numbers. Scaled by the product of both norms, S_ij and
        S_ji stay equal to the last bit where the processor's products are. They are not on every processor, see `ties`.

        Args:
            rows: which tokens, as a slice or as [B, N] positions.
            columns: which others.

        Returns:
            [B, rows, columns].
        """
        (a, a_norms), (b, b_norms) = self._part(rows), self._part(columns)
        products = torch.bmm(a, b.transpose(1, 2))
        if rows is columns:  # All pairs: the float32 keys are not needed again, and take more memory than what follows.
            del a, b
            self._keys = None
        for band in bands(products):
            products[:, band].mul_(a_norms[:, band, None] * b_norms[:, None, :])
        return products

    def _part(self, which: Tensor | slice) -> tuple[Tensor, Tensor]:
        if which is ALL:
            return self.keys, self.inverse_norms
        if isinstance(which, slice):
            return self.keys[:, which], self.inverse_norms[:, which]
        return take(self.keys, which), self.inverse_norms.gather(1, which)

    def blocked(self) -> Tensor:
        """[B, T] what is added to similarities with each token: -inf for a protected token, otherwise 0."""
        zeros = self.given.new_zeros(self.protected.shape, dtype=torch.float32 if self.is_half else self.given.dtype)
        return zeros.masked_fill_(self.protected, -math.inf)

    def argsort(self, values: Tensor, descending: bool = False) -> Tensor:
        """Sorted order of `values` [B, N] along the last axis, with this object's rule for ties."""
        if self.ties == "stable":
            return torch.sort(values, dim=1, descending=descending, stable=True).indices
        return torch.argsort(values, dim=1, descending=descending)

    def noise(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) that depend on the seed, the shape and the number of tokens alone.

        A hash instead of a generator: the recomputation of gradient checkpointing, another thread, a compiled graph
        and another device all get the same numbers.
        """
        n = torch.arange(math.prod(shape), device=self.given.device).view(shape)
        n = n + (7919 * (self.seed + 1) + 104729 * size_of(self.given, 1))
        for _ in range(2):
            n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((n ^ (n >> 16)) & 0xFFFFFF).float() / 2**24


class MergePlan:
    """The outcome of a matching, and where every token ends up. The tokens that stay keep their order.

    Args:
        source: [B, r] tokens that are removed, each at most once.
        destination: [B, r] the token that each source is merged into; None when sources are dropped.
        tokens: T.

    Attributes:
        source, destination: as given.
        new_destination: [B, r] position of each destination among the tokens that stay; -1 when sources are dropped.
        kept: [B, T - r] tokens that stay, ascending.
        index: [B, T] the new position of each token's content; -1 where it is dropped.
        taken, given: [B, r] float32, set by an ensemble: a destination x_b becomes x_b + sum over its sources a of
            (taken_a x_a - given_a x_b). None until then, and for ensembles that do not report it.
    """

    taken: Tensor | None = None
    given: Tensor | None = None

    def __init__(self, source: Tensor, destination: Tensor | None, tokens: int) -> None:
        batch, left = size_of(source, 0), tokens - size_of(source, 1)
        order = torch.arange(tokens, device=source.device).expand(batch, tokens)
        # Integers, not booleans: tracing has no scatter with a boolean value.
        new = order - torch.zeros_like(order).scatter(1, source, 1).cumsum(1)
        # All sources are written to one place behind the others: shapes are static, and nothing waits for the device.
        place = new.scatter(1, source, left)
        self.kept = new.new_empty(batch, left + 1).scatter(1, place, order)[:, :left]
        self.source = source
        self.destination = destination
        self.new_destination = torch.full_like(source, -1) if destination is None else new.gather(1, destination)
        self.index = new.scatter(1, source, self.new_destination)
        self._pairs: Tensor | None = None

    def destinations(self) -> Tensor:
        """`destination`, where there is one.

        Raises:
            ValueError: the plan drops its sources.
        """
        if self.destination is None:
            raise ValueError("the plan drops its sources, so nothing is merged; use a plan with destinations")
        return self.destination

    @property
    def pairs(self) -> Tensor:
        """[B, 2 r] sources, then their destinations."""
        if self._pairs is None:
            self._pairs = torch.cat([self.source, self.destinations()], 1)
        return self._pairs


def shares(plan: MergePlan) -> Tensor | None:
    """[B, T] the weight of each token in the token it was merged into.

    It is 0 for dropped tokens. None is returned where the ensemble does not report its weights.
    """
    kept = torch.ones_like(plan.index, dtype=torch.float32)
    if plan.destination is None:
        return kept.scatter(1, plan.source, 0.0)
    if plan.taken is None or plan.given is None:
        return None
    return kept.scatter(1, plan.source, plan.taken).scatter_add(1, plan.destination, -plan.given)


def complete_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph soft matching: every token may join every other.

    Tokens are ranked by their largest similarity. Each token looks for the most similar one among those below it in
    that ranking. The `r` tokens for which importance minus that similarity is least become sources. Each source then
    joins the most similar of all tokens that stay.

    Ties are common: two mutual nearest neighbours have the same largest similarity, and their order in the ranking
    decides which of them may become the source. `ties="torch"` leaves the order to `torch.argsort`, which is not
    stable. The reference does so, and its results depend on it; they differ between devices, and between processors,
    whose products S_ij and S_ji may differ in the last bit. `ties="stable"` puts the token that comes first in the
    sequence first, on every device. The Triton kernels (`crossget.methods.kernels`), which take over on a GPU in half
    precision, do the same under either setting.

    Args:
        candidates: what may be matched.
        r: how many sources, at most `candidates.limit(r)`.
        importance: [B, T]; None leaves importance out of the choice.

    Returns:
        sources [B, r] in the order in which they were picked, and destinations [B, r].

    Source: CrossGET (arXiv 2305.17455), section 3.2 and algorithm 1.
    """
    if candidates.by_kernels:
        return kernels.complete_graph(candidates.given, candidates.protected, candidates.valid, r, importance)
    return _in_a_graph(candidates, candidates.cosines, r, importance)


def _in_a_graph(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`complete_graph` by any similarity."""
    tokens = size_of(candidates.given, 1)
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

    The tokens that are not protected go alternately, in order, to the set of destinations and to that of sources.
    Every token of the sources' set proposes its most similar destination, and the `r` best proposals are taken.

    Args, returns: as `complete_graph`.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    return _of_two_sets(candidates, candidates.cosines, r, importance)


def _of_two_sets(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`bipartite` by any similarity."""
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

    Tokens are split as in `bipartite`. Merging a and b into their weighted mean changes them, summed over both, by
    m_a m_b / (m_a + m_b) |x_a - x_b|^2, where the mass m of a token is its size times exp(importance). So tokens are
    merged that are close to each other, and among equally close ones those of small mass: a token that stands for many
    input tokens, or for important ones, stays as it is. Distances, unlike cosines, do not depend on an offset that all
    tokens share.

    Args:
        candidates: what may be matched, with their sizes.
        r: how many sources, at most `candidates.limit(r)`.
        importance: [B, T] logarithm of the factor of the mass; None: the mass is the size.

    Returns:
        sources [B, r], least change first, and destinations [B, r].

    Source: J. H. Ward, Hierarchical grouping to optimize an objective function, JASA 58 (1963), for pairs of two sets.
    """
    return _of_two_sets(candidates, WardSimilarity(candidates, importance), r)


def ward_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ward's criterion in a complete graph: every token may join every other, as in `complete_graph`.

    It computes 3/4 of T^2 products, three times as many as `ward`.

    Args, returns: as `ward`.
    """
    return _in_a_graph(candidates, WardSimilarity(candidates, importance), r)


class WardSimilarity:
    """Minus the change that merging two tokens makes, by Ward's criterion.

    Args: as `ward`.
    """

    def __init__(self, candidates: Candidates, importance: Tensor | None) -> None:
        # Centred, so that few digits are lost when large squares are subtracted from each other.
        self.points = candidates.keys - candidates.keys.mean(1, keepdim=True)
        self.squares = self.points.square().sum(-1)
        mass = torch.ones_like(self.squares) if candidates.sizes is None else candidates.sizes.to(self.squares.dtype)
        mass = mass if importance is None else mass * importance.exp()
        self.inverse = mass.reciprocal()  # m_a m_b / (m_a + m_b) is 1 / (1 / m_a + 1 / m_b)

    def __call__(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """As `Candidates.cosines`."""
        (a, a_squares, a_inverse), (b, b_squares, b_inverse) = self._part(rows), self._part(columns)
        # Of all pairs, each is computed once.
        pairs = symmetric(a) if rows is columns else torch.bmm(a, b.transpose(1, 2))
        for band in bands(pairs):
            part, squares = pairs[:, band], a_squares[:, band, None] + b_squares[:, None, :]
            part.mul_(-2).add_(squares).clamp_min_(0).div_(a_inverse[:, band, None] + b_inverse[:, None, :]).neg_()
        return pairs

    def _part(self, which: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        if which is ALL:
            return self.points, self.squares, self.inverse
        if isinstance(which, slice):
            return self.points[:, which], self.squares[:, which], self.inverse[:, which]
        return take(self.points, which), self.squares.gather(1, which), self.inverse.gather(1, which)


def random(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Random sources and destinations: the baseline that every matching has to beat.

    The choice depends on the seed, the place in the batch and the number of tokens, not on the tokens.

    Args, returns: as `complete_graph`; importance is ignored, see `crossget.methods.reducers.Merging`.
    """
    batch, tokens = size_of(candidates.given, 0), size_of(candidates.given, 1)
    free = ~candidates.protected
    valid = candidates.valid if candidates.valid is not None else torch.ones_like(free)
    # The first token of each group is never a source, so that every source finds a destination of its group.
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
    """The tokens that are not protected, alternately in two sets: of sources [B, n] and of destinations [B, m]."""
    free = ~candidates.protected
    turn = free.long().cumsum(1)
    # Sorted by set: sources, destinations, others. The sets have one size in every row, so that shapes are static.
    group = torch.where(free & (turn <= candidates.n_free), turn % 2, 2)
    tokens = size_of(group, 1)
    order = (group * tokens + torch.arange(tokens, device=group.device)).argsort(1)
    n_sources = candidates.n_free // 2
    return order[:, :n_sources], order[:, n_sources : candidates.n_free]


def _priority(similarity: Tensor, importance: Tensor | None) -> Tensor:
    return -similarity if importance is None else importance - similarity


def _first(mask: Tensor) -> Tensor:
    return mask & (mask.long().cumsum(1) == 1)
