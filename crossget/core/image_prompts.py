"""Prompts with images: they get as many placeholder tokens as the reduced image tower gives features.

A processor writes one placeholder token into the prompt for every image feature of the dense model. Here, placeholders
are removed, with their entries in all arguments that have one entry per token: mask, labels, positions, token types. If
rows of a batch lose different numbers of tokens, the shorter ones are padded. `generate` returns the caller's original
prompt, followed by the answer.

A cache of keys and values holds the shortened prompt, while the caller's next prompt begins with the original one. So
every call notes on the cache object which columns of the caller's prompts it has shortened, and how: a `Turn`. The next
call repeats this on the same columns, and shortens only what follows by the images that it gets itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossget.core.adapters import Prompt
from crossget.core.decoder_tower import cached_tokens
from crossget.core.prompt_parts import PADDING_VALUES, first_given, outer, record_of, shift_limits, with_prompt
from crossget.core.tower import AttachedTower

_NOTE = "_crossget_note"


class Turn(NamedTuple):
    """The tokens that one call has added to a cache.

    Attributes:
        given: [B, D] true for placeholders, in the caller's D columns.
        kept: [B, W] true for placeholders, in the W columns of the cache.
        dense: placeholders per image in the caller's columns.
        reduced: placeholders per image in the cache.
    """

    given: Tensor
    kept: Tensor
    dense: int
    reduced: int

    @staticmethod
    def unchanged(is_image: Tensor) -> Turn:
        """Tokens with these placeholders [B, T], of which none was removed."""
        return Turn(is_image, is_image, 1, 1)


class _Note(NamedTuple):
    """What is noted on a cache: its turns, and the `AttachedTower.identity` of the tower that has filled it."""

    turns: tuple[Turn, ...]
    identity: str


class _Piece(NamedTuple):
    """Consecutive columns of the caller's prompts, which become `width` columns; None: as many as they need."""

    columns: int
    dense: int
    reduced: int
    width: int | None = None


def shorten(
    prompt: Prompt, attached: AttachedTower, arguments: Mapping[str, Any], *, generates: bool
) -> tuple[dict[str, Any], tuple[Turn, ...] | None]:
    """The arguments of a call, with as many placeholders as the reduced image tower will give features.

    Args:
        prompt: the form of the host's prompts.
        attached: the image tower.
        arguments: of the call, by name. They are not modified.
        generates: the call is one of `generate`, which expects padding on the left.

    Returns:
        The arguments, and the turns that a cache has after the call; None: nothing can be said about them.

    Raises:
        ValueError: the number of placeholders is neither that of the dense nor that of the reduced features; or the
            attention mask is not one of [B, T]; or the prompts do not begin with what the cache holds; or nothing is
            known about images in the cache.
    """
    tokens = first_given(arguments, "input_ids", "inputs_embeds")
    # A compiled forward has fixed shapes, so its prompts must be short already. Those of `generate` are.
    if torch.compiler.is_compiling() or tokens is None:
        return dict(arguments), None
    cache = first_given(arguments, "cache", "past_key_values")
    images = _count_images(arguments)
    if not generates and images == 0 and _turns(cache, attached) is None:
        is_new = cache is None or int(cached_tokens(cache)) == 0
        return dict(arguments), (Turn.unchanged(placeholders(prompt, arguments)),) if is_new else None
    call = _Call(prompt, attached, arguments, images, _cached_columns(cache), generates)
    return call.continued(_turns(cache, attached)) if call.cached else call.started()


class _Call:
    """One call, see `shorten`.

    Attributes:
        is_image: [B, T] true for placeholders.
        cached: number of tokens in the cache.
        images: number of images whose pixels are given.
    """

    def __init__(
        self, prompt: Prompt, attached: AttachedTower, arguments: Mapping[str, Any], images: int, cached: int,
        generates: bool,
    ) -> None:  # fmt: skip
        self.prompt, self.attached, self.arguments = prompt, attached, arguments
        self.images, self.cached, self.generates = images, cached, generates
        self.is_image = placeholders(prompt, arguments)
        self.dense, self.reduced = image_tokens(prompt, attached, arguments) if images else (1, 1)

    def started(self) -> tuple[dict[str, Any], tuple[Turn, ...]]:
        """The result of `shorten` without cached tokens, or for the tokens of a call that follow those in the cache."""
        if not self.images:
            return dict(self.arguments), (Turn.unchanged(self.is_image),)
        per_row, found = self.is_image.sum(1), int(self.is_image.sum())
        each = next((n for n in (self.dense, self.reduced) if found == self.images * n), 0)
        if not each or bool((per_row % each).any()):
            raise ValueError(
                f"the prompts have {per_row.tolist()} image tokens for {self.images} images: expected {self.dense} for "
                f"each image, as the processor writes them (they are cut to {self.reduced} here), or {self.reduced}. "
                "Give every image of the batch whole, with its pixel values, in the call that has its tokens"
                f"{self._of_padding()}"
            )
        if not self.generates:
            self.attached.prompt_of_image = torch.repeat_interleave(per_row // each)
        if each == self.reduced:
            return dict(self.arguments), (Turn.unchanged(self.is_image),)
        shortening = self._shortening([_Piece(self.is_image.shape[1], self.dense, self.reduced)])
        kept = shortening.take(self.is_image, 0)
        return self._apply(shortening), (Turn(self.is_image, kept, self.dense, self.reduced),)

    def continued(self, turns: tuple[Turn, ...] | None) -> tuple[dict[str, Any], tuple[Turn, ...] | None]:
        """The result of `shorten` with cached tokens.

        Args:
            turns: of the cache; None: the attached model has not filled it.
        """
        if self.images and self.generates and not self.prompt.images_after_cache:
            raise ValueError(
                f"the call has {self.images} images and a cache of {self.cached} tokens: this version of the host "
                "ignores images beside a cache. Give the whole conversation without the cache"
            )
        if self._has_new_tokens_only():
            if turns is not None:
                turns = tuple(self._filled(turns))
                self.arguments = _for_the_cache(turns, self.cached, self.is_image.shape[1], self.arguments)
            new, own = self.started()
            # Cached tokens after the last turn are text, so that a decoding step needs no turn of its own.
            return new, turns if turns is None or not self.images else turns + own
        if self.is_image.shape[1] <= self.cached:
            raise ValueError(
                f"the prompts have {self.is_image.shape[1]} tokens, and their cache {self.cached}: give the whole "
                "conversation, or only the new tokens and an attention_mask of all"
            )
        if turns is None:
            head = self.is_image[:, : self.cached]
            if bool(head.any()):
                raise ValueError(
                    f"the cache holds {self.cached} tokens, and this attached model has not filled it: whether the "
                    "images in it were reduced is not known. Give a cache that this model has returned since it was "
                    "attached, or none"
                )
            turns = (Turn.unchanged(head),)
        return self._whole_conversation(turns)

    def _has_new_tokens_only(self) -> bool:
        """Whether the tokens are those that follow the cached ones, rather than all: the host asks the mask, too."""
        mask = self.arguments.get("attention_mask")
        if not self.generates:
            return True
        ids = self.arguments.get("input_ids")
        return ids is not None and mask is not None and mask.shape[1] != ids.shape[1]

    def _filled(self, turns: tuple[Turn, ...]) -> Iterator[Turn]:
        """The turns of exactly the cached tokens, but for text at the end unless images follow it."""
        left = self.cached
        for turn in turns:
            if left <= 0:
                return
            width = turn.kept.shape[1]
            yield turn if width <= left else Turn.unchanged(turn.kept[:, :left])
            left -= width
        if left > 0 and self.images:
            yield Turn.unchanged(turns[-1].kept.new_zeros(len(turns[-1].kept), left))

    def _whole_conversation(self, turns: tuple[Turn, ...]) -> tuple[dict[str, Any], tuple[Turn, ...]]:
        """The result of `continued` for tokens of which the first ones are in the cache."""
        done, partial, width = [], None, 0
        for turn in turns:
            if width + turn.kept.shape[1] > self.cached:  # the cache was cropped, so the prompt may continue otherwise
                partial = turn
                break
            done.append(turn)
            width += turn.kept.shape[1]
        seen = None if partial is None else partial.kept[:, : self.cached - width]
        if partial is not None and not self.images:
            self.dense, self.reduced = partial.dense, partial.reduced
        for as_given in (True, False):
            head = [_head(turn, as_given) for turn in done]
            start = sum(piece.columns for piece in head)
            if start > self.is_image.shape[1] or not self._begins_with(done, as_given):
                continue
            tail = self.is_image[:, start:]
            for dense, reduced in [(self.dense, self.reduced), (1, 1)]:
                if bool((tail.sum(1) % dense).any()):
                    continue
                shortening = self._shortening([*head, _Piece(tail.shape[1], dense, reduced)])
                kept = shortening.take(self.is_image, 0)
                fits = int(kept[:, self.cached :].sum()) == self.images * self.reduced if self.images else (
                    not bool(kept[:, self.cached :].any())
                )  # fmt: skip
                if fits and (seen is None or _rows_in(kept[:, width : self.cached], seen)):
                    return self._apply(shortening), (*done, Turn(tail, kept[:, width:], dense, reduced))
        raise ValueError(
            f"the prompts have {self.is_image.sum(1).tolist()} image tokens among {self.is_image.shape[1]}, for "
            f"{self.images} new images and a cache of {self.cached} tokens: expected the sequences that belong to the "
            "cache, then new tokens with as many image tokens for each new image as the processor writes. Give the "
            "pixel values of the new images only, or leave out the cache"
        )

    def _begins_with(self, turns: Sequence[Turn], as_given: bool) -> bool:
        """Whether the placeholders of the tokens begin with those of these turns."""
        first = 0
        for turn in turns:
            noted = turn.given if as_given else turn.kept
            if not _rows_in(self.is_image[:, first : first + noted.shape[1]], noted):
                return False
            first += noted.shape[1]
        return True

    def _shortening(self, pieces: Sequence[_Piece]) -> _Shortening:
        return _Shortening(self.is_image, self._padding(pieces), pieces, self.generates)

    def _apply(self, shortening: _Shortening) -> dict[str, Any]:
        return shortening.apply(self.prompt, self.arguments, self.generates)

    def _padding(self, pieces: Sequence[_Piece]) -> Tensor:
        """[B, T] true for padding at the start and at the end of each row, in each of the pieces.

        A placeholder is no padding, though the mask may hide it: its image has features all the same.

        Raises:
            ValueError: the attention mask does not have the shape [B, T].
        """
        mask = self.arguments.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has the shape {list(mask.shape)}, which cannot be shortened with its prompt: "
                "give a mask [B, T], or prompts that have as many image tokens as the reduced tower gives"
            )
        ids = self.arguments.get("input_ids")
        if mask is not None:
            real = mask[:, -self.is_image.shape[1] :] != 0
        elif self.generates and ids is not None:  # `generate` takes the pad token for padding then
            real = (ids != self.prompt.pad).long().cumsum(1) > 0
        else:
            return torch.zeros_like(self.is_image)
        parts = [piece.columns for piece in pieces]
        return torch.cat([outer(part) for part in (real.to(self.is_image.device) | self.is_image).split(parts, 1)], 1)

    def _of_padding(self) -> str:
        """Which rows have image tokens that the mask hides, for a message; empty if none has."""
        mask = self.arguments.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return ""
        hidden = self.is_image & (mask[:, -self.is_image.shape[1] :] == 0).to(self.is_image.device)
        rows = hidden.any(1).nonzero().flatten().tolist()
        return f". In rows {rows} the attention mask hides image tokens: pad with another token" if rows else ""


def _head(turn: Turn, as_given: bool) -> _Piece:
    width = turn.kept.shape[1]
    return _Piece(turn.given.shape[1], turn.dense, turn.reduced, width) if as_given else _Piece(width, 1, 1, width)


def _rows_in(rows: Tensor, noted: Tensor) -> bool:
    """Whether each of these rows [B, N] is one of the noted rows: a search may have reordered or repeated them."""
    if rows.shape[1] != noted.shape[1]:
        return False
    return bool((rows[:, None] == noted.to(rows.device)[None]).all(2).any(1).all())


def _for_the_cache(turns: tuple[Turn, ...], cached: int, new: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with `new` tokens, for the tokens that the cache holds.

    A mask over the caller's tokens becomes one over the cached and new tokens. The positions that belong to such a mask
    move by the number of tokens that were removed.

    Raises:
        ValueError: the mask has another number of columns.
    """
    changed, mask = dict(arguments), arguments.get("attention_mask")
    given = cached + sum(turn.given.shape[1] - turn.kept.shape[1] for turn in turns)
    if mask is None or mask.dim() != 2 or mask.shape[1] == cached + new or given == cached:
        return changed
    if mask.shape[1] != given + new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {new} new tokens and a cache of {cached}, which were "
            f"{given} before images were reduced: expected {cached + new} or {given + new}"
        )
    is_image = torch.cat([turn.given for turn in turns], 1).to(mask.device)
    rows = len(mask)
    if rows % len(is_image) or (rows != len(is_image) and bool((is_image != is_image[:1]).any())):
        raise ValueError(
            f"attention_mask has {rows} rows, and the cache is that of {len(is_image)} prompts, whose images are in "
            f"different places: give a mask [{rows}, {cached + new}] of the reduced tokens"
        )
    is_image = is_image.repeat_interleave(rows // len(is_image), 0)
    pieces = [_head(turn, True) for turn in turns]
    given = is_image.shape[1]  # without the text at the end
    real = (mask[:, :given] != 0) | is_image
    padding = torch.cat([outer(part) for part in real.split([piece.columns for piece in pieces], 1)], 1)
    shortening = _Shortening(is_image, padding, pieces, True)
    changed["attention_mask"] = torch.cat([shortening.take(mask[:, :given], 0), mask[:, given:]], 1)
    if changed.get("position_ids") is not None:
        removed = (~padding).sum(1) - shortening.lengths.sum(1)
        changed["position_ids"] = changed["position_ids"] - removed[:, None].to(changed["position_ids"].device)
    if changed.get("cache_position") is not None:
        changed["cache_position"] = changed["cache_position"] - (given - shortening.width)
    return changed


def image_tokens(prompt: Prompt, attached: AttachedTower, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The number of placeholders per image that the processor writes, and of features of the reduced tower."""
    features = prompt.features(arguments)
    return (
        features.tokens - features.dropped,
        attached.tokens_after(features.layer, features.tokens) - features.dropped,
    )


def _count_images(arguments: Mapping[str, Any]) -> int:
    pixels = arguments.get("pixel_values")
    return 0 if pixels is None else pixels.shape[:-3].numel()


def placeholders(prompt: Prompt, arguments: Mapping[str, Any]) -> Tensor:
    """[B, T] true for placeholders, in token ids or embeddings."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return torch.as_tensor(ids == prompt.placeholder)
    embeds = arguments["inputs_embeds"]
    image = prompt.input_embeddings()(torch.tensor(prompt.placeholder, device=embeds.device))
    return torch.as_tensor((embeds == image.to(embeds.dtype)).all(-1))


class _Shortening:
    """Maps prompts with `dense` placeholders per image to prompts with `reduced`.

    `reduced` is larger than `dense` if the cross token is added and nothing is merged. The new rows of a piece have the
    length of the longest one, plus the padding of the old row with the least padding.

    Args:
        is_image: [B, T] true for placeholders.
        padding: [B, T] true for padding.
        pieces: columns that are shortened alone. Together they are all columns.
        left: shorter rows of a piece are padded on the left instead of on the right, as they are if an old row is.

    Attributes:
        lengths: [B, pieces] number of tokens of each row without padding.
        width: number of columns of the new rows.
    """

    def __init__(self, is_image: Tensor, padding: Tensor, pieces: Sequence[_Piece], left: bool) -> None:
        self.tokens, device = is_image.shape[1], is_image.device
        parts = [piece.columns for piece in pieces]
        # [B, T] how often each token occurs in the new row: 0 for removed placeholders.
        images, paddings = is_image.split(parts, 1), padding.split(parts, 1)
        copies = torch.cat([_copies(*one) for one in zip(images, paddings, pieces, strict=True)], 1)
        piece_of = torch.arange(len(pieces), device=device).repeat_interleave(torch.tensor(parts, device=device))
        self.lengths = torch.stack([part.sum(1) for part in copies.split(parts, 1)], 1)
        widths = [
            int(self.lengths[:, i].max() + paddings[i].sum(1).min()) if piece.width is None else piece.width
            for i, piece in enumerate(pieces)
        ]
        shift = torch.tensor(widths, device=device) - self.lengths
        if bool((shift < 0).any()):
            raise ValueError(
                f"rows {(shift < 0).any(1).nonzero().flatten().tolist()} have more tokens than their part of the "
                "cache: give the attention mask of all tokens, with the padding of the earlier calls"
            )
        self.uneven = bool((shift > 0).any())
        self.width = sum(widths)
        if not left and not bool(padding[:, 0].any()):
            shift = torch.zeros_like(shift)
        self.source = torch.repeat_interleave(copies.flatten())  # [N] index in B * T old tokens, for each of N new ones
        self.row, old = self.source // self.tokens, self.source % self.tokens
        order = torch.arange(len(self.source), device=device)
        piece = piece_of[old]
        lengths = self.lengths.flatten()
        place = self.row * len(pieces) + piece
        first = torch.tensor([0, *widths[:-1]], device=device).cumsum(0)
        self.column = order - (lengths.cumsum(0) - lengths)[place] + first[piece] + shift.flatten()[place]
        total = self.lengths.sum(1)
        before = old - padding.long().cumsum(1).flatten()[self.source]
        self._moved = order - (total.cumsum(0) - total)[self.row] - before

    def apply(self, prompt: Prompt, arguments: Mapping[str, Any], generates: bool) -> dict[str, Any]:
        """The arguments of a call for the new rows, see `shorten`."""
        new = dict(arguments)
        if arguments.get("attention_mask") is None and self.uneven:
            new["attention_mask"] = self._plain_mask(prompt, arguments, generates)
        # A placeholder as padding would be one more image token.
        for name, fill in {"input_ids": prompt.fill, **PADDING_VALUES}.items():
            if new.get(name) is not None:
                new[name] = self.take(new[name], fill)
        positions = new.get("position_ids")
        if positions is not None:
            new["position_ids"] = self._positions(positions.expand(len(self.lengths), -1))
        if new.get("cache_position") is not None:
            first = new["cache_position"][:1]
            new["cache_position"] = first + torch.arange(self.width, device=first.device)
        return new

    def take(self, values: Tensor, fill: int) -> Tensor:
        """[B, S + T, ..] -> [B, S + width, ..]. S is the number of cached tokens in a mask; otherwise 0."""
        cached, values = values.tensor_split([values.shape[1] - self.tokens], 1)
        taken = self._place(values.flatten(0, 1)[self.source.to(values.device)], fill)
        return torch.cat([cached, taken], 1) if cached.shape[1] else taken

    def _place(self, values: Tensor, fill: int) -> Tensor:
        """[N, ..] values of the new tokens -> [B, width, ..], with `fill` at padding."""
        out = values.new_full((len(self.lengths), self.width, *values.shape[1:]), fill)
        return out.index_put((self.row.to(values.device), self.column.to(values.device)), values)

    def _positions(self, positions: Tensor) -> Tensor:
        """[B, width] every position is reduced by the number of tokens that were removed before it."""
        taken = positions.flatten()[self.source.to(positions.device)]
        return self._place(taken + self._moved.to(positions.device), 0)

    def _plain_mask(self, prompt: Prompt, arguments: Mapping[str, Any], generates: bool) -> Tensor:
        """[B, T] the mask that the host uses if none is given: all tokens, or in `generate` all but padding."""
        ids = arguments.get("input_ids")
        shape = (len(self.lengths), self.tokens)
        if generates and ids is not None:
            return torch.as_tensor(ids != prompt.pad).long()
        return torch.ones(shape, dtype=torch.long, device=self.lengths.device)


def _copies(is_image: Tensor, padding: Tensor, piece: _Piece) -> Tensor:
    """[B, T] how often each token of a piece occurs in the new row."""
    # Every image has `dense` placeholders, so the index in its image follows from the index among all placeholders.
    place = (is_image.long().cumsum(1) - 1) % piece.dense
    copies = torch.ones_like(place)
    if piece.reduced < piece.dense:
        copies = torch.where(is_image & (place >= piece.reduced), 0, copies)
    else:
        copies = torch.where(is_image & (place == piece.dense - 1), 1 + piece.reduced - piece.dense, copies)
    return copies.masked_fill(padding, 0)


def _cached_columns(cache: Any) -> int:
    """The number of columns of the tower's prompts that are in a cache. The connector may have dropped some of them."""
    tokens = int(cached_tokens(cache))
    record = record_of(cache)
    return tokens if record is None else int(record.cached(tokens)[0].shape[1])


# What is noted on a cache ------------------------------------------------------------------------------------------


def _holder(cache: Any) -> Any:
    """The object that has the note of a cache. A tuple of keys and values has no attributes, its first tensor has."""
    return (cache[0][0] if cache else None) if isinstance(cache, tuple | list) else cache


def _turns(cache: Any, attached: AttachedTower) -> tuple[Turn, ...] | None:
    """The turns in a cache; None: this attached tower has not filled it."""
    note: _Note | None = getattr(_holder(cache), _NOTE, None)
    return note.turns if note is not None and note.identity == attached.identity else None


def _note(cache: Any, turns: tuple[Turn, ...] | None, attached: AttachedTower) -> None:
    holder = _holder(cache)
    if holder is not None:
        setattr(holder, _NOTE, None if turns is None else _Note(turns, attached.identity))


def _cache_in(out: Any) -> Any:
    """The cache in what a forward or `generate` has returned; None: there is none."""
    if isinstance(out, Tensor):
        return None
    if isinstance(out, tuple):
        return next((part for part in out if hasattr(part, "get_seq_length")), None)
    return next(
        (found for name in ("cache", "past_key_values") if (found := getattr(out, name, None)) is not None), None
    )


# In the host's entry points ---------------------------------------------------------------------------------------


def before_forward(
    prompt: Prompt,
    attached: AttachedTower,
    names: list[str],
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook with keyword arguments: shortens the prompt, see `shorten`."""
    named = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    name = next((name for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)
    # `generate`, or the forward of a larger module around this one, has shortened the prompt.
    if name is None or torch.compiler.is_compiling() or attached.prompt_is_short.get() or hasattr(named[name], _NOTE):
        return (), named
    new, turns = shorten(prompt, attached, named, generates=False)
    if turns is not None:
        new[name] = new[name].view_as(new[name])  # a new tensor object: the caller's own gets no attribute
        setattr(new[name], _NOTE, turns)
    return (), new


def after_forward(attached: AttachedTower, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Forward hook with keyword arguments: notes on the cache what `before_forward` has done."""
    if torch.compiler.is_compiling() or attached.prompt_is_short.get():
        return
    turns = getattr(first_given(kwargs, "input_ids", "inputs_embeds"), _NOTE, None)
    for cache in (first_given(kwargs, "cache", "past_key_values"), _cache_in(out)):
        if cache is not None:
            _note(cache, turns, attached)


def around_generate(
    prompt: Prompt, attached: AttachedTower, names: list[str], original: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run `generate` on the shortened prompt. The output begins with the caller's original prompt."""
    arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    if arguments.get("inputs") is not None and arguments.get("input_ids") is None:
        arguments["input_ids"] = arguments.pop("inputs")
    shortened, turns = shorten(prompt, attached, arguments, generates=True)
    old, new = (first_given(these, "input_ids", "inputs_embeds") for these in (arguments, shortened))
    if new is not old:
        shift_limits(shortened, int(new.shape[1]) - int(old.shape[1]))
    # First: an interrupted `generate` leaves some of the tokens in the caller's cache.
    _note(first_given(arguments, "cache", "past_key_values"), turns, attached)
    with attached.in_generate(prompt_is_short=True):
        out = original(**shortened)
    _note(_cache_in(out), turns, attached)
    if new is old or arguments.get("input_ids") is None:  # generated from embeddings, the output has no prompt
        return out
    if isinstance(out, Tensor):
        return with_prompt(old, out[:, new.shape[1] :])
    out.sequences = with_prompt(old, out.sequences[:, new.shape[1] :])
    return out
