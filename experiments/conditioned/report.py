"""The tables of scoring while the merging knows the text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.conditioned.presets import PRESETS, QUESTIONS
from experiments.conditioned.run import RESULTS
from experiments.lib.files import Json, unpack
from experiments.lib.statistics import Interval, Values, paired_bootstrap
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, markdown, provenance, show, verdict

TITLES = {
    "captions": "Flickr8k: photographs and one caption of each",
    "classes": "Caltech-101: photographs and the names of their classes",
}
DIRECTIONS = {"text": "text of a photograph", "photo": "photograph of a text"}

Rows = dict[tuple[str, int], Json]


def rows_of(results: Sequence[Json], task: str) -> Rows:
    """Return the results of a task by (preset, r).

    Raises:
        ValueError: they come from different photographs or weights.
    """
    own = [content for content in results if content["run"]["task"] == task]
    origins = {(content["run"]["data"]["list_sha256"], content["run"]["weights"]) for content in own}
    if len(origins) > 1:
        raise ValueError(f"the results of {task!r} are of different photographs or weights: {sorted(origins)}")
    return {(content["run"]["preset"], content["run"]["r"]): content["result"] for content in own}


def marks(row: Json, direction: str) -> Values:
    """Return [n] whether each question was answered rightly."""
    return np.array([float(mark) for mark in row[direction]["right"]])


def table(rows: Rows) -> str:
    """Return what every row finds, and how sure it is."""
    directions = [name for name in DIRECTIONS if name in next(iter(rows.values()))]
    headers = ["FLOPs, %", "method"]
    for name in directions:
        headers += [f"{DIRECTIONS[name]}, r@1", "cross-entropy"]
    lines: list[list[Any]] = []
    for r in sorted({r for _, r in rows}):
        for name, preset in PRESETS.items():
            row = rows.get((name, r))
            if row is None:
                continue
            share = f"{100 * row['gflops']['reduced'] / row['gflops']['dense']:.0f}" if "gflops" in row else "100"
            cells = [f"{row[way][what]:.{digits}f}" for way in directions for what, digits in _COLUMNS]
            lines.append([share, preset.label, *cells])
    return markdown(lines, headers, 2)


_COLUMNS = (("accuracy", 1), ("loss", 3))


def answers(rows: Rows) -> str:
    """Return the comparisons, with paired bootstrap intervals over photographs or texts."""
    directions = [name for name in DIRECTIONS if name in next(iter(rows.values()))]
    lines: list[list[Any]] = []
    for question, pairs in QUESTIONS.items():
        for one, other in pairs:
            for r in sorted({r for name, r in rows if name != "dense"}):
                if (one, r) not in rows or (other, r) not in rows:
                    continue
                a, b = rows[one, r], rows[other, r]
                for way in directions:
                    points = paired_bootstrap(marks(a, way), marks(b, way)).times(100)
                    first, second = (unpack(row[way]["losses"]) for row in (a, b))
                    nats = paired_bootstrap(first, second)
                    better = verdict(Interval(-nats.mean, -nats.high, -nats.low))
                    label = f"{PRESETS[one].label} minus {PRESETS[other].label}"
                    lines.append([question, label, r, DIRECTIONS[way], show(points), show(nats, 3), better])
                    question = ""
    headers = ["question", "compared", "r", "found", "r@1, points", "cross-entropy, nats", "by cross-entropy"]
    return markdown(lines, headers, 2)


def chapters(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of the generated part."""
    yield f"{provenance(results, 'open_clip_torch')} {INTERVALS}"
    for task, title in TITLES.items():
        rows = rows_of(results, task)
        if rows:
            some = next(iter(rows.values()))
            yield f"### {title}"
            yield f"{some['n']} photographs, {some['texts']} texts."
            yield table(rows)
            yield answers(rows)


def generated(results: Sequence[Json]) -> str:
    """Return the generated part."""
    return "\n\n".join(chapters(results))


PAGE = Page(Path(__file__).parent / "README.md", RESULTS, generated)
