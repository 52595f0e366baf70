"""The harness: a study is a grid of runs, what they share, and the measurement of one; a page shows its results.

A *run* is a frozen dataclass with a `slug`, the name of its result file. A run whose file exists is skipped, so that a
stopped program continues when it is started again with the same command.
"""

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from crossget.core.files import replacing
from experiments.lib import processes
from experiments.lib.files import Json, environment, read_json, read_results, write_json
from experiments.lib.tables import update


class Run(Protocol):
    """One point of a grid."""

    @property
    def slug(self) -> str:
        """The name of the run's result file, without folder and ending; `/` makes folders."""
        ...


RunT = TypeVar("RunT", bound=Run)
OptionsT = TypeVar("OptionsT")

# Options that change where results go or how fast they are made, but not what they are: no part of a run's command.
UNRECORDED = frozenset({"results", "work", "overwrite", "workers", "save_every", "skip_bad", "trackers"})


def measured_device() -> str:
    """Return the device of the studies that choose it themselves: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pending(runs: Iterable[RunT], folder: Path, overwrite: bool = False) -> list[RunT]:
    """Return the runs that have no result file yet, or all of them."""
    return [run for run in runs if overwrite or not (folder / f"{run.slug}.json").exists()]


def work_through(
    runs: Iterable[RunT],
    folder: Path,
    measure: Callable[[RunT], Json | None],
    *,
    command: Callable[[RunT], str],
    environment: Json,
) -> None:
    """Measure runs one after the other, and write each result file as soon as it is complete.

    Args:
        runs: what is measured.
        folder: where the result files are.
        measure: returns `{"run": ..., "result": ...}`; None on a process that is not the one that writes.
        command: returns the command line that repeats one run.
        environment: from `files.environment`.
    """
    progress = tqdm(runs, disable=None, unit="run")
    for run in progress:
        progress.set_description(run.slug)
        start = time.perf_counter()
        made = measure(run)
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


@dataclass(frozen=True)
class Study(Generic[OptionsT, RunT]):
    """A study, run by `python -m experiments.run NAME`.

    Attributes:
        name: of the study on the command line.
        options: dataclass of its options, with `results` (folder of result files) and `overwrite`. An option `device`
            is where the model runs.
        grid: returns the runs that options ask for.
        load: loads what the runs share (model, data), and returns the function that measures one of them; see
            `work_through`. It is not called when no run is pending.
        select: returns the options that choose one run alone; its command is made of them.
        show: returns the results of a grid as text, which is printed at the end; None: nothing is printed.
        repeated: returns the runs that are measured again though they have a result file.
    """

    name: str
    options: type[OptionsT]
    grid: Callable[[OptionsT], list[RunT]]
    load: Callable[[OptionsT], Callable[[RunT], Json | None]]
    select: Callable[[RunT], Mapping[str, Any]]
    show: Callable[[Sequence[Json]], str] | None = None
    repeated: Callable[[OptionsT, list[RunT]], list[RunT]] = lambda options, runs: []

    def run(self, options: OptionsT) -> int:
        """Measure what is pending, and return how many runs were measured.

        Raises:
            ValueError: the options ask for something that does not exist.
        """
        return processes.ending_group(self._run)(options)

    def _run(self, options: Any) -> int:
        runs, folder = self.grid(options), options.results
        again = self.repeated(options, runs)
        todo = [run for run in runs if run in again or pending([run], folder, options.overwrite)]
        if todo:
            measure = self.load(options)
            where = environment(getattr(options, "device", None) or measured_device())
            work_through(todo, folder, measure, command=partial(self.command, options), environment=where)
        if self.show is not None:
            written = [file for run in runs if (file := folder / f"{run.slug}.json").exists()]
            print(self.show([read_json(file) for file in written]), end="\n\n")
        return len(todo)

    def command(self, options: OptionsT, run: RunT) -> str:
        """Return the command line that repeats one run: all that differs from the defaults; of paths the name only."""
        alone: Any = replace(options, **self.select(run))  # type: ignore[type-var]
        words = ["python", "-m", "experiments.run", self.name]
        for option in fields(alone):
            value = getattr(alone, option.name)
            if option.name not in UNRECORDED and value != _default(option):
                words += _words(option.name, value)
        return shlex.join(words)


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{flag}", *(one.name if isinstance(one, Path) else str(one) for one in values)]


@dataclass(frozen=True)
class Page:
    """A page with the tables of a study's results, written by `python -m experiments.report NAME`.

    Attributes:
        file: the page. What stands outside its marks is written by hand and stays.
        results: folder of the result files.
        tables: returns the generated part.
        figures: by path relative to the page, what draws it.
    """

    file: Path
    results: Path
    tables: Callable[[list[Json]], str]
    figures: Mapping[str, Callable[[list[Json], Path], object]] = field(default_factory=dict)

    def generated(self) -> str:
        """Return the generated part, from the result files alone.

        Raises:
            ValueError: there is no result file, or results were made on different data and cannot be compared.
        """
        return self.tables(self._read())

    def write(self) -> None:
        """Write the generated part and the figures.

        Raises:
            ValueError: see `generated`; or the page has lost its marks.
        """
        results = self._read()
        update(self.file, self.tables(results))
        for name, draw in self.figures.items():
            with replacing(self.file.parent / name) as part:
                draw(results, part)

    def _read(self) -> list[Json]:
        results = read_results(self.results)
        if not results:
            raise ValueError(f"no result file in {self.results}: run the study first, see experiments/README.md")
        return results
