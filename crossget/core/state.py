"""What the blocks of a tower know of their tokens in one forward.

`Forward` is what all blocks of one forward share. `TokenState` is what changes when tokens are merged; it is never
changed in place, so that a block which is computed again (gradient checkpointing) begins with what it began with.
`Record` is what a forward leaves behind for the user.

Shapes: B batch, T tokens that a block has, T0 tokens of the host, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods.indexing import size_of
from crossget.methods.matching import MergePlan, shares
from crossget.methods.merging import unmerge
from crossget.methods.reducers import Reducer

Visible = Literal["tokens", "without_cross_token", "grid"]
"""What the host sees behind a block: the reduced tokens; these without the cross token; or its own grid [B, T0, C]."""


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


class Record:
    """What one forward through one tower leaves behind for its user to look at.

    Attributes:
        tokens: layer -> how many tokens entered the block.
        cross_tokens: layer -> [B, C] the cross token as it entered the block, with its graph.
        source: [B, T0] output token of each input token.
        blocks: layer -> what its block did; None in a forward that is not recorded.
        class_token_only: the last block computed one token alone, see `Reducer.class_token_only`.
    """

    # No dataclass: not every Dynamo knows default factories.
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.cross_tokens: dict[int, Tensor] = {}
        self.source: Tensor | None = None
        self.blocks: dict[int, BlockRecord] | None = None
        self.class_token_only = False


@dataclass(frozen=True)
class Relevance:
    """How near tokens are to the text features that the user gave.

    Attributes:
        embed: tokens [B, T, C] -> [B, T, E] in the space of texts.
        target: [B or 1, E] of unit length.
    """

    embed: Callable[[Tensor], Tensor]
    target: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T] cosines of tokens [B, T, C] with the target."""
        return (F.normalize(self.embed(tokens).float(), dim=-1) * self.target[:, None].to(tokens.device)).sum(-1)


class Shown(NamedTuple):
    """What the host sees of a tower's blocks in one forward.

    Attributes:
        between: behind every block but the last.
        behind: behind the last block.
        last: the last block whose output anybody looks at.
        class_token_only: of the last block's output one token alone is looked at.
    """

    between: Visible
    behind: Visible
    last: int
    class_token_only: bool = False


class Forward:
    """What all blocks of one forward share. Nothing in it changes while the forward runs, except the record.

    Attributes:
        owner: whose forward it is.
        reducer: the method, with all fields resolved. A forward has one, whatever is set meanwhile.
        depth: how many blocks the tower has.
        length: T0, the host's own number of tokens, without cross token.
        cross: a cross token stands at the end.
        prefix: leading protected tokens.
        n_protected: protected tokens in a row, at most.
        causal: tokens see earlier tokens only.
        class_token: the first token is a class token, of which the cross token is a copy.
        padding: a mask given to the attention may hide padding.
        shown: what the host sees.
        relevance: how near tokens are to a text; None: no text was given.
        record: what the user will see.
    """

    def __init__(
        self, owner: Any, reducer: Reducer, depth: int, length: int, *, prefix: int, causal: bool, class_token: bool,
        padding: bool, has_end: bool, shown: Shown, relevance: Relevance | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.reducer, self.depth, self.length = owner, reducer, depth, length
        self.cross = bool(reducer.cross_token)
        self.prefix, self.causal, self.class_token, self.padding = prefix, causal, class_token, padding
        self.n_protected = prefix + int(self.cross) + int(has_end)
        self.shown = shown
        self.relevance = relevance
        self.record = Record()


@dataclass(frozen=True)
class TokenState:
    """The tokens' history in one forward.

    Attributes:
        forward: what does not change.
        positions: [B, T] the input position of each token (a merged token keeps that of its destination).
        source: [B, T0 + cross] the current token of each input token, -1 if dropped.
        protected: [B, T] bool.
        valid: [B, T] false for padding, or None.
        end: [B] current position of the end of text, or None.
        sizes: [B, T] float32 input tokens per token, None while all are one.
        norms: [B, T] float32, see `crossget.methods.merging.norm_correction`; None while all are one, or not asked for.
        weights: [B, T0 + cross] see `BlockRecord`; None unless the forward is recorded.
        dropped: some token may have been dropped.
        changed: tokens were removed since the first block.
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
    dropped: bool = False
    changed: bool = False

    @staticmethod
    def start(
        forward: Forward, batch: int, device: torch.device, *, end: Tensor | None = None, valid: Tensor | None = None
    ) -> TokenState:
        """The state in front of the first block.

        Args:
            forward: that begins.
            batch: B.
            device: where the tokens are.
            end: [B] position of the end of text, which is protected.
            valid: [B, T0] false for padding.
        """
        total = forward.length + int(forward.cross)
        order = torch.arange(total, device=device)
        positions = order.expand(batch, total)
        protected = ((order < forward.prefix) | (order >= forward.length)).expand(batch, total)
        if end is not None:
            protected = protected | (order == end[:, None])
        if valid is not None and forward.cross:
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        weights = None if forward.record.blocks is None else torch.ones_like(positions, dtype=torch.float32)
        return TokenState(forward, positions, positions, protected, valid, end, weights=weights)

    @property
    def length(self) -> int:
        """T0, see `Forward`."""
        return self.forward.length

    @property
    def cross(self) -> bool:
        """Whether a cross token stands at the end."""
        return self.forward.cross

    @property
    def pristine(self) -> bool:
        """The tokens are still exactly the host's."""
        return not self.changed and not self.forward.cross

    def with_padding(self, valid: Tensor) -> TokenState:
        """The same tokens, of which some [B, T] are known to be padding."""
        return TokenState(
            self.forward, self.positions, self.source, self.protected, valid, self.end, self.sizes, self.norms,
            self.weights, self.dropped, self.changed,
        )  # fmt: skip

    def advance(self, plan: MergePlan, sizes: Tensor | None, norms: Tensor | None = None) -> TokenState:
        """The state behind a reduction.

        Args:
            plan: which tokens left, and where to.
            sizes: [B, T'] of the tokens that are left.
            norms: [B, T'] of the tokens that are left.
        """
        known = self.source.clamp(min=0) if self.dropped else self.source
        source = plan.index.gather(1, known)
        share = None if self.weights is None else shares(plan)
        return TokenState(
            self.forward,
            positions=self.positions.gather(1, plan.kept),
            source=torch.where(self.source < 0, self.source, source) if self.dropped else source,
            protected=self.protected.gather(1, plan.kept),
            valid=None if self.valid is None else self.valid.gather(1, plan.kept),
            end=None if self.end is None else plan.index.gather(1, self.end[:, None]).squeeze(1),
            sizes=sizes,
            norms=norms,
            weights=None if self.weights is None or share is None else self.weights * share.gather(1, known),
            dropped=self.dropped or plan.destination is None,
            changed=True,
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
            self.dropped, self.changed,
        )  # fmt: skip

    def record_of(self, tokens: Tensor, score: Tensor | None) -> BlockRecord:
        """What a block did that this is the state behind.

        Args:
            tokens: [B, T', C] that left it.
            score: [B, T] see `BlockRecord`.
        """
        length = self.forward.length
        sizes = torch.ones_like(self.positions, dtype=torch.float32) if self.sizes is None else self.sizes
        weights = None if self.weights is None else self.weights[:, :length]
        # A copy of the tokens: the next block writes another cross token among them while it runs.
        return BlockRecord(self.source[:, :length], sizes, weights, score, tokens.detach().clone())

    def restored(self, tokens: Tensor) -> Tensor:
        """Reduced tokens [B, T, C] on the host's grid [B, T0, C], without the cross token."""
        cross, length = self.forward.cross, self.forward.length
        if not self.changed:
            return tokens[:, :length] if cross else tokens
        source = self.source[:, :length]
        if not self.dropped:
            return unmerge(tokens, source)
        last = size_of(tokens, 1) - int(cross)
        return unmerge(tokens, source, tokens[:, self.forward.prefix : last].mean(1, keepdim=True))


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
