"""Rebuild tables and figure from the result files: `python -m experiments.budgets.report`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from experiments.ablation.report import style
from experiments.ablation.settings import SETTINGS
from experiments.tables import all_of, markdown, show, update

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
METHODS = {"crossget": "CrossGET", "tome": "ToMe"}
COLORS = {"crossget": "#D55E00", "tome": "#000000"}


def chosen(results: list[common.Json], setting: str, method: str, budget: str) -> list[common.Json]:
    """Return the results of a method at one kind of budget, the mildest first."""
    found = [
        result
        for result in results
        if (result["run"]["setting"], result["run"]["method"], result["run"]["budget"]) == (setting, method, budget)
    ]
    return sorted(found, key=lambda result: -result["run"]["share"])


def correct(accuracy: common.Json) -> common.Values:
    """Return [n] 1 for each image that is classified rightly."""
    return np.array([float(mark) for mark in accuracy["correct"]])


def accuracies(results: list[common.Json], setting: str) -> str:
    """Return budgets of multiply-adds: what they cost, and fitted against evenly at the same budget."""
    rows = []
    for method, label in METHODS.items():
        for result in chosen(results, setting, method, "flops"):
            one, other = (result["result"][name] for name in ("measured", "constant"))
            top1 = common.paired_bootstrap(correct(one["accuracy"]), correct(other["accuracy"])).times(100)
            near, far = (common.unpack(entry["accuracy"]["divergences"]) for entry in (one, other))
            share = common.paired_bootstrap(near, far).times(100 / float(far.mean()))
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


def costs(results: list[common.Json], setting: str) -> str:
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


def chapter(results: list[common.Json], setting: str) -> Iterator[str]:
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


def provenance(results: list[common.Json]) -> str:
    """Return where the numbers come from."""
    return (
        f"{len(results)} result files; crossget {all_of(results, 'crossget')}, torch {all_of(results, 'torch')}, timm "
        f"{all_of(results, 'timm')}, {all_of(results, 'device')}, {all_of(results, 'threads')} thread; commit "
        f"{all_of(results, 'commit')}, with changes not committed: {all_of(results, 'dirty')}. Brackets are 95 % "
        "paired bootstrap intervals over images (10,000 resamples), bold where they exclude zero; about one in twenty "
        "does so by chance. FLOPs are multiply-adds, in % of the dense model; KL is the divergence from the dense "
        "model's answer."
    )


def draw(results: list[common.Json], settings: list[str], file: Path) -> None:
    """Draw the divergence over multiply-adds, a panel per setting."""
    from matplotlib.figure import Figure

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
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def generated(results: list[common.Json]) -> str:
    """Return the part of the page that comes from the result files."""
    settings = [name for name in SETTINGS if any(result["run"]["setting"] == name for result in results)]
    figure = "![Divergence from the dense model over FLOPs, evenly and fitted](figures/divergence.png)"
    paragraphs = [figure, provenance(results)]
    for setting in settings:
        paragraphs += chapter(results, setting)
    return "\n\n".join(paragraphs)


@dataclass(frozen=True)
class Options:
    """Where to read and write."""

    results: Path = field(default=HERE / "results")
    """Folder of result files."""
    output: Path = field(default=HERE)
    """Folder with README.md, and for figures/."""


def main(options: Options) -> None:
    """Write the generated part of README.md, and the figure.

    Raises:
        ValueError: there is no result file.
    """
    results = common.read_results(options.results)
    if not results:
        raise ValueError(f"no result file in {options.results}: run `python -m experiments.budgets.run` first")
    settings = [name for name in SETTINGS if any(result["run"]["setting"] == name for result in results)]
    draw(results, settings, options.output / "figures" / "divergence.png")
    update(options.output / "README.md", generated(results))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
