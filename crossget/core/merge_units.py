"""Merging inside packed image towers [N, C], by merge units, as in Qwen-VL and GLM-V.

Such a tower holds the patches of all images in one sequence. Its patch merger joins `spatial_merge_size` squared
patches into one feature. These patches are a merge unit, and stand together in the sequence. A reducer merges whole
units, image by image, after each block: the tokens that it gets are the units, [U, S * C]. So the merger can join what
is left, and its output has one row for every unit of the dense model again. The code behind it needs no change.

Shapes: N patches of all images, S patches of a unit, U units, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crossget.core.attached_place import AttachedPlace
from crossget.core.block_class import argument_names, unwrap, wrap
from crossget.core.carried import ThreadValue
from crossget.core.state import BlockRecord
from crossget.methods.reducers import Reducer, TowerFacts, View

FACTS = TowerFacts(
    "the tower 'visual' of merge units", has_class_token=False, importance="attention", keys="tokens",
    keeps_cross_token=False, single_token_output=False, corrects_norms=False,
)  # fmt: skip


@dataclass(frozen=True)
class UnitTower:
    """A packed image tower with merge units.

    Attributes:
        tower: the module whose forward runs the blocks. It gets `grid_thw`, [images, 3].
        blocks: its blocks. They get the tokens, `cu_seqlens` and rotary tables.
        mergers: the modules that join the patches of a unit.
        size: S.
        grid: name of the tower's argument with the grids of the images.
    """

    tower: Any
    blocks: Sequence[nn.Module]
    mergers: Sequence[nn.Module]
    size: int
    grid: str = "grid_thw"

    def __str__(self) -> str:
        kind = type(self.blocks[0]).__name__
        return f"visual: {len(self.blocks)} blocks ({kind}), merge units of {self.size} patches"


class UnitRecord:
    """What the user can read about one forward.

    Attributes:
        tokens: layer -> number of units of all images before the block.
        source: [1, U] for each unit, the index of the one that it was merged into; -1 if it was dropped. None: no
            forward has ended.
        blocks: nothing, as blocks of packed towers are not recorded.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.source: Tensor | None = None
        self.blocks: dict[int, BlockRecord] | None = None


class _State:
    """The units of one forward: those that are left, and where the others went.

    Attributes:
        reducer: the method.
        total: U, the number of units of all images.
        images: [U] the image of each unit.
        kept: [K] the units that are left.
        source: [U] for each unit, the index among the K; -1 if it was dropped.
        sizes: [K] float32.
        layer: number of the next block.
    """

    def __init__(self, reducer: Reducer, units: Tensor) -> None:
        self.reducer, self.layer, self.record = reducer, 0, UnitRecord()
        self.total = int(units.sum())
        self.images = torch.arange(len(units), device=units.device).repeat_interleave(units)
        self.n_images = len(units)
        self.kept = self.source = torch.arange(self.total, device=units.device)
        self.sizes = torch.ones(self.total, device=units.device)

    @property
    def reduced(self) -> bool:
        """Whether units were removed."""
        return len(self.kept) < self.total

    def rows(self, size: int) -> Tensor:
        """[K * S] the patches of the units that are left."""
        return (self.kept[:, None] * size + torch.arange(size, device=self.kept.device)).flatten()


class AttachedUnits(AttachedPlace[UnitRecord]):
    """A tower with merge units, and the reducer that is attached to it. Its blocks are not recorded.

    Attributes:
        units: the tower.
    """

    def __init__(self, units: UnitTower, reducer: Reducer) -> None:
        self.units = units
        self._states: ThreadValue[_State] = ThreadValue()
        super().__init__(reducer, UnitRecord)

    def resolve(self, reducer: Reducer) -> Reducer:
        """The method with all fields resolved.

        Raises:
            ValueError: it needs what merge units do not have: a cross token, a class token, attention received.
        """
        if reducer.cross_token:
            raise ValueError(f"{reducer} has a cross token, and {FACTS.name} takes none: use Ward or ToMe")
        resolved = reducer.resolved(FACTS)
        if resolved.needs_attention:
            raise ValueError(f"{resolved} scores tokens by attention, which merge units do not have")
        return resolved

    # In the host's entry points ---------------------------------------------------------------------------------

    def wrap(self) -> list[Callable[[], Any]]:
        """Wrap the tower, its blocks and its mergers. Returns functions that undo it."""
        units = self.units
        tower_names = argument_names(type(units.tower).forward)
        wrapped: list[tuple[nn.Module, Any]] = [(units.tower, partial(self._around_tower, tower_names))]
        wrapped += [(block, partial(self._around_block, argument_names(type(block).forward))) for block in units.blocks]
        wrapped += [(merger, self._around_merger) for merger in units.mergers]
        for module, _ in wrapped:
            if "forward" in module.__dict__:
                raise ValueError(f"{type(module).__name__} has a forward of its own on the instance: remove that first")
        for module, around in wrapped:
            wrap(module, "forward", around)
        return [partial(unwrap, module, "forward") for module, _ in wrapped]

    def _around_tower(
        self, names: list[str], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if any(getattr(block, "gradient_checkpointing", False) and block.training for block in self.units.blocks):
            raise RuntimeError(
                f"{FACTS.name} cannot be trained with gradient checkpointing, which runs its blocks again without what "
                "was merged before: call gradient_checkpointing_disable() on the tower, or leave 'visual' out"
            )
        grid = {**dict(zip(names, args)), **kwargs}[self.units.grid]  # noqa: B905
        state = _State(self.reducer, grid.prod(-1) // self.units.size)
        self._states.set(state)
        try:
            out = original(*args, **kwargs)
        finally:
            self._states.set(None)
        state.record.source = state.source[None]
        self.last_record = state.record
        return out

    def _around_block(
        self, names: list[str], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        state = self._states.get()
        if state is None:  # a block alone, called by hand
            return original(*args, **kwargs)
        named = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        state.record.tokens[state.layer] = len(state.kept)
        biases, depth = None, len(self.units.blocks)
        if state.reduced:
            named = self._fitted(named, state)
            if state.reducer.proportional_attention:
                biases = state.sizes.log().repeat_interleave(self.units.size)
        merges = state.layer < depth - 1
        by_keys = merges and getattr(state.reducer, "keys", None) in ("all_heads", "mean_heads")
        with contextlib.nullcontext() if biases is None and not by_keys else _InAttention(biases) as mode:
            out = original(**named)
        if mode is not None and mode.seen != len(state.kept) * self.units.size:
            raise RuntimeError(
                f"{type(self.units.tower).__name__} showed no scaled_dot_product_attention for every image, so that "
                "log(size) could not be added, or keys not be compared: model.set_attn_implementation('sdpa'), or "
                "keys='tokens' and proportional_attention=False"
            )
        keys = torch.cat(mode.keys, 2)[0] if mode is not None and by_keys else None
        tokens = self._merge(out, state, depth, keys) if merges else out
        state.layer += 1
        return tokens

    def _around_merger(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out, state = original(*args, **kwargs), self._states.get()
        if state is None or not state.reduced:
            return out
        source = state.source.to(out.device)
        rows = out[source.clamp(min=0)]
        return rows if bool((source >= 0).all()) else rows.where(source[:, None] >= 0, out.mean(0))

    def _fitted(self, named: Mapping[str, Any], state: _State) -> dict[str, Any]:
        """The arguments of a block for the units that are left."""
        new, size = dict(named), self.units.size
        left = torch.zeros(state.total, dtype=torch.long, device=state.kept.device)
        left[state.kept] = size
        before = F.pad(left.cumsum(0), (1, 0))
        lengths = named["cu_seqlens"]
        # Windows may have become empty.
        new["cu_seqlens"] = before[(lengths // size).long().to(before.device)].to(lengths).unique_consecutive()
        if new.get("max_seqlen") is not None:
            new["max_seqlen"] = int(new["cu_seqlens"].diff().max())
        rows, total = state.rows(size), state.total * size
        for name, value in named.items():
            if isinstance(value, tuple) and all(isinstance(part, Tensor) and len(part) == total for part in value):
                new[name] = tuple(part[rows.to(part.device)] for part in value)
            elif name != names_first(named) and isinstance(value, Tensor) and value.dim() and len(value) == total:
                new[name] = value[rows.to(value.device)]
        return new

    def _merge(self, tokens: Tensor, state: _State, depth: int, keys: Tensor | None) -> Tensor:
        """[K' * S, C] the patches after a block, with units merged image by image.

        Args:
            tokens: [K * S, C] the patches after the block.
            state: of their units.
            depth: the number of blocks.
            keys: [H, K * S, D] of the block's attention; None: tokens are compared.
        """
        width, reducer = int(tokens.shape[-1]), state.reducer
        units = tokens.view(-1, self.units.size * width)
        heads = units[None] if keys is None else keys.unflatten(1, (-1, self.units.size)).flatten(2)
        image = state.images[state.kept]
        parts, kept, sizes, index, start = [], [], [], [], 0
        for number in range(state.n_images):
            mine = (image == number).nonzero()[:, 0]
            part, own = units[mine][None], state.sizes[mine][None]
            r = reducer.schedule.removed(state.layer, depth, len(mine))
            reduced = reducer.reduce(_view(part, heads[:, mine][None], own), r) if r > 0 else None
            if reduced is None:
                places = torch.arange(len(mine), device=mine.device)
                new, new_sizes, stays = part, own, places
            else:
                new, given, plan = reduced
                new_sizes = torch.ones_like(own[:, : new.shape[1]]) if given is None else given
                stays, places = plan.kept[0], plan.index[0]
            parts.append(new[0])
            kept.append(state.kept[mine[stays]])
            sizes.append(new_sizes[0])
            index.append(torch.where(places < 0, places, places + start))
            start += len(stays)
        moved = torch.cat(index)
        state.source = torch.where(state.source < 0, state.source, moved[state.source.clamp(min=0)])
        state.kept, state.sizes = torch.cat(kept), torch.cat(sizes)
        return torch.cat(parts).view(-1, width)


def names_first(named: Mapping[str, Any]) -> str:
    """The name of the first argument, the block's tokens."""
    return next(iter(named))


def _view(units: Tensor, heads: Tensor, sizes: Tensor) -> View:
    """The input of a reducer, of units [1, U, S * C] with their keys [1, H, U, S * D] and sizes [1, U]."""
    heads = heads.detach()
    protected = torch.zeros(units.shape[:2], dtype=torch.bool, device=units.device)
    return View(units, heads, heads, None, sizes, protected, 0)


class _InAttention(TorchFunctionMode):
    """Adds log(size) of the keys to the scores of every attention, which is called for one part after the other.

    Attributes:
        biases: [N] log(size) of all tokens of the block; None: nothing is added.
        keys: [1, H, n, D] of each call.
        seen: the number of tokens whose attention was called.
    """

    def __init__(self, biases: Tensor | None) -> None:
        super().__init__()
        self.biases, self.seen = biases, 0
        self.keys: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            self.keys.append(args[1] if len(args) > 1 else kwargs["key"])
            start, self.seen = self.seen, self.seen + int(query.shape[-2])
            if self.biases is None:
                return func(*args, **kwargs)
            bias = self.biases[start : self.seen].to(query)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None:  # one call for all images, whose mask hides the others
                bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask + bias
            if len(args) > 3:
                args = (*args[:3], bias, *args[4:])
            else:
                kwargs["attn_mask"] = bias if mask is not None else bias[None, None, None]
        return func(*args, **kwargs)
