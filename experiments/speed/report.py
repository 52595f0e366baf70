"""Put the results of towers, operators and costs into docs/speed.md, with a figure.

To be run as `python -m experiments.speed.report`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import common
from experiments.speed import costs, operators, towers

PAGE = common.ROOT / "docs" / "speed.md"
FIGURE = common.ROOT / "docs" / "speed.png"
# Told apart by lightness too, and named beside the bars.
COLOURS = {towers.CROSSGET: "#0072b2", towers.TOME: "#e69f00", towers.IDEAL: "#bbbbbb"}


def fill(page: str, name: str, content: str) -> str:
    """Return the page with the content between its two marks of that name.

    Raises:
        ValueError: the page has lost them.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in page or end not in page:
        raise ValueError(f"the page has no lines {start.strip()!r} and {end!r}: put them where the table belongs")
    before, _, rest = page.partition(start)
    return f"{before}{start}{content}\n{end}{rest.partition(end)[2]}"


def results(kind: str) -> list[common.Json]:
    """Return the committed results of one kind, of all machines: one may have a folder of its own."""
    folders = sorted(towers.RESULTS.glob(f"**/{kind}"))
    return [content for folder in folders for content in common.read_results(folder)]


def by_device(contents: Sequence[common.Json]) -> dict[str, list[common.Json]]:
    """Return the results of each device: what one took says nothing about another."""
    groups: dict[str, list[common.Json]] = {}
    for content in contents:
        groups.setdefault(common.measured_on(content["environment"]), []).append(content)
    return groups


def written(page: str) -> str:
    """Return the page with the tables of the committed results."""
    measured = by_device(results("towers"))
    page = fill(page, "towers", "\n\n".join(f"{name}:\n\n{towers.markdown(some)}" for name, some in measured.items()))
    page = fill(page, "operators", operators.markdown(results("operators")))
    return fill(page, "costs", costs.markdown(results("costs")))


def draw(contents: Sequence[common.Json], file: Path) -> None:
    """Draw measured speed-ups beside what the multiply-adds promise, each machine by itself, two side by side."""
    from matplotlib.figure import Figure

    machines = list(by_device([content for content in contents if "does_not_fit" not in content["result"]]).values())
    lines = [machines[i : i + 2] for i in range(0, len(machines), 2)]
    rows = [max(len(some) for some in line) for line in lines]
    figure = Figure(figsize=(6.5 * len(lines[0]), 1.2 * len(lines) + 0.62 * sum(rows)), layout="constrained")
    grid: Any = figure.subplots(len(lines), len(lines[0]), sharex=True, squeeze=False, height_ratios=rows)
    for places, line, most in zip(grid, lines, rows, strict=True):
        for axes, some in zip(places, line, strict=False):
            _draw_bars(axes, towers.in_order(some))
            axes.set_title(common.short_name(some[0]["environment"]))
            axes.set_ylim(most - 0.5, -0.5)
        for axes in places[len(line) :]:
            axes.remove()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.supxlabel("speed relative to dense (median, quartiles)")
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=80, metadata={"Software": None})


def _draw_bars(axes: Any, contents: Sequence[common.Json]) -> None:
    """Draw three bars for each result."""
    names = []
    for place, content in enumerate(contents):
        rows = {row["method"]: row for row in content["result"]["rows"]}
        for i, (method, colour) in enumerate(COLOURS.items()):
            row, height = rows[method], place + 0.26 * (i - 1)
            low, high = row["quartiles"]
            spread = [[max(0.0, row["speed"] - low)], [max(0.0, high - row["speed"])]]
            label = method if place == 0 else None
            axes.barh(height, row["speed"], 0.24, color=colour, label=label, xerr=spread, error_kw={"lw": 1})
            promised = "promised by multiply-adds" if place == 0 and i == 0 else None
            axes.plot([row["promised"]] * 2, [height - 0.12, height + 0.12], "k", lw=2, label=promised)
        run = content["run"]
        names.append(
            f"{run['tower']}, batch {run['batch']}\n{run['dtype']}, {'training' if run['train'] else run['mode']}"
        )
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="k", lw=0.8, ls=":")


def main() -> None:
    """Write the page and the figure."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(results("towers"), FIGURE)


if __name__ == "__main__":
    main()
