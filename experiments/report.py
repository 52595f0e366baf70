"""Rebuild docs/results.md and its figures from the result files: `python -m experiments.report --help`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments import common
from experiments.ablation import report_trained as ablation
from experiments.coop import report as coop
from experiments.retrieval import report as retrieval
from experiments.tables import all_of

EXPERIMENTS = Path(__file__).parent
DOCS = common.ROOT / "docs"

# By title: the folder of result files, and what makes paragraphs of them.
CHAPTERS: dict[str, tuple[str, Callable[[list[common.Json]], list[str]]]] = {
    "Retrieval": ("retrieval/results", retrieval.chapter),
    "Prompt learning (CoOp)": ("coop/results", coop.chapter),
    "Image classification": ("ablation/results_trained", ablation.chapter),
}


class Figure(NamedTuple):
    """A picture of a chapter: its file, and what draws it."""

    name: str
    draw: Callable[[list[common.Json], Path], bool]


FIGURES = {"retrieval/results": Figure("retrieval.png", retrieval.draw)}

INTRODUCTION = """\
# Results of training

Written by `python -m experiments.report` from the result files under `experiments/`; every sentence with a number in it
is computed. How to run the experiments: [experiments/README.md](../experiments/README.md). Without any training:
[experiments/ablation/RESULTS.md](../experiments/ablation/RESULTS.md).

The reference reports "no loss at 58 % of the FLOPs" for a model that was trained on for twelve epochs, against one
that was not. So here each reduced model stands beside the control: **the dense model with the same extra training**.
All rows of a table start from one dense checkpoint and have the same recipe, which was chosen for none of them in
particular. Brackets are 95 % paired bootstrap intervals over the evaluated images (10,000 resamples), seeds averaged;
bold where they exclude zero, which about one in twenty does by chance. What differs between seeds is the order and the
augmentation of the data; the intervals do not hold that in, so it stands beside them."""


def render(experiments: Path = EXPERIMENTS) -> str:
    """Return the page.

    Raises:
        ValueError: there is no result file.
    """
    paragraphs = [INTRODUCTION]
    for title, (folder, chapter) in CHAPTERS.items():
        results = common.read_results(experiments / folder)
        if results:
            picture = f"![{title}](results/{FIGURES[folder].name})" if folder in FIGURES else ""
            paragraphs += [f"## {title}", picture, *chapter(results), provenance(results)]
    if len(paragraphs) == 1:
        raise ValueError(f"no result file in {experiments}: run the experiments first")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def provenance(results: list[common.Json]) -> str:
    """Return where the numbers of a chapter come from."""
    values = partial(all_of, results)
    return (
        f"From {len(results)} result files: torch {values('torch')}, on {values('device')}; commit {values('commit')}, "
        f"with changes not committed: {values('dirty')}. Each file has the command, the seed, and digests of the data "
        "and of the dense model."
    )


@dataclass(frozen=True)
class Options:
    """Where to read and write."""

    experiments: Path = field(default=EXPERIMENTS)
    """Folder of the experiments, with their result files."""
    docs: Path = field(default=DOCS)
    """Folder for results.md and results/."""


def main(options: Options) -> None:
    """Write the page and its figures."""
    for folder, figure in FIGURES.items():
        figure.draw(common.read_results(options.experiments / folder), options.docs / "results" / figure.name)
    (options.docs / "results.md").write_text(render(options.experiments), encoding="utf-8")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
