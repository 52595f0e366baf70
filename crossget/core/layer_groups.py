"""Registered cross tokens in optimisers with a learning rate per block.

timm asks a model for the groups of its parameters (`group_matcher`) and for those without weight decay
(`no_weight_decay`). While cross tokens are registered, both methods of the instance know them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from crossget.core.block_class import unwrap, wrap

Hosts = Callable[[], Mapping[str, str | None]]
"""Gives, by the name of a registered parameter, the name of a parameter of its block; None: it is of several blocks."""
Original = Callable[..., Any]


def has_groups(module: nn.Module) -> bool:
    """Whether a module groups its parameters for learning rates per block, as timm's do."""
    return hasattr(type(module), "group_matcher")


def wrap_groups(module: nn.Module, hosts: Hosts) -> list[Callable[[], None]]:
    """Let the methods of a module know the registered parameters.

    Returns:
        Functions that undo it.

    Raises:
        ValueError: a method is patched on the instance.
    """
    arounds = {"group_matcher": partial(_group_matcher, hosts), "no_weight_decay": partial(_no_weight_decay, hosts)}
    found = {name: around for name, around in arounds.items() if hasattr(type(module), name)}
    for name in found:
        if name in module.__dict__:
            raise ValueError(f"{type(module).__name__}.{name} is patched on the instance: remove that first")
    for name, around in found.items():
        wrap(module, name, around)
    return [partial(unwrap, module, name) for name in found]


def _no_weight_decay(hosts: Hosts, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    return {*original(*args, **kwargs), *hosts()}


def _group_matcher(hosts: Hosts, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The host's matcher, with each registered parameter in the group of its block.

    A matcher is a function of a name, or a dict of patterns by group: a group has one pattern, or pairs of a pattern
    and numbers, which sort its parameters behind the numbers that the pattern finds.
    """
    matcher, owners = original(*args, **kwargs), {name: host for name, host in hosts().items() if host is not None}
    if len(owners) < len(hosts()):
        warnings.warn(
            "cross tokens that are one parameter per tower have no group of their own, and are grouped like the head: "
            "register them without per_block=False",
            stacklevel=4,
        )
    if not isinstance(matcher, Mapping):
        return lambda name: matcher(owners.get(name, name))
    groups = {
        group: [] if spec is None else [(spec, None)] if isinstance(spec, str) else list(spec)
        for group, spec in matcher.items()
    }
    added: dict[str, list[tuple[str, tuple[int, ...]]]] = {group: [] for group in groups}
    for name, host in owners.items():
        found = next(
            ((group, match, numbers) for group, specs in groups.items() for pattern, numbers in specs
             if (match := re.match(pattern, host))), None,
        )  # fmt: skip
        if found is not None:
            group, match, numbers = found
            place = tuple(int(number) for number in match.groups() if number is not None)
            added[group].append((f"^{re.escape(name)}$", (*place, *(numbers or ()))))
    return {group: [*added[group], *specs] or None for group, specs in groups.items()}
