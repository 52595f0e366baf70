"""The page of merging without training at equal multiply-adds: tables and a figure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.report import check_same
from experiments.ablation.settings import SETTINGS
from experiments.lib.files import Json, unpack
from experiments.lib.statistics import Interval, Values, paired_bootstrap, paired_ratio
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, markdown, provenance, show
from experiments.training_free.presets import ALONE, AWAY, METHODS, PRESETS

HERE = Path(__file__).parent
FIGURE = "figures/divergence_over_flops.png"

# Okabe and Ito's colours; markers tell the lines apart in grey print.
LINES = {
    "tome": ("#000000", "o"),
    "tome_all": ("#888888", "h"),
    "crossget": ("#D55E00", "^"),
    "ward_plain": ("#56B4E9", "s"),
    "ward": ("#0072B2", "D"),
    "ward_reading": ("#009E73", "v"),
}
LABELS = {"ward_plain": "Ward, last block for all tokens, no norm correction"}
"""Where a row's label says too little outside its table."""


@dataclass(frozen=True)
class Row:
    """One row at a budget, on one half of the images.

    Attributes:
        correct: [n] whether each image is classified rightly.
        divergence: [n] KL from the dense model's distribution.
        share: of the dense model's multiply-adds.
        tokens: entering each block.
    """

    correct: Values
    divergence: Values
    share: float
    tokens: list[int]


Rows = dict[tuple[str, int], Row]


def gather(results: Sequence[Json], half: str) -> dict[str, Rows]:
    """Return the rows of each setting that were measured on one half of the images.

    Raises:
        ValueError: results of one setting come from different images or weights.
    """
    rows: dict[str, Rows] = {}
    for setting in SETTINGS:
        own = [e for e in results if (e["run"]["setting"], e["run"]["half"]) == (setting, half)]
        check_same(setting, own)
        if own:
            rows[setting] = {(e["run"]["preset"], e["run"]["budget"]): read(e["result"]) for e in own}
    return rows


def read(result: Json) -> Row:
    """Return one result file's row."""
    flops = result["gflops"]
    return Row(
        correct=np.array([float(mark) for mark in result["correct"]]),
        divergence=unpack(result["divergences"]),
        share=flops["reduced"] / flops["dense"],
        tokens=result["tokens"],
    )


def budgets_of(rows: Rows) -> list[int]:
    """Return the budgets, largest first."""
    return sorted({budget for name, budget in rows if name != "dense"}, reverse=True)


def ratio_of(row: Row, base: Row) -> Interval:
    """Return the mean divergence of a row in % of another's, with its paired bootstrap interval."""
    return paired_ratio(row.divergence, base.divergence).times(100)


def percent(interval: Interval) -> str:
    """Return a ratio as text."""
    return f"{interval.mean:.0f} [{interval.low:.0f}, {interval.high:.0f}]"


def methods(rows: Rows) -> str:
    """Return what every method loses at every budget, beside ToMe with and without `class_token_only`."""
    dense = rows["dense", 100]
    headers = [
        "FLOPs, %", "method", "top-1 lost to dense, points", "top-1 minus ToMe's, points", "KL from dense",
        "in % of ToMe's", "of ToMe's, class token only",
    ]  # fmt: skip
    lines: list[list[Any]] = []
    for budget in budgets_of(rows):
        tome = rows["tome", budget]
        for name in METHODS:
            row = rows.get((name, budget))
            if row is None:
                continue
            lost = paired_bootstrap(dense.correct, row.correct).times(100)
            beside = show(paired_bootstrap(row.correct, tome.correct).times(100)) if name != "tome" else ""
            label = METHODS[name].label
            ratios = [
                percent(ratio_of(row, rows[base, budget])) if name != base and (base, budget) in rows else ""
                for base in ("tome", "tome_skip")
            ]
            lines.append([f"{100 * row.share:.1f}", label, show(lost), beside, f"{row.divergence.mean():.4f}", *ratios])
    return markdown(lines, headers, 2)


def ideas(rows: Rows) -> str:
    """Return each part alone and each exchanged, by divergence."""
    budgets = [b for b in budgets_of(rows) if any((name, b) in rows for name in AWAY if name not in METHODS)]
    lines: list[list[Any]] = []
    for title, base, group in (("in ToMe", "tome", ALONE), ("in Ward", "ward", AWAY)):
        for name, preset in group.items():
            cells = [
                percent(ratio_of(rows[name, budget], rows[base, budget])) if (name, budget) in rows else ""
                for budget in budgets
            ]
            if any(cells):
                lines.append([title, preset.label, *cells])
                title = ""
    return markdown(lines, ["KL in % of that method's", "exchanged", *(f"{b} % of the FLOPs" for b in budgets)], 2)


def chapters(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of the generated part."""
    yield f"![Divergence over FLOPs]({FIGURE})"
    yield f"{provenance(results, 'timm')} No chance takes part, so there is no seed. {INTERVALS}"
    for setting, rows in gather(results, "confirm").items():
        dense = rows["dense", 100]
        yield f"## {SETTINGS[setting].title}"
        yield f"{len(dense.correct)} images that took no part in the choice, dense {100 * dense.correct.mean():.1f} %."
        yield methods(rows)
        yield "Each part alone in ToMe, and each exchanged in Ward; above 100 is farther from the dense model:"
        yield ideas(rows)


def generated(results: Sequence[Json]) -> str:
    """Return the generated part."""
    return "\n\n".join(chapters(results))


def draw(results: Sequence[Json], file: Path) -> None:
    """Draw the divergence over multiply-adds on the confirming half, a panel per setting."""
    from matplotlib.figure import Figure

    settings = gather(results, "confirm")
    figure = Figure(figsize=(5.2 * len(settings), 4.4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, (setting, rows) in zip(panels, settings.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        for name, (color, marker) in LINES.items():
            line = [rows[name, budget] for budget in budgets_of(rows) if (name, budget) in rows]
            x, y = [100 * row.share for row in line], [float(row.divergence.mean()) for row in line]
            axes.plot(
                x,
                y,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                label=LABELS.get(name, PRESETS[name].label),
            )
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs, % of the dense model")
        axes.set_title(SETTINGS[setting].title, fontsize=11, loc="left")
    panels[0].set_ylabel("divergence from the dense model (KL, nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, format="png", dpi=160)


PAGE = Page(HERE / "RESULTS.md", HERE / "results", generated, {FIGURE: draw})
