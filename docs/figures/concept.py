"""Draw docs/figures/concept.png: `python docs/figures/concept.py`.

A schematic of token merging: the patches of a photograph are joined by their mean colours, with Ward's criterion. No
model takes part. Real merges of real models are drawn by `crossget demo` and `crossget show`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from skimage import data, transform

OUT = Path(__file__).with_name("concept.png")
GRID = 6  # patches in a row and in a column
REMOVED = (10, 9, 8)  # tokens that each block removes
CELL = 40  # pixels of a patch in the thumbnails
CLASS, CROSS, LINE = "#5f5f5f", "#d55e00", "#0072b2"


def photograph() -> np.ndarray:
    """[GRID * CELL, GRID * CELL, 3] in 0 to 1: a cup of coffee (Rachel Michetti, Pikolo Espresso Bar, CC0)."""
    cup = data.coffee()[:400, 80:480]
    return np.asarray(transform.resize(cup, (GRID * CELL, GRID * CELL), anti_aliasing=True))


def join(colours: np.ndarray, sizes: np.ndarray, removed: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Join the two tokens whose joining changes least, `removed` times.

    Args:
        colours: [T, C] the tokens.
        sizes: [T] patches in each.
        removed: how many tokens leave.

    Returns:
        For each token that is left, the indices of the tokens that are in it; and their new colours and sizes.
    """
    members, colours, sizes = [[i] for i in range(len(sizes))], colours.copy(), sizes.copy()
    for _ in range(removed):
        distance = ((colours[:, None] - colours[None]) ** 2).sum(2)
        cost = distance * sizes[:, None] * sizes[None] / (sizes[:, None] + sizes[None])
        cost[np.tril_indices(len(sizes))] = np.inf
        a, b = np.unravel_index(cost.argmin(), cost.shape)
        colours[a] = (colours[a] * sizes[a] + colours[b] * sizes[b]) / (sizes[a] + sizes[b])
        sizes[a] += sizes[b]
        members[a] += members.pop(b)
        colours, sizes = np.delete(colours, b, 0), np.delete(sizes, b)
    return members, colours, sizes


def thumbnail(ax: Axes, image: np.ndarray, groups: np.ndarray, top: float, size: float) -> None:
    """The photograph, each group of patches in its mean colour and outlined."""
    shown, owner = image.copy(), np.kron(groups.reshape(GRID, GRID), np.ones((CELL, CELL), int))
    for group in np.unique(groups):
        if (groups == group).sum() > 1:
            shown[owner == group] = image[owner == group].mean(0)
    ax.imshow(shown, extent=(0, size, top - size, top), zorder=1)
    cell = size / GRID
    grid = groups.reshape(GRID, GRID)
    for y in range(GRID):
        for x in range(GRID):
            left, upper = x * cell, top - y * cell
            if x and grid[y, x] != grid[y, x - 1]:
                ax.plot([left, left], [upper, upper - cell], color="white", lw=1.1, zorder=2)
            if y and grid[y, x] != grid[y - 1, x]:
                ax.plot([left, left + cell], [upper, upper], color="white", lw=1.1, zorder=2)


def draw() -> None:
    """The whole figure."""
    image = photograph()
    patches = image.reshape(GRID, CELL, GRID, CELL, 3).mean((1, 3)).reshape(-1, 3)
    where = np.stack(np.divmod(np.arange(GRID * GRID), GRID), 1) / GRID
    tokens, sizes, groups = np.concatenate([patches, 0.25 * where], 1), np.ones(GRID * GRID), np.arange(GRID * GRID)

    height, thumb, start, step = 4.6, 3.3, 4.6, 0.62
    fig, ax = plt.subplots(figsize=(14, 6.2))
    centre = thumb / 2
    above: list[float] = []
    for level in range(len(REMOVED) + 1):
        top = -level * height
        row = top - centre
        members: list[list[int]] = []
        if level:
            members, tokens, sizes = join(tokens, sizes, REMOVED[level - 1])
            new = {old: i for i, group in enumerate(members) for old in group}
            groups = np.array([new[g] for g in groups])
        thumbnail(ax, image, groups, top, thumb)
        count = len(sizes)
        xs = [start + step * (i + 1) for i in range(count)]
        ends = (start, start + step * (count + 1) + 0.3)
        for i, group in enumerate(members):
            for old in group:
                joined = len(group) > 1
                ax.plot(
                    [above[old + 1], xs[i]], [row + height - 0.3, row + 0.3], zorder=0,
                    color=LINE if joined else "#cccccc", lw=1.2 if joined else 0.8,
                )  # fmt: skip
        if level:
            for end, old, colour in ((ends[0], above[0], CLASS), (ends[1], above[-1], CROSS)):
                ax.plot([old, end], [row + height - 0.3, row + 0.3], color=colour, lw=1.2, zorder=0)
        for x, token, size in zip(xs, tokens, sizes, strict=True):
            ax.add_patch(Rectangle((x - 0.26, row - 0.26), 0.52, 0.52, fc=token[:3].clip(0, 1), ec="white", lw=0.5))
            if size > 1:
                light = token[:3].mean() > 0.55
                ax.text(x, row - 0.02, f"{size:.0f}", ha="center", va="center", fontsize=8, color="k" if light else "w")
        ax.add_patch(Rectangle((ends[0] - 0.26, row - 0.26), 0.52, 0.52, fc=CLASS, ec="white", lw=0.5))
        ax.plot(ends[1], row, marker="D", color=CROSS, ms=9, zorder=3)
        note = "tokens" if level else "patches"
        ax.text(thumb / 2, top + 0.2, f"{count} {note}", ha="center", va="bottom", fontsize=10)
        if not level:
            ax.text(ends[0], row + 0.5, "class\ntoken", ha="center", va="bottom", fontsize=9, color=CLASS)
            ax.text(ends[1], row + 0.5, "cross\ntoken", ha="center", va="bottom", fontsize=9, color=CROSS)
            middle = (xs[0] + xs[-1]) / 2
            ax.text(middle, row + 0.5, "one token for each patch", ha="center", va="bottom", fontsize=10)
            right = ends[1]
        else:
            text = f"block {level}\nattention over all tokens\n{REMOVED[level - 1]} tokens join similar ones"
            text += f"\nMLP on {count} tokens"
            ax.text(right + 0.9, row + height / 2, text, va="center", fontsize=9.5, linespacing=1.35)
        above = [ends[0], *xs, ends[1]]
    ax.text(xs[-1] + 2.4, row, "numbers: patches that a token stands for", va="center", fontsize=9.5)
    ax.set(xlim=(-0.3, right + 7.4), ylim=(-len(REMOVED) * height - thumb - 0.2, 1.0), aspect="equal")
    ax.axis("off")
    fig.savefig(OUT, dpi=130, bbox_inches="tight", pad_inches=0.08, facecolor="white")


if __name__ == "__main__":
    draw()
