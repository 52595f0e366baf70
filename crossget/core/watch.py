"""Seeing the attention and the residual of a block that runs its own code.

A `torch.overrides.TorchFunctionMode` sees every torch function that runs inside a `with` block, before it runs. In a
transformer block two of them matter:

1. The attention: `F.scaled_dot_product_attention`, `F.multi_head_attention_forward`, or a matrix product that is
   followed by a softmax.
2. The residual: the first addition behind the attention in which one of the summands *is* the block's input.

`Watch` recognises both and calls its hook methods there. The methods of `Watch` itself change nothing. It knows no
reduction method, no tower and no model, and imports nothing of this package.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Tuples: not every Dynamo can look a function up in a set.
_ADD = (
    torch.Tensor.add,
    torch.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.add_,
    torch.Tensor.__iadd__,
)
_SOFTMAX = (torch.Tensor.softmax, F.softmax, torch.softmax)
_MATMUL = (torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
IN_PLACE = (torch.Tensor.add_, torch.Tensor.__iadd__)


class Watch(TorchFunctionMode):
    """Watches one run of one block.

    Args:
        tokens: [B, T, C] the block's input.

    Attributes:
        batch, tokens: B and T.
        residuals: what counts as the block's input: `tokens`, and sums of it with something else that came before the
            attention (a position embedding, say).
        attended: an attention was seen.
        has_softmax: its softmax was seen, too, so that a bias takes part in it.
        done: the residual was seen; the attention and the residual are over.
    """

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.batch, self.tokens = tokens.shape[0], tokens.shape[1]
        if not torch.compiler.is_compiling():  # a number would be burnt into a compiled graph; tracing needs one
            self.batch, self.tokens = int(self.batch), int(self.tokens)
        self.residuals = [tokens]
        self.attended = self.has_softmax = self.done = False
        self._softmax_next = False  # a product of queries and keys was seen, its softmax is to come
        self._values_next = False  # the softmax was seen, the product of weights and values is to come
        self._outdated: Tensor | None = None  # what an in-place addition would have changed

    # Hook methods -----------------------------------------------------------------------------------------------

    def fit_mask(self, mask: Tensor) -> Tensor:
        """The host's mask, or bias, of the attention for the tokens that the block has.

        Args:
            mask: [.., T or 1, T] as the host made it: boolean (true is visible) or additive.
        """
        return mask

    def is_mask(self, columns: int) -> bool:
        """Whether a tensor with so many columns, added to [.., T, T] scores, is a mask of the host."""
        return False

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, T] what is added to the attention's scores, by key; None for nothing."""
        return None

    def scale_values(self, values: Tensor) -> Tensor:
        """What the attention takes as values instead of [B, H, T, D] or [B * H, T, D]."""
        return values

    def compare(self, queries: Tensor, keys: Tensor) -> None:
        """Queries and keys [B, H, T, D] that the attention compares. Several attentions call it several times."""

    def see_fused(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> None:
        """A fused attention, which does not show its probabilities, compares queries and keys under this mask."""

    def see_probabilities(self, probabilities: Tensor) -> None:
        """The probabilities [.., T, T] of an attention that is not fused."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """The fused attention: [B, H, T, D]."""
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, **options)

    def project(self, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output projection of `nn.MultiheadAttention` on [B, H, T, D]: [T, B, C]."""
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), weight, bias)

    def linear(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """A linear layer of the block, up to the residual."""
        return F.linear(x, *rest, **options)

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        """The residual: what the block goes on with."""
        return torch.add(a, b, **options)

    def summands(self, func: Callable[..., Tensor], a: Any, b: Any) -> tuple[Any, Any]:
        """The summands of an addition behind the residual."""
        return a, b

    def by_head(self, x: Tensor) -> Tensor:
        """[B * H, N, M], or with any other axes in front of N, as [B, H, N, M]."""
        if x.dim() == 4:
            return x
        heads = math.prod(x.shape[:-2]) // self.batch if self.batch else 1
        return x.reshape(self.batch, heads, *x.shape[-2:])

    # Recognition ------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.done:
            return self._behind_residual(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(*args, **kwargs)
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func in _ADD and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            return self._add(func, args[0], args[1], kwargs)
        if func in _MATMUL:
            if self._values_next:
                args = (args[0], self.scale_values(args[1]), *args[2:])
            self._note_product(*args)
        if func in _SOFTMAX and self._is_square(args[0]):
            return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _behind_residual(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._outdated is not None and any(arg is self._outdated for arg in args):
            raise RuntimeError(
                "the block adds its residual in place and goes on with the old tensor: write `y += x` or "
                "`y = y + x` instead of `y.add_(x)`, so that the reduced tokens are what the block sees next"
            )
        if func in _ADD and len(args) == 2:
            args = self.summands(func, *args)
        return func(*args, **kwargs)

    def _is_square(self, scores: Tensor) -> bool:
        return scores.dim() >= 2 and scores.shape[-1] == self.tokens and scores.shape[-2] == self.tokens

    # Fused attention --------------------------------------------------------------------------------------------

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        if not (query.dim() == 4 and query.shape[-2] == self.tokens and key.shape[-2] == self.tokens):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        mask = None if attn_mask is None else self.fit_mask(attn_mask)
        bias, value = self.bias(query.dtype), self.scale_values(value)
        if is_causal and bias is not None:
            # Tokens keep their order, so causality stays a lower triangle at every length.
            mask, is_causal = lower_triangle(self.tokens, query.device), False
        mask = _sum(mask, bias, query.dtype)
        # Grouped-query attention: every query head is compared with the key head that it belongs to.
        groups = query.shape[1] // key.shape[1]
        keys = key if groups == 1 else key.repeat_interleave(groups, 1)
        self.attended = self.has_softmax = True
        self.compare(query, keys)
        self.see_fused(query, keys, mask, is_causal, options.get("scale"))
        return self.attend(query, key, value, mask, dropout_p, is_causal, options)

    def _multi_head_attention(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None,
        in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
        out_weight: Tensor, out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What nn.MultiheadAttention computes, [T, B, C] in and out: torch hides its inside from a mode."""
        if not (query is key is value and query.dim() == 3 and query.shape[0] == self.tokens):
            raise RuntimeError(
                "nn.MultiheadAttention in the block is not plain self-attention over the block's tokens"
                f" [{self.tokens}, {self.batch}, C] (query {list(query.shape)}, key {list(key.shape)})"
            )
        if use_separate_proj_weight or bias_k is not None or add_zero_attn or in_weight is None:
            raise RuntimeError("nn.MultiheadAttention with bias_k, add_zero_attn or separate widths is not supported")
        q, k, v = (_split_heads(part, heads) for part in F.linear(query, in_weight, in_bias).chunk(3, -1))
        mask = _mha_mask(attn_mask, key_padding_mask, self.batch, q.dtype)
        dropout_p = dropout_p if training else 0.0
        if not need_weights:
            return self.project(self._sdpa(q, k, v, mask, dropout_p), out_weight, out_bias), None
        out, weights = self._explicit(q, k, v, mask, dropout_p)
        weights = weights.mean(1) if options.get("average_attn_weights", True) else weights
        # Of all tokens: the weights that the block asked for are of all of them, too.
        return Watch.project(self, out, out_weight, out_bias), weights

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """nn.MultiheadAttention where it returns its weights. Scaled and added as torch does it, to the last bit."""
        mask = _sum(None if mask is None else self.fit_mask(mask), self.bias(q.dtype), q.dtype)
        scaled, keys, v = q * math.sqrt(1.0 / float(q.shape[-1])), k.transpose(-1, -2), self.scale_values(v)
        if mask is None:
            logits = scaled @ keys
        else:
            mask = mask.expand(*q.shape[:2], self.tokens, self.tokens)
            logits = torch.baddbmm(mask.flatten(0, 1), scaled.flatten(0, 1), keys.flatten(0, 1)).view(mask.shape)
        self.attended = self.has_softmax = True
        self.compare(q, k)
        self.see_fused(q, k, mask, False, None)
        weights = logits.softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        return weights @ v, weights

    # Attention as products and a softmax ------------------------------------------------------------------------

    def _note_product(self, a: Any, b: Any, *rest: Any) -> None:
        """Note queries and keys if this is the product of queries [.., T, D] and keys [.., D, T]."""
        tokens = self.tokens
        if self._softmax_next or self._values_next:
            self._values_next = False
            return
        if not (a.dim() >= 3 and a.dim() == b.dim() and a.shape[-2] == tokens and b.shape[-1] == tokens):
            return
        self._softmax_next = self.attended = True
        self.compare(self.by_head(a), self.by_head(b.transpose(-1, -2)))

    def _softmax(self, func: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = self.bias(logits.dtype)
        if bias is not None:
            logits = (self.by_head(logits) + bias).reshape(logits.shape)
        self.has_softmax = True
        self._softmax_next, self._values_next = False, self._softmax_next
        weights = func(logits, *args, **kwargs)
        if self.attended:
            self.see_probabilities(weights)
        return weights

    # Additions --------------------------------------------------------------------------------------------------

    def _add(self, func: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if any(a is known or b is known for known in self.residuals):
            if self.attended and max(a.dim(), b.dim()) == 3 and self.tokens in (a.shape[-2], b.shape[-2]):
                self.done = True
                self._outdated = a if func in IN_PLACE else None
                out = self.add_residual(a, b, kwargs)
                self.residuals.clear()  # the MLP comes now, which needs the most memory
                return out
            total = torch.add(a, b, **kwargs)
            self.residuals.append(total)  # a position embedding, say, that a block adds before its attention
            return total
        if self._adds_mask(a, b):
            batched = a.dim() == b.dim() == 3 and len(b) > 1
            mask = self.fit_mask(b.view(self.batch, -1, *b.shape[-2:]) if batched else b)
            if a.dim() == 4:
                return func(a, mask, **kwargs)
            if mask.dim() == 4:
                mask = mask.expand(self.batch, len(a) // self.batch, *mask.shape[-2:]).flatten(0, 1)
            return func(a, mask, **kwargs)
        return func(a, b, **kwargs)

    def _adds_mask(self, a: Tensor, b: Tensor) -> bool:
        """Whether `b`, a mask or a bias of the host, is added to the scores `a` [.., T, T] of an eager attention."""
        return self._softmax_next and a.dim() >= 3 and self._is_square(a) and self.is_mask(b.shape[-1])


def lower_triangle(tokens: int, device: torch.device) -> Tensor:
    """[T, T] what each query of a causal attention sees: itself, and what is in front of it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true is visible) as one that is added to scores; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _sum(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of a boolean or additive mask and a bias, additive as soon as there is a bias."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return additive(mask, dtype) + bias


def _split_heads(part: Tensor, heads: int) -> Tensor:
    """[T, B, C] -> [B, H, T, D]."""
    tokens, batch, width = part.shape
    return part.reshape(tokens, batch, heads, width // heads).permute(1, 2, 0, 3)


def _mha_mask(mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """nn.MultiheadAttention's masks as one additive mask [1 or B, 1 or H, T or 1, T]."""
    parts = []
    if mask is not None:
        parts.append(mask[None, None] if mask.dim() == 2 else mask.view(batch, -1, *mask.shape[-2:]))
    if padding is not None:
        parts.append(padding[:, None, None, :])
    # There, true means hidden.
    parts = [additive(~part, dtype) if part.dtype == torch.bool else part for part in parts]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
