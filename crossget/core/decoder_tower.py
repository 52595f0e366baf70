"""A language model that generates: none of its tokens is merged, and its first one plays the cross token's part.

The cross token takes the place of each row's first real token wherever that token is computed: in a forward without
cache, and in the part of a prefill that it lies in. A decoding step, with that token in the cache, is the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.block_class import base_of
from crossget.core.state import Record
from crossget.core.tower import AttachedTower, state_of, take_note, take_tokens
from crossget.core.watch import visible
from crossget.methods.reducers import Reducer


class AttachedDecoder(AttachedTower):
    """A language model whose first real token plays the cross token's part; no token is appended or merged.

    Raises:
        ValueError: the reducer would remove tokens, which a cache of keys and values cannot follow.
    """

    def set_reducer(self, reducer: Reducer) -> None:
        removed = [reducer.schedule.removed(layer, self.depth, 1 << 20) for layer in range(self.depth)]
        if any(removed):
            raise ValueError(
                f"tower {self.tower.name!r} is a language model that generates: its tokens are not reduced, so it "
                f"takes a reducer with r = 0, not {reducer}"
            )
        super().set_reducer(reducer)

    def run(self, block: nn.Module, layer: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `forward` with the cross token in the place of the first real token, if that is among the tokens."""
        if not self.reducer.cross_token:
            return forward(*args, **kwargs)
        tokens, args, kwargs = take_tokens(self.inputs[base_of(block)], args, kwargs)
        state: FirstToken | None = take_note(self, tokens) if layer == 0 else None
        if state is None:
            state = state_of(self.bearers(tokens), layer, self.tower)
        if state.position is not None:
            tokens = self._renewed(tokens, state, state.position, layer)
        out = forward(tokens, *args, **kwargs)
        self.leave(out[0] if isinstance(out, tuple) else out, state)
        if state.position is not None and (layer > 0 or self.depth == 1):
            self.last = state.record
        return out

    def _renewed(self, tokens: Tensor, state: FirstToken, position: Tensor, layer: int) -> Tensor:
        state.record.tokens[layer] = int(tokens.shape[1])
        here = position.clamp(0, tokens.shape[1] - 1)[:, None, None].expand(-1, 1, tokens.shape[2])
        old = tokens.gather(1, here)
        new = self.cross_token(old.squeeze(1), state.record, layer)[:, None]
        inside = (position >= 0) & (position < tokens.shape[1])
        return tokens.scatter(1, here, torch.where(inside[:, None, None], new, old))


class FirstToken:
    """Where a decoder's cross tokens are, in one forward.

    Attributes:
        position: [B] index of each row's first real token among the tokens of this call, outside of them if it was
            in an earlier call; None if it is so for every row: a decoding step.
        record: what the user will see.
    """

    def __init__(self, position: Tensor | None) -> None:
        self.position = position
        self.record = Record()


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
