"""The methods: frozen dataclasses that combine a matching, an importance, an ensemble and a schedule.

A reducer is its configuration: it can be printed, compared and pickled, and an ablation is one call of
`dataclasses.replace`. Its input is a `View` of one block, which holds tensors only; it never gets the model.

"The reference" is the CrossGET authors' code. A tower is a list of transformer blocks, such as the image encoder of a
CLIP.

Every field takes effect, or is refused with a ValueError or TypeError: when the reducer is constructed or, if it
depends on the tower, when the reducer is attached (`Reducer.resolved`). None means the method's own value or, for
`importance` and `keys`, the value of the reference on that tower. `resolved` fills these values in. A field that has no
effect in combination with the other fields stays None.

To add a method, define a frozen dataclass: a subclass of `Merging` to change one of its parts, of `Joining` for another
choice of sources and destinations, of `Reducer` for anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from crossget.methods.importance import by_class_attention, by_guide
from crossget.methods.indexing import size_of, take
from crossget.methods.matching import MATCHINGS, Candidates, MergePlan, Ties
from crossget.methods.merging import ENSEMBLES, size
from crossget.methods.schedules import Keep, Schedule, as_int, as_schedule

MatchingName = Literal["complete_graph", "bipartite", "ward", "ward_graph", "random"]
ImportanceName = Literal["cross_token", "attention", "class_token", "class_attention", "tower_attention"]
EnsembleName = Literal["guided", "size", "normalized"]
KeysName = Literal["all_heads", "mean_heads", "tokens"]
HeadsName = Literal["all_heads", "mean_heads"]
Reduced = tuple[Tensor, "Tensor | None", MergePlan]
Self = TypeVar("Self", bound="Reducer")

_BY_GUIDE = ("cross_token", "class_token")
_BY_ATTENTION = ("attention", "class_attention", "tower_attention")


@dataclass
class View:
    """The input of a reducer: the tokens of one block, between attention and MLP.

    Attributes:
        tokens: [B, T, C] after the addition of the attention's output to the block's input.
        queries, keys: [B, H, T, D] of the block's attention.
        received: [B, T] attention received by each token, averaged over heads: from all queries, as in
            `crossget.methods.importance.by_attention`, from the class token's query alone
            (`Reducer.needs_class_attention`), or in the image tower (`Reducer.needs_tower_attention`). None unless the
            reducer asks for it (`Reducer.needs_attention`).
        sizes: [B, T] float32, the number of input tokens that each token stands for; None: all are 1.
        protected: [B, T] true for tokens that must not be merged or dropped.
        n_protected: the largest number of protected tokens in a row.
        valid: [B, T] false for padding; None: there is no padding.
        guide: position of the guide, see `crossget.methods.importance`: an int for the cross token, [B] for the
            end-of-text tokens. None: the tower has neither.
        relevance: function from tokens [B, T, C] to their cosines [B, T] with the text of the prompt, behind the
            connector; None: there is no such text.
        score: [B, T] the scores that `reduce` used. It sets this attribute, for `Attachment.records`.
        wanted: [B] number of tokens to remove from each row with padding, see `Candidates`; None: `r` from all. The
            rest of the `r` tokens that `reduce` removes from a row is padding.
        grid: height and width of the image grid whose places the tokens are, in rows; None: they are not known.
        beyond_half: more than half of the unprotected tokens may leave at once, as behind the connector.
        prefix: in every row, this many tokens at the beginning are protected, and the other protected ones are at the
            end; None: rows differ, or it is not known.
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
    wanted: Tensor | None = field(default=None, kw_only=True)
    grid: tuple[int, int] | None = field(default=None, kw_only=True)
    beyond_half: bool = field(default=False, kw_only=True)
    prefix: int | None = field(default=None, kw_only=True)

    def sizes_or_ones(self) -> Tensor:
        """[B, T] float32, the number of input tokens that each token stands for."""
        if self.sizes is not None:
            return self.sizes
        return torch.ones(self.tokens.shape[:2], dtype=torch.float32, device=self.tokens.device)


@dataclass(frozen=True)
class TowerFacts:
    """The properties of a tower that a reducer needs, to fill in its None fields and to refuse fields without effect.

    Attributes:
        name: name of the tower in messages.
        has_class_token: token 0 is a class token.
        guides_itself: the end-of-text token is the guide, so that scores by a guide need no cross token.
        importance, keys: the values that the reference uses on such a tower.
        keeps_cross_token: the tower's features include the cross token in the reference (LLaVA).
        single_token_output: some methods of the model return a single token of the tower, see
            `Tower.single_token_outputs`.
        corrects_norms: attention values and MLP outputs can be corrected for merging.
        connector: this is no tower, but the place behind the connector of a model of images and text. The tokens are
            the image features that the language model gets.
    """

    name: str
    has_class_token: bool = True
    guides_itself: bool = False
    importance: ImportanceName = "cross_token"
    keys: KeysName = "all_heads"
    keeps_cross_token: bool = field(default=True, kw_only=True)
    single_token_output: bool = field(default=True, kw_only=True)
    corrects_norms: bool = field(default=True, kw_only=True)
    connector: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class Reducer:
    """Base of all methods: the schedule `r`, and the fields that every method has. Subclasses implement `reduce`.

    Args:
        r: tokens to remove per block: an int, one int per block, or a schedule.
        cross_token: append one cross token to the sequence, see `CrossGET`.
        strip_cross_token: remove the cross token from a tower's features that include it in the reference (LLaVA).
        class_token_only: in calls whose result depends on one token of the last block (logits from a class token, say),
            compute that block's attention output and MLP for this token only, and merge nothing in it. The result is
            the same up to rounding, and takes fewer multiply-adds. `Tower.single_token_outputs` lists these calls;
            all others compute all tokens. None: True on towers that list such calls.

    Raises:
        TypeError: `r` is none of an int, a sequence of ints, a schedule.
        ValueError: a field has a value that is not among its choices, or one that has no effect beside the others.
    """

    removes_half: ClassVar[bool] = False
    """Whether `reduce` removes at most half of the unprotected tokens of a block."""

    r: int | Sequence[int] | Schedule = field(kw_only=False)
    cross_token: bool = False
    strip_cross_token: bool = False
    class_token_only: bool | None = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # otherwise @dataclass(repr=True) would replace the inherited one
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        schedule = as_schedule(self.r)
        if not isinstance(self.r, Schedule):  # plain ints of Constant or PerLayer; a tuple is hashable
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
    def proportional_attention(self) -> bool | None:
        """Whether log(size) of each key is added to the attention scores. A field of `Joining`."""
        return True

    @property
    def norm_correction(self) -> bool | None:
        """Whether attention values and MLP outputs are corrected for merging. A field of `Joining`."""
        return False

    @property
    def needs_attention(self) -> bool:
        """Whether `reduce` needs `View.received`."""
        return False

    @property
    def needs_class_attention(self) -> bool:
        """Whether `View.received` must hold the attention of the class token's query alone."""
        return False

    @property
    def needs_tower_attention(self) -> bool:
        """Whether `View.received` must hold the attention of the image tower, behind the connector."""
        return getattr(self, "importance", None) == "tower_attention"

    @property
    def needs_text(self) -> bool:
        """Whether `reduce` needs `View.relevance`."""
        return False

    def resolved(self: Self, tower: TowerFacts) -> Self:
        """A copy of this reducer in which None fields have their values for one tower.

        Fields that have no effect in combination with the others stay None.

        Args:
            tower: the tower that the reducer is attached to.

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
        if isinstance(self.schedule, Keep) and not tower.connector:
            raise ValueError(
                f"{kind}({self.r!r}) on {tower.name}: Keep is for image features behind the connector of a model of "
                'images and text, as in {"connector": ' + f"{kind}({self.r!r})" + "}; for a tower give the number of "
                "tokens that each block removes"
            )
        missing = {name: value for name, value in self.defaults(tower).items() if getattr(self, name) is None}
        resolved = dataclasses.replace(self, **missing)
        resolved.check(tower)
        return resolved

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        """Values for the fields that are None, without those that have no effect in combination with the others."""
        return {"class_token_only": tower.single_token_output}

    def check(self, tower: TowerFacts) -> None:
        """Raise a ValueError if the tower lacks what the method needs. All None fields are filled in before."""

    def reduce(self, view: View, r: int) -> Reduced | None:
        """Remove r' <= r tokens. Called on the result of `resolved`.

        Args:
            view: the block's tokens, and the queries and keys of its attention.
            r: number of tokens to remove, at least 1.

        Returns:
            Tokens [B, T - r', C], sizes [B, T - r'] (None: all are 1) and the plan; None if no token can be removed.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no reduce(): a subclass of Reducer implements reduce(view, r)"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Joining(Reducer):
    """Base of the methods that merge a removed token into a kept one, rather than drop it.

    Args:
        proportional_attention: add log(size) of each key to the attention scores, so that a merged token gets the
            attention of all the tokens it stands for (ToMe, arXiv 2210.09461, section 3). Behind the connector these
            are the scores of the language model. None: True in a tower, False behind the connector.
        norm_correction: multiply the attention values and MLP outputs of a merged token by the norm of the mean
            direction of its members. The LayerNorm before them rescales the (shorter) mean of tokens to full norm, and
            this factor undoes it. See `crossget.methods.merging.norm_correction`. Refused behind the connector and for
            merge units. None: False, and in any other tower with `Ward` True.
    """

    proportional_attention: bool | None = None
    norm_correction: bool | None = None

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        return {
            **super().defaults(tower), "proportional_attention": not tower.connector, "norm_correction": False,
        }  # fmt: skip

    def check(self, tower: TowerFacts) -> None:
        if self.norm_correction and not tower.corrects_norms:
            raise ValueError(
                f"{type(self).__name__}(norm_correction=True) has no effect on {tower.name}: no block is corrected "
                "there; leave norm_correction out"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class Merging(Joining):
    """Merging in three parts, each of which can be exchanged alone: a matching, an importance and an ensemble.

    By default, complete-graph matching chooses sources and destinations, and a destination becomes the size-weighted
    mean of itself and its sources. Below, "None: x" says which value a field has that is None.

    Args:
        matching: how sources and their destinations are chosen, see `crossget.methods.matching`.
        guided_matching: the importance scores take part in the choice of sources. None: False.
        importance: how tokens are scored, see `crossget.methods.importance`. "cross_token": by the query of the cross
            token, or of the end-of-text token; "class_token": by the query of the class token; "attention": by the
            attention received from all queries (behind the connector: from the other features); "class_attention": by
            the attention received from the class token;
            "tower_attention", behind the connector: by the attention that a feature's tokens received in the last
            block but one of the image tower, from the class token or, without one, from all queries on average.
            None: as in the reference on that tower. If this is "cross_token" and there is no such token, it is
            "class_token" or, on a tower without class token, "attention". Refused if neither the choice of sources nor
            the ensemble uses scores.
        ensemble: how a source and its destination become one token, see `crossget.methods.merging`. "guided" and
            "normalized" use scores. None: "size".
        keys: the vectors that tokens are compared by. "all_heads": the attention's keys with all heads concatenated;
            "mean_heads": the mean of the keys over heads; "tokens": `View.tokens`. The query of a guide is always
            compared with keys (those of all heads, if this is "tokens"). None: as in the reference on that tower.
            Refused behind the connector, where features are compared as they are.
        key_stride: only every `key_stride`-th channel of these vectors is used; 2 halves the multiply-adds of the
            comparison. None: 1.
        ties: how equal similarities are ranked, see `crossget.methods.matching.complete_graph`. None: "torch".
        seed: seed of the random matching; refused with any other matching. None: 0.
    """

    removes_half: ClassVar[bool] = True

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

    def _method_defaults(self) -> dict[str, Any]:
        """The method's own values for fields that are None, on every tower."""
        return {"guided_matching": False, "ensemble": "size", "keys": None, "key_stride": 1, "ties": "torch", "seed": 0}

    def _value(self, name: str) -> Any:
        """The value of a field, or the method's own value if it is None."""
        value = getattr(self, name)
        return self._method_defaults()[name] if value is None else value

    @property
    def _guided(self) -> bool:
        """Whether scores take part in the choice of sources."""
        return self.matching != "random" and bool(self._value("guided_matching"))

    @property
    def _scores(self) -> bool:
        """Whether any part of the method uses importance scores."""
        return self._guided or self._value("ensemble") != "size"

    def _without_effect(self) -> dict[str, str]:
        """The fields that have no effect in combination with the others, and why."""
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
        values = {**super().defaults(tower), **self._method_defaults()}
        if self._scores:
            values["importance"] = self.importance or _importance_on(tower, self.cross_token)
        values["keys"] = values["keys"] or tower.keys
        if self.matching == "random":
            values["guided_matching"] = False
            values["keys"] = _heads(values["keys"]) if values.get("importance") in _BY_GUIDE else None
        if tower.connector:
            values["keys"] = None
        kept = {"guided_matching", "keys"}
        return {name: value for name, value in values.items() if name in kept or name not in self._without_effect()}

    @property
    def needs_attention(self) -> bool:
        return self.importance in _BY_ATTENTION

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, tower: TowerFacts) -> None:
        super().check(tower)
        _check_keys(self, tower)
        if self._scores:
            _check_importance(self, tower)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(
                _vectors(self, view),
                view.protected,
                view.n_protected,
                view.valid,
                self._value("ties"),
                self._value("seed"),
                sizes=view.sizes,
                wanted=view.wanted,
                prefix=view.prefix,
            )
            r = candidates.limit(r)
            if r == 0:
                return None
            score = view.score = _score(self, view, candidates) if self._scores else None
            pairs = MATCHINGS[self.matching](candidates, r, score if self._guided else None)
            plan = candidates.plan(*pairs)
        sizes = view.sizes_or_ones()
        merge = ENSEMBLES[self._value("ensemble")]
        tokens, sizes = merge(view.tokens, sizes, sizes if score is None else score, plan)
        return tokens, sizes, plan


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossGET(Merging):
    """Cross-Guided Ensemble of Tokens: complete-graph matching and ensemble, both guided by a cross token.

    The cross token is appended to the sequence. It is a copy of the class token (in text: of the end-of-text token)
    plus a learned vector, one for every block. `CrossGET(r)` computes the same as the reference.

    Args: as for `Merging`, `Joining` and `Reducer`. `guided_matching`: None is True, unless the matching is random.

    Source: CrossGET (ICML 2024, https://arxiv.org/abs/2305.17455).
    """

    cross_token: bool = True
    ensemble: EnsembleName | None = "guided"

    def _method_defaults(self) -> dict[str, Any]:
        return {**super()._method_defaults(), "guided_matching": True, "ensemble": "guided"}


@dataclass(frozen=True, kw_only=True, repr=False)
class ToMe(Merging):
    """Token Merging: bipartite soft matching on keys averaged over heads, size-weighted mean, proportional attention.

    Args: as for `Merging`, `Joining` and `Reducer`. `keys`: None is "mean_heads".

    Source: ToMe (ICLR 2023, https://arxiv.org/abs/2210.09461), section 3.
    """

    matching: MatchingName = "bipartite"

    def _method_defaults(self) -> dict[str, Any]:
        return {**super()._method_defaults(), "keys": "mean_heads"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Ward(Merging):
    """Merging of the pairs that changes tokens least (Ward's criterion), for models that are not trained further.

    The change of a pair is the squared distance of its tokens, weighted by their sizes, see
    `crossget.methods.matching.ward`. A destination becomes the size-weighted mean. There is no cross token, and no
    importance by default. Every token may be merged into every other. Distances are estimated from every second
    channel, which costs 1.5 times as many multiply-adds as the bipartite matching on all channels (`matching="ward",
    key_stride=1`). With `crossget.RampedRatio` fewer tokens are removed in the first blocks, see docs/methods.md.

    With an importance, tokens are weighted by size * exp(importance) in matching and ensemble. "class_attention" gives
    half of the total weight by size and half by the class token's attention, see
    `crossget.methods.importance.by_class_attention`; "tower_attention" likewise.

    Args: as for `Merging`, `Joining` and `Reducer`. None is "tokens" for `keys`, 2 for `key_stride` and "stable" for
        `ties`. If `importance` is given, None is True for `guided_matching` and "normalized" for `ensemble`.

    Source: the criterion is that of `crossget.methods.matching.ward`; the method is this project's own.
    """

    matching: MatchingName = "ward_graph"
    class_token_only: bool | None = None

    def _method_defaults(self) -> dict[str, Any]:
        scored = self.importance is not None
        return {
            **super()._method_defaults(),
            "guided_matching": scored,
            "ensemble": "normalized" if scored else "size",
            "keys": "tokens",
            "key_stride": 2,
            "ties": "stable",
        }

    def defaults(self, tower: TowerFacts) -> dict[str, Any]:
        return {**super().defaults(tower), "norm_correction": tower.corrects_norms}


@dataclass(frozen=True, kw_only=True, repr=False)
class Random(Joining):
    """Random sources are merged into random destinations, by their size-weighted mean. This is a control.

    Args: as for `Joining` and `Reducer`, and
        seed: the choice depends on it, on the index in the batch and on the number of tokens without padding.
    """

    removes_half: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "seed", 0)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(
                view.tokens, view.protected, view.n_protected, view.valid, seed=self.seed, wanted=view.wanted
            )
            r = candidates.limit(r)
            if r == 0:
                return None
            plan = candidates.plan(*MATCHINGS["random"](candidates, r, None))
        sizes = view.sizes_or_ones()
        return *size(view.tokens, sizes, sizes, plan), plan


@dataclass(frozen=True, kw_only=True, repr=False)
class TopK(Reducer):
    """Importance pruning: the `r` least important tokens are dropped. This is a control.

    When tokens are expanded to one per input position, a dropped token is replaced by the mean of the remaining patch
    tokens. So average pooling gives the mean of the remaining ones.

    Args: as for `Reducer`, and
        importance: how tokens are scored, as in `Merging`.
        keys: the keys that a guide's query is compared with, as in `Merging`; refused if `importance` has no guide.
    """

    removes_half: ClassVar[bool] = True

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
        keys = _heads(tower.keys) if importance in _BY_GUIDE and not tower.connector else None
        return {**super().defaults(tower), "importance": importance, "keys": keys}

    @property
    def needs_attention(self) -> bool:
        return self.importance in _BY_ATTENTION

    @property
    def needs_class_attention(self) -> bool:
        return self.importance == "class_attention"

    def check(self, tower: TowerFacts) -> None:
        _check_keys(self, tower)
        _check_importance(self, tower)

    def reduce(self, view: View, r: int) -> Reduced | None:
        with torch.no_grad():
            candidates = Candidates(
                _flat(view.keys, self.keys), view.protected, view.n_protected, view.valid, wanted=view.wanted
            )
            r = candidates.limit(r)
            if r == 0:
                return None
            view.score = _score(self, view, candidates)
            own = None if candidates.padding is None else ~candidates.padding
            order = candidates.argsort(view.score.masked_fill(candidates.protected, torch.inf), own=own)
            plan = candidates.plan(candidates.sources(order, r), None)
        tokens = take(view.tokens, plan.kept)
        return tokens, None if view.sizes is None else view.sizes.gather(1, plan.kept), plan


def _score(reducer: Merging | TopK, view: View, candidates: Candidates) -> Tensor:
    """[B, T] the importance of every token. The vectors of `candidates` are reused if they are the keys needed here."""
    if reducer.importance in _BY_ATTENTION:
        if view.received is None:
            raise RuntimeError(
                f"importance={reducer.importance!r} needs attention probabilities, and the block computed none: use "
                "another importance"
            )
        if reducer.importance == "attention":
            return view.received
        counted = None if view.valid is None else view.valid | view.protected
        return by_class_attention(view.received, view.sizes_or_ones(), counted)
    guide = 0 if reducer.importance == "class_token" else view.guide
    if guide is None:
        raise RuntimeError(
            "importance='cross_token' needs a cross token or an end-of-text token, and the block has neither: use "
            "another importance"
        )
    if isinstance(guide, int):
        query = view.queries[:, :, guide : guide + 1]
    else:
        heads, width = size_of(view.queries, 1), size_of(view.queries, 3)
        query = view.queries.gather(2, guide[:, None, None, None].expand(-1, heads, 1, width))
    if isinstance(reducer, Merging) and (reducer.keys == "tokens" or reducer._value("key_stride") != 1):
        candidates = Candidates(_flat(view.keys, reducer.keys), view.protected, view.n_protected)
    return by_guide(candidates.keys, candidates.inverse_norms, _flat(query, reducer.keys))


def _vectors(reducer: Merging, view: View) -> Tensor:
    """[B, T, C] the vectors that tokens are compared by."""
    keys = view.tokens if reducer.keys == "tokens" else _flat(view.keys, reducer.keys)
    stride = 1 if reducer.matching == "random" else reducer._value("key_stride")
    return keys if stride == 1 else keys[:, :, ::stride]


def _flat(heads: Tensor, keys: KeysName | None) -> Tensor:
    """[B, H, T, D] as one vector per token: [B, T, H * D], or for "mean_heads" the mean over heads [B, T, D]."""
    return heads.mean(1) if keys == "mean_heads" else heads.transpose(1, 2).flatten(2)


def _heads(keys: KeysName) -> HeadsName:
    """The keys that a guide's query is compared with, if tokens are compared by `keys`."""
    return "all_heads" if keys == "tokens" else keys


def _importance_on(tower: TowerFacts, cross_token: bool) -> ImportanceName:
    """The importance of the reference on `tower`.

    Without a cross token, the class token is the guide, as the cross token would be its copy. Without either, it is the
    attention received.
    """
    if tower.importance == "cross_token" and not cross_token and not tower.guides_itself:
        return "class_token" if tower.has_class_token else "attention"
    return tower.importance


def _check_keys(reducer: Merging | TopK, tower: TowerFacts) -> None:
    """Raise a ValueError if the tokens have no keys."""
    if tower.connector and reducer.keys is not None:
        raise ValueError(
            f"{type(reducer).__name__}(keys={reducer.keys!r}) has no effect on {tower.name}: image features are "
            "compared as they are; leave keys out"
        )


def _check_importance(reducer: Merging | TopK, tower: TowerFacts) -> None:
    """Raise a ValueError if the tower lacks what the importance needs."""
    if reducer.importance in ("class_token", "class_attention") and not tower.has_class_token:
        other = "'tower_attention'" if tower.connector else "'attention'"
        raise ValueError(
            f"importance={reducer.importance!r} needs a class token, and {tower.name} has none: use "
            f"importance={other} or, with a cross token, importance='cross_token'"
        )
    if reducer.importance == "tower_attention" and not tower.connector:
        raise ValueError(
            f"importance='tower_attention' is for image features behind the connector, and not for {tower.name}: use "
            "importance='class_attention' or 'attention'"
        )
    if reducer.importance == "cross_token" and not (reducer.cross_token or tower.guides_itself):
        raise ValueError(
            f"importance='cross_token' needs cross_token=True on {tower.name}: use importance='class_token' or "
            "'attention', or use no importance (guided_matching=False, ensemble='size')"
        )


def _check_choices(reducer: Reducer) -> None:
    """Check every field of a boolean or Literal type.

    Raises:
        TypeError: the value of a boolean field is not a boolean.
        ValueError: the value of a Literal field is not among its choices.
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
    """Convert the value of an integer field to a plain int.

    Raises:
        TypeError: the value is not an integer.
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
    """The types of the fields, by name."""
    names = {one.name for one in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in names}
