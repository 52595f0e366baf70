"""Prompts with images: they get as many placeholder tokens as the reduced image tower gives features.

A processor writes one placeholder token into the prompt for every image feature of the dense model. Here, placeholders
are removed, with their entries in all arguments that have one entry per token: mask, labels, positions, token types. If
rows of a batch lose different numbers of tokens, the shorter ones are padded. `generate` returns the caller's original
prompt, followed by the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from crossget.core.adapters import Prompt
from crossget.core.decoder_tower import cached_tokens
from crossget.core.tower import AttachedTower

# Arguments with one entry per token of a prompt, [B, T, ..], and their values at padding.
_PADDING_VALUES = {"inputs_embeds": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


def shorten(
    prompt: Prompt, attached: AttachedTower, arguments: Mapping[str, Any], *, generates: bool
) -> dict[str, Any]:
    """The arguments of a call, with as many placeholders as the reduced image tower will give features.

    Args:
        prompt: the form of the host's prompts.
        attached: the image tower.
        arguments: of the call, by name. They are not modified.
        generates: the call is one of `generate`, which expects padding on the left.

    Raises:
        ValueError: the number of placeholders is neither that of the dense nor that of the reduced features, or the
            attention mask is not one of [B, T].
    """
    # A compiled forward has fixed shapes, so its prompts must be short already. Those of `generate` are.
    if torch.compiler.is_compiling() or _first_given(arguments, "input_ids", "inputs_embeds") is None:
        return dict(arguments)
    images = _count_images(arguments)
    # With a cache, images of earlier turns have placeholders in the prompt, but no pixels in this call.
    has_cache = generates and int(cached_tokens(_first_given(arguments, "cache", "past_key_values"))) > 0
    if images == 0 and not has_cache:
        return dict(arguments)
    dense, reduced = image_tokens(prompt, attached, arguments)
    is_image = placeholders(prompt, arguments)
    per_row = is_image.sum(1)
    found = int(per_row.sum())
    if not generates and found > 0 and found % images == 0:
        attached.prompt_of_image = torch.repeat_interleave(per_row // (found // images))
    if found == images * reduced or (has_cache and found % reduced == 0):
        return dict(arguments)
    if (found != images * dense and not has_cache) or bool((per_row % dense).any()):
        raise ValueError(
            f"the prompts have {per_row.tolist()} image tokens for {images} images: expected {dense} for each image, "
            f"as the processor writes them (they are cut to {reduced} here), or {reduced}. Give every image of the "
            "batch whole, with its pixel values, in the call that has its tokens"
        )
    return _Shortening(is_image, _padding(arguments, is_image), dense, reduced).apply(prompt, arguments, generates)


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


def _padding(arguments: Mapping[str, Any], is_image: Tensor) -> Tensor:
    """[B, T] true for padding at the start and at the end of each row.

    Raises:
        ValueError: the attention mask does not have the shape [B, T].
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.zeros_like(is_image)
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}, which cannot be shortened with its prompt: "
            "give a mask [B, T], or prompts that have as many image tokens as the reduced tower gives"
        )
    real = (mask[:, -is_image.shape[1] :] != 0).long()
    return torch.as_tensor((real.cumsum(1) == 0) | (real.flip(1).cumsum(1).flip(1) == 0))


class _Shortening:
    """Maps prompts with `dense` placeholders per image to prompts with `reduced`.

    `reduced` is larger than `dense` if the cross token is added and nothing is merged. The new rows have the length of
    the longest one, plus the padding of the old row with the least padding.

    Args:
        is_image: [B, T] true for placeholders.
        padding: [B, T] true for padding.
        dense: placeholders per image in the old rows.
        reduced: placeholders per image in the new rows.
    """

    def __init__(self, is_image: Tensor, padding: Tensor, dense: int, reduced: int) -> None:
        batch, self.tokens = is_image.shape
        # Every image has `dense` placeholders, so the index in its image follows from the index among all placeholders.
        # `copies` is how often each token occurs in the new row: 0 for removed placeholders.
        place = (is_image.long().cumsum(1) - 1) % dense
        copies = torch.ones_like(place)
        if reduced < dense:
            copies = torch.where(is_image & (place >= reduced), 0, copies)
        else:
            copies = torch.where(is_image & (place == dense - 1), 1 + reduced - dense, copies)
        copies = copies.masked_fill(padding, 0)
        self.lengths = copies.sum(1)
        self.width = int(self.lengths.max() + padding.sum(1).min())
        self.leading = padding.long().cumprod(1).sum(1)
        self.source = torch.repeat_interleave(copies.flatten())  # [N] index in B * T old tokens, for each of N new ones
        self.row = self.source // self.tokens
        starts = self.lengths.cumsum(0) - self.lengths
        self.column = torch.arange(len(self.source), device=place.device) - starts[self.row]
        self.shift = torch.zeros(batch, dtype=torch.long, device=place.device)

    def pad_left(self) -> None:
        """Pad shorter rows on the left instead of on the right."""
        self.shift = self.width - self.lengths

    def apply(self, prompt: Prompt, arguments: Mapping[str, Any], generates: bool) -> dict[str, Any]:
        """The arguments of a call for the new rows, see `shorten`."""
        new = dict(arguments)
        if arguments.get("attention_mask") is None and bool((self.lengths != self.width).any()):
            new["attention_mask"] = self._plain_mask(prompt, arguments, generates)
        if generates or bool((self.leading > 0).any()):
            self.pad_left()
        for name, fill in {"input_ids": prompt.pad, **_PADDING_VALUES}.items():
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
        column = self.column + self.shift[self.row]
        return out.index_put((self.row.to(values.device), column.to(values.device)), values)

    def _positions(self, positions: Tensor) -> Tensor:
        """[B, width] every position is reduced by the number of tokens that were removed before it."""
        before = self.source % self.tokens - self.leading[self.row]
        moved = (self.column - before).to(positions.device)
        return self._place(positions.flatten()[self.source.to(positions.device)] + moved, 0)

    def _plain_mask(self, prompt: Prompt, arguments: Mapping[str, Any], generates: bool) -> Tensor:
        """[B, T] the mask that the host uses if none is given: all tokens, or in `generate` all but padding."""
        ids = arguments.get("input_ids")
        shape = (len(self.lengths), self.tokens)
        if generates and ids is not None:
            return torch.as_tensor(ids != prompt.pad).long()
        return torch.ones(shape, dtype=torch.long, device=self.lengths.device)


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
    return (), shorten(prompt, attached, named, generates=False)


def around_generate(
    prompt: Prompt, attached: AttachedTower, names: list[str], original: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run `generate` on the shortened prompt. The output begins with the caller's original prompt."""
    arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    if arguments.get("inputs") is not None and arguments.get("input_ids") is None:
        arguments["input_ids"] = arguments.pop("inputs")
    shortened = shorten(prompt, attached, arguments, generates=True)
    old, new = (_first_given(these, "input_ids", "inputs_embeds") for these in (arguments, shortened))
    if new is not old:
        _shift_limits(shortened, int(new.shape[1]) - int(old.shape[1]))
    with attached.in_generate():
        out = original(**shortened)
    if new is old or arguments.get("input_ids") is None:  # generated from embeddings, the output has no prompt
        return out
    if isinstance(out, Tensor):
        return _with_prompt(old, out[:, new.shape[1] :])
    out.sequences = _with_prompt(old, out.sequences[:, new.shape[1] :])
    return out


def _with_prompt(ids: Tensor, answers: Tensor) -> Tensor:
    """Prompts [B, T] and answers [B * n, A] -> [B * n, T + A], for n answers per prompt."""
    return torch.cat([ids.repeat_interleave(len(answers) // len(ids), 0).to(answers.device), answers], 1)


def _shift_limits(arguments: dict[str, Any], by: int) -> None:
    """Change limits on the total length, which includes the prompt, by the change of the prompt's length."""
    config = arguments.get("generation_config")
    if config is not None and arguments["generation_config"].max_new_tokens is None:
        config = arguments["generation_config"] = copy.deepcopy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None) not in (None, 0, type(config)().__dict__.get(name)):
                setattr(config, name, getattr(config, name) + by)
    for name in ("max_length", "min_length"):
        if arguments.get(name):
            arguments[name] += by


def _first_given(arguments: Mapping[str, Any], *names: str) -> Any:
    """The first of these arguments that is given and not None."""
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)
