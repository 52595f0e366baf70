"""Attach a reducer to a model in place, and take it off again without a trace.

`attach` puts every block into a seat (swap.py) where an `AttachedTower` (attached.py) runs the host's own `forward`
under a `BlockWatch` (watch.py). Nothing is added to the module tree: state dicts, `named_modules`, `isinstance` and
`repr` stay as they were. The tokens carry their own history (state.py), so no forward leaves anything behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.adapters import Prompt, SingleTokenOutput, Tower, absent_towers, find_towers
from crossget.core.block_class import (
    argument_names,
    has_own_forward,
    is_intact,
    owner_of,
    swap_in,
    swap_out,
    unwrap,
    wrap,
)
from crossget.core.decoder_tower import AttachedDecoder, cached_tokens, first_token
from crossget.core.image_prompts import around_generate, before_forward, image_tokens
from crossget.core.state import BlockRecord
from crossget.core.tower import AttachedTower, generating, note, read_between, read_it, read_one, reading_one
from crossget.methods.alignment import Divergence, alignment_loss
from crossget.methods.reducers import Reducer

_HOLDER = "crossget"


class Attachment:
    """A model's reduction: the handle that `attach` returns.

    A context manager that detaches at its end, also after an exception.
    """

    def __init__(self, towers: dict[str, AttachedTower]) -> None:
        self._towers = towers
        self._undo: list[Callable[[], Any]] = []
        self._inside = False
        self._registered: nn.Module | None = None

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

        `crossget.unmerge` brings features of those tokens back to the input's grid with it. How much of each input
        token is in that token, and the same behind every block, is in the `records` of a forward that is recorded.
        """
        return {name: t.last.source for name, t in self._towers.items() if t.last.source is not None}

    @property
    def records(self) -> dict[str, list[BlockRecord]]:
        """Per tower, what each of its blocks did in the last forward: where tokens went, their sizes and scores.

        Raises:
            RuntimeError: no tower's last forward was recorded.
        """
        steps = {name: t.last.steps for name, t in self._towers.items() if t.last.steps is not None}
        if not steps:
            raise RuntimeError(
                "the last forward was not recorded: run it inside `with attached.recording():`, and not compiled"
            )
        return {name: [found[layer] for layer in sorted(found)] for name, found in steps.items()}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, forwards leave `records`, which keeps every block's tokens in memory until the next forward.

        Compiled forwards leave none, nor do language models that generate, whose tokens are not reduced.
        """
        before = {name: attached.recording for name, attached in self._towers.items()}
        for attached in self._towers.values():
            attached.recording = True
        try:
            yield
        finally:
            for name, attached in self._towers.items():
                attached.recording = before[name]

    def alignment_loss(self, divergence: Divergence = "reference", rows: Tensor | None = None) -> Tensor:
        """Alignment loss of the last forward's cross tokens, to be added to the task's loss in training.

        Args:
            divergence: see `crossget.methods.alignment.alignment_loss`.
            rows: [B] the row of the second tower that each row of the first belongs to: the images' labels, where the
                texts are the classes. Without it row i belongs to row i; of images in prompts it is known.

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
            if tower.prompt is not None and rows is None:
                rows = attached.rows
        if len(sides) != 2:
            raise RuntimeError(
                f"alignment_loss() needs two towers with cross tokens in one space, found {len(sides)}"
                f"{_why_not(self)}: attach CrossGET to a model with an image and a text tower"
            )
        if rows is not None:  # prompts and classes may have several images, or none
            sides[1] = sides[1].index_select(1, rows.to(sides[1].device))
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
            _attached(towers[name], reducer)
        for name, reducer in chosen.items():
            self._towers[name].set_reducer(reducer)

    @contextlib.contextmanager
    def with_reducer(self, reducer: Reducer | Mapping[str, Reducer]) -> Iterator[Attachment]:
        """Inside, the model is reduced by another reducer, in every thread; afterwards as before.

        A compiled model is compiled once for every reducer, and not again for one that it has seen (torch keeps 8
        variants of a function, `torch._dynamo.config.recompile_limit`, and refuses or gives up on the ninth).

        Args:
            reducer: what `Attachment.reducer` may be set to.

        Raises:
            TypeError: it is none of these.
            ValueError: the reducer cannot work on the tower, or a tower's name is unknown.
        """
        before = self.reducers
        self.reducer = reducer
        try:
            yield self
        finally:
            self.reducer = before

    @property
    def cross_tokens(self) -> dict[str, nn.Parameter]:
        """Per tower [L, C]: one learnable vector per block."""
        return {name: attached.cross for name, attached in self._towers.items() if attached.cross is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The cross tokens, for an optimiser."""
        yield from self.cross_tokens.values()

    def register_parameters(self, module: nn.Module) -> None:
        """Make the cross tokens parameters of a module, until `unregister_parameters` or `detach`.

        They are then `module.crossget.visual`, ... : optimisers over `module.parameters()`, DDP, FSDP2, DeepSpeed,
        state dicts and checkpoints of training loops see them as any other parameter. Do it before the module is
        wrapped by one of these.

        Args:
            module: usually the model that is attached.

        Raises:
            RuntimeError: they are registered already, or the model is detached.
            ValueError: the module has a `crossget` of its own.
        """
        if self._registered is not None or not self._inside:
            state = "registered already: call .unregister_parameters() first" if self._inside else "detached: attach"
            raise RuntimeError(f"cannot register the cross tokens: they are {state}")
        if hasattr(module, _HOLDER):
            raise ValueError(f"{type(module).__name__} has an attribute {_HOLDER!r} already")
        holder = nn.Module()
        for attached in self._towers.values():
            attached.register(holder)
        module.add_module(_HOLDER, holder)
        self._registered = module

    def unregister_parameters(self) -> None:
        """Take the cross tokens out of the module tree again; nothing happens if they are not in it."""
        if self._registered is None:
            return
        for attached in self._towers.values():
            attached.register(None)
        delattr(self._registered, _HOLDER)
        self._registered = None

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Of a model with images in its prompts: tokens of an image that its processor writes, and how many are left.

        Raises:
            ValueError: the model has no such prompts.
        """
        for attached in self._towers.values():
            if attached.tower.prompt is not None:
                return image_tokens(attached.tower.prompt, attached, {})
        raise ValueError(f"no tower of {self} puts images into prompts, or their number of tokens cannot be told")

    def set_text_ids(self, ids: Tensor, tower: str = "text") -> None:
        """Say where the next forward's texts end, when token ids do not go through the tower's own embedding.

        Args:
            ids: [B, T] token ids, as the model's tokenizer gives them.
            tower: which tower will run.
        """
        attached = self._towers[tower]
        if attached.tower.text is None:
            raise ValueError(f"tower {tower!r} reads no text")
        note(attached, (int(ids.shape[0]), *attached.tower.text.read(ids)))

    def set_text_features(self, features: Tensor | None, tower: str = "visual") -> None:
        """Say what `importance="text"` compares the tokens of images with, from the next forward on.

        Args:
            features: [E] for all images, or [B, E] one for each, as the model's `encode_text` gives them; None forgets.
            tower: whose tokens are compared.

        Raises:
            ValueError: there is no such tower, its tokens cannot be compared with texts, or `features` are not in
                their space.
        """
        if tower not in self._towers:
            raise ValueError(f"set_text_features({tower=}): attached are the towers {sorted(self._towers)}")
        attached = self._towers[tower]
        if features is None:
            attached.target = None
            return
        if attached.tower.embed is None:
            raise ValueError(
                f"tower {tower!r} has no known way of single tokens to the space of texts: the image towers of "
                "open_clip and of transformers' CLIPModel have one, unless they end in an attention pool"
            )
        like = next(p for p in attached.tower.blocks[0].parameters() if p.is_floating_point())
        with torch.no_grad():
            width = int(attached.tower.embed(like.new_zeros(1, attached.tower.width)).shape[-1])
        if features.dim() not in (1, 2) or int(features.shape[-1]) != width:
            raise ValueError(f"features of shape {list(features.shape)}: expected [{width}] or [images, {width}]")
        attached.target = F.normalize(features.detach().float(), dim=-1).reshape(-1, width)

    def save(self, folder: str | Path) -> None:
        """Write the cross tokens and the reducers to `folder`, see `crossget.load`."""
        from crossget.core.saving import save

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
        self._leave()
        self.unregister_parameters()

    def _leave(self) -> None:
        if not self._inside:
            raise RuntimeError("already detached: attach again with crossget.attach(model, reducer)")
        blocks = [block for tower in self.towers.values() for block in tower.blocks]
        for block in blocks:
            if not is_intact(block):
                raise RuntimeError(
                    f"a block's class is {type(block).__name__} now, not the one attach gave it: undo first what "
                    "wrapped or subclassed it since (FSDP, for instance), then detach"
                )
        for block in blocks:
            swap_out(block)
        while self._undo:
            self._undo.pop()()
        self._inside = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model is the dense one."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, forwards run as in the host's `generate`: blocks that nobody reads are left out."""
        with contextlib.ExitStack() as stack:
            for attached in self._towers.values():
                stack.enter_context(generating(attached))
            yield

    def _enter(self) -> None:
        for tower in self.towers.values():
            _check_free(tower)
        for attached in self._towers.values():
            for layer, block in enumerate(attached.tower.blocks):
                swap_in(block, self, attached, layer)
            self._undo += _open_doors(attached)
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
    attachment = Attachment({name: _attached(towers[name], value) for name, value in chosen.items()})
    attachment._enter()
    return attachment


def _attached(tower: Tower, reducer: Reducer) -> AttachedTower:
    return (AttachedTower if tower.reducible else AttachedDecoder)(tower, reducer)


def find_attachment(model: nn.Module) -> Attachment | None:
    """The model's attachment; None if it has none."""
    owners = (owner_of(module) for module in model.modules())
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


def attachment(model: nn.Module) -> Attachment:
    """The handle of an attached model, for when `attach` was called elsewhere (a copy, an unpickled model).

    Raises:
        ValueError: the model is not attached.
    """
    found = find_attachment(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not attached: call crossget.attach(model, reducer) first")
    return found


def main_tower(names: Iterable[str]) -> str:
    """Which tower one reducer, or one strength, is for."""
    found = list(names)
    return "visual" if "visual" in found else found[0]


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
        main = main_tower(towers)
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


def _check_free(tower: Tower) -> None:
    """Refuse what somebody else has put a forward or a method of his own on."""
    for layer, block in enumerate(tower.blocks):
        if has_own_forward(block):
            raise ValueError(
                f"block {layer} of tower {tower.name!r} has a forward of its own on the instance (another patch): "
                "remove it before attaching"
            )
    for module, method in _methods(tower):
        if method in module.__dict__:
            raise ValueError(
                f"{type(module).__name__}.{method} is patched on the instance: remove that before attaching"
            )


def _methods(tower: Tower) -> list[tuple[nn.Module, str]]:
    """The host's methods that get something around them."""
    found = [(reader.module, reader.method) for reader in tower.intermediates]
    found += [(readout.module, readout.method) for readout in tower.single_token_outputs if readout.method != "forward"]
    if tower.prompt is not None and hasattr(tower.prompt.models[0], "generate"):
        found.append((tower.prompt.models[0], "generate"))
    return found


# The host's entry points ---------------------------------------------------------------------------------------------


def _open_doors(attached: AttachedTower) -> list[Callable[[], Any]]:
    """Be there where the host's methods know what its blocks do not; returns what undoes it."""
    tower, undo = attached.tower, []
    for reader in tower.intermediates:
        names = argument_names(getattr(type(reader.module), reader.method))
        wrap(reader.module, reader.method, partial(read_between, attached, reader, names))
    for readout in tower.single_token_outputs:
        if readout.method == "forward":  # which others wrap, too (Accelerate)
            before, behind = partial(_read_one, attached, readout), partial(_read_it, attached)
            undo.append(readout.module.register_forward_pre_hook(before).remove)
            undo.append(readout.module.register_forward_hook(behind, always_call=True).remove)
        else:
            wrap(readout.module, readout.method, partial(reading_one, attached, readout))
    if tower.text is not None:
        undo.append(tower.text.embedding.register_forward_pre_hook(partial(_note_ids, attached)).remove)
    if tower.decoder is not None:
        hook = partial(_note_first_token, attached, argument_names(type(tower.decoder).forward))
        undo.append(tower.decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
    if tower.prompt is not None:
        undo += _await_prompts(attached, tower.prompt)
    for holder, attribute, value in tower.overrides:
        undo.append(partial(setattr, holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, value)
    return undo + [partial(unwrap, module, method) for module, method in _methods(tower)]


def _await_prompts(attached: AttachedTower, prompt: Prompt) -> list[Callable[[], Any]]:
    undo = []
    for model in prompt.models:
        hook = partial(before_forward, prompt, attached, argument_names(type(model).forward))
        undo.append(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
    outer: Any = prompt.models[0]
    if hasattr(outer, "generate"):
        wrap(outer, "generate", partial(around_generate, prompt, attached, argument_names(type(outer).generate)))
    return undo


def _read_one(attached: AttachedTower, readout: SingleTokenOutput, module: nn.Module, args: tuple[Any, ...]) -> None:
    read_one(attached, readout)


def _read_it(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    read_it(attached)


def _note_ids(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...]) -> None:
    if attached.tower.text is not None:
        note(attached, (int(args[0].shape[0]), *attached.tower.text.read(args[0])))


def _note_first_token(
    attached: AttachedTower, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    tokens = given.get("inputs_embeds")
    cache = given.get("cache", given.get("past_key_values"))
    seen = given["input_ids"] if tokens is None else tokens
    note(attached, first_token(seen, given.get("attention_mask"), cached_tokens(cache)), tokens)
