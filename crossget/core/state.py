"""What travels with the tokens from block to block: sizes, where they came from, which are protected.

The state is an attribute of the very tensor that the host passes on. Nothing is kept on modules between blocks, so
gradient checkpointing, threads, copies and interrupted forwards need no care and no reset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods.matching import MergePlan, shares
from crossget.methods.merging import unmerge

_ATTRIBUTE = "_crossget_state"


@dataclass(frozen=True)
class BlockRecord:
    """What one block did to the tokens, for one forward that was recorded. Nothing in it has a gradient.

    T tokens entered the block and T' left it; T0 is the host's own number of tokens, without cross token.

    Attributes:
        source: [B, T0] the token behind the block that each input token is in; -1 if it was dropped.
        sizes: [B, T'] float32 how many input tokens each token behind the block stands for.
        weights: [B, T0] float32 how much of each input token is in the token it is in, as the blocks so far have joined
            them; 0 for one that was dropped. With "size" and "normalized" those of a group add up to one. None where an
            ensemble does not tell.
        score: [B, T] the importance of the tokens that entered, as the reducer saw it; None where it asked for none, or
            removed nothing.
        features: [B, T', C] the tokens behind the block, the cross token last if there is one.
    """

    source: Tensor
    sizes: Tensor
    weights: Tensor | None
    score: Tensor | None
    features: Tensor


@dataclass(frozen=True)
class Relevance:
    """How near tokens are to what the user looks for.

    Attributes:
        embed: tokens [B, T, C] in the space of texts: [B, T, E].
        target: [B or 1, E] of unit length.
    """

    embed: Callable[[Tensor], Tensor]
    target: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T] cosines of tokens [B, T, C] with the target."""
        return (F.normalize(self.embed(tokens).float(), dim=-1) * self.target[:, None].to(tokens.device)).sum(-1)


class Record:
    """What one forward through one tower leaves behind for its user to look at.

    Attributes:
        tokens: layer -> how many tokens entered the block.
        cross_tokens: layer -> [B, C] the cross token as it entered the block, with its graph.
        source: [B, T0] output token of each input token.
        steps: layer -> what its block did; None in a forward that is not recorded.
        read_one: of the last block one token alone was read, and nothing merged there, see `Reducer.class_token_only`.
    """

    def __init__(self) -> None:
        self.steps: dict[int, BlockRecord] | None = None
        self.tokens: dict[int, int] = {}
        self.cross_tokens: dict[int, Tensor] = {}
        self.source: Tensor | None = None
        self.read_one = False


class TokenState:
    """The tokens' history in one forward. Never changed in place, except by the block that made it.

    Attributes:
        length: T0, the host's own number of tokens, without cross token.
        cross: a cross token stands at the end.
        prefix: leading protected tokens.
        sizes: [B, T] float32, None while all are one.
        norm_correction: [B, T] float32, see `crossget.methods.merging.norm_correction`; None while all are one, or nobody asks.
        positions: [B, T] the input position of each token (a merged token keeps that of its destination).
        source: [B, T0 + cross] the current token of each input token, -1 if dropped.
        protected: [B, T] bool.
        n_protected: protected tokens in a row, at most.
        valid: [B, T] false for padding, or None.
        end: [B] current position of the end of text, or None.
        weights: [B, T0 + cross] see `BlockRecord`; None unless the forward is recorded.
        dropped: some token may have been dropped.
        changed: tokens were removed since the first block.
        reading: what the host reads of the tower's blocks in this forward; None: only the last one's output.
        relevance: [B, T, C] tokens -> [B, T] cosines with what the user looks for; None: with nothing.
        compact: the reduced tokens, where the tensor that carries this state shows the full grid; else None.
        record: what the user will see.
    """

    def __init__(self, length: int, cross: bool, prefix: int, record: Record) -> None:
        self.length, self.cross, self.prefix, self.record = length, cross, prefix, record
        self.sizes: Tensor | None = None
        self.norm_correction: Tensor | None = None
        self.positions: Tensor
        self.source: Tensor
        self.protected: Tensor
        self.n_protected = 0
        self.valid: Tensor | None = None
        self.end: Tensor | None = None
        self.weights: Tensor | None = None
        self.dropped = False
        self.changed = False
        self.reading: Any = None
        self.relevance: Relevance | None = None
        self.compact: Tensor | None = None

    @classmethod
    def start(
        cls, batch: int, length: int, device: torch.device, *, cross: bool, prefix: int, end: Tensor | None,
        valid: Tensor | None,
    ) -> TokenState:  # fmt: skip
        """The state in front of the first block.

        Args:
            batch: B.
            length: T0.
            device: where the tokens are.
            cross: a cross token is appended.
            prefix: leading tokens to protect.
            end: [B] position of the end of text, protected too.
            valid: [B, T0] false for padding.
        """
        self = cls(length, cross, prefix, Record())
        total = length + int(cross)
        order = torch.arange(total, device=device)
        self.positions = self.source = order.expand(batch, total)
        fixed = (order < prefix) | (order >= length)
        self.protected = fixed.expand(batch, total)
        self.n_protected = prefix + int(cross)
        if end is not None:
            self.protected = self.protected | (order == end[:, None])
            self.n_protected += 1
            self.end = end
        self.valid = valid
        if valid is not None and cross:
            self.valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        return self

    @property
    def pristine(self) -> bool:
        """The tokens are still exactly the host's."""
        return not self.changed and not self.cross

    def advance(self, plan: MergePlan, sizes: Tensor | None, norm_correction: Tensor | None = None) -> TokenState:
        """The state behind a reduction."""
        new = TokenState(self.length, self.cross, self.prefix, self.record)
        new.sizes, new.norm_correction = sizes, norm_correction
        new.positions = self.positions.gather(1, plan.kept)
        source = self.source.clamp(min=0) if self.dropped else self.source
        new.source = plan.index.gather(1, source)
        new.dropped = self.dropped or plan.destination is None
        if self.dropped:
            new.source = torch.where(self.source < 0, self.source, new.source)
        if self.weights is not None:
            share = shares(plan)
            new.weights = None if share is None else self.weights * share.gather(1, source)
        new.protected = self.protected.gather(1, plan.kept)
        new.n_protected = self.n_protected
        new.valid = None if self.valid is None else self.valid.gather(1, plan.kept)
        new.end = None if self.end is None else plan.index.gather(1, self.end[:, None]).squeeze(1)
        new.changed = True
        new.reading, new.relevance = self.reading, self.relevance
        return new

    def note_step(self, layer: int, tokens: Tensor, score: Tensor | None) -> None:
        """Put into the record what block `layer` did, if the forward is recorded.

        Args:
            layer: of the block, which this is the state behind.
            tokens: [B, T', C] that leave it.
            score: [B, T] see `BlockRecord`.
        """
        if self.record.steps is None:
            return
        sizes = torch.ones_like(self.positions, dtype=torch.float32) if self.sizes is None else self.sizes
        weights = None if self.weights is None else self.weights[:, : self.length]
        # A copy of the tokens: the next block writes another cross token among them while it runs.
        step = BlockRecord(self.source[:, : self.length], sizes, weights, score, tokens.detach().clone())
        self.record.steps[layer] = step

    def restored(self, tokens: Tensor) -> Tensor:
        """Reduced tokens [B, T, C] on the host's grid [B, T0, C], without the cross token."""
        source = self.source[:, : self.length]
        if not self.changed:
            return tokens[:, : self.length] if self.cross else tokens
        if not self.dropped:
            return unmerge(tokens, source)
        last = int(tokens.shape[1]) - int(self.cross)
        return unmerge(tokens, source, tokens[:, self.prefix : last].mean(1, keepdim=True))


def token_at(tokens: Tensor, position: Tensor | None) -> Tensor:
    """[B, 1, C] the token of each row at `position` [B]; None: the first one."""
    if position is None:
        return tokens[:, :1]
    return tokens.gather(1, position[:, None, None].expand(-1, 1, tokens.shape[2]))


def with_token(tokens: Tensor, token: Tensor, position: Tensor | None) -> Tensor:
    """[B, T, C] the tokens with another one [B, 1, C] at `position` [B]; None: in front."""
    if position is None:
        return torch.cat([token, tokens[:, 1:]], 1)
    return tokens.scatter(1, position[:, None, None].expand(-1, 1, tokens.shape[2]), token)


def carry(tokens: Tensor, state: Any) -> Tensor:
    """`tokens`, with the state on it."""
    setattr(tokens, _ATTRIBUTE, state)
    return tokens


def carried(tokens: Tensor) -> Any:
    """The state that `tokens` carry; None if they carry none."""
    return getattr(tokens, _ATTRIBUTE, None)
