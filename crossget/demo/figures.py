"""Pictures: which patches are merged, and what a method costs. Pure functions; matplotlib is imported when drawing.

Shape letters: H, W pixels; h, w patches; T0 tokens before any reduction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with the common colour vision deficiencies, and in grey.
COLOURS = {"dense": "#5f5f5f", "ToMe-style": "#e69f00", "CrossGET": "#0072b2", "Ward": "#009e73"}
FALLBACK_COLOURS = ("#d55e00", "#cc79a7", "#56b4e9")

# Colours of groups of merged patches: the same palette without the grey of dense models.
GROUP_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
TINT = 0.45  # opacity of a group's colour on its patches

PRUNED = -1  # in a source map: the token was dropped
PRUNED_BRIGHTNESS = 0.15
TEXT_BRIGHTNESS = 0.7  # text is thinner than lines and needs more contrast
SMALLEST_CELL = 16  # pixels of a patch; outlines would hide smaller ones


@dataclass(frozen=True)
class Curve:
    """One method's numbers, for the plots on the left of the sheet.

    Attributes:
        name: of the method; it determines the colour, see `colour_of`.
        tokens: tokens entering each block of the image tower.
        gflops: of one image.
        cosine: similarity of the output feature with the dense model's; None if it is not shown.
        speed: images per second as a ratio to dense; None if not measured.
    """

    name: str
    tokens: Sequence[int]
    gflops: float
    cosine: float | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Attributes:
        image: [H, W, 3] in 0 to 1.
        caption: text above the image; may be empty.
        colour: of the caption; None is black.
    """

    image: Tensor
    caption: str = ""
    colour: str | None = None


def colour_of(name: str) -> str:
    """The colour of a method; equal names have equal colours."""
    return COLOURS.get(name) or FALLBACK_COLOURS[sum(name.encode()) % len(FALLBACK_COLOURS)]


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of `patches` square patches that tile an image of height x width pixels.

    Raises:
        ValueError: no such grid.
    """
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or patches % rows or patches // rows != round(rows * width / height):
        raise ValueError(f"{patches} tokens do not tile an image of {height}x{width} pixels with square patches")
    return rows, patches // rows


def merge_map(
    image: Tensor, source: Tensor, grid: tuple[int, int], prefix: int, outline: str = "#ffffff", line: int = 2
) -> Tensor:
    """The image with every group of merged patches outlined and in its mean colour; other patches are unchanged.

    Args:
        image: [H, W, 3] in 0 to 1.
        source: [T0] the output token that each input token is part of; -1 for a dropped one, which is darkened.
        grid: rows and columns of patches.
        prefix: tokens before the first patch.
        outline: colour of the lines around groups, "#rrggbb".
        line: width of the lines in pixels, an even number; 0 draws none.

    Returns:
        [h * cell, w * cell, 3] in 0 to 1, where cell is the patch size, at least 16 pixels.

    Raises:
        ValueError: the shapes do not fit together.
    """
    groups = _grid_of(source, grid, prefix)
    canvas, cell = _canvas(image, grid)
    merged = _is_merged(groups)
    flat = _group_means(canvas, groups, cell)
    pixels = _enlarge(merged, cell)[:, :, None]
    canvas = torch.where(pixels, flat, canvas)
    canvas = torch.where(_enlarge(groups == PRUNED, cell)[:, :, None], canvas * PRUNED_BRIGHTNESS, canvas)
    if line == 0:
        return canvas
    borders = _borders(groups, merged, cell, line)
    return torch.where(borders[:, :, None], _rgb(outline), canvas)


def follow_groups(sources: Sequence[Tensor]) -> Tensor:
    """The group of each patch after each block, under an id that a group keeps from block to block.

    An id is the number of a patch. When groups are merged, the new group has the id of the largest of them; of equally
    large ones, the lowest id.

    Args:
        sources: for each block [P], the token after it that each patch is part of; -1 for a dropped patch.

    Returns:
        [blocks + 1, P] group ids. In the first row every patch is a group of its own. -1 for a dropped patch.
    """
    groups = torch.arange(len(sources[0]) if sources else 0)
    rows = [groups]
    for source in sources:
        merged = torch.full_like(groups, PRUNED)
        for token in source[source >= 0].unique():
            members = source == token
            ids, counts = groups[members].unique(return_counts=True)  # ids ascend, and argmax takes the first maximum
            merged[members] = ids[counts.argmax()]
        groups = merged
        rows.append(groups)
    return torch.stack(rows)


def colour_groups(groups: Tensor, grid: tuple[int, int]) -> dict[int, int]:
    """A colour for every group that has several patches in some row; adjacent groups differ where possible.

    Args:
        groups: [rows, P] from `follow_groups`, of one or several forwards over the same patches.
        grid: rows and columns of patches.

    Returns:
        Id of a group -> index into `GROUP_COLOURS`, the largest groups first.
    """
    largest: dict[int, int] = {}
    beside: dict[int, set[int]] = {}
    for row in groups:
        found, counts = row.unique(return_counts=True)
        sizes = {int(g): int(n) for g, n in zip(found, counts, strict=True) if n > 1 and g != PRUNED}
        for group, n in sizes.items():
            largest[group] = max(n, largest.get(group, 0))
        cells = row.reshape(grid)
        pairs = [(cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])]
        touching = {pair for a, b in pairs for pair in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)}
        for a, b in touching:
            if a != b and a in sizes and b in sizes:
                beside.setdefault(a, set()).add(b)
                beside.setdefault(b, set()).add(a)
    colours: dict[int, int] = {}
    for group in sorted(largest, key=lambda g: (-largest[g], g)):
        near = [colours[other] for other in beside.get(group, ()) if other in colours]
        used = list(colours.values())
        colours[group] = min(range(len(GROUP_COLOURS)), key=lambda c: (near.count(c), used.count(c), c))
    return colours


def group_map(image: Tensor, groups: Tensor, colours: Mapping[int, int], grid: tuple[int, int]) -> Tensor:
    """The image with every group of several patches tinted and outlined in its colour; dropped patches are darkened.

    Args:
        image: [H, W, 3] in 0 to 1.
        groups: [P] one row of `follow_groups`.
        colours: from `colour_groups`.
        grid: rows and columns of patches.

    Returns:
        As `merge_map`.
    """
    cells = _grid_of(groups, grid, 0)
    canvas, cell = _canvas(image, grid)
    merged = _is_merged(cells)
    paint = torch.stack([_rgb(GROUP_COLOURS[colours.get(int(g), 0)]) for g in cells.flatten()])
    paint = paint.reshape(*cells.shape, 3).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    inside = _enlarge(merged, cell)[:, :, None]
    canvas = torch.where(inside, (1 - TINT) * canvas + TINT * paint, canvas)
    canvas = torch.where(_enlarge(cells == PRUNED, cell)[:, :, None], canvas * PRUNED_BRIGHTNESS, canvas)
    # On each side of a border the line has the colour of the group on that side.
    borders = _borders(cells, merged, cell, 4)[:, :, None] & inside
    return torch.where(borders, paint, canvas)


def _grid_of(source: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """[h, w] the entries of the patches."""
    h, w = grid
    if source.dim() != 1 or source.shape[0] - prefix != h * w:
        raise ValueError(
            f"a source map of shape {list(source.shape)} less {prefix} prefix tokens is not a grid of {h}x{w} patches"
        )
    return source[prefix:].reshape(h, w).cpu()


def _canvas(image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """The image resized to a multiple of the grid, and the side of a patch in pixels."""
    if image.dim() != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image [H, W, 3], got shape {list(image.shape)}")
    cell = max(round(image.shape[0] / grid[0]), SMALLEST_CELL)
    pixels = image.detach().float().cpu().permute(2, 0, 1)[None]
    size = (grid[0] * cell, grid[1] * cell)
    if size != tuple(image.shape[:2]):
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return pixels[0].permute(1, 2, 0).clamp(0, 1), cell


def _is_merged(groups: Tensor) -> Tensor:
    """[h, w] true where a patch shares its token with another patch."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    shared: Tensor = count[index] > 1
    return shared & (groups != PRUNED)


def _group_means(canvas: Tensor, groups: Tensor, cell: int) -> Tensor:
    """[H, W, 3] the mean colour of the group at every pixel."""
    means = F.avg_pool2d(canvas.permute(2, 0, 1), cell).flatten(1).T  # [h * w, 3]
    _, index, count = groups.flatten().unique(return_inverse=True, return_counts=True)
    colours: Tensor = torch.zeros(len(count), 3).index_add_(0, index, means) / count[:, None]
    h, w = groups.shape
    return colours[index].reshape(h, w, 3).repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def _borders(groups: Tensor, merged: Tensor, cell: int, line: int) -> Tensor:
    """[H, W] true on the lines between patches of different tokens, at least one of which is merged."""
    label, inside = _enlarge(groups, cell), _enlarge(merged, cell)
    border = torch.zeros_like(inside)
    for axis in (0, 1):
        size = label.shape[axis] - 1
        here, there = (0, size), (1, size)
        differs = label.narrow(axis, *here) != label.narrow(axis, *there)
        edge = differs & (inside.narrow(axis, *here) | inside.narrow(axis, *there))
        border.narrow(axis, *here).logical_or_(edge)
        border.narrow(axis, *there).logical_or_(edge)
    return _thicken(border, line)


def _thicken(border: Tensor, line: int) -> Tensor:
    """Widen lines of two pixels to `line` pixels, an even number."""
    extra = (line - 1) // 2
    if extra < 1:
        return border
    grown = F.max_pool2d(border[None, None].float(), 2 * extra + 1, stride=1, padding=extra)
    return grown[0, 0] > 0


def _enlarge(cells: Tensor, cell: int) -> Tensor:
    return cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def _rgb(colour: str) -> Tensor:
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


@dataclass(frozen=True)
class Summary:
    """The content of `draw_summary`.

    Attributes:
        title: the headline.
        subtitle: a smaller line below it.
        curves: the first is the dense model, which the others are compared with.
        rows: panels, one row per photograph; may be empty.
        item: the input of a forward, for the titles of the plots.
        footer: small lines at the bottom.
    """

    title: str
    subtitle: str
    curves: Sequence[Curve]
    rows: Sequence[Sequence[Panel]] = ()
    item: str = "image"
    footer: Sequence[str] = ()


# Inches; the sheet grows with the photographs.
_LEFT, _COLUMN, _PANEL, _HEAD, _FOOT_LINE = 1.05, 5.3, 2.2, 1.1, 0.17


def draw_summary(summary: Summary) -> Figure:
    """Draw one picture: the costs of the methods on the left, the merged patches on the right.

    Returns:
        A figure without a window; `figure.savefig(path)` writes it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    columns = max((len(row) for row in summary.rows), default=0)
    foot = 0.25 + _FOOT_LINE * len(summary.footer)
    width = _COLUMN + (0.3 + columns * (_PANEL + 0.06) if columns else 0.2)
    height = _HEAD + foot + max(6.2, len(summary.rows) * (_PANEL + 0.26))
    figure = require_matplotlib()(figsize=(width, height), dpi=110)
    _draw_left(figure, summary, foot)
    for i, row in enumerate(summary.rows):
        for j, panel in enumerate(row):
            # Rows start at the top of the sheet, beside the first plot.
            x = _COLUMN + 0.25 + j * (_PANEL + 0.06)
            y = height - _HEAD - i * (_PANEL + 0.26) - _PANEL
            draw_panel(figure.add_axes((x / width, y / height, _PANEL / width, _PANEL / height)), panel)
    _frame(figure, summary.title, summary.subtitle, summary.footer)
    return figure


def _draw_left(figure: Figure, summary: Summary, foot: float) -> None:
    curves, dense = summary.curves, summary.curves[0].gflops
    width, height = figure.get_figwidth(), figure.get_figheight()
    with_cosine = all(c.cosine is not None for c in curves)
    axes = [figure.add_axes(box) for box in _left_boxes(width, height, foot, 3 if with_cosine else 2)]
    draw_tokens(axes[0], curves)
    flops = [f"{c.gflops:.3g}" + ("" if c is curves[0] else f"  ({c.gflops / dense - 1:+.0%})") for c in curves]
    draw_bars(axes[1], curves, [c.gflops for c in curves], flops, f"GFLOPs per {summary.item} (a multiply-add is one)")
    speeds = [c.speed or 0.0 for c in curves]
    labels = ["not measured" if c.speed is None else f"{c.speed:.2f}x" for c in curves]
    draw_bars(axes[2], curves, speeds, labels, f"{summary.item}s per second, as a ratio to dense")
    if with_cosine:
        cosines = [c.cosine or 0.0 for c in curves]
        labels = [f"{c:.3f}" for c in cosines]
        draw_bars(axes[3], curves, cosines, labels, "image feature: mean cosine similarity with dense")


def _left_boxes(width: float, height: float, foot: float, plots: int) -> list[tuple[float, float, float, float]]:
    """The places of the curves and of the bar plots below them: x, y, width, height as shares of the sheet."""
    space = height - _HEAD - foot
    bars = min(max(0.12 * space, 0.8), 1.2)
    title, block_numbers = 0.5, 0.45
    boxes = [(foot + 0.05 + i * (bars + title), bars) for i in reversed(range(plots))]
    bottom = boxes[0][0] + bars + title + block_numbers
    boxes.insert(0, (bottom, height - _HEAD - bottom))
    return [(_LEFT / width, y / height, (_COLUMN - _LEFT) / width, high / height) for y, high in boxes]


@dataclass(frozen=True)
class BlockSheet:
    """The content of `draw_block_sheet`.

    Attributes:
        title: the headline.
        subtitle: a smaller line below it.
        photograph: [H, W, 3] in 0 to 1.
        curves: the dense model and every method; their tokens are drawn.
        rows: for each method a line of text and the panels of the blocks.
        footer: small lines at the bottom.
    """

    title: str
    subtitle: str
    photograph: Tensor
    curves: Sequence[Curve]
    rows: Sequence[tuple[str, Sequence[Panel]]]
    footer: Sequence[str] = ()


def draw_block_sheet(sheet: BlockSheet) -> Figure:
    """Draw one picture: the groups of merged patches of one photograph for each method, block by block.

    Returns:
        A figure without a window; `figure.savefig(path)` writes it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    side, caption, gap, head = 2.6, 0.6, 0.08, 0.85
    rows, columns, left = max(2, len(sheet.rows)), len(sheet.rows[0][1]), side + 0.9
    foot = 0.25 + _FOOT_LINE * len(sheet.footer)
    width, height = left + columns * (side + gap) + 0.15, head + rows * (side + caption) + foot

    def box(x: float, row: int, high: float = side) -> tuple[float, float, float, float]:
        """The place of a picture: `x` inches from the left, in a row counted from the top."""
        top = height - head - row * (side + caption) - caption
        return x / width, (top - high) / height, side / width, high / height

    figure = require_matplotlib()(figsize=(width, height), dpi=150)
    draw_panel(figure.add_axes(box(0.45, 0)), Panel(sheet.photograph, "as the model sees it"))
    draw_tokens(figure.add_axes(box(0.45, 1, side - 0.45)), sheet.curves)  # the lower 0.45 hold the axis labels
    for i, (title, panels) in enumerate(sheet.rows):
        x, y = left / width, (height - head - i * (side + caption) - 0.12) / height
        figure.text(x, y, title, va="top", fontsize=10.5, fontweight="bold", color="#222222")
        for j, panel in enumerate(panels):
            draw_panel(figure.add_axes(box(left + j * (side + gap), i)), panel)
    _frame(figure, sheet.title, sheet.subtitle, sheet.footer)
    return figure


def draw_rows(title: str, subtitle: str, rows: Sequence[tuple[str, Sequence[Panel]]], footer: Sequence[str]) -> Figure:
    """Draw one picture: rows of panels, each below a line of text.

    Returns:
        A figure without a window; `figure.savefig(path)` writes it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    side, caption, gap, head = 2.6, 0.6, 0.08, 0.85
    columns, foot = max(len(panels) for _, panels in rows), 0.25 + _FOOT_LINE * len(footer)
    width, height = max(0.4 + columns * (side + gap), 7.0), head + len(rows) * (side + caption) + foot
    figure = require_matplotlib()(figsize=(width, height), dpi=150)
    for i, (line, panels) in enumerate(rows):
        top = height - head - i * (side + caption)
        figure.text(0.2 / width, (top - 0.12) / height, line, va="top", fontsize=10.5, fontweight="bold")
        for j, panel in enumerate(panels):
            box = ((0.2 + j * (side + gap)) / width, (top - caption - side) / height, side / width, side / height)
            draw_panel(figure.add_axes(box), panel)
    _frame(figure, title, subtitle, footer)
    return figure


def _frame(figure: Figure, title: str, subtitle: str, footer: Sequence[str]) -> None:
    """Draw the title, the subtitle and the footer."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    figure.text(0.2 / width, 1 - 0.18 / height, title, va="top", fontsize=14, fontweight="bold")
    figure.text(0.2 / width, 1 - 0.5 / height, subtitle, va="top", fontsize=10, color="#333333")
    for i, line in enumerate(reversed(footer)):
        figure.text(0.2 / width, (0.1 + _FOOT_LINE * i) / height, line, fontsize=8, color="#333333")


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw an image without axes, with its caption above it."""
    axes.imshow(panel.image.numpy(), interpolation="nearest")
    axes.set_axis_off()
    colour = _rgb(panel.colour or "#000000") * TEXT_BRIGHTNESS
    axes.set_title(panel.caption, fontsize=9, color=tuple(colour.tolist()), pad=3)


def draw_tokens(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw the tokens entering each block."""
    for i, curve in enumerate(curves):
        blocks = range(1, len(curve.tokens) + 1)
        # Curves of methods that remove the same number coincide: later curves are thinner, so all remain visible.
        axes.plot(blocks, curve.tokens, color=colour_of(curve.name), label=curve.name, marker="o",
                  markersize=8 - 2 * i, linewidth=5 - 1.4 * i)  # fmt: skip
    axes.set_ylim(0, 1.08 * max(max(curve.tokens) for curve in curves))
    axes.set_title("tokens entering each block", fontsize=10, loc="left")
    axes.set_xlabel("block", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    _bare(axes)


def draw_bars(axes: Axes, curves: Sequence[Curve], values: Sequence[float], labels: Sequence[str], title: str) -> None:
    """Draw a horizontal bar per method, with its number at the end."""
    names = [c.name for c in curves]
    bars = axes.barh(names, values, color=[colour_of(n) for n in names], height=0.72)
    axes.bar_label(bars, labels=list(labels), padding=4, fontsize=9)
    axes.set_xlim(0, (max(values) or 1.0) * 1.3)  # space for the numbers
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xticks([])
    _bare(axes, bottom=False)


def _bare(axes: Axes, bottom: bool = True) -> None:
    for side in ("top", "right", *(() if bottom else ("bottom",))):
        axes.spines[side].set_visible(False)


def require_matplotlib() -> type[Figure]:
    """matplotlib's Figure.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError('a picture needs matplotlib: pip install "crossget[demo]"') from error
    return Figure
