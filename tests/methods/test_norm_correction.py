"""Norm correction against loops, and that values and MLP outputs are multiplied by it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_host import ATTENTIONS, RESIDUALS, TOKENS, Block, Plain, registered
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.methods.matching import MergePlan
from crossget.methods.merging import ENSEMBLES, norm_correction

plain = pytest.fixture(autouse=True)(registered)


@given(st.integers(0, 10**6), st.sampled_from(["size", "normalized"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_it_is_the_length_of_a_group_s_mean_direction(seed: int, ensemble: str, merged_before: bool) -> None:
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 9, 8, generator=chance)
    sizes = torch.randint(1, 5, (2, 9), generator=chance).float()
    importance, before = torch.rand(2, 9, generator=chance), torch.rand(2, 9, generator=chance)
    order = torch.stack([torch.randperm(9, generator=chance) for _ in range(2)])
    source = order[:, :4]
    destination = order[:, 4:].gather(1, torch.randint(0, 5, (2, 4), generator=chance))  # several may have the same
    plan = MergePlan(source, destination, 9)
    joined, _ = ENSEMBLES[ensemble](tokens, sizes, importance, plan)
    found = norm_correction(tokens, before if merged_before else None, plan)
    assert found.dtype == torch.float32
    for row in range(2):
        weights = sizes[row] * (importance[row].exp() if ensemble == "normalized" else 1)
        for new, old in enumerate(plan.kept[row].tolist()):
            group = [old, *(int(a) for a, b in zip(source[row], destination[row], strict=True) if int(b) == old)]
            total = sum(float(weights[i]) for i in group)
            mean = torch.zeros(8)
            for i in group:
                one = (tokens[row, i] - tokens[row, i].mean()) / tokens[row, i].std(correction=0)
                mean += float(weights[i]) / total * (float(before[row, i]) if merged_before else 1.0) * one
            expected = float(mean.norm()) / 8**0.5
            if len(group) == 1:
                expected = float(before[row, old]) if merged_before else 1.0
            assert float(found[row, new]) == pytest.approx(expected, abs=2e-4)
    assert joined.shape == (2, 5, 8)


def test_dropping_tokens_keeps_the_corrections_of_the_others() -> None:
    plan = MergePlan(torch.tensor([[1]]), None, 3)
    found = norm_correction(torch.randn(1, 3, 4), torch.tensor([[1.0, 0.5, 0.7]]), plan)
    assert found.tolist() == [[1.0, pytest.approx(0.7)]]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_values_and_what_the_mlp_adds_are_scaled(attention: str, residual: str) -> None:
    """The first block merges, and scales what its MLP adds; the second one scales values, too."""
    torch.manual_seed(0)
    model = Plain(depth=2, attention=attention, residual=residual).eval()
    for block in model.stages:
        block.mha.in_proj_weight, block.mha.in_proj_bias = block.qkv.weight, block.qkv.bias
        block.mha.out_proj.weight, block.mha.out_proj.bias = block.proj.weight, block.proj.bias
    with torch.no_grad(), crossget.attach(model, crossget.Ward((8, 0))) as attached, attached.recording():
        model(TOKENS.clone())
    first, second = attached.records["visual"]
    assert first.weights is not None
    ones = torch.ones(2, 20)
    with torch.no_grad():
        total = attended(model.stages[0], TOKENS, ones, ones)
        merged, factor = torch.zeros(2, 12, 32), torch.zeros(2, 12)
        for row, new in itertools.product(range(2), range(12)):
            group = (first.source[row] == new).nonzero()[:, 0].tolist()
            assert first.sizes[row, new] == len(group)
            direction = torch.zeros(32)
            for old in group:
                merged[row, new] += total[row, old] / len(group)
                direction += F.layer_norm(total[row, old], (32,)) / len(group)
            factor[row, new] = 1.0 if len(group) == 1 else direction.norm() / 32**0.5
        assert factor.min() < 0.95
        for block, record in zip(model.stages, (first, second), strict=True):
            if record is second:
                merged = attended(block, merged, first.sizes, factor)
            merged = merged + factor[:, :, None] * block.mlp(merged)
            torch.testing.assert_close(record.features, merged, rtol=1e-5, atol=1e-5)


def attended(block: Block, x: Tensor, sizes: Tensor, factor: Tensor) -> Tensor:
    """[B, T, C] the tokens after attention over tokens of `sizes` [B, T], with values times `factor` [B, T]."""
    q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in block.qkv(block.norm(x)).chunk(3, -1))
    weights = (q @ k.mT * 8**-0.5 + sizes.log()[:, None, None]).softmax(-1)
    return x + block.proj((weights @ (v * factor[:, None, :, None])).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", ["mlp", "tokens"])
def test_in_place_the_second_residual_is_scaled_as_well(in_place: str) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attend(self.norm(x))
            added = self.mlp(x)
            return added.add_(x) if in_place == "mlp" else x.add_(added)

    torch.manual_seed(0)
    model, same = Plain().eval(), Plain().eval()
    same.stages = nn.ModuleList([InPlace() for _ in range(3)])
    same.load_state_dict(model.state_dict())
    results = []
    for one in (model, same):
        with torch.no_grad(), crossget.attach(one, crossget.Ward(4)):
            results.append(one(TOKENS))
    with torch.no_grad(), crossget.attach(same, crossget.Ward(4, norm_correction=False)):
        assert not torch.equal(same(TOKENS), results[1])
    assert torch.equal(*results)


def test_a_merged_token_gives_what_its_tokens_gave_together() -> None:
    """Exactly so where tokens have one length, attention is even and nothing else happens to them."""
    torch.manual_seed(0)
    model = Plain(depth=2).eval()
    width = 32
    with torch.no_grad():
        for block in model.stages:
            block.mlp.weight.zero_()
            block.mlp.bias.zero_()
            block.qkv.weight[: 2 * width].zero_()
            block.qkv.bias.zero_()
        for parameter in model.stages[0].proj.parameters():
            parameter.zero_()
    tokens = F.layer_norm(torch.randn(2, 9, width), (width,))
    seen = {}
    for name, method in {
        "dense": crossget.ToMe(0),
        "corrected": crossget.ToMe((3, 0), norm_correction=True),
        "plain": crossget.ToMe((3, 0)),
    }.items():
        with torch.no_grad(), crossget.attach(model, method) as attached, attached.recording():
            model(tokens)
            seen[name] = attached.records["visual"][-1].features[:, 0]
    torch.testing.assert_close(seen["corrected"], seen["dense"], rtol=1e-5, atol=1e-5)
    assert (seen["plain"] - seen["dense"]).abs().max() > 1e-2


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random])
def test_any_method_that_merges_may_use_it(method: Any) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    outputs = []
    with torch.no_grad():
        for corrected in (False, True):
            with crossget.attach(model, method(3, norm_correction=corrected)):
                outputs.append(model(TOKENS))
    assert torch.isfinite(outputs[1]).all()
    assert not torch.equal(*outputs)


def test_gradients_flow_through_what_is_scaled() -> None:
    torch.manual_seed(0)
    model = Plain()
    with crossget.attach(model, crossget.Ward(3)):
        model(TOKENS).square().sum().backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for stage in model.stages
        for name, parameter in stage.named_parameters()
        if not name.startswith("mha")
    )
    assert isinstance(model, nn.Module)


def test_an_ensemble_that_does_not_set_its_weights_is_refused() -> None:
    plan = MergePlan(torch.tensor([[1]]), torch.tensor([[2]]), 3)
    with pytest.raises(ValueError, match="MergePlan.taken"):
        norm_correction(torch.randn(1, 3, 4), None, plan)
