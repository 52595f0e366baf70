"""Functions that several adapters use: projections of single tokens, rotary tables, rows of support_matrix().

No host is imported here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from crossget.core.adapters import Tower
from crossget.core.block_class import Wrapped
from crossget.core.state import TokenState

Part = tuple[nn.Module, str]
"""A part of a host: a module, and the name of its attribute, or the path to it. It is looked up when it is used."""


def project(parts: Sequence[Part], tokens: Tensor) -> Tensor:
    """Project cross tokens [N, C] into the joint space of the towers [N, E]. The parameters get no gradient.

    Args:
        parts: what is applied, in this order: modules, matrices [C, E], or None for nothing.
        tokens: [N, C].
    """
    for owner, path in parts:
        part = attrgetter(path)(owner)
        if isinstance(part, nn.Module):
            tokens = frozen(part, tokens)
        elif part is not None:
            tokens = tokens @ part.detach()
    return tokens


def embed(parts: Sequence[Part], tokens: Tensor) -> Tensor:
    """Project tokens [.., C] of the last block into the joint space [.., E], as the host does with its pooled token.

    Args:
        parts: what is applied, as in `project`.
        tokens: [.., C].
    """
    for owner, path in parts:
        part = attrgetter(path)(owner)
        if isinstance(part, nn.Module):
            tokens = torch.as_tensor(part(tokens))
        elif part is not None:
            tokens = tokens @ part
    return tokens


def is_of(host: str, module: nn.Module) -> bool:
    """Whether a module runs its host's own code: its class is the host's, and no method is replaced on the instance.

    Args:
        host: name of the host's top-level package.
        module: a module of the host, or of a subclass.
    """
    cls = type(module)
    if cls.__module__.split(".")[0] != host:
        return False
    if torch.compiler.is_compiling():  # Dynamo cannot trace a loop over a module's attributes
        return True
    attributes = ((name, value) for name, value in vars(module).items() if callable(value))
    return not any(callable(getattr(cls, name, None)) and not isinstance(value, Wrapped) for name, value in attributes)


def frozen(module: nn.Module, tokens: Tensor) -> Tensor:
    """The output of a module, whose parameters get no gradient."""
    out: Tensor = _Frozen.apply(tokens, module)
    return out


class _Frozen(torch.autograd.Function):
    """Calls a module; the backward pass computes the gradient of its input only.

    The module itself is called, with its parameters and hooks. Detached copies of its parameters would not do: sharded
    parameters (ZeRO-3) are only gathered by the module's hooks.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, module: nn.Module) -> Tensor:
        with torch.enable_grad():
            ctx.tokens = tokens.detach().requires_grad_(tokens.requires_grad)
            ctx.out = module(ctx.tokens)
        detached: Tensor = ctx.out.detach()
        return detached

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.out, ctx.tokens, gradients[0])
        return gradient, None


def remaining_rows(table: Tensor, last: Tensor, state: TokenState) -> Tensor:
    """The rows of a rotary table for the remaining tokens. A merged token has the row of its destination.

    The table has rows for the last N of the host's T0 tokens. The first T0 - N tokens are not rotated.

    Args:
        table: [B or 1, H or 1, N, D].
        last: [B or 1, H or 1, 1, D] row of the cross token.
        state: of the tokens, of which T remain.

    Returns:
        [B, H or 1, T - (T0 - N), D].
    """
    skipped = state.length - int(table.shape[2])
    if state.has_cross_token:
        table = torch.cat([table, last], 2)
    rows = (state.positions[:, skipped:] - skipped)[:, None, :, None]
    table = table.expand(rows.shape[0], -1, -1, -1)
    return table.gather(2, rows.expand(-1, table.shape[1], -1, table.shape[3]))


@dataclass(frozen=True)
class SupportRow:
    """One model of a host.

    Attributes:
        name: the name in the host's own list of models.
        architecture: the name of the model's class.
        supported: it has a tower that can be reduced.
        towers: one line per tower, such as "visual: 12 blocks (Block), prefix 1, class token".
        reason: why the model, or which of its towers, is not supported; empty if all of it is.
    """

    name: str
    architecture: str
    supported: bool
    towers: tuple[str, ...] = ()
    reason: str = ""


def support_row(name: str, model: nn.Module, towers: Sequence[Tower], reason: str = "") -> SupportRow:
    """The row of a model with these towers or, if there are none, with this reason."""
    return SupportRow(name, type(model).__name__, bool(towers), tuple(map(str, towers)), "" if towers else reason)


class NumbersOnCPU(TorchFunctionMode):
    """Mode for building models on the meta device, in which `torch.linspace` and `torch.arange` have values.

    Constructors of older versions of timm read numbers from such tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func in (torch.linspace, torch.arange) else kwargs))


class ValuesOnCPU(TorchFunctionMode):
    """Mode in which a host with weights on the meta device takes inputs on the CPU, whose values it can read.

    A tensor on the CPU stays there until an operator gets it together with one on the meta device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and not args[0].is_meta:
            args = tuple(value for value in args if not _is_meta_device(value))
            kwargs = {name: value for name, value in kwargs.items() if not _is_meta_device(value)}
            if len(args) == 1 and not kwargs:
                return args[0]
        elif any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        return func(*args, **kwargs)


def _is_meta_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "meta"


def _on_meta(tensor: Tensor) -> Tensor:
    """A tensor of one number is taken together with others on any device, and may be a size."""
    return tensor if tensor.is_meta or tensor.dim() == 0 else tensor.to("meta")


def markdown(rows: Iterable[SupportRow]) -> str:
    """The rows as a Markdown page: supported classes, reasons for those not supported, and all supported names."""
    rows = list(rows)
    supported = [r for r in rows if r.supported]
    parts = [f"{len(supported)} of {len(rows)} names can be reduced.", "## Supported", _classes(supported)]
    if len(supported) < len(rows):
        parts += ["## Not supported", _reasons([r for r in rows if not r.supported])]
    if any(r.reason for r in supported):
        parts += ["## Supported in part", _reasons([r for r in supported if r.reason])]
    names = ", ".join(f"`{r.name}`" for r in supported)
    return (
        "\n\n".join([*parts, f"<details><summary>All {len(supported)} names</summary>\n\n{names}\n\n</details>"]) + "\n"
    )


def _classes(rows: list[SupportRow]) -> str:
    """A table with one line per class and kind of tower, without depths, which differ between model sizes."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in rows:
        kinds[r.architecture, "; ".join(_without_depth(tower) for tower in r.towers)].append(r.name)
    lines = [[f"`{c}`", towers, str(len(names)), f"`{names[0]}`"] for (c, towers), names in kinds.items()]
    return _table(["class", "towers", "names", "for example"], sorted(lines, key=lambda line: (line[0], -int(line[2]))))


def _without_depth(tower: str) -> str:
    """The line of a tower without its number of blocks; any other line unchanged."""
    name, colon, text = tower.partition(": ")
    return f"{name}: {text.partition(' blocks ')[2]}" if colon else tower


def _reasons(rows: list[SupportRow]) -> str:
    """A table with one line per reason."""
    families: dict[str, Counter[str]] = defaultdict(Counter)
    for r in rows:
        families[r.reason][r.architecture] += 1
    lines = [
        [reason, ", ".join(f"{c} {n}" for c, n in classes.most_common()), str(classes.total())]
        for reason, classes in sorted(families.items(), key=lambda item: -item[1].total())
    ]
    return _table(["reason", "classes and how many names each", "names"], lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])
