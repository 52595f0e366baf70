"""Schedules for a budget: the closed form equals `count_flops` exactly, and the schedule found keeps the budget."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import hf_models
import open_clip
import pytest
import torch
import transformers
import unregistered_models
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import crossget
from crossget.core.attach import find_attachment
from crossget.measure.allocation import (
    Family,
    OutputLoss,
    ScheduleSpace,
    allocate,
    constant_weights,
    removed_tokens,
    total_cost,
)
from crossget.measure.cost_model import FlopModel, ScheduledModel, Span, derive, solve
from crossget.measure.fit import _Search, distance, time_blocks
from crossget.measure.flops import count_once
from crossget.methods.schedules import PerLayer, planned_tokens

WIDTH, DEPTH, PATCHES = 24, 3, 64
TRACES_LLAVA = not (4, 53) <= hf_models.VERSION < (5, 0)  # these make masks by vmap, which jit cannot trace


def vit(**settings: Any) -> Any:
    """A timm ViT of 64 patches and a class token."""
    torch.manual_seed(0)
    chosen = {"depth": DEPTH, "num_heads": 2, "embed_dim": WIDTH, "img_size": 32, "patch_size": 4, "num_classes": 10}
    return VisionTransformer(**{**chosen, **settings}).eval()


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def clip(**settings: Any) -> Any:
    torch.manual_seed(0)
    vision = {"layers": 3, "width": WIDTH, "head_width": 12, "patch_size": 8, "image_size": 40, **settings}
    text = {"context_length": 12, "vocab_size": 60, "layers": 3, "width": WIDTH, "heads": 2}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()


def hf_vit() -> Any:
    return hf_models.built(transformers.ViTModel, transformers.ViTConfig(**hf_models.VISION))


def hf_clip() -> Any:
    config = transformers.CLIPVisionConfig(**hf_models.VISION)
    return hf_models.built(transformers.CLIPVisionModel, config, "eager")


def blip() -> Any:
    text = {**hf_models.TEXT, "encoder_hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = transformers.BlipConfig(text_config=text, vision_config=hf_models.VISION, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config).eval()


def prompts(count: int) -> dict[str, Tensor]:
    ids, mask = hf_models.prompts(*["^#abcd"] * count)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": hf_models.images(count)}


# The closed form ------------------------------------------------------------------------------------------------------


def costs_of(
    model: nn.Module, inputs: Any, reducer: Any, tower: str | None
) -> tuple[FlopModel, crossget.Attachment, str]:
    attachment = crossget.attach(model, reducer if tower is None else {tower: reducer})
    name = tower or next(iter(attachment.towers))
    search = _Search(ScheduledModel(model, inputs, attachment, name), None, "constant", 1)
    return derive(search.model, search.space), attachment, name


@dataclass(frozen=True)
class Host:
    id: str
    make: Callable[[], Any]
    inputs: Callable[[], Any]
    tower: str | None = None


CROSS, TOME = crossget.CrossGET(r=0), crossget.ToMe(r=0)
BY_ATTENTION = crossget.CrossGET(r=0, cross_token=False, importance="attention")
WARD, IN_TWO_SETS = crossget.Ward(r=0), crossget.Ward(r=0, matching="ward", key_stride=1)
GRAPH = crossget.CrossGET(r=0, cross_token=False, guided_matching=False, ensemble="size")
VIT = Host("timm", vit, lambda: images(2))
TEXTS = Host("text", clip, lambda: {"text": torch.randint(1, 60, (3, 12))}, "text")
SLOW = pytest.mark.slow
# All are slow. The default tests compare one closed form with the formula, and fitted schedules with their counts.
CASES = [
    *[
        pytest.param(VIT, reducer, marks=SLOW)
        for reducer in (TOME, CROSS, BY_ATTENTION, GRAPH, WARD, IN_TWO_SETS, crossget.Random(r=0), crossget.TopK(r=0))
    ],
    *[
        pytest.param(host, reducer, marks=SLOW)
        for host, reducer in [
            (Host("open_clip", clip, lambda: (images(1, 40), torch.randint(1, 60, (1, 12)))), CROSS),
            (Host("registers", lambda: vit(reg_tokens=3), lambda: images(1)), TOME),
            (Host("no class token", lambda: vit(class_token=False, global_pool="avg"), lambda: images(1)), CROSS),
            (Host("open_clip's tower", lambda: clip().visual, lambda: images(1, 40)), CROSS),
            (Host("text", clip, lambda: {"text": torch.randint(1, 60, (3, 12))}, "text"), CROSS),
            (Host("transformers' ViT", hf_vit, lambda: hf_models.images(1)), BY_ATTENTION),
            (Host("transformers' CLIP", hf_clip, lambda: {"pixel_values": hf_models.images(2)}), CROSS),
            (
                Host("BLIP", blip, lambda: {**prompts(1), "input_ids": torch.full((1, 5), 9), "attention_mask": None}),
                TOME,
            ),
            (Host("LLaVA", hf_models.llava, lambda: prompts(1)), CROSS),
            (Host("two LLaVA prompts", hf_models.llava, lambda: prompts(2)), CROSS),
            (Host("ViT-Tiny", lambda: vit(depth=12, img_size=56), lambda: images(1, 56)), CROSS),
        ]
    ],
]


@pytest.mark.parametrize(("host", "reducer"), CASES, ids=lambda value: getattr(value, "id", type(value).__name__))
def test_the_closed_form_is_what_the_meter_counts(host: Host, reducer: Any) -> None:
    if "LLaVA" in host.id and not TRACES_LLAVA:
        pytest.skip("these versions of transformers cannot be traced")
    model, inputs = host.make(), host.inputs()
    costs, attachment, tower = costs_of(model, inputs, reducer, host.tower)
    space = costs.space
    assert costs.counted <= 8
    free = space.n_tokens - space.n_reserved
    for r in ([5] * space.depth, [free // 3, *range(1, space.depth)], [0] * space.last_layer + [free // 2]):
        wish = [*r[: space.last_layer + 1], *[0] * (space.depth - space.last_layer - 1)]
        attachment.reducer = {**attachment.reducers, tower: replace(attachment.reducers[tower], r=tuple(wish))}
        plan = planned_tokens(PerLayer(tuple(wish)), space.depth, space.n_tokens, space.n_reserved)
        assert count_once(model, inputs, attachment.parameters()).total == costs.total(plan)
        assert float(total_cost(costs, torch.tensor([plan]))) == costs.total(plan)
    attachment.detach()


@pytest.fixture(scope="module")
def vit_costs() -> FlopModel:
    costs, attachment, _ = costs_of(vit(), images(2), CROSS, None)
    attachment.detach()
    return costs


@given(st.lists(st.integers(0, 40), min_size=DEPTH, max_size=DEPTH))
def test_the_closed_form_is_the_formula(vit_costs: FlopModel, r: list[int]) -> None:
    """For all schedules, not only the few that can be counted, by the formulas of docs/measuring.md."""
    plan = vit_costs.space.tokens(r)
    total = PATCHES * 3 * 4 * 4 * WIDTH + 5 * (PATCHES + 1) * WIDTH + WIDTH * 10  # patches, last norm, head
    for tokens, left in pairwise(plan):
        total += 5 * tokens * WIDTH + 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
        total += 5 * left * WIDTH + 2 * left * WIDTH * 4 * WIDTH
        total += (tokens**2 + tokens) * WIDTH if left < tokens else 0  # similarities, and those with the guide
    assert vit_costs.total(plan) == 2 * total


class Odd(crossget.ToMe):
    """Its cost is no polynomial: a product of as many rows as the number of tokens has ones in base two."""

    def reduce(self, view: Any, r: int) -> Any:
        rows = int(view.tokens.shape[1]).bit_count()
        view.tokens = view.tokens + (view.tokens[:, :rows] @ view.tokens.transpose(1, 2)).sum() * 0
        return super().reduce(view, r)


def test_costs_of_another_form_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no polynomial.*tower 'visual'.*tiles"):
        crossget.fit_schedule(vit(depth=2), images(1), flops=0.7, reducer=Odd(r=0), distribution="constant")


@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_equations(rows: list[list[int]], data: Any) -> None:
    known = data.draw(st.lists(st.integers(-5, 5), min_size=3, max_size=3))
    equations = [(row, sum(a * b for a, b in zip(row, known, strict=True))) for row in rows]
    found = solve(equations)
    assert found is not None
    assert all(sum(a * b for a, b in zip(row, found, strict=True)) == value for row, value in equations)
    assert solve([*equations, (rows[0], equations[0][1] + 1)]) is None
    span = Span()
    for row in rows:
        span.add(row)
    assert span.rank == torch.linalg.matrix_rank(torch.tensor(rows).double())


# Families and allocation ----------------------------------------------------------------------------------------------

weights = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.5, 7.0]), min_size=3, max_size=3).filter(any)


@given(weights, st.integers(2, 30), st.integers(0, 3))
def test_a_family_grows_stronger_token_by_token(weights: list[float], free: int, reserved: int) -> None:
    space = ScheduleSpace(3, free + reserved, reserved, 2)
    family = Family(space, weights)
    assert family[0] == [space.n_tokens] * 4
    for n in range(len(family)):
        plan = family[n]
        assert plan == space.tokens(removed_tokens(plan))  # no block is asked for more than half
        assert all(r == 0 for r, weight in zip(removed_tokens(plan), weights, strict=True) if not weight)
    for weak, strong in pairwise(family[n] for n in range(len(family))):
        assert all(0 <= a - b <= 1 for a, b in zip(weak, strong, strict=True))
        assert weak != strong
    if len(set(weights)) == 1:
        assert family[len(family) - 1] == space.strongest()


def test_the_constant_family_holds_constant_r() -> None:
    space = ScheduleSpace(12, 198, 2, 11)
    family = Family(space, constant_weights(space))
    schedules = [removed_tokens(family[n]) for n in range(len(family))]
    assert all([r] * 12 in schedules for r in range(15))
    assert [16] * 11 + [10] in schedules  # the reference's schedule, where the last block can remove 10 only


class Table:
    """What a block costs, by table: [layer, tokens, left]."""

    def __init__(self, seed: int, space: ScheduleSpace) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.table = torch.rand(
            space.depth, space.n_tokens + 1, space.n_tokens + 1, generator=chance, dtype=torch.float64
        )

    def block(self, layer: int, tokens: Tensor, left: Tensor) -> Tensor:
        return self.table[layer][tokens, left]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("out", [None, 4])
def test_an_allocation_loses_least_of_all_that_cost_no_more(seed: int, out: int | None) -> None:
    space = ScheduleSpace(3, 9, 2, 1 if seed == 4 else 2)
    loss, price = Table(seed, space), Table(seed + 100, space)
    last = range(1) if space.last_layer == 1 else range(9)
    every = {tuple(space.tokens(r)) for r in itertools.product(range(9), range(9), last)}
    plans = [plan for plan in every if out is None or plan[space.last_layer + 1] == out]
    tensor = torch.tensor(plans)
    losses, costs = total_cost(loss, tensor), total_cost(price, tensor)
    most = float(costs.quantile(0.3)) if out is None else float("inf")
    found = allocate(space, loss, price, most, out)
    assert found is not None
    at = plans.index(tuple(found))
    assert costs[at] <= most
    assert losses[at] == losses[costs <= costs[at]].min()
    assert allocate(space, loss, price, float(costs.min()) - 1e-9, out) is None


@given(st.floats(0.001, 1), st.floats(1, 4))
def test_a_loss_goes_through_what_was_measured(little: float, factor: float) -> None:
    space = ScheduleSpace(2, 41, 1, 1)
    loss = OutputLoss(space, [[(31, little), (21, little * factor * 3)], [(31, 0.0), (21, 0.0)]])
    at = torch.tensor([41, 31, 21, 11])
    values = loss.block(0, torch.full_like(at, 41), at)
    assert values[0] == 0
    assert values[2] == pytest.approx(little * factor * 3)
    assert (values.diff() > 0).all()
    assert float(values[3]) == pytest.approx(float(values[2] + loss.block(0, at[2], at[3])))  # in two steps, as in one
    assert not loss.block(1, torch.full_like(at, 41), at).any()


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reducer", "distribution"),
    [
        (0.58, CROSS, "constant"),
        (0.58, CROSS, "ramped"),
        pytest.param(0.58, WARD, "ramped", marks=SLOW),
        (0.7, TOME, "measured"),
        pytest.param(0.8, CROSS, "measured", marks=SLOW),
    ],
    ids=["constant", "ramped", "ramped with Ward", "measured", "with a cross token"],
)
def test_flops(
    vit_costs: FlopModel, monkeypatch: pytest.MonkeyPatch, asked: float, reducer: Any, distribution: Any
) -> None:
    model, inputs = vit(), images(8 if distribution == "measured" else 2)
    if reducer is CROSS and distribution != "measured":  # the closed form is known
        monkeypatch.setattr("crossget.measure.fit.derive", lambda model, space: vit_costs)
    fitted = crossget.fit_schedule(model, inputs, flops=asked, reducer=reducer, distribution=distribution)
    with crossget.attach(model, fitted.reducer) as attached:
        report = crossget.count_flops(model, inputs)
        assert attached.tokens["visual"] == list(fitted.tokens[:-1])
    assert report.ratio == fitted.measured == fitted.predicted <= asked
    assert fitted.met
    assert "MISSED" not in str(fitted)
    assert fitted.schedule.r == tuple(removed_tokens(fitted.tokens)) == fitted.reducer.schedule.r  # type: ignore[union-attr]
    if distribution == "constant":
        family = Family(vit_costs.space, constant_weights(vit_costs.space))
        totals = [vit_costs.total(family[n]) for n in range(len(family))]
        most = asked * report.dense.total
        assert max(total for total in totals if total <= most) <= report.total <= most
        r = fitted.schedule.r
        for i in (i for i in range(DEPTH) if r[i]):  # one token more is too much
            assert vit_costs.total(vit_costs.space.tokens([*r[:i], r[i] - 1, *r[i + 1 :]])) > most
        assert not fitted.losses
    elif distribution == "ramped":
        shares, n_reserved = [n / 1000 for n in range(1000)], 1 + (reducer is CROSS)
        plans = [planned_tokens(crossget.RampedRatio(share), DEPTH, fitted.tokens[0], n_reserved) for share in shares]
        left = slice(1, DEPTH + 1 - (reducer is WARD))  # Ward's last block removes nothing here
        assert (
            min(sum(abs(a - b) for a, b in zip(plan[left], fitted.tokens[left], strict=True)) for plan in plans)
            <= DEPTH
        )
        assert (fitted.distribution, fitted.losses) == ("ramped", {})
    elif reducer is TOME:
        # The output depends on the class token alone, so merging in the last block costs nothing.
        assert fitted.distribution == "measured"
        assert fitted.losses["measured"] < fitted.losses["constant"]
        assert fitted.schedule.r[-1] >= (fitted.tokens[-2] - 1) // 2 - 4


@pytest.mark.slow
def test_a_dictionary_of_towers_and_a_model_of_two() -> None:
    model, ids = clip(), torch.randint(1, 60, (2, 12))
    inputs = (images(2, 40), ids)
    whole = crossget.fit_schedule(model, inputs, flops=0.8, distribution="constant")
    text = crossget.fit_schedule(model, inputs, flops=0.95, distribution="constant", tower="text", reducer=TOME)
    assert (whole.tower, text.tower, list(text.reducer)) == ("visual", "text", ["text"])  # type: ignore[arg-type]
    for fitted in (whole, text):
        with crossget.attach(model, fitted.reducer):
            assert crossget.count_flops(model, inputs).ratio == fitted.measured <= fitted.asked


@pytest.mark.parametrize("distribution", ["constant", "measured", "ramped"])
@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_tokens_out(settings: dict[str, Any], distribution: Any) -> None:
    model = vit(**settings)
    for asked in (64, 17):
        fitted = crossget.fit_schedule(model, images(4), tokens_out=asked, reducer=CROSS, distribution=distribution)
        assert fitted.measured == fitted.predicted == asked
        kept = fitted.tokens[-1] - 1 - settings.get("reg_tokens", 0) - settings.get("class_token", True)
        assert kept == asked
        with crossget.attach(model, fitted.reducer) as attached:
            model(images(1))
            assert len(attached.source["visual"][0].unique()) == fitted.tokens[-1] - 1


@pytest.mark.parametrize("distribution", ["constant", "measured"])
def test_image_tokens_of_llava(distribution: Any) -> None:
    """The image tokens of the prompt: the cross token, which LLaVA has among its features, is one of them."""
    model, inputs = hf_models.llava(), prompts(4)
    fitted = crossget.fit_schedule(model, inputs, tokens_out=7, reducer=CROSS, distribution=distribution)
    assert fitted.measured == 7
    assert fitted.schedule.r[-1] == 0  # the model does not use the last block
    if distribution == "measured":  # by the last token's logits, which alone can be compared
        by_hand = crossget.fit_schedule(
            model, inputs, tokens_out=7, reducer=CROSS, output=lambda out: out.logits[:, -1]
        )
        assert (by_hand.losses, by_hand.schedule) == (fitted.losses, fitted.schedule)
    with crossget.attach(model, fitted.reducer) as attached:
        assert attached.image_tokens == (16, 7)
        assert model(**inputs).logits.shape[1] == 5 + 7


@pytest.mark.slow
@pytest.mark.skipif(not TRACES_LLAVA, reason="these versions of transformers cannot be traced")
def test_flops_of_llava() -> None:
    """Those of the language model are included, and become fewer with the image tokens."""
    model, inputs = hf_models.llava(), prompts(4)
    fitted = crossget.fit_schedule(model, inputs, flops=0.7)
    with crossget.attach(model, fitted.reducer):
        assert crossget.count_flops(model, inputs).ratio == fitted.measured <= 0.7


@pytest.mark.parametrize("distribution", ["constant", "measured"])
def test_of_several_methods_the_one_that_loses_least(distribution: Any) -> None:
    model, inputs = vit(), images(6)
    methods = [crossget.Random(5), crossget.ToMe(0), crossget.TopK(r=0)]
    with torch.no_grad():
        dense = model(inputs)
        fits = [
            crossget.fit_schedule(model, inputs, tokens_out=20, reducer=one, distribution=distribution)
            for one in methods
        ]
        lost = []
        for fitted in fits:
            with crossget.attach(model, fitted.reducer):
                lost.append(float(distance(model(inputs), dense).mean()))
    best = fits[lost.index(min(lost))]
    found = crossget.fit_schedule(model, inputs, tokens_out=20, reducer=methods, distribution=distribution)
    assert replace(found, losses=best.losses) == best
    assert found.losses[found.distribution] == pytest.approx(min(lost))
    assert find_attachment(model) is None


def test_the_constant_schedule_stays_where_nothing_is_better() -> None:
    fit = partial(crossget.fit_schedule, vit(), images(4), tokens_out=20, reducer=CROSS)
    constant = fit(distribution="constant")
    fitted = fit(output=lambda logits: torch.ones_like(logits))
    assert fitted.distribution == "constant"
    assert fitted.losses == {"measured": 0.0, "constant": 0.0}
    assert fitted.schedule == constant.schedule


def test_tokens_out_on_the_meta_device() -> None:
    fitted = crossget.fit_schedule(
        vit().to("meta"), images(2).to("meta"), tokens_out=30, distribution="constant", reducer=crossget.Ward(0)
    )
    real = crossget.fit_schedule(vit(), images(2), tokens_out=30, distribution="constant", reducer=crossget.Ward(0))
    assert fitted == real
    assert fitted.measured == 30


def test_what_cannot_be_done_on_the_meta_device() -> None:
    model, inputs = vit().to("meta"), images(2).to("meta")
    with pytest.raises(ValueError, match="distribution='constant'"):
        crossget.fit_schedule(model, inputs, flops=0.7)
    with pytest.raises(ValueError, match="nothing can be measured: .* give one reducer"):
        crossget.fit_schedule(model, inputs, flops=0.7, distribution="constant", reducer=[CROSS, TOME])
    with pytest.raises(ValueError, match="latency .*meta device"):
        crossget.fit_schedule(model, inputs, latency=0.7)


@pytest.mark.slow
def test_the_meta_device_gives_the_same() -> None:
    model, inputs = vit().to("meta"), images(2).to("meta")
    fitted = crossget.fit_schedule(model, inputs, flops=0.7, distribution="constant")
    real = vit()
    with crossget.attach(real, fitted.reducer):
        assert crossget.count_flops(real, images(2)).ratio == fitted.measured


# Time, by a clock that the model's modules advance ------------------------------------------------------------------


@contextmanager
def clock(model: Any, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> Iterator[None]:
    """Inside, time passes only in attention and MLP, by a function of the tokens that they get."""
    now = 0.0

    def turn(module: nn.Module, args: Any) -> None:
        nonlocal now
        now += seconds(int(args[0].shape[1]))

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    hooks = [part.register_forward_pre_hook(turn) for block in model.blocks for part in (block.attn, block.mlp)]
    yield
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("distribution", "reducer"), [("constant", None), ("measured", CROSS)])
def test_latency(monkeypatch: pytest.MonkeyPatch, distribution: Any, reducer: Any) -> None:
    """Also by the default method, which computes the last block for one token."""
    model, inputs = vit(), images(4)
    with clock(model, monkeypatch, lambda tokens: 1e-3 + 1e-4 * tokens + 1e-6 * tokens**2):
        fit = partial(crossget.fit_schedule, model, inputs, reducer=reducer, rounds=2)
        fitted = fit(latency=0.7, distribution=distribution)
        assert isinstance(fitted.reducer, crossget.Ward if reducer is None else crossget.CrossGET)
        assert fitted.met
        assert fitted.predicted == pytest.approx(fitted.measured, abs=1e-2)
        assert 0.68 < fitted.measured <= 0.7 + 1e-3
        assert fitted.spread == pytest.approx((fitted.measured, fitted.measured))
        with pytest.raises(ValueError, match=r"latency=0.2 .*nearest possible is 0.\d+"):
            fit(latency=0.2)


def test_time_that_does_not_fall_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        clock(model := vit(), monkeypatch, lambda tokens: 1.0),
        pytest.raises(ValueError, match=r"no schedule is faster .* the best takes 1.00 .*give a larger batch"),
    ):
        crossget.fit_schedule(model, images(2), latency=0.9, rounds=1)


def test_a_missed_latency_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the timing of the blocks the model gets slower, so that the prediction does not hold."""
    model, slow = vit(), 0.0
    original = time_blocks

    def then_slower(*args: Any) -> Any:
        nonlocal slow
        found, slow = original(*args), 0.02
        return found

    monkeypatch.setattr("crossget.measure.fit.time_blocks", then_slower)
    with (
        clock(model, monkeypatch, lambda tokens: 1e-3 * tokens + (slow if tokens < 60 else 0.0)),
        pytest.warns(UserWarning, match=r"the budget was missed.*MISSED, by more than the spread"),
    ):
        fitted = crossget.fit_schedule(model, images(2), latency=0.5, distribution="constant", rounds=2)
    assert not fitted.met
    assert fitted.measured > 0.5


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one .*flops, tokens_out, latency; got none"),
        ({"flops": 0.5, "latency": 0.5}, ValueError, "exactly one budget .*'flops': 0.5, 'latency': 0.5"),
        ({"flops": 1.2}, ValueError, r"flops is 1.2: .*\(0, 1\]"),
        ({"latency": 0}, ValueError, "latency is 0: expected a share"),
        ({"flops": "half"}, TypeError, "flops is 'half': expected a number"),
        ({"tokens_out": 12.0}, TypeError, "tokens_out is 12.0: .*int"),
        ({"tokens_out": 0}, ValueError, "tokens_out is 0: expected at least 1"),
        ({"tokens_out": 65}, ValueError, "tokens_out=65 .*nearest possible is 64"),
        ({"tokens_out": 7}, ValueError, "tokens_out=7 .*nearest possible is 16"),
        ({"flops": 0.5, "distribution": "linear"}, ValueError, "distribution is 'linear': choose 'measured', 'con"),
        ({"flops": 0.5, "reducer": 16}, TypeError, "reducer is 16: give .*crossget.Ward"),
        ({"flops": 0.5, "reducer": []}, TypeError, r"reducer is \[\]: give a reducer"),
        ({"flops": 0.5, "reducer": [crossget.ToMe(0), "Ward"]}, TypeError, r"'Ward'\]: give a reducer"),
        ({"flops": 0.5, "rounds": 0}, ValueError, "rounds=0: expected at least 1"),
        ({"flops": 0.5, "tower": "text"}, ValueError, r"\['text'\].*\['visual'\]"),
        ({"tokens_out": 30, "output": lambda out: [1]}, ValueError, "cannot be compared.*output="),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.norm.eval()
    with pytest.raises(error, match=message):
        crossget.fit_schedule(model, images(2), **arguments)
    assert find_attachment(model) is None
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_nearest_possible_is_possible(vit_costs: FlopModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No schedule costs less than the nearest possible one that the message names."""
    monkeypatch.setattr("crossget.measure.fit.derive", lambda model, space: vit_costs)
    with pytest.raises(ValueError, match="nearest possible") as caught:
        crossget.fit_schedule(vit(), images(2), flops=0.05, reducer=CROSS)
    share = float(str(caught.value).split("possible is ")[1].split(". ")[0])
    dense = crossget.count_flops(vit(), images(2)).total
    space, counts = vit_costs.space, torch.arange(1, vit_costs.space.n_tokens + 1)
    every = torch.cartesian_prod(torch.tensor([space.n_tokens]), counts, counts, counts)
    gone = every[:, :-1] - every[:, 1:]
    possible = ((gone >= 0) & (2 * gone <= every[:, :-1] - space.n_reserved)).all(1)
    least = float(total_cost(vit_costs, every[possible]).min())
    assert share - 1e-4 < least / dense <= share


def test_an_attached_model_is_refused() -> None:
    model = vit()
    with crossget.attach(model, TOME) as attached:
        with pytest.raises(ValueError, match="already attached.*Detach it first"):
            crossget.fit_schedule(model, images(1), flops=0.5)
        assert attached.is_attached


def test_too_few_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 2 tokens, of which 1 always"):
        crossget.fit_schedule(vit(img_size=4), images(1, 4), flops=0.5)


def test_a_tower_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="tower 'visual' did not run"):
        crossget.fit_schedule(clip(), {"text": torch.randint(1, 60, (2, 12))}, flops=0.5)


def test_distance() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert distance(a, b).tolist() == [pytest.approx(16 / 9), 0.0]
    # Longer ones are compared at their end, integers and single numbers not at all.
    long = torch.zeros(2, 5, 2)
    long[:, -1] = b
    out = {"logits": a[:, None], "ids": torch.ones(2, 3), "scale": torch.tensor(2.0)}
    dense = {"logits": long, "ids": torch.ones(2, 3, dtype=torch.long), "scale": torch.tensor(3.0)}
    assert distance(out, dense).tolist() == [pytest.approx(16 / 9), 0.0]


def test_the_search_warns_of_nothing() -> None:
    """It asks blocks for more tokens than there are, which is no fault of the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossget.fit_schedule(vit(depth=2), images(2), flops=0.8, reducer=TOME, distribution="constant")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::crossget.core.discovery.DiscoveryWarning")
def test_a_stage_of_a_pyramid_is_fitted_by_name_only() -> None:
    model, inputs = unregistered_models.build(unregistered_models.KINDS["pyramid"])
    with pytest.raises(ValueError, match=r"stages \['visual.0', 'visual.1'\].* tower='visual.1'"):
        crossget.fit_schedule(model, inputs, flops=0.95, distribution="constant")
    assert find_attachment(model) is None
    fitted = crossget.fit_schedule(model, inputs, flops=0.95, distribution="constant", tower="visual.0")
    assert fitted.measured <= 0.95
    with crossget.attach(model, fitted.reducer, inputs) as attached:
        assert list(attached.towers) == ["visual.0"]
        assert crossget.count_flops(model, inputs).ratio == fitted.measured
