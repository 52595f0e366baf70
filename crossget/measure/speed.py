"""Speed and memory of reducers, always beside the dense model in the same run.

A machine's speed drifts: other programs, clocks, temperature. So nothing is timed on its own. In every round the dense
model and each method take one turn, in an order that rotates; the ratio is taken round by round, and the report holds
its median and quartiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
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

from crossget.core.attachment import attach, find_attachment
from crossget.measure.flops import Inputs, as_call
from crossget.methods.reducers import Reducer

__all__ = ["BenchmarkReport", "Measurement", "benchmark", "environment"]

Method = Reducer | Mapping[str, Reducer]
Turn = Callable[[], AbstractContextManager[Callable[[], Any]]]
"""Makes a context in which a call, which it gives, is one method's."""
_Mode = Callable[[], AbstractContextManager[Any]]

DENSE = "dense"
_LIBRARIES = ("crossget", "timm", "open_clip_torch", "transformers", "fvcore")
# Of x86, then of ARM, as Linux writes them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Measurement:
    """One method's share of a benchmark.

    Args:
        name: as in `methods`; "dense" for the model without a reducer.
        method: the reducer, as text.
        seconds: time of one call, round by round.
        speed: dense time over this method's time, round by round: above 1 is faster than dense.
        batch: images (or texts) per call.
        peak_memory: bytes that one call needed at most, on top of what was allocated before it (weights, inputs).
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

    Args:
        model: class of the model.
        inputs: shapes of the tensors that it was called with.
        rounds: timed turns of each method.
        warmup: untimed rounds before.
        measurements: dense first, then the methods.
        environment: see `environment`.
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
        """A table of the methods, with where and how they were measured."""
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
        """The whole report, as JSON: every round's time, and the medians."""
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

    The model runs in eval mode without gradients, with its best dense kernels, and is left as it was. An autocast
    context around the call applies to all methods alike.

    Args:
        model: an attached model (its own reducer is the method), or one that is not attached, with `methods`.
        inputs: what to call it with: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            The first tensor's first axis is the batch.
        rounds: turns that each method takes.
        warmup: untimed rounds before; besides, every timed call has an untimed one right before it.
        methods: name -> reducer (or reducers by tower) to attach in turn.
        call: what is timed, called with the inputs; the model itself if None. For generating, a function that calls
            `model.generate` (look the method up in every call: attaching puts another in its place).

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


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a number was measured: versions, device, threads. Belongs into every result file.

    Args:
        device: the one that was used.

    Returns:
        What JSON can hold, by name. On a CPU, "instructions" are those that matrix products gain from, where the system
        tells them: processors of one name differ in them, and so do virtual machines on the same one.
    """
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "platform": platform.platform(),
        "device": _device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **({"instructions": found} if device.type == "cpu" and (found := _instructions()) else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns


def _check(rounds: int, warmup: int, tensors: tuple[Tensor, ...]) -> None:
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: expected at least 1 round and a warm-up of 0 or more")
    if not tensors:
        raise ValueError("inputs hold no tensor: the batch and the device are read from the first one")
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("inputs are on the meta device, where nothing takes time: use crossget.count_flops there")


@contextmanager
def calling(run: Callable[[], Any], mode: _Mode = contextlib.nullcontext) -> Iterator[Callable[[], Any]]:
    """A turn of `run`, inside a context that makes it a method's."""
    with mode():
        yield run


def _modes(model: nn.Module, methods: Mapping[str, Method] | None) -> tuple[dict[str, _Mode], dict[str, str]]:
    """Name -> a context in which the model is that method; name -> the method as text. Dense comes first."""
    attachment = find_attachment(model)
    if attachment is not None:
        if methods:
            raise ValueError(
                f"already attached: {attachment}. Leave out `methods` to compare it with the dense model, or detach"
            )
        own = "attached"
        return {DENSE: attachment.paused, own: contextlib.nullcontext}, {DENSE: "", own: str(attachment.reducer)}
    if not methods:
        raise ValueError("nothing to compare with: attach a reducer, or give methods={'mine': crossget.CrossGET(8)}")
    if DENSE in methods:
        raise ValueError(f"methods names one {DENSE!r}: that name is the model's without a reducer")
    modes: dict[str, _Mode] = {DENSE: contextlib.nullcontext}
    for name, method in methods.items():
        modes[name] = partial(attach, model, method)
    return modes, {DENSE: "", **{name: str(method) for name, method in methods.items()}}


def take_turns(turns: Mapping[str, Turn], device: torch.device, rounds: int, warmup: int = 0) -> dict[str, list[float]]:
    """Seconds of each method's call, round by round; every round starts with another method.

    Args:
        turns: the methods by name.
        device: that they work on.
        rounds: timed turns of each method.
        warmup: untimed rounds before.
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
    """Seconds of the second of two calls: the first settles caches that the change of method has upset."""
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
    """Inside, the model is in eval mode; afterwards every module is in the mode that it was in."""
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
    """Bytes that one call needs at most, on top of what is allocated before it; in a pass of its own, untimed."""
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
    """From torch's profiler, which notes every allocation of torch's allocator, those inside kernels too.

    The process's own high-water mark would not do: it cannot be reset between methods.
    """
    measured = "crossget: measured call"
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_profiler(), profile:
        run()  # what this call leaves behind, the measured one replaces
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
    """Without the lines that the profiler's library prints when it starts, stops, or finds no GPU."""
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
# Numbers and names


def quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    """First and third quartile of some numbers; of one number, that number."""
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
    """What the model computes in: autocast's type inside autocast, else that of its first floating parameter."""
    if torch.is_autocast_enabled(device.type):
        return f"autocast {torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(floating, torch.get_default_dtype())).removeprefix("torch.")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def _processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Which of `_INSTRUCTIONS` the system lists; none where it lists nothing."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()  # what x86 and ARM call them
    return [name for name in _INSTRUCTIONS if name in flags]


def _cpuinfo(key: str) -> str:
    """What Linux says about the first processor; empty where it does not."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return ""
