"""Towers of models that nobody registered: what is found, that it is exact, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import unregistered_models as models
from torch import Tensor, nn

import crossget
from contract import all_equal, identity, leaves, without_fast_path
from crossget.core import layout, tables
from crossget.core.adapters import is_registered
from crossget.core.attachment import attach_towers
from crossget.methods.reducers import Reducer

# That an attachment rests on a discovery is said in a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no adapter:UserWarning")

METHODS = [crossget.Ward(2), crossget.ToMe(2), crossget.CrossGET(2)]
PLAIN = models.KINDS["plain"]

found_kind = pytest.mark.parametrize("kind", models.FOUND.values(), ids=models.FOUND)
refused_kind = pytest.mark.parametrize("kind", models.REFUSED.values(), ids=models.REFUSED)
each_method = pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=pytest.mark.slow if isinstance(one, crossget.ToMe) else ()) for one in METHODS],
    ids=lambda method: type(method).__name__,
)


def main_towers(kind: models.Kind) -> list[models.Expected]:
    """The towers that a single reducer is for: those of images. A model without any has one tower."""
    visual = [tower for tower in kind.towers if tower.name.startswith("visual")]
    return visual or [kind.towers[0]]


def reducers(kind: models.Kind, reducer: Reducer) -> Reducer | dict[str, Reducer]:
    """The reducer. Texts and sound are reduced only if their tower is named."""
    name = main_towers(kind)[0].name
    return reducer if name.startswith("visual") else {name: reducer}


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return leaves(models.call(model, inputs))


def describe(model: nn.Module) -> Any:
    backward_hooks = [len(module._backward_hooks) + len(module._backward_pre_hooks) for module in model.modules()]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    return identity(model), backward_hooks, [module.training for module in model.modules()], gradients


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if, at the end, the model, torch's settings or the random numbers that follow are not as before."""
    before, values = describe(model), copy.deepcopy(model.state_dict())
    random, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    with_gradients = torch.is_grad_enabled()
    yield
    assert describe(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled() == with_gradients
    assert not is_registered(type(model))


@found_kind
def test_every_parameter_of_a_model_matters(kind: models.Kind) -> None:
    """Of the material: what has no influence would prove nothing."""
    model, inputs = models.build(kind)
    out = leaves(models.call(model, inputs))
    sum((x * torch.randn_like(x)).sum() for x in out).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


class TestFound:
    @found_kind
    def test_towers(self, kind: models.Kind) -> None:
        model, inputs = models.build(kind)
        with untouched(model):
            towers = crossget.find_towers(model, inputs=inputs)
        assert isinstance(towers, list)
        by_name = {tower.name: tower for tower in towers}
        assert len(by_name) == len(towers)
        for expected in kind.towers:
            tower = by_name.pop(expected.name)
            assert tower.depth == expected.blocks
            assert tower.width == expected.width
            assert tower.prefix == expected.prefix
            assert tower.class_token == expected.class_token
            assert tower.causal == expected.causal
            assert tuple(tower.fixed) == expected.fixed
        paths = {module: path for path, module in model.named_modules()}
        for other in by_name.values():
            assert all(paths[block].startswith(kind.others) for block in other.blocks), other.name

    @found_kind
    @pytest.mark.slow
    def test_zero_is_the_dense_model(self, kind: models.Kind) -> None:
        model, inputs = models.build(kind)
        with without_fast_path():
            dense = run(model, inputs)
            with crossget.attach(model, reducers(kind, crossget.ToMe(0)), inputs=inputs):
                assert all_equal(run(model, inputs), dense)

    @found_kind
    @each_method
    def test_attached_and_detached(self, kind: models.Kind, method: Reducer) -> None:
        model, inputs = models.build(kind)
        dense = run(model, inputs)
        with untouched(model), crossget.attach(model, reducers(kind, method), inputs=inputs) as attached:
            out, tokens = run(model, inputs), attached.tokens
        for tower in main_towers(kind):
            first = tower.tokens + bool(method.cross_token)
            assert tokens.pop(tower.name) == [first - 2 * layer for layer in range(tower.blocks)]
        # A single reducer is for images. What other towers get with it is a cross token.
        assert all(method.cross_token and len(set(others)) == 1 for others in tokens.values())
        assert [x.shape for x in out] == [x.shape for x in dense]
        assert all(x.isfinite().all() for x in out)
        assert not all_equal(out, dense)
        assert all_equal(run(model, inputs), dense)

    @found_kind
    def test_declarations_need_no_forward(self, kind: models.Kind, forwards: Callable[[nn.Module], list[None]]) -> None:
        model, inputs = models.build(kind)
        reducer = reducers(kind, crossget.ToMe(2))
        towers = crossget.find_towers(model, inputs=inputs)
        crossget.register(type(model), towers=towers)
        try:
            with crossget.attach(model, reducer) as attached:
                expected, tokens = run(model, inputs), attached.tokens
        finally:
            crossget.unregister(type(model))
        second, _ = models.build(kind)
        count = forwards(second)
        printed = eval(repr(list(towers)), {**vars(layout), **vars(tables), **vars(crossget)})
        assert repr(printed) == repr(list(towers))
        crossget.register(type(model), towers=printed)
        try:
            with crossget.attach(second, reducer) as attached:
                assert not count
                assert all_equal(run(second, inputs), expected)
                assert attached.tokens == tokens
                assert count
        finally:
            crossget.unregister(type(model))
        with pytest.raises(TypeError, match="inputs="):
            crossget.attach(second, reducer)


@pytest.fixture
def forwards() -> Callable[[nn.Module], list[None]]:
    """Counts the calls of any module of a model: the list grows with each."""

    def count(model: nn.Module) -> list[None]:
        calls: list[None] = []
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: calls.append(None))
        return calls

    return count


class TestDetails:
    @each_method
    def test_equals_an_adapter_written_by_hand(self, method: Reducer) -> None:
        model, inputs = models.build(PLAIN)
        with crossget.attach(model, method, inputs=inputs):
            found = run(model, inputs)

        @crossget.register(models.Vit)
        def adapter(model: models.Vit) -> list[crossget.Tower]:
            return [crossget.Tower("visual", list(model.blocks), models.WIDTH, prefix=1, class_token=True)]

        try:
            with crossget.attach(model, method):
                assert all_equal(run(model, inputs), found)
        finally:
            crossget.unregister(models.Vit)

    @pytest.mark.parametrize("name", ["plain", "registers", "rotary [N, D]", "pairs", "CLIP's images [T, B, C]"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_another_batch_than_the_one_watched(self, name: str, batch: int) -> None:
        kind = models.KINDS[name]
        model, inputs = models.build(kind)
        with crossget.attach(model, crossget.Ward(2), inputs=inputs) as attached:
            assert run(model, inputs[[0, 1, 0][:batch]])[0].shape[0] == batch
            first = main_towers(kind)[0].tokens
            assert attached.tokens == {"visual": [first, first - 2, first - 4, first - 6]}

    @pytest.mark.parametrize("attention", [models.EinsumAttention, models.EinsumTalkingHeads])
    def test_as_many_tokens_as_heads(self, attention: Callable[[], nn.Module]) -> None:
        """The axes of an einsum are told by its letters. Their sizes would not tell the heads from the tokens."""
        tower = crossget.Tower("visual", [models.Block(attention)], width=models.WIDTH)
        method = crossget.ToMe(1, norm_correction=True)
        with torch.no_grad(), attach_towers([tower], {"visual": method}) as attached:
            tower.blocks[0](models.random(2, models.HEADS, models.WIDTH))
            assert attached.tokens == {"visual": [models.HEADS]}

    def test_fixed_tokens_are_in_no_group(self) -> None:
        model, inputs = models.build(models.KINDS["detection tokens"])
        with crossget.attach(model, crossget.Ward(8), inputs=inputs) as attached:
            run(model, inputs)
            source = attached.source["visual"]
        for row in source.tolist():
            assert all(row.count(row[position]) == 1 for position in (0, -5, -4, -3, -2, -1))
            assert len(set(row)) == models.PATCHES + 6 - 4 * 8

    def test_one_stage_of_a_pyramid_by_name(self) -> None:
        model, inputs = models.build(models.KINDS["pyramid"])
        with crossget.attach(model, {"visual.1": crossget.Ward(2)}, inputs=inputs) as attached:
            run(model, inputs)
            assert attached.tokens == {"visual.1": [17, 15]}

    def test_both_towers_by_name(self) -> None:
        kind = models.KINDS["CLIP"]
        model, inputs = models.build(kind)
        with crossget.attach(model, dict.fromkeys(["visual", "text"], crossget.ToMe(2)), inputs=inputs) as attached:
            run(model, inputs)
            assert attached.tokens == {"visual": [65, 63, 61, 59], "text": [20, 18, 16, 14]}

    def test_padding_is_never_in_a_group_with_text(self) -> None:
        model, inputs = models.build(models.KINDS["text with padding"])
        real = int(inputs["attention_mask"][1].sum())
        with crossget.attach(model, {"text": crossget.ToMe(3)}, inputs=inputs) as attached:
            run(model, inputs)
            row = attached.source["text"][1].tolist()
        assert real < models.TEXT
        assert not {*row[:real]} & {*row[real:]}

    def test_gradients_reach_every_parameter(self) -> None:
        for name in ("plain", "pairs", "CLIP's images [T, B, C]", "positions between blocks"):
            model, inputs = models.build(models.KINDS[name])
            with crossget.attach(model, crossget.ToMe(2), inputs=inputs):
                model(inputs).square().sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters()), name

    def test_saved_and_loaded_and_fitted(self, tmp_path: Path) -> None:
        model, inputs = models.build(models.KINDS["pyramid"])
        with crossget.attach(model, crossget.CrossGET(crossget.Linear(4, 0)), inputs=inputs) as attached:
            for vectors in attached.parameters():
                nn.init.normal_(vectors)
            expected = run(model, inputs)
            attached.save(tmp_path)
        with crossget.load(model, tmp_path, inputs) as attached:
            assert all_equal(run(model, inputs), expected)
            assert {reducer.r.first for reducer in attached.reducers.values()} == {0, 2}  # type: ignore[union-attr]
        plain, inputs = models.build(models.KINDS["plain"])
        fitted = crossget.fit_schedule(plain, inputs, flops=0.8)
        with crossget.attach(plain, fitted.reducer, inputs=inputs) as attached:
            run(plain, inputs)
            assert attached.tokens["visual"][-1] < 65
        assert crossget.doctor(plain, inputs, fitted.reducer).ok

    def test_what_was_found_is_said(self) -> None:
        model, inputs = models.build(models.KINDS["registers"])
        with pytest.warns(UserWarning, match="Registers has no adapter") as caught:
            crossget.attach(model, crossget.Ward(2), inputs=inputs).detach()
        (warning,) = caught
        assert all(fact in str(warning.message) for fact in ("visual", "prefix 6", "class token", "crossget.register"))

    def test_what_else_a_model_has_is_listed_as_refused(self) -> None:
        model, inputs = models.build(models.KINDS["vision and language"])
        towers = crossget.find_towers(model, inputs=inputs)
        assert "generates" in towers.refused["language_model.layers"]  # type: ignore[attr-defined]

    def test_a_model_in_training_stays_so(self) -> None:
        model, inputs = models.build(models.KINDS["layer scale, drop path"])
        model.train()
        model.patches.eval()  # type: ignore[union-attr]
        with untouched(model):
            crossget.attach(model, crossget.Ward(2), inputs=inputs).detach()


class TestInputs:
    """`inputs` is a tensor, a tuple, a dict or a function."""

    @pytest.mark.parametrize("form", ["tuple", "dict", "function"])
    def test_forms(self, form: str) -> None:
        model, image = models.build(PLAIN)
        forms: Mapping[str, Any] = {"tuple": (image,), "dict": {"x": image}, "function": lambda: model(image)}
        (expected,) = crossget.find_towers(model, inputs=image)
        (tower,) = crossget.find_towers(model, inputs=forms[form])
        assert str(tower) == str(expected)
        assert list(tower.blocks) == list(expected.blocks)

    def test_none_for_an_unknown_class(self) -> None:
        model, _ = models.build(PLAIN)
        for ask in (crossget.find_towers, lambda model: crossget.attach(model, crossget.Ward(2))):
            with untouched(model), pytest.raises(TypeError, match="inputs="):
                ask(model)

    @pytest.mark.parametrize("inputs", [3, "image.jpg", object()], ids=["number", "text", "object"])
    def test_of_another_type(self, inputs: Any) -> None:
        model, _ = models.build(PLAIN)
        with untouched(model), pytest.raises(TypeError, match="tensor"):
            crossget.attach(model, crossget.Ward(2), inputs=inputs)

    def test_equal_images(self) -> None:
        """Every token is the same for both, as the queries of a decoder are."""
        model, image = models.build(PLAIN)
        with untouched(model), pytest.raises((TypeError, ValueError), match="differ"):
            crossget.attach(model, crossget.Ward(2), inputs=image[:1].repeat(2, 1, 1, 1))

    def test_one_image(self) -> None:
        """What depends on the image cannot be seen."""
        model, image = models.build(PLAIN)
        with untouched(model), pytest.raises((TypeError, ValueError), match="two"):
            crossget.attach(model, crossget.Ward(2), inputs=image[:1])

    def test_a_function_that_raises(self) -> None:
        model, image = models.build(PLAIN)

        def broken() -> None:
            model(image)
            raise OSError("the camera is off")

        with untouched(model), pytest.raises(OSError, match="the camera is off"):
            crossget.attach(model, crossget.Ward(2), inputs=broken)

    def test_a_function_that_runs_something_else(self) -> None:
        model, _ = models.build(PLAIN)
        with untouched(model), pytest.raises((TypeError, ValueError), match="run"):
            crossget.attach(model, crossget.Ward(2), inputs=lambda: None)

    def test_inputs_that_the_model_does_not_take(self) -> None:
        model, image = models.build(PLAIN)
        with untouched(model), pytest.raises(RuntimeError):
            crossget.attach(model, crossget.Ward(2), inputs=image[:, :, :40])

    def test_an_attached_model(self) -> None:
        model, image = models.build(PLAIN)
        with (
            crossget.attach(model, crossget.Ward(2), inputs=image),
            pytest.raises(ValueError, match="already attached"),
        ):
            crossget.attach(model, crossget.Ward(2), inputs=image)

    def test_a_tower_that_is_not_there(self) -> None:
        model, image = models.build(PLAIN)
        with untouched(model), pytest.raises(ValueError, match="audio"):
            crossget.attach(model, {"audio": crossget.Ward(2)}, inputs=image)


class TestRefused:
    @refused_kind
    def test_says_where_and_why_and_leaves_no_trace(self, kind: models.Kind) -> None:
        model, inputs = models.build(kind)
        dense = run(model, inputs)
        with untouched(model), pytest.raises(TypeError) as raised:
            crossget.attach(model, crossget.Ward(2), inputs=inputs)
        assert_refused(kind, str(raised.value))
        with untouched(model), pytest.raises(TypeError) as raised:
            crossget.find_towers(model, inputs=inputs)
        assert_refused(kind, str(raised.value))
        assert all_equal(run(model, inputs), dense)

    @pytest.mark.parametrize("name", ["convolution over the sequence", "windows", "convolutional network"])
    def test_in_training(self, name: str) -> None:
        model, inputs = models.build(models.KINDS[name])
        model.train()
        with untouched(model), pytest.raises(TypeError):
            crossget.attach(model, crossget.Ward(2), inputs=inputs)


def assert_refused(kind: models.Kind, message: str) -> None:
    """The message has one line "PATH: reason" for the blocks."""
    lines = [line.strip() for line in message.splitlines()]
    about = [line for line in lines if line.startswith(f"{kind.path}: ")]
    assert len(about) == 1, message
    assert re.search(kind.reason, about[0]), about[0]
