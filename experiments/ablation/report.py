"""The page of the ablation without training: tables and a figure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.presets import COMPARISONS, METHODS, PRESETS
from experiments.ablation.run import RESULTS
from experiments.ablation.settings import SETTINGS
from experiments.lib.files import Json, unpack
from experiments.lib.statistics import Values, paired_bootstrap
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, markdown, provenance, show

HERE = Path(__file__).parent
FIGURE = "figures/accuracy_over_flops.png"

# From here on a reduction is called strong.
STRONG = 8

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers tell the lines apart in grey print.
LINES = {
    "random": ("#888888", "x"),
    "topk": ("#E69F00", "v"),
    "tome": ("#000000", "o"),
    "bipartite": ("#CC79A7", "h"),
    "complete_graph": ("#56B4E9", "s"),
    "guided_ensemble": ("#0072B2", "D"),
    "cross_token": ("#009E73", "P"),
    "crossget": ("#D55E00", "^"),
}


@dataclass(frozen=True)
class Row:
    """One row at one r, all seeds together.

    Attributes:
        correct: [n] share of seeds that classify each image rightly.
        divergence: [n] KL from the dense model's distribution.
        agreement: % of images with the dense model's answer.
        gflops: multiply-adds of one image / 10^9.
        ratio: of multiply-adds, reduced by dense.
        tokens: entering each block.
    """

    correct: Values
    divergence: Values
    agreement: float
    gflops: float
    ratio: float
    tokens: list[int]

    @property
    def top1(self) -> float:
        """Top-1 accuracy in %."""
        return float(100 * self.correct.mean())


@dataclass(frozen=True)
class Table:
    """All rows of a setting."""

    setting: str
    rows: dict[tuple[str, int], Row]

    def get(self, preset: str, r: int) -> Row | None:
        """Return the row of a preset at r; one that does not depend on r is the same at all of them."""
        return self.rows.get((preset, r if PRESETS[preset].swept else 0))

    @property
    def reductions(self) -> list[int]:
        """All r, ascending."""
        return sorted({r for preset, r in self.rows if PRESETS[preset].swept})


def gather(results: list[Json]) -> dict[str, Table]:
    """Return the rows of each setting.

    Raises:
        ValueError: results of one setting come from different images or weights.
    """
    groups: dict[str, dict[tuple[str, int], list[Json]]] = {}
    for result in results:
        run = result["run"]
        groups.setdefault(run["setting"], {}).setdefault((run["preset"], run["r"]), []).append(result)
    tables = {}
    for setting in (name for name in SETTINGS if name in groups):
        check_same(setting, [result for group in groups[setting].values() for result in group])
        tables[setting] = Table(setting, {key: join(group) for key, group in groups[setting].items()})
    return tables


def check_same(setting: str, results: list[Json]) -> None:
    """Refuse to compare what cannot be compared."""
    for what, values in {
        "images": [result["run"]["data"] for result in results],
        "weights": [result["run"]["weights"] for result in results],
    }.items():
        if any(value != values[0] for value in values):
            raise ValueError(f"the results of {setting} differ in their {what}: run them again with --overwrite")


def join(group: list[Json]) -> Row:
    """Return the row that the seeds' results make together."""
    results = [entry["result"] for entry in group]
    flops = results[0]["gflops"]
    return Row(
        correct=np.mean([[float(mark) for mark in result["correct"]] for result in results], 0),
        divergence=np.mean([unpack(result["divergences"]) for result in results], 0),
        agreement=float(np.mean([result["agreement"] for result in results])),
        gflops=flops["reduced"],
        ratio=flops["reduced"] / flops["dense"],
        tokens=results[0]["tokens"],
    )


def accuracy_change(rows: list[Row], bases: list[Row]) -> str:
    """Return the difference of top-1 in points, the mean over several r."""
    one, other = (np.mean([row.correct for row in group], 0) for group in (rows, bases))
    return show(paired_bootstrap(one, other).times(100))


def divergence_change(rows: list[Row], bases: list[Row]) -> str:
    """Return the difference of the divergence in % of the bases', the mean over several r."""
    one, other = (np.mean([row.divergence for row in group], 0) for group in (rows, bases))
    return show(paired_bootstrap(one, other).times(100 / float(other.mean())), 0)


def overview(table: Table) -> str:
    """Return methods by r: top-1, and what is left of the multiply-adds."""
    headers = ["top-1, %", *(f"r = {r}" for r in table.reductions)]
    rows = []
    for name, preset in METHODS.items():
        cells = [table.get(name, r) for r in table.reductions]
        rows.append([preset.label, *(f"{cell.top1:.1f}" if cell else "" for cell in cells)])
    for name in ("tome", "crossget"):
        cells = [table.get(name, r) for r in table.reductions]
        label = f"FLOPs, % of dense: `{name}`"
        rows.append([label, *(f"{100 * cell.ratio:.0f}" if cell else "" for cell in cells)])
    return markdown(rows, headers)


def parts(table: Table, base: str, change: Callable[[list[Row], list[Row]], str]) -> str:
    """Return what exchanging each part of `base` changes, by r and on average over the strong reductions."""
    strong = [r for r in table.reductions if r >= STRONG]
    columns = [*([r] for r in table.reductions), strong]
    headers = ["exchanged part", *(f"r = {r}" for r in table.reductions), f"mean, r >= {STRONG}"]
    lines = []
    for name, label in COMPARISONS[base].items():
        pairs = [[(table.get(name, r), table.get(base, r)) for r in column] for column in columns]
        lines.append([label, *(compare(column, change) for column in pairs)])
    return markdown(lines, headers)


def compare(pairs: list[tuple[Row | None, Row | None]], change: Callable[[list[Row], list[Row]], str]) -> str:
    """Return the change between rows and bases, nothing where one of them was not run."""
    both = [(row, base) for row, base in pairs if row is not None and base is not None]
    if not both or len(both) < len(pairs):
        return ""
    return change([row for row, _ in both], [base for _, base in both])


def everything(table: Table) -> str:
    """Return one line per row and r."""
    headers = ["row", "r", "top-1, %", "GFLOPs", "% of dense", "against dense", "against ToMe at the same r"]
    headers += ["agreement, %", "KL from dense", "tokens into the last block"]
    lines = []
    for name, preset in PRESETS.items():
        for r in table.reductions if preset.swept else [0]:
            row = table.get(name, r)
            if row is None:
                continue
            line = [f"`{name}`", r, f"{row.top1:.1f}", f"{row.gflops:.3f}", f"{100 * row.ratio:.1f}"]
            line += [compare([(row, table.get("dense", 0))], accuracy_change)]
            line += [compare([(row, table.get("tome", r))], accuracy_change) if preset.swept else ""]
            lines.append([*line, f"{row.agreement:.1f}", f"{row.divergence.mean():.4f}", row.tokens[-1]])
    return markdown(lines, headers)


def chapter(table: Table) -> Iterator[str]:
    """Yield the paragraphs about one setting."""
    dense = table.get("dense", 0)
    yield f"## {SETTINGS[table.setting].title}"
    if dense is not None:
        yield f"{len(dense.correct)} images, dense {dense.top1:.1f} % at {dense.gflops:.3f} GFLOPs (multiply-adds)."
    yield overview(table)
    for base in COMPARISONS:
        yield f"### One part exchanged, starting from `{base}`"
        yield "Top-1, difference in points:"
        yield parts(table, base, accuracy_change)
        yield "Divergence from the dense model, difference in % (negative is nearer to the dense model):"
        yield parts(table, base, divergence_change)
    yield "<details><summary>All rows</summary>"
    yield everything(table)
    yield "</details>"


def style(axes: Any) -> None:
    """Leave of an axis what is needed to read it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curves(tables: dict[str, Table], file: Path) -> None:
    """Draw accuracy and divergence over multiply-adds, a column of panels per setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(tables), 8), layout="constrained")
    panels = figure.subplots(2, len(tables), squeeze=False)
    for column, table in enumerate(tables.values()):
        draw_accuracy(panels[0, column], table)
        draw_divergence(panels[1, column], table)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(tables), frameon=False, fontsize=9)
    figure.savefig(file, format="png", dpi=160)


def draw_lines(axes: Any, table: Table, value: Callable[[Row], float]) -> None:
    """Draw one line per method."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for name, (color, marker) in LINES.items():
        rows = [row for r in table.reductions if (row := table.get(name, r)) is not None]
        x, y = [100 * row.ratio for row in rows], [value(row) for row in rows]
        axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.4, label=METHODS[name].label)
    axes.set_xlabel("FLOPs, % of the dense model")


def draw_accuracy(axes: Any, table: Table) -> None:
    """Draw one setting's accuracy; random pairs leave the panel, or the other lines would be one."""
    draw_lines(axes, table, lambda row: row.top1)
    shown = [row.top1 for (name, _), row in table.rows.items() if name in LINES and name != "random"]
    lowest = [row.top1 for (name, _), row in table.rows.items() if name == "random"]
    dense = table.get("dense", 0)
    if dense is not None:
        shown.append(dense.top1)
        axes.axhline(dense.top1, color="#555555", linestyle=(0, (4, 3)), linewidth=1, label="dense")
    if lowest and shown and min(lowest) < min(shown):
        axes.set_ylim(min(shown) - 1, max(shown) + 1)
        text = f"Random: down to {min(lowest):.0f} %"
        axes.annotate(text, (0.98, 0.03), xycoords="axes fraction", fontsize=9, color=LINES["random"][0], ha="right")
    axes.set_title(SETTINGS[table.setting].title, fontsize=11, loc="left")
    axes.set_ylabel("top-1 accuracy, %")


def draw_divergence(axes: Any, table: Table) -> None:
    """Draw how far one setting's answers are from the dense model's."""
    draw_lines(axes, table, lambda row: float(row.divergence.mean()))
    axes.set_yscale("log")
    axes.set_ylabel("divergence from the dense model (KL, nats)")


def generated(results: list[Json]) -> str:
    """Return the generated part."""
    text = "A row in which chance takes part is the mean of its seeds."
    paragraphs = [f"![Accuracy over FLOPs]({FIGURE})", f"{provenance(results, 'timm')} {INTERVALS} {text}"]
    for table in gather(results).values():
        paragraphs += chapter(table)
    return "\n\n".join(paragraphs)


PAGE = Page(HERE / "RESULTS.md", RESULTS, generated, {FIGURE: lambda results, file: draw_curves(gather(results), file)})
