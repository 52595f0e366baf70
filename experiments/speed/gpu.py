"""Make all measurements that need a GPU, in one call of at most ten minutes: `python -m experiments.speed.gpu`.

The kernels are compared with the plain operators, and a forward is checked for synchronisation with the device. Then
the towers are timed, the most important ones first. Each result is written as soon as it is complete, and nothing is
started that is expected to end too late. What became of each measurement is printed at the end; called again, the
program continues with those that are missing.

It runs with torch, timm, transformers and crossget alone. Measurements that need another package are skipped without.
"""

import argparse
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import crossget
from crossget.methods import kernels
from experiments.lib.files import ROOT
from experiments.speed import llava, towers
from experiments.speed.towers import SETUPS, placed, reducers

TESTS = ("-m", "pytest", "-q", "-m", "gpu", "tests/methods/test_kernels.py")


@dataclass(frozen=True)
class Options:
    """How long, and where.

    Attributes:
        minutes: nothing is started that is expected to end later than this.
        device: the GPU.
        small: tiny models, to try the program; they run on a CPU, too.
        results: folder of the result files.
    """

    minutes: float = 10
    device: str = "cuda"
    small: bool = False
    results: Path = towers.RESULTS


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: for the log.
        seconds: that it is expected to take.
        work: does it.
        needs: the packages that it needs beside torch, timm, transformers and crossget.
    """

    name: str
    seconds: float
    work: Callable[[], object]
    needs: tuple[str, ...] = ()


def queue(options: Options) -> list[Job]:
    """Return all measurements, the most important first."""
    here = towers.Options(device=options.device, results=options.results, rounds=15)
    if options.small:
        small = replace(here, towers=("tiny",), batch=(2,), dtype="float32", rounds=2)
        return [
            Job("no waiting", 5, lambda: no_waiting("tiny", options.device)),
            Job("tiny", 5, lambda: towers.STUDY.run(small)),
        ]

    def tower(name: towers.TowerName, batch: int, mode: Literal["eager", "compile", "blocks"], seconds: float) -> Job:
        chosen = replace(here, towers=(name,), batch=(batch,), mode=mode)
        needs = ("open_clip",) if name == "clip-text" else ()
        return Job(f"{name}, batch {batch}, {mode}", seconds, lambda: towers.STUDY.run(chosen), needs)

    def answer(size: llava.Size, batch: int, seconds: float) -> Job:
        # In a folder of their own: the first token alone must not pass for the whole measurement.
        there = options.results / "first_token"
        chosen = llava.Options(size=(size,), batch=(batch,), new_tokens=(), device=options.device, results=there)
        return Job(f"{size}, batch {batch}, first token", seconds, lambda: llava.STUDY.run(chosen))

    return [
        Job("kernels", 60, lambda: subprocess.run([sys.executable, *TESTS], cwd=ROOT, check=True), ("pytest",)),
        Job("no waiting", 10, lambda: no_waiting("vit-b", options.device)),
        tower("vit-b", 128, "eager", 20),
        tower("vit-l-336", 32, "eager", 30),
        answer("llava-1.5-7b", 8, 60),
        tower("vit-b", 128, "compile", 120),
        tower("vit-b", 1, "eager", 10),
        answer("llava-1.5-13b", 8, 90),
        tower("vit-l-336", 32, "compile", 180),
        tower("vit-b", 128, "blocks", 60),
        answer("llava-1.5-7b", 32, 90),
        answer("llava-1.5-13b", 32, 120),
        tower("vit-b", 1, "compile", 120),
        tower("vit-h", 32, "eager", 30),
        tower("dinov2-l-518", 8, "eager", 30),
        tower("llava-tower", 32, "eager", 30),
        tower("clip-text", 128, "eager", 20),
    ]


def no_waiting(name: str, device: str) -> None:
    """Run an attached forward in which waiting for the device is an error.

    Raises:
        RuntimeError: something waited.
    """
    setup = SETUPS[name]
    # In half precision on a GPU, where all kernels take part.
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, x = setup.make().to(device, dtype).eval(), placed(setup.inputs(2), device, dtype)
    with torch.no_grad(), crossget.attach(model, {setup.tower: reducers(setup)[towers.CROSSGET]}):
        model(x)  # kernels are tuned at their first use, which does wait
        if x.is_cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
            with kernels.disabled():
                model(x)
        finally:
            if x.is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def work_off(jobs: list[Job], seconds: float, clock: Callable[[], float] = time.monotonic) -> dict[str, str]:
    """Do the jobs in order, and return what became of each.

    Args:
        jobs: the most important first.
        seconds: to stay within; a job that is expected to take longer than what is left is skipped.
        clock: tells the time.
    """
    start = clock()
    became = {}
    for job in jobs:
        if lacking := [name for name in job.needs if importlib.util.find_spec(name) is None]:
            became[job.name] = f"skipped: not installed: {', '.join(lacking)}"
            continue
        if clock() - start + job.seconds > seconds:
            became[job.name] = "not started: no time left"
            continue
        print(f"--- {job.name}", flush=True)
        try:
            job.work()
            became[job.name] = "done"
        except Exception as error:  # whatever it is (Triton's are no RuntimeErrors): the next one may work
            became[job.name] = f"FAILED: {type(error).__name__}: {error}"
        free()
    return became


def free() -> None:
    """Let go of what the last job leaves on the GPU: models hold on to themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(options: Options) -> dict[str, str]:
    """Make the measurements, and return what became of each.

    Raises:
        SystemExit: there is no GPU.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found: this program measures on a GPU (--small --device cpu tries it out)")
    became = work_off(queue(options), 60 * options.minutes)
    print("\n".join(f"{name}: {what}" for name, what in became.items()))
    return became


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line."""
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=default.minutes, help="start nothing that ends later")
    parser.add_argument("--device", default=default.device, help="the GPU")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program; they run on a CPU, too")
    parser.add_argument("--results", type=Path, default=default.results, help="folder of the result files")
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(any(what.startswith("FAILED") for what in main(parse()).values()))
