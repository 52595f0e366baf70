"""Images at strengths of their own. That each row is what it would be elsewhere, contract.py proves for every host."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import crossget
from contract import COMPILES
from crossget import adaptive
from crossget.flops import count_once
from crossget.reducers import View
from crossget.schedule import PerLayer, Times, as_schedule, planned_tokens

SIZE = 64
REDUCER = crossget.CrossGET(r=2, threshold=0.3, ties="stable")


def model(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = VisionTransformer(
        img_size=SIZE, patch_size=16, embed_dim=32, depth=depth, num_heads=2, mlp_ratio=2, num_classes=7
    )
    return made.eval()


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 70), st.integers(1, 9))
def test_a_batch_is_dealt_out_evenly(batch: int, rungs: int) -> None:
    counts = adaptive.sizes(batch, rungs)
    assert sum(counts) == batch
    assert max(counts) - min(counts) <= 1
    if batch % 2 == rungs % 2 == 1 or batch % rungs == 0:
        assert counts == counts[::-1]
    if batch == 1:
        assert counts.index(1) == rungs // 2


@pytest.mark.parametrize(
    ("ladder", "kept"),
    # 15, 12 and 9 tokens behind the first blocks: who asks for 5 gets 15, 10, 6, and who asks for 6 gets 15, 9, 6.
    [((0.5, 1.0, 1.5), 1), ((0.0, 2.0), 1 / 2), ((1.0,), 1), ((1 / 3, 1, 5 / 3), 3 / 4)],
    ids=str,
)
@torch.no_grad()
def test_a_batch_keeps_its_budget(ladder: tuple[float, ...], kept: float) -> None:
    vit, batch = model(), images(12)
    reducer = dataclasses.replace(REDUCER, r=3, ladder=ladder)
    with crossget.attach(vit, dataclasses.replace(reducer, threshold=None)) as attached:
        vit(batch[:1])
        expected = attached.tokens["visual"]
        attached.reducer = reducer
        vit(batch)
        assert attached.tokens["visual"] == expected
        strength = attached.strength["visual"]
        narrow = [1 + kept * (factor - 1) for factor in ladder]
        assert sorted(strength.tolist()) == pytest.approx(sorted(narrow * (12 // len(ladder))))


@given(
    st.integers(2, 40), st.integers(1, 12), st.integers(4, 200), st.integers(1, 24),
    st.sampled_from([(0.5, 1.0, 1.5), (0.0, 1.0, 2.0), (0.8, 1.0, 1.2), (0.25, 1.75)]),
)  # fmt: skip
def test_a_ladder_is_drawn_in_just_far_enough(
    batch: int, depth: int, tokens: int, r: int, ladder: tuple[float, ...]
) -> None:
    counts = adaptive.sizes(batch, len(ladder))

    def spent(factor: float) -> int:
        left = planned_tokens(Times(as_schedule(r), factor), depth, tokens, 1)
        assert left == planned_tokens(PerLayer((round(factor * r),) * depth), depth, tokens, 1)
        return sum(left[:-1])

    def over(some: tuple[float, ...]) -> float:
        each = [count * spent(factor) for count, factor in zip(counts, some, strict=True)]
        return sum(each) / (batch * spent(1.0)) - 1

    narrow = adaptive.drawn_in(ladder, counts, spent)
    assert over(narrow) <= 0.005 + 1e-9
    share = (narrow[-1] - 1) / (ladder[-1] - 1)
    assert narrow == pytest.approx([1 + share * (factor - 1) for factor in ladder])
    if share < 1:
        assert over(tuple(1 + (share + 1 / 8) * (factor - 1) for factor in ladder)) > 0.005
    if over(ladder) <= 0.005:
        assert narrow == pytest.approx(ladder)


def test_more_copies_more_removed() -> None:
    """Redundancy counts the tokens with a near copy, by a loop; who has most of them is on the last rung."""
    torch.manual_seed(0)
    keys = torch.randn(5, 2, 9, 4)
    for row in range(5):
        keys[row, :, 1 : 2 + row] = keys[row, :, 1:2]  # as many tokens, besides itself, are copies of token 1
    protected = (torch.arange(9) == 0).expand(5, 9)
    valid = torch.ones(5, 9, dtype=torch.bool)
    valid[4, 4:] = False
    for padding in (None, valid):
        view = View(torch.zeros(5, 9, 8), keys, keys, None, None, protected, 1, padding)
        expected = []
        for row in range(5):
            flat = keys[row].transpose(0, 1).flatten(1)
            real = [t for t in range(1, 9) if padding is None or bool(padding[row, t])]
            cosine = torch.nn.functional.cosine_similarity
            expected.append(sum(any(cosine(flat[i], flat[j], 0) > 0.99 for j in real if j != i) for i in real))
        method = crossget.ToMe(r=1, threshold=0.99, keys="all_heads")
        assert method.redundancy(view).tolist() == expected
    rungs = adaptive.deal(torch.randn(5, 9, 8), _state(5, 9), torch.tensor([3, 0, 4, 1, 1]), (0.5, 1.5))
    assert [rung.rows.tolist() for rung in rungs] == [[1, 3], [4, 0, 2]]
    assert adaptive.gathered([rung.rows for rung in rungs], rungs).tolist() == [0, 1, 2, 3, 4]


def _state(batch: int, tokens: int) -> Any:
    from crossget.state import TokenState

    return TokenState.start(batch, tokens, torch.device("cpu"), cross=False, prefix=1, end=None, valid=None)


def test_gradients_are_those_of_the_rows_alone() -> None:
    vit, batch = model(), images(6)
    with crossget.attach(vit, REDUCER) as attached:
        weights = [*vit.parameters(), *attached.parameters()]
        vit(batch).square().sum().backward()
        found = [p.grad.clone() for p in weights if p.grad is not None]
        strength = attached.strength["visual"]
        tokens = attached._towers["visual"].last.cross_tokens[2].detach()
        assert tokens.shape == (6, 32)
        for p in weights:
            p.grad = None
        for factor in (0.5, 1.0, 1.5):
            r = (2, *[round(2 * factor)] * 3)
            with attached.at(dataclasses.replace(REDUCER, r=r, threshold=None)):
                vit(batch[strength == factor]).square().sum().backward()
                alone = attached._towers["visual"].last.cross_tokens[2].detach()
                torch.testing.assert_close(alone, tokens[strength == factor], rtol=1e-4, atol=1e-5)
        expected = [p.grad for p in weights if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_source_is_in_the_batchs_order() -> None:
    vit, batch = model(), images(6)
    with crossget.attach(vit, REDUCER) as attached:
        vit(batch)
        source, strength = attached.source["visual"], attached.strength["visual"]
        assert source.shape == (6, 17)
        left = 18 - 2 - 3 * (2 * strength).round().long()  # behind the last block, the cross token included
        assert torch.equal(source.amax(1), left - 2)  # the cross token is the last


@torch.no_grad()
def test_multiply_adds_are_the_mean_of_the_rungs() -> None:
    vit, batch = model(depth=3), images(6)
    with crossget.attach(vit, REDUCER) as attached:
        total = count_once(vit, batch, attached.parameters()).total
        alone = []
        for factor in (0.5, 1.0, 1.5):
            with attached.at(dataclasses.replace(REDUCER, r=(2, *[round(2 * factor)] * 2), threshold=None)):
                alone.append(count_once(vit, batch[:2], attached.parameters()).total)
        # What ranks the images is one product of 18 tokens of 32 channels with themselves.
        assert total == sum(alone) + 6 * 18 * 18 * 32


@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
@torch.no_grad()
def test_other_images_do_not_compile_again() -> None:
    vit = model(depth=2)
    counter = CompileCounterWithBackend("eager")
    with crossget.attach(vit, REDUCER):
        torch._dynamo.reset()
        compiled = torch.compile(vit, fullgraph=True, backend=counter)
        for seed in range(3):
            torch.testing.assert_close(compiled(images(6, seed)), vit(images(6, seed)), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
@torch.no_grad()
def test_a_strength_seen_before_does_not_compile_again() -> None:
    vit, batch = model(depth=2), images(2)
    counter = CompileCounterWithBackend("eager")
    strengths = [2, 3, (1, 2)]
    with crossget.attach(vit, crossget.CrossGET(r=2)) as attached:
        torch._dynamo.reset()
        compiled = torch.compile(vit, fullgraph=True, backend=counter)
        for strength in strengths * 2:
            with attached.at(strength):
                torch.testing.assert_close(compiled(batch), vit(batch), rtol=1e-5, atol=1e-5)
        compiled(batch)
    assert counter.frame_count == len(strengths)


@torch.no_grad()
def test_another_strength_for_one_call() -> None:
    vit, batch = model(), images(2)
    with crossget.attach(vit, crossget.CrossGET(r=2)) as attached:
        before, out = attached.reducer, vit(batch)
        for strength in (3, (0, 1, 2, 0), crossget.Ratio(0.2), crossget.ToMe(r=2), {"visual": crossget.Random(r=1)}):
            with attached.at(strength) as same:
                assert same is attached
                assert not torch.equal(vit(batch), out)
                if not isinstance(strength, crossget.Reducer | dict):
                    assert attached.reducer == dataclasses.replace(before, r=strength)
            assert attached.reducer == before
            assert torch.equal(vit(batch), out)
        with pytest.raises(ZeroDivisionError), attached.at(3):
            _ = 1 / 0
        assert attached.reducer == before
        refused: list[tuple[Any, type[Exception], str]] = [
            ("3", TypeError, "r is '3'"), (-1, ValueError, "cannot be negative"),
            ({"text": crossget.ToMe(r=1)}, ValueError, "this model has"), ((1, 2), ValueError, "2 layers"),
        ]  # fmt: skip
        for strength, error, message in refused:
            with pytest.raises(error, match=message), attached.at(strength):
                pass
            assert attached.reducer == before
            assert torch.equal(vit(batch), out)


@pytest.mark.parametrize(
    "fields",
    [{"threshold": 1.5}, {"ladder": ()}, {"ladder": (1.5, 0.5)}, {"ladder": (-0.5, 2.5)}, {"ladder": (0.5, 1.0)}],
    ids=str,
)
def test_ladders_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"CrossGET\(threshold="):
        dataclasses.replace(REDUCER, **fields)


def test_whose_rows_an_argument_has() -> None:
    rows = torch.tensor([2, 0])
    of_images, of_heads = torch.randn(3, 4), torch.randn(6, 5, 5)
    assert torch.equal(adaptive.rows_of(of_images, rows, 3, 5), of_images[rows])
    assert torch.equal(adaptive.rows_of(of_heads, rows, 3, 5), of_heads.view(3, 2, 5, 5)[rows].flatten(0, 1))
    for shared in (torch.randn(5, 4), torch.randn(1, 1, 5, 5), torch.randn(3), None, 3):
        assert adaptive.rows_of(shared, rows, 3, 5) is shared
    assert torch.equal(adaptive.rows_of((of_images, None), rows, 3, 5)[0], of_images[rows])
    with pytest.raises(RuntimeError, match="images or tokens cannot be told"):
        adaptive.rows_of(torch.randn(3, 4), rows, 3, 3)


def test_saved_and_loaded(tmp_path: Any) -> None:
    crossget.attach(model(), REDUCER).save(tmp_path)
    assert crossget.load(model(), tmp_path).reducer == REDUCER.resolved(crossget.find_towers(model())[0].host)
