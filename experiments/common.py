"""What the experiments share: result files, the environment they came from, a resumable queue, paired statistics.

A *run* is a frozen dataclass with a `slug`, its file name. Each run leaves one JSON file
`{"run", "command", "environment", "result", "seconds"}`; everything that is reported is rebuilt from these files.
"""

import base64
import functools
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
Values = npt.NDArray[np.float64]


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

    def times(self, factor: float) -> "Interval":
        """Return the same in another unit; the factor is positive."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


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
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(device: str = "cpu") -> Json:
    """Return what a result depends on beside its run: versions, machine, commit.

    Args:
        device: where the model runs.

    Returns:
        `crossget.measure.environment.environment`, `commit` (None: not in a repository, or nothing committed), `dirty`
        (whether the code differs from that commit; None: no repository) and `source_sha256`.
    """
    import crossget
    from crossget.measure.environment import environment as machine

    changes = git("status", "--porcelain", "--", *CODE)
    return {
        "crossget": crossget.__version__,
        **machine(device),
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "source_sha256": source_digest(),
    }


def short_name(environment: Mapping[str, Any]) -> str:
    """Return a processor's or a GPU's name without the words that all of them have, and what tells two of them apart.

    Args:
        environment: of a result file; older ones do not tell a processor's instructions.
    """
    name = " ".join(environment["device"].replace("(R)", "").replace("Processor", "").split())
    instructions = environment.get("instructions")
    return f"{name} ({', '.join(instructions)})" if instructions else name


def measured_on(environment: Mapping[str, Any]) -> str:
    """Return what a table of times says of a result file's environment: device, threads of a CPU, torch."""
    threads = "" if environment["cuda"] else f", {environment['threads']} threads"
    return f"{short_name(environment)}{threads}, torch {environment['torch']}"


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pack(values: Values) -> str:
    """Return one number per item as text that is short enough for a result file: base64 of float16, low byte first."""
    return base64.b64encode(np.asarray(values, dtype="<f2").tobytes()).decode()


def unpack(text: str) -> Values:
    """Return the numbers that `pack` wrote, to three digits."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: an interrupted run must not leave half a result behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def read_results(folder: Path) -> list[Json]:
    """Return the content of all result files in a folder and its subfolders, sorted by path."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: some are not.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {unknown}; there are {sorted(known)}")


def pending(runs: Iterable[RunT], folder: Path, overwrite: bool = False) -> list[RunT]:
    """Return the runs that have no result file yet, or all of them."""
    return [run for run in runs if overwrite or not (folder / f"{run.slug}.json").exists()]


def work_off(
    runs: Iterable[RunT],
    folder: Path,
    execute: Callable[[RunT], Json | None],
    *,
    command: Callable[[RunT], str],
    environment: Json,
    overwrite: bool = False,
) -> int:
    """Execute the pending runs one after the other and write each one's result file as soon as it is there.

    Args:
        runs: the queue.
        folder: where the result files lie.
        execute: returns `{"run": ..., "result": ...}` of one run; None where another process writes it.
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
        if made is None:
            continue
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


def paired_bootstrap(values: Values, reference: Values, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Return the mean difference of two measurements of the same items and its percentile bootstrap interval.

    Args:
        values: [n], one value per item.
        reference: [n], the same items in the same order.
        resamples: how often the items are drawn anew, with replacement.
        level: confidence level.

    Raises:
        ValueError: the two do not have the same items.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values need the same items, got {values.shape} and {reference.shape}")
    difference = values - reference
    n = len(difference)
    # In pieces: numpy widens the counts before it multiplies.
    pieces = np.array_split(_resampled(n, resamples), max(1, resamples // 100))
    means = np.concatenate([piece @ difference for piece in pieces]) / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def paired_ratio(values: Values, reference: Values, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Return the ratio of two means over the same items, as `paired_bootstrap` does their difference.

    Raises:
        ValueError: the two do not have the same items.
    """
    if values.shape != reference.shape:
        raise ValueError(f"paired values need the same items, got {values.shape} and {reference.shape}")
    pieces = np.array_split(_resampled(len(values), resamples), max(1, resamples // 100))
    both = np.stack([values, reference], 1)
    sums = np.concatenate([piece @ both for piece in pieces])
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean() / reference.mean()), float(low), float(high))


Seeds = Mapping[int | None, Values]
"""Values per item, by the seed that gave them; None: no seed took part, so that they stand beside any."""


def compare(one: Seeds, other: Seeds) -> Interval | None:
    """Return the paired bootstrap of two rows over the seeds that both have, averaged; None if they share none.

    What is trained from the same start and in the same order differs by less than what is not, and a row with fewer
    seeds must not be compared with the others' seeds.
    """
    seeds = sorted(({*one} | {*other}) - {None}, key=str)
    shared = [seed for seed in seeds or [None] if all(seed in row or None in row for row in (one, other))]
    if not shared:
        return None
    means = [np.mean([row[seed] if seed in row else row[None] for seed in shared], 0) for row in (one, other)]
    return paired_bootstrap(means[0], means[1])


@functools.lru_cache(maxsize=4)
def _resampled(n: int, resamples: int) -> npt.NDArray[np.uint8]:
    """How often each item is drawn, [resamples, n]: the same draws for all comparisons, on every machine."""
    chance = np.random.default_rng(0)
    counts = np.empty((resamples, n), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(chance.integers(0, n, n), minlength=n)
    return counts
