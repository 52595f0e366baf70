"""The data that the blocks of a tower share in one forward.

- `Forward` holds what is constant during the forward.
- `TokenState` holds what changes when tokens are merged. It is immutable: a block that is recomputed by gradient
  checkpointing starts from the same state as the first time.
- `ForwardRecord` holds what the user can read after the forward.

The host is the library model, and its code. Its sequence has T0 tokens, without a cross token. The full grid is a
sequence of T0 tokens, one for every input position: each gets the token that its input token was merged into.

Shapes: B batch, T tokens of a block, T0 tokens of the host, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from crossget.core.watch import replaced_functions
from crossget.methods.indexing import sequence_numbers, size_of, take
from crossget.methods.matching import MergePlan, shares
from crossget.methods.merging import unmerge
from crossget.methods.reducers import Joining, Reducer

OutputForm = Literal["tokens", "without_cross_token", "grid"]
"""What a block returns to the host: all its tokens; these without the cross token; or the full grid [B, T0, C]."""


@dataclass(frozen=True)
class BlockRecord:
    """What one block did to the tokens in a recorded forward. No tensor has a gradient.

    T is the number of tokens before the block, T' the number after it, and T0 that of the host's sequence, without a
    cross token.

    Attributes:
        source: [B, T0] for each input token, the index among the T' tokens of the one that it was merged into; -1 if it
            was dropped.
        sizes: [B, T'] float32, the number of input tokens that each token stands for.
        weights: [B, T0] float32, the weight of each input token in the token that it was merged into, over all blocks
            so far; 0 for a dropped token. With the ensembles "size" and "normalized" the weights of the members of a
            token sum to one. None if an ensemble does not set its weights in the `MergePlan`.
        score: [B, T] the importance scores that the reducer used; None if it used none, or removed no token.
        features: [B, T', C] the tokens after the block. The cross token is the last one, if there is one.
    """

    source: Tensor
    sizes: Tensor
    weights: Tensor | None
    score: Tensor | None
    features: Tensor


class ForwardRecord:
    """What the user can read about one forward through one tower.

    Attributes:
        tokens: layer -> number of tokens before the block.
        cross_tokens: layer -> [B, C] the cross token before the block, with its autograd graph.
        source: [B, T0] see `BlockRecord`, after the last block that has run.
        blocks: layer -> what its block did; None in a forward that is not recorded.
        class_token_only: the last block computed one token only, see `Reducer.class_token_only`.
    """

    # Not a dataclass: some versions of Dynamo cannot trace default factories.
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.cross_tokens: dict[int, Tensor] = {}
        self.source: Tensor | None = None
        self.blocks: dict[int, BlockRecord] | None = None
        self.class_token_only = False


class HostOutputs(NamedTuple):
    """What the blocks of a tower return to the host in one forward.

    Attributes:
        between: what every block but the last returns.
        after_last: what the last block returns.
        last_used: the last block (counted from 0) whose output the host uses. Later blocks need not be computed.
        class_token_only: the host uses only one token of the last block's output.
    """

    between: OutputForm
    after_last: OutputForm
    last_used: int
    class_token_only: bool = False


class Forward:
    """What is constant in one forward through one tower. All blocks share it. Only the record in it changes.

    Attributes:
        owner: the `AttachedTower`.
        reducer: the method, with all fields resolved. It stays the same if the user sets another one meanwhile.
        depth: number of blocks of the tower.
        length: T0, the number of tokens of the host's sequence, without a cross token.
        has_cross_token: a cross token is appended, as the last token.
        prefix: number of leading tokens that are protected.
        fixed: positions of other tokens that are protected, from 0.
        n_protected: the largest number of protected tokens in a row.
        causal: a token attends to itself and earlier tokens only.
        class_token: the first token is a class token, and the cross token starts as its copy.
        padding: a mask of the attention may hide padding.
        outputs: what the blocks return to the host.
        replaced: see `crossget.core.watch.replaced_functions`.
        record: what the user can read after the forward.
    """

    def __init__(
        self, owner: Any, reducer: Reducer, depth: int, length: int, *, prefix: int, causal: bool, class_token: bool,
        padding: bool, has_end: bool, outputs: HostOutputs,
        fixed: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.owner, self.reducer, self.depth, self.length = owner, reducer, depth, length
        self.has_cross_token = bool(reducer.cross_token)
        self.prefix, self.causal, self.class_token, self.padding = prefix, causal, class_token, padding
        self.fixed = tuple(position % length for position in fixed)
        self.n_protected = prefix + len(self.fixed) + int(self.has_cross_token) + int(has_end)
        self.outputs = outputs
        self.replaced = replaced_functions()
        self.record = ForwardRecord()


@dataclass(frozen=True)
class TokenState:
    """The state of the tokens at one point of a forward. T0' is T0, plus one with a cross token.

    Attributes:
        forward: what is constant in the forward.
        positions: [B, T] the input position of each token; a merged token has that of its destination.
        source: [B, T0'] for each input token, the index of the token that it was merged into; -1 if it was dropped.
        protected: [B, T] true for tokens that must not be merged or dropped.
        valid: [B, T] false for padding; None: there is no padding, or it is not known yet.
        end: [B] index of the end-of-text token; None: the tower has none.
        sizes: [B, T] float32, the number of input tokens that each token stands for; None: all are 1.
        norms: [B, T] float32, see `crossget.methods.merging.norm_correction`; None: all are 1, or it is switched off.
        weights: [B, T0'] see `BlockRecord`; None: the forward is not recorded, or an ensemble does not set them.
        has_dropped: a block has dropped tokens.
        reduced: a block has removed tokens.
        numbers: `crossget.methods.indexing.sequence_numbers` of the batch; None for a batch of one, which needs none.
    """

    forward: Forward
    positions: Tensor
    source: Tensor
    protected: Tensor
    valid: Tensor | None = None
    end: Tensor | None = None
    sizes: Tensor | None = None
    norms: Tensor | None = None
    weights: Tensor | None = None
    has_dropped: bool = False
    reduced: bool = False
    numbers: Tensor | None = None

    @staticmethod
    def start(
        forward: Forward, batch: int, device: torch.device, *, end: Tensor | None = None, valid: Tensor | None = None
    ) -> TokenState:
        """The state before the first block.

        Args:
            forward: what is constant in the forward.
            batch: B.
            device: the device of the tokens.
            end: [B] index of the end-of-text token, which is protected; None: the tower has none.
            valid: [B, T0] false for padding; None: there is no padding, or it is not known yet.
        """
        total = forward.length + int(forward.has_cross_token)
        order = torch.arange(total, device=device)
        positions = order.expand(batch, total)
        protected = ((order < forward.prefix) | (order >= forward.length)).expand(batch, total)
        for position in forward.fixed:
            protected = protected | (order == position)
        if end is not None:
            protected = protected | (order == end[:, None])
        if valid is not None and forward.has_cross_token:
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        weights = None if forward.record.blocks is None else torch.ones_like(positions, dtype=torch.float32)
        numbers = None if batch == 1 else sequence_numbers(batch, device)
        return TokenState(forward, positions, positions, protected, valid, end, weights=weights, numbers=numbers)

    def as_reduced(self) -> TokenState:
        """The state of the start, in the form that it has behind a reduction: sizes and norms of 1 are tensors.

        If the method may drop tokens, some may be missing.

        Compiled code of a block distinguishes None from a tensor, strides of 0 from others, and views from others. So
        one graph runs the first block and the others.
        """

        def copied(x: Tensor) -> Tensor:
            return x.clone(memory_format=torch.contiguous_format)

        ones = torch.ones(self.positions.shape, device=self.positions.device)
        return replace(
            self, positions=copied(self.positions), source=copied(self.source), protected=copied(self.protected),
            sizes=ones, norms=ones.clone() if self.forward.reducer.norm_correction else None, reduced=True,
            valid=None if self.valid is None else copied(self.valid),
            end=None if self.end is None else copied(self.end[:, None]).squeeze(1),
            has_dropped=not isinstance(self.forward.reducer, Joining),
        )  # fmt: skip

    @property
    def length(self) -> int:
        """T0, the number of tokens of the host's sequence."""
        return self.forward.length

    @property
    def has_cross_token(self) -> bool:
        """Whether a cross token is appended, as the last token."""
        return self.forward.has_cross_token

    @property
    def prefix(self) -> int | None:
        """`View.prefix`: the protected tokens are the prefix and the cross token; None: they may be others."""
        forward = self.forward
        return forward.prefix if self.valid is None and self.end is None and not forward.fixed else None

    @property
    def unmodified(self) -> bool:
        """Whether the tokens are exactly the host's sequence."""
        return not self.reduced and not self.forward.has_cross_token

    def with_padding(self, valid: Tensor) -> TokenState:
        """The same state, with `valid` [B, T]: false for padding."""
        return TokenState(
            self.forward, self.positions, self.source, self.protected, valid, self.end, self.sizes, self.norms,
            self.weights, self.has_dropped, self.reduced, self.numbers,
        )  # fmt: skip

    def advance(self, plan: MergePlan, sizes: Tensor | None, norms: Tensor | None = None) -> TokenState:
        """The state after a reduction to T' tokens.

        Args:
            plan: which tokens were removed, and what they were merged into.
            sizes: [B, T'] the new sizes; None: all are 1.
            norms: [B, T'] the new norms; None: all are 1, or norm correction is switched off.
        """
        index = self.source.clamp(min=0) if self.has_dropped else self.source
        source = plan.index.gather(1, index)
        share = None if self.weights is None else shares(plan)
        # Without a cross token behind them, the protected tokens stay where they are. A view made in a graph is another
        # kind of input for the graph of the next block.
        stay = self.prefix is not None and not self.has_cross_token and not torch.compiler.is_compiling()
        n_kept = size_of(plan.kept, 1)
        return TokenState(
            self.forward,
            positions=self.positions.gather(1, plan.kept),
            source=torch.where(self.source < 0, self.source, source) if self.has_dropped else source,
            protected=self.protected[:, :n_kept] if stay else self.protected.gather(1, plan.kept),
            valid=None if self.valid is None else self.valid.gather(1, plan.kept),
            end=None if self.end is None else plan.index.gather(1, self.end[:, None]).squeeze(1),
            sizes=sizes,
            norms=norms,
            weights=None if self.weights is None or share is None else self.weights * share.gather(1, index),
            has_dropped=self.has_dropped or plan.destination is None or plan.dropped is not None,
            reduced=True,
            numbers=self.numbers,
        )

    def to(self, device: torch.device) -> TokenState:
        """The same state on another device."""
        if self.positions.device == device:
            return self

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return TokenState(
            self.forward, self.positions.to(device), self.source.to(device), self.protected.to(device),
            moved(self.valid), moved(self.end), moved(self.sizes), moved(self.norms), moved(self.weights),
            self.has_dropped, self.reduced, moved(self.numbers),
        )  # fmt: skip

    def block_record(self, tokens: Tensor, score: Tensor | None) -> BlockRecord:
        """The record of the block that this is the state after.

        Args:
            tokens: [B, T', C] the tokens after the block.
            score: [B, T] see `BlockRecord`.
        """
        length = self.forward.length
        sizes = torch.ones_like(self.positions, dtype=torch.float32) if self.sizes is None else self.sizes
        weights = None if self.weights is None else self.weights[:, :length]
        # A copy of the tokens: the next block temporarily overwrites the cross token in them.
        return BlockRecord(self.source[:, :length], sizes, weights, score, tokens.detach().clone())

    def full_grid(self, tokens: Tensor) -> Tensor:
        """[B, T0, C] one token for every input position, from reduced tokens [B, T, C].

        The cross token is left out. A dropped token is replaced by the mean of the remaining tokens after the prefix,
        without padding.
        """
        has_cross_token, length = self.forward.has_cross_token, self.forward.length
        if not self.reduced:
            return tokens[:, :length] if has_cross_token else tokens
        source = self.source[:, :length]
        if not self.has_dropped:
            return take(tokens, source, self.numbers)
        part = slice(self.forward.prefix, size_of(tokens, 1) - int(has_cross_token))
        if self.valid is None:
            return unmerge(tokens, source, tokens[:, part].mean(1, keepdim=True))
        real = self.valid[:, part, None].to(tokens.dtype)
        mean = (tokens[:, part] * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return unmerge(tokens, source, mean)


def token_at(tokens: Tensor, position: Tensor | None) -> Tensor:
    """[B, 1, C] the token of each row at `position` [B]; None: the first token."""
    if position is None:
        return tokens[:, :1]
    return tokens.gather(1, position[:, None, None].expand(-1, 1, tokens.shape[2]))


def replace_token(tokens: Tensor, token: Tensor, position: Tensor | None) -> Tensor:
    """[B, T, C] a copy of `tokens` with `token` [B, 1, C] at `position` [B]; None: at the first position."""
    if position is None:
        return torch.cat([token, tokens[:, 1:]], 1)
    return tokens.scatter(1, position[:, None, None].expand(-1, 1, tokens.shape[2]), token)
