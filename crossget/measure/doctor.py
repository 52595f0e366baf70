"""Checks on a user's own model and input: r = 0 changes nothing, r > 0 takes effect, detaching leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from crossget.core.adapters import Tower
from crossget.core.attach import check_not_attached, find_towers
from crossget.core.connector import NAME as CONNECTOR
from crossget.core.inputs import AnyInputs, as_function, evaluating
from crossget.core.proofs import Check, check_model, outputs_of, removes_tokens
from crossget.methods.reducers import Reducer, Ward


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one model. Printed, it has one line per check.

    Attributes:
        model: name of its class.
        checks: the checks.
        found: the towers that were found in a model without adapter, and what could not be reduced; otherwise empty.
    """

    model: str
    checks: tuple[Check, ...]
    found: str = ""

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.ok else 'FAIL'}  {check.question}: {check.detail}" for check in self.checks]
        return "\n".join([f"crossget doctor: {self.model}", *self.found.splitlines(), *lines])


def doctor(model: nn.Module, inputs: AnyInputs, reducer: Reducer | Mapping[str, Reducer] | None = None) -> Diagnosis:
    """Check that a reducer works on a model.

    With r = 0 and without a cross token the reducer's class gives the dense model's output, bit for bit. With r > 0
    every block gets the planned number of tokens, and the output is finite. Detached, the model gives the dense output
    again, and has the classes, hooks, state dict keys and repr that it had before.

    Args:
        model: the model, not attached, in eval mode (with dropout no output could be compared).
        inputs: the model's arguments: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; or
            a function that runs the model. If the model has no adapter, they are two different inputs or more.
        reducer: the method to check, on every tower whose tokens can be merged; or a dict by tower name.
            `crossget.Ward(r=4)` if None, which needs no training.

    Raises:
        TypeError: the model is not supported, or `inputs` has a wrong type.
        ValueError: the model is attached or in training mode, the reducer removes nothing, or cannot work on a tower,
            or the model returns no tensor.
    """
    if model.training:
        raise ValueError("the model is in training mode, so its outputs are random: call model.eval() first")
    check_not_attached(model)
    if isinstance(reducer, Mapping) and CONNECTOR in reducer:
        raise ValueError(f"reducer names {CONNECTOR!r}, and the checks are of towers: leave it out")
    found = find_towers(model, inputs)
    towers = {tower.name: tower for tower in found}
    reducers = _by_tower(towers, Ward(r=4) if reducer is None else reducer)
    run = as_function(model, inputs)
    with evaluating(model):
        dense = outputs_of(model, run())  # first, because some models create attributes in their first forward
        checks = check_model(model, run, dense, [towers[name] for name in reducers], reducers)
    return Diagnosis(type(model).__qualname__, checks, str(found) if found.discovered else "")


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
    if not any(removes_tokens(one, towers[name]) for name, one in reducers.items()):
        raise ValueError(
            f"the reducer removes no token from the towers {sorted(towers)}: give one with r > 0, such as "
            "crossget.Ward(r=4)"
        )
    return reducers
