"""How a block is reduced: subclasses of `Watch`, which recognises the attention and the residual of a block.

`Merge` applies a method. It adds log(size) to the attention scores (proportional attention), selects the host's masks
for the remaining tokens, and reduces the tokens at the residual. What follows in the block (MLP, layer scale, drop
path, second residual) computes the remaining tokens.

`ClassTokenOnly` computes the last block for one token, if the host uses no other token of its output.

Nothing here depends on the layer, so that a compiler can share one graph among all blocks of a tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.core import masks
from crossget.core.state import TokenState, token_at
from crossget.core.watch import IN_PLACE, LINEAR, PLUS, Watch, additive, lower_triangle
from crossget.methods.importance import attention_received, by_attention, wide
from crossget.methods.indexing import size_of
from crossget.methods.matching import MergePlan
from crossget.methods.merging import merge_by, norm_correction
from crossget.methods.reducers import View


class Merge(Watch):
    """Reduces the tokens of a block at the residual after its attention.

    Args:
        tokens: [B, T, C] the block's input, or in the layout of the class.
        state: of these tokens.
        r: number of tokens to remove.

    Attributes:
        state: of the tokens; after the reduction, of the remaining ones.
        reducer: the method.
        score: [B, T] the importance scores that the reducer used; None before, or if it used none.
        by_length: [T + 1] number of tokens that a row loses, by its number of tokens without padding; None: `r`.
    """

    by_length: Tensor | None = None

    def __init__(self, tokens: Tensor, state: TokenState, r: int) -> None:
        super().__init__(tokens, *self.sizes(tokens, state), state.forward.replaced)
        self.state, self.reducer, self.r = state, state.forward.reducer, r
        self.score: Tensor | None = None
        # Several attentions before one residual (parallel, differential) count as one attention with all their heads.
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._received: list[Tensor] = []
        # The block's mask arguments are for the remaining tokens, so the mask that it makes from them is, too.
        self._arguments_fitted = False
        self._plan: MergePlan | None = None  # what was merged in this block
        # With norm correction: the tensor that the MLP's output is added to, which tells this addition from others.
        self._mlp_residual: Tensor | None = None

    # Layout -----------------------------------------------------------------------------------------------------

    @staticmethod
    def sizes(tokens: Tensor, state: TokenState) -> tuple[int, int]:
        """B and T of the block's input."""
        return tokens.shape[0], tokens.shape[1]

    def to_batch(self, x: Tensor) -> Tensor:
        """[B, T, C] from a tensor in the layout of the block's tokens."""
        return x

    def from_batch(self, x: Tensor) -> Tensor:
        """The layout of the block's tokens, from [B, T, C]."""
        return x

    # Masks ------------------------------------------------------------------------------------------------------

    def fit_argument(self, mask: Tensor) -> Tensor:
        """A mask argument of the block, for the remaining tokens.

        The block makes its attention's mask from this one, so that mask is not fitted again. Its size would not show
        that, as T can be equal to T0 by accident.
        """
        self._arguments_fitted = True
        return self._fit(mask)

    def fit_mask(self, mask: Tensor) -> Tensor:
        return mask if self._arguments_fitted else self._fit(mask)

    def is_mask_width(self, columns: int) -> bool:
        return columns in (self.state.length, self.state.length + int(self.state.has_cross_token))

    def _fit(self, mask: Tensor) -> Tensor:
        if not isinstance(mask, Tensor):
            raise RuntimeError(
                f"the block got a {type(mask).__name__} as its mask, of an attention kernel that cannot be recognised: "
                "use SDPA, as by model.set_attn_implementation('sdpa')"
            )
        if self.state.forward.padding and self.state.valid is None:
            self.state = self.state.with_padding(masks.find_padding(mask, self.state))
        return masks.fit_mask(mask, self.state)

    # The attention ----------------------------------------------------------------------------------------------

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, T] log(size); None if all sizes are 1, or without proportional attention."""
        if self.state.sizes is None or not self.reducer.proportional_attention:
            return None
        return self.state.sizes.log().to(dtype)[:, None, None, :]

    def scale_values(self, values: Tensor) -> Tensor:
        """The values times the norms of the tokens (norm correction)."""
        if self.state.norms is None:
            return values
        return (self.by_head(values) * self.state.norms.to(values.dtype)[:, None, :, None]).reshape(values.shape)

    def on_queries_and_keys(self, queries: Tensor, keys: Tensor) -> None:
        if self.r > 0:
            self._queries.append(queries)
            self._keys.append(keys)

    def on_fused_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> None:
        if not self._wants_attention:
            return
        with torch.no_grad():
            bias = None if mask is None else additive(mask, queries.dtype)
            if is_causal:
                bias = additive(lower_triangle(self.tokens, queries.device), queries.dtype)
            if bias is not None:
                bias = bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias
                bias = bias if bias.shape[2] == 1 else self._scored_rows(bias)
            scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
            self.on_received(attention_received(self._scored_rows(queries), keys, bias, scale, self.state.valid))

    def on_probabilities(self, probabilities: Tensor) -> None:
        if self._wants_attention:
            heads = self._scored_rows(self.by_head(probabilities.detach()))
            self.on_received(by_attention(wide(heads), self.state.valid).mean(1))

    def on_received(self, received: Tensor) -> None:
        """Called with the attention that tokens receive [B, T], of every attention before the residual."""
        self._received.append(received)

    @property
    def _wants_attention(self) -> bool:
        return self.r > 0 and self.reducer.needs_attention

    def _scored_rows(self, rows: Tensor) -> Tensor:
        """The rows of a tensor [B, H, T, ..] for the queries that score the tokens: all, or the first one."""
        return rows[:, :, :1] if self.reducer.needs_class_attention else rows

    # The residual -----------------------------------------------------------------------------------------------

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        total = PLUS(a, b, **options)
        if not self.softmax_seen and self.state.sizes is not None:
            raise RuntimeError(
                "no softmax over the attention scores was seen in the block, so log(size) could not be added: "
                "set proportional_attention=False, or use F.scaled_dot_product_attention in the block"
            )
        return self.reduce_tokens(total)

    def reduce_tokens(self, total: Tensor) -> Tensor:
        """The tokens after the residual, reduced, in the layout of the block's tokens."""
        by_image = self.to_batch(total) if self.r > 0 else total
        reduced = self._reduce(by_image) if self.r > 0 else None
        if reduced is not None:
            tokens, sizes, plan = reduced
            norms = norm_correction(by_image, self.state.norms, plan) if self.reducer.norm_correction else None
            self.state = self.state.advance(plan, sizes, norms)
            self._plan = plan
            total = self.from_batch(tokens)
        if self.state.norms is not None:
            self._mlp_residual = total
        return total

    def scale_summands(self, func: Callable[..., Tensor], a: Any, b: Any) -> tuple[Any, Any]:
        """The MLP's output is merged if it was computed for all tokens (a parallel block), and gets norm correction."""
        if self._plan is not None and isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
            a, b = self._merged(a), self._merged(b)
        norms = self.state.norms
        if norms is None or self._mlp_residual is None or (a is self._mlp_residual) == (b is self._mlp_residual):
            return a, b
        factor = self.from_batch(norms.to(a.dtype)[:, :, None])
        if a is self._mlp_residual:
            return a, b * factor
        return a.mul_(factor) if func in IN_PLACE else a * factor, b

    def _merged(self, x: Tensor) -> Tensor:
        """Features of all tokens of the block, merged like the tokens; other tensors unchanged."""
        if self._plan is None or not self.is_sequence(x):
            return x
        return self.from_batch(merge_by(self.to_batch(x), self._plan))

    def _reduce(self, total: Tensor) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        view = self._view(total)
        device = total.device.type
        try:
            if device == "meta" or not torch.is_autocast_enabled(device):
                reduced = self.reducer.reduce(view, self.r)
            else:
                with torch.autocast(device, enabled=False):  # tokens are compared in full precision
                    reduced = self.reducer.reduce(view, self.r)
        except TypeError as error:
            # torch replaces a TypeError inside `x + y` by one that says only that the two cannot be added.
            raise RuntimeError(f"{type(self.reducer).__name__}.reduce() failed: {error}") from error
        self.score = view.score
        return reduced

    def _view(self, total: Tensor) -> View:
        """The input of the reducer. The queries and keys are not kept."""
        state, forward = self.state, self.state.forward
        queries, keys = self._queries, self._keys
        wanted = None
        if state.valid is not None and self.by_length is not None:
            wanted = self.by_length[(state.valid | state.protected).sum(1)]
        received = torch.stack(self._received).mean(0) if self._received else None
        self._queries, self._keys, self._received = [], [], []
        return View(
            total,
            queries[0] if len(queries) == 1 else torch.cat(queries, 1),
            keys[0] if len(keys) == 1 else torch.cat(keys, 1),
            received,
            state.sizes,
            state.protected,
            forward.n_protected,
            state.valid,
            (size_of(total, 1) - 1 if forward.has_cross_token else None) if state.end is None else state.end,
            wanted=wanted,
            prefix=state.prefix,
        )


class ClassTokenOnly(Merge):
    """Computes the last block for one token, the class token or the end-of-text token. Nothing is merged.

    The attention is computed for this token's query, and output projection and MLP for this token. All other tokens of
    the block's output are those of its input.

    Attributes:
        block_input: [B, T, C] the block's input, into which the caller puts the computed token; None: all tokens were
            computed.
    """

    def __init__(self, tokens: Tensor, state: TokenState) -> None:
        super().__init__(tokens, state, 0)
        self.block_input: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        mask = lower_triangle(self.tokens, query.device) if is_causal else mask
        row, mask = self._row(query), None if mask is None else self._row(mask)
        out = self.kernel(row, key, value, mask, dropout, **options)
        return out.expand(-1, -1, self.tokens, -1)

    def project_output(self, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        row = out[:, :, :1].permute(2, 0, 1, 3).flatten(2)
        return F.linear(row, weight, bias).expand(self.tokens, -1, -1)

    def linear(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if x.dim() == 3 and x.shape[1] == self.tokens > 1 and x.stride(1) == 0:  # one row, expanded to T
            return LINEAR(x[:, :1], *rest, **options).expand(-1, self.tokens, -1)
        return LINEAR(x, *rest, **options)

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        if a.shape != b.shape:
            return super().add_residual(a, b, options)
        self.block_input = a if any(a is candidate for candidate in self.residual_inputs) else b
        end = self.state.end
        return PLUS(token_at(a, end), token_at(b, end), **options)

    def _row(self, rows: Tensor) -> Tensor:
        """[.., 1, N] the row of the computed token, from queries or a mask [.., T or 1, N]."""
        end = self.state.end
        if end is None or rows.shape[-2] == 1:
            return rows[..., :1, :]
        rows = rows[(None,) * (4 - rows.dim())].expand(self.batch, -1, -1, -1)
        return rows.gather(2, end[:, None, None, None].expand(-1, rows.shape[1], 1, rows.shape[3]))
