"""Attach a reducer to a model in place, and take it off again without a trace.

`attach` swaps the class of every block (block_class.py), so that an `AttachedTower` (tower.py) runs the host's own
`forward` under a `Merge` (reduction.py), and wraps the entry points of the host (hooks.py). Nothing is added to the
module tree: state dicts, `named_modules`, `isinstance` and `repr` stay as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core import saving
from crossget.core.adapters import Tower, absent_towers, find_towers
from crossget.core.block_class import is_intact, owner_of, swap_in, swap_out
from crossget.core.decoder_tower import AttachedDecoder
from crossget.core.hooks import Undo, check_free, note_text_ids, wrap_host
from crossget.core.image_prompts import image_tokens
from crossget.core.state import BlockRecord
from crossget.core.tower import AttachedTower
from crossget.methods.alignment import Divergence, alignment_loss
from crossget.methods.reducers import Reducer

_HOLDER = "crossget"
_SETTABLE = {"reducer"}


class Attachment:
    """A model's reduction: the handle that `attach` returns.

    A context manager that detaches at its end, also after an exception. Entered again after it has been detached, it
    attaches again, with the cross tokens that it has.
    """

    def __init__(self, towers: dict[str, AttachedTower]) -> None:
        self._towers = towers
        self._blocks: list[nn.Module] = []
        self._undo: list[Undo] = []
        self._pauses = 0
        self._registered: nn.Module | None = None

    def __repr__(self) -> str:
        towers = "; ".join(f"{attached.tower}: {attached.reducer}" for attached in self._towers.values())
        return f"Attachment({towers}{'' if self.is_attached else '; detached'})"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _SETTABLE:
            given = "dataclasses.replace(attached.reducer, r=8)" if name == "r" else "crossget.ToMe(r=8)"
            raise AttributeError(
                f"an Attachment has no attribute {name!r} that could be set: set its reducer, as in "
                f"`attached.reducer = {given}`"
            )
        super().__setattr__(name, value)

    def __enter__(self) -> Attachment:
        if not self.is_attached:
            self._attach()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    # What happened in the last forward -----------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Per tower, how many tokens entered each block in the last forward (the cross token counts).

        A tower that has not run has none, nor has a language model without cross token.

        Raises:
            RuntimeError: no forward came before.
        """
        found = {name: t.last.tokens for name, t in self._towers.items()}
        if not any(found.values()):
            raise RuntimeError("no tower has run since crossget.attach: run a forward of the model first")
        return {name: [tokens[layer] for layer in sorted(tokens)] for name, tokens in found.items()}

    @property
    def source(self) -> dict[str, Tensor]:
        """Per tower [B, T0]: the token behind the last block that each input token went into; -1 if it was dropped.

        `crossget.unmerge` brings features of those tokens back to the input's grid with it. How much of each input
        token is in that token, and the same behind every block, is in the `records` of a forward that is recorded.

        Raises:
            RuntimeError: no forward of a reduced tower came before.
        """
        found = {name: t.last.source for name, t in self._towers.items() if t.last.source is not None}
        if not found:
            raise RuntimeError("no reduced tower has run since crossget.attach: run a forward of the model first")
        return found

    @property
    def records(self) -> dict[str, list[BlockRecord]]:
        """Per tower, what each of its blocks did in the last forward: where tokens went, their sizes and scores.

        Raises:
            RuntimeError: no tower's last forward was recorded.
        """
        found = {name: t.last.blocks for name, t in self._towers.items() if t.last.blocks is not None}
        if not found:
            raise RuntimeError(
                "the last forward was not recorded: run it inside `with attached.recording():`, and not compiled"
            )
        return {name: [blocks[layer] for layer in sorted(blocks)] for name, blocks in found.items()}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, forwards leave `records`, which keep every block's tokens in memory until the next forward.

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
            depth = len(tower.blocks)
            if len(record.cross_tokens) != depth:
                raise RuntimeError(
                    f"tower {name!r} has {len(record.cross_tokens)} cross tokens of {depth} blocks: run a "
                    "forward of both towers with gradients enabled before alignment_loss()"
                )
            sides.append(torch.stack([tower.project(record.cross_tokens[layer]) for layer in range(depth)]))
            if tower.prompt is not None and rows is None:
                rows = attached.rows
        if len(sides) != 2:
            raise RuntimeError(
                f"alignment_loss() needs two towers with cross tokens in one space, found {len(sides)}"
                f"{self._without_projection()}: attach CrossGET to a model with an image and a text tower"
            )
        if rows is not None:  # prompts and classes may have several images, or none
            sides[1] = sides[1].index_select(1, rows.to(sides[1].device))
        return alignment_loss(sides[0], sides[1], divergence)

    def _without_projection(self) -> str:
        names = [name for name, tower in self.towers.items() if tower.project is None]
        return f" (no projection of single tokens is known for: {', '.join(names)})" if names else ""

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
        """The reducer, or one per tower when there are several. May be set, to a reducer or a dict, in place.

        A forward that runs in another thread meanwhile ends with the reducer that it began with.
        """
        reducers = self.reducers
        return next(iter(reducers.values())) if len(reducers) == 1 else reducers

    @reducer.setter
    def reducer(self, value: Reducer | Mapping[str, Reducer]) -> None:
        towers = self.towers
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
        if self._registered is not None or not self.is_attached:
            state = (
                "registered already: call .unregister_parameters() first" if self.is_attached else "detached: attach"
            )
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

        Raises:
            ValueError: there is no such tower, or it takes no text.
        """
        attached = self._tower(tower)
        if attached.tower.text is None:
            raise ValueError(f"tower {tower!r} takes no text")
        note_text_ids(attached, ids)

    def set_text_features(self, features: Tensor | None, tower: str = "visual") -> None:
        """Say what `importance="text"` compares the tokens of images with, from the next forward on.

        Args:
            features: [E] for all images, or [B, E] one for each, as the model's `encode_text` gives them; None forgets.
            tower: whose tokens are compared.

        Raises:
            ValueError: there is no such tower, its tokens cannot be compared with texts, or `features` are not in
                their space.
        """
        attached = self._tower(tower)
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

    def _tower(self, name: str) -> AttachedTower:
        if name not in self._towers:
            raise ValueError(f"tower={name!r}: attached are the towers {sorted(self._towers)}")
        return self._towers[name]

    def save(self, folder: str | Path) -> None:
        """Write the cross tokens and the reducers to `folder`, see `crossget.load`.

        Raises:
            TypeError: a reducer has a schedule or field that JSON cannot hold.
        """
        saving.write(folder, self.reducers, self.cross_tokens)

    # On and off ------------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the model is reduced now."""
        return bool(self._blocks)

    def detach(self) -> None:
        """Give the model back as it was.

        Raises:
            RuntimeError: it is detached already, or something changed a block's class since.
        """
        self._leave()
        self.unregister_parameters()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model is the dense one. May be entered again inside.

        Raises:
            RuntimeError: the model is detached.
        """
        if self._pauses == 0:
            self._leave()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._attach()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, forwards run as in the host's `generate`: blocks whose output nobody looks at are left out."""
        with contextlib.ExitStack() as stack:
            for attached in self._towers.values():
                stack.enter_context(attached.in_generate())
            yield

    def _attach(self) -> None:
        for tower in self.towers.values():
            check_free(tower)
        for attached in self._towers.values():
            for number, block in enumerate(attached.tower.blocks):
                if owner_of(block) is not self:
                    swap_in(block, self, attached, number)
                    self._blocks.append(block)
            self._undo += wrap_host(attached)

    def _leave(self) -> None:
        if not self.is_attached:
            raise RuntimeError("already detached: attach again with crossget.attach(model, reducer), or enter `with`")
        for block in self._blocks:
            if not is_intact(block):
                raise RuntimeError(
                    f"a block's class is {type(block).__name__} now, not the one attach gave it: undo first what "
                    "wrapped or subclassed it since (FSDP, for instance), then detach"
                )
        while self._blocks:
            swap_out(self._blocks.pop())
        while self._undo:
            self._undo.pop()()


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
    attachment._attach()
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


def load(model: nn.Module, folder: str | Path) -> Attachment:
    """Attach to `model` what `Attachment.save` wrote.

    Args:
        model: of the architecture that was saved, not attached.
        folder: a local folder, or the id of a repository on the Hugging Face hub.

    Returns:
        The attachment.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the file was written by a newer version, names an unknown method, or does not fit the model.
    """
    reducers, weights, where = saving.open_folder(folder)
    return attach_with(model, reducers, weights, where)


def attach_with(
    model: nn.Module,
    reducer: Reducer | Mapping[str, Reducer],
    cross_tokens: Mapping[str, Tensor],
    where: str,
    previous: Attachment | None = None,
) -> Attachment:
    """Attach, with these cross tokens; a model that they do not fit stays as it was.

    Args:
        model: to be reduced.
        reducer: as for `crossget.attach`.
        cross_tokens: per tower [L, C].
        where: they come from.
        previous: the model's attachment, which is kept then.

    Raises:
        ValueError: a tower has no cross tokens, or of another shape, or they are for a tower that is not attached.
    """
    attached = previous or attach(model, reducer)
    try:
        _set_cross_tokens(attached, cross_tokens, where)
    except ValueError:
        if previous is None:
            attached.detach()
        raise
    return attached


def _set_cross_tokens(attached: Attachment, weights: Mapping[str, Tensor], where: str) -> None:
    expected = {name: tuple(p.shape) for name, p in attached.cross_tokens.items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if name in expected or name in attached.towers}
    unknown = sorted(set(weights) - set(attached.towers))
    if unknown or any(found.get(name) != shape for name, shape in expected.items()):
        raise ValueError(f"{where} has cross tokens {found} {unknown or ''}: this attachment needs {expected}")
    with torch.no_grad():
        for name, parameter in attached.cross_tokens.items():
            parameter.copy_(weights[name])


def main_tower(names: Iterable[str]) -> str:
    """Which tower one reducer is for."""
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
        others = [name for name in towers if name != main and reducer.cross_token]
        # What has no effect on another tower is not asked of it.
        plain = replace(
            reducer, r=0, strip_cross_token=False, class_token_only=None if reducer.class_token_only else False
        )
        return {main: reducer, **dict.fromkeys(others, plain)}
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
