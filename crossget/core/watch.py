"""How a block is reduced without a copy of its code: the host's own forward runs, and is watched.

A `torch.overrides.TorchFunctionMode` sees every torch function that runs inside a `with` block, before it runs. In a
transformer block two of them matter:

1. The attention: `F.scaled_dot_product_attention`, `F.multi_head_attention_forward`, or a matrix product followed by
   a softmax. Here the keys and queries are noted, log(size) is added on the key side (proportional attention),
   values are multiplied with the norm_correction of their tokens if the reducer wants that, and a mask that the host made
   for its own tokens is brought to the tokens that are left.
2. The first addition, after that, in which one of the summands *is* the block's input: the residual behind the
   attention. Here the sum is computed and reduced, and the host goes on with fewer tokens. Its MLP, layer scale,
   drop path, second norm and second residual all follow, as it never learns how many tokens there were. (Coherence
   has its part in the second residual as well.)

What is not recognised is an error, never a silent no-op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crossget.core.state import TokenState, token_at
from crossget.methods.importance import attention_received, by_attention
from crossget.methods.matching import MergePlan
from crossget.methods.merging import norm_correction
from crossget.methods.reducers import Reducer, View

# Tuples: not every Dynamo can look a function up in a set.
_ADD = (
    torch.Tensor.add,
    torch.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.add_,
    torch.Tensor.__iadd__,
)
_IN_PLACE = (torch.Tensor.add_, torch.Tensor.__iadd__)
_SOFTMAX = (torch.Tensor.softmax, F.softmax, torch.softmax)
_MATMUL = (torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
# An additive mask hides with -inf, with the smallest number, or, as BERT once did, with -10000, which bfloat16 rounds.
_HIDDEN = -9000.0


class BlockWatch(TorchFunctionMode):
    """Watches one run of one block.

    Args:
        tokens: [B, T, C] the block's input.
        state: the tokens' history; replaced by the one behind the reduction.
        reducer: the method, with all fields resolved.
        r: tokens to remove in this block.
        causal: the cross token at the end is hidden from the others.
        cross_like_first: the cross token is a copy of token 0 and takes over its row and column of a mask.
        find_padding: look for padding in the attention's mask.
        one: of the tokens behind the block only one is read: the attention is asked for that one, and the block goes on
            with it alone. All others are left as they came.
    """

    def __init__(
        self, tokens: Tensor, state: TokenState, reducer: Reducer, r: int, *, causal: bool, cross_like_first: bool,
        find_padding: bool, one: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.state, self.reducer, self.r = state, reducer, r
        self.causal, self.cross_like_first, self.find_padding = causal, cross_like_first, find_padding
        self.one = one
        self.around: Tensor | None = None  # [B, T, C] the others, if one alone goes on
        self.batch, self.tokens = int(tokens.shape[0]), int(tokens.shape[1])
        self.residuals = [tokens]
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.received: list[Tensor] = []
        self.scores = False  # a product of queries and keys waits for its softmax
        self.values_next = False  # the product to come is that of weights and values
        self.weighed = False
        self.done = False
        self.fits = False  # the masks among the block's arguments were made for the tokens that are left
        self.score: Tensor | None = None  # what the reducer scored the tokens with
        self.outdated: Tensor | None = None  # what an in-place addition would have changed
        self.left: Tensor | None = None  # the tokens that the block goes on with, if it matters what it adds to them

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.done:
            if self.outdated is not None and any(arg is self.outdated for arg in args):
                raise RuntimeError(
                    "the block adds its residual in place and goes on with the old tensor: write `y += x` or "
                    "`y = y + x` instead of `y.add_(x)`, so that the reduced tokens are what the block sees next"
                )
            if self.left is not None and func in _ADD and len(args) == 2:
                args = self._subdued(func, *args)
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(*args, **kwargs)
        if self.one and func is F.linear and self._is_one_row(args[0]):
            return F.linear(args[0][:, :1], *args[1:], **kwargs).expand(-1, self.tokens, -1)
        if func in _ADD and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            return self._add(func, args[0], args[1], kwargs)
        if func in _MATMUL:
            if self.values_next:
                args = (args[0], self._voiced(args[1]), *args[2:])
            self._note_product(*args)
        if func in _SOFTMAX and tuple(args[0].shape[-2:]) == (self.tokens, self.tokens):
            return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    # The attention ----------------------------------------------------------------------------------------------

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not self._is_ours(query, key):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        mask = self._fit(attn_mask)
        bias, value = self._bias(query.dtype), self._voiced(value)
        if is_causal and bias is not None:
            # Tokens keep their order, so causality stays a lower triangle at every length.
            mask, is_causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=query.device).tril(), False
        mask = _plus(mask, bias, query.dtype)
        self._note(query, key, mask, is_causal, kwargs.get("scale"))
        if self.one:
            if is_causal:
                mask = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=query.device).tril()
            row, mask = self._of_one(query), None if mask is None else self._of_one(mask)
            out = F.scaled_dot_product_attention(row, key, value, mask, dropout_p, **kwargs)
            return out.expand(-1, -1, self.tokens, -1)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **kwargs)

    def _of_one(self, rows: Tensor) -> Tensor:
        """Of [.., T or 1, N] queries, or a mask, the row of the token that is read: [.., 1, N]."""
        end = self.state.end
        if end is None or int(rows.shape[-2]) == 1:
            return rows[..., :1, :]
        rows = rows[(None,) * (4 - rows.dim())].expand(self.batch, -1, -1, -1)
        return rows.gather(2, end[:, None, None, None].expand(-1, rows.shape[1], 1, rows.shape[3]))

    def _is_one_row(self, rows: Tensor) -> bool:
        """Whether [B, T, C] is one row, seen T times: what the attention gave for the token that is read."""
        return rows.dim() == 3 and int(rows.shape[1]) == self.tokens > 1 and rows.stride(1) == 0

    def _multi_head_attention(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None,
        in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
        out_weight: Tensor, out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What nn.MultiheadAttention computes, [T, B, C] in and out: torch hides its inside from a mode."""
        if not (query is key is value and query.dim() == 3 and query.shape[0] == self.tokens):
            raise RuntimeError(
                "nn.MultiheadAttention in the block is not plain self-attention over the block's tokens"
                f" [{self.tokens}, {self.batch}, C] (query {list(query.shape)}, key {list(key.shape)})"
            )
        if use_separate_proj_weight or bias_k is not None or add_zero_attn or in_weight is None:
            raise RuntimeError("nn.MultiheadAttention with bias_k, add_zero_attn or separate widths is not supported")
        q, k, v = (_split(part, heads) for part in F.linear(query, in_weight, in_bias).chunk(3, -1))
        mask = _mha_mask(attn_mask, key_padding_mask, self.batch, q.dtype)
        dropout_p = dropout_p if training else 0.0
        weights = None
        if need_weights:
            out, weights = self._explicit(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if kwargs.get("average_attn_weights", True) else weights
        else:
            out = self._sdpa(q, k, v, mask, dropout_p)
        if self.one and not need_weights:
            row = out[:, :, :1].permute(2, 0, 1, 3).reshape(1, self.batch, -1)
            return F.linear(row, out_weight, out_bias).expand(self.tokens, -1, -1), weights
        out = out.permute(2, 0, 1, 3).reshape(query.shape)
        return F.linear(out, out_weight, out_bias), weights

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        mask, v = _plus(self._fit(mask), self._bias(q.dtype), q.dtype), self._voiced(v)
        # Scaled and added as torch does it, so that r = 0 is exact.
        scaled, keys = q * math.sqrt(1.0 / float(q.shape[-1])), k.transpose(-1, -2)
        if mask is None:
            logits = scaled @ keys
        else:
            mask = mask.expand(*q.shape[:2], self.tokens, self.tokens)
            logits = torch.baddbmm(mask.flatten(0, 1), scaled.flatten(0, 1), keys.flatten(0, 1)).view(mask.shape)
        self._note(q, k, mask, False, None)
        weights = logits.softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        return weights @ v, weights

    def _note_product(self, a: Any, b: Any, *rest: Any) -> None:
        """Note queries and keys if this is the product of queries [.., T, D] and keys [.., D, T]."""
        tokens = self.tokens
        if self.scores or self.values_next:
            self.values_next = False
            return
        if not (a.dim() >= 3 and a.dim() == b.dim() and a.shape[-2] == tokens and b.shape[-1] == tokens):
            return
        heads = (self.batch, -1)
        self._note_heads(a.reshape(*heads, *a.shape[-2:]), b.transpose(-1, -2).reshape(*heads, tokens, b.shape[-2]))
        self.scores = True

    def _softmax(self, func: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = self._bias(logits.dtype)
        if bias is not None:
            heads = logits.reshape(self.batch, -1, self.tokens, self.tokens)
            logits = (heads + bias).reshape(logits.shape)
        self.weighed = True
        self.scores, self.values_next = False, self.scores
        weights = func(logits, *args, **kwargs)
        if self.keys is not None and self._wants_attention():
            heads = weights.detach().reshape(self.batch, -1, self.tokens, self.tokens)
            self.received.append(by_attention(self._heard(heads).float()).mean(1))
        return weights

    def _note(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> None:
        # Grouped-query attention: every query head is compared with the key head it reads.
        key = key if key.shape[1] == query.shape[1] else key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        self._note_heads(query, key)
        self.weighed = True
        if self._wants_attention():
            with torch.no_grad():
                scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
                bias = None if mask is None else _additive(mask, query.dtype)
                if is_causal:
                    hidden = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=query.device).triu(1)
                    bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, -math.inf)[None, None]
                if bias is not None and bias.dim() < 4:
                    bias = bias[(None,) * (4 - bias.dim())]
                bias = bias if bias is None or bias.shape[2] == 1 else self._heard(bias)
                self.received.append(attention_received(self._heard(query), key, bias, scale))

    def _note_heads(self, queries: Tensor, keys: Tensor) -> None:
        """Several attentions in front of one residual (parallel, differential) count as one with all their heads."""
        if self.queries is not None and self.keys is not None:
            queries, keys = torch.cat([self.queries, queries], 1), torch.cat([self.keys, keys], 1)
        self.queries, self.keys = queries, keys

    def _wants_attention(self) -> bool:
        return self.reducer.needs_attention and self.r > 0

    def _heard(self, rows: Tensor) -> Tensor:
        """Of [B, H, T, ..] queries, or what belongs to them, those whose attention the reducer reads."""
        return rows[:, :, :1] if self.reducer.reads_class_token else rows

    def _is_ours(self, query: Tensor, key: Tensor) -> bool:
        return query.dim() == 4 and query.shape[-2] == self.tokens and key.shape[-2] == self.tokens

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """log(size) [B, 1, 1, T]; None while every token stands for itself."""
        if self.state.sizes is None or not self.reducer.proportional_attention:
            return None
        return self.state.sizes.log().to(dtype)[:, None, None, :]

    def _voiced(self, values: Tensor) -> Tensor:
        """Values [B, H, T, D] or [B * H, T, D], each as loud as its token is coherent."""
        if self.state.norm_correction is None:
            return values
        by_head = values.reshape(self.batch, -1, *values.shape[-2:])
        return (by_head * self.state.norm_correction.to(values.dtype)[:, None, :, None]).reshape(values.shape)

    def _subdued(self, func: Callable[..., Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The summands of the second residual: what is added to a token as large as that is coherent."""
        coherent = self.state.norm_correction
        if coherent is None or (a is self.left) == (b is self.left):
            return a, b
        factor = coherent.to(a.dtype)[:, :, None]
        if a is self.left:
            return a, b * factor
        return a.mul_(factor) if func in _IN_PLACE else a * factor, b

    # Masks and biases the host made for its own tokens ------------------------------------------------------------

    def fit(self, mask: Tensor) -> Tensor:
        """A mask among the block's arguments for the tokens that are left.

        The attention's masks are made of such from then on. Their size could not tell: T may be T0 by accident.
        """
        self.fits = True
        return self._fitted(mask)

    def _fit(self, mask: Tensor | None) -> Tensor | None:
        """What the attention got as a mask, for the tokens that are left."""
        return mask if mask is None or self.fits else self._fitted(mask)

    def _fitted(self, mask: Tensor) -> Tensor:
        """The host's mask [.., T0 or 1, T0] for the tokens that are left: [B, .., T or 1, T]."""
        host = mask
        mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 4 else mask
        if self.find_padding and self.state.valid is None:
            self.state.valid = self._padding(mask)
        if int(mask.shape[-1]) == self.tokens and self.state.pristine:
            return host  # as it came: the number of its axes decides which kernel runs
        length, expected = self.state.length, self.state.length + int(self.state.cross)
        if self.state.cross and int(mask.shape[-1]) == expected:
            # Made inside a block, which took the cross token for one more of the host's tokens.
            mask = mask[..., :length, :length] if int(mask.shape[-2]) == expected else mask[..., :length]
        if self.state.cross and int(mask.shape[-1]) == length:
            mask = self._with_cross(mask)
        if int(mask.shape[-1]) != expected or int(mask.shape[-2]) not in (1, expected):
            raise RuntimeError(
                f"the attention got a mask of shape {list(mask.shape)} in a block with {self.tokens} tokens of "
                f"originally {length}: expected {length} keys. The tower's mask cannot follow "
                "its tokens; detach, or give the tower's adapter a way to make the mask"
            )
        rows = self.state.positions
        mask = mask.expand(self.batch, *mask.shape[1:])
        heads = int(mask.shape[1])
        if int(mask.shape[2]) != 1:
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
        return mask.gather(3, rows[:, None, None, :].expand(-1, heads, mask.shape[2], -1))

    def _with_cross(self, mask: Tensor) -> Tensor:
        """A row and a column for the cross token: those of the first token if it copies that.

        Otherwise all see it and it sees what the first token sees; in a causal tower nobody sees it, and it sees
        what the last token sees.
        """
        boolean = mask.dtype == torch.bool
        shown, hidden = (True, False) if boolean else (0.0, -math.inf)
        first = self.cross_like_first and not self.causal
        column = mask[..., :1] if first else torch.full_like(mask[..., :1], hidden if self.causal else shown)
        mask = torch.cat([mask, column], -1)
        if int(mask.shape[-2]) == 1:
            return mask
        row = mask[..., -1:, :] if self.causal else mask[..., :1, :]
        if not first:
            row = torch.cat([row[..., :-1], torch.full_like(row[..., :1], shown)], -1)
        return torch.cat([mask, row], -2)

    def _padding(self, mask: Tensor) -> Tensor:
        """[B, T] which tokens any query (in a causal tower: the last) may see, the cross token among them."""
        seen = visible(mask[:, :, -1:] if self.causal else mask, self.batch)
        if int(seen.shape[1]) < self.tokens:
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        return seen

    # The residual -------------------------------------------------------------------------------------------------

    def _add(self, func: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if any(a is known or b is known for known in self.residuals):
            if self.one and self.keys is not None and a.dim() == 3 and a.shape == b.shape:
                return self._go_on_with_one(func, a, b, kwargs)
            total = torch.add(a, b, **kwargs)
            if self.keys is not None and total.dim() == 3 and int(total.shape[1]) == self.tokens:
                self.outdated = a if func in _IN_PLACE else None
                return self._reduce(total)
            self.residuals.append(total)  # a position embedding, say, that a block adds before its attention
            return total
        if self._adds_mask(a, b):
            mask = self._fit(b.view(self.batch, -1, *b.shape[-2:]) if a.dim() == b.dim() == 3 and len(b) > 1 else b)
            if mask is not None and not self.state.pristine:
                heads = mask if a.dim() == 4 else mask.expand(self.batch, len(a) // self.batch, *a.shape[-2:])
                return func(a, heads.reshape(a.shape) if a.dim() == 3 else heads, **kwargs)
        return func(a, b, **kwargs)

    def _go_on_with_one(self, func: Callable[..., Tensor], a: Tensor, b: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.outdated = a if func in _IN_PLACE else None
        self.around = a if any(a is known for known in self.residuals) else b
        end = self.state.end
        return self._reduce(torch.add(token_at(a, end), token_at(b, end), **kwargs))

    def _adds_mask(self, a: Tensor, b: Tensor) -> bool:
        """Whether `b`, a mask or a bias of the host, is added to the scores `a` [.., T, T] of an eager attention."""
        if not self.scores or a.dim() < 3 or tuple(a.shape[-2:]) != (self.tokens, self.tokens):
            return False
        return int(b.shape[-1]) in (self.state.length, self.state.length + int(self.state.cross))

    def _reduce(self, total: Tensor) -> Tensor:
        self.done = True
        try:
            left = self._left(total)
            self.left = None if self.state.norm_correction is None or self.one else left
            return left
        finally:  # the block's MLP, which needs the most memory, comes now
            self.residuals.clear()
            self.received.clear()
            self.queries = self.keys = None

    def _left(self, total: Tensor) -> Tensor:
        if not self.weighed and self.state.sizes is not None:
            raise RuntimeError(
                "the block's attention has no softmax over its scores that could be seen, so token sizes could not "
                "take part; set proportional_attention=False, or use F.scaled_dot_product_attention in the block"
            )
        if self.r <= 0:
            return total
        reduced = self._reduced(total)
        if reduced is None:
            return total
        tokens, sizes, plan = reduced
        coherent = norm_correction(total, self.state.norm_correction, plan) if self.reducer.norm_correction else None
        self.state = self.state.advance(plan, sizes, coherent)
        return tokens

    def _reduced(self, total: Tensor) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        state = self.state
        queries, keys = _seen(self.queries), _seen(self.keys)
        received = torch.stack(self.received).mean(0) if self.received else None
        view = View(
            total, queries, keys, received, state.sizes, state.protected, state.n_protected, state.valid,
            self._guide(), relevance=state.relevance,
        )  # fmt: skip
        device = total.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self._asked(view)
        with torch.autocast(device, enabled=False):  # the choice of tokens is made in full precision
            return self._asked(view)

    def _asked(self, view: View) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        try:
            reduced = self.reducer.reduce(view, self.r)
        except TypeError as error:
            # Of a TypeError below `x + y` torch says that the two cannot be added, and nothing else.
            raise RuntimeError(f"{type(self.reducer).__name__}.reduce() failed: {error}") from error
        self.score = view.score
        return reduced

    def _guide(self) -> Tensor | int | None:
        if self.state.end is not None:
            return self.state.end
        return self.tokens - 1 if self.state.cross else None


def visible(mask: Tensor, batch: int) -> Tensor:
    """[B, T] which tokens any query may see under a mask [B or 1, H or 1, T or 1, T]."""
    seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
    return seen.any(2).any(1).expand(batch, -1)


def _seen(part: Tensor | None) -> Tensor:
    if part is None:
        raise RuntimeError("the block's residual came before any attention was seen")
    return part


def _split(part: Tensor, heads: int) -> Tensor:
    """[T, B, C] -> [B, H, T, D]."""
    tokens, batch, width = part.shape
    return part.reshape(tokens, batch, heads, width // heads).permute(1, 2, 0, 3)


def _plus(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of a boolean or additive mask and a bias, additive as soon as there is a bias."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return _additive(mask, dtype) + bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _mha_mask(mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """nn.MultiheadAttention's masks as one additive mask [1 or B, 1 or H, T or 1, T]."""
    parts = []
    if mask is not None:
        parts.append(mask[None, None] if mask.dim() == 2 else mask.view(batch, -1, *mask.shape[-2:]))
    if padding is not None:
        parts.append(padding[:, None, None, :])
    # There, true means hidden.
    parts = [_additive(~part, dtype) if part.dtype == torch.bool else part for part in parts]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
