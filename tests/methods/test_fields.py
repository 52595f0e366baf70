"""Every field of every method takes effect or is refused; and how fields are given, printed and resolved."""

from __future__ import annotations

import dataclasses
import fractions
import functools
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import crossget
from crossget.methods import reducers
from crossget.methods.reducers import Joining, Merging, Reducer, TowerFacts, View

timm = pytest.importorskip("timm")
numpy = pytest.importorskip("numpy")

TOWER = TowerFacts("tower 'visual'")


def subclasses(base: type[Reducer]) -> Iterator[type[Reducer]]:
    for cls in base.__subclasses__():
        if cls.__module__ == reducers.__name__:
            yield cls
        yield from subclasses(cls)


METHODS = [cls for cls in subclasses(Reducer) if cls.reduce is not Reducer.reduce]
SETTINGS: list[Reducer] = [
    *(cls(3) for cls in METHODS),
    crossget.CrossGET(3, cross_token=False),
    crossget.CrossGET(3, importance="attention"),
    crossget.CrossGET(3, guided_matching=False, ensemble="size"),
    crossget.CrossGET(3, keys="tokens"),
    crossget.CrossGET(3, key_stride=2),
    crossget.CrossGET(3, matching="random"),
    crossget.CrossGET(3, matching="random", importance="attention"),
    crossget.CrossGET(3, matching="random", ensemble="size"),
    crossget.Ward(3, importance="class_attention"),
    crossget.TopK(3, importance="attention"),
]
# Values of the fields whose type does not list them. A new field of such a type needs an entry here.
VALUES: dict[str, list[Any]] = {
    "r": [0, 2, 3, (4, 2, 1), crossget.Ratio(0.2), crossget.Linear(4, 0)],
    "key_stride": [1, 2, 3],
    "seed": [0, 1, 2**31 - 1],
}


def legal_values(cls: type[Reducer], name: str) -> list[Any]:
    hint = get_type_hints(cls)[name]
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    if parts == [bool]:
        return [False, True]
    choices = [choice for part in parts for choice in (get_args(part) or (part,))]
    return choices if all(isinstance(choice, str) for choice in choices) else VALUES[name]


def models() -> list[Any]:
    """A ViT with noise on all of its parameters; and one whose keys are all the same, so that everything ties."""
    built = []
    for same_keys in (False, True):
        torch.manual_seed(0)
        model = timm.models.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for block in model.blocks if same_keys else ():
                block.attn.qkv.weight[32:64].zero_()  # the rows of the keys
                block.attn.qkv.bias[32:64] = torch.randn(32).sign()  # products of these are exact on every processor
        built.append(model)
    return built


MODELS = models()
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def argsort(values: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    """As torch's, with ties in the order opposite to that of a stable one."""
    order = values.flip(dim).sort(dim=dim, descending=descending, stable=True).indices
    return values.shape[dim] - 1 - order


def observed(model: Any, reducer: Reducer) -> list[Any]:
    """What a reducer can change: outputs, the groups of tokens, and for how many tokens the last MLP runs."""
    seen: list[Any] = []
    hook = model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        with torch.no_grad(), crossget.attach(model, reducer) as attached, mock.patch("torch.argsort", argsort):
            chance = torch.Generator().manual_seed(0)
            for parameter in attached.parameters():
                nn.init.normal_(parameter, std=0.5, generator=chance)
            seen += [model(IMAGES), attached.source["visual"], model.forward_features(IMAGES)]
    finally:
        hook.remove()
    return seen


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@functools.cache
def outcome(setting: Reducer) -> tuple[Reducer, list[list[Any]]]:
    """How the fields of a setting are resolved, and what it gives on every model."""
    with crossget.attach(MODELS[0], setting) as attached:
        resolved = attached.reducers["visual"]
    return resolved, [observed(model, setting) for model in MODELS]


CASES = [
    pytest.param(setting, field.name, id=f"{setting}-{field.name}")
    for setting in SETTINGS
    for field in dataclasses.fields(setting)
]


@pytest.mark.parametrize(("setting", "name"), CASES)
def test_every_field_takes_effect_or_is_refused(setting: Reducer, name: str) -> None:
    resolved, before = outcome(setting)
    others = [value for value in legal_values(type(setting), name) if value != getattr(resolved, name)]
    assert others
    for value in others:
        try:
            changed = dataclasses.replace(setting, **{name: value})
            with crossget.attach(MODELS[0], changed):
                pass
        except (TypeError, ValueError) as error:
            if name in str(error):
                continue
            raise
        assert not all(same(observed(model, changed), given) for model, given in zip(MODELS, before, strict=True)), (
            f"{changed} gives what {setting} gives"
        )


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_what_is_resolved_is_what_is_computed(setting: Reducer) -> None:
    resolved, given = outcome(setting)
    assert same(observed(MODELS[0], resolved), given[0])


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (crossget.ToMe, {"importance": "attention"}, "importance='attention'.* has no effect.*guided_matching=False"),
        (crossget.ToMe, {"seed": 1}, "seed=1.* has no effect.*bipartite"),
        (crossget.ToMe, {"strip_cross_token": True}, "strip_cross_token=True.* no effect.*cross_token=False"),
        (crossget.CrossGET, {"matching": "random", "ties": "stable"}, "ties='stable'.* no effect.*random"),
        (crossget.CrossGET, {"matching": "random", "key_stride": 2}, "key_stride=2.* no effect.*random"),
        (
            crossget.CrossGET,
            {"matching": "random", "guided_matching": True},
            "guided_matching=True.* no effect.*random",
        ),
        (crossget.CrossGET, {"matching": "random", "keys": "tokens"}, "keys='tokens'.* no effect.*random"),
        (
            crossget.Ward,
            {"importance": "class_token", "guided_matching": False, "ensemble": "size"},
            "importance='class_token'",
        ),
        (crossget.TopK, {"importance": "attention", "keys": "mean_heads"}, "keys='mean_heads'.* no effect.*attention"),
        (crossget.ToMe, {"key_stride": 0}, "key_stride=0.*from 1"),
        (crossget.Random, {"seed": -1}, "seed=-1.*from 0"),
    ],
)
def test_what_has_no_effect_is_refused_when_it_is_made(method: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(8, **fields)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (crossget.TopK, {"norm_correction": True}),
        (crossget.TopK, {"proportional_attention": False}),
        (crossget.Random, {"matching": "bipartite"}),
        (crossget.Random, {"keys": "tokens"}),
        (crossget.Random, {"seed": 0.5}),
        (crossget.ToMe, {"norm_correction": 1}),
        (crossget.ToMe, {"key_stride": True}),
    ],
)
def test_fields_that_a_method_does_not_have_and_values_of_another_type(method: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(fields))):
        method(8, **fields)


@pytest.mark.parametrize(
    ("reducer", "tower", "message"),
    [
        (
            crossget.CrossGET(1, strip_cross_token=True),
            TowerFacts("tower 'visual'", keeps_cross_token=False),
            "strip_cross_token=True.* has no effect on tower 'visual'",
        ),
        (
            crossget.ToMe(1, class_token_only=True),
            TowerFacts("tower 'visual'", single_token_output=False),
            "class_token_only=True.* has no effect on tower 'visual'",
        ),
        (
            crossget.CrossGET(1, matching="random", keys="mean_heads"),
            TowerFacts("tower 'visual'", importance="attention"),
            "keys='mean_heads'.* has no effect",
        ),
        (
            crossget.TopK(1, importance=None, keys="mean_heads"),
            TowerFacts("tower 'visual'", importance="attention"),
            "keys='mean_heads'.* has no effect",
        ),
    ],
)
def test_what_has_no_effect_on_a_tower_is_refused_there(reducer: Reducer, tower: TowerFacts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reducer.resolved(tower)


def test_parts_of_a_method_can_be_exchanged_alone() -> None:
    plain = dataclasses.replace(crossget.CrossGET(16), guided_matching=False, ensemble="size").resolved(TOWER)
    assert (plain.importance, plain.needs_attention) == (None, False)
    chance = dataclasses.replace(crossget.CrossGET(16), matching="random").resolved(TOWER)
    assert (chance.guided_matching, chance.ensemble, chance.importance, chance.seed) == (
        False, "guided", "cross_token", 0,
    )  # fmt: skip
    ward = dataclasses.replace(crossget.Ward(8), ensemble="guided").resolved(TOWER)
    assert (ward.guided_matching, ward.ensemble, ward.importance) == (False, "guided", "class_token")
    ward = crossget.Ward(8, importance="attention").resolved(TOWER)
    assert (ward.guided_matching, ward.ensemble, ward.importance) == (True, "normalized", "attention")
    assert dataclasses.replace(crossget.ToMe(8), matching="random").resolved(TOWER).keys is None
    assert not crossget.Ward(8).resolved(dataclasses.replace(TOWER, single_token_output=False)).class_token_only


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_resolving_again_changes_nothing(setting: Reducer) -> None:
    resolved = setting.resolved(TOWER)
    assert resolved.resolved(TOWER) == resolved


# Numbers --------------------------------------------------------------------------------------------------------------


class Index:
    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize(
    "seven", [numpy.int64(7), numpy.uint8(7), torch.tensor(7), Index()], ids=lambda value: type(value).__name__
)
def test_what_python_takes_for_an_index_is_an_int(seven: Any) -> None:
    for reducer in (
        crossget.CrossGET(seven),
        crossget.ToMe([seven, numpy.int32(2), 0]),
        crossget.ToMe(7, key_stride=seven),
        crossget.Random(7, seed=seven),
        crossget.Ward(crossget.Linear(seven, numpy.int64(0))),
    ):
        assert type(eval(repr(reducer), vars(crossget))) is type(reducer)  # prints as plain ints
        assert hash(reducer) == hash(eval(repr(reducer), vars(crossget)))
    assert type(crossget.CrossGET(seven).r) is int


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (0.5, r"r is 0\.5.*crossget\.Ratio\(0\.5\)"),
        (numpy.float64(0.25), r"crossget\.Ratio\(0\.25\)"),
        (fractions.Fraction(1, 4), r"crossget\.Ratio\(0\.25\)"),
        (16.0, r"r is 16\.0.*write 16"),
        ([4, 3.0], r"r\[1\] is 3\.0.*write 3"),
        (1.5, "r is 1.5.*int"),
        (True, "r is True.*int"),
        (numpy.bool_(True), "r is .*True.*int"),
        (torch.tensor(True), "r is .*True.*int"),
        ([2, False], r"r\[1\] is False.*int"),
        ("16", "r is '16'.*int"),
    ],
)
def test_what_is_no_int_is_refused_with_the_way_out(r: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        crossget.CrossGET(r)


@pytest.mark.parametrize("share", [True, "0.1", None])
def test_a_share_is_a_number(share: Any) -> None:
    with pytest.raises(TypeError, match="share is .*between 0 and 0.5"):
        crossget.Ratio(share)
    assert type(crossget.Ratio(numpy.float32(0.5)).share) is float


# Printing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "text"),
    [
        (crossget.Ward(16), "Ward(16)"),
        (crossget.CrossGET(16, ensemble="size"), "CrossGET(16, ensemble='size')"),
        (crossget.ToMe([3, 2], norm_correction=True), "ToMe((3, 2), norm_correction=True)"),
        (crossget.TopK(crossget.Ratio(0.25)), "TopK(Ratio(share=0.25))"),
        (crossget.Random(4, seed=0), "Random(4)"),
    ],
)
def test_a_reducer_prints_what_differs_from_the_defaults(reducer: Reducer, text: str) -> None:
    assert repr(reducer) == text


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_what_is_printed_is_python(setting: Reducer) -> None:
    names = {**vars(crossget), "Merging": Merging}
    for reducer in (setting, setting.resolved(TOWER)):
        assert eval(repr(reducer), names) == reducer


# Methods of a user's own ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearby(Joining):
    """Every second token joins the one before it."""

    step: int = 2

    def reduce(self, view: View, r: int) -> Any:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(crossget.ToMe):
    ensemble: Any = "normalized"
    keys: Any = "all_heads"


def test_a_method_of_one_s_own_prints_and_resolves_like_the_others() -> None:
    assert repr(Nearby(3, step=4, norm_correction=True)) == "Nearby(3, norm_correction=True, step=4)"
    assert repr(Own(3)) == "Own(3)"
    resolved = Own(3).resolved(TOWER)
    assert (resolved.matching, resolved.importance, resolved.keys) == ("bipartite", "class_token", "all_heads")
    with pytest.raises(ValueError, match="seed=3.* has no effect"):
        Own(3, seed=3)
    assert Nearby(3).resolved(TOWER) == Nearby(3, proportional_attention=True, norm_correction=False)
