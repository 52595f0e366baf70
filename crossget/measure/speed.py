"""Speed and memory of reducers, measured together with the dense model in the same run.

A machine's speed changes with its load, clock rate and temperature. So no method is timed on its own: in every round
the dense model and each method are called once, in an order that rotates. The ratio of their times is taken round by
round, and the report holds its median and quartiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from crossget.core.attach import attach, find_attachment
from crossget.core.inputs import Inputs, as_call
from crossget.measure.environment import environment
from crossget.methods.reducers import Reducer

__all__ = ["BenchmarkReport", "Measurement", "benchmark"]

Method = Reducer | Mapping[str, Reducer]
Turn = Callable[[], AbstractContextManager[Callable[[], Any]]]
"""Makes a context that gives a function. Inside the context, calling the function runs one method."""
_Mode = Callable[[], AbstractContextManager[Any]]
"""Makes a context inside which the model is reduced by one method, or by none."""

DENSE = "dense"


@dataclass(frozen=True)
class Measurement:
    """What was measured of one method.

    Attributes:
        name: as in `methods`; "dense" for the model without a reducer.
        method: the reducer, as text.
        seconds: time of one call, for each round.
        speed: dense time over this method's time, for each round: above 1 is faster than dense.
        batch: images (or texts) per call.
        peak_memory: the most bytes that one call needed at once, besides those allocated before it (weights, inputs).
    """

    name: str
    method: str
    seconds: tuple[float, ...]
    speed: tuple[float, ...]
    batch: int
    peak_memory: int

    @property
    def median_seconds(self) -> float:
        """Median time of one call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the time of one call, in seconds."""
        return quartiles(self.seconds)

    @property
    def median_speed(self) -> float:
        """Median of the ratios to dense, taken round by round."""
        return statistics.median(self.speed)

    @property
    def speed_quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios to dense."""
        return quartiles(self.speed)

    @property
    def images_per_second(self) -> float:
        """Batch over the median time."""
        return self.batch / self.median_seconds


@dataclass(frozen=True)
class BenchmarkReport:
    """What `benchmark` measured.

    Attributes:
        model: class of the model.
        inputs: shapes of the tensors that it was called with.
        rounds: timed calls of each method.
        warmup: untimed rounds before them.
        measurements: dense first, then the methods.
        environment: see `crossget.measure.environment.environment`; with "dtype" and "batch".
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    rounds: int
    warmup: int
    measurements: tuple[Measurement, ...]
    environment: Mapping[str, Any]

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of one method.

        Raises:
            KeyError: there is no method of that name.
        """
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(f"no method {name!r}: this report has {[m.name for m in self.measurements]}")

    def table(self) -> str:
        """A table of the methods, below one line on device, precision and versions."""
        headers = ["method", "ms / call", "quartiles", "images / s", "speed", "quartiles", "peak memory"]
        body = tabulate(
            [_row(m) for m in self.measurements], headers, disable_numparse=True, colalign=["left"] + ["right"] * 6
        )
        where = self.environment
        shapes = ", ".join(str(list(shape)) for shape in self.inputs)
        return (
            f"{self.model}, inputs {shapes}, {where['dtype']}, {where['device']}, {where['threads']} threads, "
            f"torch {where['torch']}; {self.rounds} rounds\n\n{body}"
        )

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON: the times of every round, and their medians."""
        report = dataclasses.asdict(self)
        for row, measurement in zip(report["measurements"], self.measurements, strict=True):
            row["median_seconds"] = measurement.median_seconds
            row["median_speed"] = measurement.median_speed
            row["images_per_second"] = measurement.images_per_second
        return json.dumps(report, indent=indent)

    def __str__(self) -> str:
        return self.table()


def benchmark(
    model: nn.Module,
    inputs: Inputs,
    *,
    rounds: int = 10,
    warmup: int = 2,
    methods: Mapping[str, Method] | None = None,
    call: Callable[..., Any] | None = None,
) -> BenchmarkReport:
    """Time the dense model and its reduced forms against each other.

    The model runs in eval mode without gradients, with its fastest dense kernels, and is left as it was. An autocast
    context around the call applies to all methods alike.

    Args:
        model: an attached model, which is compared with itself without its reducer; or one that is not attached,
            together with `methods`.
        inputs: the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            The first axis of the first tensor is the batch.
        rounds: timed calls of each method.
        warmup: untimed rounds before them. Besides, every timed call follows an untimed one.
        methods: name -> reducer (or reducers by tower), which are attached one after the other.
        call: the function that is timed, called with the inputs; the model itself if None. To time generation, give a
            function that calls `model.generate` (and looks the method up in every call, because attaching replaces it).

    Raises:
        TypeError: `inputs` is none of the three.
        ValueError: nothing to compare with, an attached model together with `methods`, inputs on the meta device or
            without a tensor, or fewer than one round.
    """
    given = as_call(inputs)
    _check(rounds, warmup, given.tensors)
    modes, texts = _modes(model, methods)
    device = given.tensors[0].device
    timed = model if call is None else call

    def run() -> None:
        timed(*given.args, **given.kwargs)

    turns: dict[str, Turn] = {name: partial(calling, run, mode) for name, mode in modes.items()}
    # Not inference_mode: what a host caches in its first forward must still serve in training.
    with in_eval_mode(model), torch.no_grad():
        seconds = take_turns(turns, device, rounds, warmup)
        memory = {name: peak_memory(turn, device) for name, turn in turns.items()}
    batch = int(given.tensors[0].shape[0]) if given.tensors[0].dim() else 1
    speed = {name: tuple(a / b for a, b in zip(seconds[DENSE], seconds[name], strict=True)) for name in turns}
    measurements = tuple(
        Measurement(name, texts[name], tuple(seconds[name]), speed[name], batch, memory[name]) for name in turns
    )
    where = {**environment(device), "dtype": _dtype(model, device), "batch": batch}
    shapes = tuple(tuple(tensor.shape) for tensor in given.tensors)
    return BenchmarkReport(type(model).__name__, shapes, rounds, warmup, measurements, where)


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns


def _check(rounds: int, warmup: int, tensors: tuple[Tensor, ...]) -> None:
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: expected at least 1 round and a warm-up of 0 or more")
    if not tensors:
        raise ValueError("inputs hold no tensor: expected at least one, which tells the batch and the device")
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            "inputs are on the meta device, where no call takes time: use crossget.count_flops, or real inputs"
        )


@contextmanager
def calling(run: Callable[[], Any], mode: _Mode = contextlib.nullcontext) -> Iterator[Callable[[], Any]]:
    """A `Turn` that calls `run` inside the context that `mode` makes."""
    with mode():
        yield run


def _modes(model: nn.Module, methods: Mapping[str, Method] | None) -> tuple[dict[str, _Mode], dict[str, str]]:
    """Name -> the method's context, and name -> the method as text. Dense comes first."""
    attachment = find_attachment(model)
    if attachment is not None:
        if methods:
            raise ValueError(
                f"already attached: {attachment}. Leave out `methods` to compare it with the dense model, or detach"
            )
        own = "attached"
        return {DENSE: attachment.paused, own: contextlib.nullcontext}, {DENSE: "", own: str(attachment.reducer)}
    if not methods:
        raise ValueError("nothing to compare with: attach a reducer, or give methods={'mine': crossget.Ward(8)}")
    if DENSE in methods:
        raise ValueError(
            f"methods has the name {DENSE!r}, which stands for the model without a reducer: choose another name"
        )
    modes: dict[str, _Mode] = {DENSE: contextlib.nullcontext}
    for name, method in methods.items():
        modes[name] = partial(attach, model, method)
    return modes, {DENSE: "", **{name: str(method) for name, method in methods.items()}}


def take_turns(turns: Mapping[str, Turn], device: torch.device, rounds: int, warmup: int = 0) -> dict[str, list[float]]:
    """Seconds of each method's call, for each round. Every round starts with another method.

    Args:
        turns: the methods by name.
        device: the device that they run on.
        rounds: timed calls of each method.
        warmup: untimed rounds before them.
    """
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            with turns[name]() as call:
                elapsed = _timed(call, device)
            if i >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the second of two calls: after a change of method the first one fills the caches again."""
    run()
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. Afterwards every module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_memory(turn: Turn, device: torch.device) -> int:
    """The most bytes that one call needs at once, besides those that are allocated before it.

    Measuring memory takes time, so it has calls of its own, which are not timed.
    """
    with turn() as call:
        return _peak_on_cuda(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def _peak_on_cuda(run: Callable[[], Any], device: torch.device) -> int:
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], Any]) -> int:
    """The peak by torch's profiler, which records every allocation of torch's allocator, also inside kernels.

    (The peak that the operating system reports for a process cannot be reset between methods.)
    """
    measured = "crossget: measured call"
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_profiler(), profile:
        run()  # what it leaves allocated, the measured call replaces and frees
        with torch.profiler.record_function(measured):
            run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == measured)
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live = peak = 0
    for time_stamp, _, change in changes:
        live += change if time_stamp >= start else 0
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Inside, the profiler's library prints no lines when it starts, stops, or finds no GPU."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    """First and third quartile of some numbers; of a single number, that number twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _row(m: Measurement) -> list[str]:
    low, high = m.quartiles
    slow, fast = m.speed_quartiles
    return [
        m.name,
        f"{m.median_seconds * 1e3:.2f}",
        f"{low * 1e3:.2f} - {high * 1e3:.2f}",
        f"{m.images_per_second:.1f}",
        f"{m.median_speed:.2f}x",
        f"{slow:.2f} - {fast:.2f}",
        f"{m.peak_memory / 2**20:.1f} MiB",
    ]


def _dtype(model: nn.Module, device: torch.device) -> str:
    """The type that the model computes in: that of autocast inside it, else that of the first floating parameter."""
    if torch.is_autocast_enabled(device.type):
        return f"autocast {torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(floating, torch.get_default_dtype())).removeprefix("torch.")
