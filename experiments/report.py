"""Rebuild docs/results.md and its figures from the result files: `python -m experiments.report --help`."""

from dataclasses import dataclass, field
from pathlib import Path

from experiments import common
from experiments.retrieval import report as retrieval

EXPERIMENTS = Path(__file__).parent
DOCS = common.ROOT / "docs"

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
    """Return the page."""
    paragraphs = [INTRODUCTION]
    results = common.read_results(experiments / "retrieval" / "results")
    if results:
        paragraphs += ["![Mean recall over FLOPs](results/retrieval.png)", *retrieval.chapter(results)]
        paragraphs.append(provenance(results))
    return "\n\n".join(paragraphs) + "\n"


def provenance(results: list[common.Json]) -> str:
    """Return where the numbers of a chapter come from."""
    environments = [result["environment"] for result in results]

    def all_of(name: str) -> str:
        return " and ".join(sorted({str(environment.get(name)) for environment in environments}))

    return (
        f"From {len(results)} result files: torch {all_of('torch')}, on {all_of('device')}; commit {all_of('commit')}, "
        f"with changes not committed: {all_of('dirty')}. Each file has the command, the seed, and digests of the data "
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
    results = common.read_results(options.experiments / "retrieval" / "results")
    retrieval.draw(results, options.docs / "results" / "retrieval.png")
    (options.docs / "results.md").write_text(render(options.experiments), encoding="utf-8")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
