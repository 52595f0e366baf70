"""The handle of an attached model.

Attaching swaps the class of every block (block_class.py), so that an `AttachedTower` (tower.py) runs the block's own
`forward` under a `Merge` (reduction.py). It also wraps the entry points of the host, the library model (hooks.py).
Nothing is added to the module tree: state dicts, `named_modules`, `isinstance` and `repr` do not change. Detaching
undoes both.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core import saving
from crossget.core.adapters import Tower
from crossget.core.block_class import is_intact, owner_of, swap_in, swap_out
from crossget.core.connector import NAME as CONNECTOR
from crossget.core.connector import AttachedConnector
from crossget.core.connector_prompts import ConnectorPrompts, wrap_model
from crossget.core.decoder_tower import AttachedDecoder
from crossget.core.hooks import Undo, check_not_patched, set_text_ends, wrap_host
from crossget.core.image_prompts import image_tokens
from crossget.core.layer_groups import has_groups, wrap_groups
from crossget.core.loop_tower import AttachedLoop
from crossget.core.merge_units import AttachedUnits
from crossget.core.state import BlockRecord
from crossget.core.tower import AttachedTower
from crossget.core.tower_choice import by_tower
from crossget.core.updates import UntrainedWarning
from crossget.methods.alignment import Divergence, alignment_loss
from crossget.methods.reducers import Reducer

_PARAMETER_MODULE = "crossget"
_MARK = "_crossget_attachment"
_SETTABLE = {"reducer"}


class Attachment:
    """The handle of an attached model, which `attach` returns.

    It is a context manager that detaches at its end, also after an exception. If it is entered when it is detached, it
    attaches again, with its reducers and cross tokens.

    A tower is a list of transformer blocks, such as the image encoder of a CLIP. `Attachment.towers` lists them by
    name.
    """

    def __init__(
        self, towers: dict[str, AttachedTower], connector: AttachedConnector | None = None,
        units: AttachedUnits | None = None,
    ) -> None:  # fmt: skip
        self._towers = towers
        self._connector, self._units = connector, units
        self._prompts = None if connector is None else ConnectorPrompts(connector)
        self._blocks: list[nn.Module] = []
        self._undo: list[Undo] = []
        self._pauses = 0
        self._registered: nn.Module | None = None
        self._undo_registering: list[Undo] = []
        self._warned_untrained = False

    def __repr__(self) -> str:
        parts = [f"{attached.tower}: {attached.reducer}" for attached in self._towers.values()]
        parts += [] if self._units is None else [f"{self._units.units}: {self._units.reducer}"]
        parts += [] if self._connector is None else [f"{CONNECTOR}: {self._connector.reducer}"]
        return f"Attachment({'; '.join(parts)}{'' if self.is_attached else '; detached'})"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _SETTABLE:
            given = "dataclasses.replace(attached.reducer, r=8)" if name == "r" else "crossget.ToMe(r=8)"
            raise AttributeError(
                f"an Attachment has no attribute {name!r} that can be set: set its reducer, as in "
                f"`attached.reducer = {given}`"
            )
        super().__setattr__(name, value)

    def __enter__(self) -> Attachment:
        if not self.is_attached:
            self._swap_in_blocks()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    # What happened in the last forward -----------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, list[Any]]:
        """Per tower, the number of tokens before each block in the last forward, including the cross token.

        The list is empty for a tower that has not run, and for a language model without a cross token. For "connector"
        it has a pair for every unit (image or tile): the number of its features before and after.

        Raises:
            RuntimeError: no tower has run.
        """
        found = {name: t.last_record.tokens for name, t in self._parts.items() if t is not self._connector}
        units = {} if self._connector is None else {CONNECTOR: list[Any](self._connector.last_record.tokens)}
        if not any(found.values()) and not any(units.values()):
            raise RuntimeError("no tower has run since crossget.attach: run a forward of the model first")
        return {name: [tokens[layer] for layer in sorted(tokens)] for name, tokens in found.items()} | units

    @property
    def source(self) -> dict[str, Tensor]:
        """Per tower [B, T0]: for each input token, the index of the token after the last block that it was merged into.

        The index of a dropped token is -1. `crossget.unmerge` expands features of the reduced tokens to one per input
        token by these indices. The `records` of a recorded forward hold them for every block, with their weights.

        Raises:
            RuntimeError: no reduced tower has run.
        """
        ran = [(name, t.last_record.source) for name, t in self._parts.items()]
        found = {name: source for name, source in ran if source is not None}
        if not found:
            raise RuntimeError("no reduced tower has run since crossget.attach: run a forward of the model first")
        return found

    @property
    def records(self) -> dict[str, list[BlockRecord]]:
        """Per tower, one record for each block of the last forward; for "connector", one for each unit, with B = 1.

        Raises:
            RuntimeError: the last forward was not recorded.
        """
        found = {name: t.last_record.blocks for name, t in self._towers.items() if t.last_record.blocks is not None}
        units = None if self._connector is None else self._connector.last_record.blocks
        if not found and units is None:
            raise RuntimeError(
                "the last forward was not recorded: run it inside `with attached.recording():`, and not compiled"
            )
        by_layer = {name: [blocks[layer] for layer in sorted(blocks)] for name, blocks in found.items()}
        return by_layer if units is None else by_layer | {CONNECTOR: units}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which forwards are recorded, see `records`.

        A record keeps the tokens of every block in memory.

        The records are those of the last forward. There are none of compiled forwards, none of language models that
        generate, as their tokens are not reduced, and none of packed towers that merge whole units.
        """
        before = {name: attached.recording for name, attached in self._parts.items()}
        for attached in self._parts.values():
            attached.recording = True
        try:
            yield
        finally:
            for name, attached in self._parts.items():
                attached.recording = before[name]

    def alignment_loss(self, divergence: Divergence = "reference", rows: Tensor | None = None) -> Tensor:
        """The alignment loss of the last forward's cross tokens, a scalar to add to the task's loss in training.

        Args:
            divergence: see `crossget.methods.alignment.alignment_loss`.
            rows: [B] for each row of the first tower, the index of the matching row of the second tower: the labels of
                the images, if the texts are the class names. None: row i matches row i, and images in prompts match
                their prompts.

        Raises:
            RuntimeError: there are not two towers with cross tokens, or no forward with gradients has run.

        Source: CrossGET (arXiv 2305.17455), section 3.1; the authors' implementation.
        """
        sides = []
        for name, attached in self._towers.items():
            tower, record = attached.tower, attached.last_record
            if not attached.reducer.cross_token or tower.project is None:
                continue
            depth = tower.depth
            if len(record.cross_tokens) != depth:
                raise RuntimeError(
                    f"tower {name!r} has {len(record.cross_tokens)} cross tokens of {depth} blocks: run a "
                    "forward of both towers with gradients enabled before alignment_loss()"
                )
            sides.append(torch.stack([tower.project(record.cross_tokens[layer]) for layer in range(depth)]))
            if tower.prompt is not None and rows is None:
                rows = attached.prompt_of_image
        if len(sides) != 2:
            raise RuntimeError(
                f"alignment_loss() needs two towers with cross tokens in one space, found {len(sides)}"
                f"{self._without_projection()}: attach CrossGET to a model with an image and a text tower"
            )
        if rows is not None:  # a prompt or class may match several images, or none
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
    def connector(self) -> AttachedConnector | None:
        """The connector with its reducer; None: it is not reduced."""
        return self._connector

    @property
    def _parts(self) -> dict[str, Any]:
        """The towers, and the connector."""
        others = {"visual": self._units, CONNECTOR: self._connector}
        return self._towers | {name: part for name, part in others.items() if part is not None}

    @property
    def reducers(self) -> dict[str, Reducer]:
        """Per tower, and for "connector", its reducer with all fields resolved."""
        return {name: attached.reducer for name, attached in self._parts.items()}

    @property
    def reducer(self) -> Reducer | dict[str, Reducer]:
        """The reducer of the only tower, or a dict of reducers by tower name. It can be set, to a reducer or a dict.

        A forward that runs in another thread meanwhile finishes with its old reducer.
        """
        reducers = self.reducers
        return next(iter(reducers.values())) if len(reducers) == 1 else reducers

    @reducer.setter
    def reducer(self, value: Reducer | Mapping[str, Reducer]) -> None:
        towers = self.towers
        parts = self._parts
        if not towers and isinstance(value, Reducer):
            value = {next(iter(parts)): value}
        others = {} if isinstance(value, Reducer) else {name: one for name, one in value.items() if name not in towers}
        unknown = sorted(set(others) - set(parts))
        if unknown:
            raise ValueError(f"reducer names {unknown}: attached are {sorted(parts)}")
        chosen = value if isinstance(value, Reducer) else {name: one for name, one in value.items() if name in towers}
        by_name = by_tower(towers, chosen) if chosen else {}
        for name, reducer in by_name.items():  # errors are raised before anything changes
            attached_tower(towers[name], reducer)
        for name, reducer in others.items():
            parts[name].resolve(reducer)
        for name, reducer in {**others, **by_name}.items():
            parts[name].set_reducer(reducer)

    @contextlib.contextmanager
    def with_reducer(self, reducer: Reducer | Mapping[str, Reducer]) -> Iterator[Attachment]:
        """Context in which the model has another reducer, in this thread.

        Other threads keep theirs.

        A compiled model is compiled once for every reducer. torch keeps 8 variants of a function
        (`torch._dynamo.config.recompile_limit`): with a ninth one it raises an error or falls back to eager code.

        Args:
            reducer: a reducer, or a dict of reducers by tower name, as for `crossget.attach`.

        Raises:
            TypeError: it is neither.
            ValueError: the reducer cannot work on the tower, or a tower's name is unknown.
        """
        with contextlib.ExitStack() as stack:
            for attached in self._parts.values():
                stack.enter_context(attached.own_reducer())
            self.reducer = reducer
            yield self

    @property
    def cross_tokens(self) -> dict[str, Tensor]:
        """Per tower [L, C]: one learnable vector per block.

        They are the parameters themselves, but copies while they are registered with one parameter per block.
        """
        return {
            name: attached.cross_vectors
            for name, attached in self._towers.items()
            if attached.cross_vectors is not None
        }

    def set_cross_tokens(self, values: Mapping[str, Tensor]) -> None:
        """Write values [L, C] into the cross tokens, by tower."""
        for name, value in values.items():
            self._tower(name).set_cross_vectors(value)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The cross tokens, for an optimiser."""
        for attached in self._towers.values():
            yield from attached.cross_parameters

    def register_parameters(self, module: nn.Module, per_block: bool | None = None) -> None:
        """Make the cross tokens parameters of a module, until `unregister_parameters` or `detach`.

        Optimisers over `module.parameters()`, DDP, FSDP2, DeepSpeed, state dicts and checkpoints of training loops then
        treat them as any other parameter. Call this before the module is wrapped by DDP, FSDP2 or DeepSpeed.

        The model's own `no_weight_decay` and `group_matcher`, which optimisers of timm ask for, know them, too. There
        they have no weight decay, and the learning rate of their block.

        Args:
            module: usually the attached model.
            per_block: True: one new parameter [C] per block, `crossget.visual.0` and so on. False: one [L, C] per
                tower, `crossget.visual`. None: one per block where the module has timm's `group_matcher`,
                as a parameter can have one learning rate only.

        Raises:
            RuntimeError: they are registered already, or the model is detached.
            ValueError: the module has an attribute `crossget`, or a patched method of the above.
        """
        if self._registered is not None or not self.is_attached:
            state = (
                "registered already: call .unregister_parameters() first" if self.is_attached else "detached: attach"
            )
            raise RuntimeError(f"cannot register the cross tokens: they are {state}")
        if hasattr(module, _PARAMETER_MODULE):
            raise ValueError(f"{type(module).__name__} has an attribute {_PARAMETER_MODULE!r} already")
        self._undo_registering = wrap_groups(module, partial(self._hosts, module))
        parameter_module = nn.Module()
        one_each = has_groups(module) if per_block is None else per_block
        for attached in self._towers.values():
            attached.register(parameter_module, one_each)
        module.add_module(_PARAMETER_MODULE, parameter_module)
        self._registered = module

    def unregister_parameters(self) -> None:
        """Undo `register_parameters`; nothing happens if the cross tokens are not registered."""
        if self._registered is None:
            return
        for attached in self._towers.values():
            attached.register(None)
        while self._undo_registering:
            self._undo_registering.pop()()
        delattr(self._registered, _PARAMETER_MODULE)
        self._registered = None

    def _hosts(self, module: nn.Module) -> dict[str, str | None]:
        """See `layer_groups.Hosts`, for the module in which the cross tokens are registered."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        found: dict[str, str | None] = {}
        for attached in self._towers.values():
            blocks, parameters = attached.tower.blocks, attached.cross_parameters
            for layer, parameter in enumerate(parameters):
                of_block = None
                if parameter.dim() == 1:  # a loop is one module for all blocks
                    of_block = next(iter(blocks[min(layer, len(blocks) - 1)].parameters()), None)
                found[names[id(parameter)]] = names.get(id(of_block))
        return found

    def warn_untrained(self, tower: str) -> None:
        """Warn, once, that no optimiser updates the cross tokens of the tower `tower`."""
        if self._warned_untrained:
            return
        self._warned_untrained = True
        warnings.warn(
            f"the weights of tower {tower!r} have changed since the last training forward, and its cross tokens, which "
            "have a gradient, have not: the optimiser lacks them. Call attached.register_parameters(model) before the "
            "optimiser is made, or give it attached.parameters(), too. If they are not to be trained, call "
            ".requires_grad_(False) on each of attached.parameters()",
            UntrainedWarning,
            stacklevel=2,
        )

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Tokens per image in the prompts of a model: as its processor writes them, and after the reduction.

        Raises:
            ValueError: the model has no images in its prompts, or gets one token for every position of their grid.
        """
        for attached in self._towers.values():
            if attached.tower.prompt is not None:
                return image_tokens(attached.tower.prompt, attached, {})
        raise ValueError(
            f"no tower of {self} puts images into prompts in reduced form, so prompts keep their image tokens"
        )

    def set_text_ids(self, ids: Tensor, tower: str = "text") -> None:
        """Give the token ids of the next forward's texts, from which their end-of-text tokens are found.

        This is needed only if the tower's own embedding does not get the ids, as with learned prompts.

        Args:
            ids: [B, T] token ids, from the model's tokenizer.
            tower: name of the tower.

        Raises:
            ValueError: there is no such tower, or it takes no text.
        """
        attached = self._tower(tower)
        if attached.tower.text is None:
            raise ValueError(f"tower {tower!r} takes no text")
        set_text_ends(attached, ids)

    def _tower(self, name: str) -> AttachedTower:
        if name not in self._towers:
            raise ValueError(f"tower={name!r}: attached are the towers {sorted(self._towers)}")
        return self._towers[name]

    def save(self, folder: str | Path) -> None:
        """Write the cross tokens and the reducers to `crossget.safetensors` in a folder, for `crossget.load`.

        The file is written whole or not at all.

        Args:
            folder: created if it does not exist.

        Raises:
            TypeError: a reducer has a schedule or field that cannot be written as JSON.
        """
        saving.write(folder, self.reducers, self.cross_tokens)

    # On and off ------------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the model is attached now."""
        return bool(self._blocks or self._undo)

    def detach(self) -> None:
        """Undo `attach`: the model is as it was before.

        Raises:
            RuntimeError: it is detached already, or something has changed a block's class since.
        """
        self._swap_out_blocks()
        self.unregister_parameters()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which the model is detached. It can be nested.

        Raises:
            RuntimeError: the model is detached.
        """
        if self._pauses == 0:
            self._swap_out_blocks()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._swap_in_blocks()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Context in which forwards run as in the host's `generate`: blocks whose output is not used are skipped."""
        with contextlib.ExitStack() as stack:
            for attached in self._towers.values():
                stack.enter_context(attached.in_generate())
            yield

    def _swap_in_blocks(self) -> None:
        for tower in self.towers.values():
            check_not_patched(tower)
        if self._prompts is not None and "generate" in self._prompts.connector.model.__dict__:
            name = type(self._prompts.connector.model).__name__
            raise ValueError(f"{name}.generate is patched on the instance: remove that before attaching")
        for attached in self._towers.values():
            for number, block in enumerate(attached.tower.blocks):
                if owner_of(block) is not self:
                    swap_in(block, self, attached, number)
                    self._blocks.append(block)
            self._undo += wrap_host(attached, self._prompts)
        if self._units is not None:
            self._undo += self._units.wrap()
            self._undo.append(mark(self._units.units.tower, self))
        if self._prompts is not None:
            in_towers = any(tower.prompt is not None for tower in self.towers.values())
            self._undo += wrap_model(self._prompts, wraps_generate=not in_towers)
            self._undo.append(mark(self._prompts.connector.model, self))

    def _swap_out_blocks(self) -> None:
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
        for attached in self._towers.values():
            for block in attached.tower.blocks:
                if owner_of(block) is not None:  # a copy of a block, made while that was attached
                    swap_out(block)
        while self._undo:
            self._undo.pop()()


def attached_tower(tower: Tower, reducer: Reducer) -> AttachedTower:
    """The tower with its reducer.

    Raises:
        ValueError: the reducer cannot work on the tower.
    """
    if tower.loop:
        return AttachedLoop(tower, reducer)
    return (AttachedTower if tower.reducible else AttachedDecoder)(tower, reducer)


def attach_towers(
    towers: Iterable[Tower], reducers: Mapping[str, Reducer], connector: AttachedConnector | None = None,
    units: AttachedUnits | None = None,
) -> Attachment:  # fmt: skip
    """Attach reducers to towers, by name, one behind the connector, and one to the merge units of a packed tower.

    Raises:
        ValueError: a reducer cannot work on its tower.
    """
    by_name = {tower.name: tower for tower in towers}
    attached = {name: attached_tower(by_name[name], reducer) for name, reducer in reducers.items()}
    attachment = Attachment(attached, connector, units)
    attachment._swap_in_blocks()
    return attachment


def mark(model: nn.Module, attachment: Attachment) -> Undo:
    """Let `find_attachment` find the attachment of a model of which no block is attached. Returns what undoes it."""
    model.__dict__[_MARK] = attachment
    return partial(_unmark, model)


def _unmark(model: nn.Module) -> None:
    del model.__dict__[_MARK]


def marked(model: nn.Module) -> Any:
    """The attachment that `mark` has left; None: there is none."""
    return model.__dict__.get(_MARK)
