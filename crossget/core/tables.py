"""Tables of the host with one row per token, such as rotary tables, for the remaining tokens.

A table is an argument of the block (`TableRows`), or the block makes it inside and combines it with its tokens
(`TableOperands`). In both cases it has rows for all T0 tokens of the host, or for those after the prefix. A merged
token has the row of its destination. The cross token's row does not rotate or shift it, where this can be told.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from crossget.core.reduction import Merge
from crossget.core.state import TokenState
from crossget.core.watch import ADD
from crossget.methods.indexing import size_of

TableLayout = Literal["b1n", "bn", "bn1", "hn"]
"""The axes that a table [N, ..] without a batch axis gets: [B, 1, N, ..], [B, N, ..] or [B, N, 1, ..].

"hn": a table [H, N, ..] has one part per head, and gets [B, H, N, ..].
"""

_COMBINE = (
    *ADD,
    torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.mul_,
    torch.Tensor.__imul__, torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.__rsub__,
    operator.mul, operator.imul, operator.sub,
)  # fmt: skip

_RESHAPE = (torch.Tensor.view, torch.Tensor.reshape)


def gather_rows(table: Tensor, axis: int, last: Tensor, state: TokenState) -> Tensor:
    """The rows of a table for the remaining tokens.

    Args:
        table: [1, B or a multiple of B, ..], with N rows on an axis, for the last N of the host's T0 tokens. A multiple
            of B has one part per image and head.
        axis: the axis of the rows.
        last: like `table` with one row, that of the cross token.
        state: of the tokens, of which T remain.

    Returns:
        [B or a multiple of B, ..] with T - (T0 - N) rows.
    """
    skipped = state.length - int(table.shape[axis])
    if state.has_cross_token:
        table = torch.cat([table, last], axis)
    rows = (state.positions[:, skipped:] - skipped).clamp(min=0)
    batch = rows.shape[0]
    if table.shape[0] not in (1, batch):
        rows = rows.repeat_interleave(table.shape[0] // batch, 0)
    table = table.expand(rows.shape[0], *table.shape[1:])
    shape = [rows.shape[0], *[1] * (table.dim() - 1)]
    shape[axis] = rows.shape[1]
    target = [*table.shape]
    target[axis] = rows.shape[1]
    return table.gather(axis, rows.reshape(shape).expand(target))


@dataclass(frozen=True)
class TableRows:
    """`Tower.fit_arguments` for tables among the arguments of a block, whatever their names.

    A table is a tensor with an axis of T0 rows, or of those after the prefix; arguments may hold it in tuples and
    dicts. A pair of tables is one of cosines and sines. Masks and biases, which have two such axes, are selected where
    the attention gets them.

    Attributes:
        layout: see `TableLayout`.
    """

    layout: TableLayout

    def __call__(self, block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
        """The argument for the remaining tokens."""
        if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            first, second = ("sin", "cos") if name.startswith("sin") else ("cos", "sin")
            pair = self._fit(first, value[0], state), self._fit(second, value[1], state)
            return list(pair) if isinstance(value, list) else pair
        return tree_map(lambda part: self._fit(name, part, state) if isinstance(part, Tensor) else part, value)

    def _fit(self, name: str, table: Tensor, state: TokenState) -> Tensor:
        axis = _table_axis(name, table, state)
        if axis is None:
            return table
        if axis == 1 and table.dim() > 2:
            if self.layout == "hn":
                table, axis = table[None], 2
            elif table.shape[0] == 1:
                table, axis = table[0], 0
        if axis == 0:
            table, axis = table[None], 1
            if self.layout == "b1n" and table.dim() > 2:
                table, axis = table[:, None], 2
            elif self.layout == "bn1":
                table = table.unsqueeze(2)
        row = table.narrow(axis, 0, 1)
        if table.is_complex() or "cos" in name:
            last = torch.ones_like(row)
        elif "sin" in name or not table.is_floating_point():
            last = torch.zeros_like(row)
        else:  # of an unknown kind: the row of the token in the middle
            last = table.narrow(axis, int(table.shape[axis]) // 2, 1)
        return gather_rows(table, axis, last, state)

    def tables(self, arguments: Iterable[tuple[str, Any]], state: TokenState) -> list[str]:
        """The names and shapes of the arguments that are tables."""
        leaves = [(name, part) for name, value in arguments for part in tree_leaves(value) if isinstance(part, Tensor)]
        return [f"{name} {list(part.shape)}" for name, part in leaves if _table_axis(name, part, state) is not None]


@dataclass(frozen=True)
class Positions:
    """`Tower.fit_arguments` for blocks that get the positions of their tokens [B, T] as an argument.

    Some blocks take their positions from the number of their tokens if this argument is None, as V-JEPA 2's do. The
    cross token has the position of the last token.

    Attributes:
        argument: its name.
    """

    argument: str

    def __call__(self, block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
        """The positions of the remaining tokens; other arguments unchanged."""
        return state.positions.clamp(max=state.length - 1) if name == self.argument else value


def _table_axis(name: str, table: Tensor, state: TokenState) -> int | None:
    """The axis of an argument that has one row per token; None: it is no table."""
    return None if "mask" in name or "bias" in name else row_axis(table, state.length, state.forward.prefix)


def row_axis(table: Tensor, length: int, prefix: int) -> int | None:
    """The axis of an argument that has one row per token, of T0 or of those after the prefix; None: there is none.

    The last axis is that of the channels, except in a tensor of integers [N] or [B, N] (position ids).
    """
    ids = not table.is_floating_point() and not table.is_complex() and table.dim() < 3
    axes = range(table.dim() if ids else max(table.dim() - 1, 1))
    for size in dict.fromkeys((length, length - prefix)):
        fitting = [axis for axis in axes if int(table.shape[axis]) == size]
        if size < 2 or not fitting:
            continue
        if fitting == [table.dim() - 2] and int(table.shape[-1]) == size:
            return None  # [.., N, N]: one value per pair of tokens
        return fitting[-1] if fitting[0] == 0 else fitting[0]
    return None


class TableOperands(Merge):
    """Selects rows of the tables that a block makes inside and adds to, or multiplies with, its reduced tokens.

    Such a table is the operand that has T0 rows (or those after the prefix), where the other one has T. If a block
    reshapes a table that it got for all images, [1, ..], the result has one part per image.

    Attributes:
        tables: arguments of the block for the remaining tokens, with one part per image.
    """

    def __init__(self, tokens: Tensor, state: TokenState, r: int) -> None:
        super().__init__(tokens, state, r)
        self.tables: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.known(func)
        if func in _COMBINE and len(args) == 2 and not self.state.unmodified and not self.attention_seen:
            args = self._operands(func, *args)
        if func in _RESHAPE and any(args[0] is table for table in self.tables):
            shape = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
            if shape[0] == 1 < self.batch:
                return args[0].reshape(self.batch, *shape[1:])
        return super().__torch_function__(func, types, args, kwargs)

    def _operands(self, func: Any, a: Any, b: Any) -> tuple[Any, Any]:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return a, b
        rank = max(a.dim(), b.dim())
        shapes = [[*[1] * (rank - x.dim()), *(size_of(x, dim) for dim in range(x.dim()))] for x in (a, b)]
        differ = [i for i in range(rank) if shapes[0][i] != shapes[1][i] and 1 not in (shapes[0][i], shapes[1][i])]
        if rank < 3 or len(differ) != 1 or differ[0] == 0:
            return a, b
        axis = differ[0]
        if self._has_all_rows(shapes[1][axis], shapes[0][axis]):
            return a, self._rows(b.reshape(shapes[1]), axis, shapes[0][0], func)
        if self._has_all_rows(shapes[0][axis], shapes[1][axis]):
            return self._rows(a.reshape(shapes[0]), axis, shapes[1][0], func), b
        return a, b

    def _has_all_rows(self, rows: int, remaining: int) -> bool:
        """Whether `rows` are of all the host's tokens, and `remaining` of the reduced ones, without the same prefix."""
        skipped = self.state.length - rows
        return 0 <= skipped <= self.state.forward.prefix and size_of(self.state.positions, 1) - remaining == skipped

    def _rows(self, table: Tensor, axis: int, leading: int, func: Any) -> Tensor:
        # Where the kind of table is not known, the cross token has the row of the token in the middle.
        row = table.narrow(axis, int(table.shape[axis]) // 2, 1)
        if table.shape[0] == 1 and leading != self.batch:
            table = table.expand(leading, *table.shape[1:])
            row = row.expand(leading, *row.shape[1:])
        return gather_rows(table, axis, torch.zeros_like(row) if func in ADD else row, self.state)
