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

from crossget.methods import kernels, pairs
from crossget.methods.indexing import exceeds, exporting_to_onnx, flat, in_vmap, sequence_numbers, size_of, take
from crossget.methods.pairs import ALL, Rows, Similarity, Square, Tiles, bands, symmetric

Ties = Literal["torch", "stable"]


class Candidates:
    """The tokens that a matching may choose from, and how they are compared.

    Args:
        vectors: [B, T, C] the vectors that tokens are compared by, of any norm and dtype; usually keys.
        protected: [B, T] true for tokens that are neither source nor destination. The attribute is true for padding,
            too.
        n_protected: the largest number of protected tokens in a row. It is one int for all rows, so that shapes are
            static.
        valid: [B, T] false for padding, which is never matched. None: there is no padding.
        ties: how equal similarities are ranked, see `complete_graph`.
        seed: seed of the random matching.
        budget: number of similarities that are in memory at a time, without effect while exporting; None: as many as
            `crossget.methods.pairs.BUDGET`.
        sizes: [B, T] number of input tokens that each token stands for; None: all are 1.
        wanted: [B] number of tokens to remove from each row with padding; None: the same number as from all.
        prefix: see `crossget.methods.reducers.View`.

    Attributes:
        padding: [B, T] true for padding that can be dropped; None: there is none.
        lengths: [B] number of tokens of each row without that padding; None: T.
    """

    def __init__(
        self,
        vectors: Tensor,
        protected: Tensor,
        n_protected: int,
        valid: Tensor | None = None,
        ties: Ties = "torch",
        seed: int = 0,
        budget: int | None = None,
        sizes: Tensor | None = None,
        wanted: Tensor | None = None,
        prefix: int | None = None,
    ) -> None:
        batch, tokens = size_of(vectors, 0), size_of(vectors, 1)
        self.vectors = vectors
        self.sizes = sizes
        self.is_half = vectors.dtype in (torch.float16, torch.bfloat16)
        # In float32 the kernels would not use tensor cores.
        self.by_kernels = self.is_half and kernels.usable(vectors)
        budget = pairs.BUDGET if budget is None else budget
        self.in_tiles = exceeds(batch * tokens**2, budget)
        self.protected = protected if valid is None else protected | ~valid
        self.n_protected = n_protected
        self.n_free = tokens - n_protected
        self.prefix = None if valid is not None else prefix
        self.padding = None if valid is None else ~(valid | protected)
        self.lengths = None if valid is None else (valid | protected).sum(1)
        self.wanted = wanted
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
        """The number of tokens that can be removed: `r`, but at most half of the unprotected ones."""
        most = self.n_free // 2
        # Comparisons instead of min and max: one compiled graph then serves all lengths from which r can be removed.
        return r if r <= most else most if most > 0 else 0

    def removed(self, r: int) -> Tensor | None:
        """[B] number of tokens of each row among the `r` that are removed: as many as it loses without its padding.

        The others are padding. None: there is no padding.
        """
        if self.lengths is None:
            return None
        most = (self.lengths - self.n_protected).clamp(min=0) // 2
        return (most if self.wanted is None else torch.minimum(most, self.wanted)).clamp(max=r)

    def sources(self, order: Tensor, r: int) -> Tensor:
        """[B, r] the first tokens of `order` [B, N], as many as each row loses, followed by padding."""
        removed, padding, source = self.removed(r), self.padding, order[:, :r]
        if removed is None or padding is None:
            return source
        tokens = size_of(padding, 1)
        place = torch.arange(tokens, device=padding.device)
        dropped = torch.where(padding, place, place + tokens).argsort(1)[:, :r]
        behind = place[:r] - removed[:, None]
        return torch.where(behind < 0, source, dropped.gather(1, behind.clamp(min=0)))

    def plan(self, source: Tensor, destination: Tensor | None) -> MergePlan:
        """The plan that merges these sources [B, r] into these destinations [B, r], and drops padding.

        Args:
            source: what `sources` returns.
            destination: of each source; any position for padding. None: all sources are dropped.
        """
        r, dropped = size_of(source, 1), None
        removed = self.removed(r)
        if removed is not None and destination is not None:
            dropped = torch.arange(r, device=source.device) >= removed[:, None]
        return MergePlan(source, destination, size_of(self.protected, 1), dropped)

    def cosines(self, rows: Rows = ALL, columns: Rows = ALL) -> Tensor:
        """Cosines between the vectors of some tokens and of others, without masks.

        The products are divided by the norms, rather than the vectors, which have more elements. The two reciprocal
        norms are multiplied with each other first. So S_ij and S_ji are equal to the last bit if the matrix product
        gives equal numbers for both, which not every processor does (see `complete_graph` on ties).

        Args:
            rows: the tokens of the rows, as a slice or as positions [B, N], or `ALL`.
            columns: the tokens of the columns, in the same form.

        Returns:
            [B, rows, columns].

        Source: S in CrossGET (arXiv 2305.17455), section 3.2.
        """
        (a, a_norms), (b, b_norms) = self._part(rows), self._part(columns)
        products = torch.bmm(a, b.transpose(1, 2))
        if not isinstance(rows, slice | Tensor):  # all pairs at once: the float32 keys are not needed again: free them
            del a, b
            self._keys = None
        for band in bands(products):
            products[:, band].mul_(a_norms[:, band, None] * b_norms[:, None, :])
        return products

    def _part(self, which: Rows) -> tuple[Tensor, Tensor]:
        """Keys [B, N, C] and their reciprocal norms [B, N], of some tokens."""
        if isinstance(which, slice):
            return self.keys[:, which], self.inverse_norms[:, which]
        if isinstance(which, Tensor):
            return take(self.keys, which), self.inverse_norms.gather(1, which)
        return self.keys, self.inverse_norms

    def parts(self, rows: int, width: int) -> list[slice]:
        """Slices of some rows with so many numbers each, which together are within the budget; one for all, if it is.

        Args:
            rows: how many there are.
            width: numbers per row, over the whole batch.
        """
        if not self.in_tiles:
            return [slice(None)]
        step = max(1, self.budget // width)
        return [slice(first, first + step) for first in range(0, rows, step)]

    def blocked(self) -> Tensor:
        """[B, T] a term to add to all similarities of a token: -inf for a protected token, otherwise 0."""
        zeros = self.vectors.new_zeros(
            self.protected.shape, dtype=torch.float32 if self.is_half else self.vectors.dtype
        )
        return zeros.masked_fill_(self.protected, -math.inf)

    def argsort(self, values: Tensor, descending: bool = False, own: Tensor | None = None) -> Tensor:
        """[B, N] indices that sort `values` [B, N] along the last axis; `ties` decides on equal values.

        Args:
            values: what is sorted.
            descending: the largest value comes first.
            own: [B, N] false for values that a row without its padding lacks, all of which come last; None: it has all.

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
        fixed = torch.compiler.is_compiling() or torch._C._is_tracing() or in_vmap(values)  # lengths are not known
        if own is None or values.device.type != "cpu" or fixed:
            return torch.argsort(values, dim=1, descending=descending)
        # How a CPU orders equal values depends on their number. So the rows of each length are sorted alone.
        order, counts = torch.sort((~own).long(), dim=1, stable=True).indices, own.sum(1)
        for count in counts.unique().tolist():
            rows = counts == count
            at = order[rows, :count]
            order[rows, :count] = at.gather(1, torch.argsort(values[rows].gather(1, at), dim=1, descending=descending))
        return order

    def noise(self, r: int | None = None, part: slice = slice(None)) -> Tensor:
        """Numbers in [0, 1), [B, T] or [B, r, T], that depend only on the seed, their index and the number of tokens.

        `part` selects some of the r. Padding does not count among the tokens. The numbers are a hash and come from no
        random generator. So the recomputation of gradient checkpointing, other threads, compiled graphs and other
        devices all get the same.
        """
        batch, tokens = size_of(self.vectors, 0), size_of(self.vectors, 1)
        row = torch.arange(batch, device=self.vectors.device)[:, None]
        column = torch.arange(tokens, device=self.vectors.device).expand(batch, tokens)
        count: Tensor | int = tokens
        if self.padding is not None and self.lengths is not None:
            column, count = (~self.padding).long().cumsum(1) - 1, self.lengths[:, None]
        if r is not None:
            removed = self.removed(r)
            each = torch.arange(r, device=row.device)[None, part, None]
            row = row[:, :, None] * (r if removed is None else removed[:, None, None]) + each
            column, count = column[:, None], count if isinstance(count, int) else count[:, :, None]
        n = row * count + column + (7919 * (self.seed + 1) + 104729 * count)
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
        dropped: [B, r] true for sources that are dropped, though others are merged; None: none is.

    Attributes:
        source, destination, dropped: the arguments. The destination of a dropped source is the first kept token, which
            gets nothing of it.
        new_destination: [B, r] position of each destination among the kept tokens; -1 if all sources are dropped.
        kept: [B, T - r] positions of the kept tokens, ascending.
        index: [B, T] position among the kept tokens of the token that each token is part of; -1 if it is dropped.
        taken, given: [B, r] float32, set by an ensemble: a destination x_b becomes x_b + sum over its sources a of
            (taken_a x_a - given_a x_b). None before that, and with an ensemble that does not set them.
    """

    taken: Tensor | None = None
    given: Tensor | None = None

    def __init__(self, source: Tensor, destination: Tensor | None, tokens: int, dropped: Tensor | None = None) -> None:
        batch, n_kept = size_of(source, 0), tokens - size_of(source, 1)
        order = torch.arange(tokens, device=source.device).expand(batch, tokens)
        # Integers instead of booleans: torch.jit.trace cannot scatter a boolean value.
        new = order - torch.zeros_like(order).scatter(1, source, 1).cumsum(1)
        # All sources are scattered to one extra position, which is cut off. So shapes are static, and the CPU does not
        # wait for the device.
        place = new.scatter(1, source, n_kept)
        self.kept = new.new_empty(batch, n_kept + 1).scatter(1, place, order)[:, :n_kept]
        if destination is not None and dropped is not None:
            destination = torch.where(dropped, self.kept[:, :1], destination)
        self.source = source
        self.destination = destination
        self.dropped = dropped
        self.new_destination = torch.full_like(source, -1) if destination is None else new.gather(1, destination)
        self.index = new.scatter(1, source, self.without_dropped(self.new_destination, -1))
        self._pairs: Tensor | None = None
        self._numbers: Tensor | None = None
        self._rows: Tensor | None = None

    def destinations(self) -> Tensor:
        """`destination`, as a tensor.

        Raises:
            ValueError: it is None, as the plan drops its sources.
        """
        if self.destination is None:
            raise ValueError("the plan drops its sources, so nothing is merged; use a plan with destinations")
        return self.destination

    def without_dropped(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[B, r] `values` of the sources, with `fill` for dropped ones."""
        return values if self.dropped is None else values.masked_fill(self.dropped, fill)

    @property
    def pairs(self) -> Tensor:
        """[B, 2 r] the sources, followed by their destinations. A dropped source is replaced by its destination."""
        if self._pairs is None:
            destination = self.destinations()
            source = self.source if self.dropped is None else torch.where(self.dropped, destination, self.source)
            self._pairs = torch.cat([source, destination], 1)
        return self._pairs

    @property
    def numbers(self) -> Tensor | None:
        """`crossget.methods.indexing.sequence_numbers` of the batch; None for a batch of one, which needs none."""
        if self._numbers is None and size_of(self.source, 0) != 1:
            self._numbers = sequence_numbers(size_of(self.source, 0), self.source.device)
        return self._numbers

    @property
    def rows(self) -> Tensor:
        """[B * r] `new_destination`, as positions in the concatenation of the kept tokens of all sequences."""
        if self._rows is None:
            self._rows = flat(self.new_destination, size_of(self.kept, 1), self.numbers)
        return self._rows


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
        Sources [B, r] in the order in which they were picked, and their destinations [B, r]. In rows with padding, the
        last sources are padding, see `Candidates.sources`; their destinations have no meaning.

    Source: CrossGET (arXiv 2305.17455), section 3.2 and algorithm 1.
    """
    if candidates.by_kernels:
        pick = None if candidates.padding is None else candidates.sources
        return kernels.complete_graph(candidates.vectors, candidates.protected, r, importance, pick)
    return _complete_graph_by(candidates, candidates.cosines, r, importance)


def _complete_graph_by(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`complete_graph`, with any similarity between tokens."""
    tokens = size_of(candidates.vectors, 1)
    blocked = candidates.blocked()
    if candidates.in_tiles:
        all_pairs: Square | Tiles = Tiles(similar, blocked, candidates.budget)
    else:
        all_pairs = Square(similar, blocked, mirrored=candidates.ties == "stable")
    best = all_pairs.best() + blocked
    own = None if candidates.padding is None else ~candidates.padding
    order = candidates.argsort(best, descending=True, own=own)
    places = torch.arange(tokens, device=order.device, dtype=best.dtype).expand_as(order)
    below = all_pairs.best_below(torch.empty_like(best).scatter(1, order, places)) + blocked
    source = candidates.sources(candidates.argsort(_priority(below, importance), own=own), r)
    return source, all_pairs.nearest(source, blocked.scatter(1, source, -math.inf))


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
    if candidates.prefix is not None and not candidates.in_tiles:
        first, end = candidates.prefix, candidates.prefix + candidates.n_free
        nearest = similar(slice(first + 1, end, 2), slice(first, end, 2)).max(-1)
        scores = None if importance is None else importance[:, first + 1 : end : 2]
        best = candidates.argsort(_priority(nearest.values, scores))
        if torch.compiler.is_compiling():  # a slice that may be the whole would be code of its own
            best = best.index_select(1, torch.arange(r, device=best.device))
        else:
            best = best[:, :r]
        return best * 2 + (first + 1), nearest.indices.gather(1, best) * 2 + first
    a, b, own = _split(candidates)
    values, indices = [], []
    # 2: a tile, and a temporary tensor of its size.
    for part in candidates.parts(size_of(a, 1), 2 * size_of(a, 0) * size_of(b, 1)):
        similarity = similar(a[:, part], b)
        if own is not None:
            similarity.masked_fill_(~(own[0][:, part, None] & own[1][:, None, :]), -math.inf)
        nearest = similarity.max(-1)
        values.append(nearest.values)
        indices.append(nearest.indices)
    value, index = (one[0] if len(one) == 1 else torch.cat(one, 1) for one in (values, indices))
    scores = None if importance is None else importance.gather(1, a)
    best = candidates.argsort(_priority(value, scores), own=None if own is None else own[0])
    return candidates.sources(a.gather(1, best), r), b.gather(1, index.gather(1, best[:, :r]))


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
        # Half of |a|^2 and of 1 / m: the factors of 2 cancel, and each is exact.
        squares = self.points.square().sum(-1)
        self.half_squares = squares / 2
        mass = torch.ones_like(squares) if candidates.sizes is None else candidates.sizes.to(squares.dtype)
        mass = mass if importance is None else mass * importance.exp()
        self.half_inverse_mass = (mass * 2).reciprocal()  # m_a m_b / (m_a + m_b) is 1 / (1 / m_a + 1 / m_b)

    def __call__(self, rows: Rows, columns: Rows) -> Tensor:
        """Args and returns: as for `Candidates.cosines`."""
        (a, a_squares, a_inverse), (b, b_squares, b_inverse) = self._part(rows), self._part(columns)
        # Between all tokens, the product of most pairs is computed once for both orders.
        pairs = torch.bmm(a, b.transpose(1, 2)) if isinstance(rows, slice | Tensor) else symmetric(a)
        for band in bands(pairs):
            part, squares = pairs[:, band], a_squares[:, band, None] + b_squares[:, None, :]
            part.sub_(squares).clamp_max_(0).div_(a_inverse[:, band, None] + b_inverse[:, None, :])
        return pairs

    def _part(self, which: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [B, N, C], half of their squared norms and of their inverse masses [B, N], of some tokens."""
        if isinstance(which, slice):
            return self.points[:, which], self.half_squares[:, which], self.half_inverse_mass[:, which]
        if isinstance(which, Tensor):
            return take(self.points, which), self.half_squares.gather(1, which), self.half_inverse_mass.gather(1, which)
        return self.points, self.half_squares, self.half_inverse_mass


def random(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Random sources and destinations, as a control.

    The choice depends on the seed, the index in the batch and the number of tokens without padding, but not on the
    tokens' values.

    Args and returns: as for `complete_graph`; importance is ignored.
    """
    free = ~candidates.protected
    # The first token is never a source, so every source has a destination.
    draw = candidates.noise().masked_fill(~free | _first(free), 2.0)
    source = candidates.sources(draw.argsort(1), r)
    removed = torch.zeros_like(free, dtype=torch.long).scatter(1, source, 1) > 0
    free = free & ~removed
    # 8: integers of 64 bits, and temporary tensors.
    parts = candidates.parts(r, 8 * size_of(free, 0) * size_of(free, 1))
    drawn = [candidates.noise(r, part).masked_fill(~free[:, None, :], -1.0).argmax(-1) for part in parts]
    return source, drawn[0] if len(drawn) == 1 else torch.cat(drawn, 1)


Matching = Callable[[Candidates, int, "Tensor | None"], "tuple[Tensor, Tensor]"]
MATCHINGS: dict[str, Matching] = {
    "complete_graph": complete_graph, "bipartite": bipartite, "ward": ward, "ward_graph": ward_graph, "random": random,
}  # fmt: skip


def _split(candidates: Candidates) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """The unprotected tokens, alternately in two sets: possible sources [B, n] and destinations [B, m].

    In rows with padding the sets are smaller, and filled up with other tokens, for which the masks [B, n] and [B, m] in
    the third value are false. None: there is no padding.
    """
    free = ~candidates.protected
    turn = free.long().cumsum(1)
    tokens, n_sources = size_of(turn, 1), candidates.n_free // 2
    # Sorted by set: sources, destinations, all others. A set has the same size in every row: shapes are static.
    lengths = candidates.lengths
    n_free = candidates.n_free if lengths is None else (lengths - candidates.n_protected).clamp(min=0)[:, None]
    group = torch.where(free & (turn <= n_free), turn % 2, 2)
    order = (group * tokens + torch.arange(tokens, device=group.device)).argsort(1)
    a, b = order[:, :n_sources], order[:, n_sources : candidates.n_free]
    if lengths is None:
        return a, b, None
    # A row's destinations follow its own sources.
    b = order.gather(1, n_free // 2 + torch.arange(candidates.n_free - n_sources, device=order.device))
    return a, b, (group.gather(1, a) == 0, group.gather(1, b) == 1)


def _priority(similarity: Tensor, importance: Tensor | None) -> Tensor:
    """[B, N] the tokens with the smallest values become sources."""
    return -similarity if importance is None else importance - similarity


def _first(mask: Tensor) -> Tensor:
    """[B, T] true for the first true element of each row of `mask` [B, T]."""
    return mask & (mask.long().cumsum(1) == 1)
