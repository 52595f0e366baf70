"""Recognising the attention and the residual of a transformer block that runs its own, unchanged code.

A `torch.overrides.TorchFunctionMode` intercepts every torch function that is called inside a `with` statement. `Watch`
is such a mode. Among the functions of a block, it recognises two:

1. The attention: `F.scaled_dot_product_attention`, `F.multi_head_attention_forward`, or a matrix product that is
   followed by a softmax.
2. The residual: the first addition after the attention in which one of the summands *is* the block's input.

There it calls its hook methods, which subclasses override. Those of `Watch` itself change nothing. This file imports
nothing of the package: it depends on no reduction method, tower or model.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# The functions themselves: tools replace the attributes of torch.nn.functional by wrappers of these.
SDPA, LINEAR = torch._C._nn.scaled_dot_product_attention, torch._C._nn.linear
PLUS = torch.add
MULTI_HEAD_ATTENTION = F.multi_head_attention_forward
# Tuples, as some versions of Dynamo cannot trace a look-up of a function in a set.
ADD = (
    torch.Tensor.add,
    torch.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.add_,
    torch.Tensor.__iadd__,
    operator.add,  # strict torch.export gives the functions of `operator` for Python's operators
    operator.iadd,
)
SOFTMAX = (torch.Tensor.softmax, F.softmax, torch.softmax)
MATMUL = (torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, operator.matmul)
GET_ITEM = (torch.Tensor.__getitem__, operator.getitem)
_WATCHED = frozenset((SDPA, MULTI_HEAD_ATTENTION, LINEAR, torch.einsum, *ADD, *SOFTMAX, *MATMUL))
_WITH_INPUT = (LINEAR, F.softmax, torch.softmax, torch.add, torch.matmul)  # their first argument is called `input`
IN_PLACE = (torch.Tensor.add_, torch.Tensor.__iadd__, operator.iadd)
# A mode is told the method that torch.Tensor has at the time, and the function of torch.nn.functional, which a tool may
# have replaced by a wrapper.
_REPLACEABLE: dict[Any, tuple[str, ...]] = {
    torch.Tensor: (
        "add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__",
        "mul_", "__imul__", "div", "__truediv__", "matmul", "__matmul__", "bmm", "softmax", "view", "reshape",
        "__getitem__",
    ),
    F: ("softmax", "multi_head_attention_forward", "layer_norm", "rms_norm", "normalize"),
}  # fmt: skip
_ORIGINALS = [(holder, name, getattr(holder, name)) for holder, names in _REPLACEABLE.items() for name in names]


def replaced_functions() -> dict[Any, Any]:
    """The wrappers that tools have put in the place of functions of torch -> the functions."""
    if torch.compiler.is_compiling():
        return {}
    found = ((getattr(holder, name), original) for holder, name, original in _ORIGINALS)
    return {now: original for now, original in found if now is not original}


class Watch(TorchFunctionMode):
    """Recognises the attention and the residual in one call of one block.

    Args:
        tokens: [B, T, C] the block's input, or the same tokens in another layout.
        batch, n_tokens: B and T.
        replaced: what `replaced_functions` has returned, where several blocks share it; None: it is called here.

    Attributes:
        batch, tokens: B and T.
        residual_inputs: the tensors that count as the block's input: `tokens`, and its sums with other tensors before
            the attention (a position embedding, say).
        attention_seen: the attention was recognised.
        softmax_seen: its softmax was recognised, so that `key_bias` has been added to its scores.
        residual_seen: the residual was recognised. What follows in the block is not searched any more.
    """

    def __init__(self, tokens: Tensor, batch: int, n_tokens: int, replaced: dict[Any, Any] | None = None) -> None:
        super().__init__()
        self.batch, self.tokens = batch, n_tokens
        self._replaced = replaced_functions() if replaced is None else replaced
        # Most functions of a block are passed on at once. Dynamo cannot look up a function in a set.
        self._passes_others = False
        if not torch.compiler.is_compiling():  # a compiled graph keeps sizes symbolic; torch.jit.trace needs ints
            self.batch, self.tokens = int(self.batch), int(self.tokens)
            self._passes_others = not self._replaced
        self.residual_inputs = [tokens]
        self.attention_seen = self.softmax_seen = self.residual_seen = False
        self._softmax_next = False  # the product of queries and keys was seen, but not its softmax
        self._values_next = False  # the softmax was seen, but not the product of probabilities and values
        self._in_place_target: Tensor | None = None  # the tensor that an in-place residual should have changed
        # A wrapper that counts has counted a function before it gets here. Inside of nn.MultiheadAttention it has not.
        self.kernel: Callable[..., Tensor] = SDPA

    # Hook methods -----------------------------------------------------------------------------------------------

    def fit_mask(self, mask: Tensor) -> Tensor:
        """The mask or bias that the attention uses instead of the host's, for T tokens.

        Args:
            mask: the host's mask or bias, boolean (true: attended to) or additive. It may be for another number of
                tokens than T.
        """
        return mask

    def is_mask_width(self, columns: int) -> bool:
        """Whether a tensor [.., columns] that is added to attention scores [.., T, T] is a mask of the host."""
        return False

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, T] a term per key that is added to the attention scores; None for none."""
        return None

    def scale_values(self, values: Tensor) -> Tensor:
        """The values that the attention uses instead of `values` [B, H, T, D] or [B * H, T, D]."""
        return values

    def on_queries_and_keys(self, queries: Tensor, keys: Tensor) -> None:
        """Called with the queries and keys [B, H, T, D] of every attention before the residual."""

    def on_fused_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> None:
        """Called with the inputs of an attention whose probabilities are not available.

        Args:
            queries: [B, H, T, D].
            keys: [B, H, T, D].
            mask: the host's mask plus `key_bias`; None: neither.
            is_causal: the attention is causal, and `mask` is None.
            scale: factor of the attention scores; None: 1 / sqrt(D).
        """

    def on_probabilities(self, probabilities: Tensor) -> None:
        """Called with the probabilities [.., T, T] of an attention that is not fused."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Computes the fused attention: [B, H, T, D]."""
        return self.kernel(query, key, value, mask, dropout, is_causal, **options)

    def project_output(self, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the output projection of `nn.MultiheadAttention`, from [B, H, T, D] to [T, B, C]."""
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), weight, bias)

    def linear(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Computes a linear layer of the block. Called until the residual is recognised."""
        return LINEAR(x, *rest, **options)

    def add_residual(self, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
        """Computes the residual a + b. The rest of the block uses the result."""
        return PLUS(a, b, **options)

    def scale_summands(self, func: Callable[..., Tensor], a: Any, b: Any) -> tuple[Any, Any]:
        """The summands that an addition `func` after the residual uses instead of a and b."""
        return a, b

    def by_head(self, x: Tensor) -> Tensor:
        """[B * H, N, M], or with any other axes in front of N, as [B, H, N, M]."""
        if x.dim() == 4:
            return x
        heads = math.prod(x.shape[:-2]) // self.batch if self.batch else 1
        return x.reshape(self.batch, heads, *x.shape[-2:])

    @property
    def complete(self) -> bool:
        """All that is needed was recognised."""
        return self.residual_seen

    def is_sequence(self, x: Tensor) -> bool:
        """Whether a tensor has the shape of the block's tokens, with any number of channels."""
        return x.dim() == 3 and x.shape[1] == self.tokens

    def known(self, func: Any) -> Any:
        """The function of torch that `func` is or, if a tool has put it in the place of one, stands for.

        The wrapper itself is not called: it has been, if the function was, and an operator does not call it.
        """
        return self._replaced.get(func, func) if self._replaced else func

    # Recognition ------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._passes_others and func not in _WATCHED:
            return func(*args, **kwargs)
        func = self.known(func)
        if not args and "input" in kwargs and func in _WITH_INPUT:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"), *([kwargs.pop("other")] if "other" in kwargs else []))
        if self.residual_seen:
            return self._after_residual(func, args, kwargs)
        if func is SDPA:
            return self._sdpa(*args, **kwargs)
        if func is MULTI_HEAD_ATTENTION:
            return self._multi_head_attention(*args, **kwargs)
        if func is LINEAR:
            return self.linear(*args, **kwargs)
        if func in ADD and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            return self._add(func, args[0], args[1], kwargs)
        if func is torch.einsum:
            args = self._see_einsum(*args)
        if func in MATMUL:
            if self._values_next:
                args = (args[0], self.scale_values(args[1]), *args[2:])
            self._see_product(*args)
        if func in SOFTMAX and self._is_square(args[0]):
            return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _after_residual(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._in_place_target is not None and any(arg is self._in_place_target for arg in args):
            raise RuntimeError(
                "the block adds its residual in place and goes on with the old tensor, which is not reduced: write "
                "`y += x` or `y = y + x` instead of `y.add_(x)`"
            )
        if func in ADD and len(args) == 2:
            args = self.scale_summands(func, *args)
        return func(*args, **kwargs)

    def _is_square(self, scores: Tensor) -> bool:
        """Whether the shape is [.., T, T]."""
        return scores.dim() >= 2 and scores.shape[-1] == self.tokens and scores.shape[-2] == self.tokens

    # Fused attention --------------------------------------------------------------------------------------------

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        if query.dim() == 3 and self.batch and query.shape[-2] == key.shape[-2] == self.tokens:
            return self._sdpa_of_rows(query, key, value, attn_mask, dropout_p, is_causal, options)
        if not (query.dim() == 4 and query.shape[-2] == self.tokens and key.shape[-2] == self.tokens):
            return self.kernel(query, key, value, attn_mask, dropout_p, is_causal, **options)
        mask = None if attn_mask is None else self.fit_mask(attn_mask)
        bias, value = self.key_bias(query.dtype), self.scale_values(value)
        if is_causal and bias is not None:
            # The remaining tokens keep their order, so a causal mask is a lower triangle at every length.
            mask, is_causal = lower_triangle(self.tokens, query.device), False
        mask = _sum(mask, bias, query.dtype)
        # Grouped-query attention: the keys are repeated to one head per query head.
        groups = query.shape[1] // key.shape[1]
        keys = key if groups == 1 else key.repeat_interleave(groups, 1)
        self.attention_seen = self.softmax_seen = True
        self.on_queries_and_keys(query, keys)
        self.on_fused_attention(query, keys, mask, is_causal, options.get("scale"))
        return self.attend(query, key, value, mask, dropout_p, is_causal, options)

    def _sdpa_of_rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Computes the fused attention of [B * H, T, D]."""
        rows = query.shape[0]
        if mask is not None:
            mask = self.fit_mask(mask if mask.dim() < 3 else mask.view(self.batch, -1, *mask.shape[-2:]))
        bias, value = self.key_bias(query.dtype), self.scale_values(value)
        if is_causal and bias is not None:
            mask, is_causal = lower_triangle(self.tokens, query.device), False
        mask = _sum(mask, bias, query.dtype)
        self.attention_seen = self.softmax_seen = True
        self.on_queries_and_keys(self.by_head(query), self.by_head(key))
        self.on_fused_attention(self.by_head(query), self.by_head(key), mask, is_causal, options.get("scale"))
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(self.batch, rows // self.batch, *mask.shape[-2:]).flatten(0, 1)
        return self.kernel(query, key, value, mask, dropout_p, is_causal, **options)

    def _multi_head_attention(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None,
        in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
        out_weight: Tensor, out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Computes `F.multi_head_attention_forward`, from [T, B, C] to [T, B, C].

        A mode cannot intercept the functions inside of it.

        Raises:
            RuntimeError: it is no self-attention over the block's tokens, or uses an option that is not supported.
        """
        if not (query is key is value and query.dim() == 3 and query.shape[0] == self.tokens):
            raise RuntimeError(
                "nn.MultiheadAttention in the block is not plain self-attention over the block's tokens"
                f" [{self.tokens}, {self.batch}, C] (query {list(query.shape)}, key {list(key.shape)})"
            )
        if use_separate_proj_weight or bias_k is not None or add_zero_attn or in_weight is None:
            raise RuntimeError("nn.MultiheadAttention with bias_k, add_zero_attn or separate widths is not supported")
        self.kernel = F.scaled_dot_product_attention
        q, k, v = (_split_heads(part, heads) for part in F.linear(query, in_weight, in_bias).chunk(3, -1))
        mask = _mha_mask(attn_mask, key_padding_mask, self.batch, q.dtype)
        dropout_p = dropout_p if training else 0.0
        if not need_weights:
            return self.project_output(self._sdpa(q, k, v, mask, dropout_p), out_weight, out_bias), None
        out, weights = self._explicit(q, k, v, mask, dropout_p)
        weights = weights.mean(1) if options.get("average_attn_weights", True) else weights
        # Not `self.project_output`: with need_weights the output, like the weights, is that of all tokens.
        return Watch.project_output(self, out, out_weight, out_bias), weights

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """The attention of `nn.MultiheadAttention` with need_weights: output and weights, bit for bit as torch's."""
        mask = _sum(None if mask is None else self.fit_mask(mask), self.key_bias(q.dtype), q.dtype)
        scaled, keys, v = q * math.sqrt(1.0 / float(q.shape[-1])), k.transpose(-1, -2), self.scale_values(v)
        if mask is None:
            logits = scaled @ keys
        else:
            mask = mask.expand(*q.shape[:2], self.tokens, self.tokens)
            logits = torch.baddbmm(mask.flatten(0, 1), scaled.flatten(0, 1), keys.flatten(0, 1)).view(mask.shape)
        self.attention_seen = self.softmax_seen = True
        self.on_queries_and_keys(q, k)
        weights = logits.softmax(-1)
        self.on_probabilities(weights)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        return weights @ v, weights

    # Attention as products and a softmax ------------------------------------------------------------------------

    def _see_product(self, a: Any, b: Any, *rest: Any) -> None:
        """If this is a product of queries [.., T, D] and keys [.., D, T], pass them on to `on_queries_and_keys`."""
        tokens = self.tokens
        if self._softmax_next or self._values_next:
            self._values_next = False
            return
        if not (a.dim() >= 3 and a.dim() == b.dim() and a.shape[-2] == tokens and b.shape[-1] == tokens):
            return
        self._softmax_next = self.attention_seen = True
        self.on_queries_and_keys(self.by_head(a), self.by_head(b.transpose(-1, -2)))

    def _see_einsum(self, equation: Any, *operands: Any) -> tuple[Any, ...]:
        """The arguments of an einsum, which may be a product of queries and keys, or of probabilities and values."""
        if not (isinstance(equation, str) and len(operands) == 2 and "->" in equation and "." not in equation):
            return equation, *operands
        terms, _, out = equation.replace(" ", "").partition("->")
        first, second = terms.split(",")
        if self._values_next:
            return equation, *self._scaled_values(first, second, out, *operands)
        (query, queries), (key, keys) = (first, operands[0]), (second, operands[1])
        if len(out) > 1 and out[-2] in key:
            (query, queries), (key, keys) = (key, keys), (query, queries)
        summed = [letter for letter in query if letter in key and letter not in out]
        if self._softmax_next or len(out) < 3 or len(summed) != 1 or out[-2] not in query or out[-1] not in key:
            return equation, *operands
        if out[-2] in key or out[-1] in query:
            return equation, *operands
        sizes = {**dict(zip(query, queries.shape, strict=True)), **dict(zip(key, keys.shape, strict=True))}
        if sizes[out[-2]] != self.tokens or sizes[out[-1]] != self.tokens:
            return equation, *operands
        self._softmax_next = self.attention_seen = True
        heads = [sizes[letter] for letter in out[:-2]]

        def with_heads(letters: str, x: Tensor, row: str) -> Tensor:
            own = [letter for letter in out[:-2] if letter in letters]
            x = torch.einsum(f"{letters}->{''.join(own)}{row}{summed[0]}", x)
            shape = [size if letter in own else 1 for letter, size in zip(out[:-2], heads, strict=True)]
            return self.by_head(x.reshape(*shape, *x.shape[-2:]).expand(*heads, -1, -1))

        self.on_queries_and_keys(with_heads(query, queries, out[-2]), with_heads(key, keys, out[-1]))
        return equation, *operands

    def _scaled_values(self, first: str, second: str, out: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of an einsum, with scaled values if it is the product of probabilities and values.

        It sums over the last axis of the probabilities, that of the keys. An einsum that mixes their heads does not.
        """
        if self._sums_over_keys(first, second, out, a):
            b = self._scaled_axis(second, first, b)
        elif self._sums_over_keys(second, first, out, b):
            a = self._scaled_axis(first, second, a)
        return a, b

    def _sums_over_keys(self, term: str, other: str, out: str, probabilities: Tensor) -> bool:
        """Whether an einsum sums over the last axis of its operand [.., T, T], which the other operand has, too."""
        queries = [i for i, letter in enumerate(term) if letter in out and letter not in other]
        return (
            len(term) > 2
            and term[-1] in other
            and term[-1] not in out
            and probabilities.shape[-1] == self.tokens
            and any(probabilities.shape[i] == self.tokens for i in queries)
        )

    def _scaled_axis(self, term: str, probabilities: str, values: Tensor) -> Tensor:
        """The scaled values, in the axes `term`."""
        self._values_next = False
        keys, channels = term.index(probabilities[-1]), [i for i, x in enumerate(term) if x not in probabilities]
        if len(channels) != 1:
            raise RuntimeError(f"the values of an attention could not be told in einsum terms {probabilities}, {term}")
        order = [i for i in range(values.dim()) if i not in (keys, channels[0])] + [keys, channels[0]]
        scaled = self.scale_values(values.permute(order))
        return scaled.permute([order.index(i) for i in range(values.dim())])

    def _softmax(self, func: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = self.key_bias(logits.dtype)
        if bias is not None:
            logits = (self.by_head(logits) + bias).reshape(logits.shape)
        self.softmax_seen = True
        self._softmax_next, self._values_next = False, self._softmax_next
        weights = func(logits, *args, **kwargs)
        if self.attention_seen:
            self.on_probabilities(weights)
        return weights

    # Additions --------------------------------------------------------------------------------------------------

    def _add(self, func: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if any(a is candidate or b is candidate for candidate in self.residual_inputs):
            if self.attention_seen and (self.is_sequence(a) or self.is_sequence(b)):
                self.residual_seen = True
                if func in IN_PLACE:
                    self._in_place_target, self._passes_others = a, False
                out = self.add_residual(a, b, kwargs)
                self.residual_inputs.clear()  # free the memory: the MLP, which needs the most, comes next
                return out
            total = PLUS(a, b, **kwargs)
            self.residual_inputs.append(total)  # such as a position embedding that the block adds before its attention
            return total
        if self._adds_mask(a, b):
            batched = a.dim() == b.dim() == 3 and b.shape[0] > 1
            mask = self.fit_mask(b.view(self.batch, -1, *b.shape[-2:]) if batched else b)
            if a.dim() == 4:
                return func(a, mask, **kwargs)
            if mask.dim() == 4:
                mask = mask.expand(self.batch, a.shape[0] // self.batch, *mask.shape[-2:]).flatten(0, 1)
            return func(a, mask, **kwargs)
        return func(a, b, **kwargs)

    def _adds_mask(self, a: Tensor, b: Tensor) -> bool:
        """Whether `a` are the scores [.., T, T] of an eager attention, and `b` is a mask or a bias of the host."""
        return self._softmax_next and a.dim() >= 3 and self._is_square(a) and self.is_mask_width(b.shape[-1])


def lower_triangle(tokens: int, device: torch.device) -> Tensor:
    """[T, T] the boolean mask of a causal attention: a query attends to itself and to earlier tokens."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: attended to) as an additive one; an additive mask unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _sum(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of a boolean or additive mask and a bias. It is additive if there is a bias."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return additive(mask, dtype) + bias


def _split_heads(part: Tensor, heads: int) -> Tensor:
    """[T, B, C] -> [B, H, T, D]."""
    tokens, batch, width = part.shape
    return part.reshape(tokens, batch, heads, width // heads).permute(1, 2, 0, 3)


def _mha_mask(mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """The two masks of nn.MultiheadAttention as one additive mask [1 or B, 1 or H, T or 1, T]."""
    parts = []
    if mask is not None:
        parts.append(mask[None, None] if mask.dim() == 2 else mask.view(batch, -1, *mask.shape[-2:]))
    if padding is not None:
        parts.append(padding[:, None, None, :])
    # In a boolean mask of nn.MultiheadAttention, true means not attended to.
    parts = [additive(~part, dtype) if part.dtype == torch.bool else part for part in parts]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
