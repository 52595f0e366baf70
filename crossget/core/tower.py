"""One tower in one forward: its cross token, its schedule, and what the host sees of its blocks.

A block is called in two steps (block_class.py). `AttachedTower.call` runs outside of the block's hooks: it finds the
tokens' state, asks the schedule, renews the cross token and writes the record, and so knows the layer.
`AttachedTower.run` runs inside of them: it runs the block's own forward under a `Merge`, and knows no layer, so that a
compiler that compiles blocks one by one shares one graph among them. The two exchange a `BlockRun`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossget.core.adapters import Tower
from crossget.core.block_class import argument_names, base_of, key_of, runner_of
from crossget.core.carried import Notes, Passed, ThreadValue, leave_notes, left_notes, pass_on, passed_with, recomputing
from crossget.core.masks import visible
from crossget.core.reduction import ClassTokenOnly, Merge
from crossget.core.state import Forward, Record, Relevance, Shown, TokenState, Visible, token_at, with_token
from crossget.methods.indexing import size_of, take
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import RampedRatio, Ratio, planned_tokens

# How many texts, where each ends (None: nowhere in particular), and which of their tokens are real (None: all).
TextEnds = tuple[int, "Tensor | None", "Tensor | None"]


class BlockRun:
    """One call of one block: what it is to do, and what it did.

    Attributes:
        state: of the tokens in front of the block.
        r: tokens to remove.
        on_grid: the block gets the host's grid, of which its tokens are some rows.
        cross_token: [B, C] what takes the cross token's place; None without cross token.
        appends: the cross token is not among the tokens that the block gets.
        shows: what the host sees behind the block.
        class_token_only: the block computes one token alone.
        left_out: nobody looks at the block's output, so that it gives its tokens back as they came.
        after: the state behind the block.
        score: [B, T] what the reducer scored the tokens with, or None.
        tokens: [B, T', C] the tokens behind the block, if the forward is recorded.
        left_cross_token: [B, C] the cross token behind the block, where the host does not see it.
    """

    after: TokenState
    left_out: bool = False
    score: Tensor | None = None
    tokens: Tensor | None = None
    left_cross_token: Tensor | None = None

    def __init__(
        self, state: TokenState, r: int, shows: Visible, *, on_grid: bool = False, cross_token: Tensor | None = None,
        appends: bool = False, class_token_only: bool = False,
    ) -> None:  # fmt: skip
        self.state, self.r, self.shows = state, r, shows
        self.on_grid, self.cross_token, self.appends = on_grid, cross_token, appends
        self.class_token_only = class_token_only


class AttachedTower:
    """A tower together with the reducer that works on it.

    Attributes:
        tower: where the blocks are.
        reducer: with every field resolved for this tower.
        holder: the module whose parameter the cross tokens are, by the tower's name; None: nobody's.
        last: record of the last forward.
        recording: forwards that begin now are recorded, see `Attachment.recording`.
        target: [B or 1, E] text features of unit length, see `Attachment.set_text_features`; None: none.
        rows: [N] the prompt that each image of the last forward belongs to; None if each has one of its own.
        noted: what the host's entry points found out for the first block.
        shown: what the host sees of the blocks in the forward that comes now.
        caller: the call that `shown` is for, where nothing else tells that it has ended.
        generating: the host's `generate` runs.
    """

    def __init__(self, tower: Tower, reducer: Reducer) -> None:
        self.tower = tower
        self.last = Record()
        self.recording = False
        self.target: Tensor | None = None
        self.rows: Tensor | None = None
        self.holder: nn.Module | None = None
        self._own_cross: nn.Parameter | None = None
        self._names: dict[type, list[str]] = {}
        self._outputs = 1  # how many things a block returns, if it returns a tuple; 0 if it does not
        self._warned = False
        self.noted: ThreadValue[Any] = ThreadValue()
        self.shown: ThreadValue[Shown] = ThreadValue()
        self.caller: ThreadValue[FrameType] = ThreadValue()
        self.generating: ThreadValue[bool] = ThreadValue()
        self.reducer = reducer
        self.set_reducer(reducer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": Record(), "rows": None}

    # Cross tokens -----------------------------------------------------------------------------------------------

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

    def cross_token(self, origin: Tensor, record: Record, layer: int) -> Tensor:
        """[B, C] the cross token in front of block `layer`: a copy of `origin` [B, C] plus the block's vector."""
        cross = self.cross
        if cross is None:
            raise RuntimeError(f"tower {self.tower.name!r} lost its cross tokens")
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            vector = cross.data[layer]  # a trace takes no constants that require gradients
        else:
            vector = cross[layer]
        token = origin.detach() + vector.to(origin.device, origin.dtype)
        if torch.is_grad_enabled():
            record.cross_tokens[layer] = token
        return token

    # The reducer ------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many blocks the tower has now."""
        return len(self.tower.blocks)

    @property
    def keeps_cross_token(self) -> bool:
        """Whether the reduced tokens that leave the tower include the cross token."""
        return self.tower.keeps_cross_token and bool(self.reducer.cross_token) and not self.reducer.strip_cross_token

    def set_reducer(self, reducer: Reducer) -> None:
        """Use another reducer from the next forward on; cross tokens that exist are kept.

        Raises:
            ValueError: the reducer cannot work on this tower.
        """
        resolved, depth = reducer.resolved(self.tower.facts), self.depth
        for layer in range(depth):
            resolved.schedule.removed(layer, depth, 1)
        if resolved.cross_token and self.cross is None:
            # The first of floating point: quantised weights are integers.
            like = next(p for p in self.tower.blocks[0].parameters() if p.is_floating_point())
            cross = nn.Parameter(torch.zeros((depth, self.tower.width), dtype=like.dtype, device=like.device))
            if self.holder is None:
                self._own_cross = cross
            else:
                self.holder.register_parameter(self.tower.name, cross)
        self.reducer = resolved
        self._warned = False

    def tokens_behind(self, layer: int, tokens: int) -> int:
        """How many of `tokens` the host sees behind block `layer`, where it takes them reduced."""
        if layer < 0:
            return tokens
        cross = int(bool(self.reducer.cross_token))
        reserved = self.tower.n_reserved(bool(cross))
        left = planned_tokens(self.reducer.schedule, self.depth, tokens + cross, reserved)[layer + 1]
        return left - (cross - int(self.keeps_cross_token))

    # A call of a block, outside of its hooks ----------------------------------------------------------------------

    def call(self, block: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the block, with all hooks on it.

        Args:
            block: to be called.
            call: takes the block's arguments and a `BlockRun`, and comes to `run` in the end.
            args: of the call.
            kwargs: of the call.
        """
        names = self._names_of(block)
        tokens = args[0] if args else kwargs[names[0]]
        passed: Passed | None = passed_with(tokens)
        if passed is None or passed.state.forward.owner is not self:
            layer, run = 0, self._first(block, tokens, {**dict(zip(names[1:], args[1:])), **kwargs})  # noqa: B905
        else:
            layer, run = passed.layer, self._next(tokens, passed)
        state, forward = run.state, run.state.forward
        forward.record.tokens[layer] = size_of(state.positions, 1)
        run.left_out = not self._is_looked_at(forward, layer)
        out = call(*args, run=run, **kwargs)
        self._leave(out, run, layer)
        return out

    def _first(self, block: nn.Module, tokens: Tensor, arguments: Mapping[str, Any]) -> BlockRun:
        """The run of the first block."""
        self._check_first(block, tokens)
        batch, length = size_of(tokens, 0), size_of(tokens, 1)
        if recomputing():
            notes = left_notes(tokens)
        else:
            notes = Notes(self.noted.get(), self.shown_now())
            self.noted.set(None)
            leave_notes(tokens, notes)
        end, valid = self._text_ends(tokens, notes.input)
        if self.tower.padding and valid is None:
            candidates = ("attn_mask", *self.tower.masks)
            mask = next((arguments[name] for name in candidates if arguments.get(name) is not None), None)
            if mask is not None and mask.dim() == 4:  # otherwise, the attention's mask is looked at when it is seen
                valid = visible(mask[:, :, -1:] if self.tower.causal else mask, batch)
        tower = self.tower
        forward = Forward(
            self, self.reducer, self.depth, length, prefix=tower.prefix, causal=tower.causal,
            class_token=tower.class_token, padding=tower.padding, has_end=end is not None,
            shown=notes.shown or self.shown_by_default(), relevance=self._relevance(batch),
        )  # fmt: skip
        if self.recording and not torch.compiler.is_compiling():
            forward.record.blocks = {}
        state = TokenState.start(forward, batch, tokens.device, end=end, valid=valid)
        token = None
        if forward.cross:
            origin = self._origin(tokens, valid) if end is None else token_at(tokens, end)
            token = self.cross_token(origin.squeeze(1), forward.record, 0)
        return self._run_of(state, 0, cross_token=token, appends=True)

    def _next(self, tokens: Tensor, passed: Passed) -> BlockRun:
        """The run of any other block."""
        state, layer = passed.state, passed.layer
        forward, token = state.forward, None
        if layer >= forward.depth:
            raise RuntimeError(
                f"tower {self.tower.name!r} has {forward.depth} blocks, and one is called after the last: its host "
                "runs them in another order than the tower lists them"
            )
        if forward.cross:
            origin = passed.cross_token
            if state.end is not None:
                place = state.positions.gather(1, state.end[:, None]).squeeze(1) if passed.on_grid else state.end
                origin = token_at(tokens, place).squeeze(1)
            token = self.cross_token(tokens[:, -1] if origin is None else origin, forward.record, layer)
        hidden = passed.cross_token is not None
        return self._run_of(state, layer, cross_token=token, appends=hidden, on_grid=passed.on_grid)

    def _run_of(self, state: TokenState, layer: int, **given: Any) -> BlockRun:
        forward = state.forward
        last = layer == forward.depth - 1
        shows = forward.shown.behind if last else forward.shown.between
        one = last and forward.shown.class_token_only
        if one:
            forward.record.class_token_only = True
        tokens = size_of(state.positions, 1)
        r = 0 if one else forward.reducer.schedule.removed(layer, forward.depth, tokens)
        return BlockRun(state, r, shows, class_token_only=one, **given)

    def _leave(self, out: Any, run: BlockRun, layer: int) -> None:
        """Write the record, and leave the state on what the block returns."""
        state, forward = run.after, run.after.forward
        record, last = forward.record, layer == forward.depth - 1
        self._outputs = len(out) if isinstance(out, tuple) else 0
        record.source = state.source[:, : forward.length]
        if record.blocks is not None and run.tokens is not None:
            record.blocks[layer] = state.record_of(run.tokens, run.score)
        if layer > 0 or last:  # the first block alone may be the recomputation of a checkpoint
            self.last = record
        if last:
            self._warn_of_unspent(record, forward)
        else:
            shown = out[0] if isinstance(out, tuple) else out
            passed = Passed(state, layer + 1, run.shows == "grid" and state.changed, run.left_cross_token)
            pass_on(shown, passed)

    def _is_looked_at(self, forward: Forward, layer: int) -> bool:
        """Whether block `layer` has to run: it, or one behind it, is looked at.

        In training the last cross tokens are wanted too: then only a block behind which there is none is left out.
        """
        if layer == 0 or layer <= forward.shown.last or self._outputs > 1:
            return True
        return layer < forward.depth - 1 and forward.cross and torch.is_grad_enabled()

    def shown_by_default(self) -> Shown:
        """What the host sees where no method of it that has a say runs."""
        return Shown("tokens", "grid" if self.tower.restore else self.reduced, self.depth - 1)

    def shown_now(self) -> Shown | None:
        """What the host sees, as the call says that runs now; None: no call of it says anything."""
        caller = self.caller.get()
        if caller is None or torch.compiler.is_compiling():
            return self.shown.get()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not caller:
            frame = frame.f_back
        if frame is None:  # that call was broken off
            self.forget_shown()
        return self.shown.get()

    def forget_shown(self) -> None:
        """The call that said what the host sees has ended."""
        self.shown.set(None)
        self.caller.set(None)

    @contextlib.contextmanager
    def in_generate(self) -> Iterator[None]:
        """Inside, the host's `generate` runs, which returns nothing of what a tower computes on the way."""
        outer = self.generating.get()
        self.generating.set(True)
        try:
            yield
        finally:
            self.generating.set(outer)

    @property
    def reduced(self) -> Visible:
        """How the host sees reduced tokens."""
        return "tokens" if self.keeps_cross_token or not self.reducer.cross_token else "without_cross_token"

    # A call of a block, inside of its hooks -----------------------------------------------------------------------

    def run(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, run: BlockRun) -> Any:
        """Run `forward`, the block's own, on fewer tokens. Nothing here depends on the layer."""
        names = self._names_of(block)
        tokens, args, kwargs = split_tokens(names, args, kwargs)
        state = run.state.to(tokens.device)
        if run.left_out:
            return self._as_they_came(tokens, state, run)
        if run.on_grid:
            tokens = take(tokens, state.positions[:, : size_of(state.positions, 1) - int(run.appends)])
        if run.cross_token is None:
            return self._reduced(block, forward, tokens, state, args, kwargs, run)
        token = run.cross_token.to(tokens.device, tokens.dtype)
        if run.appends:
            tokens = torch.cat([tokens, token[:, None]], 1)
        elif _may_be_lent(tokens):
            # Written over for the time of this block alone: the host may have kept what the block before returned.
            place = tokens[:, -1]
            before = place.clone()
            place.copy_(token)
            try:
                return self._reduced(block, forward, tokens, state, args, kwargs, run)
            finally:
                place.copy_(before)
        else:
            tokens = torch.cat([tokens[:, :-1], token[:, None]], 1)
        return self._reduced(block, forward, tokens, state, args, kwargs, run)

    def _reduced(
        self, block: nn.Module, forward: Callable[..., Any], tokens: Tensor, state: TokenState, args: Any, kwargs: Any,
        run: BlockRun,
    ) -> Any:  # fmt: skip
        watch = ClassTokenOnly(tokens, state) if run.class_token_only else Merge(tokens, state, run.r)
        if not state.pristine:
            names = self._names_of(block)
            args = tuple(self._fit(block, name, value, watch) for name, value in zip(names[1:], args))  # noqa: B905
            kwargs = {name: self._fit(block, name, value, watch) for name, value in kwargs.items()}
        with watch:
            out = forward(tokens, *args, **kwargs)
        if not watch.done:
            raise RuntimeError(self._not_seen(block, watch))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(watch, ClassTokenOnly) and watch.others is not None:
            first = with_token(watch.others, first, watch.state.end)
        run.after, run.score = watch.state, watch.score
        if state.forward.record.blocks is not None:
            run.tokens = first
        shown = self._shown(first, watch.state, run)
        if isinstance(out, tuple):
            return (shown, *out[1:])
        return shown

    def _as_they_came(self, tokens: Tensor, state: TokenState, run: BlockRun) -> Any:
        """What a block returns that nobody looks at."""
        run.after = state
        if run.appends:
            run.left_cross_token = run.cross_token
        tokens = tokens.view_as(tokens)  # what is on the tensor itself belongs to the block in front
        if state.forward.record.blocks is not None:
            run.tokens = tokens
        return tokens if self._outputs == 0 else (tokens,)

    def _fit(self, block: nn.Module, name: str, value: Any, watch: Merge) -> Any:
        """An argument of the block for the tokens that are left."""
        if name in self.tower.masks and value is not None:
            return watch.fit_argument(value)
        fit = self.tower.fit_arguments
        return value if fit is None else fit(block, name, value, watch.state)

    def _shown(self, tokens: Tensor, state: TokenState, run: BlockRun) -> Tensor:
        """What the host sees of the tokens behind the block."""
        if run.shows == "tokens" or state.pristine:
            return tokens
        if state.cross:
            run.left_cross_token = tokens[:, -1].detach().clone()
        return state.restored(tokens) if run.shows == "grid" else tokens[:, :-1]

    # The first block's input ----------------------------------------------------------------------------------------

    def _check_first(self, block: nn.Module, tokens: Tensor) -> None:
        name = self.tower.name
        if tokens.dim() != 3:
            raise RuntimeError(f"tower {name!r} got tokens of shape {list(tokens.shape)}: expected [B, T, C]")
        if key_of(block) != key_of(self.tower.blocks[0]):
            raise RuntimeError(
                f"block {key_of(block)} of tower {name!r} got tokens {list(tokens.shape)} without their state: "
                "something made a new tensor between two blocks (re-entrant checkpointing, for instance: use "
                "use_reentrant=False), or the block was called on its own"
            )
        if torch.compiler.is_compiling():
            return
        strangers = [i for i, one in enumerate(self.tower.blocks) if runner_of(one) is None]
        if strangers:
            raise RuntimeError(
                f"blocks {strangers} of tower {name!r} came after crossget.attach and are not attached: detach, and "
                "attach again"
            )

    def _text_ends(self, tokens: Tensor, found: TextEnds | None) -> tuple[Tensor | None, Tensor | None]:
        """Where the texts end, and which of their tokens are real."""
        if self.tower.text is None:
            return None, None
        batch, length, _ = tokens.shape
        if found is None or found[0] != batch:
            seen = "no token ids" if found is None else f"token ids of {found[0]} texts"
            raise RuntimeError(
                f"tower {self.tower.name!r} got {batch} texts of {length} tokens, and its embedding saw {seen} before: "
                "call the model's own encode_text (or forward) with token ids, or Attachment.set_text_ids(ids) first"
            )
        return found[1:]

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

    def _relevance(self, batch: int) -> Relevance | None:
        target, embed = self.target, self.tower.embed
        if target is None:
            return None
        if embed is None or target.shape[0] not in (1, batch):
            raise RuntimeError(
                f"tower {self.tower.name!r} got {batch} images and text features of {target.shape[0]} texts: give "
                "Attachment.set_text_features one for all images, or one each"
            )
        return Relevance(embed, target)

    # Messages -----------------------------------------------------------------------------------------------------

    def _names_of(self, block: nn.Module) -> list[str]:
        """The names of the block's arguments."""
        cls = base_of(block)
        if cls not in self._names:
            self._names[cls] = argument_names(cls.forward)
        return self._names[cls]

    def _warn_of_unspent(self, record: Record, forward: Forward) -> None:
        """Say once that the schedule asks for more tokens than the blocks could remove."""
        depth, schedule = forward.depth, forward.reducer.schedule
        if self._warned or torch.compiler.is_compiling() or isinstance(schedule, Ratio | RampedRatio):
            return
        self._warned = True
        counts = [record.tokens[layer] for layer in sorted(record.tokens)]
        if len(counts) < depth:
            return
        wishes = [schedule.removed(layer, depth, count) for layer, count in enumerate(counts)]
        short = [
            layer
            for layer, (wish, count) in enumerate(zip(wishes, counts, strict=True))
            if layer < depth - 1 and count - counts[layer + 1] < wish
        ]
        if short:
            asked, removed = sum(wishes[:-1]), counts[0] - counts[-1]
            warnings.warn(
                f"r of {forward.reducer} asks tower {self.tower.name!r} to remove {asked} tokens, and its blocks "
                f"remove {removed} of {counts[0]}: from block {short[0]} on there are fewer tokens left than r needs "
                "(a block removes at most half of its unprotected tokens). Give a smaller r",
                stacklevel=2,
            )

    def _not_seen(self, block: nn.Module, watch: Merge) -> str:
        what = "no residual addition behind its attention" if watch.attended else "no attention over its tokens"
        where = f"block {key_of(block)} ({type(block).__name__}) of tower {self.tower.name!r}"
        return (
            f"{where} showed {what} ({watch.tokens} tokens): expected F.scaled_dot_product_attention, "
            "nn.MultiheadAttention or matmul and softmax over [.., T, T], then an addition to the block's own input. "
            "See docs/backbones.md for what can be watched"
        )


def split_tokens(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
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
