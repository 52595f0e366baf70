"""Multiply-adds of one forward of a model, dense and reduced side by side.

Counting follows fvcore (Facebook Research's `FlopCountAnalysis`): one multiply-add counts 1, a LayerNorm with weights 5
per element, softmax, activations, additions and indexing 0. fvcore reads a jit trace, so the count is of what the
forward executes, including the matching and merging of an attached reducer. This module adds three things: attention
counts the same on every kernel (eager, fused, the fast path of `nn.MultiheadAttention`), nothing that ran is pruned
from the trace, and the report lists every operator that counts 0. docs/measuring.md has the details and the limits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from crossget.core.attach import find_attachment
from crossget.core.hooks import counting
from crossget.core.inputs import Call, Inputs, as_call, tensors_in
from crossget.measure.flop_formulas import MetaConvolutions, analyse, counts_zero

__all__ = ["Count", "FlopReport", "count_flops", "count_once"]


# ---------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class Count:
    """The multiply-adds of one forward.

    Attributes:
        total: multiply-adds of the whole forward.
        by_module: module name -> multiply-adds, those of its children included; "" is the whole model.
        by_operator: operator -> multiply-adds.
        zero: operator -> calls, of operators that count 0 by convention (elementwise, reductions, indexing).
        unsupported: operator -> calls, of operators without a formula. The total lacks their multiply-adds.
        uncalled: modules with parameters in which no module was called. They are unused, or their parent uses their
            weights directly; then the multiply-adds count for the parent.
    """

    total: int
    by_module: Mapping[str, int]
    by_operator: Mapping[str, int]
    zero: Mapping[str, int] = field(default_factory=dict)
    unsupported: Mapping[str, int] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlopReport:
    """The counts of a model: dense and, where a reducer is attached, reduced.

    `total`, `by_module` and `by_operator` are those of `reduced` where a reducer is attached, else those of `dense`.

    Attributes:
        model: class of the model.
        inputs: shapes of the tensors that it was called with.
        dense: the count without any reducer.
        reduced: the count with the reducers; None if nothing is attached.
        reducers: tower name -> reducer, as text.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    dense: Count
    reduced: Count | None = None
    reducers: Mapping[str, str] = field(default_factory=dict)

    @property
    def current(self) -> Count:
        """The count of the model as it was given."""
        return self.dense if self.reduced is None else self.reduced

    @property
    def total(self) -> int:
        """Multiply-adds of the model as it was given."""
        return self.current.total

    @property
    def by_module(self) -> Mapping[str, int]:
        """Multiply-adds by module of the model as it was given."""
        return self.current.by_module

    @property
    def by_operator(self) -> Mapping[str, int]:
        """Multiply-adds by operator of the model as it was given."""
        return self.current.by_operator

    @property
    def unsupported(self) -> Mapping[str, int]:
        """Operators without a formula in either count: name -> calls, the larger number of both."""
        return _larger([count.unsupported for count in self._counts()])

    @property
    def ratio(self) -> float:
        """Reduced multiply-adds over dense ones; 1 where nothing is attached."""
        return self.total / self.dense.total if self.dense.total else 1.0

    def table(self, depth: int = 3) -> str:
        """A table of the modules down to `depth` levels, then the operators that count 0 or have no formula.

        Raises:
            ValueError: `depth` is below 0.
        """
        if depth < 0:
            raise ValueError(f"depth={depth}: expected 0 (the total alone) or more")
        names = [name for name in self.dense.by_module if _depth(name) <= depth and self._largest(name)]
        rows = [self._row(name) for name in names]
        headers = ["module", "dense", "reduced", "ratio"][: len(rows[0]) if rows else 2]
        body = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=["left"] + ["right"] * 9)
        return "\n".join([self._title(), "", body, "", *self._footer()])

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report, as JSON."""
        return json.dumps({**dataclasses.asdict(self), "ratio": self.ratio}, indent=indent)

    def __str__(self) -> str:
        return self.table()

    def _counts(self) -> list[Count]:
        return [self.dense] if self.reduced is None else [self.dense, self.reduced]

    def _largest(self, name: str) -> int:
        return max(count.by_module.get(name, 0) for count in self._counts())

    def _row(self, name: str) -> list[str]:
        values = [count.by_module.get(name, 0) for count in self._counts()]
        row = [name or "total", *(f"{value:,}" for value in values)]
        if len(values) == 2:
            row.append(f"{values[1] / values[0]:.1%}" if values[0] else "new")
        return row

    def _title(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.inputs)
        reducers = [f"{tower}: {reducer}" for tower, reducer in self.reducers.items()]
        return "\n".join([f"{self.model}, inputs {shapes}: multiply-adds", *reducers])

    def _footer(self) -> list[str]:
        zero = _larger([count.zero for count in self._counts()])
        uncalled = sorted({name for count in self._counts() for name in count.uncalled})
        return [
            f"no formula, missing from the total: {_listed(self.unsupported) or 'none'}",
            f"counted as 0 by convention: {_listed(zero) or 'none'}",
            *([f"never called (unused, or counted in their parent): {', '.join(uncalled)}"] if uncalled else []),
        ]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _larger(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The union of the operators, each with its largest number of calls."""
    union: dict[str, int] = {}
    for count in counts:
        for name, calls in count.items():
            union[name] = max(calls, union.get(name, 0))
    return dict(sorted(union.items()))


def _listed(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{calls}" for name, calls in operators.items())


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def count_flops(model: nn.Module, inputs: Inputs) -> FlopReport:
    """Multiply-adds of one forward of a model, dense and reduced.

    The model runs once, or twice if a reducer is attached, without gradients and in its present mode (training or
    eval). A model and inputs on the meta device are counted without memory for weights and activations.

    Args:
        model: any module whose forward can be traced; attached or not.
        inputs: the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: `inputs` is none of the three.
        RuntimeError: the forward cannot be traced; torch gives the reason.
    """
    model = getattr(model, "_orig_mod", model)  # compiled code cannot be traced, the module behind it can
    call = as_call(inputs)
    shapes = tuple(tuple(tensor.shape) for tensor in call.tensors)
    attachment = find_attachment(model)
    if attachment is None:
        return FlopReport(type(model).__name__, shapes, _count(model, call))
    with attachment.paused():
        dense = _count(model, call)
    reduced = _count(model, call, attachment.parameters())
    reducers = {name: str(reducer) for name, reducer in attachment.reducers.items()}
    return FlopReport(type(model).__name__, shapes, dense, reduced, reducers)


def count_once(model: nn.Module, inputs: Inputs, parameters: Iterable[nn.Parameter] = ()) -> Count:
    """Multiply-adds of one forward of a model in its present state, attached or not.

    Args:
        model: as for `count_flops`.
        inputs: as for `count_flops`.
        parameters: parameters that take part and do not belong to the model: `Attachment.parameters()`.
    """
    return _count(model, as_call(inputs), parameters)


class _Traceable(nn.Module):
    """The model with the signature that the tracer takes: distinct tensors in, a list of tensors out.

    The tracer drops code whose result reaches no output. So the outputs hold, besides the model's own, one element of
    every tensor that a module returned. Thus a block whose result is not used (the last one of a tower of which the
    second-to-last layer is taken) counts, as it takes its time.
    """

    def __init__(self, model: nn.Module, call: Call, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        # The tracer refuses parameters as constants, so those outside the model (cross tokens) become the wrapper's.
        self.outside = nn.ParameterList(parameters)
        self.call = call
        self.called: set[nn.Module] = set()
        self.elements: list[Tensor] = []

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self.call.replaced(tensors)
        return [*tensors_in(self.model(*args, **kwargs)), *self.elements]

    def observe(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module."""
        self.called.add(module)
        for tensor in tensors_in(output):
            if tensor.layout is torch.strided and not tensor.is_nested and tensor.numel():
                # stack copies the element, so that the tensor itself can be freed. It counts 0.
                self.elements.append(torch.stack([tensor[(0,) * tensor.dim()]]))

    @contextmanager
    def observing(self) -> Iterator[None]:
        hooks = [module.register_forward_hook(self.observe) for module in self.model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def uncalled(self) -> tuple[str, ...]:
        """Names of the topmost modules with parameters in which nothing was called."""
        names: list[str] = []
        for name, module in self.model.named_modules():
            inside = name.startswith(tuple(f"{parent}." for parent in names))
            if inside or self._is_output_of_attention(name) or next(module.parameters(), None) is None:
                continue
            if self.called.isdisjoint(module.modules()):
                names.append(name)
        return tuple(names)

    def _is_output_of_attention(self, name: str) -> bool:
        """nn.MultiheadAttention uses the weights of its output layer and never calls it."""
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _count(model: nn.Module, call: Call, parameters: Iterable[nn.Parameter] = ()) -> Count:
    traceable = _Traceable(model, call, parameters)
    tensors = (*call.tensors, *model.parameters())
    kernels = MetaConvolutions() if any(tensor.is_meta for tensor in tensors) else nullcontext()
    with torch.no_grad(), _unchanged(model, tensors), traceable.observing(), counting(), kernels:
        analysis = analyse(traceable, call.tensors)
        total = int(analysis.total())
    prefix = "model."
    by_module = {name: int(count) for name, count in analysis.by_module().items()}
    unknown = analysis.unsupported_ops()
    zero = {kind for kind in unknown if counts_zero(kind)}
    return Count(
        total=total,
        by_module={"": total, **{n.removeprefix(prefix): c for n, c in by_module.items() if n.startswith(prefix)}},
        by_operator={name: int(count) for name, count in analysis.by_operator().most_common()},
        zero={kind: unknown[kind] for kind in sorted(zero)},
        unsupported={kind: unknown[kind] for kind in sorted(unknown.keys() - zero)},
        uncalled=traceable.uncalled(),
    )


@contextmanager
def _unchanged(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore random state and buffers (running statistics), and remove the hooks that a failed trace leaves."""
    training = any(module.training for module in model.modules())
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta] if training else []
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for buffer, before in buffers:
            if not torch.equal(buffer, before):  # a write would invalidate an autograd graph that saved the buffer
                buffer.copy_(before)
        for module in model.modules():
            _drop_scope_hooks(module)


def _drop_scope_hooks(module: nn.Module) -> None:
    """Remove the hooks by which fvcore names the scopes: it does so itself only if the forward succeeds."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if type(hook).__module__.startswith("fvcore.")]:
            del hooks[key]
