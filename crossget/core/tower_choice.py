"""Which reducer is for which tower of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from crossget.core.adapters import Tower
from crossget.core.connector import NAME as CONNECTOR
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import part_of


def main_towers(names: Iterable[str]) -> list[str]:
    """The names of the towers that a single reducer is for.

    These are the image tower, or its stages visual.0, visual.1 ...; of a model without one, the first tower that is no
    decoder.

    Raises:
        ValueError: there are decoders only.
    """
    found = list(names)
    stages = [name for name in found if name.partition(".")[0] == "visual"]
    main = stages or [name for name in found if name.partition(".")[0] != "decoder"][:1]
    if not main:
        raise ValueError(
            f"one reducer is for an image tower, or for another encoder, and this model has {found} alone: name the "
            f"tower, as in {{{found[0]!r}: crossget.Ward(r=16)}}"
        )
    return main


def by_tower(
    towers: Mapping[str, Tower], reducer: Reducer | Mapping[str, Reducer], absent: Mapping[str, str] | None = None
) -> dict[str, Reducer]:
    """The reducers by tower name.

    Args:
        towers: the towers of the model, by name.
        reducer: one for the model, or a dict by tower name.
        absent: why the model lacks a tower, by the tower's name.

    Raises:
        TypeError: `reducer` is neither a reducer nor a dict of reducers.
        ValueError: it is for a tower that the model lacks.
    """
    absent = absent or {}
    if isinstance(reducer, Reducer):
        if "visual" in absent:
            raise ValueError(
                f"one reducer is for the tower 'visual', which cannot be reduced here: {absent['visual']}. Name the "
                f"towers instead, of {sorted(towers)}, as in {{{next(iter(towers))!r}: {reducer}}}"
            )
        main = main_towers(towers)
        depths = [towers[name].depth for name in main]
        chosen = dict.fromkeys(main, reducer)
        if len(main) > 1:  # one reducer for all blocks of the stages
            parts = zip(main, accumulate(depths, initial=0), depths, strict=False)
            chosen = {
                name: replace(reducer, r=part_of(reducer.schedule, first, depth, sum(depths)))
                for name, first, depth in parts
            }
        if reducer.cross_token:
            # Without fields that may have no effect on the other towers, and would be refused there.
            plain = replace(
                reducer, r=0, strip_cross_token=False, class_token_only=None if reducer.class_token_only else False
            )
            guided = (name for name, tower in towers.items() if tower.guided and name not in main)
            chosen |= dict.fromkeys(guided, plain)
        return chosen
    if not isinstance(reducer, Mapping):
        raise TypeError(f"reducer is {reducer!r}: give a reducer such as crossget.Ward(r=16), or a dict by tower name")
    unknown = sorted(set(reducer) - set(towers))
    if unknown or not reducer:
        reasons = "".join(f"; {name!r}: {absent[name]}" for name in unknown if name in absent)
        raise ValueError(f"reducer names the towers {sorted(reducer)}: this model has {sorted(towers)}{reasons}")
    for name, value in reducer.items():
        if not isinstance(value, Reducer):
            raise TypeError(f"reducer[{name!r}] is {value!r}: give a reducer such as crossget.Ward(r=16)")
    return dict(reducer)


def split_connector(reducer: Any) -> tuple[Reducer | None, Any]:
    """The reducer behind the connector, and what is for the towers (None: nothing is)."""
    if not isinstance(reducer, Mapping) or CONNECTOR not in reducer:
        return None, reducer
    behind = reducer[CONNECTOR]
    if not isinstance(behind, Reducer):
        raise TypeError(
            f"reducer[{CONNECTOR!r}] is {behind!r}: give a reducer such as crossget.Ward(crossget.Keep(128))"
        )
    return behind, {name: value for name, value in reducer.items() if name != CONNECTOR} or None
