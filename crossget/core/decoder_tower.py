"""A language model that generates: none of its tokens is merged, and its first one plays the cross token's part.

The cross token takes the place of each row's first real token wherever that token is computed: in a forward without
cache, and in the part of a prefill that it lies in. A decoding step, with that token in the cache, is the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.block_class import key_of
from crossget.core.carried import Notes, leave_notes, left_notes, pass_on, passed_with, recomputing
from crossget.core.masks import visible
from crossget.core.state import Record
from crossget.core.tower import AttachedTower, split_tokens
from crossget.methods.indexing import size_of
from crossget.methods.reducers import Reducer


class FirstToken:
    """Where a decoder's cross tokens are, in one forward.

    Attributes:
        position: [B] index of each row's first real token among the tokens of this call, outside of them if it was
            in an earlier call; None if it is so for every row: a decoding step.
        owner: whose forward it is.
        layer: of the block that comes next.
        record: what the user will see.
    """

    def __init__(
        self, position: Tensor | None, owner: Any = None, layer: int = 0, record: Record | None = None
    ) -> None:
        self.position, self.owner, self.layer = position, owner, layer
        self.record = record or Record()


class Replacement:
    """What one block of a decoder is to do. No tuple: hooks map those to others, with other tensors inside.

    Attributes:
        position: [B] of the first real token of each row.
        token: [B, C] what takes its place; None: it stays.
    """

    def __init__(self, position: Tensor | None = None, token: Tensor | None = None) -> None:
        self.position, self.token = position, token


class AttachedDecoder(AttachedTower):
    """A language model whose first real token plays the cross token's part; no token is appended or merged.

    Raises:
        ValueError: the reducer would remove tokens, which a cache of keys and values cannot follow.
    """

    def set_reducer(self, reducer: Reducer) -> None:
        depth = self.depth
        if any(reducer.schedule.removed(layer, depth, 1 << 20) for layer in range(depth)):
            raise ValueError(
                f"tower {self.tower.name!r} is a language model that generates: its tokens are not reduced, so it "
                f"takes a reducer with r = 0, not {reducer}"
            )
        super().set_reducer(reducer)

    def call(self, block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block with the cross token in the place of the first real token, if that is among the tokens."""
        if not self.reducer.cross_token:
            return call(*args, run=Replacement(), **kwargs)
        tokens = args[0] if args else kwargs[self._names_of(block)[0]]
        state: FirstToken | None = passed_with(tokens)
        if state is None or state.owner is not self:
            state = self._begin(block, tokens)
        record, layer, position = state.record, state.layer, state.position
        token = None
        if position is not None:
            record.tokens[layer] = size_of(tokens, 1)
            token = self.cross_token(tokens.gather(1, _at(position, tokens)).squeeze(1), record, layer)
        out = call(*args, run=Replacement(position, token), **kwargs)
        if layer < self.depth - 1:
            left = FirstToken(position, self, layer + 1, record)
            pass_on(out[0] if isinstance(out, tuple) else out, left)
        if position is not None and (layer > 0 or self.depth == 1):
            self.last = record
        return out

    def run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, run: Any) -> Any:
        """Run `forward`, the block's own, with another token in the place of the first real one."""
        if run.token is None:
            return forward(*args, **kwargs)
        tokens, args, kwargs = split_tokens(self._names_of(block), args, kwargs)
        position = run.position.to(tokens.device)
        here = _at(position, tokens)
        inside = (position >= 0) & (position < tokens.shape[1])
        new = torch.where(
            inside[:, None, None], run.token[:, None].to(tokens.device, tokens.dtype), tokens.gather(1, here)
        )
        return forward(tokens.scatter(1, here, new), *args, **kwargs)

    def _begin(self, block: nn.Module, tokens: Tensor) -> FirstToken:
        if recomputing():
            found = left_notes(tokens).input
        else:
            found = self.noted.get()
            self.noted.set(None)
            leave_notes(tokens, Notes(found))
        if found is None or key_of(block) != key_of(self.tower.blocks[0]):
            raise RuntimeError(
                f"block {key_of(block)} of tower {self.tower.name!r} got tokens {list(tokens.shape)} without their "
                "state: something made a new tensor between two blocks, or the block was called on its own"
            )
        return FirstToken(found.position, self)


def _at(position: Tensor, tokens: Tensor) -> Tensor:
    """[B, 1, C] the index of the token of each row at `position` [B], or of the nearest one that there is."""
    return position.clamp(0, tokens.shape[1] - 1)[:, None, None].expand(-1, 1, tokens.shape[2])


def first_token(tokens: Tensor, mask: Any, cached: Any) -> FirstToken:
    """Find each row's first real token in one call of a decoder.

    Args:
        tokens: [B, T, ..] embeddings or ids of this call.
        mask: [B, S + T] or [B, H, T, S + T] over cached and new tokens, a dict of such by kind of layer, or None.
        cached: S, how many tokens are in the cache.
    """
    if isinstance(cached, int) and cached > 0 and int(tokens.shape[1]) == 1:
        return FirstToken(None)
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        position = torch.zeros(int(tokens.shape[0]), dtype=torch.long, device=tokens.device)
    else:
        # What the last query sees; later keys it may not see are not first anyway.
        seen = mask != 0 if mask.dim() == 2 else visible(mask[:, :, -1:], int(tokens.shape[0]))
        position = seen.long().argmax(1).to(tokens.device)
    return FirstToken(position - cached)


def cached_tokens(cache: Any) -> Any:
    """How many tokens a cache of keys and values holds: an int, or a tensor for a static one."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):  # as transformers had them before 4.56: keys and values [B, H, S, D] by layer
        return int(cache[0][0].shape[-2]) if cache else 0
    return cache.get_seq_length()
