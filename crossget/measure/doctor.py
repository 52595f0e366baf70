"""Proof, on the user's own model and input, that attaching is exact, takes effect and leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from crossget.core.adapters import find_towers
from crossget.core.attachment import attach
from crossget.methods.reducers import CrossGET, Reducer, ToMe
from crossget.methods.schedules import planned_tokens


@dataclass(frozen=True)
class Check:
    """One finding: what was asked, whether it holds, and the numbers behind it."""

    question: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `ok` when every one of them holds; printing it gives one line each."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.question}: {check.detail}" for check in self.checks]
        return "\n".join([f"crossget doctor: {self.model}", *lines])


def doctor(model: nn.Module, inputs: Any, reducer: Reducer | None = None) -> Diagnosis:
    """Check a model: is r = 0 the untouched model, does r > 0 take effect, does detaching leave no trace?

    Args:
        model: not attached, in eval mode (dropout would differ from run to run).
        inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model.
        reducer: the method to try; CrossGET(r=4) if None.

    Raises:
        TypeError: the model is not supported.
        ValueError: the model is attached, or in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, so its outputs are random: call model.eval() first")
    reducer = CrossGET(r=4) if reducer is None else reducer
    towers = find_towers(model)
    with torch.no_grad(), _one_kernel():
        dense = _run(model, inputs)
        before = _identity(model)  # only now: hosts set things up in their first forward
        checks = [_repeatable(dense, _run(model, inputs))]
        with attach(model, {tower.name: ToMe(r=0) for tower in towers}):
            checks.append(_exact(dense, _run(model, inputs)))
        with attach(model, {t.name: reducer if t.reducible else replace(reducer, r=0) for t in towers}) as attached:
            reduced = _run(model, inputs)
            checks += [_effect(attached.tokens, attached.reducers, attached.towers), _finite(reduced)]
        checks.append(_no_trace(dense, _run(model, inputs), before, _identity(model)))
    return Diagnosis(type(model).__qualname__, tuple(checks))


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    if isinstance(inputs, dict):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _one_kernel() -> Iterator[None]:
    """Without the fused inference kernel of nn.MultiheadAttention, which rounds differently from attention proper."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _identity(model: nn.Module) -> tuple[Any, ...]:
    classes = tuple((name, type(module), tuple(module.__dict__)) for name, module in model.named_modules())
    return classes, tuple(model.state_dict()), repr(model)


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max(
        (float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0
    )


def _repeatable(first: list[Tensor], second: list[Tensor]) -> Check:
    gap = _difference(first, second)
    return Check("the model repeats itself", gap == 0.0, f"largest difference between two runs {gap:.1e}")


def _exact(dense: list[Tensor], still: list[Tensor]) -> Check:
    gap = _difference(dense, still)
    return Check("r = 0 is the untouched model", gap == 0.0, f"largest difference {gap:.1e}")


def _effect(tokens: Mapping[str, list[int]], reducers: Mapping[str, Reducer], towers: Mapping[str, Any]) -> Check:
    details, ok = [], True
    for name, seen in tokens.items():
        tower, reducer = towers[name], reducers[name]
        if not tower.reducible:
            continue
        reserved = tower.n_reserved(bool(reducer.cross_token))
        plan = planned_tokens(reducer.schedule, len(tower.blocks), seen[0] if seen else 0, reserved)
        ok = ok and seen == plan[:-1] and plan[-1] < plan[0]
        details.append(f"{name} {' '.join(map(str, seen))}" + ("" if seen == plan[:-1] else f" (planned {plan[:-1]})"))
    return Check("r > 0 reaches the planned tokens", ok, "; ".join(details))


def _finite(reduced: list[Tensor]) -> Check:
    bad = sum(int((~torch.isfinite(x)).sum()) for x in reduced if x.is_floating_point())
    return Check("the reduced output is finite", bad == 0, f"{bad} values are not")


def _no_trace(dense: list[Tensor], again: list[Tensor], before: tuple[Any, ...], after: tuple[Any, ...]) -> Check:
    gap, same = _difference(dense, again), before == after
    detail = f"largest difference {gap:.1e}, classes, keys and repr {'unchanged' if same else 'CHANGED'}"
    return Check("detaching leaves no trace", gap == 0.0 and same, detail)
