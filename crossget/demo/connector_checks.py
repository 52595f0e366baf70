"""Checks of the reduced image features of a model of images and text against oracles that do without crossget's hooks.

The prompts are a batch of two rows, one with one image and one with two, padded on the left. An oracle is the plain
model on a prompt that is made by hand. All compute logits of the same columns.

Shapes: B rows, T tokens of the full prompt, V words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.core.attach import find_connector
from crossget.core.block_class import argument_names
from crossget.core.connector import AttachedConnector, ReducedUnit
from crossget.demo.tiny_inputs import ONE_AND_TWO, Way

KEEP, NEW = 0.4, 4  # share of the features that stays, and number of generated tokens
CLOSE, POWER = 1e-4, 5e-3  # largest relative difference to the oracle, and least one that wrong positions make
WRONG = 30  # by which wrong positions are off
HIDDEN = -1e30  # logits of words that a model rules out are lower
_STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id")
_ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id")


class Failed(Exception):
    """A check failed, or cannot be made; the message says why."""


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draw all matrices anew, with a deviation that lets a wrong position move the logits."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


class Example:
    """Prompts with images for one model.

    Attributes:
        connector: of the model.
        layout: of the images.
        encoded: what `get_image_features` returns.
        inputs: arguments of `forward` and of `generate`.
        labels: [B, T] -100 at placeholders, padding, and the first token of each row.
        special: ids of special tokens.
        rows: the images of each row.
        images: number of features of each image.

    Raises:
        Failed: no prompt fits the features.
        TypeError: the model has no connector that can be reduced.
    """

    def __init__(self, model: Any, way: Way) -> None:
        self.model, self.connector, self.layout = model, find_connector(model), way.layout
        with torch.no_grad():
            self.encoded = way.call()
        self.special = sorted({*_special(model.config.to_dict()), *self.connector.placeholders.values()})
        self.rows = [[0], [1, 2]]
        self.images = self._images(way)
        self.ids, self.mask = self._tokens()
        self.is_image = self.ids == self.connector.placeholders["image"]
        types = {name: self.is_image.long() for name in ("mm_token_type_ids", "token_type_ids") if self._takes(name)}
        if self.model.config.model_type == "paligemma":
            del types["token_type_ids"]  # for training: which tokens are of the answer
        media = {name: value for name, value in way.arguments.items() if self._takes(name)}
        self.inputs = {"input_ids": self.ids, "attention_mask": self.mask, **types, **media}
        first = self.mask.cumsum(1) == 1  # padding would predict it
        self.labels = self.ids.masked_fill(self.is_image | (self.mask == 0) | first, -100)

    @property
    def entries(self) -> list[Tensor]:
        """The features of each entry of what `get_image_features` returns."""
        return [entry.reshape(-1, entry.shape[-1]) for entry in self.connector.features(self.encoded)]

    @property
    def by_row(self) -> bool:
        """Whether an entry holds all images of a row."""
        return len(self.entries) == len(self.rows)

    def _takes(self, name: str) -> bool:
        return name in argument_names(type(self.model).forward)

    def _images(self, way: Way) -> list[int]:
        """The number of features of each image."""
        counts = [len(entry) for entry in self.entries]
        if self.connector.units == "run" and way.layout.startswith(ONE_AND_TWO) and self.by_row:
            counts = [counts[0], counts[1] // 2, counts[1] // 2]
        if len(counts) % 3:
            raise Failed(f"get_image_features returns {len(counts)} entries for 3 images")
        tiles = len(counts) // 3
        return [sum(counts[i : i + tiles]) for i in range(0, len(counts), tiles)]

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] and their mask."""
        config = self.model.config
        words = torch.tensor([word for word in range(3, 90) if word not in self.special])
        generator, placeholder = torch.Generator().manual_seed(3), self.connector.placeholders["image"]
        start = [token for name in _STARTS if isinstance(token := getattr(config, name, None), int)][:1]
        end = [token for name in _ENDS if isinstance(token := getattr(config, name, None), int)][:1]

        def text(length: int) -> list[int]:
            return list(words[torch.randint(len(words), (length,), generator=generator)].tolist())

        rows = []
        for number, images in enumerate(self.rows):
            row = text(3 + 2 * number)
            for image in images:
                row += [*start, *[placeholder] * self.images[image], *end, *text(3)]
            rows.append(torch.tensor(row))
        width = max(map(len, rows))
        ids = torch.stack([F.pad(row, (width - len(row), 0), value=0) for row in rows])
        return ids, torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])

    def generate(self) -> tuple[Tensor, Tensor]:
        """Greedily: the new tokens [B, N] and their logits [B, N, V]."""
        out = self.model.generate(
            **self.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0, suppress_tokens=self.special,
        )  # fmt: skip
        return out.sequences[:, self.ids.shape[1] :], torch.stack(out.logits, 1)


def _special(values: Mapping[str, Any]) -> Iterator[int]:
    """Ids of special tokens in a configuration."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif "token" in str(name):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


@dataclass
class Full:
    """The full prompts, followed by generated tokens, and what stays of them.

    Attributes:
        example: the prompts.
        units: the reduced features of each image.
        ids: [B, T + N].
        mask: [B, T + N] 0 at padding.
        positions: [.., B, T + N] of the host for the full prompt.
        keep: [B, T + N] false for columns that leave, and for padding.
    """

    example: Example
    units: Sequence[ReducedUnit]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    keep: Tensor

    @property
    def types(self) -> dict[str, Tensor]:
        """Token types [B, T + N] of the prompts."""
        names = ("mm_token_type_ids", "token_type_ids")
        return {name: F.pad(self.example.inputs[name], (0, self._new)) for name in names if name in self.example.inputs}

    @property
    def _new(self) -> int:
        return self.ids.shape[1] - self.example.ids.shape[1]


def full(example: Example, share: float, answers: Tensor) -> Full:
    """The full prompts with answers [B, N], and what stays of their images."""
    connector = example.connector
    reducer = AttachedConnector(connector, crossget.Ward(crossget.Keep(share)))
    layers = connector.layers(example.encoded)
    flat = torch.cat(example.entries)
    lengths = example.images if example.by_row else [len(entry) for entry in example.entries]
    units, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        units.append(
            reducer.reduce(flat[part], text=None, separators=None, grid=None, carried=[one[part] for one in layers])
        )
        start += length
    row, column = example.is_image.nonzero(as_tuple=True)
    stays = torch.cat([_bits(unit) for unit in units])
    keep = example.mask.bool()
    keep[row, column] = stays
    grown = {**example.inputs}
    positions = torch.as_tensor(example.model._prepare_position_ids_for_generation(example.ids, grown))
    positions = positions.expand(*positions.shape[:-2], len(example.ids), -1)
    more = torch.arange(1, answers.shape[1] + 1)
    axes = positions[-_axes(example.model) :] if positions.dim() == 3 else positions[None]
    last = axes[..., -1].amax(0)[:, None] + more
    positions = torch.cat([positions, last.expand(*positions.shape[:-1], -1)], -1)
    ids, new = torch.cat([example.ids, answers], 1), torch.ones_like(answers)
    mask, keep = torch.cat([example.mask, new], 1), torch.cat([keep, new.bool()], 1)
    return Full(example, units, ids, mask, positions, keep)


def _bits(unit: ReducedUnit) -> Tensor:
    stays = torch.zeros(len(unit.source), dtype=torch.bool)
    stays[unit.kept] = True
    return stays


def _axes(model: Any) -> int:
    """The number of axes of the language model's positions."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    section = rope.get("mrope_section") or next(
        (v["mrope_section"] for v in rope.values() if isinstance(v, Mapping) and "mrope_section" in v), (1, 1, 1)
    )
    return len(section)


# Oracles ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked(prompts: Full) -> list[Tensor]:
    """Logits [T', V] of the columns that stay, per row, of full prompts whose other columns are hidden."""
    example, connector = prompts.example, prompts.example.connector
    flat, layers = torch.cat(example.entries), connector.layers(example.encoded)
    flat, layers = flat.clone(), [layer.clone() for layer in layers]
    start = 0
    for unit in prompts.units:
        flat[start + unit.kept] = unit.tokens
        for layer, tokens in zip(layers, unit.carried, strict=True):
            layer[start + unit.kept] = tokens
        start += len(unit.source)
    encoded = connector.replaced(example.encoded, flat, layers, [len(entry) for entry in example.entries])
    out = example.model(
        input_ids=prompts.ids, attention_mask=prompts.keep.long(), position_ids=prompts.positions, **prompts.types,
        mm_encoder_outputs={"image": encoded},
    )  # fmt: skip
    return [logits[keep] for logits, keep in zip(out.logits, prompts.keep, strict=True)]


@torch.no_grad()
def embedded(prompts: Full) -> list[Tensor]:
    """Logits [T', V] of each row alone: embeddings and features of the columns that stay, without images."""
    example, found = prompts.example, []
    tokens = torch.cat([unit.tokens for unit in prompts.units])
    all_embeds = example.model.get_input_embeddings()(prompts.ids)
    where = (prompts.ids == example.connector.placeholders["image"]) & prompts.keep
    all_embeds = all_embeds.masked_scatter(where[:, :, None], tokens.to(all_embeds))
    for row, keep in enumerate(prompts.keep):
        types = {name: value[row : row + 1, keep] for name, value in prompts.types.items()}
        embeds = all_embeds[row : row + 1, keep]
        out = example.model(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            position_ids=_selected(prompts, row), **types,
        )  # fmt: skip
        found.append(out.logits[0])
    return found


@torch.no_grad()
def cut(prompts: Full) -> list[Tensor]:
    """Logits [T', V] of each row alone: ids of the columns that stay, with its features."""
    example, connector, found = prompts.example, prompts.example.connector, []
    unit_rows = _unit_rows(prompts)
    for row, keep in enumerate(prompts.keep):
        types = {name: value[row : row + 1, keep] for name, value in prompts.types.items()}
        units = [unit for unit, own in zip(prompts.units, unit_rows, strict=True) if own == row]
        flat = torch.cat([unit.tokens for unit in units])
        layers = [torch.cat(parts) for parts in zip(*(unit.carried for unit in units), strict=True)]
        counts = [len(flat)] if example.by_row else [len(unit.tokens) for unit in units]
        ids = prompts.ids[row : row + 1, keep]
        out = example.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=_selected(prompts, row),
            **types, mm_encoder_outputs={"image": connector.replaced(example.encoded, flat, layers, counts)},
        )  # fmt: skip
        found.append(out.logits[0])
    return found


def _unit_rows(prompts: Full) -> list[int]:
    """The row of each unit."""
    row = prompts.example.is_image.nonzero()[:, 0]
    ends = torch.tensor([len(unit.source) for unit in prompts.units]).cumsum(0) - 1
    return [int(n) for n in row[ends]]


def _selected(prompts: Full, row: int) -> Tensor:
    """[.., 1, T'] the positions of the columns that stay, of one row."""
    chosen = prompts.positions[..., row : row + 1, prompts.keep[row]]
    # The first of four rows for three axes counts tokens, for masks.
    return chosen[1:] if chosen.dim() == 3 and len(chosen) == _axes(prompts.example.model) + 1 else chosen


@torch.no_grad()
def hides_by_mask(example: Example) -> bool:
    """Whether a column that a mask hides leaves all others as they are: not in a window, a convolution or a recurrence.

    It is tried on the text of a long prompt.
    """
    words = example.ids[~example.is_image & (example.mask > 0)]
    ids = words[torch.arange(40) % len(words)][None]
    positions = torch.arange(ids.shape[1])[None]
    keep = torch.ones_like(ids)
    keep[:, 4:30] = 0
    stays = keep[0].bool()
    long = example.model(input_ids=ids, attention_mask=keep, position_ids=positions).logits[0, stays]
    short = {"input_ids": ids[:, stays], "attention_mask": keep[:, stays], "position_ids": positions[:, stays]}
    return difference(long, example.model(**short).logits[0]) < CLOSE


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest value, besides words that a model rules out."""
    return float((one - other).abs().max() / other[other > HIDDEN].abs().max())


# Checks -----------------------------------------------------------------------------------------------------------


def check(example: Example) -> str:
    """Check a model, and name the oracle.

    Raises:
        Failed: a check fails.
    """
    model, inputs, labels = example.model, example.inputs, example.labels
    try:
        with torch.no_grad():
            dense = model(**inputs, labels=labels)
        answers, dense_logits = example.generate()
    except Exception as error:
        raise Failed(f"the dense model fails: {type(error).__name__}: {error}") from error
    with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(1.0))}):
        with torch.no_grad():
            same = model(**inputs, labels=labels)
        same_answers, same_logits = example.generate()
    if not (torch.equal(same.logits, dense.logits) and torch.equal(same.loss, dense.loss)):
        raise Failed("with Keep(1.0), forward is not that of the dense model")
    if not (torch.equal(answers, same_answers) and torch.equal(same_logits, dense_logits)):
        raise Failed("with Keep(1.0), generate is not that of the dense model")
    with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(KEEP))}) as attached:
        with torch.no_grad():
            out = model(**inputs, labels=labels)
        planned = attached.tokens["connector"]
        answers, step_logits = example.generate()
    prompts = full(example, KEEP, answers)
    if planned != [(len(unit.source), len(unit.kept)) for unit in prompts.units]:
        raise Failed(f"the features are cut as {planned}")
    name, wanted, shifted = _oracle(example, prompts, dense.logits)
    shown = difference(torch.cat(shifted), torch.cat(wanted))
    if shown == 0:
        name += ", without positions"
    elif shown < POWER:
        raise Failed(f"wrong positions change the logits by {shown:.1e} alone (oracle: {name})")
    lengths = prompts.keep.sum(1) - NEW
    got = torch.cat([logits[-n:] for logits, n in zip(out.logits, lengths, strict=True)])
    off = difference(got, torch.cat([logits[:-NEW] for logits in wanted]))
    if off > CLOSE:
        raise Failed(f"forward differs from the oracle ({name}) by {off:.1e}")
    off = difference(step_logits, torch.stack([logits[-NEW - 1 : -1] for logits in wanted]))
    if off > CLOSE:
        raise Failed(f"generate differs from the oracle ({name}) by {off:.1e}")
    # The loss of some models has further terms.
    if difference(_loss(list(zip(dense.logits, labels, strict=True))), dense.loss) < CLOSE:
        kept = prompts.keep[:, :-NEW]
        rows = zip(wanted, labels, kept, strict=True)
        off = difference(_loss([(row[:-NEW], label[keep]) for row, label, keep in rows]), out.loss)
        if off > CLOSE:
            raise Failed(f"the loss differs from the oracle ({name}) by {off:.1e}")
    return name


def _oracle(example: Example, prompts: Full, dense: Tensor) -> tuple[str, list[Tensor], list[Tensor]]:
    """The first oracle that is exact: its name, its logits, and those with wrong positions."""
    if hides_by_mask(example):
        wrong = prompts.positions.clone()
        wrong[..., prompts.mask.shape[1] // 2 :] += WRONG
        return "masked columns", masked(prompts), masked(dataclasses.replace(prompts, positions=wrong))
    nothing_left = full(example, 1.0, prompts.ids[:, -NEW:])
    real = torch.cat([logits[mask > 0] for logits, mask in zip(dense, example.mask, strict=True)])
    errors = []
    for name, oracle in (("embeddings", embedded), ("cut by hand", cut)):
        try:
            whole = oracle(nothing_left)
        except Exception as error:  # some hosts need ids
            errors.append(f"{name}: {error}")
            continue
        off = difference(torch.cat([logits[:-NEW] for logits in whole]), real)
        if off < CLOSE:
            wrong = prompts.positions.clone()
            wrong[..., prompts.mask.shape[1] // 2 :] += WRONG
            return name, oracle(prompts), oracle(dataclasses.replace(prompts, positions=wrong))
        errors.append(f"{name}: dense rows alone differ from the batch by {off:.1e}")
    raise Failed(f"no oracle is exact: {'; '.join(errors)}")


def _loss(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all labelled words of rows of logits [T, V] and labels [T]."""
    logits = torch.cat([logits[:-1] for logits, _ in rows])
    return F.cross_entropy(logits.float(), torch.cat([labels[1:] for _, labels in rows]))
