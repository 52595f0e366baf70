"""Attaching: choice of towers, errors, what the handle says. The contract for each host is in contract.py."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_host import ATTENTIONS, RESIDUALS, TOKENS, Block, Plain, registered
from torch import Tensor, nn

import contract
import crossget
from crossget.core.adapters import Blocks, SingleTokenOutput, TextInput, read
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import planned_tokens

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def load_example() -> dict[str, Any]:
    """The worked example of docs/backbones.md, as printed: its model, what is found in it, and its adapter."""
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    space: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:3]:
        exec(block, space)
    return space


@pytest.fixture
def home() -> Iterator[type[nn.Module]]:
    space = load_example()
    yield space["MyViT"]
    crossget.unregister(space["MyViT"])


def test_the_adapter_of_the_docs_is_short() -> None:
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    adapter = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2]
    assert "crossget.register(MyViT, towers=[tower])" in adapter
    assert len(adapter.splitlines()) <= 12


# A class defined by exec cannot be pickled, attached or not; the plain backbone below is.
@pytest.mark.parametrize(
    "probe",
    [
        pytest.param(probe, marks=[pytest.mark.slow] * (probe is contract.compiles_to_one_graph))
        for probe in contract.PROBES
        if probe is not contract.copies_are_independent
    ],
    ids=contract.name,
)
def test_contract_on_a_home_made_backbone(home: type[nn.Module], probe: Any) -> None:
    probe(contract.Case("home", home, lambda: (IMAGE.clone(),), r=5, fused=False))


plain = pytest.fixture(autouse=True)(registered)


def plain_case(attention: str, compiles: bool = True) -> contract.Case:
    fused, make = attention in ("sdpa", "mha"), lambda: Plain(attention=attention)
    return contract.Case("plain", make, lambda: (TOKENS.clone(),), r=3, compiles=compiles, fused=fused)


@pytest.mark.parametrize("probe", contract.PROBES, ids=contract.name)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_contract_on_a_plain_backbone(attention: str, probe: Any) -> None:
    probe(plain_case(attention, compiles=attention == "sdpa"))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_compiles(attention: str) -> None:
    contract.compiles_to_one_graph(plain_case(attention))


@pytest.mark.parametrize(
    "reducer",
    [crossget.CrossGET(3), crossget.ToMe(3), crossget.CrossGET(3, importance="attention"), crossget.Ward(3)],
)
def test_every_way_to_attend_gives_the_same(reducer: Reducer) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    results = []
    for attention in ATTENTIONS:
        for stage in model.stages:
            stage.attention = attention
            stage.mha.in_proj_weight, stage.mha.in_proj_bias = stage.qkv.weight, stage.qkv.bias
            stage.mha.out_proj.weight, stage.mha.out_proj.bias = stage.proj.weight, stage.proj.bias
        with torch.no_grad(), crossget.attach(model, reducer):
            results.append(model(TOKENS))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "reducer", [crossget.CrossGET(3), crossget.ToMe(3), crossget.CrossGET(3, importance="attention")]
)
def test_causality_as_a_flag_and_as_a_mask_are_the_same(reducer: Reducer) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    tower = crossget.Tower("visual", list(model.stages), 32, prefix=1, class_token=True, causal=True)
    crossget.unregister(Plain)
    crossget.register(Plain)(lambda model: [tower])
    results = []
    for attention in ("is_causal", "causal_mask", "sdpa"):
        for stage in model.stages:
            stage.attention = attention
        with torch.no_grad(), crossget.attach(model, reducer):
            results.append(model(TOKENS))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert (results[2] - results[0]).abs().max() > 1e-3


def test_dropped_tokens_stay_dropped_and_get_the_mean_of_the_survivors() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad(), crossget.attach(model, crossget.TopK((5, 3, 0))) as attached:
        x = TOKENS
        for stage in model.stages:
            x = stage(x)
    source = attached.source["visual"]
    assert ((source < 0).sum(1) == 8).all()
    for row in range(2):
        kept = (source[row] >= 0).nonzero()[:, 0]
        assert source[row, kept].tolist() == list(range(12))  # in order, and nobody's content is somebody else's
        mean = x[row, kept[1:]].mean(0)  # of the patches: the class token is no patch
        torch.testing.assert_close(x[row, source[row] < 0], mean.expand(8, -1))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_way_to_add_gives_the_same(residual: str) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(3)) as attached:
        expected = model(TOKENS)
        for stage in model.stages:
            stage.residual = residual
        assert torch.equal(model(TOKENS), expected)
        assert attached.tokens == {"visual": [21, 18, 15]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"residual": "onto"}, "no residual addition"),
        ({"attention": "none"}, "showed no attention over its tokens"),
        ({"residual": "statement"}, "in place.*old tensor"),
        ({"attention": "own_softmax"}, "no softmax over the attention scores.*proportional_attention=False"),
    ],
)
def test_what_cannot_be_seen_is_an_error(kwargs: dict[str, str], message: str) -> None:
    model = Plain(**kwargs).eval()
    with crossget.attach(model, crossget.CrossGET(3)), pytest.raises(RuntimeError, match=message):
        model(TOKENS)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_merged_token_weighs_as_much_as_its_copies(attention: str) -> None:
    """Proportional attention: a token of size 3 is attended to like three equal tokens."""
    torch.manual_seed(0)
    model = Plain(depth=2, attention=attention).eval()
    copies = torch.cat([TOKENS[:, :1], TOKENS[:, 1:2].expand(-1, 3, -1), TOKENS[:, 2:3]], 1)
    with torch.no_grad():
        dense = model(copies)
        with crossget.attach(model, crossget.ToMe((2, 0), matching="complete_graph")) as attached:
            torch.testing.assert_close(model(copies), dense, rtol=1e-5, atol=1e-5)
            assert attached.source["visual"].tolist() == [[0, 1, 1, 1, 2]] * 2
            attached.reducer = crossget.ToMe((2, 0), matching="complete_graph", proportional_attention=False)
            assert (model(copies) - dense).abs().max() > 1e-3


# Which towers ---------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seeing, self.other = Plain(), Plain(depth=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.seeing(x) + self.other(x)


@pytest.fixture
def pair() -> Iterator[Pair]:
    @crossget.register(Pair)
    def adapter(model: Pair) -> list[crossget.Tower]:
        blocks = {"other": model.other.stages, "visual": model.seeing.stages}
        return [crossget.Tower(name, list(stages), 32, prefix=1, class_token=True) for name, stages in blocks.items()]

    torch.manual_seed(0)
    yield Pair().eval()
    crossget.unregister(Pair)


def test_one_reducer_takes_the_vision_tower(pair: Pair) -> None:
    with crossget.attach(pair, crossget.CrossGET(3)) as attached:
        pair(TOKENS)
        assert attached.tokens == {"visual": [21, 18, 15], "other": [21, 21]}
        assert set(attached.cross_tokens) == {"visual", "other"}
    with crossget.attach(pair, crossget.ToMe(3)) as attached:
        pair(TOKENS)
        assert attached.tokens == {"visual": [20, 17, 14]}  # nothing to do in the other tower
        assert list(attached.parameters()) == []


def test_a_dict_names_the_towers(pair: Pair) -> None:
    with crossget.attach(pair, {"other": crossget.CrossGET([4, 2])}) as attached:
        pair(TOKENS)
        assert attached.tokens == {"other": [21, 17]}
        assert attached.source["other"].shape == (2, 20)


@pytest.mark.parametrize(
    ("reducer", "error", "message"),
    [
        ({"vision": crossget.CrossGET(3)}, ValueError, r"names the towers \['vision'\].*has \['other', 'visual'\]"),
        ({}, ValueError, r"names the towers \[\]"),
        ({"visual": 3}, TypeError, r"reducer\['visual'\] is 3: give.*Ward\(r=16\)"),
        (16, TypeError, r"reducer is 16: give.*Ward\(r=16\)"),
        ({"visual": crossget.CrossGET([1, 2])}, ValueError, "2 layers.*3 blocks"),
        (
            {
                "visual": crossget.CrossGET(3),
                "other": crossget.CrossGET(3, cross_token=False, importance="cross_token"),
            },
            ValueError,
            "cross_token=True",
        ),
    ],
)
def test_bad_input_leaves_nothing_attached(pair: Pair, reducer: Any, error: type[Exception], message: str) -> None:
    before = contract.identity(pair)
    with pytest.raises(error, match=message):
        crossget.attach(pair, reducer)
    assert contract.identity(pair) == before


def test_a_patched_block_is_refused_and_nothing_is_half_attached(pair: Pair) -> None:
    pair.other.stages[1].forward = lambda x: x
    before = contract.identity(pair)
    with pytest.raises(ValueError, match="block 1 of tower 'other'.*instance"):
        crossget.attach(pair, crossget.CrossGET(3))
    assert contract.identity(pair) == before


@pytest.mark.parametrize("attached_first", [False, True], ids=["hooks first", "attached first"])
def test_a_hook_that_keeps_the_forward_it_found(pair: Pair, attached_first: bool) -> None:
    """As accelerate's, which load and move weights: a forward on the instance, and the one that was there before."""
    with crossget.attach(pair, crossget.CrossGET(3)):
        expected = contract.run(pair, (TOKENS,))
    dense, calls = contract.run(pair, (TOKENS,)), []

    def add_hook(block: Any) -> None:
        block._old_forward = block.forward
        block.forward = lambda *args, **kwargs: calls.append(block) or block._old_forward(*args, **kwargs)

    blocks = [*pair.seeing.stages, *pair.other.stages]
    handle = crossget.attach(pair, crossget.CrossGET(3)) if attached_first else None
    for block in blocks:
        add_hook(block)
    handle = handle or crossget.attach(pair, crossget.CrossGET(3))
    assert contract.all_equal(contract.run(pair, (TOKENS,)), expected)
    assert calls == blocks
    handle.detach()
    assert contract.all_equal(contract.run(pair, (TOKENS,)), dense)
    assert calls == 2 * blocks


def test_cross_tokens_beside_quantised_weights(pair: Pair) -> None:
    """Their first parameter may be one of integers."""
    for block in pair.seeing.stages:
        codes = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        block._parameters = {"codes": codes, **block._parameters}
    with crossget.attach(pair, crossget.CrossGET(3)) as attached:
        assert attached.cross_tokens["visual"].dtype == torch.float32
        pair(TOKENS)


def test_attaching_a_part_of_an_attached_model_is_refused(pair: Pair) -> None:
    with crossget.attach(pair, crossget.CrossGET(3)), pytest.raises(ValueError, match="already attached"):
        crossget.attach(pair.seeing, crossget.CrossGET(3))
    with crossget.attach(pair.seeing, crossget.CrossGET(3)), pytest.raises(ValueError, match="already attached"):
        crossget.attach(pair, crossget.CrossGET(3))


# The registry ---------------------------------------------------------------------------------------------------------


def test_unknown_backbone() -> None:
    with pytest.raises(TypeError, match=r"modules.linear.Linear.*crossget.register"):
        crossget.attach(nn.Linear(2, 2), crossget.CrossGET(3))


def test_a_backbone_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Plain has the adapter .*adapter already"):
        crossget.register(Plain)
    with pytest.raises(TypeError, match="classes of nn.Module"):
        crossget.register(Plain(), crossget)  # type: ignore[arg-type]


def test_a_subclass_is_found_along_the_mro() -> None:
    class Child(Plain):
        pass

    assert [tower.name for tower in crossget.find_towers(Child())] == ["visual"]


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ([], "no tower"),
        ([crossget.Tower("visual", [], 32)], "no block in tower 'visual'"),
        ([crossget.Tower("a", [nn.Identity()], 1)] * 2, r"\['a', 'a'\].*name of its own"),
        ([crossget.Tower("a", ["block"], 1)], r"lists \['str'\] among its blocks"),  # type: ignore[list-item]
    ],
)
def test_an_adapter_that_finds_nothing_is_an_error(towers: list[crossget.Tower], message: str) -> None:
    class Empty(nn.Module):
        pass

    crossget.register(Empty)(lambda model: towers)
    with pytest.raises(RuntimeError, match=message):
        crossget.attach(Empty(), crossget.CrossGET(1))
    crossget.unregister(Empty)


# The handle -----------------------------------------------------------------------------------------------------------


def test_the_reducer_can_be_exchanged_in_place(pair: Pair) -> None:
    with torch.no_grad(), crossget.attach(pair, crossget.CrossGET(3)) as attached:
        vectors = attached.cross_tokens["visual"]
        attached.reducer = crossget.CrossGET(5)
        pair(TOKENS)
        assert attached.tokens["visual"] == [21, 16, 11]
        assert attached.cross_tokens["visual"] is vectors
        attached.reducer = {"visual": crossget.ToMe(2)}
        pair(TOKENS)
        assert attached.tokens["visual"] == [20, 18, 16]
        assert attached.tokens["other"] == [21, 21]
        before = attached.reducers
        with pytest.raises(ValueError, match="lists 1 layers"):
            attached.reducer = {"other": crossget.CrossGET(1), "visual": crossget.CrossGET([1])}
        assert attached.reducers == before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistaken(Reducer):
    """A user's method with a mistake in it."""

    def reduce(self, view: Any, r: int) -> Any:
        return len(r)  # type: ignore[arg-type]


def test_a_mistake_in_a_method_is_told_as_it_is(pair: Pair) -> None:
    # It runs below the block's `x + attention`, of which torch would say that tensors cannot be added.
    with (
        crossget.attach(pair, Mistaken(1)),
        pytest.raises(RuntimeError, match=r"Mistaken.reduce\(\).*'int' has no len"),
    ):
        pair(TOKENS)


def test_paused_is_the_dense_model(pair: Pair) -> None:
    with torch.no_grad():
        dense = pair(TOKENS)
        with crossget.attach(pair, crossget.CrossGET(3)) as attached:
            reduced = pair(TOKENS)
            with attached.paused():
                assert torch.equal(pair(TOKENS), dense)
            assert torch.equal(pair(TOKENS), reduced)
            assert crossget.attachment(pair) is attached
    with pytest.raises(ValueError, match="Pair .*crossget.attach"):
        crossget.attachment(pair)


def test_detach_refuses_when_a_class_was_changed_since(pair: Pair) -> None:
    attached = crossget.attach(pair, crossget.CrossGET(3))
    block = pair.seeing.stages[0]
    watched = type(block)
    block.__class__ = type("Wrapped", (watched,), {})
    with torch.no_grad():
        pair(TOKENS)  # a further subclass still runs
    with pytest.raises(RuntimeError, match="a block's class is Wrapped now.*then detach"):
        attached.detach()
    block.__class__ = watched
    attached.detach()


def test_a_block_that_is_called_out_of_order_is_an_error() -> None:
    model = Plain().eval()
    with (
        crossget.attach(model, crossget.CrossGET(3)),
        pytest.raises(RuntimeError, match=r"block 1 of tower 'visual' got tokens \[2, 20, 32\]"),
    ):
        model.stages[1](TOKENS)


def test_alignment_loss_says_what_is_missing(pair: Pair) -> None:
    with crossget.attach(pair, crossget.CrossGET(3)) as attached:
        pair(TOKENS)
        with pytest.raises(RuntimeError, match="two towers with cross tokens.*found 0"):
            attached.alignment_loss()


def test_cross_tokens_learn(pair: Pair) -> None:
    with crossget.attach(pair, crossget.CrossGET(3)) as attached:
        vectors = attached.cross_tokens["visual"]
        assert vectors.shape == (3, 32)
        assert not vectors.any()
        pair(TOKENS).square().sum().backward()
        assert vectors.grad is not None
        assert (vectors.grad[:2].abs().sum(1) > 0).all()


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random, crossget.TopK])
@pytest.mark.parametrize(
    "r", [0, 1, 3, 100, (5, 0, 2), crossget.Linear(6, 0), crossget.Ratio(0.2), crossget.Ratio(0.5)], ids=str
)
def test_every_method_follows_every_schedule(method: type[Reducer], r: Any) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    reducer = method(r)
    with torch.no_grad(), crossget.attach(model, reducer) as attached:
        assert torch.isfinite(model(TOKENS)).all()
        cross = int(bool(attached.reducers["visual"].cross_token))
        plan = planned_tokens(reducer.schedule, 3, 20 + cross, 1 + cross)
        assert attached.tokens["visual"] == plan[:3]


def test_every_part_can_be_exchanged_alone() -> None:
    """One forward for each value of each field, all different from the default's but where they must not be."""
    torch.manual_seed(0)
    model = Plain().eval()
    base = crossget.CrossGET(3)
    changes = [
        {"matching": "bipartite"}, {"matching": "random"}, {"guided_matching": False}, {"importance": "attention"},
        {"importance": "class_token"}, {"ensemble": "size"}, {"ensemble": "normalized"}, {"keys": "mean_heads"},
        {"cross_token": False, "importance": "attention"}, {"proportional_attention": False},
    ]  # fmt: skip
    outputs = []
    with torch.no_grad(), crossget.attach(model, base) as attached:
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.normal_()
        for change in [{}, *changes]:
            attached.reducer = dataclasses.replace(base, **change)
            outputs.append(model(TOKENS))
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert not torch.allclose(a, b, atol=1e-6)


class Keeping(Plain):
    """A host that keeps what each of its blocks returned, as older versions of transformers do, and a copy of it."""

    def forward(self, x: Tensor) -> Any:
        kept, copies = [], []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
            copies.append(x.clone())
        return kept, copies


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_a_host_keeps_of_its_blocks_does_not_change_afterwards(residual: str, r: int, inference: Any) -> None:
    model = Keeping(residual=residual).eval()
    with inference(), crossget.attach(model, crossget.CrossGET(r=r)) as attached:
        attached.cross_tokens["visual"].normal_()
        kept, copies = model(TOKENS.clone())
        assert all(torch.equal(state, copy) for state, copy in zip(kept, copies, strict=True))
        assert [state.shape for state in kept] == [TOKENS.shape] * len(kept)


def test_more_tokens_asked_for_than_there_are_is_a_warning_once() -> None:
    model = Plain().eval()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(9)) as attached:
        with pytest.warns(UserWarning, match="tower 'visual'.* 18 .* 14 of 20.*block 1 on"):
            model(TOKENS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(TOKENS)
            attached.reducer = crossget.ToMe(crossget.Ratio(0.5))  # a share is of what there is
            model(TOKENS)


def test_the_handle_says_what_it_has_and_takes_nothing_else() -> None:
    model = Plain().eval()
    attached = crossget.attach(model, crossget.ToMe(3))
    assert repr(attached).startswith("Attachment(visual: 3 blocks (Block), prefix 1, class token: ToMe(3")
    for what in ("tokens", "source", "records"):
        with pytest.raises(RuntimeError, match="forward"):
            getattr(attached, what)
    with pytest.raises(AttributeError, match=r"'r'.*replace\(attached\.reducer, r=8\)"):
        attached.r = 20
    attached.detach()
    dense = contract.run(model, (TOKENS,))
    with attached:  # entered again, it attaches again
        reduced = contract.run(model, (TOKENS,))
        assert not contract.all_equal(reduced, dense)
        with attached.paused():
            with attached.paused():
                assert contract.all_equal(contract.run(model, (TOKENS,)), dense)
            assert contract.all_equal(contract.run(model, (TOKENS,)), dense)
        assert contract.all_equal(contract.run(model, (TOKENS,)), reduced)
    assert not attached.is_attached
    with pytest.raises(RuntimeError, match="already detached"):
        attached.paused().__enter__()


def test_a_list_of_blocks_that_is_cut_or_replaced() -> None:
    """Who is first and last is asked in the forward."""

    class Live(Plain):
        pass

    @crossget.register(Live)
    def live(model: Live) -> list[crossget.Tower]:
        return [crossget.Tower("visual", Blocks("stages", model), 32, prefix=1, class_token=True)]

    torch.manual_seed(0)
    model = Live(depth=4).eval()
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(3)) as attached:
        whole = model.stages
        for kept in (slice(0, 3), slice(1, 4), slice(2, 3)):
            model.stages = whole[kept]
            out = model.stages[0](TOKENS)
            for stage in model.stages[1:]:
                out = stage(out)
            assert out.shape == TOKENS.shape
            assert attached.tokens["visual"] == [21, 18, 15][: len(model.stages)]
        model.stages = nn.ModuleList([*whole[:2], Block()])
        with pytest.raises(RuntimeError, match=r"\[2\] of tower 'visual'.*crossget.attach"):
            model(TOKENS)
        model.stages = whole
        model(TOKENS)
    crossget.unregister(Live)


class Sized(Plain):
    """A host whose models differ in what a declaration reads."""

    def __init__(self, depth: int, front: int) -> None:
        super().__init__(depth=depth)
        self.settings = SimpleNamespace(width=32, front=front)


def _first_norm(model: Sized) -> Any:
    return partial(torch.mul, model.get_parameter("stages.0.norm.weight"))


def test_a_declaration_reads_what_differs_between_models() -> None:
    tower = crossget.Tower(
        "visual",
        Blocks("stages"),
        read("settings.width"),
        prefix=read("settings.front", add=1),
        project=read(_first_norm),
    )
    assert repr(tower) == (
        "Tower('visual', blocks=Blocks('stages'), width=read('settings.width'), prefix=read('settings.front', add=1), "
        "project=read(_first_norm))"
    )
    crossget.register(Sized, towers=[tower])
    try:
        for depth, front in ((3, 0), (4, 2)):
            model = Sized(depth, front).eval()
            (found,) = crossget.find_towers(model)
            assert (found.width, found.prefix, len(found.blocks)) == (32, 1 + front, depth)
            assert isinstance(found.project, partial)
            assert found.project.args[0] is model.get_parameter("stages.0.norm.weight")
            with torch.no_grad(), crossget.attach(model, crossget.ToMe(3)) as attached:
                model(TOKENS)
            assert attached.tokens["visual"] == [len(TOKENS[0]) - 3 * n for n in range(depth)]
    finally:
        crossget.unregister(Sized)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text": TextInput(nn.Embedding(3, 4), len)}, "text"),
        ({"project": nn.Linear(2, 3)}, "project"),
        ({"embed": nn.Linear(2, 3).forward}, "embed"),
        ({"embed": partial(len, [(nn.Linear(2, 3), "weight")])}, "embed"),
        ({"single_token_outputs": [SingleTokenOutput(nn.Linear(2, 3), bool)], "decoder": nn.Identity()},
         "single_token_outputs, decoder"),
    ],
)  # fmt: skip
def test_a_declaration_holds_no_module_of_one_model(fields: dict[str, Any], named: str) -> None:
    tower = crossget.Tower("visual", Blocks("stages"), 32, **fields)
    with pytest.raises(TypeError, match=rf"tower 'visual' holds modules of one model in {named}: .*read\(function\)"):
        crossget.register(Sized, towers=[tower])
    with pytest.raises(KeyError):
        crossget.unregister(Sized)


def test_a_forward_has_one_reducer() -> None:
    """Another one that is set while a forward runs is for the next."""
    model = Plain().eval()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(3)) as attached:
        expected = contract.run(model, (TOKENS,))

        def change(*_: Any) -> None:
            attached.reducer = crossget.ToMe(5)

        hook = model.stages[1].register_forward_pre_hook(change)
        assert contract.all_equal(contract.run(model, (TOKENS,)), expected)
        assert attached.tokens["visual"] == [20, 17, 14]
        hook.remove()
        model(TOKENS)
        assert attached.tokens["visual"] == [20, 15, 10]
