"""The layouts in which the blocks of a tower get their tokens: [B, T, C], [T, B, C], or all images in one sequence.

Reduction methods, states and records work on [B, T, C]. A `Layout` converts at the block's input, at its residual and
at its output. `Tower.layout` names the one of a tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from crossget.core.reduction import Merge
from crossget.core.state import TokenState
from crossget.core.tables import TableOperands
from crossget.core.watch import GET_ITEM
from crossget.methods.indexing import size_of


@dataclass(frozen=True)
class BatchFirst:
    """The layout [B, T, C]. The other layouts are subclasses.

    Attributes:
        axes: the names of the axes.
    """

    axes: ClassVar[str] = "BTC"

    @property
    def merge(self) -> type[Merge]:
        """The class that reduces a block of this layout."""
        return Merge

    def batch(self, tokens: Tensor, arguments: Iterable[Any]) -> int:
        """B, from the first block's input and its other arguments.

        Raises:
            RuntimeError: it cannot be told.
        """
        return tokens.shape[0]

    def to_batch(self, tokens: Tensor, batch: int) -> Tensor:
        """[B, T, C] from a tensor of this layout, with B = `batch`."""
        return tokens

    def from_batch(self, tokens: Tensor) -> Tensor:
        """A tensor of this layout, from [B, T, C]."""
        return tokens

    def fit_argument(self, name: str, value: Any, state: TokenState) -> Any:
        """An argument of the block that depends on the layout, for the remaining tokens."""
        return value


@dataclass(frozen=True)
class TokensFirst(BatchFirst):
    """The layout [T, B, C], as of `nn.TransformerEncoder` with batch_first=False."""

    axes = "TBC"

    @property
    def merge(self) -> type[Merge]:
        return TokensFirstMerge

    def batch(self, tokens: Tensor, arguments: Iterable[Any]) -> int:
        return tokens.shape[1]

    def to_batch(self, tokens: Tensor, batch: int) -> Tensor:
        return tokens.transpose(0, 1)

    def from_batch(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Packed(BatchFirst):
    """The layout [N, C], N = B * T: the images of a batch, all of one size, in one sequence.

    The block gets the cumulative lengths of the images, and attends within each.
    """

    axes = "NC"

    @property
    def merge(self) -> type[Merge]:
        return PackedMerge

    def batch(self, tokens: Tensor, arguments: Iterable[Any]) -> int:
        lengths = packed_lengths(tokens, arguments)
        if lengths is None or len(set(lengths)) != 1:
            raise RuntimeError(
                f"a packed sequence of {tokens.shape[0]} tokens has images of {lengths or 'unknown'} tokens: expected "
                "images of one size, with their cumulative lengths among the arguments of the block. Give images of "
                "one size, or detach"
            )
        return len(lengths)

    def to_batch(self, tokens: Tensor, batch: int) -> Tensor:
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def from_batch(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 1)

    def fit_argument(self, name: str, value: Any, state: TokenState) -> Any:
        batch, remaining = (int(n) for n in state.positions.shape)

        def fit(part: Tensor) -> Tensor:
            if is_cumulative(part, batch * state.length) and len(part) == batch + 1:
                return torch.arange(batch + 1, device=part.device, dtype=part.dtype) * remaining
            if part.dim() == 0 or part.shape[0] != batch * state.length:
                return part
            rows = part.reshape(batch, state.length, -1)  # one row per token of the batch, as rotary tables have
            if state.has_cross_token:  # no row is known for it: it gets that of the token in the middle
                rows = torch.cat([rows, rows[:, state.length // 2][:, None]], 1)
            index = state.positions[:, :, None].expand(-1, -1, rows.shape[2])
            return rows.gather(1, index).reshape(batch * remaining, *part.shape[1:])

        if isinstance(value, int) and name.startswith("max_"):  # the number of tokens of the longest image
            return remaining
        return tree_map_only(Tensor, fit, value)


@dataclass(frozen=True)
class Appending(BatchFirst):
    """The layout [B, T, C] of blocks that append tokens of their own, attend over all, and cut them off again."""

    @property
    def merge(self) -> type[Merge]:
        return AppendingMerge


BATCH_FIRST, TOKENS_FIRST, PACKED, APPENDING = BatchFirst(), TokensFirst(), Packed(), Appending()


def packed_lengths(tokens: Tensor, arguments: Iterable[Any]) -> list[int] | None:
    """The number of tokens of each image of a packed sequence [N, C]; None: no argument tells.

    Args:
        tokens: [N, C].
        arguments: of the block. One of them is [images + 1] cumulative lengths, from 0 to N.
    """
    for part in tree_leaves(list(arguments)):
        if isinstance(part, Tensor) and is_cumulative(part, int(tokens.shape[0])):
            return [int(length) for length in part.diff()]
    return None


def is_cumulative(part: Tensor, total: int) -> bool:
    """Whether a tensor holds the cumulative lengths of images with `total` tokens in all."""
    if part.dim() != 1 or part.is_floating_point() or part.dtype == torch.bool or len(part) < 2 or part.is_meta:
        return False
    return int(part[0]) == 0 and int(part[-1]) == total


def with_tables(merge: type[Merge]) -> type[Merge]:
    """The class that also selects rows of the tables that a block makes inside."""
    if merge not in _WITH_TABLES:
        _WITH_TABLES[merge] = type(f"{merge.__name__}WithTables", (TableOperands, merge), {})
    return _WITH_TABLES[merge]


_WITH_TABLES: dict[type[Merge], type[Merge]] = {}


class TokensFirstMerge(Merge):
    """Reduces the tokens of a block that gets [T, B, C]."""

    @staticmethod
    def sizes(tokens: Tensor, state: TokenState) -> tuple[int, int]:
        return tokens.shape[1], tokens.shape[0]

    def is_sequence(self, x: Tensor) -> bool:
        return x.dim() == 3 and x.shape[0] == self.tokens and x.shape[1] == self.batch

    def to_batch(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def from_batch(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()  # blocks may use .view()


class AppendingMerge(Merge):
    """Reduces the tokens of a block that appends tokens of its own, [B, T + N, C], until after its attention."""

    def __init__(self, tokens: Tensor, state: TokenState, r: int) -> None:
        super().__init__(tokens, state, r)
        self._own, self._appended = self.tokens, 0  # T and N
        self._total: Tensor | None = None  # the reduced tokens with the appended ones

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and not self.attention_seen and not self._appended:
            out: Tensor = super().__torch_function__(func, types, args, kwargs)
            if self._is_longer(args[0], out):
                self._appended = size_of(out, 1) - self._own
                self.tokens, self.residual_inputs = size_of(out, 1), [out]
            return out
        if self.known(func) in GET_ITEM and self._total is not None and args[0] is self._total:
            own = self._total[self._cut(args[1])]
            self._mlp_residual = None if self.state.norms is None else own
            return own
        return super().__torch_function__(func, types, args, kwargs)

    def _is_longer(self, parts: Any, out: Tensor) -> bool:
        """Whether a concatenation is the block's input with tokens behind it."""
        is_first = len(parts) == 2 and any(parts[0] is one for one in self.residual_inputs)
        return is_first and out.dim() == 3 and size_of(out, 1) > self._own and out.shape[2] == parts[0].shape[2]

    def _cut(self, index: Any) -> Any:
        """The index of the block's own tokens, `[:, :T]`, for the remaining ones; any other index unchanged."""
        if isinstance(index, tuple) and len(index) > 1 and index[1] == slice(None, self._own):
            return (index[0], slice(None, size_of(self.state.positions, 1)), *index[2:])
        return index

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = super().key_bias(dtype)
        return bias if bias is None else F.pad(bias, (0, self._appended))

    def scale_values(self, values: Tensor) -> Tensor:
        if self.state.norms is None:
            return values
        norms = F.pad(self.state.norms, (0, self._appended), value=1.0).to(values.dtype)
        return (self.by_head(values) * norms[:, None, :, None]).reshape(values.shape)

    def on_queries_and_keys(self, queries: Tensor, keys: Tensor) -> None:
        super().on_queries_and_keys(queries[:, :, : self._own], keys[:, :, : self._own])

    def reduce_tokens(self, total: Tensor) -> Tensor:
        self._received = [received[:, : self._own] for received in self._received]
        tokens = super().reduce_tokens(total[:, : self._own])
        if size_of(tokens, 1) == self._own:
            return total
        self._total = torch.cat([tokens, total[:, self._own :]], 1)
        return self._total


class PackedMerge(Merge):
    """Reduces the tokens of a block that gets [N, C] and attends image by image."""

    def __init__(self, tokens: Tensor, state: TokenState, r: int) -> None:
        super().__init__(tokens, state, r)
        # Images whose attention has got its key bias, its values, its queries and keys.
        self._n_biased = self._n_scaled = 0
        self._parts: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def sizes(tokens: Tensor, state: TokenState) -> tuple[int, int]:
        batch = state.positions.shape[0]
        return batch, tokens.shape[0] // batch

    def is_sequence(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.shape[0] == self.batch * self.tokens

    def to_batch(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, -1, x.shape[-1])

    def from_batch(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    # The attention is called once per image: [1, H, T, D].

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        bias, image = super().key_bias(dtype), self._n_biased
        self._n_biased += 1
        return bias if bias is None else bias[image : image + 1]

    def scale_values(self, values: Tensor) -> Tensor:
        image = self._n_scaled
        self._n_scaled += 1
        if self.state.norms is None:
            return values
        return values * self.state.norms[image, :, None].to(values.dtype)

    def on_queries_and_keys(self, queries: Tensor, keys: Tensor) -> None:
        if queries.shape[0] != 1 or len(self._parts) >= self.batch:
            raise RuntimeError(
                f"the attention of a packed sequence got queries {list(queries.shape)}: expected one call for each of "
                f"the {self.batch} images, [1, H, {self.tokens}, D]"
            )
        self._parts.append((queries, keys))
        if len(self._parts) == self.batch:
            whole = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
            super().on_queries_and_keys(*whole)

    def on_received(self, received: Tensor) -> None:
        super().on_received(received)
        if len(self._received) == self.batch > 1:
            self._received = [torch.cat(self._received)]

    def by_head(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x[None]
