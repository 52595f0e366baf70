"""The reducers once more, as loops over the tokens of one image: slow, plain, and the oracle of the fast ones.

Written from the method's description, sharing no code with the package. Only two things are taken from torch, since
they are part of the method's definition: the order in which the default `argsort` puts equal values, and the matrix
product whose rounding decides near-ties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Image:
    """One image's tokens, without padding: plain lists and single rows."""

    tokens: Tensor  # [T, C]
    sizes: list[float]
    protected: list[bool]
    similarity: Tensor  # [T, T] cosines, nothing masked
    importance: list[float]


def similarity_of(image: Image) -> list[list[float]]:
    count = len(image.protected)
    rows = [[-math.inf] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            free = not image.protected[i] and not image.protected[j]
            if i != j and free:
                rows[i][j] = float(image.similarity[i, j])
    return rows


def sort(values: list[float], descending: bool, ties: str, like: Tensor) -> list[int]:
    if ties == "stable":
        sign = -1 if descending else 1
        return sorted(range(len(values)), key=lambda i: (sign * values[i], i))
    return torch.argsort(torch.tensor([values], dtype=like.dtype), dim=1, descending=descending)[0].tolist()


def first_best(candidates: list[int], row: list[float]) -> int:
    best = candidates[0]
    for j in candidates:
        if row[j] > row[best]:
            best = j
    return best


def complete_graph(image: Image, r: int, guided: bool, ties: str) -> list[tuple[int, int]]:
    rows = similarity_of(image)
    count = len(rows)
    ranked = sort([max(row) for row in rows], True, ties, image.similarity)
    rank = {token: place for place, token in enumerate(ranked)}
    priority = []
    for i in range(count):
        partner = max((rows[i][j] for j in range(count) if rank[j] > rank[i]), default=-math.inf)
        priority.append((image.importance[i] if guided else 0.0) - partner)
    sources = sort(priority, False, ties, image.similarity)[:r]
    stay = [j for j in range(count) if j not in sources]
    return [(i, first_best(stay, rows[i])) for i in sources]


def bipartite(image: Image, r: int, guided: bool, ties: str, n_protected: int) -> list[tuple[int, int]]:
    free = [i for i, p in enumerate(image.protected) if not p][: len(image.protected) - n_protected]
    givers, takers = free[1::2], free[0::2]
    rows = similarity_of(image)
    nearest = [first_best(takers, rows[i]) for i in givers]
    priority = [(image.importance[i] if guided else 0.0) - rows[i][j] for i, j in zip(givers, nearest, strict=True)]
    order = sort(priority, False, ties, image.similarity)[:r]
    return [(givers[k], nearest[k]) for k in order]


def ward_costs(image: Image, points: Tensor, masses: list[float]) -> list[list[float]]:
    """[T, C] points -> m_a m_b / (m_a + m_b) |x_a - x_b|^2, infinite for a pair that must not join."""
    count = len(masses)
    costs = [[math.inf] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            free = not image.protected[i] and not image.protected[j]
            if i != j and free:
                mass = masses[i] * masses[j] / (masses[i] + masses[j])
                costs[i][j] = mass * float((points[i] - points[j]).square().sum())
    return costs


def ward(image: Image, points: Tensor, masses: list[float], r: int, n_protected: int) -> list[tuple[int, int]]:
    """The r cheapest proposals of the sources' set."""
    free = [i for i, p in enumerate(image.protected) if not p][: len(image.protected) - n_protected]
    givers, takers = free[1::2], free[0::2]
    costs = ward_costs(image, points, masses)
    proposals = []
    for i in givers:
        where = min(takers, key=lambda j: (costs[i][j], takers.index(j)))
        proposals.append((costs[i][where], i, where))
    return [(i, j) for _, i, j in sorted(proposals)[:r]]


def ward_graph(image: Image, points: Tensor, masses: list[float], r: int) -> list[tuple[int, int]]:
    """The r tokens that join one of a worse rank most cheaply, each with the cheapest of those that stay."""
    costs = ward_costs(image, points, masses)
    ranked = sorted(range(len(masses)), key=lambda i: (min(costs[i]), i))
    behind = {i: min((costs[i][j] for j in ranked[place + 1 :]), default=math.inf) for place, i in enumerate(ranked)}
    sources = sorted(behind, key=lambda i: (behind[i], i))[:r]
    stay = [j for j in range(len(masses)) if j not in sources]
    return [(i, min(stay, key=lambda j: (costs[i][j], j))) for i in sources]


def ensemble(image: Image, pairs: list[tuple[int, int]], kind: str) -> tuple[Tensor, list[float]]:
    tokens = image.tokens.double()
    leaves = {i for i, _ in pairs}
    rows, sizes = [], []
    for b in range(len(image.sizes)):
        if b in leaves:
            continue
        mine = [a for a, destination in pairs if destination == b]
        size = image.sizes[b] + sum(image.sizes[a] for a in mine)
        if kind == "normalized":
            weights = {i: image.sizes[i] * math.exp(image.importance[i]) for i in [b, *mine]}
            row = sum(weights[i] * tokens[i] for i in weights) / sum(weights.values())
        else:
            row = image.sizes[b] * tokens[b]
            for a in mine:
                weight_a, weight_b = 1.0, 1.0
                if kind == "guided":
                    ea, eb = math.exp(image.importance[a]), math.exp(image.importance[b])
                    weight_a, weight_b = 2 * ea / (ea + eb), 2 * eb / (ea + eb)
                row = row + weight_a * image.sizes[a] * tokens[a] + (weight_b - 1) * image.sizes[b] * tokens[b]
            row = row / size
        rows.append(row)
        sizes.append(size)
    return torch.stack(rows), sizes


def guide_importance(unit_keys: Tensor, queries: Tensor, guide: int) -> list[float]:
    """[T, C] keys of length one, [T, C] queries."""
    query = queries[guide].double()
    query = query / query.norm()
    return [float(key.double() @ query) for key in unit_keys]


def attention_importance(attention: Tensor) -> list[float]:
    """[T, T] probabilities of one image, averaged over heads."""
    count = len(attention)
    out = []
    for j in range(count):
        others = [float(attention[i, j]) for i in range(count - 1)]
        out.append((sum(others) / len(others) if others else 0.0) + float(attention[count - 1, j]))
    return out
