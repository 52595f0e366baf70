"""Prompts for fewer image features: the placeholders of the features that left are left out.

The host computes the features of all images first, outside of its forward. They are reduced, and the host gets them
back as `mm_encoder_outputs`, which its forward takes in place of pixels. The columns of the placeholders whose features
left are dropped from ids, mask, labels and token types. The others keep the positions that the host computes for the
full prompt. What is known of a prompt (`PromptRecord`) is an attribute of its cache of keys and values, so that later
turns and decoding steps find it.

Shapes: B rows, T tokens of the caller's prompt, W tokens of the shorter one, N placeholders, C channels.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossget.core import sized_keys
from crossget.core.adapters import RECOGNISED_KERNELS
from crossget.core.block_class import argument_names, unwrap, wrap
from crossget.core.carried import ThreadValue
from crossget.core.connector import AttachedConnector, Connector, ConnectorRecord
from crossget.core.decoder_tower import cached_tokens
from crossget.core.prompt_parts import (
    PADDING_VALUES,
    RECORD,
    PromptRecord,
    first_given,
    outer,
    record_of,
    shift_limits,
    with_prompt,
)

PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_patches")
_OLD_NAMES = {"pixel_values_images": "pixel_values", "image_patches": "pixel_values"}  # hosts still take them


class Columns:
    """The columns of a prompt that stay. Shorter rows are padded in front or behind.

    Args:
        keep: [B, T] true for columns that stay.
        padding: [B, T] true for padding. Each row keeps as much as the row with the least padding has.
        left: pad in front.
        first: [B, S] the places of the first columns, which are in the cache; the others are padded behind these.
        start: the number of columns of the shorter prompt that are in the cache.

    Attributes:
        place: [B, T] see `PromptRecord`.
        width: W.
        lengths: [B] the number of columns of each row that stay.
    """

    def __init__(self, keep: Tensor, padding: Tensor, *, left: bool, first: Tensor, start: int) -> None:
        self.tokens, known = int(keep.shape[1]), int(first.shape[1])
        keep = (keep & ~padding)[:, known:]
        lengths = keep.sum(1)
        new = int(lengths.max() + padding[:, known:].sum(1).min())
        place = start + keep.long().cumsum(1) - 1
        if left:
            place = place + (new - lengths)[:, None]
        self.place = torch.cat([first, place.masked_fill(~keep, -1)], 1)
        self.width = start + new
        self.lengths = (self.place >= 0).sum(1)
        self.row, self.source = (self.place >= 0).nonzero(as_tuple=True)
        self.column = self.place[self.row, self.source]

    def take(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, S + T, ..] -> [B, S + W, ..], with `fill` at padding. S is what a mask has for cached tokens."""
        cached, values = values.tensor_split([values.shape[1] - self.tokens], 1)
        row, source, column = (index.to(values.device) for index in (self.row, self.source, self.column))
        out = values.new_full((len(values), self.width, *values.shape[2:]), fill)
        out = out.index_put((row, column), values[row, source])
        return torch.cat([cached, out], 1) if cached.shape[1] else out

    def take_positions(self, positions: Tensor) -> Tensor:
        """[.., B, T] -> [.., B, W], with 0 at padding."""
        row, source, column = (index.to(positions.device) for index in (self.row, self.source, self.column))
        out = positions.new_zeros(*positions.shape[:-1], self.width)
        out[..., row, column] = positions[..., row, source]
        return out


class Encoded(NamedTuple):
    """The features of one modality: what `get_image_features` returned, read in the order of the placeholders.

    Attributes:
        out: what was returned.
        entries: the number of features of each of its entries.
        flat: [N, C] all features.
        layers: [N, C'] further features of the same tokens, for layers of the language model (deepstack).
        received: [N] the attention that each received in the image tower; None: nothing asks for it.
    """

    out: Any
    entries: list[int]
    flat: Tensor
    layers: list[Tensor]
    received: Tensor | None = None


class _FittedCall(NamedTuple):
    """A call whose arguments were fitted, and which runs.

    Attributes:
        module: whose forward it is; None: a call of `generate`.
        frame: from which the forward is called, or that of `generate`; None: not known.
        record: of its prompt; None: it has no images.
    """

    module: Any
    frame: FrameType | None
    record: PromptRecord | None


class ConnectorPrompts:
    """Fits the arguments of a model's `forward` and `generate` to the features that stay.

    Args:
        attached: the connector, with its reducer.

    """

    def __init__(self, attached: AttachedConnector) -> None:
        self.attached, self.connector = attached, attached.connector
        self._calls: ThreadValue[_FittedCall] = ThreadValue()

    # What a call becomes ----------------------------------------------------------------------------------------

    def fit(self, arguments: dict[str, Any], *, generates: bool) -> tuple[dict[str, Any], PromptRecord | None]:
        """The arguments for fewer features, and what is known of their prompt (None: the call has no images).

        Args:
            arguments: of the call, by name. They are not modified.
            generates: the call is one of `generate`.

        Raises:
            ValueError: the attention mask does not have the shape [B, T], or there are other features than
                placeholders.
            RuntimeError: the kernel of the language model was changed, and takes no sizes.
        """
        arguments = self._renamed(arguments)
        tokens = first_given(arguments, "input_ids", "inputs_embeds")
        given = dict(arguments.get("mm_encoder_outputs") or {})
        has_images = any(given.values()) or any(arguments.get(name) is not None for name in PIXELS)
        if tokens is None:
            return arguments, None
        earlier = record_of(first_given(arguments, "cache", "past_key_values"))
        if not has_images:
            if earlier is None or not generates:
                return arguments, None
            return self._shorten(dict(arguments), arguments, earlier, None)
        if not generates and int(cached_tokens(first_given(arguments, "cache", "past_key_values"))) > 0:
            raise ValueError(
                "a forward with a cache got new images behind the connector: give the whole prompt and the cache to "
                "generate, which goes on from it, or run the forward without a cache"
            )
        mask = arguments.get("attention_mask")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask has the shape {list(mask.shape)}, which cannot be shortened with its prompt: give a "
                f"mask {list(tokens.shape[:2])}"
            )
        self.attached.check_kernel()
        chosen = _Chosen(self, arguments, tokens, earlier)
        encoded = self._encode(arguments, given)
        if not encoded:
            return arguments, None
        new = {name: value for name, value in arguments.items() if name not in PIXELS}
        new["mm_encoder_outputs"] = {**given, **{name: chosen.reduce(name, one) for name, one in encoded.items()}}
        self.attached.last_record = chosen.record
        if bool(chosen.keep.all()) and earlier is None:
            return new, None
        return self._shorten(new, arguments, earlier, chosen, generates=generates)

    def _takes(self, modality: str) -> Collection[str]:
        """The arguments of `get_image_features`, or of that of another modality."""
        return inspect.signature(getattr(self.connector.parts, f"get_{modality}_features")).parameters

    def _renamed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the names that `get_image_features` has for them."""
        takes = self._takes("image")
        old = {old: new for old, new in _OLD_NAMES.items() if old in arguments and old not in takes and new in takes}
        if not old:
            return arguments
        renamed = {name: value for name, value in arguments.items() if name not in old}
        return {**renamed, **{new: arguments[name] for name, new in old.items() if arguments[name] is not None}}

    def _encode(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Encoded]:
        """What the host makes of the images and videos of a call, by modality.

        Raises:
            ValueError: there are pixels that are not encoded by any of its methods.
        """
        taken = {name for modality in self.connector.placeholders for name in self._takes(modality)}
        unknown = [name for name in PIXELS if arguments.get(name) is not None and name not in taken]
        if unknown:
            raise ValueError(
                f"{type(self.connector.model).__name__} got {', '.join(unknown)}, whose features cannot be reduced "
                f"behind its connector: it takes {' and '.join(self.connector.placeholders)} features; detach for it"
            )
        found = {}
        for modality in self.connector.placeholders:
            out = given.get(modality)
            if out is not None:
                if self.attached.reducer.needs_tower_attention:
                    raise ValueError(
                        f"importance='tower_attention' got encoded {modality}s as mm_encoder_outputs, whose attention "
                        "in the image tower is not known: give their pixel values"
                    )
                found[modality] = read_features(self.connector, out)
                continue
            names = [name for name in self._takes(modality) if arguments.get(name) is not None]
            if any(name in PIXELS for name in names):
                pixels = {name: arguments[name] for name in names}
                found[modality] = encode(self.attached, f"get_{modality}_features", pixels)
        return found

    def placeholders(self, modality: str, tokens: Tensor) -> Tensor:
        """[B, T] true for the placeholders of a modality, in token ids [B, T] or embeddings [B, T, C]."""
        placeholder = self.connector.placeholders[modality]
        if tokens.dim() == 2:
            return tokens == placeholder
        like = self.connector.model.get_input_embeddings()(torch.tensor(placeholder, device=tokens.device))
        return torch.as_tensor((tokens == like.to(tokens.dtype)).all(-1))

    # The shorter prompt -----------------------------------------------------------------------------------------

    def _shorten(
        self, new: dict[str, Any], arguments: Mapping[str, Any], earlier: PromptRecord | None,
        chosen: _Chosen | None, *, generates: bool = True,
    ) -> tuple[dict[str, Any], PromptRecord]:  # fmt: skip
        """The arguments without the columns that left, and their record.

        Args:
            new: the arguments, with reduced features.
            arguments: the arguments as they were given.
            earlier: of the prompt in the cache, which the prompt goes on from; None: it begins.
            chosen: what stays of the images of this call; None: it has no images.
            generates: the call is one of `generate`.
        """
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments["inputs_embeds"]
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        pad = self._pad()
        mask: Any = arguments.get("attention_mask")
        if mask is None:
            # Without a mask and a cache, gaps between positions would be taken for borders of packed sequences.
            hides = generates and ids is not None and earlier is None
            seen = ids != pad if hides else torch.ones(batch, length, device=tokens.device)
            mask = torch.as_tensor(seen).long()
            new["attention_mask"] = mask
        keep = chosen.keep if chosen is not None else torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        padding = _padding({"attention_mask": mask}, keep)
        full = self._full_positions(arguments, mask, tokens, earlier)
        start = int(cached_tokens(first_given(arguments, "cache", "past_key_values")))
        first = torch.arange(start, device=tokens.device).expand(batch, -1)  # a cache without a record has no images
        if earlier is not None:
            first, start = earlier.cached(start)
        left = generates or bool(padding[:, 0].any())
        columns = Columns(keep, padding, left=left, first=first[:, :length], start=start)
        for name, fill in {"input_ids": pad, **PADDING_VALUES, "moe_mm_token_type_ids": 0}.items():
            if new.get(name) is not None:
                new[name] = columns.take(new[name], fill)
        positions = self._short_positions(full, columns, new["attention_mask"])
        if earlier is not None:  # the positions of what is in the cache stay
            width = int(earlier.positions.shape[-1])
            positions = torch.cat([earlier.positions, positions[..., width:]], -1)
        new["position_ids"] = positions
        following = self._following(full, positions, padding)
        self._set_rope_deltas(following, columns)
        log_sizes = None
        if self.attached.adds_sizes:
            sizes = torch.ones_like(keep, dtype=torch.float32) if chosen is None else chosen.sizes
            log_sizes = columns.take(sizes, 1).log()
            if earlier is not None and earlier.log_sizes is not None:
                log_sizes = torch.cat([earlier.log_sizes, log_sizes[:, earlier.log_sizes.shape[1] :]], 1)
        return new, PromptRecord(columns.place, positions, following, log_sizes)

    def _pad(self) -> int:
        config = self.connector.model.config
        holders = (config, config.get_text_config())
        return int(next((pad for one in holders if (pad := getattr(one, "pad_token_id", None)) is not None), 0))

    def _full_positions(
        self, arguments: Mapping[str, Any], mask: Tensor, tokens: Tensor, earlier: PromptRecord | None
    ) -> Tensor:
        """[B or 1, T] or [3 or 4, B, T] the positions that the host gives to the prompt as it was given."""
        given = arguments.get("position_ids")
        if given is not None:
            return torch.as_tensor(given)
        start = 0 if earlier is None else int(earlier.place.shape[1])
        known = {**arguments, "attention_mask": mask}
        for name in (*PADDING_VALUES, "input_ids"):
            if start and known.get(name) is not None:
                known[name] = known[name][:, start:]
        if earlier is None:
            return torch.as_tensor(self.connector.model._prepare_position_ids_for_generation(tokens, known))
        known = {name: value for name, value in known.items() if name not in ("cache", "past_key_values")}
        later: Tensor = self.connector.model._prepare_position_ids_for_generation(tokens[:, start:], known)
        following = earlier.following
        if following.dim() == 3:  # its first row may count tokens instead
            following = following[-1:]
        later = later.expand(*later.shape[:-2], len(tokens), -1) + following
        return torch.cat([later.new_zeros(*later.shape[:-1], start), later], -1)

    def _axes(self) -> int:
        rope = getattr(self.connector.model.config.get_text_config(), "rope_parameters", None) or {}
        return len(rope.get("mrope_section") or (1, 1, 1))

    def _short_positions(self, full: Tensor, columns: Columns, mask: Tensor) -> Tensor:
        batch = len(mask)
        counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -columns.width :]
        if full.dim() == 2:
            original = self.attached.keep.positions == "original"
            return columns.take_positions(full.expand(batch, -1)) if original else counted
        short = columns.take_positions(full.expand(-1, batch, -1))
        if len(short) == self._axes() + 1:
            short[0] = counted  # it counts tokens, for masks, and rotates nothing
        return short

    def _following(self, full: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """[.., B, 1] the position behind the prompt, on all axes that of its largest position."""
        counted = positions.amax(-1, keepdim=True) + 1
        if full.dim() == 2 and self.attached.keep.positions == "renumbered":
            return counted
        seen = full.expand(*full.shape[:-2], *padding.shape).masked_fill(padding.to(full.device), -1)
        if full.dim() == 2:
            return seen.amax(-1, keepdim=True) + 1
        following = seen[-self._axes() :].amax((0, -1))[:, None].expand_as(counted) + 1
        return torch.cat([counted[:1], following[1:]]) if len(full) == self._axes() + 1 else following

    def _set_rope_deltas(self, following: Tensor, columns: Columns) -> None:
        """Correct what the host adds to the positions of later calls that give none."""
        holder = self.connector.parts
        if following.dim() == 3 and getattr(holder, "rope_deltas", None) is not None:
            holder.rope_deltas = following[-1] - columns.lengths.to(following.device)[:, None]

    # In the host's entry points ---------------------------------------------------------------------------------

    def _running(self) -> _FittedCall | None:
        """The call that was fitted and runs in this thread. A KeyboardInterrupt ends it without a hook."""
        call = self._calls.get()
        frame: FrameType | None = sys._getframe(1)
        while call is not None and frame is not call.frame:
            if frame is None:
                self._calls.set(None)
                return None
            frame = frame.f_back
        return call

    def before_forward(
        self, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook with keyword arguments."""
        named = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        call = self._running()
        if call is None:
            named, record = self.fit(named, generates=False)
            call = _FittedCall(module, _caller(), record)
            self._calls.set(call)
        cache, record = first_given(named, "cache", "past_key_values"), call.record
        if cache is not None and record is not None:
            setattr(cache, RECORD, record)
        generates = call.module is None  # the host then counts on from the last position
        record = record if generates else record_of(cache)
        tokens = first_given(named, "input_ids", "inputs_embeds")
        if record is not None and tokens is not None and (generates or named.get("position_ids") is None):
            named["position_ids"] = _later_positions(record, int(cached_tokens(cache)), tokens)
        if record is not None and tokens is not None and generates and cache is None:
            # `generate` drops a mask that hides nothing. Gaps would be borders of packed sequences, as in `_shorten`.
            mask = named.get("attention_mask")
            named["attention_mask"] = tokens.new_ones(tokens.shape[:2]).long() if mask is None else mask
        return (), named

    def after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Forward hook: the cache that this forward has made gets the record of its prompt."""
        call = self._calls.get()
        cache = first_given(out, "cache", "past_key_values") if isinstance(out, Mapping) else None
        if call is not None and call.record is not None and cache is not None:
            setattr(cache, RECORD, call.record)
        if call is not None and call.module is module:
            self._calls.set(None)

    def around_generate(
        self, names: list[str], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `generate` on the shorter prompt. The output begins with the caller's prompt."""
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        if arguments.get("inputs") is not None and arguments.get("input_ids") is None:
            arguments["input_ids"] = arguments.pop("inputs")
        with torch.no_grad():
            fitted, record = self.fit(arguments, generates=True)
        old, new = (first_given(these, "input_ids", "inputs_embeds") for these in (arguments, fitted))
        self._check_beams(fitted)
        if new is not old:
            shift_limits(fitted, int(new.shape[1]) - int(old.shape[1]))
        outer = self._calls.get()
        self._calls.set(_FittedCall(None, sys._getframe(), record))
        try:
            out = original(**fitted)
        finally:
            self._calls.set(outer)
        if new is old or arguments.get("input_ids") is None:  # generated from embeddings, the output has no prompt
            return out
        if isinstance(out, Tensor):
            return with_prompt(old, out[:, new.shape[1] :])
        out.sequences = with_prompt(old, out.sequences[:, new.shape[1] :])
        return out

    def _check_beams(self, arguments: Mapping[str, Any]) -> None:
        """Check that `generate` can tell the images of the rows apart, which it repeats for every beam.

        Raises:
            ValueError: it cannot.
        """
        config = arguments.get("generation_config") or self.connector.model.generation_config
        copies = max(arguments.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))
        for out in (arguments.get("mm_encoder_outputs") or {}).values():
            features = getattr(out, self.connector.field)
            if copies > 1 and isinstance(features, Tensor) and len(features) == 1 and len(self._units()) > 1:
                raise ValueError(
                    f"{type(self.connector.model).__name__} holds the features of all images in one tensor, and "
                    f"generate repeats them for each of {copies} sequences by images of one size: keep the same number "
                    "for every image, or generate one sequence"
                )

    def _units(self) -> list[Any]:
        return self.attached.last_record.units

    def before_attention(
        self, names: list[str], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of an attention of the language model: log(size) of the keys is added to its scores.

        It is added to the mask, or waits for a kernel that takes none.
        """
        sized_keys.set_sizes(module, None)  # those of a call that failed
        named = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        cache = first_given(named, "cache", "past_key_values")
        call = self._running()
        # Gradient checkpointing runs this again when the call is over, with the same tensors of rotations.
        rotations = (named.get("position_embeddings") or (None,))[0]
        record = (None if call is None else call.record) or record_of(cache) or record_of(rotations)
        if record is None:
            return None
        kernel = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
        if kernel not in RECOGNISED_KERNELS and "position_ids" not in names:
            # The positions of one row with gaps would be taken for those of several packed sequences.
            named.pop("position_ids", None)
        if record.log_sizes is None:
            return (), named
        if rotations is not None:
            setattr(rotations, RECORD, record)
        hidden = named["hidden_states"]
        queries, past = int(hidden.shape[1]), 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
        sizes = sized_keys.KeySizes(record.log_sizes, past + queries)
        if kernel not in RECOGNISED_KERNELS:
            sized_keys.set_sizes(module, sizes)
            return (), named
        mask = named.get("attention_mask")
        if mask is None:  # causal; a static cache has more keys than tokens, one of a sliding window begins later
            keys, start = (queries, 0) if cache is None else cache.get_mask_sizes(queries, module.layer_idx)
            rows = past + torch.arange(queries, device=hidden.device)
            mask = (rows[:, None] >= start + torch.arange(keys, device=hidden.device))[None, None]
        if mask.dtype == torch.bool:
            least = torch.finfo(hidden.dtype).min
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, least)
        bias = sizes.of_keys(len(hidden), int(mask.shape[-1])).to(mask)
        return (), {**named, "attention_mask": mask + bias[:, None, None]}


class _Chosen:
    """What stays of the images of one call.

    Attributes:
        keep: [B, T] the columns of the prompt that stay.
        sizes: [B, T] float32, the number of features that each column stands for.
        record: the reduced units.
    """

    def __init__(
        self, prompts: ConnectorPrompts, arguments: Mapping[str, Any], tokens: Tensor, earlier: PromptRecord | None
    ) -> None:
        self._prompts, self._arguments, self._tokens = prompts, arguments, tokens
        self._known = 0 if earlier is None else int(earlier.place.shape[1])
        self.keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        self.sizes = torch.ones(tokens.shape[:2], device=tokens.device)
        self._padding = _padding(arguments, self.keep)
        self.record = ConnectorRecord()
        self._text = self._mean_text() if prompts.attached.uses_text else None

    def reduce(self, modality: str, encoded: Encoded) -> Any:
        """Reduce the features of a modality; returns what the host's forward gets."""
        attached, connector = self._prompts.attached, self._prompts.connector
        where = self._prompts.placeholders(modality, self._tokens)
        where[:, : self._known] = False
        row, column = where.nonzero(as_tuple=True)
        flat, layers = encoded.flat, encoded.layers
        if len(flat) != len(row):
            raise ValueError(
                f"the prompts have {len(row)} {modality} tokens and the {modality}s have {len(flat)} features: give "
                "every one with its pixel values in the call that has its tokens"
            )
        separators = None
        if connector.separator is not None:
            separators = (flat == getattr(connector.parts, connector.separator).to(flat)).all(-1)
        stays = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        sizes = torch.ones(len(flat), device=flat.device)
        units, start = [], 0
        for number, length in enumerate(self._lengths(encoded, row, column)):
            part = slice(start, start + length)
            unit = attached.reduce(
                flat[part],
                text=None if self._text is None else self._text[int(row[start])],
                separators=None if separators is None else separators[part],
                grid=self._grid(modality, number, length),
                received=None if encoded.received is None else encoded.received[part],
                carried=[layer[part] for layer in layers],
            )
            units.append(unit)
            stays[start + unit.kept] = True
            sizes[start + unit.kept] = unit.sizes
            start += length
        self.record.units += units
        self.keep[row, column] = stays.to(self.keep.device)
        self.sizes[row, column] = sizes.to(self.sizes.device)
        # Features whose placeholders are hidden as padding leave with them.
        seen = ~self._padding[row, column].to(stays.device)
        left = (stays & seen).split(encoded.entries)
        counts = [int(part.sum()) for part in left]
        visible = seen[stays]
        new_flat = torch.cat([unit.tokens for unit in units])[visible]
        new_layers = [torch.cat([unit.carried[n] for unit in units])[visible] for n in range(len(layers))]
        return connector.replaced(encoded.out, new_flat, new_layers, counts)

    def _lengths(self, encoded: Encoded, row: Tensor, column: Tensor) -> list[int]:
        """The number of features of each unit."""
        connector, entries = self._prompts.connector, encoded.entries
        per_image = self._prompts.attached.keep.per == "image"
        if connector.units == "entry" and not per_image:
            return entries
        is_last = torch.ones(len(row), dtype=torch.bool, device=row.device)  # of a run of placeholders
        is_last[:-1] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1)
        ends = torch.tensor(entries).cumsum(0) - 1
        if per_image and isinstance(getattr(encoded.out, connector.field), Tensor):  # its entries are tiles
            borders = is_last.cpu()
        else:  # an entry is an image, or holds several units that are runs
            borders = torch.zeros(len(row), dtype=torch.bool)
            borders[ends] = True
            if connector.units == "run":
                borders |= is_last.cpu()
        stops = borders.nonzero()[:, 0] + 1
        return [int(n) for n in torch.diff(stops, prepend=torch.zeros(1, dtype=torch.long))]

    def _grid(self, modality: str, number: int, length: int) -> tuple[int, int] | None:
        """Height and width of the grid of a unit, in features; None: they are not known."""
        sizes = self._arguments.get(f"{modality}_grid_thw")
        if sizes is not None and number < len(sizes):
            frames, height, width = (int(n) for n in sizes[number])
            share = math.isqrt(frames * height * width // max(1, length))
            if frames == 1 and share and height // share * (width // share) == length:
                return height // share, width // share
        side = math.isqrt(length)
        return (side, side) if side * side == length else None

    def _mean_text(self) -> Tensor:
        """[B, C] the mean embedding of the tokens of each row that are neither placeholders nor padding."""
        tokens = self._tokens
        is_text = ~self._padding
        for modality in self._prompts.connector.placeholders:
            is_text = is_text & ~self._prompts.placeholders(modality, tokens)
        if not bool(is_text.any(1).all()):
            row = int((~is_text.any(1)).nonzero()[0])
            raise RuntimeError(f"the method is guided by the text of the prompt, and row {row} has none")
        with torch.no_grad():
            embeds = self._prompts.connector.model.get_input_embeddings()(tokens) if tokens.dim() == 2 else tokens
            weights = is_text.to(embeds.dtype)[:, :, None]
            return torch.as_tensor((embeds * weights).sum(1) / weights.sum(1))


def _padding(arguments: Mapping[str, Any], like: Tensor) -> Tensor:
    """[B, T] true for the columns that the attention mask hides at the start and at the end of each row."""
    mask = arguments.get("attention_mask")
    return torch.zeros_like(like) if mask is None else outer(mask[:, -like.shape[1] :].to(like.device) != 0)


def _caller() -> FrameType | None:
    """The frame that calls the hook that calls this."""
    frame: FrameType | None = sys._getframe(1)
    # A compiled function has another code object, and dynamo's own frames around it.
    while frame is not None and (
        frame.f_code.co_filename == _caller.__code__.co_filename or "_dynamo" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return frame


def encode(attached: AttachedConnector, method: str, given: Mapping[str, Any]) -> Encoded:
    """Encode images or videos, with the attention of the tower if the method asks for it.

    Args:
        attached: the connector and its method.
        method: name of the host's method that encodes them.
        given: its arguments.

    Raises:
        RuntimeError: the attention cannot be brought to the features.
    """
    connector, given = attached.connector, {**given, "return_dict": True}
    if not attached.reducer.needs_tower_attention or isinstance(connector.scored, str):
        return read_features(connector, getattr(connector.parts, method)(**given))
    out, scored = connector.scored.encode(connector.parts, method, given)
    encoded = read_features(connector, out)
    received = torch.cat(connector.features(scored))
    if len(received) != len(encoded.flat) or not torch.equal(received, received[:, :1].expand_as(received)):
        raise RuntimeError(
            f"the attention of the image tower of {type(connector.model).__name__} cannot be brought to its features: "
            "use another importance"
        )
    return encoded._replace(received=received[:, 0])


def read_features(connector: Connector, out: Any) -> Encoded:
    """Read what `get_image_features` returned."""
    entries = connector.features(out)
    return Encoded(out, [len(entry) for entry in entries], torch.cat(entries), connector.layers(out))


def _later_positions(record: PromptRecord, past: int, tokens: Tensor) -> Tensor:
    """The positions of tokens [B, T] of a prompt and behind it, of which `past` are in the cache."""
    known, new = record.positions, int(tokens.shape[1])
    behind = max(0, past + new - int(known.shape[-1]))
    later = record.following + torch.arange(behind, device=known.device)
    positions = torch.cat([known, later], -1)[..., past : past + new]
    batch_axis = known.dim() - 2
    return positions.repeat_interleave(len(tokens) // known.shape[batch_axis], batch_axis)


def _check_taken(module: Any, args: Any, out: Any) -> None:
    sized_keys.check_taken(module)


class _Uncompiled:
    """A hook that runs as it is in a compiled model, between two graphs. A copy of it is one of the copied model."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook
        self._run = torch.compiler.disable(hook)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Uncompiled, (self._hook,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def wrap_model(prompts: ConnectorPrompts, *, wraps_generate: bool) -> list[Callable[[], Any]]:
    """Wrap the entry points of the model. Returns functions that undo it.

    Args:
        prompts: what they do.
        wraps_generate: wrap `generate`, too. A tower with prompts of its own does that otherwise.
    """
    connector, undo = prompts.connector, list[Callable[[], Any]]()
    for module in (connector.model, *connector.inner):
        before = _Uncompiled(partial(prompts.before_forward, argument_names(type(module).forward)))
        after = _Uncompiled(prompts.after_forward)
        undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.append(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
    for module in () if isinstance(connector.attentions, str) else connector.attentions:
        before_attention = _Uncompiled(partial(prompts.before_attention, argument_names(type(module).forward)))
        undo.append(module.register_forward_pre_hook(before_attention, with_kwargs=True).remove)
        undo.append(module.register_forward_hook(_Uncompiled(_check_taken)).remove)
        undo.append(partial(sized_keys.restore, module))
    if not isinstance(connector.scored, str):
        undo += connector.scored.hook()
    if wraps_generate and hasattr(connector.model, "generate"):
        names = argument_names(type(connector.model).generate)
        wrap(connector.model, "generate", partial(prompts.around_generate, names))
        undo.append(partial(unwrap, connector.model, "generate"))
    return undo
