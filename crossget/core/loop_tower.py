"""Towers whose blocks are no modules: one module runs all of them in a loop of its own forward.

    for attention, mlp in self.layers:
        x = attention(x) + x
        x = mlp(x) + x

Each attention with its residual belongs to one block. The block ends before the next attention. The tokens
may be normalised or scaled on the way, as in x = norm(attention(x) + 2 * x).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.reduction import Merge
from crossget.core.state import TokenState
from crossget.core.tower import AttachedTower, BlockCall
from crossget.core.watch import ADD, MATMUL, MULTI_HEAD_ATTENTION, SDPA
from crossget.methods.indexing import size_of

# Functions that normalise or scale tokens.
_SCALE = (
    F.layer_norm, F.rms_norm, F.normalize,
    torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, operator.mul,
    torch.div, torch.Tensor.div, torch.Tensor.__truediv__, operator.truediv,
    torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, operator.sub,
)  # fmt: skip


def _attends(func: Any, args: tuple[Any, ...], tokens: int) -> bool:
    """Whether a call begins an attention over T = `tokens` tokens."""
    if func in (SDPA, MULTI_HEAD_ATTENTION):
        return True
    operands = args[1:] if func is torch.einsum else args if func in MATMUL else ()
    return len(operands) == 2 and all(isinstance(x, Tensor) and x.dim() > 2 and tokens in x.shape for x in operands)


class LoopMerge(Merge):
    """Reduces the tokens at the residual of every block in a loop.

    Args:
        tokens: [B, T, C] the input of the first block.
        state: of these tokens.
        r: number of tokens to remove in the first block.
        depth: number of blocks.
        next_block: a function (layer, tokens [B, T, C], state) called between two blocks. It returns the tokens that
            block `layer` gets, and its r.

    Attributes:
        layer: number of the present block, from 0.
    """

    def __init__(
        self, tokens: Tensor, state: TokenState, r: int, depth: int,
        next_block: Callable[[int, Tensor, TokenState], tuple[Tensor, int, Tensor | None]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokens, state, r)
        self.layer, self.depth, self.next_block = 0, depth, next_block
        self._stream: Tensor | None = None  # the tokens after the last residual
        self._scaled: list[Tensor] = []  # these tokens, normalised or scaled
        self._next: tuple[int, Tensor | None] = (0, None)
        self._ended = False  # the tokens are those that the next block gets

    @property
    def complete(self) -> bool:
        """All blocks were recognised."""
        return self.residual_seen and self.layer == self.depth - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.known(func)
        if func in _SCALE:
            out = super().__torch_function__(func, types, args, kwargs)
            self._see_scaled(args, out)
            return out
        if self.residual_seen and self._stream is not None and self.layer < self.depth - 1:
            stream = self._stream
            if func in ADD and any(arg is one for arg in args for one in (stream, *self._scaled)):
                total: Tensor = super().__torch_function__(func, types, args, kwargs)
                if total.shape == stream.shape:
                    total = self._end_block(total)
                return total
            if _attends(func, args, size_of(stream, 1)):
                self._begin_block()
        return super().__torch_function__(func, types, args, kwargs)

    def _see_scaled(self, args: tuple[Any, ...], out: Tensor) -> None:
        """Note the normalised or scaled tokens. They may be a summand of the next residual, in place of the tokens."""
        known = [self._stream, *self._scaled] if self.residual_seen else self.residual_inputs
        if any(arg is one and arg.shape == out.shape for arg in args if isinstance(arg, Tensor) for one in known):
            (self._scaled if self.residual_seen else self.residual_inputs).append(out)

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        self._stream, self._scaled = super().add_residual(a, b, options), []
        return self._stream

    def _end_block(self, tokens: Tensor) -> Tensor:
        """The tokens that the next block gets, from the last sum of this block."""
        self._ended = True
        if self.next_block is not None:
            tokens, r, by_length = self.next_block(self.layer + 1, tokens, self.state)
            self._next = r, by_length
        self._stream, self._scaled = tokens, []
        return tokens

    def _begin_block(self) -> None:
        """An attention begins the next block."""
        if self._stream is None or (not self._ended and self.state.has_cross_token):
            raise RuntimeError(
                f"block {self.layer} of a loop ends without a sum over its tokens, where the next cross token would be "
                "set: use a method without cross token, such as crossget.Ward"
            )
        if not self._ended:
            self._end_block(self._stream)
        self.layer, self.tokens = self.layer + 1, size_of(self._stream, 1)
        self.r, self.by_length = self._next
        self.residual_inputs = [self._stream, *self._scaled]
        self.attention_seen = self.softmax_seen = self.residual_seen = self._ended = False
        self._softmax_next = self._values_next = False
        self._mlp_residual = self._in_place_target = None


class AttachedLoop(AttachedTower):
    """A tower whose blocks run in a loop, with the reducer that is attached to it."""

    def _watch(self, tokens: Tensor, state: TokenState, block_call: BlockCall) -> Merge:
        record = state.forward.record

        def next_block(layer: int, tokens: Tensor, state: TokenState) -> tuple[Tensor, int, Tensor | None]:
            count = size_of(tokens, 1)
            record.tokens[layer] = count
            if record.blocks is not None:
                record.blocks[layer - 1] = state.block_record(tokens, None)
            if state.has_cross_token:
                token = self.make_cross_token(tokens[:, -1], record, layer)
                tokens = torch.cat([tokens[:, :-1], token[:, None]], 1)
            return tokens, *self._wanted(state, layer, count)

        watch = LoopMerge(tokens, state, block_call.r, self.depth, next_block)
        watch.by_length = block_call.by_length
        return watch

    def _finish(self, out: Any, block_call: BlockCall, layer: int) -> None:
        super()._finish(out, block_call, self.depth - 1)

    def _make_call(self, state: TokenState, layer: int, **inputs: Any) -> BlockCall:
        block_call = super()._make_call(state, layer, **inputs)
        block_call.output_form = state.forward.outputs.after_last
        return block_call


def count_blocks(module: nn.Module, tokens: Tensor, state: TokenState, args: Any, kwargs: Any) -> int:
    """The number of blocks in one call of a module, each an attention over its tokens and a residual after it."""
    watch = LoopMerge(tokens, state, 0, 1 << 20)
    with torch.no_grad(), watch:
        module.forward(tokens, *args, **kwargs)
    return watch.layer + int(watch.residual_seen)
