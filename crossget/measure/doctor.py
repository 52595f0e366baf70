"""Checks on a user's own model and input: r = 0 changes nothing, r > 0 takes effect, detaching leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.adapters import Tower, find_towers
from crossget.core.attachment import Attachment, attach
from crossget.measure.inputs import Call, Inputs, as_call, tensors_in
from crossget.methods.reducers import Reducer, Ward
from crossget.methods.schedules import planned_tokens


@dataclass(frozen=True)
class Check:
    """One check: what is claimed, whether it holds, and the numbers."""

    question: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one model. Printed, it has one line per check."""

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.question}: {check.detail}" for check in self.checks]
        return "\n".join([f"crossget doctor: {self.model}", *lines])


def doctor(model: nn.Module, inputs: Inputs, reducer: Reducer | Mapping[str, Reducer] | None = None) -> Diagnosis:
    """Check that a reducer works on a model.

    With r = 0 and without a cross token the reducer's class gives the dense model's output, bit for bit. With r > 0
    every block gets the planned number of tokens, and the output is finite. Detached, the model gives the dense output
    again, and has the classes, hooks, state dict keys and repr that it had before.

    Args:
        model: the model, not attached, in eval mode (with dropout no output could be compared).
        inputs: the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        reducer: the method to check, on every tower whose tokens can be merged; or a dict by tower name.
            `crossget.Ward(r=4)` if None, which needs no training.

    Raises:
        TypeError: the model is not supported, or `inputs` has a wrong type.
        ValueError: the model is attached or in training mode, the reducer removes nothing, or cannot work on a tower,
            or the model returns no tensor.
    """
    if model.training:
        raise ValueError("the model is in training mode, so its outputs are random: call model.eval() first")
    towers = {tower.name: tower for tower in find_towers(model)}
    reducers = _by_tower(towers, Ward(r=4) if reducer is None else reducer)
    call = as_call(inputs)
    with torch.no_grad(), _one_attention_kernel():
        dense = _outputs(model, call)
        before = _structure(model)  # after a forward, because some models create attributes in their first one
        checks = [_repeatable(dense, _outputs(model, call))]
        with attach(model, {name: _without_effect(one) for name, one in reducers.items()}):
            checks.append(_exact(dense, _outputs(model, call), reducers))
        with attach(model, reducers) as attached:
            reduced = _outputs(model, call)
            checks += [_effect(attached), _finite(reduced)]
        checks.append(_no_trace(dense, _outputs(model, call), before, _structure(model)))
    return Diagnosis(type(model).__qualname__, tuple(checks))


def _by_tower(towers: Mapping[str, Tower], reducer: Reducer | Mapping[str, Reducer]) -> dict[str, Reducer]:
    """Tower name -> reducer; language models that generate get one with r = 0, because their tokens are not merged.

    Raises:
        TypeError: a reducer is none.
        ValueError: there is no such tower, or no tower is to lose a token.
    """
    given = list(reducer.values()) if isinstance(reducer, Mapping) else [reducer]
    if not all(isinstance(one, Reducer) for one in given):
        raise TypeError(f"reducer is {reducer!r}: give a reducer such as crossget.Ward(r=4), or a dict by tower name")
    if isinstance(reducer, Reducer):
        reducers = {name: reducer if tower.reducible else replace(reducer, r=0) for name, tower in towers.items()}
    else:
        reducers = dict(reducer)
    unknown = sorted(set(reducers) - set(towers))
    if unknown:
        raise ValueError(f"reducer names the towers {unknown}: this model has {sorted(towers)}")
    if not any(_removes_tokens(one, towers[name]) for name, one in reducers.items()):
        raise ValueError(
            f"the reducer removes no token from the towers {sorted(towers)}: give one with r > 0, such as "
            "crossget.Ward(r=4)"
        )
    return reducers


def _removes_tokens(reducer: Reducer, tower: Tower) -> bool:
    """Whether some block is to remove tokens."""
    depth = len(tower.blocks)
    return tower.reducible and any(reducer.schedule.removed(layer, depth, 1000) for layer in range(depth))


def _without_effect(reducer: Reducer) -> Reducer:
    """A reducer of the same class that changes no bit: r = 0, no cross token, and all tokens in the last block."""
    changes: dict[str, Any] = {"r": 0, "cross_token": False, "class_token_only": False}
    if getattr(reducer, "importance", None) == "cross_token":
        changes["importance"] = None
    return replace(reducer, **{field.name: changes[field.name] for field in fields(reducer) if field.name in changes})


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that the model returns.

    Raises:
        ValueError: there are none.
    """
    tensors = list(tensors_in(call.run(model)))
    if not tensors:
        raise ValueError(f"{type(model).__name__} returned no tensor, so that no outputs can be compared")
    return tensors


@contextlib.contextmanager
def _one_attention_kernel() -> Iterator[None]:
    """Without the fused inference kernel of nn.MultiheadAttention, which rounds differently from its other kernels."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """Classes, attributes, hooks, state dict keys and repr of a model, for comparison."""
    modules = tuple(
        (name, type(module), tuple(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    )
    return modules, tuple(model.state_dict()), repr(model)


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two lists of tensors; infinite where shapes differ."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max(
        (float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0
    )


def _repeatable(first: list[Tensor], second: list[Tensor]) -> Check:
    gap = _difference(first, second)
    return Check("the model repeats itself", gap == 0.0, f"largest difference between two runs {gap:.1e}")


def _exact(dense: list[Tensor], unmerged: list[Tensor], reducers: Mapping[str, Reducer]) -> Check:
    gap = _difference(dense, unmerged)
    names = ", ".join(dict.fromkeys(type(reducer).__name__ for reducer in reducers.values()))
    return Check("r = 0 is the untouched model", gap == 0.0, f"{names}, largest difference {gap:.1e}")


def _effect(attached: Attachment) -> Check:
    details, ok = [], True
    for name, seen in attached.tokens.items():
        tower, reducer = attached.towers[name], attached.reducers[name]
        if not tower.reducible:
            continue
        n_reserved = tower.n_reserved(bool(reducer.cross_token))
        planned = planned_tokens(reducer.schedule, len(tower.blocks), seen[0] if seen else 0, n_reserved)
        removes = _removes_tokens(reducer, tower)
        ok = ok and seen == planned[:-1] and (planned[-1] < planned[0] or not removes)
        mismatch = "" if seen == planned[:-1] else f" (planned {planned[:-1]})"
        details.append(f"{name} {' '.join(map(str, seen)) or 'did not run'}{mismatch}")
    return Check("r > 0 reaches the planned tokens", ok, "; ".join(details))


def _finite(reduced: list[Tensor]) -> Check:
    bad = sum(int((~torch.isfinite(x)).sum()) for x in reduced if x.is_floating_point())
    return Check("the reduced output is finite", bad == 0, f"{bad} values are not")


def _no_trace(dense: list[Tensor], again: list[Tensor], before: tuple[Any, ...], after: tuple[Any, ...]) -> Check:
    gap, same = _difference(dense, again), before == after
    detail = f"largest difference {gap:.1e}, classes, hooks, keys and repr {'unchanged' if same else 'CHANGED'}"
    return Check("detaching leaves no trace", gap == 0.0 and same, detail)
