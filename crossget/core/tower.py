"""One tower in one forward: its schedule, its cross token, and what its blocks return to the host.

A block is called in two steps (block_class.py). `AttachedTower.call_block` runs outside of the block's hooks. It gets
the tokens' state, asks the schedule for `r`, computes the cross token and writes the record, so it depends on the
layer. `AttachedTower.run_forward` runs inside of the hooks. It runs the block's own forward under a `Merge` and does
not depend on the layer: if blocks are compiled one by one, they share one graph. A `BlockCall` passes values between
the two.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.adapters import RECOGNISED_KERNELS, Tower
from crossget.core.block_class import Call, argument_names, base_of, key_of, owner_of
from crossget.core.carried import (
    Carried,
    EntryInfo,
    HandedOver,
    ThreadValue,
    get_carried,
    recomputing,
    set_carried,
    store_entry_info,
    stored_entry_info,
)
from crossget.core.layout import with_tables
from crossget.core.masks import visible
from crossget.core.reduction import ClassTokenOnly, Merge
from crossget.core.state import (
    Forward,
    ForwardRecord,
    HostOutputs,
    OutputForm,
    TokenState,
    replace_token,
    token_at,
)
from crossget.core.tables import TableOperands
from crossget.core.updates import Updates
from crossget.core.watch import SDPA
from crossget.methods.indexing import size_of, take
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import Aligned, RampedRatio, Ratio, by_length, planned_tokens

TextEnds = tuple[int, "Tensor | None", "Tensor | None"]
"""Number of texts B; [B] index of each end-of-text token (None: the tower has none); [B, T] false for padding (None:
there is no padding, or it is found in the attention's mask)."""


class BlockCall(Call):
    """One call of one block: its inputs and its results.

    Attributes:
        state: of the tokens before the block.
        r: number of tokens to remove.
        by_length: [T + 1] see `crossget.core.reduction.Merge`.
        output_form: what the block returns to the host.
        input_is_full_grid: the block's input is the full grid, and its tokens are the rows at `state.positions`.
        cross_token: [B, C] the cross token for this block; None: the method has none.
        appends_cross_token: the input does not include the cross token. Otherwise it is the input's last token, which
            is replaced.
        class_token_only: the block computes one token only.
        skipped: the host does not use the block's output, so the block is not computed and returns its input.
        alone: the block is compiled by itself, and this call is outside of its graph. What it returns is no view, which
            would be another kind of input for the graph of the next block.
        uncompiled: see `Call`.
        n_returned: number of values that the previous block has returned as a tuple; 0: it has returned a tensor.
        state_after: of the tokens after the block.
        score: [B, T] the importance scores that the reducer used; None: it used none.
        recorded_tokens: [B, T', C] the tokens after the block, if the forward is recorded; otherwise None.
        hidden_cross_token: [B, C] the cross token after the block, if the output does not include it; otherwise None.
    """

    state_after: TokenState
    skipped: bool = False
    alone: bool = False
    n_returned: int = 0
    score: Tensor | None = None
    recorded_tokens: Tensor | None = None
    hidden_cross_token: Tensor | None = None

    def __init__(
        self, state: TokenState, r: int, output_form: OutputForm, *, by_length: Tensor | None = None,
        input_is_full_grid: bool = False, cross_token: Tensor | None = None, appends_cross_token: bool = False,
        class_token_only: bool = False,
    ) -> None:  # fmt: skip
        self.state, self.r, self.by_length, self.output_form = state, r, by_length, output_form
        self.input_is_full_grid = input_is_full_grid
        self.cross_token, self.appends_cross_token = cross_token, appends_cross_token
        self.class_token_only = class_token_only


class AttachedTower:
    """A tower with the reducer that is attached to it. It is the `Runner` of the tower's blocks.

    Attributes:
        tower: the blocks, and the facts about them.
        parameter_owner: the module that has the cross vectors as a parameter, under the tower's name; None: no module.
        handed_over: what the blocks have left on their outputs, for outputs that the host copies.
        recording: forwards that begin now are recorded, see `Attachment.recording`.
        prompt_of_image: [N] index of the prompt that each image of the last forward belongs to; None: one image each.
        text_info: `EntryInfo.text`, set by an entry point of the host for the first block.
        outputs: what the blocks return in the forward that begins next, set by an entry point of the host; None: the
            default.
        caller: the frame of the call that set `outputs`, where an interruption can end that call unnoticed.
        generating: forwards run as in the host's `generate`, see `Attachment.generating`.
        prompt_is_short: the host's `generate` runs, and has been given a prompt that fits the reduced tokens.
        identity: tells this tower from others, see `crossget.core.image_prompts`. Copies have the same one.
        compiled: the modes (with gradients, training) for which compiled code of a block that is not the first exists,
            where blocks are compiled one by one.
    """

    def __init__(self, tower: Tower, reducer: Reducer) -> None:
        self.tower = tower
        self.handed_over = HandedOver()
        self.identity = uuid.uuid4().hex
        self.compiled: set[tuple[bool, bool]] = set()
        self._records: ThreadValue[ForwardRecord] = ThreadValue()
        self._latest_record = ForwardRecord()
        self.recording = False
        self.prompt_of_image: Tensor | None = None
        self.parameter_owner: nn.Module | None = None
        self._per_block = False
        self._own_cross_vectors: nn.Parameter | None = None
        self._argument_names: dict[type, list[str]] = {}
        self._warned = False
        self.updates = Updates()
        self.text_info: ThreadValue[Any] = ThreadValue()
        self.outputs: ThreadValue[HostOutputs] = ThreadValue()
        self.caller: ThreadValue[FrameType] = ThreadValue()
        self.generating: ThreadValue[bool] = ThreadValue()
        self.prompt_is_short: ThreadValue[bool] = ThreadValue()
        self._reducer_of_thread: ThreadValue[Reducer] = ThreadValue()
        self._reducer = self._latest_reducer = reducer
        self.set_reducer(reducer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest_record": ForwardRecord(), "prompt_of_image": None}

    @property
    def last_record(self) -> ForwardRecord:
        """The record of this thread's last forward. If the thread has run none, that of the last one in any thread.

        Compiled forwards are those of all threads.
        """
        own = self._records.traced or self._records.values.get(threading.get_ident())
        return self._latest_record if own is None else own

    @last_record.setter
    def last_record(self, record: ForwardRecord) -> None:
        self._records.set(record)
        if not torch.compiler.is_compiling():
            self._records.traced, self._latest_record = None, record

    # Cross tokens -----------------------------------------------------------------------------------------------

    @property
    def cross_parameters(self) -> list[nn.Parameter]:
        """One [L, C], or L of [C] each, one per block; empty if the method has no cross token.

        If they are parameters of a module, they are looked up there every time, as sharding (FSDP2) replaces
        parameters.
        """
        found: Any = self._own_cross_vectors
        if self.parameter_owner is not None:
            found = getattr(self.parameter_owner, self.parameter_name, None)
        if found is None:
            return []
        return list(found) if isinstance(found, nn.ParameterList) else [found]

    @property
    def cross_vectors(self) -> Tensor | None:
        """[L, C] one learnable vector per block, initially zero; None: the method has no cross token.

        It is the parameter itself, or a copy of the parameters of all blocks.
        """
        found = self.cross_parameters
        if not found or found[0].dim() == 2:
            return found[0] if found else None
        return torch.stack(list[Tensor](found))

    @property
    def parameter_name(self) -> str:
        """The name of the cross vectors in the module that owns them."""
        return self.tower.name.replace(".", "_")  # torch allows no dot

    def register(self, owner: nn.Module | None, per_block: bool = False) -> None:
        """Make the cross vectors parameters of the module `owner`, one per block or one; None: of no module."""
        found = self.cross_parameters
        self.parameter_owner, self._per_block = owner, per_block
        if owner is None:
            self._own_cross_vectors = _joined(found)
        elif found:
            self._own_cross_vectors = None
            self._give(owner, found[0])

    def _give(self, owner: nn.Module, vectors: nn.Parameter) -> None:
        """Make the vectors [L, C] parameters of a module."""
        if self._per_block:
            rows = (nn.Parameter(row.clone(), vectors.requires_grad) for row in vectors.detach())
            owner.add_module(self.parameter_name, nn.ParameterList(rows))
        else:
            owner.register_parameter(self.parameter_name, vectors)

    def set_cross_vectors(self, values: Tensor) -> None:
        """Write the values [L, C] into the cross vectors."""
        found = self.cross_parameters
        with torch.no_grad():
            for parameter, value in zip(found, values[None] if found[0].dim() == 2 else values, strict=True):
                parameter.copy_(value)

    def make_cross_token(self, origin: Tensor, record: ForwardRecord, layer: int) -> Tensor:
        """[B, C] the cross token of block `layer`: `origin` [B, C] without gradient, plus the block's vector."""
        found = self.cross_parameters
        if not found:
            raise RuntimeError(
                f"tower {self.tower.name!r} has no cross tokens, though its reducer needs them: detach, and "
                "attach again"
            )
        # A trace takes no constants that require gradients.
        is_tracing = not torch.compiler.is_compiling() and torch._C._is_tracing()
        vectors, row = (found[0], layer) if found[0].dim() == 2 else (found[layer], ...)
        vector = (vectors.data if is_tracing else vectors)[row]
        token = origin.detach() + vector.to(origin.device, origin.dtype)
        if torch.is_grad_enabled():
            record.cross_tokens[layer] = token
            if layer == 0:
                self._notice_untrained(found[0])
        return token

    def _notice_untrained(self, vectors: Tensor) -> None:
        """Warn, once per attachment, if the tower is trained and its cross tokens are not."""
        first = self.tower.blocks[0]
        if not first.training or not _is_eager() or recomputing():
            return
        if self.updates.leave_out(self.tower.blocks, vectors):
            owner_of(first).warn_untrained(self.tower.name)

    def weights_loaded(self) -> None:
        """See `Runner.weights_loaded`."""
        self.updates.restart()

    # The reducer ------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The present number of blocks of the tower."""
        return self.tower.depth

    def keeps_cross_token(self, reducer: Reducer) -> bool:
        """Whether the reduced tokens that the tower returns to the host include the cross token, under a reducer."""
        return self.tower.keeps_cross_token and reducer.cross_token and not reducer.strip_cross_token

    def set_reducer(self, reducer: Reducer) -> None:
        """Set the reducer of the forwards that begin from now on. Cross vectors that exist are kept.

        Raises:
            ValueError: the reducer cannot work on this tower.
        """
        resolved, depth = reducer.resolved(self.tower.facts), self.depth
        for layer in range(depth):
            resolved.schedule.removed(layer, depth, 1)  # raises if the schedule is not for this number of blocks
        if resolved.cross_token and not self.cross_parameters:
            # The first parameter of floating point: quantised weights are integers.
            like = next(p for p in self.tower.blocks[0].parameters() if p.is_floating_point())
            device = like.device if not like.is_meta else _execution_device(self.tower.blocks[0])
            vectors = nn.Parameter(torch.zeros((depth, self.tower.width), dtype=like.dtype, device=device))
            if self.parameter_owner is None:
                self._own_cross_vectors = vectors
            else:
                self._give(self.parameter_owner, vectors)
        if self._reducer_of_thread.get() is None:
            self._reducer = resolved
        else:
            self._reducer_of_thread.set(resolved)
        self._latest_reducer = resolved
        self._warned = False

    @property
    def reducer(self) -> Reducer:
        """The method, with every field resolved for this tower, in this thread.

        Compiled code has no threads. It gets the one that was set last.
        """
        if torch.compiler.is_compiling():
            return self._latest_reducer
        own = self._reducer_of_thread.get()
        return self._reducer if own is None else own

    @contextlib.contextmanager
    def own_reducer(self) -> Iterator[None]:
        """Context in which `set_reducer` is for this thread only. At its end the reducer is as before."""
        before, latest = self._reducer_of_thread.get(), self._latest_reducer
        self._reducer_of_thread.set(self.reducer)
        try:
            yield
        finally:
            self._reducer_of_thread.set(before)
            self._latest_reducer = latest

    def tokens_after(self, layer: int, tokens: int) -> int:
        """The number of reduced tokens that block `layer` returns to the host, of `tokens` that the first one gets.

        With layer -1, it is `tokens`.
        """
        if layer < 0:
            return tokens
        reducer = self.reducer
        cross, reserved = int(reducer.cross_token), self.tower.n_reserved(reducer.cross_token)
        remaining = planned_tokens(reducer.schedule, self.depth, tokens + cross, reserved)[layer + 1]
        return remaining - (cross - int(self.keeps_cross_token(reducer)))

    # A call of a block, outside of its hooks ----------------------------------------------------------------------

    def call_block(self, block: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See `Runner.call_block`."""
        names = self._names_of(block)
        host_tokens = args[0] if args else kwargs[names[0]]
        carried: Carried | None = get_carried(host_tokens)
        if carried is None or carried.state.forward.owner is not self:
            carried = self._find_carried(block, host_tokens)
        if carried is None:
            arguments = {**dict(zip(names[1:], args[1:])), **kwargs}  # noqa: B905
            layer, n_returned, block_call = 0, 0, self._first_call(block, host_tokens, arguments)
        else:
            layer, n_returned = carried.layer, carried.n_returned
            block_call = self._later_call(host_tokens, carried)
        state, forward = block_call.state, block_call.state.forward
        forward.record.tokens[layer] = size_of(state.positions, 1)
        block_call.skipped = not self._must_compute(forward, layer, n_returned)
        block_call.n_returned = n_returned
        block_call.alone = _compiled_alone(block)
        if torch.compiler.is_compiling():
            out = proceed(*args, block_call=block_call, **kwargs)
        else:
            try:
                out = proceed(*args, block_call=block_call, **kwargs)
            except BaseException as error:
                self.handed_over.forget()
                if not isinstance(error, Exception) or isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                kernel = _unknown_kernel(block)
                if kernel and kernel not in str(error):
                    raise RuntimeError(f"{self._named(block)} fails: {error}{kernel}") from error
                if isinstance(error, RuntimeError) and not state.unmodified and "size" in str(error):
                    raise RuntimeError(self._failed(block, state, error)) from error
                raise
        if block_call.uncompiled:  # no view, see `TokenState.advance`
            after = block_call.state_after
            block_call.state_after = replace(after, protected=after.protected.clone())
        self._finish(out, block_call, layer)
        if layer > 0 and block_call.alone:
            self.compiled.add(_mode(block))
        return out

    def _find_carried(self, block: nn.Module, tokens: Tensor) -> Carried | None:
        """The state of tokens that have lost it; None: they are those of a new forward."""
        if not _is_eager():
            return None
        key, blocks = key_of(block), self.tower.blocks
        found = self.handed_over.candidates(tokens, lambda layer: layer < len(blocks) and key_of(blocks[layer]) == key)
        is_first = key == key_of(blocks[0])
        if len(found) > 1 or (found and is_first):
            self.handed_over.forget()
            raise RuntimeError(
                f"block {key} of tower {self.tower.name!r} got tokens {list(tokens.shape)} without their state, and "
                "several forwards wait for this block: something makes new tensors between the blocks while several "
                "batches are run in turn. Run one batch after the other, or pass on the tensors that blocks return"
            )
        if not found:
            return None
        # A gradient checkpoint around this block recomputes it from these tokens, or from their memory.
        set_carried(tokens, found[0])
        self.handed_over.note_address(tokens, found[0])
        return found[0]

    def _first_call(self, block: nn.Module, host_tokens: Tensor, arguments: Mapping[str, Any]) -> BlockCall:
        """The call of the first block, which begins the forward."""
        self._check_first(block, host_tokens)
        batch = self.tower.layout.batch(host_tokens, arguments.values())
        tokens = self.tower.layout.to_batch(host_tokens, batch)
        length = size_of(tokens, 1)
        alone = _compiled_alone(block)
        info = self._entry_info(host_tokens, uncompiled=alone and _mode(block) not in self.compiled)
        end, valid = self._text_ends(tokens, info.text)
        if self.tower.padding and valid is None:
            candidates = ("attn_mask", *self.tower.masks)
            mask = next((arguments[name] for name in candidates if arguments.get(name) is not None), None)
            # Of any other mask, padding is found when the attention gets it.
            if isinstance(mask, Tensor) and mask.dim() == 4:
                valid = visible(mask[:, :, -1:] if self.tower.causal else mask, batch)
        tower, reducer = self.tower, self.reducer  # once: another thread may set another one meanwhile
        forward = Forward(
            self, reducer, self.depth, length, prefix=tower.prefix, causal=tower.causal,
            class_token=tower.class_token, padding=tower.padding, has_end=end is not None,
            outputs=info.outputs or self.default_outputs(reducer), fixed=tower.fixed,
        )  # fmt: skip
        if self.recording and not torch.compiler.is_compiling():
            forward.record.blocks = {}
        state, token = TokenState.start(forward, batch, tokens.device, end=end, valid=valid), None
        if alone:
            # The graph of a later block is for this one, too: in that block, the tokens and the full grid are not of
            # one length by accident, which the compiler would take for a rule.
            state = state.as_reduced()
        if forward.has_cross_token:
            origin = self._cross_token_origin(tokens, valid) if end is None else token_at(tokens, end)
            token = self.make_cross_token(origin.squeeze(1), forward.record, 0)
        block_call = self._make_call(
            state, 0, cross_token=token, appends_cross_token=token is not None,
            input_is_full_grid=alone and forward.outputs.between == "grid",
        )  # fmt: skip
        block_call.uncompiled = info.uncompiled
        return block_call

    def _entry_info(self, host_tokens: Tensor, uncompiled: bool) -> EntryInfo:
        """What the host's entry points have found for the forward that begins, or is recomputed, with these tokens."""
        if recomputing():
            stored = stored_entry_info(host_tokens) or self.handed_over.at_address(host_tokens, EntryInfo)
            return stored or EntryInfo()
        info = EntryInfo(self.text_info.get(), self.current_outputs(), uncompiled)
        self.text_info.set(None)
        store_entry_info(host_tokens, info)
        if _is_eager():
            self.handed_over.note_address(host_tokens, info)
        return info

    def _later_call(self, host_tokens: Tensor, carried: Carried) -> BlockCall:
        """The call of a block that is not the first."""
        state, layer = carried.state, carried.layer
        if _is_eager():
            self.handed_over.take(carried)
        tokens = self.tower.layout.to_batch(host_tokens, size_of(state.positions, 0))
        state = state.to(tokens.device)
        forward, token = state.forward, None
        if layer >= forward.depth:
            raise RuntimeError(
                f"tower {self.tower.name!r} has {forward.depth} blocks, and one is called after the last: its host "
                "runs them in another order than the tower lists them"
            )
        if forward.has_cross_token:
            origin = carried.hidden_cross_token
            if state.end is not None:
                end = state.end
                if carried.is_full_grid:
                    end = state.positions.gather(1, end[:, None]).squeeze(1)
                origin = token_at(tokens, end).squeeze(1)
            token = self.make_cross_token(tokens[:, -1] if origin is None else origin, forward.record, layer)
        hidden = carried.hidden_cross_token is not None
        return self._make_call(
            state, layer, cross_token=token, appends_cross_token=hidden, input_is_full_grid=carried.is_full_grid
        )

    def _make_call(self, state: TokenState, layer: int, **inputs: Any) -> BlockCall:
        forward = state.forward
        is_last = layer == forward.depth - 1
        output_form = forward.outputs.after_last if is_last else forward.outputs.between
        # Where nothing was changed, nothing is skipped either: the result is the dense model's, bit for bit.
        class_token_only = is_last and forward.outputs.class_token_only and not state.unmodified
        if class_token_only:
            forward.record.class_token_only = True
        tokens = size_of(state.positions, 1)
        r, by_length = (0, None) if class_token_only else self._wanted(state, layer, tokens)
        if forward.reducer.removes_half:  # here, as compiled code of the block would distinguish a larger r
            r = min(r, max(0, (tokens - forward.n_protected) // 2))
        return BlockCall(state, r, output_form, by_length=by_length, class_token_only=class_token_only, **inputs)

    def _wanted(self, state: TokenState, layer: int, tokens: int) -> tuple[int, Tensor | None]:
        """How many of a block's tokens the schedule asks to remove: `BlockCall.r` and `BlockCall.by_length`."""
        forward, schedule = state.forward, state.forward.reducer.schedule
        # In the first block, padding may be found when the attention gets its mask.
        if forward.padding and (state.valid is not None or layer == 0):
            counts = by_length(schedule, layer, forward.depth, tokens, forward.n_protected)
            if counts is not None:
                return counts[tokens], torch.tensor(counts, device=state.positions.device)
        return schedule.removed(layer, forward.depth, tokens), None

    def _finish(self, out: Any, block_call: BlockCall, layer: int) -> None:
        """Write the record, and set the state for the next block on what the block returns."""
        state, forward = block_call.state_after, block_call.state_after.forward
        record, is_last = forward.record, layer == forward.depth - 1
        record.source = state.source[:, : forward.length]
        if record.blocks is not None and block_call.recorded_tokens is not None:
            record.blocks[layer] = state.block_record(block_call.recorded_tokens, block_call.score)
        if layer > 0 or is_last:  # a call of the first block alone may be the recomputation of a checkpoint
            self.last_record = record
        if is_last:
            self._warn_if_r_is_too_large(record, forward)
        else:
            is_full_grid = block_call.output_form == "grid" and state.reduced
            tokens = out[0] if isinstance(out, tuple) else out
            n_returned = len(out) if isinstance(out, tuple) else 0
            carried = Carried(state, layer + 1, is_full_grid, block_call.hidden_cross_token, n_returned)
            set_carried(tokens, carried)
            if _is_eager():
                self.handed_over.add(tokens, carried)

    def _must_compute(self, forward: Forward, layer: int, n_returned: int) -> bool:
        """Whether the output of block `layer`, or of a later block, is used.

        The host uses those up to `outputs.last_used`, and other values that blocks return with their tokens. In
        training the alignment loss uses the cross token of every block, so only the last block can be skipped.
        """
        if layer == 0 or layer <= forward.outputs.last_used or n_returned > 1:
            return True
        return layer < forward.depth - 1 and forward.has_cross_token and torch.is_grad_enabled()

    def default_outputs(self, reducer: Reducer) -> HostOutputs:
        """What the blocks return under a reducer, unless an entry point of the host has set `outputs`."""
        after_last: OutputForm = "grid" if self.tower.restore else self.reduced_form(reducer)
        return HostOutputs("grid", after_last, self.depth - 1)

    def current_outputs(self) -> HostOutputs | None:
        """What the blocks return, as an entry point that runs now has set it; None: no entry point has."""
        caller = self.caller.get()
        if caller is None or torch.compiler.is_compiling():
            return self.outputs.get()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not caller:
            frame = frame.f_back
        if frame is None:  # an exception has ended that call, and no hook was told
            self.forget_outputs()
        return self.outputs.get()

    def forget_outputs(self) -> None:
        """The entry point that set `outputs` has ended."""
        self.outputs.set(None)
        self.caller.set(None)

    @contextlib.contextmanager
    def in_generate(self, *, prompt_is_short: bool = False) -> Iterator[None]:
        """Context in which forwards run as in the host's `generate`, which returns no intermediate outputs."""
        outer = self.generating.get(), self.prompt_is_short.get()
        self.generating.set(True)
        self.prompt_is_short.set(prompt_is_short or outer[1])
        try:
            yield
        finally:
            self.generating.set(outer[0])
            self.prompt_is_short.set(outer[1])

    def reduced_form(self, reducer: Reducer) -> OutputForm:
        """The form of reduced tokens for the host, under a reducer."""
        return "tokens" if self.keeps_cross_token(reducer) or not reducer.cross_token else "without_cross_token"

    # A call of a block, inside of its hooks -----------------------------------------------------------------------

    def run_forward(
        self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, block_call: BlockCall
    ) -> Any:
        """See `Runner.run_forward`. Nothing here depends on the layer."""
        names, layout = self._names_of(block), self.tower.layout
        host_tokens, args, kwargs = split_tokens(names, args, kwargs)
        state = block_call.state.to(host_tokens.device)
        if block_call.skipped:
            return self._skip(host_tokens, state, block_call)
        tokens = layout.to_batch(host_tokens, size_of(state.positions, 0))
        if block_call.input_is_full_grid:
            n_visible = size_of(state.positions, 1) - int(block_call.appends_cross_token)
            tokens = take(tokens, state.positions[:, :n_visible], state.numbers)
        if block_call.cross_token is not None:
            token = block_call.cross_token.to(tokens.device, tokens.dtype)
            if not block_call.appends_cross_token:
                tokens = tokens[:, :-1]
            tokens = torch.cat([tokens, token[:, None]], 1)
        return self._run_reduced(block, forward, layout.from_batch(tokens), state, args, kwargs, block_call)

    def _run_reduced(
        self, block: nn.Module, forward: Callable[..., Any], tokens: Tensor, state: TokenState, args: Any, kwargs: Any,
        block_call: BlockCall,
    ) -> Any:  # fmt: skip
        """Run the block's own forward on these tokens, in the host's layout, and reduce them at its residual."""
        watch = self._watch(tokens, state, block_call)
        if not state.unmodified:
            names = self._names_of(block)
            named = zip(names[1:], args)  # noqa: B905
            args = tuple(self._fit_argument(block, name, value, watch) for name, value in named)
            kwargs = {name: self._fit_argument(block, name, value, watch) for name, value in kwargs.items()}
        with watch:
            out = forward(tokens, *args, **kwargs)
        if not watch.complete:
            raise RuntimeError(self._not_recognised(block, watch))
        tokens_after = watch.to_batch(out[0] if isinstance(out, tuple) else out)
        if isinstance(watch, ClassTokenOnly) and watch.block_input is not None:
            tokens_after = replace_token(watch.block_input, tokens_after, watch.state.end)
        block_call.state_after, block_call.score = watch.state, watch.score
        if state.forward.record.blocks is not None:
            block_call.recorded_tokens = tokens_after
        returned = watch.from_batch(self._in_output_form(tokens_after, watch.state, block_call))
        returned = returned.clone() if block_call.alone else returned
        return (returned, *out[1:]) if isinstance(out, tuple) else returned

    def _watch(self, tokens: Tensor, state: TokenState, block_call: BlockCall) -> Merge:
        """What recognises the attention and the residual in the call of a block, and acts there."""
        if block_call.class_token_only:
            return ClassTokenOnly(tokens, state)
        merge = self.tower.layout.merge
        watch = (with_tables(merge) if self.tower.makes_tables else merge)(tokens, state, block_call.r)
        watch.by_length = block_call.by_length
        return watch

    def _skip(self, tokens: Tensor, state: TokenState, block_call: BlockCall) -> Any:
        """Return the block's input as its output, without computing the block."""
        block_call.state_after = state
        if block_call.appends_cross_token:
            block_call.hidden_cross_token = block_call.cross_token
        tokens = tokens.view_as(tokens)  # a new tensor object, as the old one has the state that is for this block
        if state.forward.record.blocks is not None:
            block_call.recorded_tokens = self.tower.layout.to_batch(tokens, size_of(state.positions, 0))
        return tokens if block_call.n_returned == 0 else (tokens,)

    def _fit_argument(self, block: nn.Module, name: str, value: Any, watch: Merge) -> Any:
        """An argument of the block, for the remaining tokens."""
        if name in self.tower.masks and value is not None:
            return watch.fit_argument(value)
        fit, given = self.tower.fit_arguments, value
        value = value if fit is None else fit(block, name, value, watch.state)
        if isinstance(watch, TableOperands) and isinstance(value, Tensor) and value is not given:
            watch.tables.append(value)
        return self.tower.layout.fit_argument(name, value, watch.state)

    def _in_output_form(self, tokens: Tensor, state: TokenState, block_call: BlockCall) -> Tensor:
        """What the block returns to the host, from all tokens after it."""
        if block_call.output_form == "tokens" or state.unmodified:
            return tokens
        if state.has_cross_token:
            block_call.hidden_cross_token = tokens[:, -1].detach().clone()
        return state.full_grid(tokens) if block_call.output_form == "grid" else tokens[:, :-1]

    # The first block's input ----------------------------------------------------------------------------------------

    def _check_first(self, block: nn.Module, tokens: Tensor) -> None:
        """Raise a RuntimeError if this call cannot be the first one of a forward."""
        name = self.tower.name
        layout = self.tower.layout
        if tokens.dim() != len(layout.axes):
            axes = ", ".join(layout.axes)
            raise RuntimeError(f"tower {name!r} got tokens of shape {list(tokens.shape)}: expected [{axes}]")
        unattached = []
        if not torch.compiler.is_compiling():  # the owner of a copied block is a copy, too
            unattached = [i for i, one in enumerate(self.tower.blocks) if owner_of(one) is not owner_of(block)]
        if unattached:
            raise RuntimeError(
                f"blocks {unattached} of tower {name!r} came after crossget.attach and are not attached: detach, and "
                "attach again"
            )
        if key_of(block) != key_of(self.tower.blocks[0]):
            raise RuntimeError(
                f"block {key_of(block)} of tower {name!r} got tokens {list(tokens.shape)} without their state: "
                "no forward of this thread waits for this block. The block was called outside of its tower, or "
                "something gave it tokens of another shape than the previous block returned"
            )

    def _text_ends(self, tokens: Tensor, found: TextEnds | None) -> tuple[Tensor | None, Tensor | None]:
        """The last two parts of `TextEnds`, for a tower of texts. Both are None for any other tower."""
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

    def _cross_token_origin(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """[B, 1, C] what the first block's cross token is a copy of, in a tower without end-of-text token.

        It is the class token. Without one, it is the mean of the tokens that are no padding: in a tower of images of
        those after the prefix.
        """
        if self.tower.class_token:
            return tokens[:, :1]
        if valid is None:
            return tokens[:, self.tower.prefix :].mean(1, keepdim=True)
        real = valid[:, :, None].to(tokens.dtype)
        if self.tower.text is None:
            tokens, real = tokens[:, self.tower.prefix :], real[:, self.tower.prefix :]
        return (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)

    # Messages -----------------------------------------------------------------------------------------------------

    def _names_of(self, block: nn.Module) -> list[str]:
        """The names of the arguments of the block's forward."""
        cls = base_of(block)
        if cls not in self._argument_names:
            self._argument_names[cls] = argument_names(cls.forward)
        return self._argument_names[cls]

    def _warn_if_r_is_too_large(self, record: ForwardRecord, forward: Forward) -> None:
        """Warn, once per reducer, if the schedule asks for more tokens than the blocks could remove."""
        depth, schedule = forward.depth, forward.reducer.schedule
        if self._warned or torch.compiler.is_compiling() or isinstance(schedule, Aligned | Ratio | RampedRatio):
            return
        self._warned = True
        counts = [record.tokens[layer] for layer in sorted(record.tokens)]
        if len(counts) < depth:
            return
        wanted = [schedule.removed(layer, depth, count) for layer, count in enumerate(counts)]
        short = [
            layer
            for layer, (r, count) in enumerate(zip(wanted, counts, strict=True))
            if layer < depth - 1 and count - counts[layer + 1] < r
        ]
        if short:
            asked, removed = sum(wanted[:-1]), counts[0] - counts[-1]
            warnings.warn(
                f"r of {forward.reducer} asks tower {self.tower.name!r} to remove {asked} tokens, and its blocks "
                f"remove {removed} of {counts[0]}: from block {short[0]} on, fewer tokens remain than r needs "
                "(a block removes at most half of its unprotected tokens). Give a smaller r",
                stacklevel=2,
            )

    def _named(self, block: nn.Module) -> str:
        return f"block {key_of(block)} ({type(block).__name__}) of tower {self.tower.name!r}"

    def _failed(self, block: nn.Module, state: TokenState, error: RuntimeError) -> str:
        """The message for a block that fails on another number of tokens than the host's."""
        return (
            f"{self._named(block)} got {state.positions.shape[1]} tokens instead of {state.length}, and fails: "
            f"{error}. If it has tables with one row per token, name them in Tower.fit_arguments or Tower.makes_tables "
            "(docs/backbones.md)"
        )

    def _not_recognised(self, block: nn.Module, watch: Merge) -> str:
        """The message for a block whose attention or residual was not recognised."""
        what = "no residual addition after its attention" if watch.attention_seen else "no attention over its tokens"
        return (
            f"{self._named(block)} showed {what} ({watch.tokens} tokens): expected F.scaled_dot_product_attention, "
            "nn.MultiheadAttention or matmul and softmax over [.., T, T], then an addition to the block's own input. "
            f"docs/backbones.md lists what can be recognised{_other_kernel(block)}"
        )


def _other_kernel(block: nn.Module) -> str:
    """Which kernel, or which replacement of a torch function, may have hidden the attention; empty if none is known."""
    if F.scaled_dot_product_attention is not SDPA:
        return f". F.scaled_dot_product_attention is replaced by {F.scaled_dot_product_attention!r}: restore it"
    return _unknown_kernel(block)


def _unknown_kernel(block: nn.Module) -> str:
    """Which kernel may have hidden the attention, or may have failed; empty if none is known."""
    for module in block.modules():
        kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if kernel not in (None, *RECOGNISED_KERNELS):
            return f". The attention implementation is {kernel!r}: model.set_attn_implementation('sdpa')"
    return ""


def _joined(parameters: list[nn.Parameter]) -> nn.Parameter | None:
    """One parameter [L, C] of those of all blocks [C]; a single one [L, C] as it is; None of none."""
    if not parameters or parameters[0].dim() == 2:
        return parameters[0] if parameters else None
    trained = any(parameter.requires_grad for parameter in parameters)
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]), trained)


def _execution_device(block: nn.Module) -> torch.device:
    """The device on which accelerate runs a block whose weights are offloaded; the meta device of any other block."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # several hooks are one SequentialHook
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("meta")


def split_tokens(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """A block's first argument, the other positional ones, and the other keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop(names[0]), (), rest


def _is_eager() -> bool:
    """Whether the forward is neither compiled nor traced."""
    return not torch.compiler.is_compiling() and not torch._C._is_tracing()


def _mode(block: nn.Module) -> tuple[bool, bool]:
    """What compiled code of a block is made for, beside the kinds of its inputs."""
    return torch.is_grad_enabled(), block.training


def _compiled_alone(block: nn.Module) -> bool:
    """Whether the block is compiled by itself (`block.compile()`), so that `call_block` runs outside of its graph."""
    return not torch.compiler.is_compiling() and getattr(block, "_compiled_call_impl", None) is not None
