"""What the adapters share: ways of single tokens into a joint space, rotary tables, rows for their support_matrix().

No host is imported here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossget.core.adapters import Tower
from crossget.core.block_class import Wrapped
from crossget.core.state import TokenState


def project(norm: nn.Module | None, owner: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """Cross tokens [N, C] into the joint space [N, E], without gradient for the parameters on the way.

    Args:
        norm: what a token goes through first.
        owner: whose attribute the projection is.
        name: of the attribute: a module, a matrix [C, E], or None.
        tokens: [N, C].
    """
    tokens = tokens if norm is None else frozen(norm, tokens)
    projection = getattr(owner, name)
    if isinstance(projection, nn.Module):
        return frozen(projection, tokens)
    return tokens if projection is None else tokens @ projection.detach()


def embed(norms: Sequence[nn.Module], owner: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """Tokens [.., C] behind the last block in the joint space [.., E], as the host takes the one that it pools there.

    Args:
        norms: what a token goes through first.
        owner: whose attribute the projection is.
        name: of the attribute, as in `project`.
        tokens: [.., C].
    """
    for norm in norms:
        tokens = norm(tokens)
    projection = getattr(owner, name)
    if isinstance(projection, nn.Module):
        return torch.as_tensor(projection(tokens))
    return tokens if projection is None else tokens @ projection


def is_of(host: str, module: nn.Module) -> bool:
    """Whether a module runs its host's own code: its class is the host's, and no method is replaced on the instance.

    Args:
        host: the top-level package.
        module: of that host, or of a subclass.
    """
    cls = type(module)
    if cls.__module__.split(".")[0] != host:
        return False
    if torch.compiler.is_compiling():  # Dynamo follows no loop over a module's attributes
        return True
    attributes = ((name, value) for name, value in vars(module).items() if callable(value))
    return not any(callable(getattr(cls, name, None)) and not isinstance(value, Wrapped) for name, value in attributes)


def frozen(module: nn.Module, tokens: Tensor) -> Tensor:
    """A module's output, without gradient for its parameters."""
    out: Tensor = _Frozen.apply(tokens, module)
    return out


class _Frozen(torch.autograd.Function):
    """A module with a backward for its input alone.

    The module is called as it is, parameters and hooks included: sharded parameters (ZeRO-3) are whole only then, and
    detached copies of them would be copies of nothing.
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


def rows_left(table: Tensor, last: Tensor, state: TokenState) -> Tensor:
    """The rows of a rotary table [B, H, N, D] for the tokens that are left: a merged one keeps its destination's.

    The table's rows are those of the last N tokens; those in front of them are not rotated.

    Args:
        table: [B or 1, H or 1, N, D].
        last: [B or 1, H or 1, 1, D] row of the cross token.
        state: where the tokens were in the beginning.
    """
    skipped = state.length - int(table.shape[2])
    if state.has_cross_token:
        table = torch.cat([table, last], 2)
    rows = (state.positions[:, skipped:] - skipped)[:, None, :, None]
    table = table.expand(rows.shape[0], -1, -1, -1)
    return table.gather(2, rows.expand(-1, table.shape[1], -1, table.shape[3]))


@dataclass(frozen=True)
class SupportRow:
    """One model of a host, by the name under which the host builds it.

    Attributes:
        name: as in the host's own list of models.
        architecture: the model's class.
        supported: it has a tower that can be reduced.
        towers: one line each, "visual: 12 blocks (Block), prefix 1, class token".
        reason: why it is not supported, or which of its towers is not and why; empty if all of it is.
    """

    name: str
    architecture: str
    supported: bool
    towers: tuple[str, ...] = ()
    reason: str = ""


def support_row(name: str, model: nn.Module, towers: Sequence[Tower], reason: str = "") -> SupportRow:
    """The row of a model with these towers, or with none for this reason."""
    return SupportRow(name, type(model).__name__, bool(towers), tuple(map(str, towers)), "" if towers else reason)


class NumbersOnCPU(TorchFunctionMode):
    """For building models on the meta device: ranges keep their values.

    Older versions of timm read rates and sizes out of them while they build.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func in (torch.linspace, torch.arange) else kwargs))


def markdown(rows: Iterable[SupportRow]) -> str:
    """The matrix as a page's text: supported classes, what is not supported and why, and every supported name."""
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
    """One line for each class and kind of tower; depths are left out, as they differ between sizes."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in rows:
        kinds[r.architecture, "; ".join(_without_depth(tower) for tower in r.towers)].append(r.name)
    lines = [[f"`{c}`", towers, str(len(names)), f"`{names[0]}`"] for (c, towers), names in kinds.items()]
    return _table(["class", "towers", "names", "for example"], sorted(lines, key=lambda line: (line[0], -int(line[2]))))


def _without_depth(tower: str) -> str:
    name, _, text = tower.partition(": ")
    return f"{name}: {text.partition(' blocks ')[2]}"


def _reasons(rows: list[SupportRow]) -> str:
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
