"""The page of speed: tables of towers, operators, costs and LLaVA, and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.lib.files import Json, measured_on, short_name
from experiments.lib.study import Page
from experiments.speed import connector, costs, embed, llava, operators, serving, towers

HERE = Path(__file__).parent
FIGURE = "figures/speed.png"
# Told apart by lightness too, and named beside the bars.
COLOURS = {towers.CROSSGET: "#0072b2", towers.TOME: "#e69f00", towers.WARD: "#009e73", towers.IDEAL: "#bbbbbb"}


KEYS = {
    "connector": "keep", "towers": "tower", "llava": "new_tokens", "costs": "cost", "operators": "width",
    "embed": "pictures", "serving": "clients",
}  # fmt: skip
"""By program, what only its runs have."""


def of_kind(contents: Sequence[Json], kind: str) -> list[Json]:
    """Return the results of one of the programs."""
    others = [key for name, key in KEYS.items() if name != kind and name != "operators"]
    return [c for c in contents if KEYS[kind] in c["run"] and not any(key in c["run"] for key in others)]


def by_device(contents: Sequence[Json]) -> dict[str, list[Json]]:
    """Return the results of each device: what one took says nothing about another."""
    groups: dict[str, list[Json]] = {}
    for content in contents:
        groups.setdefault(measured_on(content["environment"]), []).append(content)
    return groups


def generated(contents: Sequence[Json]) -> str:
    """Return the generated part."""
    measured = by_device(of_kind(contents, "towers"))
    return "\n\n".join([
        f"![Speed of towers relative to dense, beside what multiply-adds predict]({FIGURE})",
        "## Towers",
        *(f"{name}:\n\n{towers.table(some)}" for name, some in measured.items()),
        "## LLaVA-1.5 with random weights",
        llava.tables(of_kind(contents, "llava")),
        *_connectors(of_kind(contents, "connector")),
        *_embedding(of_kind(contents, "embed")),
        *_servers(of_kind(contents, "serving")),
        "## Operators",
        operators.table(of_kind(contents, "operators")),
        "## Costs",
        costs.tables(of_kind(contents, "costs")),
    ])  # fmt: skip


def _connectors(contents: Sequence[Json]) -> list[str]:
    return ["## Fewer image features behind the connector", connector.tables(contents)] if contents else []


def _embedding(contents: Sequence[Json]) -> list[str]:
    return ["## Embedding with Ray Data", embed.tables(contents)] if contents else []


def _servers(contents: Sequence[Json]) -> list[str]:
    return ["## A server of vLLM's", serving.tables(contents)] if contents else []


def draw(contents: Sequence[Json], file: Path) -> None:
    """Draw measured speed-ups beside what the multiply-adds promise, each machine by itself, two side by side."""
    from matplotlib.figure import Figure

    machines = list(
        by_device(
            [content for content in of_kind(contents, "towers") if "does_not_fit" not in content["result"]]
        ).values()
    )
    lines = [machines[i : i + 2] for i in range(0, len(machines), 2)]
    rows = [max(len(some) for some in line) for line in lines]
    figure = Figure(figsize=(6.5 * len(lines[0]), 1.2 * len(lines) + 0.62 * sum(rows)), layout="constrained")
    grid: Any = figure.subplots(len(lines), len(lines[0]), sharex=True, squeeze=False, height_ratios=rows)
    for places, line, most in zip(grid, lines, rows, strict=True):
        for axes, some in zip(places, line, strict=False):
            _draw_bars(axes, towers.in_order(some))
            axes.set_title(short_name(some[0]["environment"]))
            axes.set_ylim(most - 0.5, -0.5)
        for axes in places[len(line) :]:
            axes.remove()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.supxlabel("speed relative to dense (median, quartiles)")
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, format="png", dpi=80, metadata={"Software": None})


def _draw_bars(axes: Any, contents: Sequence[Json]) -> None:
    """Draw four bars for each result."""
    names = []
    for place, content in enumerate(contents):
        rows = {row["method"]: row for row in content["result"]["rows"]}
        for i, (method, colour) in enumerate(COLOURS.items()):
            row, height = rows[method], place + 0.21 * (i - 1.5)
            low, high = row["quartiles"]
            spread = [[max(0.0, row["speed"] - low)], [max(0.0, high - row["speed"])]]
            label = method if place == 0 else None
            axes.barh(height, row["speed"], 0.19, color=colour, label=label, xerr=spread, error_kw={"lw": 1})
            promised = "promised by multiply-adds" if place == 0 and i == 0 else None
            axes.plot([row["promised"]] * 2, [height - 0.1, height + 0.1], "k", lw=2, label=promised)
        run = content["run"]
        names.append(f"{run['tower']}, batch {run['batch']}\n{towers.kind_of(run)}")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="k", lw=0.8, ls=":")


PAGE = Page(HERE / "RESULTS.md", towers.RESULTS, generated, {FIGURE: draw})
