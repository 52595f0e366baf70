"""What is done where `Watch` sees the attention and the residual of a block.

`Merge` applies a method: it adds log(size) to the attention's scores (proportional attention), fits the host's masks to
the tokens that are left, and reduces the tokens at the residual. The block's MLP, layer scale, drop path and second
residual follow on fewer tokens, as the block never learns how many there were.

`ClassTokenOnly` computes the last block for the one token that is looked at behind it.

Nothing here depends on the layer, so that a compiler shares one graph among all blocks of a tower.
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
from crossget.core.watch import IN_PLACE, Watch, additive, lower_triangle
from crossget.methods.importance import attention_received, by_attention
from crossget.methods.matching import MergePlan
from crossget.methods.merging import norm_correction
from crossget.methods.reducers import View


class Merge(Watch):
    """A block whose tokens are merged at the residual behind its attention.

    Args:
        tokens: [B, T, C] the block's input.
        state: of these tokens; replaced by the state behind the reduction.
        r: tokens to remove.

    Attributes:
        state: the tokens' state.
        reducer: the method.
        score: [B, T] what the reducer scored the tokens with, or None.
    """

    def __init__(self, tokens: Tensor, state: TokenState, r: int) -> None:
        super().__init__(tokens)
        self.state, self.reducer, self.r = state, state.forward.reducer, r
        self.score: Tensor | None = None
        # Several attentions in front of one residual (parallel, differential) count as one with all their heads.
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._received: list[Tensor] = []
        self._masks_fit = False  # those among the block's arguments were fitted, and the attention's are made of such
        self._merged: Tensor | None = None  # the tokens that the MLP's output is added to, if their norms matter

    # Masks ------------------------------------------------------------------------------------------------------

    def fit_argument(self, mask: Tensor) -> Tensor:
        """A mask among the block's arguments, for the tokens that are left.

        The attention's masks are made of such from then on. Their size could not tell: T may be T0 by accident.
        """
        self._masks_fit = True
        return self._fit(mask)

    def fit_mask(self, mask: Tensor) -> Tensor:
        return mask if self._masks_fit else self._fit(mask)

    def is_mask(self, columns: int) -> bool:
        return columns in (self.state.length, self.state.length + int(self.state.cross))

    def _fit(self, mask: Tensor) -> Tensor:
        if self.state.forward.padding and self.state.valid is None:
            self.state = self.state.with_padding(masks.find_padding(mask, self.state))
        return masks.fit_mask(mask, self.state)

    # The attention ----------------------------------------------------------------------------------------------

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """log(size); None while every token stands for itself."""
        if self.state.sizes is None or not self.reducer.proportional_attention:
            return None
        return self.state.sizes.log().to(dtype)[:, None, None, :]

    def scale_values(self, values: Tensor) -> Tensor:
        """Values times the norm of the mean direction of their token's members (norm correction)."""
        if self.state.norms is None:
            return values
        return (self.by_head(values) * self.state.norms.to(values.dtype)[:, None, :, None]).reshape(values.shape)

    def compare(self, queries: Tensor, keys: Tensor) -> None:
        if self.r > 0:
            self._queries.append(queries)
            self._keys.append(keys)

    def see_fused(
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
            self._received.append(attention_received(self._scored_rows(queries), keys, bias, scale))

    def see_probabilities(self, probabilities: Tensor) -> None:
        if self._wants_attention:
            heads = self.by_head(probabilities.detach())
            self._received.append(by_attention(self._scored_rows(heads).float()).mean(1))

    @property
    def _wants_attention(self) -> bool:
        return self.r > 0 and self.reducer.needs_attention

    def _scored_rows(self, rows: Tensor) -> Tensor:
        """Of [B, H, T, ..] queries, or what belongs to them, those whose attention scores the tokens."""
        return rows[:, :, :1] if self.reducer.needs_class_attention else rows

    # The residual -----------------------------------------------------------------------------------------------

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        total = torch.add(a, b, **options)
        if not self.has_softmax and self.state.sizes is not None:
            raise RuntimeError(
                "the block's attention has no softmax over its scores that could be seen, so token sizes could not "
                "take part; set proportional_attention=False, or use F.scaled_dot_product_attention in the block"
            )
        reduced = self._reduce(total) if self.r > 0 else None
        if reduced is not None:
            tokens, sizes, plan = reduced
            norms = norm_correction(total, self.state.norms, plan) if self.reducer.norm_correction else None
            self.state = self.state.advance(plan, sizes, norms)
            total = tokens
        if self.state.norms is not None:
            self._merged = total
        return total

    def summands(self, func: Callable[..., Tensor], a: Any, b: Any) -> tuple[Any, Any]:
        """The MLP's output times the norm of the mean direction of the token's members (norm correction)."""
        norms = self.state.norms
        if norms is None or self._merged is None or (a is self._merged) == (b is self._merged):
            return a, b
        factor = norms.to(a.dtype)[:, :, None]
        if a is self._merged:
            return a, b * factor
        return a.mul_(factor) if func in IN_PLACE else a * factor, b

    def _reduce(self, total: Tensor) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        view = self._view(total)
        device = total.device.type
        try:
            if device == "meta" or not torch.is_autocast_enabled(device):
                reduced = self.reducer.reduce(view, self.r)
            else:
                with torch.autocast(device, enabled=False):  # the choice of tokens is made in full precision
                    reduced = self.reducer.reduce(view, self.r)
        except TypeError as error:
            # Of a TypeError below `x + y` torch says that the two cannot be added, and nothing else.
            raise RuntimeError(f"{type(self.reducer).__name__}.reduce() failed: {error}") from error
        self.score = view.score
        return reduced

    def _view(self, total: Tensor) -> View:
        state, forward = self.state, self.state.forward
        queries, keys = self._queries, self._keys
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
            (self.tokens - 1 if forward.cross else None) if state.end is None else state.end,
            relevance=forward.relevance,
        )


class ClassTokenOnly(Merge):
    """The last block where the host looks at one token behind it: class token, or end of text.

    The attention is computed for this token's query, and output projection and MLP run on it alone. All others stay as
    they came, and nothing is merged.

    Attributes:
        others: [B, T, C] the block's input, to put the one token back into; None where all tokens were computed.
    """

    def __init__(self, tokens: Tensor, state: TokenState) -> None:
        super().__init__(tokens, state, 0)
        self.others: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        mask = lower_triangle(self.tokens, query.device) if is_causal else mask
        row, mask = self._row(query), None if mask is None else self._row(mask)
        out = F.scaled_dot_product_attention(row, key, value, mask, dropout, **options)
        return out.expand(-1, -1, self.tokens, -1)

    def project(self, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        row = out[:, :, :1].permute(2, 0, 1, 3).flatten(2)
        return F.linear(row, weight, bias).expand(self.tokens, -1, -1)

    def linear(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if x.dim() == 3 and x.shape[1] == self.tokens > 1 and x.stride(1) == 0:  # one row, seen T times
            return F.linear(x[:, :1], *rest, **options).expand(-1, self.tokens, -1)
        return F.linear(x, *rest, **options)

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        if a.shape != b.shape:
            return super().add_residual(a, b, options)
        self.others = a if any(a is known for known in self.residuals) else b
        end = self.state.end
        return torch.add(token_at(a, end), token_at(b, end), **options)

    def _row(self, rows: Tensor) -> Tensor:
        """Of [.., T or 1, N] queries, or a mask, the row of the one token: [.., 1, N]."""
        end = self.state.end
        if end is None or rows.shape[-2] == 1:
            return rows[..., :1, :]
        rows = rows[(None,) * (4 - rows.dim())].expand(self.batch, -1, -1, -1)
        return rows.gather(2, end[:, None, None, None].expand(-1, rows.shape[1], 1, rows.shape[3]))
