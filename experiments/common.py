"""What the experiments share: result files, the environment they came from, a resumable queue, paired statistics.

A *run* is a frozen dataclass with a `slug`, its file name. Each run leaves one JSON file
`{"run", "command", "environment", "result", "seconds"}`; everything that is reported is rebuilt from these files.
"""

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# What is measured with: the result files themselves may change while a queue is worked off.
CODE = ("crossget", "integrations", "experiments/*.py")

Json = dict[str, Any]


class Run(Protocol):
    """One line of an experiment's queue."""

    @property
    def slug(self) -> str:
        """The name of the run's result file, without folder and ending; `/` makes folders."""
        ...


RunT = TypeVar("RunT", bound=Run)


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def git(*arguments: str) -> str | None:
    """Return what git says about this repository, or None where there is no git, no repository or no commit."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def source_digest() -> str:
    """Return a SHA-256 over the library's source, which names the code also where it is not committed yet."""
    digest = hashlib.sha256()
    for folder in ("crossget", "integrations"):
        for file in sorted((ROOT / folder).glob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(device: str = "cpu") -> Json:
    """Return what a result depends on beside its run: versions, machine, commit.

    Args:
        device: where the model runs.

    Returns:
        `crossget.benchmark.environment` and `commit` (None: not in a repository, or nothing committed), `dirty`
        (whether the code differs from that commit; None: no repository) and `source_sha256`.
    """
    import crossget
    from crossget.benchmark import environment as machine

    changes = git("status", "--porcelain", "--", *CODE)
    return {
        "crossget": crossget.__version__,
        **machine(device),
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "source_sha256": source_digest(),
    }


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: an interrupted run must not leave half a result behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def read_results(folder: Path) -> list[Json]:
    """Return the content of all result files in a folder and its subfolders, sorted by path."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]


def pending(runs: Iterable[RunT], folder: Path, overwrite: bool = False) -> list[RunT]:
    """Return the runs that have no result file yet, or all of them."""
    return [run for run in runs if overwrite or not (folder / f"{run.slug}.json").exists()]


def work_off(
    runs: Iterable[RunT],
    folder: Path,
    execute: Callable[[RunT], Json],
    *,
    command: Callable[[RunT], str],
    environment: Json,
    overwrite: bool = False,
) -> int:
    """Execute the pending runs one after the other and write each one's result file as soon as it is there.

    Args:
        runs: the queue.
        folder: where the result files lie.
        execute: returns `{"run": ..., "result": ...}` of one run.
        command: returns the command line that repeats one run alone.
        environment: from `environment`.
        overwrite: execute runs that have a result file, too.

    Returns:
        How many runs were executed.
    """
    queue = pending(runs, folder, overwrite)
    progress = tqdm(queue, disable=None, unit="run")
    for run in progress:
        progress.set_description(run.slug)
        start = time.perf_counter()
        made = execute(run)
        seconds = round(time.perf_counter() - start, 2)
        content = {
            "run": made["run"],
            "command": command(run),
            "environment": environment,
            "result": made["result"],
            "seconds": seconds,
        }
        write_json(folder / f"{run.slug}.json", content)
    return len(queue)


def paired_bootstrap(
    values: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean difference of two measurements of the same items and its percentile bootstrap interval.

    Args:
        values: [n], one value per item.
        reference: [n], the same items in the same order.
        resamples: how often the items are drawn anew, with replacement.
        level: confidence level.
        seed: of the drawing.

    Raises:
        ValueError: the two do not have the same items.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values need the same items, got {values.shape} and {reference.shape}")
    # Drawing n items and counting how often each difference occurs is one multinomial draw over the differences'
    # values: the same distribution, without n * resamples indices.
    difference, counts = np.unique((values - reference).round(9), return_counts=True)
    n = len(values)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means = draws @ difference / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference @ counts / n), float(low), float(high))
