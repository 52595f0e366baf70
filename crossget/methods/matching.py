"""Which token goes where: complete-graph, bipartite, Ward's and random matching as pure tensor functions.

Every matching picks `r` *sources* (tokens that leave) and, for each, a *destination* (a token that stays and takes
the source in). `Candidates` holds what they choose from; `MergePlan` holds what was chosen and where every token ends up.

Shapes: B batch, T tokens, C channels, r removed. Nothing here carries a gradient or knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from crossget.methods import kernels

Ties = Literal["torch", "stable"]
BUDGET = 1 << 26
"""Similarities that a matching holds at a time, over the whole batch: above, they are made in tiles, and twice."""
BAND = 1 << 18
"""Similarities that are scaled or compared at a time on a CPU, so that what is beside them in memory is small."""
_ALL = slice(None)

Similarity = Callable[["Tensor | slice", "Tensor | slice"], Tensor]
"""(rows, columns) -> [B, rows, columns] how well tokens go together; see `Candidates.cosines`."""


class Candidates:
    """What a matching may choose from.

    Args:
        given: [B, T, C] the keys, what tokens are compared by, of any length.
        protected: [B, T] true for tokens that are neither source nor destination.
        n_protected: how many are protected in each row, at most (the same for all rows, so that shapes are static).
        valid: [B, T] false for padding. Padding is only ever matched with padding.
        ties: how equal similarities are ranked, see `complete_graph`.
        seed: what a random matching depends on.
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
        batch, tokens, _ = (int(n) for n in given.shape)
        self.given = given
        self.sizes = sizes
        self.is_half = given.dtype in (torch.float16, torch.bfloat16)
        # In float32 the kernels would do without tensor cores.
        self.by_kernels = self.is_half and kernels.usable(given)
        self.in_tiles = batch * tokens**2 > budget
        self.protected = protected
        self.n_free = tokens - n_protected
        self.valid = valid
        self.ties = ties
        self.seed = seed
        self.budget = budget
        # Made when they are asked for. By hand: Dynamo cannot enter the lock of older Pythons' cached_property.
        self._keys: Tensor | None = None
        self._inverse_norms: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """[B, T, C] the keys in float32 or wider: half precision has too few digits to rank cosines."""
        if self._keys is None:
            self._keys = self.given.float() if self.is_half else self.given
        return self._keys

    @property
    def inverse_norms(self) -> Tensor:
        """[B, T] one over the length of each key, rounded alike with tiles and without."""
        if self._inverse_norms is None:
            self._inverse_norms = torch.linalg.vector_norm(self.keys, dim=-1).clamp_min(1e-12).reciprocal()
        return self._inverse_norms

    def limit(self, r: int) -> int:
        """The number of tokens that can really be removed: half of those that may be touched.

        With padding one destination is kept back for each of the two groups that must not mix.
        """
        reserve = 0 if self.valid is None else 2
        return max(0, min(r, (self.n_free - reserve) // 2))

    def cosines(self, rows: Tensor | slice = _ALL, columns: Tensor | slice = _ALL) -> Tensor:
        """Cosines between some tokens and others, nothing masked: S of the paper, section 3.2.

        The products are scaled, not the keys: there are fewer of them. Scaled by the product of both norms, S_ij and
        S_ji stay equal to the last bit where the processor's products are (not on all: see `ties`).

        Args:
            rows: which tokens, as a slice or as [B, N] positions.
            columns: which others.

        Returns:
            [B, rows, columns].
        """
        (a, a_norms), (b, b_norms) = self._some(rows), self._some(columns)
        products = torch.bmm(a, b.transpose(1, 2))
        if rows is columns:  # all with all: a copy of the keys weighs more than what follows, and is not needed again
            del a, b
            self._keys = None
        for some in bands(products):
            products[:, some].mul_(a_norms[:, some, None] * b_norms[:, None, :])
        return products

    def _some(self, which: Tensor | slice) -> tuple[Tensor, Tensor]:
        if which is _ALL:
            return self.keys, self.inverse_norms
        if isinstance(which, slice):
            return self.keys[:, which], self.inverse_norms[:, which]
        return take(self.keys, which), self.inverse_norms.gather(1, which)

    def hidden(self) -> Tensor:
        """[B, T] what is added to similarities with each token: -inf for one that is protected, otherwise 0."""
        none = self.given.new_zeros(self.protected.shape, dtype=torch.float32 if self.is_half else self.given.dtype)
        return none.masked_fill_(self.protected, -math.inf)

    def argsort(self, values: Tensor, descending: bool = False) -> Tensor:
        """Sorted order of `values` [B, N] along the last axis, with this object's rule for ties."""
        if self.ties == "stable":
            return torch.sort(values, dim=1, descending=descending, stable=True).indices
        return torch.argsort(values, dim=1, descending=descending)

    def noise(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) that depend on the seed and the shape alone.

        A hash instead of a generator: the recomputation of gradient checkpointing, another thread, a compiled graph
        and another device all draw the same numbers.
        """
        n = torch.arange(math.prod(shape), device=self.given.device).view(shape)
        n = n + 7919 * (self.seed + 1) + 104729 * int(self.given.shape[1])
        for _ in range(2):
            n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((n ^ (n >> 16)) & 0xFFFFFF).float() / 2**24


class MergePlan:
    """The outcome of a matching, and where every token ends up. Survivors keep their order.

    Attributes:
        source: [B, r] tokens that leave.
        destination: [B, r] the token each source joins; None when sources are dropped.
        arrived: [B, r] the new position of that destination; -1 when sources are dropped.
        kept: [B, T - r] tokens that stay, ascending.
        index: [B, T] the new position of each token's content (-1: dropped).
        taken, given: [B, r] float32, how much of each source its destination took in, and how much of itself the
            destination gave up for it; None until an ensemble of crossget has joined them.
    """

    taken: Tensor | None = None
    given: Tensor | None = None

    def __init__(self, source: Tensor, destination: Tensor | None, tokens: int) -> None:
        batch, left = int(source.shape[0]), tokens - int(source.shape[1])
        order = torch.arange(tokens, device=source.device).expand(batch, tokens)
        # Integers, not booleans: tracing has no scatter with a boolean value.
        new = order - torch.zeros_like(order).scatter(1, source, 1).cumsum(1)
        # The removed ones share a place behind the others: static shapes, no wait for the device.
        place = new.scatter(1, source, left)
        self.kept = new.new_empty(batch, left + 1).scatter(1, place, order)[:, :left]
        self.source = source
        self.destination = destination
        self.arrived = torch.full_like(source, -1) if destination is None else new.gather(1, destination)
        self.index = new.scatter(1, source, self.arrived)
        self._pairs: Tensor | None = None

    @property
    def joined(self) -> Tensor:
        """[B, r] the destinations; a ValueError where there are none."""
        if self.destination is None:
            raise ValueError("the plan drops its sources: there is nothing to join; use a plan with destinations")
        return self.destination

    @property
    def pairs(self) -> Tensor:
        """[B, 2 r] sources, then their destinations."""
        if self._pairs is None:
            self._pairs = torch.cat([self.source, self.joined], 1)
        return self._pairs


def shares(plan: MergePlan) -> Tensor | None:
    """[B, T] how much of each token is in the token it went into; 0 if it was dropped, None if that is not known."""
    kept = torch.ones_like(plan.index, dtype=torch.float32)
    if plan.destination is None:
        return kept.scatter(1, plan.source, 0.0)
    if plan.taken is None or plan.given is None:
        return None
    return kept.scatter(1, plan.source, plan.taken).scatter_add(1, plan.destination, -plan.given)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows [B, N, C] of `x` [B, T, C] at `index` [B, N]."""
    # Whole rows of a flat tensor are copied as such; a gather would look at an index for every number.
    batch, tokens, width = (int(n) for n in x.shape)
    return x.reshape(batch * tokens, width).index_select(0, flat(index, tokens)).view(batch, -1, width)


def flat(index: Tensor, tokens: int) -> Tensor:
    """[B, N] positions in rows of so many tokens as positions [B * N] in all rows one behind the other."""
    if int(index.shape[0]) == 1:
        return index.reshape(-1)
    first = torch.arange(0, int(index.shape[0]) * tokens, tokens, device=index.device)
    return (index + first[:, None]).view(-1)


def complete_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph soft matching: every token may join every other.

    Tokens are ranked by their largest similarity; each looks for a partner among those ranked below it, and the `r`
    tokens with the least (importance - similarity to that partner) become sources. Each then joins the most similar
    of all tokens that stay.

    Ties are the rule: two mutual nearest neighbours have the same largest similarity, and their order decides which
    of them may become the source. `ties="torch"` leaves it to the default, unstable `torch.argsort`, as the
    reference does (what it gives on the CPU is part of the reference's results; another device may differ, and another
    processor, whose products S_ij and S_ji differ in the last bit).
    `ties="stable"` ranks the token that comes first in the sequence higher, on every device. So do the Triton kernels
    (`crossget.methods.kernels`) that take over on a GPU.

    Args:
        candidates: what may be matched.
        r: how many sources, at most `candidates.limit`.
        importance: [B, T]; None leaves importance out of the choice.

    Returns:
        sources [B, r] in the order they were picked, and destinations [B, r].

    Source: CrossGET (arXiv 2305.17455), section 3.2 and algorithm 1.
    """
    if candidates.by_kernels:
        return kernels.complete_graph(candidates.given, candidates.protected, candidates.valid, r, importance)
    return _in_a_graph(candidates, candidates.cosines, r, importance)


def _in_a_graph(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`complete_graph` by any measure of similarity."""
    tokens = int(candidates.given.shape[1])
    hidden = candidates.hidden()
    pairs = pairs_of(candidates, hidden, similar)
    best = pairs.best() + hidden
    order = candidates.argsort(best, descending=True)
    place = torch.arange(tokens, device=order.device, dtype=best.dtype).expand_as(order)
    partner = pairs.best_below(torch.empty_like(best).scatter(1, order, place)) + hidden
    source = candidates.argsort(_priority(partner, importance))[:, :r]
    leaves = hidden.scatter(1, source, -math.inf)
    return source, pairs.nearest(source, leaves)


class Square:
    """The similarities of all tokens with all others, as one tensor [B, T, T]."""

    def __init__(self, candidates: Candidates, hidden: Tensor, similar: Similarity) -> None:
        self.similarity = similar(_ALL, _ALL)
        if candidates.ties == "stable":
            # Kernels may round S_ij and S_ji differently, which would break the tie of two nearest neighbours.
            for some in bands(self.similarity):
                rest = slice(some.start, None)
                one, other = self.similarity[:, some, rest], self.similarity[:, rest, some].transpose(1, 2)
                larger = torch.maximum(one, other)
                one.copy_(larger)
                other.copy_(larger)
        # Additions and minima instead of masks: masks of this size take a CPU twenty times as long.
        self.similarity += hidden[:, None, :]
        tokens = int(self.similarity.shape[2])
        self.similarity.view(-1, tokens * tokens)[:, :: tokens + 1].fill_(-math.inf)  # the diagonal
        if candidates.valid is not None:
            self.similarity.masked_fill_(_mixed(candidates.valid, candidates.valid), -math.inf)

    def best(self) -> Tensor:
        """[B, T] the largest similarity of each token."""
        return self.similarity.amax(-1)

    def best_below(self, rank: Tensor) -> Tensor:
        """[B, T] the largest similarity of each token to one of a higher `rank` [B, T]; -inf where there is none."""
        best = []
        for some in bands(self.similarity):
            bound = bound_of(rank[:, some], rank)
            best.append(torch.minimum(self.similarity[:, some], bound, out=bound).amax(-1))
        return best[0] if len(best) == 1 else torch.cat(best, 1)

    def nearest(self, source: Tensor, hidden: Tensor) -> Tensor:
        """[B, r] the most similar token of each source [B, r], `hidden` [B, T] added."""
        return (take(self.similarity, source) + hidden[:, None, :]).argmax(-1)


def bands(pairs: Tensor) -> Iterator[slice]:
    """The rows of [B, N, M] in slices, of which one holds about `BAND` numbers over the whole batch.

    Elsewhere than on a CPU, and where a compiler fuses what is done to them, all rows are one slice.
    """
    batch, rows, columns = (int(n) for n in pairs.shape)
    in_parts = pairs.device.type == "cpu" and not torch.compiler.is_compiling()
    step = max(1, BAND // max(1, batch * columns)) if in_parts else rows
    return (slice(first, first + step) for first in range(0, rows, step))


class Tiles:
    """The same similarities in stripes of rows, which are made anew each time they are asked for.

    Each pair of tokens is computed once and looked at from both sides: half the work, and a tie is a tie.
    """

    def __init__(self, candidates: Candidates, hidden: Tensor, similar: Similarity) -> None:
        self.candidates, self.hidden, self.similar = candidates, hidden, similar
        self.batch, self.tokens, _ = (int(n) for n in candidates.keys.shape)
        # Beside a tile, others of its size are needed to scale and to compare it.
        self.rows = max(1, candidates.budget // (4 * self.batch * self.tokens))

    def best(self) -> Tensor:
        """As `Square.best`."""
        best = torch.full_like(self.hidden, -math.inf)
        for rows, columns, tile in self._upper():
            best[:, rows] = torch.maximum(best[:, rows], tile.amax(2))
            best[:, columns] = torch.maximum(best[:, columns], tile.amax(1))
        return best

    def best_below(self, rank: Tensor) -> Tensor:
        """As `Square.best_below`."""
        best = torch.full_like(rank, -math.inf)
        for rows, columns, tile in self._upper():
            bound = bound_of(rank[:, rows], rank[:, columns])
            best[:, rows] = torch.maximum(best[:, rows], torch.minimum(tile, bound).amax(2))
            best[:, columns] = torch.maximum(best[:, columns], torch.minimum(tile, bound.neg_()).amax(1))
        return best

    def nearest(self, source: Tensor, hidden: Tensor) -> Tensor:
        """As `Square.nearest`."""
        found = []
        for some in source.split(self.rows, 1):
            stripe = self.similar(some, _ALL).add_(hidden[:, None, :])
            if self.candidates.valid is not None:
                stripe.masked_fill_(_mixed(self.candidates.valid.gather(1, some), self.candidates.valid), -math.inf)
            found.append(stripe.argmax(-1))
        return torch.cat(found, 1)

    def _upper(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and [B, rows, columns] of all tiles on and above the diagonal."""
        hidden, valid = self.hidden, self.candidates.valid
        for first in range(0, self.tokens, self.rows):
            rows, columns = slice(first, first + self.rows), slice(first, None)
            tile = self.similar(rows, columns)
            corner = tile[:, :, : self.rows]
            corner.copy_(torch.maximum(corner, corner.transpose(1, 2)))
            corner.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            tile.add_(hidden[:, rows, None]).add_(hidden[:, None, columns])
            if valid is not None:
                tile.masked_fill_(_mixed(valid[:, rows], valid[:, columns]), -math.inf)
            yield rows, columns, tile


Pairs = Square | Tiles


def pairs_of(candidates: Candidates, hidden: Tensor, similar: Similarity) -> Pairs:
    """The similarities of all pairs, at once or in tiles; `hidden` [B, T] is added, see `Candidates.hidden`."""
    return (Tiles if candidates.in_tiles else Square)(candidates, hidden, similar)


def bound_of(rank: Tensor, other: Tensor) -> Tensor:
    """[B, N, M] what the similarity of two tokens is cut to: infinity where `other` ranks higher, otherwise -inf."""
    return torch.sub(other[:, None, :], (rank + 0.5)[:, :, None]).mul_(math.inf)  # the half: zero would give no number


def _mixed(a: Tensor, b: Tensor) -> Tensor:
    """[B, N, M] where one of a pair is padding and the other is not."""
    return a[:, :, None] != b[:, None, :]


def bipartite(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: tokens are dealt into two sets, sources come from one, destinations are the other.

    The touchable tokens go alternately, in order, to the destinations' and to the sources' set; every source
    candidate proposes its most similar destination, and the `r` best proposals are taken.

    Args, returns: as `complete_graph`.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    return _of_two_sets(candidates, candidates.cosines, r, importance)


def _of_two_sets(
    candidates: Candidates, similar: Similarity, r: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`bipartite` by any measure of similarity."""
    a, b = _dealt(candidates)
    similarity = similar(a, b)
    if candidates.valid is not None:
        similarity.masked_fill_(_mixed(candidates.valid.gather(1, a), candidates.valid.gather(1, b)), -math.inf)
    nearest = similarity.max(-1)
    guide = None if importance is None else importance.gather(1, a)
    best = candidates.argsort(_priority(nearest.values, guide))[:, :r]
    return a.gather(1, best), b.gather(1, nearest.indices.gather(1, best))


def ward(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite matching by Ward's criterion: the `r` pairs are joined whose joining changes the least.

    Tokens are dealt as in `bipartite`. Joining a and b into their weighted mean moves them by, in sum,
    m_a m_b / (m_a + m_b) |x_a - x_b|^2, where a token's mass m is its size times exp(importance). So tokens join that
    are near to each other, and of those the light ones first: what many input tokens, or important ones, have gone into
    stays as it is. Distances instead of cosines: an offset that all tokens share has no part in them.

    Args:
        candidates: what may be matched; sizes are looked at.
        r: how many sources, at most `candidates.limit`.
        importance: [B, T] logarithm of what a token weighs beside its size; None: the size alone.

    Returns:
        sources [B, r], cheapest first, and destinations [B, r].

    Source: J. H. Ward, Hierarchical grouping to optimize an objective function, JASA 58 (1963), for pairs of two sets.
    """
    return _of_two_sets(candidates, Closeness(candidates, importance), r)


def ward_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ward's criterion in a complete graph: every token may join every other, as in `complete_graph`.

    Three times as many products as for `ward`: 3/4 of T^2 instead of 1/4.

    Args, returns: as `ward`.
    """
    return _in_a_graph(candidates, Closeness(candidates, importance), r)


class Closeness:
    """How little it costs to join two tokens, by Ward's criterion: a similarity, minus the cost.

    Args: as `ward`.
    """

    def __init__(self, candidates: Candidates, importance: Tensor | None) -> None:
        # Around their mean, so that little is lost when large squares are subtracted from each other.
        self.points = candidates.keys - candidates.keys.mean(1, keepdim=True)
        self.squares = self.points.square().sum(-1)
        mass = torch.ones_like(self.squares) if candidates.sizes is None else candidates.sizes.to(self.squares.dtype)
        mass = mass if importance is None else mass * importance.exp()
        self.inverse = mass.reciprocal()  # m_a m_b / (m_a + m_b) is 1 / (1 / m_a + 1 / m_b)

    def __call__(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """As `Candidates.cosines`."""
        (a, a_squares, a_inverse), (b, b_squares, b_inverse) = self._some(rows), self._some(columns)
        # All with all: half of the products are the other half.
        pairs = symmetric(a) if rows is columns else torch.bmm(a, b.transpose(1, 2))
        for some in bands(pairs):
            band, squares = pairs[:, some], a_squares[:, some, None] + b_squares[:, None, :]
            band.mul_(-2).add_(squares).clamp_min_(0).div_(a_inverse[:, some, None] + b_inverse[:, None, :]).neg_()
        return pairs

    def _some(self, which: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        if which is _ALL:
            return self.points, self.squares, self.inverse
        if isinstance(which, slice):
            return self.points[:, which], self.squares[:, which], self.inverse[:, which]
        return take(self.points, which), self.squares.gather(1, which), self.inverse.gather(1, which)


def symmetric(x: Tensor) -> Tensor:
    """[B, T, T] products of all rows of `x` [B, T, C] with each other; those of its two halves are computed once."""
    batch, tokens, _ = (int(n) for n in x.shape)
    half = tokens // 2
    a, b = x[:, :half], x[:, half:]
    products = x.new_empty(batch, tokens, tokens)
    products[:, :half, half:] = torch.bmm(a, b.transpose(1, 2))
    products[:, half:, :half] = products[:, :half, half:].transpose(1, 2)
    products[:, :half, :half] = torch.bmm(a, a.transpose(1, 2))
    products[:, half:, half:] = torch.bmm(b, b.transpose(1, 2))
    return products


def random(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sources and destinations by chance: what any matching has to beat.

    The choice depends on the seed, the row and the number of tokens, not on the tokens.

    Args, returns: as `complete_graph`; importance is not looked at.
    """
    batch, tokens, _ = (int(n) for n in candidates.given.shape)
    free = ~candidates.protected
    valid = candidates.valid if candidates.valid is not None else torch.ones_like(free)
    # The first of each group never leaves, so that every source finds a destination of its group.
    first = _first(free & valid) | _first(free & ~valid)
    draw = candidates.noise(batch, tokens).masked_fill(~free | first, 2.0)
    source = draw.argsort(1)[:, :r]
    leaves = torch.zeros(batch, tokens, dtype=torch.long, device=free.device).scatter(1, source, 1) > 0
    allowed = (free & ~leaves)[:, None, :] & (valid.gather(1, source)[:, :, None] == valid[:, None, :])
    return source, candidates.noise(batch, r, tokens).masked_fill(~allowed, -1.0).argmax(-1)


Matching = Callable[[Candidates, int, "Tensor | None"], "tuple[Tensor, Tensor]"]
MATCHINGS: dict[str, Matching] = {
    "complete_graph": complete_graph, "bipartite": bipartite, "ward": ward, "ward_graph": ward_graph, "random": random,
}  # fmt: skip


def _dealt(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The touchable tokens in two sets, alternately: sources may come from the first, the others are destinations."""
    free = ~candidates.protected
    turn = free.long().cumsum(1)
    # Sorted by set: sources' set, destinations' set, others. As many are dealt in every row, so that sizes are static.
    group = torch.where(free & (turn <= candidates.n_free), turn % 2, 2)
    tokens = int(group.shape[1])
    order = (group * tokens + torch.arange(tokens, device=group.device)).argsort(1)
    n_sources = candidates.n_free // 2
    return order[:, :n_sources], order[:, n_sources : candidates.n_free]


def _priority(similarity: Tensor, importance: Tensor | None) -> Tensor:
    return -similarity if importance is None else importance - similarity


def _first(mask: Tensor) -> Tensor:
    return mask & (mask.long().cumsum(1) == 1)
