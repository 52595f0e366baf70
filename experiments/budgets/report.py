"""The tables and the figure of budgets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.report import style
from experiments.ablation.settings import SETTINGS
from experiments.lib.files import Json, unpack
from experiments.lib.statistics import Values, paired_bootstrap
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, markdown, provenance, show

HERE = Path(__file__).parent
FIGURE = "figures/divergence.png"
METHODS = {"crossget": "CrossGET", "tome": "ToMe"}
COLORS = {"crossget": "#D55E00", "tome": "#000000"}


def chosen(results: list[Json], setting: str, method: str, budget: str) -> list[Json]:
    """Return the results of a method at one kind of budget, the mildest first."""
    found = [
        result
        for result in results
        if (result["run"]["setting"], result["run"]["method"], result["run"]["budget"]) == (setting, method, budget)
    ]
    return sorted(found, key=lambda result: -result["run"]["share"])


def correct(accuracy: Json) -> Values:
    """Return [n] 1 for each image that is classified rightly."""
    return np.array([float(mark) for mark in accuracy["correct"]])


def accuracies(results: list[Json], setting: str) -> str:
    """Return budgets of multiply-adds: what they cost, and fitted against evenly at the same budget."""
    rows = []
    for method, label in METHODS.items():
        for result in chosen(results, setting, method, "flops"):
            one, other = (result["result"][name] for name in ("measured", "constant"))
            top1 = paired_bootstrap(correct(one["accuracy"]), correct(other["accuracy"])).times(100)
            near, far = (unpack(entry["accuracy"]["divergences"]) for entry in (one, other))
            share = paired_bootstrap(near, far).times(100 / float(far.mean()))
            kept = one["fit"]["distribution"] == "constant"
            rows.append([
                f"{label}, {100 * result['run']['share']:.0f} %",
                *(f"{100 * entry['fit']['measured']:.2f}" for entry in (other, one)),
                *(f"{entry['accuracy']['top1']:.1f}" for entry in (other, one)),
                "evenly kept" if kept else show(top1),
                *(f"{entry['accuracy']['divergence']:.4f}" for entry in (other, one)),
                "evenly kept" if kept else show(share, 0),
                " ".join(map(str, one["fit"]["schedule"])),
            ])  # fmt: skip
    headers = ["asked", "FLOPs evenly, %", "fitted", "top-1 evenly, %", "fitted", "difference, points"]
    headers += ["KL evenly", "fitted", "difference, %", "r, fitted"]
    return markdown(rows, headers)


def costs(results: list[Json], setting: str) -> str:
    """Return budgets of time: asked, predicted, measured."""
    rows = []
    for method, label in METHODS.items():
        for budget in ("latency",):
            for result in chosen(results, setting, method, budget):
                asked = f"{label}, {budget} {100 * result['run']['share']:.0f} %, batch {result['run']['fitted_on']}"
                for name, title in (("constant", "evenly"), ("measured", "fitted")):
                    entry = result["result"][name]
                    if "refused" in entry:
                        rows.append([asked, title, "refused", entry["refused"].split(": ")[1].split(". ")[0], ""])
                        continue
                    fit = entry["fit"]
                    low, high = (100 * value for value in fit["spread"])
                    spread = "" if low == high else f" [{low:.1f}, {high:.1f}]"
                    title = (
                        f"{title} (evenly kept)" if (name, fit["distribution"]) == ("measured", "constant") else title
                    )
                    rows.append([
                        asked, title, f"{100 * fit['predicted']:.1f}", f"{100 * fit['measured']:.1f}{spread}",
                        " ".join(map(str, fit["schedule"])),
                    ])  # fmt: skip
    return markdown(rows, ["asked", "", "predicted, %", "measured, % [quartiles]", "r"]) if rows else ""


def chapter(results: list[Json], setting: str) -> Iterator[str]:
    """Yield the paragraphs about one setting."""
    mine = [result for result in results if result["run"]["setting"] == setting]
    run = next(result["run"] for result in mine if result["run"]["budget"] == "flops")
    seconds = [result["result"][name]["fit"]["seconds"] for result in mine for name in ("measured", "constant")
               if "fit" in result["result"][name] and result["run"]["budget"] == "flops"]  # fmt: skip
    dense = next(r["result"]["dense"]["accuracy"]["top1"] for r in mine if "dense" in r["result"])
    yield f"## {SETTINGS[setting].title}"
    yield (
        f"Fitted on {run['fitted_on']} images, measured on {run['measured_on']} others; dense {dense:.1f} % top-1. "
        f"A fit to multiply-adds took {min(seconds):.0f} to {max(seconds):.0f} seconds, on a machine with other work."
    )
    yield accuracies(results, setting)
    if table := costs(results, setting):
        yield table


EXPLANATION = "FLOPs are multiply-adds, in % of the dense model; KL is the divergence from the dense model's answer."


def settings_of(results: list[Json]) -> list[str]:
    """Return the settings that have results."""
    return [name for name in SETTINGS if any(result["run"]["setting"] == name for result in results)]


def draw(results: list[Json], file: Path) -> None:
    """Draw the divergence over multiply-adds, a panel per setting."""
    from matplotlib.figure import Figure

    settings = settings_of(results)
    figure = Figure(figsize=(4.6 * len(settings), 3.6), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        style(axes)
        for method, label in METHODS.items():
            for name, line, title in (("constant", ":", "evenly"), ("measured", "-", "fitted")):
                entries = [result["result"][name] for result in chosen(results, setting, method, "flops")]
                axes.plot(
                    [100 * entry["fit"]["measured"] for entry in entries],
                    [entry["accuracy"]["divergence"] for entry in entries],
                    line, color=COLORS[method], marker="o", markersize=4, label=f"{label}, {title}",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(SETTINGS[setting].title, fontsize=10, loc="left")
        axes.set_xlabel("FLOPs, % of the dense model")
        axes.set_ylabel("KL from the dense model, nats")
    handles: Any
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, format="png", dpi=160)


def generated(results: list[Json]) -> str:
    """Return the generated part."""
    figure = f"![Divergence from the dense model over FLOPs, evenly and fitted]({FIGURE})"
    paragraphs = [figure, f"{provenance(results, 'timm')} {INTERVALS} {EXPLANATION}"]
    for setting in settings_of(results):
        paragraphs += chapter(results, setting)
    return "\n\n".join(paragraphs)


PAGE = Page(HERE / "README.md", HERE / "results", generated, {FIGURE: draw})
