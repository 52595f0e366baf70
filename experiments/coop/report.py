"""The page of prompt learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.coop.datasets import SOURCES
from experiments.coop.presets import PRESETS, SETTINGS
from experiments.coop.run import RESULTS
from experiments.lib.files import Json
from experiments.lib.statistics import Seeds
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, answers, difference, markdown, provenance

Key = tuple[str, int]
"""A row: preset and strength."""


@dataclass(frozen=True)
class Row:
    """One row at one strength, all seeds together.

    Attributes:
        correct: by seed [n], 1 for each photograph that is classified rightly.
        top1: accuracy of each seed in %.
        r: tokens removed per block.
        image: multiply-adds of a photograph, reduced by dense.
        both: the same with one prompt.
    """

    correct: Seeds
    top1: tuple[float, ...]
    r: Any
    image: float
    both: float

    @property
    def mean(self) -> float:
        """Accuracy in %, the mean over seeds."""
        return float(np.mean(self.top1))

    @property
    def spread(self) -> str:
        """Standard deviation over seeds, and how many."""
        return f"{np.std(self.top1, ddof=1):.1f} ({len(self.top1)})" if len(self.top1) > 1 else ""


def join(entries: Sequence[Json]) -> Row:
    """Return the row that the seeds' results make together."""
    results = [entry["result"] for entry in entries]
    correct = {
        None if PRESETS[entry["run"]["preset"]].prompts == "template" else entry["run"]["seed"]: np.array(
            [mark == "1" for mark in entry["result"]["correct"]], dtype=np.float64
        )
        for entry in entries
    }
    flops = results[0]["gflops"]
    return Row(
        correct,
        tuple(result["top1"] for result in results),
        entries[0]["run"]["r"],
        flops["image"]["reduced"] / flops["image"]["dense"],
        flops["both"]["reduced"] / flops["both"]["dense"],
    )


def gather(results: Sequence[Json]) -> dict[tuple[str, str], dict[Key, Row]]:
    """Return the rows of each setting and data set.

    Raises:
        ValueError: rows of one table come from other photographs, another dense model or another recipe.
    """
    tables = {}
    for setting in SETTINGS:
        for dataset in SOURCES:
            mine = [e for e in results if (e["run"]["setting"], e["run"]["dataset"]) == (setting, dataset)]
            if not mine:
                continue
            check(mine, f"{setting} on {dataset}")
            groups: dict[Key, list[Json]] = {}
            for entry in mine:
                groups.setdefault((entry["run"]["preset"], entry["run"]["percent"]), []).append(entry)
            tables[setting, dataset] = {key: join(group) for key, group in groups.items()}
    return tables


def check(results: Sequence[Json], what: str) -> None:
    """Refuse results that must not be compared."""
    same = ("split", "model", "weights", "shots", "context", "class_specific")
    origins, recipes = set(), set()
    for entry in results:
        run = entry["run"]
        origins.add(repr([run[name] for name in same] + [run["data"][run["split"]]]))
        recipe = {key: value for key, value in entry["result"].get("recipe", {}).items() if key != "seed"}
        if recipe and PRESETS[run["preset"]].prompts == "coop":
            recipes.add(repr(recipe))
    if len(origins) > 1 or len(recipes) > 1:
        raise ValueError(f"the results of {what} differ in data, weights, prompts or recipe: run them anew")


def find(table: dict[Key, Row], preset: str, percent: int) -> Row | None:
    """Return a row; one that does not depend on the strength is the same at all of them."""
    return table.get((preset, percent if PRESETS[preset].swept else 0))


def rows_of(table: dict[Key, Row]) -> str:
    """Return all rows, those that are not reduced first."""
    headers = ["row", "r", "% of FLOPs, photograph", "with a prompt", "top-1, %", "± seeds", "against the control"]
    control = find(table, "coop_control", 0)
    lines = []
    keys = [(name, 0) for name, preset in PRESETS.items() if not preset.swept]
    percents = sorted({percent for _, percent in table if percent}, reverse=True)
    keys += [(name, percent) for percent in percents for name, preset in PRESETS.items() if preset.swept]
    for name, percent in keys:
        row = table.get((name, percent))
        if row is None:
            continue
        against = "" if control is None or name == "coop_control" else difference(row.correct, control.correct)
        r = " ".join(map(str, row.r)) if isinstance(row.r, list) else str(row.r or "")
        ratios = [f"{100 * ratio:.0f}" for ratio in (row.image, row.both)]
        lines.append([PRESETS[name].label, r, *ratios, f"{row.mean:.1f}", row.spread, against])
    return markdown(lines, headers)


# question -> (what is compared, with what, at the same strength)
QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "Does training the prompts on help at all?": [("coop_control", "coop")],
    "What does reducing cost, trained equally long?": [("tome", "coop_control"), ("crossget", "coop_control")],
    "Is CrossGET better than ToMe?": [("crossget", "tome"), ("crossget_untrained", "tome_untrained")],
    "How much of the gain is training?": [("tome", "tome_untrained"), ("crossget", "crossget_untrained")],
}


def answered(table: dict[Key, Row]) -> str:
    """Return each question with what the data say."""
    percents = sorted({percent for _, percent in table if percent}, reverse=True)

    def strengths(one: str, other: str) -> list[tuple[int, str]]:
        swept = PRESETS[one].swept or PRESETS[other].swept
        return [(percent, f"~{percent} %") for percent in percents] if swept else [(0, "")]

    def correct(preset: str, percent: int) -> Seeds | None:
        row = find(table, preset, percent)
        return None if row is None else row.correct

    return answers(QUESTIONS, strengths, correct, lambda name: PRESETS[name].label, ("FLOPs", "top-1, points"))


def introduction(setting: str, results: Sequence[Json]) -> str:
    """Return what was done, from the files."""
    run = results[0]["run"]
    photos = run["data"][run["split"]]
    context = f"{run['context']} context tokens, {'one context per class' if run['class_specific'] else 'shared'}"
    text = (
        f"{photos['classes']} classes, {run['shots']} photographs of each to train on, {photos['photos']} to evaluate "
        f"on; {context}, the class name behind them. "
    )
    recipes = [
        next((e["result"]["recipe"] for e in results if "recipe" in e["result"] and e["run"]["preset"] in names), None)
        for names in (("coop",), ("coop_control", "tome", "crossget"))
    ]
    for recipe, whom in zip(recipes, ("CoOp's prompts", "From these, each trained row"), strict=True):
        if recipe is not None:
            text += f"{whom}: {recipe['epochs']} epochs of SGD, batch {recipe['batch']}, lr {recipe['lr']:g}. "
    seconds = sum(entry["seconds"] for entry in results)
    return text + (
        f"{len(results)} runs, {seconds / 3600:.1f} hours. FLOPs are multiply-adds; the strengths are named after "
        f"those of {SETTINGS[setting].counted}. “± seeds” is the standard deviation over seeds (how many in "
        "parentheses); a seed draws the photographs to train on and the prompts to start from. Differences are over "
        "the seeds that both rows have."
    )


def chapter(results: Sequence[Json]) -> list[str]:
    """Return the paragraphs about prompt learning."""
    paragraphs = []
    for (setting, dataset), table in gather(results).items():
        mine = [e for e in results if (e["run"]["setting"], e["run"]["dataset"]) == (setting, dataset)]
        paragraphs += [
            f"## {SETTINGS[setting].title}, {SOURCES[dataset].title}",
            introduction(setting, mine),
            "**Rows with the same prompts to start from and the same training, at ever fewer FLOPs**; the last column "
            "is the difference in points from the control, the dense model trained equally long.",
            rows_of(table),
            "**What the data say**, each comparison at the same r and on the same photographs.",
            answered(table),
        ]
    return paragraphs


def generated(results: list[Json]) -> str:
    """Return the generated part."""
    return "\n\n".join([f"{provenance(results, 'open_clip_torch')} {INTERVALS}", *chapter(results)])


PAGE = Page(Path(__file__).parent / "RESULTS.md", RESULTS, generated)
