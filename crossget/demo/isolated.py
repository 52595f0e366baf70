"""Many models, each examined in a process of its own: without network or noise, with limits of time and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

WORKERS = 2
SECONDS, MEMORY = 100.0, 10 << 30  # limits of one model: time, and bytes of address space


class Examined(Protocol):
    """A row, a dataclass, of what is known of a model."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its class; empty if there is nothing to examine."""

    @property
    def cause(self) -> str:
        """Why the rest is not known."""

    @property
    def done(self) -> bool:
        """Whether no more can be known."""


R = TypeVar("R", bound=Examined)
Examine = Callable[[R], Iterator[R]]


def examined(rows: Iterable[R], examine: Examine[R], module: str) -> Iterator[R]:
    """The best row of each model, as the models are done.

    Args:
        rows: of what is known before.
        examine: function that takes a row and yields better ones; it is called in another process.
        module: name of a module that all need.

    Raises:
        RuntimeError: the system has no start method "forkserver".
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise RuntimeError("models of transformers are examined in forked processes, which this system does not have")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "transformers.modeling_utils"])
    running: dict[Any, _Job[R]] = {}
    waiting = iter(rows)
    while True:
        while len(running) < WORKERS and (row := next(waiting, None)) is not None:
            if row.name:
                job = _Job(context, row, examine)
                running[job.results] = job
            else:
                yield row
        if not running:
            return
        soonest = min(job.deadline for job in running.values()) - time.monotonic()
        ready = connection.wait(list(running), timeout=max(0.0, soonest))
        for results, job in list(running.items()):
            if (results in ready and not job.receive()) or time.monotonic() > job.deadline:
                del running[results]
                yield job.end()


class _Job(Generic[R]):
    """A process that examines one model and sends its rows, the best one last.

    Attributes:
        results: where the rows arrive.
        deadline: when it is ended, in seconds of time.monotonic().
    """

    def __init__(self, context: Any, row: R, examine: Examine[R]) -> None:
        self.row = row
        self.results, sender = context.Pipe(duplex=False)
        self.deadline = time.monotonic() + SECONDS
        self._process = context.Process(target=_run, args=(sender, row, examine), daemon=True)
        self._process.start()
        sender.close()

    def receive(self) -> bool:
        """Take a row; False if the process has ended."""
        try:
            self.row = self.results.recv()
        except EOFError:
            return False
        return True

    def end(self) -> R:
        """End the process, and give the best row."""
        late = time.monotonic() > self.deadline
        self._process.kill() if late else self._process.join()
        self._process.join()
        self.results.close()
        code = self._process.exitcode
        if late and not self.row.done:
            return dataclasses.replace(self.row, cause=f"it took longer than {SECONDS:.0f} s")
        if code and not self.row.done:
            return dataclasses.replace(self.row, cause=f"its process ended with exit code {code}")
        return self.row


def _run(sender: connection.Connection, row: Any, examine: Examine[Any]) -> None:
    """What a process does: examine the model without network, noise in the terminal, or more memory than allowed."""
    import resource

    from huggingface_hub import constants
    from transformers import logging

    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    try:
        for better in examine(row):
            sender.send(better)
    except Exception as error:
        sender.send(dataclasses.replace(row, cause=f"it could not be examined: {text_of(error)}"))


def text_of(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
