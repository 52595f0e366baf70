"""Similarities of all pairs of tokens: as one [B, T, T] tensor, in tiles of bounded memory, or in bands of rows.

`Square` and `Tiles` answer the same three questions for a matching: each token's largest similarity, its largest
similarity to the tokens below it in a ranking, and the token that is most similar to a source.

Shapes: B batch, T tokens, C channels, r removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crossget.methods.indexing import size_of, take

BUDGET = 1 << 26
"""Similarities that a matching holds at a time, over the whole batch. Above, they are computed in tiles, and twice."""
BAND = 1 << 18
"""Similarities that are scaled or compared at a time on a CPU, so that temporary copies of them stay small."""
ALL = slice(None)
"""All tokens, for a `Similarity`."""

Similarity = Callable[["Tensor | slice", "Tensor | slice"], Tensor]
"""(rows, columns) -> [B, rows, columns] similarities of these tokens; see `matching.Candidates.cosines`."""


class Square:
    """The similarities of all tokens with each other, as one tensor [B, T, T].

    Args:
        similar: how tokens are compared.
        blocked: [B, T] -inf for tokens that take no part, otherwise 0.
        valid: [B, T] tokens of different value are not matched; None when all are alike.
        mirrored: make S_ij and S_ji equal to the last bit.
    """

    def __init__(self, similar: Similarity, blocked: Tensor, valid: Tensor | None, mirrored: bool) -> None:
        self.similarity = similar(ALL, ALL)
        if mirrored:
            # Kernels may round S_ij and S_ji differently, which would break the tie of two nearest neighbours.
            for band in bands(self.similarity):
                rest = slice(band.start, None)
                one, other = self.similarity[:, band, rest], self.similarity[:, rest, band].transpose(1, 2)
                larger = torch.maximum(one, other)
                one.copy_(larger)
                other.copy_(larger)
        # Additions and minima instead of masks: masks of this size take a CPU twenty times as long.
        self.similarity += blocked[:, None, :]
        tokens = size_of(blocked, 1)
        self.similarity.view(-1, tokens * tokens)[:, :: tokens + 1].fill_(-math.inf)  # the diagonal
        if valid is not None:
            self.similarity.masked_fill_(unlike(valid, valid), -math.inf)

    def best(self) -> Tensor:
        """[B, T] the largest similarity of each token."""
        return self.similarity.amax(-1)

    def best_below(self, place: Tensor) -> Tensor:
        """The largest similarity of each token to those that come after it in a ranking.

        Args:
            place: [B, T] each token's place in the ranking, counted from 0.

        Returns:
            [B, T], -inf for the last one.
        """
        best = []
        for band in bands(self.similarity):
            bound = bound_of(place[:, band], place)
            best.append(torch.minimum(self.similarity[:, band], bound, out=bound).amax(-1))
        return best[0] if len(best) == 1 else torch.cat(best, 1)

    def nearest(self, source: Tensor, blocked: Tensor) -> Tensor:
        """[B, r] the token most similar to each source [B, r], after `blocked` [B, T] is added."""
        return nearest_of(take(self.similarity, source), blocked)


def nearest_of(similarity: Tensor, blocked: Tensor) -> Tensor:
    """[B, r] the column with the largest similarity [B, r, T] in each row, of those that `blocked` [B, T] leaves.

    A mask, not an addition: where an image has NaN, a sum would be NaN in blocked columns as well, and they would win.
    """
    return similarity.masked_fill(blocked.isneginf()[:, None, :], -math.inf).argmax(-1)


class Tiles:
    """The same similarities in stripes of rows, which are computed anew each time they are needed.

    Each pair of tokens is computed once and serves both tokens: half the work, and S_ij equals S_ji.

    Args:
        similar, blocked, valid: as for `Square`.
        budget: similarities to hold at a time, over the whole batch.
    """

    def __init__(self, similar: Similarity, blocked: Tensor, valid: Tensor | None, budget: int) -> None:
        self.similar, self.blocked, self.valid = similar, blocked, valid
        self.tokens = size_of(blocked, 1)
        # Scaling and comparing a tile needs temporary tensors of its size.
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
        found = []
        for part in source.split(self.rows, 1):
            stripe = self.similar(part, ALL)
            if self.valid is not None:
                stripe.masked_fill_(unlike(self.valid.gather(1, part), self.valid), -math.inf)
            found.append(nearest_of(stripe, blocked))
        return torch.cat(found, 1)

    def _upper(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and [B, rows, columns] of all tiles on and above the diagonal."""
        blocked, valid = self.blocked, self.valid
        for first in range(0, self.tokens, self.rows):
            rows, columns = slice(first, first + self.rows), slice(first, None)
            tile = self.similar(rows, columns)
            corner = tile[:, :, : self.rows]
            corner.copy_(torch.maximum(corner, corner.transpose(1, 2)))
            corner.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            tile.add_(blocked[:, rows, None]).add_(blocked[:, None, columns])
            if valid is not None:
                tile.masked_fill_(unlike(valid[:, rows], valid[:, columns]), -math.inf)
            yield rows, columns, tile


Pairs = Square | Tiles


def bands(pairs: Tensor) -> list[slice]:
    """The rows of `pairs` [B, N, M] as slices that hold about `BAND` numbers each, over the whole batch.

    On other devices than a CPU, and in a compiled graph, which fuses what is done to the rows, one slice holds all.
    """
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        return [ALL]
    batch, rows, columns = (int(n) for n in pairs.shape)
    step = max(1, BAND // max(1, batch * columns))
    return [slice(first, first + step) for first in range(0, rows, step)]


def bound_of(place: Tensor, other: Tensor) -> Tensor:
    """Upper bounds that keep only the similarities to tokens further down a ranking.

    Args:
        place: [B, N] places of the rows in the ranking, counted from 0.
        other: [B, M] those of the columns.

    Returns:
        [B, N, M] infinity where the column comes after the row, otherwise -inf.
    """
    # The half keeps a token's own pair from 0 * inf, which is not a number.
    return torch.sub(other[:, None, :], (place + 0.5)[:, :, None]).mul_(math.inf)


def unlike(a: Tensor, b: Tensor) -> Tensor:
    """[B, N, M] where one of a pair is padding and the other is not, for `a` [B, N] and `b` [B, M]."""
    return a[:, :, None] != b[:, None, :]


def symmetric(x: Tensor) -> Tensor:
    """[B, T, T] products of all rows of `x` [B, T, C] with each other; those between its halves are computed once."""
    batch, tokens, _ = (size_of(x, dim) for dim in range(3))
    half = tokens // 2
    a, b = x[:, :half], x[:, half:]
    products = x.new_empty(batch, tokens, tokens)
    products[:, :half, half:] = torch.bmm(a, b.transpose(1, 2))
    products[:, half:, :half] = products[:, :half, half:].transpose(1, 2)
    products[:, :half, :half] = torch.bmm(a, a.transpose(1, 2))
    products[:, half:, half:] = torch.bmm(b, b.transpose(1, 2))
    return products
