"""Which token goes where: complete-graph, bipartite and random matching as pure tensor functions.

Every matching picks `r` *sources* (tokens that leave) and, for each, a *destination* (a token that stays and takes
the source in). `Candidates` holds what they choose from; `Plan` holds what was chosen and where every token ends up.

Shapes: B batch, T tokens, C channels, r removed. Nothing here carries a gradient or knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Ties = Literal["reference", "stable"]


class Candidates:
    """What a matching may choose from.

    Args:
        keys: [B, T, C] what tokens are compared by; made unit length here.
        protected: [B, T] true for tokens that are neither source nor destination.
        n_protected: how many are protected in each row, at most (the same for all rows, so that shapes are static).
        valid: [B, T] false for padding. Padding is only ever matched with padding.
        ties: how equal similarities are ranked, see `complete_graph`.
        seed: what a random matching depends on.
    """

    def __init__(
        self,
        keys: Tensor,
        protected: Tensor,
        n_protected: int,
        valid: Tensor | None = None,
        ties: Ties = "reference",
        seed: int = 0,
    ) -> None:
        # Half precision has too few digits to rank cosines; float64 stays.
        wide = keys.float() if keys.dtype in (torch.float16, torch.bfloat16) else keys
        self.keys = F.normalize(wide, dim=-1)
        self.protected = protected
        self.n_free = int(keys.shape[1]) - n_protected
        self.valid = valid
        self.ties = ties
        self.seed = seed

    def limit(self, r: int) -> int:
        """The number of tokens that can really be removed: half of those that may be touched.

        With padding one destination is kept back for each of the two groups that must not mix.
        """
        reserve = 0 if self.valid is None else 2
        return max(0, min(r, (self.n_free - reserve) // 2))

    def similarity(self) -> Tensor:
        """Cosines [B, T, T] with -inf wherever a pair must not be matched: S of the paper, section 3.2."""
        similarity = self.keys @ self.keys.transpose(1, 2)
        if self.ties == "stable":
            # Kernels may round S_ij and S_ji differently, which would break the tie of two nearest neighbours.
            similarity = torch.maximum(similarity, similarity.transpose(1, 2))
        itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
        blocked = itself | self.protected[:, :, None] | self.protected[:, None, :]
        if self.valid is not None:
            blocked = blocked | (self.valid[:, :, None] != self.valid[:, None, :])
        return similarity.masked_fill(blocked, -math.inf)

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
        n = torch.arange(math.prod(shape), device=self.keys.device).view(shape)
        n = n + 7919 * (self.seed + 1) + 104729 * int(self.keys.shape[1])
        for _ in range(2):
            n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return ((n ^ (n >> 16)) & 0xFFFFFF).float() / 2**24


class Plan:
    """The outcome of a matching, and where every token ends up. Survivors keep their order.

    Attributes:
        source: [B, r] tokens that leave.
        destination: [B, r] the token each source joins; None when sources are dropped.
        kept: [B, T - r] tokens that stay, ascending.
        index: [B, T] the new position of each token's content (-1: dropped).
    """

    def __init__(self, source: Tensor, destination: Tensor | None, tokens: int) -> None:
        batch, r = source.shape
        order = torch.arange(tokens, device=source.device)
        # Integers, not booleans: tracing has no scatter with a boolean value.
        stays = torch.ones(batch, tokens, dtype=torch.long, device=source.device).scatter(1, source, 0)
        # The removed ones sort behind the others: static shapes, no wait for the device.
        self.kept = torch.where(stays > 0, order, tokens).sort(1).values[:, : tokens - int(r)]
        new = stays.cumsum(1) - 1
        self.source = source
        self.destination = destination
        arrived = torch.full_like(source, -1) if destination is None else new.gather(1, destination)
        self.index = new.scatter(1, source, arrived)


def complete_graph(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Complete-graph soft matching: every token may join every other.

    Tokens are ranked by their largest similarity; each looks for a partner among those ranked below it, and the `r`
    tokens with the least (importance - similarity to that partner) become sources. Each then joins the most similar
    of all tokens that stay.

    Ties are the rule: two mutual nearest neighbours have the same largest similarity, and their order decides which
    of them may become the source. `ties="reference"` leaves it to the default, unstable `torch.argsort`, as the
    reference does (what it gives on the CPU is part of the reference's results; another device may differ).
    `ties="stable"` ranks the token that comes first in the sequence higher, on every device.

    Args:
        candidates: what may be matched.
        r: how many sources, at most `candidates.limit`.
        importance: [B, T]; None leaves importance out of the choice.

    Returns:
        sources [B, r] in the order they were picked, and destinations [B, r].

    Source: CrossGET (arXiv 2305.17455), section 3.2 and algorithm 1.
    """
    similarity = candidates.similarity()
    order = candidates.argsort(similarity.amax(-1), descending=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    below = rank[:, None, :] > rank[:, :, None]
    partner = similarity.masked_fill(~below, -math.inf).amax(-1)
    source = candidates.argsort(_priority(partner, importance))[:, :r]
    rows = similarity.gather(1, source[:, :, None].expand(-1, -1, similarity.shape[2]))
    leaves = torch.zeros_like(order).scatter(1, source, 1) > 0
    return source, rows.masked_fill(leaves[:, None, :], -math.inf).argmax(-1)


def bipartite(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: tokens are dealt into two sets, sources come from one, destinations are the other.

    The touchable tokens go alternately, in order, to the destinations' and to the sources' set; every source
    candidate proposes its most similar destination, and the `r` best proposals are taken.

    Args, returns: as `complete_graph`.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    free = ~candidates.protected
    turn = free.long().cumsum(1)
    # Sorted by set: sources' set, destinations' set, others. As many are dealt in every row, so that sizes are static.
    group = torch.where(free & (turn <= candidates.n_free), turn % 2, 2)
    tokens = int(group.shape[1])
    order = (group * tokens + torch.arange(tokens, device=group.device)).argsort(1)
    n_sources = candidates.n_free // 2
    a, b = order[:, :n_sources], order[:, n_sources : candidates.n_free]
    similarity = _rows(candidates.keys, a) @ _rows(candidates.keys, b).transpose(1, 2)
    if candidates.valid is not None:
        mixed = candidates.valid.gather(1, a)[:, :, None] != candidates.valid.gather(1, b)[:, None, :]
        similarity = similarity.masked_fill(mixed, -math.inf)
    nearest = similarity.max(-1)
    guide = None if importance is None else importance.gather(1, a)
    best = candidates.argsort(_priority(nearest.values, guide))[:, :r]
    return a.gather(1, best), b.gather(1, nearest.indices.gather(1, best))


def random(candidates: Candidates, r: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sources and destinations by chance: what any matching has to beat.

    The choice depends on the seed, the row and the number of tokens, not on the tokens.

    Args, returns: as `complete_graph`; importance is not looked at.
    """
    batch, tokens, _ = (int(n) for n in candidates.keys.shape)
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
MATCHINGS: dict[str, Matching] = {"complete_graph": complete_graph, "bipartite": bipartite, "random": random}


def _priority(similarity: Tensor, importance: Tensor | None) -> Tensor:
    return -similarity if importance is None else importance - similarity


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _first(mask: Tensor) -> Tensor:
    return mask & (mask.long().cumsum(1) == 1)
