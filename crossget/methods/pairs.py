"""Similarities of all pairs of tokens, as one [B, T, T] tensor or in tiles of bounded memory.

`Square` and `Tiles` have the same three methods: a token's largest similarity, its largest similarity to the tokens
below it in a ranking, and the most similar token of each source.

Shapes: B batch, T tokens, C channels, r removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crossget.methods.indexing import size_of, take

BUDGET = 1 << 26
"""Similarities that a matching keeps in memory, over the whole batch. If there are more, they are computed in tiles."""
BAND = 1 << 18
"""Similarities that are scaled or compared in one step on a CPU, so that temporary tensors stay small."""
ALL = None
"""All tokens, for a `Similarity`. A compiled graph cannot compare slices with each other: it would fix their ends."""

Rows = Tensor | slice | None
Similarity = Callable[[Rows, Rows], Tensor]
"""(rows, columns) -> [B, rows, columns] similarities of these tokens; see `matching.Candidates.cosines`."""


class Square:
    """The similarities of all tokens with each other, as one tensor [B, T, T].

    Args:
        similar: computes the similarities.
        blocked: [B, T] -inf for tokens that must not be matched, otherwise 0.
        mirrored: make S_ij and S_ji equal to the last bit.
    """

    def __init__(self, similar: Similarity, blocked: Tensor, mirrored: bool) -> None:
        self.similarity = similar(ALL, ALL)
        if mirrored:
            # A matrix product may round S_ij and S_ji differently, which would break the tie of mutual neighbours.
            for band in bands(self.similarity):
                rest = slice(band.start, None)
                one, other = self.similarity[:, band, rest], self.similarity[:, rest, band].transpose(1, 2)
                larger = torch.maximum(one, other)
                one.copy_(larger)
                other.copy_(larger)
        # Additions and minima instead of boolean masks, which take a CPU twenty times as long.
        self.similarity += blocked[:, None, :]
        tokens = size_of(blocked, 1)
        self.similarity.view(-1, tokens * tokens)[:, :: tokens + 1].fill_(-math.inf)  # the diagonal

    def best(self) -> Tensor:
        """[B, T] the largest similarity of each token."""
        return self.similarity.amax(-1)

    def best_below(self, place: Tensor) -> Tensor:
        """The largest similarity of each token to the tokens below it in a ranking.

        Args:
            place: [B, T] each token's place in the ranking, from 0.

        Returns:
            [B, T], -inf for the last token of the ranking.
        """
        best = []
        for band in bands(self.similarity):
            bound = bound_of(place[:, band], place)
            # In place, but without `out`: torch.func and a trace that runs with gradients do not take that.
            best.append(bound.clamp_max_(self.similarity[:, band]).amax(-1))
        return best[0] if len(best) == 1 else torch.cat(best, 1)

    def nearest(self, source: Tensor, blocked: Tensor) -> Tensor:
        """[B, r] the most similar token of each source [B, r], among those that `blocked` [B, T] allows."""
        return nearest_of(take(self.similarity, source), blocked)


def nearest_of(similarity: Tensor, blocked: Tensor) -> Tensor:
    """[B, r] the column of the largest similarity [B, r, T], among those that `blocked` [B, T] allows.

    A mask, not an addition: in an image with NaN a sum would be NaN in blocked columns as well, and argmax takes NaN.
    """
    return similarity.masked_fill(blocked.isneginf()[:, None, :], -math.inf).argmax(-1)


class Tiles:
    """The same similarities in tiles, which each method computes again.

    A tile is above or on the diagonal, and is used for its rows and for its columns. So a pair of tokens is computed
    once for both orders, and S_ij equals S_ji.

    Args:
        similar, blocked: as for `Square`.
        budget: similarities in memory at a time, over the whole batch.
    """

    def __init__(self, similar: Similarity, blocked: Tensor, budget: int) -> None:
        self.similar, self.blocked = similar, blocked
        self.tokens = size_of(blocked, 1)
        # 4: a tile and the temporary tensors of its size, for scaling and comparing.
        self.rows = max(1, budget // (4 * size_of(blocked, 0) * self.tokens))

    def best(self) -> Tensor:
        """As `Square.best`."""
        best = torch.full_like(self.blocked, -math.inf)
        for rows, columns, tile in self._upper():
            best[:, rows] = torch.maximum(best[:, rows], tile.amax(2))
            best[:, columns] = torch.maximum(best[:, columns], tile.amax(1))
        return best

    def best_below(self, place: Tensor) -> Tensor:
        """As `Square.best_below`."""
        best = torch.full_like(place, -math.inf)
        for rows, columns, tile in self._upper():
            bound = bound_of(place[:, rows], place[:, columns])
            best[:, rows] = torch.maximum(best[:, rows], torch.minimum(tile, bound).amax(2))
            best[:, columns] = torch.maximum(best[:, columns], torch.minimum(tile, bound.neg_()).amax(1))
        return best

    def nearest(self, source: Tensor, blocked: Tensor) -> Tensor:
        """As `Square.nearest`."""
        parts = source.split(self.rows, 1)
        return torch.cat([nearest_of(self.similar(part, ALL), blocked) for part in parts], 1)

    def _upper(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and similarities [B, rows, columns] of all tiles on and above the diagonal."""
        blocked = self.blocked
        for first in range(0, self.tokens, self.rows):
            rows, columns = slice(first, first + self.rows), slice(first, None)
            tile = self.similar(rows, columns)
            corner = tile[:, :, : self.rows]
            corner.copy_(torch.maximum(corner, corner.transpose(1, 2)))
            corner.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            tile.add_(blocked[:, rows, None]).add_(blocked[:, None, columns])
            yield rows, columns, tile


Pairs = Square | Tiles


def bands(pairs: Tensor) -> list[slice]:
    """Slices of the rows of `pairs` [B, N, M], each with about `BAND` elements over the whole batch.

    On devices other than a CPU, and in a compiled graph, which fuses the operators on the rows, one slice has all rows.
    """
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    batch, rows, columns = (int(n) for n in pairs.shape)
    step = max(1, BAND // max(1, batch * columns))
    return [slice(first, first + step) for first in range(0, rows, step)]


def bound_of(place: Tensor, other: Tensor) -> Tensor:
    """Upper bounds for similarities: a minimum with them leaves only the tokens below in a ranking.

    Args:
        place: [B, N] places of the rows' tokens in the ranking, from 0.
        other: [B, M] places of the columns' tokens.

    Returns:
        [B, N, M] inf where the column's token is below the row's, otherwise -inf.
    """
    # Without the 0.5 the pair of a token with itself would be 0 * inf, which is NaN.
    return torch.sub(other[:, None, :], (place + 0.5)[:, :, None]).mul_(math.inf)


def symmetric(x: Tensor) -> Tensor:
    """[B, T, T] x @ x^T of `x` [B, T, C]. The products between the two halves of its rows are computed once."""
    batch, tokens, _ = (size_of(x, dim) for dim in range(3))
    half = tokens // 2
    a, b = x[:, :half], x[:, half:]
    products = x.new_empty(batch, tokens, tokens)
    products[:, :half, half:] = torch.bmm(a, b.transpose(1, 2))
    products[:, half:, :half] = products[:, :half, half:].transpose(1, 2)
    products[:, :half, :half] = torch.bmm(a, a.transpose(1, 2))
    products[:, half:, half:] = torch.bmm(b, b.transpose(1, 2))
    return products
