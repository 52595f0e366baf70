"""Time a forward of this code beside one of an earlier commit, alternately, in one run.

Two processes hold the same model with the same random weights, one with either code. They take turns, one forward each,
in an order that changes from pair to pair, so that what else the machine does meets both. CPU, random weights: nothing
is downloaded.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from experiments.lib.files import ROOT, Json, git
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results" / "versions"
WORKER = """
import sys, time
import open_clip, torch
import crossget
name, method, r, batch, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
model = open_clip.create_model(name).eval()
images = torch.randn(int(batch), 3, 224, 224)
if method != "dense":
    crossget.attach(model, getattr(crossget, method)(r=int(r)))
with torch.no_grad():
    for line in sys.stdin:
        start = time.perf_counter()
        model.encode_image(images)
        print(time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Options:
    """What to compare."""

    before: str
    """The earlier commit."""
    model: str = "ViT-B-16"
    """A name of open_clip."""
    methods: tuple[str, ...] = ("CrossGET",)
    """Reducers; `dense` is the model without one."""
    r: int = 16
    """Tokens removed per block."""
    batches: tuple[int, ...] = (1, 8)
    """Images per forward."""
    pairs: int = 200
    """Forwards of either code."""
    warmup: int = 5
    """Pairs that are not timed."""
    threads: int = 2
    """Threads of either process; only one of them computes at a time."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Measure again what has a result file."""


@dataclass(frozen=True)
class Run:
    """One method at one batch size."""

    model: str
    method: str
    r: int
    batch: int

    @property
    def slug(self) -> str:
        return f"{self.model}_{self.method}_r{self.r}_batch{self.batch}"


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for."""
    return [Run(options.model, method, options.r, batch) for method in options.methods for batch in options.batches]


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Give a folder with the code of a commit.

    Raises:
        ValueError: there is no such commit.
    """
    if git("rev-parse", "--verify", f"{commit}^{{commit}}") is None:
        raise ValueError(f"before={commit!r} is no commit of this repository")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "crossget", "integrations"], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


@contextlib.contextmanager
def worker(code: Path, run: Run, threads: int) -> Iterator[Any]:
    """Give a function that runs one forward in a process with this code, and returns its seconds."""
    arguments = [run.model, run.method, str(run.r), str(run.batch), str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    given: IO[str] = process.stdin
    answers: IO[str] = process.stdout

    def forward() -> float:
        given.write("\n")
        given.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the process with the code in {code} ended with {process.wait()}, see its errors above")
        return float(answer)

    try:
        yield forward
    finally:
        given.close()
        process.wait()


def load(options: Options) -> Any:
    """Return the function that measures one run."""

    def measure(run: Run) -> Json:
        with (
            checked_out(options.before) as earlier,
            worker(earlier, run, options.threads) as before,
            worker(ROOT, run, options.threads) as now,
        ):
            for _ in range(options.warmup):
                before(), now()
            times: dict[str, list[float]] = {"before": [], "now": []}
            for pair in tqdm(range(options.pairs), disable=None, leave=False):
                turns = [("before", before), ("now", now)]
                for name, forward in turns if pair % 2 else turns[::-1]:
                    times[name].append(forward())
        ratios = np.array(times["now"]) / np.array(times["before"])
        low, high = median_interval(ratios)
        return {
            "run": {**asdict(run), "pairs": options.pairs, "before": git("rev-parse", options.before), "seed": 0},
            "result": {
                "median_ratio": float(np.median(ratios)),
                "interval": [low, high],
                "quartiles": [float(value) for value in np.quantile(ratios, [0.25, 0.75])],
                "median_seconds": {name: statistics.median(values) for name, values in times.items()},
            },
        }

    return measure


def median_interval(values: Any, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of values [N]."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def table(results: Any) -> str:
    """Return the runs as a table."""
    rows = [
        [
            one["run"]["model"], one["run"]["method"], str(one["run"]["r"]), str(one["run"]["batch"]),
            f"{one['result']['median_ratio']:.4f}",
            " to ".join(f"{value:.4f}" for value in one["result"]["interval"]),
        ]
        for one in results
    ]  # fmt: skip
    return markdown(rows, ["model", "method", "r", "batch", "time now / before, median", "95 % interval"])


STUDY = Study(
    "speed-versions", Options, grid, load, lambda run: {"methods": (run.method,), "batches": (run.batch,)}, table
)
