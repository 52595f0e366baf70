"""Fewer image features behind the connector of a model of images and text.

The connector is the part of such a model between the image tower and the language model. The language model gets one
feature for every placeholder token of the prompt. `Connector` says where these features are; `AttachedConnector`
reduces them, image by image, with the same methods as a tower (`reduce_features`). What becomes of the prompt is in
connector_prompts.py.

Shapes: n features of one unit (an image or tile) before the reduction, k after it, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.attached_place import AttachedPlace
from crossget.core.sized_keys import SizedKernels
from crossget.core.state import BlockRecord
from crossget.core.tower_attention import ScoredTower
from crossget.methods.importance import attention_received
from crossget.methods.indexing import take
from crossget.methods.matching import shares
from crossget.methods.merging import merge_by
from crossget.methods.reducers import Joining, Reducer, TowerFacts, View
from crossget.methods.schedules import Keep

NAME = "connector"
_LAYERS = "deepstack_features"
FACTS = TowerFacts(
    "the connector", has_class_token=False, importance="cross_token", keeps_cross_token=False,
    single_token_output=False, corrects_norms=False, connector=True,
)  # fmt: skip


@dataclass
class Connector:
    """Where the image features of a model of images and text are.

    Attributes:
        model: the module whose `forward` and `generate` take prompts with images.
        parts: the module whose `get_image_features` encodes the images.
        placeholders: modality ("image", "video") -> id of its placeholder token.
        field: name of the features in the output of `get_image_features`. "deepstack_features": there are features for
            several layers of the language model alone, and those of the first are compared.
        units: "entry": every entry of that field is one unit. "run": an entry holds several, which end where a run of
            placeholders ends.
        inner: other modules whose `forward` takes such prompts.
        separator: name of the parameter of `parts` that separates the rows of an image, such as "image_newline"; None:
            there is none among the features.
        attentions: the attentions of the language model, whose scores log(size) can be added to; or the reason why not.
        scored: the blocks of the image tower, whose attention scores the features; or the reason why it cannot.
    """

    model: Any
    parts: Any
    placeholders: dict[str, int]
    field: str = "pooler_output"
    units: Literal["entry", "run"] = "entry"
    inner: Sequence[nn.Module] = ()
    separator: str | None = None
    attentions: Sequence[nn.Module] | str = "its attentions are not known"
    scored: ScoredTower | str = "its image tower is not known"

    def features(self, out: Any) -> list[Tensor]:
        """The features [n, C] of each entry of what `get_image_features` returned."""
        features = _features_of(out.deepstack_features[0]) if self.field == _LAYERS else getattr(out, self.field)
        if isinstance(features, Tensor) and features.dim() == 2:
            features = features[None]
        return [entry.reshape(-1, entry.shape[-1]) for entry in features]

    def layers(self, out: Any) -> list[Tensor]:
        """Further features of the same tokens, for layers of the language model (deepstack): [N, C'] for each."""
        layers = [_features_of(layer) for layer in getattr(out, _LAYERS, None) or []]
        return [torch.cat([part.reshape(-1, part.shape[-1]) for part in layer]) for layer in layers]

    def replaced(self, out: Any, flat: Tensor, layers: Sequence[Tensor], counts: list[int]) -> Any:
        """A copy of what `get_image_features` returned, with other features.

        Args:
            out: what it returned.
            flat: [N, C] the features.
            layers: [N, C'] further features of the same tokens.
            counts: the number of features of each entry.
        """
        new = copy.copy(out)
        if self.field != _LAYERS:
            setattr(new, self.field, _like(getattr(out, self.field), flat.split(counts)))
        if layers:
            pairs = zip(out.deepstack_features, layers, strict=True)
            new.deepstack_features = [_with_features(old, list(layer.split(counts))) for old, layer in pairs]
        return new


def _features_of(layer: Any) -> Any:
    """The features of one layer of deepstack: some hosts give a pair of the layer's number and the features."""
    return layer[1] if isinstance(layer[0], int) else layer


def _with_features(layer: Any, features: list[Tensor]) -> Any:
    return (layer[0], features) if isinstance(layer[0], int) else features


def _like(before: Any, entries: tuple[Tensor, ...]) -> Any:
    """The entries in the form that they had: a list, a tuple, or a tensor [entries, n, C] or [n, C].

    Entries of different lengths become one entry of a tensor.
    """
    if not isinstance(before, Tensor):
        return type(before)(entries)
    if before.dim() == 2:
        return torch.cat(entries)
    if len({len(entry) for entry in entries}) == 1:
        return torch.stack(entries).reshape(len(entries), *before.shape[1:-2], -1, before.shape[-1])
    return torch.cat(entries)[None]


class ReducedUnit(NamedTuple):
    """The features of one unit after the reduction.

    Attributes:
        tokens: [k, C].
        kept: [k] the places, among the n, of the features that stay.
        sizes: [k] float32, the number of features that each stands for.
        source: [n] for each feature, the index among the k of the one that it was merged into; -1 if it was dropped.
        carried: other features of the same tokens, [k, C'] each, merged like them.
        record: what is recorded, see `Attachment.records`; None: nothing is recorded.
        grid: height and width of the unit's grid before the reduction; None: they are not known.
    """

    tokens: Tensor
    kept: Tensor
    sizes: Tensor
    source: Tensor
    carried: list[Tensor]
    record: BlockRecord | None
    grid: tuple[int, int] | None = None


def reduce_features(
    reducer: Reducer, features: Tensor, n_kept: int, *, text: Tensor | None = None, protected: Tensor | None = None,
    grid: tuple[int, int] | None = None, received: Tensor | None = None, carried: Sequence[Tensor] = (),
    recording: bool = False, has_copies: bool = False,
) -> ReducedUnit:  # fmt: skip
    """Reduce the features of one unit, in as many rounds as it takes: a matching removes at most half of its tokens.

    A feature is compared as it is: it stands for a token, its query and its key, with one head. With a cross token, the
    text is appended as a token that guides, and is taken off in the end.

    Args:
        reducer: the method, with all fields resolved.
        features: [n, C].
        n_kept: k, the number of features that stay, besides the protected ones.
        text: [C] the mean embedding of the prompt's text, for methods that are guided by a text.
        protected: [n] true for features that stay as they are; None: there are none.
        grid: height and width of the unit's grid; None: they are not known.
        received: [n] the attention that each feature received in the image tower, for methods that ask for it. That of
            a merged one is the sum.
        carried: other features of the same tokens [n, C'].
        recording: keep a record.
        has_copies: features that are equal are copies of one merged token of the tower. They become one first, so that
            fewer than `n_kept` may stay.

    Raises:
        RuntimeError: the method is guided by a text, and the prompt has none.
    """
    n, guided = int(features.shape[0]), bool(reducer.cross_token)
    tokens = features[None]
    if guided:
        if text is None:
            raise RuntimeError(
                f"{reducer} is guided by the text of the prompt, and there is none beside the image: use a method "
                "without a cross token"
            )
        tokens = torch.cat([tokens, text.to(features)[None, None]], 1)
    fixed = torch.zeros(1, n, dtype=torch.bool, device=features.device) if protected is None else protected[None]
    if guided:
        fixed = F.pad(fixed, (0, 1), value=True)
    # Without protected features no value is read, so that this runs on the meta device.
    n_protected = int(guided) if protected is None else int(fixed.sum())
    extras = [extra[None] for extra in carried]
    if received is not None:
        received = F.pad(received.float() / received.float().sum().clamp(min=1e-12), (0, int(guided)))[None]
    kept = source = torch.arange(tokens.shape[1], device=features.device)[None]
    sizes: Tensor | None = None
    weights: Tensor | None = torch.ones_like(kept, dtype=torch.float32)
    if has_copies:
        kept, source, counts = _originals(tokens, fixed)
        tokens, fixed, extras = take(tokens, kept), fixed.gather(1, kept), [take(extra, kept) for extra in extras]
        sizes, weights = counts, 1 / counts.gather(1, source)
    score: Tensor | None = None
    relevance = None if text is None else _Similarity(text.detach())
    while (rest := int(tokens.shape[1]) - n_protected - n_kept) > 0:
        heads = tokens.detach()[:, None]
        attention = received
        if reducer.needs_attention and not reducer.needs_tower_attention:
            attention = attention_received(heads, heads, None, float(heads.shape[-1]) ** -0.5)
        view = View(
            tokens, heads, heads, attention, sizes, fixed, n_protected,
            guide=int(tokens.shape[1]) - 1 if guided else None, relevance=relevance,
            grid=grid if int(tokens.shape[1]) == n else None, beyond_half=True,
        )  # fmt: skip
        reduced = reducer.reduce(view, rest)
        if reduced is None:
            raise RuntimeError(
                f"{reducer} cannot reduce {n} features to {n_kept}: it left {int(tokens.shape[1]) - n_protected} of "
                "them; take another method, or keep more"
            )
        tokens, sizes, plan = reduced
        score = view.score if score is None else score
        extras = [_merged(extra, plan, guided) for extra in extras]
        share = shares(plan) if recording else None
        before = source.clamp(min=0)
        weights = None if weights is None or share is None else weights * share.gather(1, before)
        source = torch.where(source < 0, source, plan.index.gather(1, before))
        kept, fixed = kept.gather(1, plan.kept), fixed.gather(1, plan.kept)
        if received is not None:
            left = received.where(plan.index >= 0, 0)
            received = torch.zeros_like(kept, dtype=left.dtype).scatter_add(1, plan.index.clamp(min=0), left)
    if sizes is None:
        sizes = torch.ones_like(kept, dtype=torch.float32)
    if guided:
        tokens, kept, sizes, source = (values[:, :-1] for values in (tokens, kept, sizes, source))
        score = None if score is None else score[:, :-1]
    record = None
    if recording:
        weights = None if weights is None else weights[:, :n]
        record = BlockRecord(source, sizes, weights, score, tokens.detach().clone())
    return ReducedUnit(tokens[0], kept[0], sizes[0], source[0], [extra[0] for extra in extras], record, grid)


def _originals(tokens: Tensor, protected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the equal ones among tokens [1, T, C]; protected ones [1, T] are all kept.

    Returns:
        [1, K] the places of the first ones; [1, T] the index of its first one among the K; [1, K] float32, how many are
        equal to it.
    """
    order = torch.arange(tokens.shape[1], device=tokens.device)
    marked = torch.cat([tokens[0].detach(), torch.where(protected[0], order + 1, 0)[:, None].to(tokens.dtype)], 1)
    groups = marked.unique(dim=0, return_inverse=True)[1]
    first = torch.full_like(order, len(order)).scatter_reduce(0, groups, order, "amin")[groups]
    kept, source, counts = first.unique(return_inverse=True, return_counts=True)
    return kept[None], source[None], counts[None].float()


def _merged(extra: Tensor, plan: Any, guided: bool) -> Tensor:
    """Other features [1, T, C'] of the same tokens, merged like them. The text has none."""
    padded = F.pad(extra, (0, 0, 0, 1)) if guided else extra
    merged = merge_by(padded, plan)
    return merged[:, :-1] if guided else merged


class _Similarity:
    """Cosines of tokens [B, T, C] with a text [C]."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __call__(self, tokens: Tensor) -> Tensor:
        """[B, T]."""
        return F.cosine_similarity(tokens.float(), self.text.float().to(tokens.device), dim=-1)


@dataclass
class ConnectorRecord:
    """What the user can read about the images of one forward: one unit after the other, in the order of the prompts.

    Attributes:
        units: the reduced units.
    """

    units: list[ReducedUnit] = field(default_factory=list)

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Per unit, the number of features before and after."""
        return [(len(unit.source), len(unit.kept)) for unit in self.units]

    @property
    def source(self) -> Tensor | None:
        """[U, n] for each feature of each of U units, the index of the one that it was merged into.

        -1 if it was dropped, and behind the end of a unit that is shorter than the longest one. None: no unit.
        """
        if not self.units:
            return None
        return nn.utils.rnn.pad_sequence([unit.source for unit in self.units], batch_first=True, padding_value=-1)

    @property
    def blocks(self) -> list[BlockRecord] | None:
        """One record per unit; None if the forward was not recorded."""
        records = [unit.record for unit in self.units if unit.record is not None]
        return records or None


def _adds_sizes(reducer: Reducer) -> bool:
    """Whether log(size) is added behind the connector: only a method that joins tokens has sizes above 1."""
    return isinstance(reducer, Joining) and bool(reducer.proportional_attention)


class AttachedConnector(AttachedPlace[ConnectorRecord]):
    """A connector with the reducer that is attached to it.

    Attributes:
        connector: where the features are.
        has_copies: the tower merges units, and its features are copies of them, see `crossget.core.merge_units`.
        tower_reduced: the image tower is reduced, too.
    """

    def __init__(
        self, connector: Connector, reducer: Reducer, *, has_copies: bool = False, tower_reduced: bool = False
    ) -> None:
        self.connector, self.has_copies, self.tower_reduced = connector, has_copies, tower_reduced
        self._kernels = SizedKernels()
        super().__init__(reducer, ConnectorRecord)

    def resolve(self, reducer: Reducer) -> Reducer:
        """The method with all fields resolved.

        Raises:
            ValueError: it cannot work behind the connector, or asks for sizes in attentions that take none.
        """
        resolved = reducer.resolved(FACTS)
        if _adds_sizes(resolved) and (refusal := self._sizes_refusal()) is not None:
            raise ValueError(refusal)
        if resolved.needs_tower_attention:
            scored = "it is reduced, too" if self.tower_reduced else self.connector.scored
            if isinstance(scored, str):
                raise ValueError(
                    f"importance='tower_attention' on {type(self.connector.model).__name__}: the attention of its "
                    f"image tower cannot be had: {scored}; use another importance"
                )
        self._check(resolved.schedule)
        return resolved

    def check_kernel(self) -> None:
        """Check that the language model, whose kernel may have changed, takes sizes if the method asks for it.

        Raises:
            RuntimeError: it does not.
        """
        if self.adds_sizes and (refusal := self._sizes_refusal()) is not None:
            raise RuntimeError(refusal)

    def _sizes_refusal(self) -> str | None:
        """Why the attentions of the language model take no sizes; None: they do."""
        attentions, model = self.connector.attentions, self.connector.model
        if isinstance(attentions, str):
            reason: str | None = attentions
        else:
            reason = self._kernels.refusal(attentions, model)
        if reason is None:
            return None
        return (
            f"proportional_attention=True on {FACTS.name} adds log(size) to the attention scores of the language "
            f"model, and those of {type(model).__name__} take none: {reason}; or leave it out"
        )

    def _check(self, keep: Any) -> None:
        if not isinstance(keep, Keep):
            return
        kind = type(self.connector.model).__name__
        if keep.separators and self.connector.separator is None:
            raise ValueError(f"{keep} on {kind}: there are no separators among its image features; leave it out")
        if keep.per == "image" and self.connector.units == "run":
            raise ValueError(f"{keep} on {kind}: which tiles are of one image is not known there; leave per out")
        if keep.positions == "renumbered" and hasattr(self.connector.parts, "get_rope_index"):
            raise ValueError(f"{keep} on {kind}: its positions are those of the image grid; leave positions out")

    @property
    def adds_sizes(self) -> bool:
        """Whether log(size) is added to the attention scores of the language model."""
        return _adds_sizes(self.reducer)

    @property
    def uses_text(self) -> bool:
        """Whether features are compared with the text of the prompt."""
        return bool(self.reducer.cross_token) or self.reducer.needs_text

    def n_kept(self, features: int) -> int:
        """k, the number of features of a unit that stay, of n."""
        return features - min(self.reducer.schedule.removed(0, 1, features), features - 1)

    @property
    def keep(self) -> Keep:
        """What `Keep` says besides a number. Another schedule is for every unit, without separators."""
        schedule = self.reducer.schedule
        return schedule if isinstance(schedule, Keep) else Keep(1.0)

    def reduce(
        self, features: Tensor, *, text: Tensor | None, separators: Tensor | None, grid: tuple[int, int] | None,
        carried: Sequence[Tensor], received: Tensor | None = None,
    ) -> ReducedUnit:  # fmt: skip
        """Reduce the features [n, C] of one unit, see `reduce_features`."""
        protected = separators if self.keep.separators else None
        n = int(features.shape[0]) - (0 if protected is None else int(protected.sum()))
        return reduce_features(
            self.reducer, features, self.n_kept(n) if n else 0, text=text, protected=protected, grid=grid,
            received=received, carried=carried, recording=self.recording, has_copies=self.has_copies,
        )  # fmt: skip
