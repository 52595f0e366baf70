"""Attach a reducer to a model in place, and take it off again without a trace.

`attach` swaps the class of every block for a subclass whose `forward` runs the host's own `forward` under a
`BlockWatch` (watch.py). Nothing is added to the module tree: state dicts, `named_modules`, `isinstance` and `repr`
stay as they were. The tokens carry their own history (state.py), so no forward leaves anything behind for the next.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossget.alignment import Divergence, alignment_loss
from crossget.reducers import Reducer
from crossget.registry import Tower, absent_towers, find_towers
from crossget.state import Record, TokenState, carried, carry
from crossget.watch import BlockWatch, visible

_SEAT = "_crossget_seat"
_BASE = "_crossget_base"
_END = "_crossget_end"
# How many texts, where each ends (None: nowhere in particular), and which of their tokens are real (None: all).
TextEnds = tuple[int, "Tensor | None", "Tensor | None"]


class AttachedTower:
    """A tower together with the reducer that works on it: what its blocks consult.

    Attributes:
        tower: where the blocks are.
        reducer: with every field resolved for this tower.
        cross: [L, C] one learnable vector per block, zero at the start; None without cross token.
        last: record of the last forward.
    """

    def __init__(self, tower: Tower, reducer: Reducer) -> None:
        self.tower = tower
        self.inputs = {type(block): _input_names(block) for block in tower.blocks}
        self.last = Record()
        self.cross: nn.Parameter | None = None
        # What the host's entry points know and its blocks do not, by thread: the end of each text, and whether
        # somebody looks at the tokens between the blocks.
        self.ends: dict[int, TextEnds] = {}
        self.read: set[int] = set()
        self.reducer = reducer
        self.set_reducer(reducer)

    def set_reducer(self, reducer: Reducer) -> None:
        """Use another reducer from the next forward on; cross tokens that exist are kept."""
        resolved = reducer.resolved(self.tower.host)
        for layer in range(len(self.tower.blocks)):
            resolved.schedule.removed(layer, len(self.tower.blocks), 1)
        if resolved.cross_token and self.cross is None:
            like = next(self.tower.blocks[0].parameters())
            shape = (len(self.tower.blocks), self.tower.width)
            self.cross = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.reducer = resolved

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": Record(), "ends": {}, "read": set()}

    # One block ------------------------------------------------------------------------------------------------------

    def run(self, block: nn.Module, layer: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `forward`, the host's own, on fewer tokens."""
        names = self.inputs[getattr(type(block), _BASE)]
        tokens, args, kwargs = _take_tokens(names, args, kwargs)
        if layer == 0:
            tokens, state = self._start(tokens, {**dict(zip(names[1:], args)), **kwargs})  # noqa: B905
        else:
            tokens, state = self._continue(tokens, layer)
        count = int(tokens.shape[1])
        state.record.tokens[layer] = count
        if self.reducer.cross_token:
            tokens = self._renew_cross_token(tokens, state, layer)
        if self.tower.refit is not None and not state.pristine:
            args = tuple(self.tower.refit(block, name, value, state) for name, value in zip(names[1:], args))  # noqa: B905
            kwargs = {name: self.tower.refit(block, name, value, state) for name, value in kwargs.items()}
        r = self.reducer.schedule.removed(layer, len(self.tower.blocks), count)
        watch = BlockWatch(
            tokens, state, self.reducer, r, causal=self.tower.causal, cross_like_first=self.tower.class_token,
            find_padding=self.tower.padding,
        )  # fmt: skip
        with watch:
            out = forward(tokens, *args, **kwargs)
        if not watch.done:
            raise RuntimeError(_not_seen(block, layer, self.tower, watch))
        return self._leave(out, watch.state, layer)

    def _start(self, tokens: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, TokenState]:
        if tokens.dim() != 3:
            raise RuntimeError(
                f"tower {self.tower.name!r} got tokens of shape {list(tokens.shape)}: expected one sequence [B, T, C]"
            )
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        end, valid = self._end_of_text(tokens)
        mask = arguments.get("attn_mask") if self.tower.padding and valid is None else None
        if mask is not None and mask.dim() == 4:  # otherwise, the attention's mask is looked at when it is seen
            valid = visible(mask, batch)
        cross = bool(self.reducer.cross_token)
        state = TokenState.start(
            batch, length, tokens.device, cross=cross, prefix=self.tower.prefix, end=end, valid=valid
        )
        if cross:
            tokens = torch.cat([tokens, self._origin(tokens, valid).detach()], 1)
        return tokens, state

    def _origin(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """What the cross token starts as: [B, 1, C]. Where a text has an end, that replaces it."""
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
        # Left on the input too, where the recomputation of a checkpoint finds it again.
        known: TextEnds | None = getattr(tokens, _END, None)
        found = self.ends.pop(_thread(), None) if known is None else known
        batch, length, _ = tokens.shape
        if found is None or found[0] != batch:
            seen = "no token ids" if found is None else f"token ids of {found[0]} texts"
            raise RuntimeError(
                f"tower {self.tower.name!r} got {batch} texts of {length} tokens, and its embedding saw {seen} before: "
                "call the model's own encode_text (or forward) with token ids, or Attachment.read_ids(ids) first"
            )
        setattr(tokens, _END, found)
        return found[1:]

    def _continue(self, tokens: Tensor, layer: int) -> tuple[Tensor, TokenState]:
        state = carried(tokens)
        if state is None:
            raise RuntimeError(
                f"block {layer} of tower {self.tower.name!r} got tokens {list(tokens.shape)} without their state: "
                "something made a new tensor between two blocks (re-entrant checkpointing, for instance: use "
                "use_reentrant=False), or the block was called on its own"
            )
        if state.compact is not None:
            tokens = state.compact
        return tokens, state

    def _renew_cross_token(self, tokens: Tensor, state: TokenState, layer: int) -> Tensor:
        if self.cross is None:
            raise RuntimeError(f"tower {self.tower.name!r} lost its cross tokens")
        if state.end is None:
            origin = tokens[:, -1]
        else:
            origin = tokens.gather(1, state.end[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)
        token = origin.detach() + self.cross[layer].to(tokens.device, tokens.dtype)
        if torch.is_grad_enabled():
            state.record.cross_tokens[layer] = token
        return torch.cat([tokens[:, :-1], token[:, None]], 1)

    def _leave(self, out: Any, state: TokenState, layer: int) -> Any:
        tokens = out[0] if isinstance(out, tuple) else out
        last = layer == len(self.tower.blocks) - 1
        state.record.source = state.source[:, : state.length]
        if layer > 0 or last:  # the first block alone may be the recomputation of a checkpoint
            self.last = state.record
        if last:
            if self.tower.restore:
                tokens = state.restored(tokens)
            elif state.cross:
                tokens = tokens[:, :-1]
        elif self.read and _thread() in self.read:
            state.compact = tokens
            tokens = carry(state.restored(tokens), state)
        else:
            tokens = carry(tokens, state)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens


class Attachment:
    """A model's reduction: the handle that `attach` returns.

    A context manager that detaches at its end, also after an exception.
    """

    def __init__(self, towers: dict[str, AttachedTower]) -> None:
        self._towers = towers
        self._hooks: list[RemovableHandle] = []
        self._inside = False

    def __repr__(self) -> str:
        return f"Attachment({', '.join(f'{name}={tower.reducer}' for name, tower in self._towers.items())})"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    # What happened in the last forward -----------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Per tower, how many tokens entered each block in the last forward (the cross token counts)."""
        return {name: [t.last.tokens[i] for i in sorted(t.last.tokens)] for name, t in self._towers.items()}

    @property
    def source(self) -> dict[str, Tensor]:
        """Per tower [B, T0]: the token behind the last block that each input token went into; -1 if it was dropped.

        `crossget.unmerge` brings features of those tokens back to the input's grid with it.
        """
        return {name: t.last.source for name, t in self._towers.items() if t.last.source is not None}

    def alignment_loss(self, divergence: Divergence = "reference") -> Tensor:
        """Alignment loss of the last forward's cross tokens, to be added to the task's loss in training.

        Args:
            divergence: see `crossget.alignment.alignment_loss`.

        Raises:
            RuntimeError: there are not two towers with cross tokens, or no forward with gradients came before.

        Source: CrossGET (arXiv 2305.17455), section 3.1; reference implementation.
        """
        sides = []
        for name, attached in self._towers.items():
            tower, record = attached.tower, attached.last
            if not attached.reducer.cross_token or tower.project is None:
                continue
            if len(record.cross_tokens) != len(tower.blocks):
                raise RuntimeError(
                    f"tower {name!r} has {len(record.cross_tokens)} cross tokens of {len(tower.blocks)} blocks: run a "
                    "forward of both towers with gradients enabled before alignment_loss()"
                )
            sides.append(torch.stack([tower.project(record.cross_tokens[i]) for i in range(len(tower.blocks))]))
        if len(sides) != 2:
            raise RuntimeError(
                f"alignment_loss() needs two towers with cross tokens in one space, found {len(sides)}"
                f"{_why_not(self)}: attach CrossGET to a model with an image and a text tower"
            )
        return alignment_loss(sides[0], sides[1], divergence)

    # What is attached ------------------------------------------------------------------------------------------------

    @property
    def towers(self) -> dict[str, Tower]:
        """The reduced towers."""
        return {name: attached.tower for name, attached in self._towers.items()}

    @property
    def reducers(self) -> dict[str, Reducer]:
        """The reducer of every tower, all fields resolved."""
        return {name: attached.reducer for name, attached in self._towers.items()}

    @property
    def reducer(self) -> Reducer | dict[str, Reducer]:
        """The reducer, or one per tower when there are several. May be set, to a reducer or a dict, in place."""
        reducers = self.reducers
        return next(iter(reducers.values())) if len(reducers) == 1 else reducers

    @reducer.setter
    def reducer(self, value: Reducer | Mapping[str, Reducer]) -> None:
        towers = {name: attached.tower for name, attached in self._towers.items()}
        chosen = _choose(towers, value)
        for name, reducer in chosen.items():  # refuse before anything changes
            AttachedTower(towers[name], reducer)
        for name, reducer in chosen.items():
            self._towers[name].set_reducer(reducer)

    @property
    def cross_tokens(self) -> dict[str, nn.Parameter]:
        """Per tower [L, C]: one learnable vector per block."""
        return {name: attached.cross for name, attached in self._towers.items() if attached.cross is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The cross tokens, for an optimiser."""
        yield from self.cross_tokens.values()

    def read_ids(self, ids: Tensor, tower: str = "text") -> None:
        """Say where the next forward's texts end, when token ids do not go through the tower's own embedding.

        Args:
            ids: [B, T] token ids, as the model's tokenizer gives them.
            tower: which tower will run.
        """
        attached = self._towers[tower]
        if attached.tower.text is None:
            raise ValueError(f"tower {tower!r} reads no text")
        attached.ends[_thread()] = (int(ids.shape[0]), *attached.tower.text.read(ids))

    def save(self, folder: str | Path) -> None:
        """Write the cross tokens and the reducers to `folder`, see `crossget.load`."""
        from crossget.checkpoint import save

        save(self, folder)

    # On and off ------------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the model is reduced now."""
        return self._inside

    def detach(self) -> None:
        """Give the model back as it was.

        Raises:
            RuntimeError: it is detached already, or something changed a block's class since.
        """
        if not self._inside:
            raise RuntimeError("already detached: attach again with crossget.attach(model, reducer)")
        blocks = [block for attached in self._towers.values() for block in attached.tower.blocks]
        for block in blocks:
            if _SEAT not in block.__dict__ or _SUBCLASSES.get(getattr(type(block), _BASE, object)) is not type(block):
                raise RuntimeError(
                    f"a block's class is {type(block).__name__} now, not the one attach gave it: undo first what "
                    "wrapped or subclassed it since (FSDP, for instance), then detach"
                )
        for block in blocks:
            block.__class__ = getattr(type(block), _BASE)
            del block.__dict__[_SEAT]
        for attached in self._towers.values():
            for module, method in attached.tower.readers:
                del module.__dict__[method]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._inside = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model is the dense one."""
        self.detach()
        try:
            yield
        finally:
            self._enter()

    def _enter(self) -> None:
        for attached in self._towers.values():
            _check_blocks(attached.tower)
        for attached in self._towers.values():
            for layer, block in enumerate(attached.tower.blocks):
                block.__dict__[_SEAT] = (self, attached, layer)
                block.__class__ = _subclass(type(block))
            for module, method in attached.tower.readers:
                module.__dict__[method] = functools.partial(_read_between, attached, module, method)
            if attached.tower.text is not None:
                note = functools.partial(_note_ids, attached)
                self._hooks.append(attached.tower.text.embedding.register_forward_pre_hook(note))
        self._inside = True


def attach(model: nn.Module, reducer: Reducer | Mapping[str, Reducer]) -> Attachment:
    """Reduce a model's tokens, in place, from its next forward on.

    Args:
        model: any model that has an adapter, see `crossget.find_towers`.
        reducer: one for the model, or a dict by tower name. One reducer on a model with several towers reduces the
            vision tower and gives the others their cross tokens with r = 0, as the reference does.

    Returns:
        The handle: detach with it, or use it as a context manager.

    Raises:
        TypeError: the model is not supported (the message says why), or `reducer` is not a reducer.
        ValueError: it is attached already, a tower's name is unknown, or the reducer cannot work on the tower.
        RuntimeError: the adapter found nothing to reduce.
    """
    previous = find_attachment(model)
    if previous is not None:
        raise ValueError(
            f"already attached: {previous}. Call .detach() on the handle that attach returned (or "
            "crossget.attachment(model).detach()), or set its .reducer"
        )
    towers = {tower.name: tower for tower in find_towers(model)}
    chosen = _choose(towers, reducer, absent_towers(model))
    attachment = Attachment({name: AttachedTower(towers[name], value) for name, value in chosen.items()})
    attachment._enter()
    return attachment


def find_attachment(model: nn.Module) -> Attachment | None:
    """The model's attachment; None if it has none."""
    for module in model.modules():
        if _SEAT in module.__dict__:
            attachment: Attachment = module.__dict__[_SEAT][0]
            return attachment
    return None


def attachment(model: nn.Module) -> Attachment:
    """The handle of an attached model, for when `attach` was called elsewhere (a copy, an unpickled model).

    Raises:
        ValueError: the model is not attached.
    """
    found = find_attachment(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not attached: call crossget.attach(model, reducer) first")
    return found


def _choose(
    towers: Mapping[str, Tower], reducer: Reducer | Mapping[str, Reducer], absent: Mapping[str, str] | None = None
) -> dict[str, Reducer]:
    """Which reducer goes to which tower; `absent` says why a tower is not there."""
    absent = absent or {}
    if isinstance(reducer, Reducer):
        if "visual" in absent:
            raise ValueError(
                f"one reducer is for the tower 'visual', which cannot be reduced here: {absent['visual']}. Name the "
                f"towers instead, of {sorted(towers)}, as in {{{next(iter(towers))!r}: {reducer}}}"
            )
        main = "visual" if "visual" in towers else next(iter(towers))
        others = [name for name in towers if name != main and reducer.resolved(towers[name].host).cross_token]
        return {main: reducer, **{name: replace(reducer, r=0) for name in others}}
    if not isinstance(reducer, Mapping):
        raise TypeError(
            f"reducer is {reducer!r}: give a reducer such as crossget.CrossGET(r=16), or a dict by tower name"
        )
    unknown = sorted(set(reducer) - set(towers))
    if unknown or not reducer:
        reasons = "".join(f"; {name!r}: {absent[name]}" for name in unknown if name in absent)
        raise ValueError(f"reducer names the towers {sorted(reducer)}: this model has {sorted(towers)}{reasons}")
    for name, value in reducer.items():
        if not isinstance(value, Reducer):
            raise TypeError(f"reducer[{name!r}] is {value!r}: give a reducer such as crossget.CrossGET(r=16)")
    return dict(reducer)


def _why_not(attachment: Attachment) -> str:
    blind = [name for name, tower in attachment.towers.items() if tower.project is None]
    return f" (no projection of single tokens is known for: {', '.join(blind)})" if blind else ""


def _check_blocks(tower: Tower) -> None:
    for layer, block in enumerate(tower.blocks):
        if "forward" in block.__dict__:
            raise ValueError(
                f"block {layer} of tower {tower.name!r} has a forward of its own on the instance (another patch, or "
                "a hook of accelerate): remove it before attaching"
            )
    for module, method in tower.readers:
        if method in module.__dict__:
            raise ValueError(
                f"{type(module).__name__}.{method} is patched on the instance: remove that before attaching"
            )


# Swapping classes ---------------------------------------------------------------------------------------------------

_SUBCLASSES: dict[type, type] = {}


def _subclass(base: type) -> Any:
    """The watched subclass of a block's class: one per class, so that compiled code sees a single type."""
    if base not in _SUBCLASSES:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # `watched`, not type(self): others (FSDP2) may subclass the block again.
            _, attached, layer = self.__dict__[_SEAT]
            return attached.run(self, layer, super(watched, self).forward, args, kwargs)

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            # The subclass cannot be imported by name: pickle its base, and swap again while unpickling.
            state = super(watched, self).__reduce_ex__(protocol)[2]
            return _blank, (base,), state

        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body = {"forward": forward, "__reduce_ex__": reduce, _BASE: base, **names}
        watched: Any = type(base.__name__, (base,), body)
        _SUBCLASSES[base] = watched
    return _SUBCLASSES[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    watched = _subclass(base)
    block: nn.Module = watched.__new__(watched)
    return block


def _input_names(block: nn.Module) -> list[str]:
    """Parameter names of the block's forward, the tokens' first."""
    cls = getattr(type(block), _BASE, type(block))
    return [p.name for p in inspect.signature(cls.forward).parameters.values()][1:]


def _take_tokens(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop(names[0]), (), rest


def _not_seen(block: nn.Module, layer: int, tower: Tower, watch: BlockWatch) -> str:
    what = "no attention over its tokens" if watch.keys is None else "no residual addition behind its attention"
    return (
        f"block {layer} ({type(block).__name__}) of tower {tower.name!r} showed {what} ({watch.tokens} tokens): "
        "expected F.scaled_dot_product_attention, nn.MultiheadAttention or matmul and softmax over [.., T, T], then an "
        "addition to the block's own input. See docs/adapters.md for what can be watched"
    )


# What the host's entry points know ------------------------------------------------------------------------------------


def _thread() -> int:
    # A graph is traced by one thread at a time, and what is stored while tracing is used up while tracing.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _note_ids(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...]) -> None:
    if attached.tower.text is not None:
        attached.ends[_thread()] = (int(args[0].shape[0]), *attached.tower.text.read(args[0]))


def _read_between(attached: AttachedTower, module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Run a host method that looks at the tokens between the blocks: show it the full grid there."""
    thread = _thread()
    nested = thread in attached.read
    attached.read.add(thread)
    try:
        return getattr(type(module), method)(module, *args, **kwargs)
    finally:
        if not nested:
            attached.read.discard(thread)
