"""A tower with the reducer that works on it: what happens when one of its blocks is called.

Its blocks run on fewer and fewer tokens, under a `BlockWatch`. (A language model that generates is not reduced:
decoder.py.) Below stands what the host's entry points tell the blocks.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from crossget.core.adapters import IntermediatesHook, SingleTokenOutput, Tower
from crossget.core.block_class import argument_names, base_of
from crossget.core.state import Record, Relevance, TokenState, carried, carry, token_at, with_token
from crossget.core.watch import BlockWatch, visible
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import planned_tokens

T = TypeVar("T")
_NOTED, _READING = "_crossget_noted", "_crossget_reading"
# How many texts, where each ends (None: nowhere in particular), and which of their tokens are real (None: all).
TextEnds = tuple[int, "Tensor | None", "Tensor | None"]


class ByThread(Generic[T]):
    """A value, or None, for each thread; copies start with none.

    While a graph is traced the value is an attribute: Dynamo follows that, but neither threading.local nor, in every
    host, changes of a dict. A graph is traced by one thread at a time, and what is set while tracing is used up then.
    """

    def __init__(self) -> None:
        self.values: dict[int, T] = {}
        self.traced: T | None = None

    def get(self) -> T | None:
        """The value of this thread."""
        return self.traced if torch.compiler.is_compiling() else self.values.get(threading.get_ident())

    def set(self, value: T | None) -> None:
        """Another value for this thread; None forgets it."""
        if torch.compiler.is_compiling():
            self.traced = value
        elif value is None:
            self.values.pop(threading.get_ident(), None)
        else:
            self.values[threading.get_ident()] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return ByThread, ()


class Reading(NamedTuple):
    """What a host method that runs now looks at.

    Attributes:
        layers: behind which blocks; None: behind any.
        grid: on the full grid.
        last: the block behind which nobody looks.
        one: behind that, at one token alone.
    """

    layers: frozenset[int] | None
    grid: bool
    last: int
    one: bool = False


class AttachedTower:
    """A tower together with the reducer that works on it: what its blocks consult.

    Attributes:
        tower: where the blocks are.
        reducer: with every field resolved for this tower.
        holder: the module whose parameter the cross tokens are, by the tower's name; None: nobody's.
        last: record of the last forward.
        recording: forwards that begin now are recorded, see `Attachment.recording`.
        target: [B or 1, E] what the user looks for, of unit length; None: nothing.
        rows: [N] the prompt that each image of the last forward belongs to; None if each has one of its own.
    """

    def __init__(self, tower: Tower, reducer: Reducer) -> None:
        self.tower = tower
        self.inputs = {type(block): argument_names(base_of(block).forward) for block in tower.blocks}
        self.last = Record()
        self.recording = False
        self.target: Tensor | None = None
        self.rows: Tensor | None = None
        self.holder: nn.Module | None = None
        self._own_cross: nn.Parameter | None = None
        self.outputs = 1  # how many things a block returns, if it returns a tuple
        # What the host's entry points know and its blocks do not.
        self.noted: ByThread[Any] = ByThread()
        self.reading: ByThread[Reading] = ByThread()
        self.generating: ByThread[bool] = ByThread()
        self.arrived: ByThread[Tensor] = ByThread()
        self.left: ByThread[Any] = ByThread()
        self.reducer = reducer
        self.set_reducer(reducer)

    @property
    def cross(self) -> nn.Parameter | None:
        """[L, C] one learnable vector per block, zero at the start; None without cross token.

        Where they are a module's parameter they are looked up there each time: sharding (FSDP2) puts others in place.
        """
        if self.holder is None:
            return self._own_cross
        return cast("nn.Parameter | None", getattr(self.holder, self.tower.name, None))

    def register(self, holder: nn.Module | None) -> None:
        """Make the cross tokens a parameter of `holder`; None: nobody's any more."""
        cross, self.holder = self.cross, holder
        if holder is None:
            self._own_cross = cross
        elif cross is not None:
            self._own_cross = None
            holder.register_parameter(self.tower.name, cross)

    @property
    def depth(self) -> int:
        """How many blocks."""
        return len(self.tower.blocks)

    @property
    def keeps_cross_token(self) -> bool:
        """Whether the reduced tokens that leave the tower include the cross token."""
        return self.tower.keeps_cross_token and bool(self.reducer.cross_token) and not self.reducer.strip_cross_token

    def set_reducer(self, reducer: Reducer) -> None:
        """Use another reducer from the next forward on; cross tokens that exist are kept."""
        resolved = reducer.resolved(self.tower.host)
        for layer in range(self.depth):
            resolved.schedule.removed(layer, self.depth, 1)
        if resolved.cross_token and self.cross is None:
            # The first of floating point: quantised weights are integers.
            like = next(p for p in self.tower.blocks[0].parameters() if p.is_floating_point())
            cross = nn.Parameter(torch.zeros((self.depth, self.tower.width), dtype=like.dtype, device=like.device))
            if self.holder is None:
                self._own_cross = cross
            else:
                self.holder.register_parameter(self.tower.name, cross)
        self.reducer = resolved

    def tokens_behind(self, layer: int, tokens: int) -> int:
        """How many of `tokens` the host sees behind block `layer`, where it reads them reduced."""
        if layer < 0:
            return tokens
        cross = int(bool(self.reducer.cross_token))
        reserved = self.tower.n_reserved(bool(cross))
        left = planned_tokens(self.reducer.schedule, self.depth, tokens + cross, reserved)[layer + 1]
        return left - (cross - int(self.keeps_cross_token))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": Record(), "rows": None}

    # One block ------------------------------------------------------------------------------------------------------

    def call(self, block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block, and keep what is left on its tokens though hooks put other tensors in their place.

        FSDP2's hooks exchange what a block gets, DeepSpeed's also what it returns.
        """
        outer = self.arrived.get()
        self.left.set(None)
        self.arrived.set(take_tokens(self.inputs[base_of(block)], args, kwargs)[0])
        try:
            out = call(*args, **kwargs)
        finally:
            self.arrived.set(outer)
        left = self.left.get()
        self.left.set(None)
        if left is not None:
            carry(out[0] if isinstance(out, tuple) else out, left)
        return out

    def bearers(self, tokens: Tensor) -> list[Tensor]:
        """The tensors of a block's tokens: as it got them, and as the host gave them if hooks have exchanged them.

        What is left on them is left on both: the recomputation of a checkpoint may begin on either side of the hooks.
        """
        arrived = self.arrived.get()
        if arrived is None or arrived is tokens or arrived.shape != tokens.shape:
            return [tokens]
        return [tokens, arrived]

    def leave(self, tokens: Tensor, state: Any) -> None:
        """Leave a state on a block's output, for the next one."""
        carry(tokens, state)
        if self.arrived.get() is not None:
            self.left.set(state)

    def run(self, block: nn.Module, layer: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `forward`, the host's own, on fewer tokens."""
        names = self.inputs[base_of(block)]
        tokens, args, kwargs = take_tokens(names, args, kwargs)
        if layer == 0:
            tokens, state = self._start(tokens, {**dict(zip(names[1:], args)), **kwargs})  # noqa: B905
        else:
            tokens, state = self._continue(tokens, layer)
        out, state = self._run(block, layer, forward, tokens, state, args, kwargs)
        return self._leave(out, state, layer)

    def _run(
        self, block: nn.Module, layer: int, forward: Callable[..., Any], tokens: Tensor, state: TokenState, args: Any,
        kwargs: Any,
    ) -> tuple[Any, TokenState]:  # fmt: skip
        """Run `forward` on tokens that all have this state; the cross token is renewed."""
        state.record.tokens[layer] = int(tokens.shape[1])
        renewed = layer > 0 and bool(self.reducer.cross_token)
        if self._is_read_by_nobody(state.reading, layer):
            if renewed and torch.is_grad_enabled():
                self._next_cross_token(tokens, state, layer)  # the alignment loss wants it
            state.note_step(layer, tokens, None)
            return tokens if self.outputs == 0 else (tokens,), state
        if not renewed:
            return self._reduced(block, layer, forward, tokens, state, args, kwargs)
        token = self._next_cross_token(tokens, state, layer)
        if not _may_be_lent(tokens):
            tokens = torch.cat([tokens[:, :-1], token[:, None]], 1)
            return self._reduced(block, layer, forward, tokens, state, args, kwargs)
        # Written over for the time of this block alone: the host may have kept what the block before returned.
        place = tokens[:, -1]
        before = place.clone()
        place.copy_(token)
        try:
            return self._reduced(block, layer, forward, tokens, state, args, kwargs)
        finally:
            place.copy_(before)

    def _reduced(
        self, block: nn.Module, layer: int, forward: Callable[..., Any], tokens: Tensor, state: TokenState, args: Any,
        kwargs: Any,
    ) -> tuple[Any, TokenState]:  # fmt: skip
        """Run `forward` on these tokens, the cross token among them."""
        names = self.inputs[base_of(block)]
        count = int(tokens.shape[1])
        one = layer == self.depth - 1 and state.reading is not None and state.reading.one
        r = 0 if one else self.reducer.schedule.removed(layer, self.depth, count)
        watch = BlockWatch(
            tokens, state, self.reducer, r, causal=self.tower.causal, cross_like_first=self.tower.class_token,
            find_padding=self.tower.padding, one=one,
        )  # fmt: skip
        if not state.pristine:
            args = tuple(self._refit(block, name, value, watch) for name, value in zip(names[1:], args))  # noqa: B905
            kwargs = {name: self._refit(block, name, value, watch) for name, value in kwargs.items()}
        with watch:
            out = forward(tokens, *args, **kwargs)
        if not watch.done:
            raise RuntimeError(_not_seen(block, layer, self.tower, watch))
        self.outputs = len(out) if isinstance(out, tuple) else 0
        state, first = watch.state, out[0] if isinstance(out, tuple) else out
        if watch.around is not None:
            state.record.read_one = True
            first = with_token(watch.around, first, state.end)
            out = (first, *out[1:]) if isinstance(out, tuple) else first
        state.note_step(layer, first, watch.score)
        return out, state

    def _refit(self, block: nn.Module, name: str, value: Any, watch: BlockWatch) -> Any:
        """An argument of the block for the tokens that are left."""
        if name in self.tower.masks and value is not None:
            return watch.fit(value)
        return value if self.tower.fit_arguments is None else self.tower.fit_arguments(block, name, value, watch.state)

    def _start(self, tokens: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, TokenState]:
        if tokens.dim() != 3:
            raise RuntimeError(
                f"tower {self.tower.name!r} got tokens of shape {list(tokens.shape)}: expected one sequence [B, T, C]"
            )
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        end, valid = self._end_of_text(tokens)
        if self.tower.padding and valid is None:
            names = ("attn_mask", *self.tower.masks)
            mask = next((arguments[name] for name in names if arguments.get(name) is not None), None)
            if mask is not None and mask.dim() == 4:  # otherwise, the attention's mask is looked at when it is seen
                valid = visible(mask[:, :, -1:] if self.tower.causal else mask, batch)
        cross = bool(self.reducer.cross_token)
        state = TokenState.start(
            batch, length, tokens.device, cross=cross, prefix=self.tower.prefix, end=end, valid=valid
        )
        state.reading = _left_on(self.bearers(tokens), _READING, self.reading.get())
        if self.recording and not torch.compiler.is_compiling():
            state.record.steps = {}
            state.weights = torch.ones_like(state.source, dtype=torch.float32)
        if self.target is not None:
            state.relevance = self._relevance(self.target, batch)
        if cross:
            origin = self._origin(tokens, valid) if end is None else token_at(tokens, end)
            tokens = torch.cat([tokens, self.cross_token(origin.squeeze(1), state.record, 0)[:, None]], 1)
        return tokens, state

    def _relevance(self, target: Tensor, batch: int) -> Relevance:
        embed = self.tower.embed
        if embed is None or int(target.shape[0]) not in (1, batch):
            raise RuntimeError(
                f"tower {self.tower.name!r} got {batch} images and looks for {int(target.shape[0])} texts: give "
                "Attachment.set_text_features one for all of them, or one each"
            )
        return Relevance(embed, target)

    def _origin(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """What the cross token of a tower without ends of text starts as: [B, 1, C]."""
        if self.tower.class_token:
            return tokens[:, :1]
        if valid is None:
            return tokens[:, self.tower.prefix :].mean(1, keepdim=True)
        real = valid[:, :, None].to(tokens.dtype)
        if self.tower.text is None:
            tokens, real = tokens[:, self.tower.prefix :], real[:, self.tower.prefix :]
        return (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)

    def _end_of_text(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.tower.text is None:
            return None, None
        found: TextEnds | None = take_note(self, tokens)
        batch, length, _ = tokens.shape
        if found is None or found[0] != batch:
            seen = "no token ids" if found is None else f"token ids of {found[0]} texts"
            raise RuntimeError(
                f"tower {self.tower.name!r} got {batch} texts of {length} tokens, and its embedding saw {seen} before: "
                "call the model's own encode_text (or forward) with token ids, or Attachment.set_text_ids(ids) first"
            )
        return found[1:]

    def _continue(self, tokens: Tensor, layer: int) -> tuple[Tensor, TokenState]:
        state = state_of(self.bearers(tokens), layer, self.tower)
        if state.compact is not None:
            tokens = state.compact
        return tokens, state

    def _next_cross_token(self, tokens: Tensor, state: TokenState, layer: int) -> Tensor:
        """[B, C] what takes the cross token's place in front of block `layer`."""
        origin = tokens[:, -1] if state.end is None else token_at(tokens, state.end).squeeze(1)
        return self.cross_token(origin, state.record, layer)

    def cross_token(self, origin: Tensor, record: Record, layer: int) -> Tensor:
        """[B, C] the cross token in front of block `layer`."""
        cross = self.cross
        if cross is None:
            raise RuntimeError(f"tower {self.tower.name!r} lost its cross tokens")
        token = origin.detach() + cross[layer].to(origin.device, origin.dtype)
        if torch.is_grad_enabled():
            record.cross_tokens[layer] = token
        return token

    def _is_read_by_nobody(self, reading: Reading | None, layer: int) -> bool:
        """Whether block `layer` lies behind all that are read, so that it need not run.

        In training the last cross tokens are wanted too: then only a block behind which there is none is left out.
        """
        if layer == 0 or reading is None or layer <= reading.last or self.outputs > 1:
            return False
        return layer == self.depth - 1 or not (self.reducer.cross_token and torch.is_grad_enabled())

    def _leave(self, out: Any, state: TokenState, layer: int) -> Any:
        tokens = out[0] if isinstance(out, tuple) else out
        last = layer == self.depth - 1
        state.record.source = state.source[:, : state.length]
        shown = self._shown(tokens, state, layer)
        if layer > 0 or last:  # the first block alone may be the recomputation of a checkpoint
            self.last = state.record
        if not last:
            if shown is not tokens:
                # A state of its own: where nothing was removed this is still that of the block's input, which the
                # recomputation of a gradient checkpoint begins with.
                state = copy.copy(state)
                state.compact = tokens
            self.leave(shown, state)
        return (shown, *out[1:]) if isinstance(out, tuple) else shown

    def _shown(self, tokens: Tensor, state: TokenState, layer: int) -> Tensor:
        """What the host sees behind block `layer`."""
        reading: Reading | None = state.reading
        read, grid = layer == self.depth - 1, self.tower.restore
        if reading is not None:
            read, grid = read or reading.layers is None or layer in reading.layers, reading.grid
        if not read:
            return tokens
        if grid:
            return state.restored(tokens)
        return tokens[:, :-1] if state.cross and not self.keeps_cross_token else tokens


# What the host's entry points know --------------------------------------------------------------------------------


def note(attached: AttachedTower, what: Any, tokens: Tensor | None = None) -> None:
    """Keep something for the first block of the forward that comes now.

    Args:
        attached: whose.
        what: it is.
        tokens: what the first block will get, if that is known. What it was noted for earlier is forgotten.
    """
    if tokens is not None:
        setattr(tokens, _NOTED, None)
    attached.noted.set(what)


def take_note(attached: AttachedTower, tokens: Tensor) -> Any:
    """What was noted, or None."""
    bearers = attached.bearers(tokens)
    known = _left_on(bearers, _NOTED, None)
    if known is not None:
        return known
    found = attached.noted.get()
    attached.noted.set(None)
    return _left_on(bearers, _NOTED, found)


def _left_on(bearers: list[Tensor], name: str, value: Any) -> Any:
    """A value that is left on the first block's input, where the recomputation of a checkpoint finds it again."""
    if value is None:
        value = next((found for one in bearers if (found := getattr(one, name, None)) is not None), None)
    if value is not None:
        for one in bearers:
            setattr(one, name, value)
    return value


def read_between(
    attached: AttachedTower, reader: IntermediatesHook, names: list[str], original: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run a host method that looks at the tokens between the blocks, and show it what it expects there."""
    if attached.reading.get() is not None:  # from inside another such method, which has said what it wants
        return original(*args, **kwargs)
    layers = None if reader.layers is None else reader.layers({**dict(zip(names, args)), **kwargs})  # noqa: B905
    skips = layers is not None and (reader.hides_rest or bool(attached.generating.get()))
    last = max(layers) if layers is not None and skips else attached.depth
    attached.reading.set(Reading(None if layers is None else frozenset(layers), reader.grid, last))
    try:
        return original(*args, **kwargs)
    finally:
        attached.reading.set(None)


def read_one(attached: AttachedTower, readout: SingleTokenOutput) -> bool:
    """Say that the host method that runs from now on looks at one token; returns whether it does.

    Not if another one that has said what it wants calls it.
    """
    if (
        not attached.reducer.class_token_only
        or attached.reading.get() is not None
        or not readout.applies(readout.module)
    ):
        return False
    attached.reading.set(Reading(frozenset(), True, attached.depth, one=True))
    return True


def read_it(attached: AttachedTower) -> None:
    """Such a method has ended."""
    reading = attached.reading.get()
    if reading is not None and reading.one:
        attached.reading.set(None)


def reading_one(
    attached: AttachedTower, readout: SingleTokenOutput, original: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run such a method."""
    if not read_one(attached, readout):
        return original(*args, **kwargs)
    try:
        return original(*args, **kwargs)
    finally:
        read_it(attached)


@contextlib.contextmanager
def generating(attached: AttachedTower) -> Iterator[None]:
    """Inside, the host's `generate` runs, which returns nothing of what a tower computes on the way."""
    outer = attached.generating.get()
    attached.generating.set(True)
    try:
        yield
    finally:
        attached.generating.set(outer)


def state_of(bearers: list[Tensor], layer: int, tower: Tower) -> Any:
    """What block `layer - 1` left on the tokens, of which these are the tensors.

    Raises:
        RuntimeError: it is lost.
    """
    tokens, state = bearers[0], next((found for one in bearers if (found := carried(one)) is not None), None)
    if state is None:
        raise RuntimeError(
            f"block {layer} of tower {tower.name!r} got tokens {list(tokens.shape)} without their state: something "
            "made a new tensor between two blocks (re-entrant checkpointing, for instance: use use_reentrant=False; or "
            "a model spread over several devices), or the block was called on its own"
        )
    for one in bearers:
        carry(one, state)
    return state


def take_tokens(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """A block's first argument, and the others."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop(names[0]), (), rest


def _may_be_lent(tokens: Tensor) -> bool:
    """Whether a token may be written over for a while, instead of copying all of them: no gradient needs them."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or tokens.requires_grad:
        return False
    return tokens.is_inference() == torch.is_inference_mode_enabled()


def _not_seen(block: nn.Module, layer: int, tower: Tower, watch: BlockWatch) -> str:
    what = "no attention over its tokens" if watch.keys is None else "no residual addition behind its attention"
    return (
        f"block {layer} ({type(block).__name__}) of tower {tower.name!r} showed {what} ({watch.tokens} tokens): "
        "expected F.scaled_dot_product_attention, nn.MultiheadAttention or matmul and softmax over [.., T, T], then an "
        "addition to the block's own input. See docs/adapters.md for what can be watched"
    )
