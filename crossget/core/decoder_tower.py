"""Cross tokens in a language model that generates. None of its tokens is merged, and none is appended.

Before every block, the cross token replaces the first token of each row that is no padding: the block gets a copy of
this token plus the block's learned vector. This happens in the forward that computes the token: one without a cache, or
the chunk of a prefill that contains it. In a decoding step the token is in the cache, and the host's code runs
unchanged.

Source: the CrossGET authors' implementation for LLaVA-1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.block_class import Call, key_of
from crossget.core.carried import (
    EntryInfo,
    get_carried,
    recomputing,
    set_carried,
    store_entry_info,
    stored_entry_info,
)
from crossget.core.masks import visible
from crossget.core.state import ForwardRecord
from crossget.core.tower import AttachedTower, split_tokens
from crossget.methods.indexing import size_of
from crossget.methods.reducers import Reducer


class FirstToken:
    """The state of a decoder's tokens in one forward. It is set on the output of each block, for the next one.

    Attributes:
        position: [B] index of each row's first token that is no padding, among the tokens of this call. It is negative
            if that token is in the cache. None: no token is replaced, as it is in the cache for all rows (a decoding
            step), or the method has no cross token.
        owner: the `AttachedDecoder`.
        layer: number of the next block, from 0.
        record: what the user can read after the forward.
    """

    def __init__(
        self, position: Tensor | None, owner: Any = None, layer: int = 0, record: ForwardRecord | None = None
    ) -> None:
        self.position, self.owner, self.layer = position, owner, layer
        self.record = record or ForwardRecord()


class DecoderCall(Call):
    """One call of one block of a decoder. Not a tuple: hooks rebuild tuples, with other tensors inside.

    Attributes:
        position: [B] see `FirstToken`.
        token: [B, C] the cross token, which replaces the token at `position`; None: nothing is replaced.
    """

    def __init__(self, position: Tensor | None = None, token: Tensor | None = None) -> None:
        self.position, self.token = position, token


class AttachedDecoder(AttachedTower):
    """A language model that generates, in which the cross token replaces the first token of each row.

    Raises:
        ValueError: the reducer would remove tokens, but the positions in a cache of keys and values are fixed.
    """

    def set_reducer(self, reducer: Reducer) -> None:
        depth = self.depth
        if any(reducer.schedule.removed(layer, depth, 1 << 20) for layer in range(depth)):
            raise ValueError(
                f"tower {self.tower.name!r} is a language model that generates: its tokens are not reduced, so it "
                f"takes a reducer with r = 0, not {reducer}"
            )
        super().set_reducer(reducer)

    def call_block(self, block: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See `Runner.call_block`."""
        tokens = args[0] if args else kwargs[self._names_of(block)[0]]
        state: FirstToken | None = get_carried(tokens)
        if state is None or state.owner is not self:
            state = self._first_state(block, tokens)
        record, layer, position = state.record, state.layer, state.position
        token = None
        if position is not None:
            record.tokens[layer] = size_of(tokens, 1)
            token = self.make_cross_token(tokens.gather(1, _gather_index(position, tokens)).squeeze(1), record, layer)
        out = proceed(*args, block_call=DecoderCall(position, token), **kwargs)
        if layer < self.depth - 1:
            next_state = FirstToken(position, self, layer + 1, record)
            set_carried(out[0] if isinstance(out, tuple) else out, next_state)
        if position is not None and (layer > 0 or self.depth == 1):
            self.last_record = record
        return out

    def run_forward(
        self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, block_call: Any
    ) -> Any:
        """See `Runner.run_forward`."""
        if block_call.token is None:
            return forward(*args, **kwargs)
        tokens, args, kwargs = split_tokens(self._names_of(block), args, kwargs)
        position = block_call.position.to(tokens.device)
        index = _gather_index(position, tokens)
        inside = (position >= 0) & (position < tokens.shape[1])
        token = block_call.token[:, None].to(tokens.device, tokens.dtype)
        new = torch.where(inside[:, None, None], token, tokens.gather(1, index))
        return forward(tokens.scatter(1, index, new), *args, **kwargs)

    def _first_state(self, block: nn.Module, tokens: Tensor) -> FirstToken:
        """The state before the first block. A reducer without a cross token is one whose position is None."""
        if not self.reducer.cross_token:
            return FirstToken(None, self)
        if recomputing():
            stored = stored_entry_info(tokens)
            found = None if stored is None else stored.text
        else:
            found = self.text_info.get()
            self.text_info.set(None)
            store_entry_info(tokens, EntryInfo(found))
        if found is None or key_of(block) != key_of(self.tower.blocks[0]):
            raise RuntimeError(
                f"block {key_of(block)} of tower {self.tower.name!r} got tokens {list(tokens.shape)} without their "
                "state: something made a new tensor between two blocks, or the block was called outside of its tower"
            )
        return FirstToken(found.position, self)


def _gather_index(position: Tensor, tokens: Tensor) -> Tensor:
    """[B, 1, C] index, along T, of the token at `position` [B], or of the nearest token if that is outside."""
    return position.clamp(0, tokens.shape[1] - 1)[:, None, None].expand(-1, 1, tokens.shape[2])


def first_token(tokens: Tensor, mask: Any, cached: Any) -> FirstToken:
    """The state of a decoder's tokens before its first block: where each row's first token that is no padding is.

    Args:
        tokens: [B, T, ..] embeddings or ids of this call.
        mask: attention mask over cached and new tokens, [B, S + T] or [B, H, T, S + T]; or a dict of masks by kind of
            layer; or None, if there is no padding.
        cached: S, the number of tokens in the cache.
    """
    if isinstance(cached, int) and cached > 0 and int(tokens.shape[1]) == 1:
        return FirstToken(None)
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        position = torch.zeros(size_of(tokens, 0), dtype=torch.long, device=tokens.device)
    else:
        # The mask of the last query. It may exclude later keys, which are not the first one.
        seen = mask != 0 if mask.dim() == 2 else visible(mask[:, :, -1:], size_of(tokens, 0))
        position = seen.long().argmax(1).to(tokens.device)
    return FirstToken(position - cached)


def cached_tokens(cache: Any) -> Any:
    """The number of tokens in a cache of keys and values: an int, or a tensor for a static cache."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):  # before transformers 4.56: keys and values [B, H, S, D] by layer
        return int(cache[0][0].shape[-2]) if cache else 0
    return cache.get_seq_length()
