"""The methods: frozen dataclasses made of a matching, an importance, an ensemble and a schedule.

A reducer *is* its configuration: it prints, compares, pickles, and an ablation is `dataclasses.replace`. It sees
tensors only (`View`), never a model.

Every field takes effect or is refused: with a ValueError or TypeError when the reducer is made, or, where it depends on
the tower, when it is attached (`Reducer.resolved`). A field that is None has the method's value or, for `importance`
and `keys`, the value that the reference uses on that tower. `resolved` fills it in; fields that have no meaning beside
the others stay None.

To add a method, subclass as a frozen dataclass: `Merging` to change a part of it, `Joining` for another way to choose
sources and destinations, `Reducer` for anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from crossget.methods.importance import by_class_attention, by_guide, by_text
from crossget.methods.indexing import size_of, take
from crossget.methods.matching import MATCHINGS, Candidates, MergePlan, Ties
from crossget.methods.merging import ENSEMBLES, size
from crossget.methods.schedules import Schedule, as_int, as_schedule

MatchingName = Literal["complete_graph", "bipartite", "ward", "ward_graph", "random"]
ImportanceName = Literal["cross_token", "attention", "class_token", "class_attention", "text"]
EnsembleName = Literal["guided", "size", "normalized"]
KeysName = Literal["all_heads", "mean_heads", "tokens"]
HeadsName = Literal["all_heads", "mean_heads"]
Reduced = tuple[Tensor, "Tensor | None", MergePlan]
Self = TypeVar("Self", bound="Reducer")

_BY_GUIDE = ("cross_token", "class_token")
_BY_ATTENTION = ("attention", "class_attention")


@dataclass
class View:
    """What a reducer sees of one block, between attention and MLP.

    Attributes:
        tokens: [B, T, C] after the attention's residual.
        queries, keys: [B, H, T, D] of the block's attention.
        received: [B, T] attention received by each token, averaged over heads: of all queries, as in
            `crossget.methods.importance.by_attention`, or of the class token's query alone
            (`Reducer.needs_class_attention`). None unless the reducer asks for it (`Reducer.needs_attention`).
        sizes: [B, T] float32 input tokens per token; None while all are one.
        protected: [B, T] true for tokens that must stay as they are.
        n_protected: an upper bound of the protected tokens in a row.
        valid: [B, T] false for padding; None when there is none.
        guide: position of the guide, see `crossget.methods.importance`: an int for the cross token, [B] for the ends of
            text. None when the tower has neither.
        relevance: [B, T, C] tokens -> [B, T] their cosines with the features given to `Attachment.set_text_features`;
            None when none were given.
        score: [B, T] set by `reduce`, for records: the scores that it used.
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

    def sizes_or_ones(self) -> Tensor:
        """[B, T] float32 input tokens per token."""
        if self.sizes is not None:
            return self.sizes
        return torch.ones(self.tokens.shape[:2], dtype=torch.float32, device=self.tokens.device)


@dataclass(frozen=True)
class TowerFacts:
    """What a reducer has to know of a tower, to fill in its None fields and to refuse what cannot work there.

    Attributes:
        name: for messages.
        has_class_token: token 0 is a class token.
        guides_itself: the end-of-text token is a guide, so that scoring by a guide needs no cross token.
        importance, keys: what the reference uses on such a tower.
        embeds: single tokens can be compared with a text, see `Tower.embed`.
        keeps_cross_token: the tower's features include the cross token, as in the reference, unless it is stripped.
        single_token_output: some call of the host shows a single token of the tower, see `Tower.single_token_outputs`.
    """

    name: str
    has_class_token: bool = True
    guides_itself: bool = False
    importance: ImportanceName = "cross_token"
    keys: KeysName = "all_heads"
    embeds: bool = False
    keeps_cross_token: bool = field(default=True, kw_only=True)
    single_token_output: bool = field(default=True, kw_only=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class Reducer:
    """Base of all methods: when to reduce (`r`), and what takes effect under any method. `reduce` is the method.

    Args:
        r: tokens to remove per block: an int, one int per block, or a schedule.
        cross_token: append one cross token to the sequence, see `CrossGET`.
        strip_cross_token: remove it from the features of towers whose features include it in the reference (LLaVA).
        class_token_only: in the last block, compute attention output and MLP for one token only, where the result of
            the call depends on no other (the logits of a class token, say). Nothing is merged in that block. The result
            is the same up to rounding, for fewer multiply-adds. Only towers with `Tower.single_token_outputs` have such
            calls, and only the calls named there are affected: whoever asks for features of all tokens gets them.
            None: on all towers that have such calls.

    Raises:
        TypeError: `r` is none of an int, a sequence of ints, a schedule.
        ValueError: a field has a value that is not among its choices, or one that has no effect beside the others.
    """

    r: int | Sequence[int] | Schedule = field(kw_only=False)
    cross_token: bool = False
    strip_cross_token: bool = False
    class_token_only: bool | None = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # @dataclass would replace an inherited one
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        schedule = as_schedule(self.r)
        if not isinstance(self.r, Schedule):  # Constant or PerLayer hold plain ints, and a tuple hashes
            object.__setattr__(self, "r", schedule.r)  # type: ignore[attr-defined]
        _check_choices(self)
        if self.strip_cross_token and not self.cross_token:
            raise ValueError(
                f"{type(self).__name__}(strip_cross_token=True) has no effect with cross_token=False: there is no "
                "cross token to strip; leave strip_cross_token out"
            )

    def __repr__(self) -> str:
        parts = [repr(self.r)]
        for one in dataclasses.fields(self):
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            value = getattr(self, one.name)
            if one.init and one.name != "r" and value is not default and value != default:
                parts.append(f"{one.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def schedule(self) -> Schedule:
        """`r` as a schedule."""
        return as_schedule(self.r)

    @property
    def proportional_attention(self) -> bool:
        """Whether log(size) is added to the attention's scores on the key side. A field of `Joining`."""
        return True

    @property
    def norm_correction(self) -> bool:
        """Whether values and MLP outputs are corrected for merging. A field of `Joining`."""
        return False

    @property
    def needs_attention(self) -> bool:
        """Whether `reduce` needs `View.received`."""
        return False

    @property
    def needs_class_attention(self) -> bool:
        """Whether `View.received` is to hold the attention of token 0 alone."""
        return False

    def resolved(self: Self, tower: TowerFacts) -> Self:
        """This reducer with every None field filled in that has a meaning beside the others.

        Args:
            tower: where it will work.

        Raises:
            ValueError: the tower lacks what the method needs, or a field has no effect there.
        """
        kind = type(self).__name__
        if self.strip_cross_token and not tower.keeps_cross_token:
            raise ValueError(
                f"{kind}(strip_cross_token=True) has no effect on {tower.name}: its features never include the cross "
                "token; leave strip_cross_token out"
            )
        if self.class_token_only and not tower.single_token_output:
            raise ValueError(
                f"{kind}(class_token_only=True) has no effect on {tower.name}: none of its calls is known to depend on "
                "a single token of the last block; leave class_token_only out, or name such a call in "
                "Tower.single_token_outputs"
            )
        empty = {name: value for name, value in self.defaults(tower).items() if getattr(self, name) is None}
        full = dataclasses.replace(self, **empty)
        full.check(tower)
        return full

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        """Values for the fields that are None, of those that have a meaning beside the others."""
        return {"class_token_only": tower.single_token_output}

    def check(self, tower: TowerFacts) -> None:
        """Refuse, with a ValueError, a tower that lacks what the method needs. All fields are filled in."""

    def reduce(self, view: View, r: int) -> Reduced | None:
        """Remove about `r` tokens. It is called on a reducer that is `resolved`.

        Args:
            view: the block's tokens and what its attention saw.
            r: wished number, at least 1.

        Returns:
            tokens [B, T - r', C], sizes [B, T - r'] (None: all one), and the plan; None when nothing can be removed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reduce(): a method is a Reducer with reduce()")


@dataclass(frozen=True, kw_only=True, repr=False)
class Joining(Reducer):
    """Base of the methods that merge removed tokens into others, rather than drop them.

    Args:
        proportional_attention: add log(size) to the attention's scores on the key side, so that a merged token gets the
            attention of all the tokens it stands for.
        norm_correction: multiply values and MLP outputs by the norm of the mean direction of the merged tokens.
            LayerNorm rescales the (shorter) mean of merged tokens to full norm; this undoes it. See
            `crossget.methods.merging.norm_correction`.
    """

    proportional_attention: bool = True
    norm_correction: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class Merging(Joining):
    """Sources are merged into destinations: matching, importance and ensemble, each of them exchangeable alone.

    Without any other field, sources and destinations are chosen by complete-graph matching and merged into their
    size-weighted mean. Where a field is None, the method's own value below applies.

    Args:
        matching: how sources and their destinations are chosen, see `crossget.methods.matching`.
        guided_matching: importance takes part in the choice of sources. None: False.
        importance: what tokens are scored by, see `crossget.methods.importance`. "cross_token": the cross token or the
            end of text as guide; "class_token": the class token as guide; "attention": the attention received;
            "class_attention": that of the class token alone; "text": similarity to the text that was given to
            `Attachment.set_text_features`. None: as in the reference on that tower; there, without a cross token, the
            class token stands in for it or, where there is none, the attention received.
            Refused where neither the choice of sources nor the ensemble uses scores.
        ensemble: how a source and its destination become one token, see `crossget.methods.merging`. "guided" and
            "normalized" use scores. None: "size".
        keys: what tokens are compared by: "all_heads", the attention's keys with all heads concatenated; "mean_heads",
            their mean over heads; "tokens", the tokens after the attention's residual. A guide's query is compared with
            keys in either case ("tokens": of all heads). None: as in the reference on that tower.
        key_stride: tokens are compared by every `key_stride`-th channel of these; 2 halves the multiply-adds. None: 1.
        ties: how equal similarities are ranked, see `crossget.methods.matching.complete_graph`. None: "torch".
        seed: of the random matching; refused with any other. None: 0.
    """

    matching: MatchingName = "complete_graph"
    guided_matching: bool | None = None
    importance: ImportanceName | None = None
    ensemble: EnsembleName | None = None
    keys: KeysName | None = None
    key_stride: int | None = None
    ties: Ties | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "key_stride", 1)
        _check_int(self, "seed", 0)
        for name, why in self._without_effect().items():
            value = getattr(self, name)
            if value is not None and value is not False:
                raise ValueError(f"{type(self).__name__}({name}={value!r}) has no effect: {why}; leave {name} out")

    def _own(self) -> dict[str, Any]:
        """The method's own values for fields that are None, on any tower."""
        return {"guided_matching": False, "ensemble": "size", "keys": None, "key_stride": 1, "ties": "torch", "seed": 0}

    def _chosen(self, name: str) -> Any:
        value = getattr(self, name)
        return self._own()[name] if value is None else value

    @property
    def _guided(self) -> bool:
        """Whether scores take part in the choice of sources."""
        return self.matching != "random" and bool(self._chosen("guided_matching"))

    @property
    def _scores(self) -> bool:
        """Whether tokens are scored at all."""
        return self._guided or self._chosen("ensemble") != "size"

    def _without_effect(self) -> dict[str, str]:
        """The fields that have no meaning beside the others, and why."""
        fields = {}
        if not self._scores:
            fields["importance"] = "with guided_matching=False and ensemble='size' nothing uses scores"
        if self.matching != "random":
            fields["seed"] = f"matching={self.matching!r} has nothing random"
            return fields
        random = "matching='random' compares no tokens"
        fields |= {"guided_matching": random, "key_stride": random, "ties": random}
        if not self._scores or self.importance not in (None, *_BY_GUIDE):
            fields["keys"] = f"{random}, and no guide's query is compared with keys"
        elif self.keys == "tokens":
            fields["keys"] = f"{random}, and a guide's query is compared with keys, not with tokens"
        return fields

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        values = {**super().defaults(tower), **self._own()}
        if self._scores:
            values["importance"] = self.importance or _importance_on(tower, self.cross_token)
        values["keys"] = values["keys"] or tower.keys
        if self.matching == "random":
            values["guided_matching"] = False
            values["keys"] = _heads(values["keys"]) if values.get("importance") in _BY_GUIDE else None
        kept = {"guided_matching", "keys"}
        return {name: value for name, value in values.items() if name in kept or name not in self._without_effect()}

    @property
    def needs_attention(self) -> bool:
        return self.importance in _BY_ATTENTION

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, tower: TowerFacts) -> None:
        if self._scores:
            _check_importance(self, tower)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(
                _compared(self, view),
                view.protected,
                view.n_protected,
                view.valid,
                self._chosen("ties"),
                self._chosen("seed"),
                sizes=view.sizes,
            )
            r = candidates.limit(r)
            if r == 0:
                return None
            score = view.score = _score(self, view, candidates) if self._scores else None
            pairs = MATCHINGS[self.matching](candidates, r, score if self._guided else None)
            plan = MergePlan(*pairs, size_of(view.tokens, 1))
        sizes = view.sizes_or_ones()
        merge = ENSEMBLES[self._chosen("ensemble")]
        tokens, sizes = merge(view.tokens, sizes, sizes if score is None else score, plan)
        return tokens, sizes, plan


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossGET(Merging):
    """Cross-Guided Ensemble of Tokens: complete-graph matching and ensemble, guided by a cross token.

    A cross token is appended to the sequence: a copy of the class token (in text: of the end-of-text token) plus a
    vector that every block learns. With `r` alone this computes what the reference computes on that tower.

    Args: as `Merging`, `Joining` and `Reducer`. `guided_matching`: None is True, unless the matching is random.

    Source: CrossGET (ICML 2024, https://arxiv.org/abs/2305.17455).
    """

    cross_token: bool = True
    ensemble: EnsembleName | None = "guided"

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "guided_matching": True, "ensemble": "guided"}


@dataclass(frozen=True, kw_only=True, repr=False)
class ToMe(Merging):
    """Token Merging: bipartite soft matching on mean keys, size-weighted mean, proportional attention.

    Args: as `Merging`, `Joining` and `Reducer`. `keys`: None is "mean_heads".

    Source: ToMe (ICLR 2023, https://arxiv.org/abs/2210.09461), from the paper's equations.
    """

    matching: MatchingName = "bipartite"

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "keys": "mean_heads"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Ward(Merging):
    """Merging by Ward's criterion, for models that are not trained further: the pairs whose merging changes least.

    The change is that of the tokens themselves, each weighted by its size; the ensemble is the size-weighted mean.
    There is no cross token, and nothing is scored. Every token may join every other. Their distances are estimated from
    every second channel, which costs 1.5 times as many multiply-adds as the bipartite matching on all channels
    (`matching="ward", key_stride=1`). `crossget.RampedRatio` removes fewer tokens in the first blocks, see
    docs/methods.md.

    With an importance, the mass of a token in matching and ensemble is size * exp(importance): with "class_attention",
    one half by the token's share of all sizes, one half by its share of the class token's attention, see
    `crossget.methods.importance.by_class_attention`.

    Args: as `Merging`, `Joining` and `Reducer`. Where they are None, an `importance` makes `guided_matching` True and
        `ensemble` "normalized", `keys` is "tokens", `key_stride` 2 and `ties` "stable".
    """

    matching: MatchingName = "ward_graph"
    norm_correction: bool = True
    class_token_only: bool | None = None

    def _own(self) -> dict[str, Any]:
        scored = self.importance is not None
        return {
            **super()._own(),
            "guided_matching": scored,
            "ensemble": "normalized" if scored else "size",
            "keys": "tokens",
            "key_stride": 2,
            "ties": "stable",
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Random(Joining):
    """Random sources are merged into random destinations, size-weighted: the baseline that every matching has to beat.

    Args: as `Joining` and `Reducer`, and
        seed: what the choice depends on, beside the place in the batch and the number of tokens.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "seed", 0)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(view.tokens, view.protected, view.n_protected, view.valid, seed=self.seed)
            r = candidates.limit(r)
            if r == 0:
                return None
            plan = MergePlan(*MATCHINGS["random"](candidates, r, None), size_of(view.tokens, 1))
        sizes = view.sizes_or_ones()
        return *size(view.tokens, sizes, sizes, plan), plan


@dataclass(frozen=True, kw_only=True, repr=False)
class TopK(Reducer):
    """Importance pruning: the `r` least important tokens are dropped.

    Where the full grid is needed again, a dropped token gets the mean of the remaining patch tokens, so that average
    pooling sees these only.

    Args: as `Reducer`, and
        importance: what tokens are scored by, as in `Merging`.
        keys: the keys that a guide's query is compared with, as in `Merging`; refused where no guide scores.
    """

    importance: ImportanceName | None = "class_token"
    keys: HeadsName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is not None and self.importance not in (None, *_BY_GUIDE):
            raise ValueError(
                f"{type(self).__name__}(keys={self.keys!r}) has no effect: with importance={self.importance!r} no "
                "guide's query is compared with keys; leave keys out"
            )

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        importance = self.importance or _importance_on(tower, self.cross_token)
        keys = _heads(tower.keys) if importance in _BY_GUIDE else None
        return {**super().defaults(tower), "importance": importance, "keys": keys}

    @property
    def needs_attention(self) -> bool:
        return self.importance in _BY_ATTENTION

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, tower: TowerFacts) -> None:
        _check_importance(self, tower)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(_flat(view.keys, self.keys), view.protected, view.n_protected, view.valid)
            r = candidates.limit(r)
            if r == 0:
                return None
            view.score = _score(self, view, candidates)
            score = view.score.masked_fill(view.protected, torch.inf)
            if view.valid is not None:
                score = score.masked_fill(~view.valid & ~view.protected, -torch.inf)
            plan = MergePlan(score.argsort(1)[:, :r], None, size_of(view.tokens, 1))
        tokens = take(view.tokens, plan.kept)
        return tokens, None if view.sizes is None else view.sizes.gather(1, plan.kept), plan


def _score(reducer: Merging | TopK, view: View, candidates: Candidates) -> Tensor:
    """[B, T] the importance of every token. `candidates.given` is reused where it holds the keys that are needed."""
    if reducer.importance in _BY_ATTENTION:
        if view.received is None:
            raise RuntimeError(f"importance={reducer.importance!r} got no attention probabilities from the block")
        if reducer.importance == "attention":
            return view.received
        return by_class_attention(view.received, view.sizes_or_ones())
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
        heads, width = size_of(view.queries, 1), size_of(view.queries, 3)
        query = view.queries.gather(2, guide[:, None, None, None].expand(-1, heads, 1, width))
    if isinstance(reducer, Merging) and (reducer.keys == "tokens" or reducer._chosen("key_stride") != 1):
        candidates = Candidates(_flat(view.keys, reducer.keys), view.protected, view.n_protected)
    return by_guide(candidates.keys, candidates.inverse_norms, _flat(query, reducer.keys))


def _compared(reducer: Merging, view: View) -> Tensor:
    """[B, T, C] what tokens are compared by."""
    keys = view.tokens if reducer.keys == "tokens" else _flat(view.keys, reducer.keys)
    stride = 1 if reducer.matching == "random" else reducer._chosen("key_stride")
    return keys if stride == 1 else keys[:, :, ::stride]


def _flat(heads: Tensor, keys: KeysName | None) -> Tensor:
    """[B, H, T, D] as one vector per token: [B, T, H * D], or for "mean_heads" the mean over heads [B, T, D]."""
    return heads.mean(1) if keys == "mean_heads" else heads.transpose(1, 2).flatten(2)


def _heads(keys: KeysName) -> HeadsName:
    """What a guide's query is compared with under `keys`."""
    return "all_heads" if keys == "tokens" else keys


def _importance_on(tower: TowerFacts, cross_token: bool) -> ImportanceName:
    """What the reference scores tokens by on `tower`.

    Without a cross token, the class token that it would be a copy of takes its place, or else the attention received.
    """
    if tower.importance == "cross_token" and not cross_token and not tower.guides_itself:
        return "class_token" if tower.has_class_token else "attention"
    return tower.importance


def _check_importance(reducer: Merging | TopK, tower: TowerFacts) -> None:
    if reducer.importance in ("class_token", "class_attention") and not tower.has_class_token:
        raise ValueError(
            f"importance={reducer.importance!r} needs a class token, and {tower.name} has none: use "
            "importance='attention' or, with a cross token, importance='cross_token'"
        )
    if reducer.importance == "text" and not tower.embeds:
        raise ValueError(
            f"importance='text' compares single tokens with a text, and {tower.name} has no known projection of them "
            "to the space of texts: image towers of open_clip and of transformers' CLIPModel have one, unless they end "
            "in an attention pool"
        )
    if reducer.importance == "cross_token" and not (reducer.cross_token or tower.guides_itself):
        raise ValueError(
            f"importance='cross_token' needs cross_token=True on {tower.name}: use importance='class_token' or "
            "'attention', or do without importance (guided_matching=False, ensemble='size')"
        )


def _check_choices(reducer: Reducer) -> None:
    """Compare every field of a boolean or Literal type with its choices.

    Raises:
        TypeError: a boolean field is no boolean.
        ValueError: a name is not among the choices.
    """
    cls = type(reducer)
    for name, hint in _hints(cls).items():
        value, parts = getattr(reducer, name), get_args(hint) or (hint,)
        if value is None and type(None) in parts:
            continue
        if set(parts) <= {bool, type(None)}:
            if not isinstance(value, bool):
                raise TypeError(f"{cls.__name__}({name}={value!r}): give True or False")
            continue
        choices = [choice for part in parts for choice in (get_args(part) or (part,)) if choice is not type(None)]
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            raise ValueError(f"{cls.__name__}({name}={value!r}): choose one of {', '.join(map(repr, choices))}")


def _check_int(reducer: Reducer, name: str, least: int) -> None:
    """Store a field's integer as a plain int.

    Raises:
        TypeError: it is none.
        ValueError: it is below `least`, or does not fit 32 bits.
    """
    value = getattr(reducer, name)
    if value is None:
        return
    number = as_int(value)
    if number is None:
        raise TypeError(f"{type(reducer).__name__}({name}={value!r}): give an int")
    if not least <= number < 1 << 31:
        raise ValueError(f"{type(reducer).__name__}({name}={value!r}): give an int from {least} to {(1 << 31) - 1}")
    object.__setattr__(reducer, name, number)


def _hints(cls: type[Reducer]) -> dict[str, Any]:
    names = {one.name for one in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in names}
