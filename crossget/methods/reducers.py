"""The methods: frozen dataclasses made of a matching, an importance, an ensemble and a schedule.

A reducer *is* its configuration: it prints, compares, pickles, and an ablation is `dataclasses.replace`. It sees
tensors only (`View`), never a model. A field that is None means the value the reference uses for that backbone;
`resolved` fills it in when the reducer is attached.

To add a method, subclass `Reducer` (or `Merging`, to change a part of it) as a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from crossget.methods.importance import by_guide, by_reading, by_text
from crossget.methods.matching import MATCHINGS, Candidates, MergePlan, Ties, take
from crossget.methods.merging import ENSEMBLES
from crossget.methods.schedules import Schedule, as_schedule

MatchingName = Literal["complete_graph", "bipartite", "ward", "ward_graph", "random"]
ImportanceName = Literal["cross_token", "attention", "class_token", "class_attention", "text"]
EnsembleName = Literal["guided", "size", "normalized"]
KeysName = Literal["all_heads", "mean_heads", "tokens"]
Self = TypeVar("Self", bound="Reducer")
WardT = TypeVar("WardT", bound="Ward")


@dataclass
class View:
    """What a reducer sees of one block, between attention and MLP.

    Attributes:
        tokens: [B, T, C] after the attention's residual.
        queries, keys: [B, H, T, D] as the attention compared them.
        received: [B, T] attention received, see `crossget.methods.importance.by_attention`, averaged over heads; of the class
            token alone if the reducer wants that (`needs_class_attention`); None unless it asks (`needs_attention`).
        sizes: [B, T] float32 input tokens per token; None while all are one.
        protected: [B, T] true for tokens that must stay as they are.
        n_protected: an upper bound of the protected tokens in a row.
        valid: [B, T] false for padding; None when there is none.
        guide: position of the token that guides: that of the cross token, or [B] those of the ends of text; None when
            the tower has none.
        relevance: [B, T, C] tokens -> [B, T] their cosines with what `Attachment.set_text_features` was given; None if nothing.
        score: [B, T] left here by `reduce` for whoever records the forward: what it scored the tokens with.
    """

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    received: Tensor | None
    sizes: Tensor | None
    protected: Tensor
    n_protected: int
    valid: Tensor | None = None
    guide: Tensor | int | None = None
    relevance: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    score: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Host:
    """What a reducer needs to know of a tower to fill in its None fields and to refuse what cannot work.

    Attributes:
        name: for messages.
        has_class_token: token 0 is a class token.
        guides_itself: a token of the host guides (the end of text), so that no cross token is needed for guidance.
        importance, keys: what the reference uses on such a backbone.
        embeds: single tokens can be compared with a text, see `Tower.embed`.
    """

    name: str
    has_class_token: bool = True
    guides_itself: bool = False
    importance: ImportanceName = "cross_token"
    keys: KeysName = "all_heads"
    embeds: bool = False


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """Base of all methods: when to reduce (`r`) and whether a cross token takes part. `reduce` is the method.

    Args:
        r: tokens to remove per block: an int, one int per block, or a schedule.
        cross_token: append one cross token, see `CrossGET`.
        strip_cross_token: keep it out of the features, also where the reference has it among them (LLaVA).
        proportional_attention: log(size) is added to the attention's logits on the key side.
        norm_correction: what a merged token says in the attention, and what its MLP adds to it, is multiplied with the
            norm_correction of its members, see `crossget.methods.merging.norm_correction`.
        class_token_only: where the call's result shows one token of the last block alone (the class token's logits, say),
            that block's attention is asked for this token and its MLP run on it; the others stay as they came, and
            nothing is merged there. The result is the same up to rounding (with r = 0, too), for fewer multiply-adds.
            It concerns towers whose adapter says so (`Tower.single_token_outputs`) and calls of the method that it names: whoever
            asks for features of all tokens gets them.
    """

    r: int | Sequence[int] | Schedule = field(kw_only=False)
    cross_token: bool | None = False
    strip_cross_token: bool = False
    proportional_attention: bool | None = True
    norm_correction: bool = False
    class_token_only: bool = False

    def __post_init__(self) -> None:
        schedule = as_schedule(self.r)
        if not isinstance(self.r, int | Schedule):
            object.__setattr__(self, "r", schedule.r)  # type: ignore[attr-defined]  # a tuple hashes, a list does not
        _check_choices(self)

    @property
    def schedule(self) -> Schedule:
        """`r` as a schedule."""
        return as_schedule(self.r)

    @property
    def needs_attention(self) -> bool:
        """Whether `reduce` reads `View.received`."""
        return False

    @property
    def needs_class_attention(self) -> bool:
        """Whether the attention in `View.received` is to be that of token 0 alone."""
        return False

    def resolved(self: Self, host: Host) -> Self:
        """This reducer with every None replaced by the reference's value for `host`.

        Where the reference's importance needs a cross token and this reducer has none, the class token it would be a
        copy of scores in its place, or, without class token, the attention received.

        Raises:
            ValueError: the host lacks what the method needs.
        """
        importance = host.importance
        if importance == "cross_token" and self.cross_token is False and not host.guides_itself:
            importance = "class_token" if host.has_class_token else "attention"
        filled = {"cross_token": True, "proportional_attention": True, "importance": importance, "keys": host.keys}
        none: Any = {name: value for name, value in filled.items() if getattr(self, name, value) is None}
        full = dataclasses.replace(self, **none)
        full.check(host)
        return full

    def check(self, host: Host) -> None:
        """Refuse a host that lacks what the method needs, with a ValueError."""

    def reduce(self, view: View, r: int) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        """Remove about `r` tokens.

        Args:
            view: the block's tokens and what its attention saw.
            r: wished number, at least 1.

        Returns:
            tokens [B, T - r', C], sizes [B, T - r'] (None: all one), and the plan; None when nothing can be removed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reduce(): a method is a Reducer with reduce()")


@dataclass(frozen=True, kw_only=True)
class Merging(Reducer):
    """Sources join destinations: matching, importance and ensemble, each of them exchangeable alone.

    Args:
        matching: who may join whom, and which pairs do.
        guided_matching: importance takes part in choosing the sources.
        importance: what scores a token, where the matching or the ensemble asks. "text": how near it is to the text
            that `Attachment.set_text_features` was given, see `crossget.methods.importance.by_text`.
        ensemble: how a source and its destination become one token.
        keys: what tokens are compared by: keys of all heads concatenated, their mean over heads, or the tokens
            themselves behind the attention's residual.
        key_stride: every how many channels of that are compared; 2 takes half of the multiply-adds.
        ties: how equal similarities are ranked, see `crossget.methods.matching.complete_graph`.
        seed: what the random matching depends on.
    """

    matching: MatchingName = "complete_graph"
    guided_matching: bool = False
    importance: ImportanceName | None = None
    ensemble: EnsembleName = "size"
    keys: KeysName | None = None
    key_stride: int = 1
    ties: Ties = "torch"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def _needs_importance(self) -> bool:
        return (self.guided_matching and self.matching != "random") or self.ensemble != "size"

    @property
    def needs_attention(self) -> bool:
        return self._needs_importance and self.importance in ("attention", "class_attention")

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, host: Host) -> None:
        if self._needs_importance:
            _check_guide(self, host)

    def reduce(self, view: View, r: int) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        with torch.no_grad():
            candidates = Candidates(
                _compared(self, view),
                view.protected,
                view.n_protected,
                view.valid,
                self.ties,
                self.seed,
                sizes=view.sizes,
            )
            r = candidates.limit(r)
            if r == 0:
                return None
            score = view.score = _score(self, view, candidates) if self._needs_importance else None
            guide = score if self.guided_matching else None
            plan = MergePlan(*MATCHINGS[self.matching](candidates, r, guide), int(view.tokens.shape[1]))
        sizes = _ones(view) if view.sizes is None else view.sizes
        tokens, sizes = ENSEMBLES[self.ensemble](view.tokens, sizes, sizes if score is None else score, plan)
        return tokens, sizes, plan


@dataclass(frozen=True, kw_only=True)
class CrossGET(Merging):
    """Cross-Guided Ensemble of Tokens: complete-graph matching and ensemble, guided by a cross token.

    A cross token travels at the end of the sequence: a copy of the class token (in text: of the end-of-text token)
    plus a vector that every block learns. With `r` alone this computes what the reference computes on that backbone.

    Args: as `Merging` and `Reducer`.

    Source: CrossGET (ICML 2024, https://arxiv.org/abs/2305.17455).
    """

    cross_token: bool | None = None
    proportional_attention: bool | None = None
    guided_matching: bool = True
    ensemble: EnsembleName = "guided"


@dataclass(frozen=True, kw_only=True)
class ToMe(Merging):
    """Token Merging: bipartite soft matching on mean keys, size-weighted mean, proportional attention.

    Source: ToMe (ICLR 2023, https://arxiv.org/abs/2210.09461), from the paper's equations.
    """

    matching: MatchingName = "bipartite"
    keys: KeysName | None = "mean_heads"


@dataclass(frozen=True, kw_only=True)
class Ward(Merging):
    """Merging by Ward's criterion, for models that are not trained on: those tokens join whose joining changes least.

    What changes is the tokens themselves, each weighed by its size; the ensemble is the size-weighted mean. There is
    no cross token and nothing is scored. Every token may join every other; their distances are estimated from every
    second channel, so that this costs half as much again as two sets on all channels would (`matching="ward",
    keys="tokens"`). `crossget.RampedRatio` spares the first blocks, see docs/training_free.md.

    With an importance the mass of a token, in matching and ensemble, is size * exp(importance): `"class_attention"`
    makes it the token's share of the image and of the class token's attention (`crossget.methods.importance.by_reading`).

    Args: as `Merging` and `Reducer`. `guided_matching` and `ensemble` say what an importance, if there is one, is for.
    """

    matching: MatchingName = "ward_graph"
    guided_matching: bool = True
    ensemble: EnsembleName = "normalized"
    keys: KeysName | None = "tokens"
    key_stride: int = 2
    ties: Ties = "stable"
    norm_correction: bool = True
    class_token_only: bool = True

    def resolved(self: WardT, host: Host) -> WardT:
        if self.importance is not None:
            return super().resolved(host)
        sizes: dict[str, Any] = {"guided_matching": False, "ensemble": "size", "importance": "attention"}
        return dataclasses.replace(self, **sizes).resolved(host)


@dataclass(frozen=True, kw_only=True)
class Random(Merging):
    """Random sources join random destinations: the baseline that every matching has to beat."""

    matching: MatchingName = "random"


@dataclass(frozen=True, kw_only=True)
class TopK(Reducer):
    """Importance pruning: the `r` least important tokens are dropped.

    Where the full grid is needed again, a dropped token gets the mean of the surviving patch tokens, so that average
    pooling sees the survivors only.

    Args:
        importance: what scores a token.
        keys: as in `Merging`.
    """

    importance: ImportanceName | None = "class_token"
    keys: KeysName | None = None

    @property
    def needs_attention(self) -> bool:
        return self.importance in ("attention", "class_attention")

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, host: Host) -> None:
        _check_guide(self, host)

    def reduce(self, view: View, r: int) -> tuple[Tensor, Tensor | None, MergePlan] | None:
        with torch.no_grad():
            candidates = Candidates(_flat(view.keys, self.keys), view.protected, view.n_protected, view.valid)
            r = candidates.limit(r)
            if r == 0:
                return None
            view.score = _score(self, view, candidates)
            score = view.score.masked_fill(view.protected, torch.inf)
            if view.valid is not None:
                score = score.masked_fill(~view.valid & ~view.protected, -torch.inf)
            plan = MergePlan(score.argsort(1)[:, :r], None, int(view.tokens.shape[1]))
        tokens = take(view.tokens, plan.kept)
        return tokens, None if view.sizes is None else view.sizes.gather(1, plan.kept), plan


def _score(reducer: Merging | TopK, view: View, candidates: Candidates) -> Tensor:
    if reducer.importance in ("attention", "class_attention"):
        if view.received is None:
            raise RuntimeError(f"importance={reducer.importance!r} got no attention probabilities from the block")
        if reducer.importance == "attention":
            return view.received
        return by_reading(view.received, _ones(view) if view.sizes is None else view.sizes)
    if reducer.importance == "text":
        if view.relevance is None:
            raise RuntimeError("importance='text' has no text: call Attachment.set_text_features(text features) first")
        free = ~view.protected if view.valid is None else ~view.protected & view.valid
        return by_text(view.relevance(view.tokens), free)
    guide = 0 if reducer.importance == "class_token" else view.guide
    if guide is None:
        raise RuntimeError("importance='cross_token' found no guide among the tokens")
    if isinstance(guide, int):
        query = view.queries[:, :, guide : guide + 1]
    else:
        _, heads, _, width = view.queries.shape
        query = view.queries.gather(2, guide[:, None, None, None].expand(-1, heads, 1, width))
    if reducer.keys == "tokens":  # which a query does not ask for
        candidates = Candidates(_flat(view.keys, None), view.protected, view.n_protected)
    return by_guide(candidates.keys, candidates.inverse_norms, _flat(query, reducer.keys))


def _compared(reducer: Merging, view: View) -> Tensor:
    """[B, T, C] what tokens are compared by."""
    keys = view.tokens if reducer.keys == "tokens" else _flat(view.keys, reducer.keys)
    return keys if reducer.key_stride == 1 else keys[:, :, :: reducer.key_stride]


def _flat(heads: Tensor, keys: KeysName | None) -> Tensor:
    """[B, H, T, D] as one vector per token: [B, T, H * D], or the mean over heads [B, T, D]."""
    return heads.mean(1) if keys == "mean_heads" else heads.transpose(1, 2).flatten(2)


def _ones(view: View) -> Tensor:
    return torch.ones(view.tokens.shape[:2], dtype=torch.float32, device=view.tokens.device)


def _check_guide(reducer: Merging | TopK, host: Host) -> None:
    if reducer.importance in ("class_token", "class_attention") and not host.has_class_token:
        raise ValueError(
            f"importance={reducer.importance!r} needs a class token, and {host.name} has none: use "
            "importance='attention' or, with a cross token, importance='cross_token'"
        )
    if reducer.importance == "text" and not host.embeds:
        raise ValueError(
            f"importance='text' needs a way of single tokens to the space of texts, and none is known for {host.name}: "
            "image towers of open_clip and of transformers' CLIPModel have one, unless they end in an attention pool"
        )
    if reducer.importance == "cross_token" and not (reducer.cross_token or host.guides_itself):
        raise ValueError(
            f"importance='cross_token' needs cross_token=True on {host.name}: use importance='class_token' or "
            "'attention', or do without importance (guided_matching=False, ensemble='size')"
        )


def _check_choices(reducer: Reducer) -> None:
    """Compare every field of a Literal type with its choices."""
    for name, hint in _hints(type(reducer)).items():
        choices = [c for part in (get_args(hint) or ()) for c in (get_args(part) or (part,))]
        value = getattr(reducer, name)
        if choices and all(isinstance(c, str) or c is type(None) for c in choices) and value not in choices:
            if value is None and type(None) in choices:
                continue
            names = ", ".join(repr(c) for c in choices if isinstance(c, str))
            raise ValueError(f"{type(reducer).__name__}({name}={value!r}): choose one of {names}")


def _hints(cls: type[Reducer]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in names}
