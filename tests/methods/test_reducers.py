"""The fast reducers against the loops of reference.py, and their invariants."""

from __future__ import annotations

import dataclasses
import pickle
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crossget
import reference
from crossget.methods import importance
from crossget.methods.importance import by_attention
from crossget.methods.matching import Candidates, Matching, MergePlan, complete_graph, ward_graph
from crossget.methods.pairs import BAND, BUDGET
from crossget.methods.reducers import Merging, Reducer, TowerFacts, View

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOWER = TowerFacts("tower 'visual'")


@st.composite
def views(draw: Any, tied: bool = False) -> tuple[View, int]:
    """A random block: shapes, sizes, protected tokens, padding, and an r that may be too large."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens, heads = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 4]))
    dtype = draw(st.sampled_from(DTYPES))
    head_width = 16 // heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keys, queries = random(batch, heads, tokens, head_width), random(batch, heads, tokens, head_width)
    if tied:  # length 4, so that all cosines are multiples of 1/16: exact in every dtype, and full of ties
        keys, queries = keys.sign() + (keys == 0), queries.sign() + (queries == 0)
    prefix, cross = draw(st.integers(0, 3)), draw(st.booleans())
    place = torch.arange(tokens)
    protected = ((place < prefix) | (cross & (place == tokens - 1))).expand(batch, tokens)
    n_protected = prefix + int(cross)
    guide = torch.full((batch,), tokens - 1)
    if draw(st.booleans()):
        guide = torch.randint(tokens, (batch,), generator=generator)
        protected = protected | (place == guide[:, None])
        n_protected += 1
    valid = None
    if draw(st.booleans()):
        lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        valid = place < lengths
    sizes = None if draw(st.booleans()) else torch.randint(1, 9, (batch, tokens), generator=generator).float()
    attention = random(batch, tokens, tokens).float().softmax(-1)
    view = Seen(
        random(batch, tokens, 8), queries, keys, by_attention(attention), sizes, protected, n_protected, valid, guide,
        attention,
    )  # fmt: skip
    return view, draw(st.integers(1, 30))


@dataclasses.dataclass
class Seen(View):
    """What a reducer sees, and the attention that it does not see whole."""

    attention: Tensor | None = None


def own(view: View, row: int) -> list[int]:
    """The positions of a row's tokens without padding, which are all that it has alone."""
    if view.valid is None:
        return list(range(view.tokens.shape[1]))
    return (view.valid[row] | view.protected[row]).nonzero().flatten().tolist()


def merged_pairs(view: View, row: int, r: int, plan: MergePlan) -> list[tuple[int, int]]:
    """The pairs of a row, as indices of its own tokens. All other tokens that are removed are padding."""
    mine, count = own(view, row), limit(view, r, row)
    sources, destinations = plan.source[row].tolist(), plan.destination[row].tolist()  # type: ignore[union-attr]
    assert not set(sources[count:]) & set(mine)
    assert plan.index[row, sources[count:]].eq(-1).all()
    return [(mine.index(a), mine.index(b)) for a, b in zip(sources[:count], destinations[:count], strict=True)]


def image_of(view: Seen, row: int, reducer: Merging) -> reference.Image:
    heads = view.keys[row].mean(0) if reducer.keys == "mean_heads" else view.keys[row].transpose(0, 1).flatten(1)
    wide = heads.double() if heads.dtype == torch.float64 else heads.float()
    unit = wide / wide.norm(dim=-1, keepdim=True)
    batch = Candidates(_flat(view.keys, reducer), view.protected, view.n_protected)
    similarity = batch.cosines()[row]
    if reducer.ties == "stable":
        similarity = torch.maximum(similarity, similarity.T)
    queries = (
        view.queries[row].mean(0) if reducer.keys == "mean_heads" else view.queries[row].transpose(0, 1).flatten(1)
    )
    assert view.guide is not None
    assert view.attention is not None
    scores = {
        "attention": lambda: reference.attention_importance(view.attention[row]),
        "class_token": lambda: reference.guide_importance(unit, queries, 0),
        "cross_token": lambda: reference.guide_importance(unit, queries, int(view.guide[row])),
    }[reducer.importance or "cross_token"]()
    mine = own(view, row)
    return reference.Image(
        view.tokens[row, mine],
        [1.0] * len(mine) if view.sizes is None else view.sizes[row, mine].tolist(),
        view.protected[row, mine].tolist(),
        similarity[mine][:, mine],
        [scores[i] for i in mine],
    )


def _flat(heads: Tensor, reducer: Merging) -> Tensor:
    return heads.mean(1) if reducer.keys == "mean_heads" else heads.transpose(1, 2).flatten(2)


def limit(view: View, r: int, row: int | None = None) -> int:
    """How many tokens are removed: from the batch, or from a row without its padding."""
    tokens = view.tokens.shape[1] if row is None else len(own(view, row))
    return max(0, min(r, (tokens - view.n_protected) // 2))


@st.composite
def reducers(draw: Any) -> crossget.CrossGET:
    guided, ensemble = draw(st.booleans()), draw(st.sampled_from(["guided", "size", "normalized"]))
    importance = draw(st.sampled_from(["cross_token", "attention", "class_token"]))
    reducer = crossget.CrossGET(
        1,
        matching=draw(st.sampled_from(["complete_graph", "bipartite"])),
        guided_matching=guided,
        importance=importance if guided or ensemble != "size" else None,
        ensemble=ensemble,
        keys=draw(st.sampled_from(["all_heads", "mean_heads"])),
    )
    return reducer.resolved(TOWER)


def check_against_loops(view: View, r: int, reducer: Merging, same_pairs: bool) -> None:
    out = reducer.reduce(view, r)
    count = limit(view, r)
    if count == 0:
        assert out is None
        return
    assert out is not None
    tokens, sizes, plan = out
    assert sizes is not None
    assert tokens.dtype == view.tokens.dtype
    assert plan.destination is not None
    for row in range(len(tokens)):
        image, count = image_of(view, row, reducer), limit(view, r, row)
        pairs = merged_pairs(view, row, r, plan)
        if same_pairs:
            if reducer.matching == "complete_graph":
                expected = reference.complete_graph(image, count, reducer.guided_matching, reducer.ties)
            else:
                expected = reference.bipartite(image, count, reducer.guided_matching, reducer.ties, view.n_protected)
            assert pairs == expected
        rows, expected_sizes = reference.ensemble(image, pairs, reducer.ensemble)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(tokens.dtype, 2e-5)
        stay = torch.isin(plan.kept[row], torch.tensor(own(view, row)))
        torch.testing.assert_close(tokens[row, stay].double(), rows, rtol=tolerance, atol=tolerance)
        assert sizes[row, stay].tolist() == expected_sizes
        assert torch.equal(tokens[row, ~stay], view.tokens[row, plan.kept[row, ~stay]])


def margins(view: View, reducer: Merging) -> bool:
    """Whether rounding cannot decide anything: the guide's scores are exact, or do not take part in the choice."""
    return not reducer.guided_matching


@given(views(), reducers())
@settings(max_examples=150, deadline=None)
def test_fast_equals_loops(case: tuple[View, int], reducer: Merging) -> None:
    view, r = case
    # Scores are rounded differently in the loops, so where they take part in the choice only close calls may differ:
    # those inputs are compared in float64, where none comes close.
    check_against_loops(view, r, reducer, same_pairs=margins(view, reducer) or view.keys.dtype == torch.float64)


@given(views(tied=True), reducers(), st.sampled_from(["torch", "stable"]))
@settings(max_examples=150, deadline=None)
def test_fast_equals_loops_with_ties(case: tuple[View, int], reducer: Merging, ties: Any) -> None:
    view, r = case
    reducer = dataclasses.replace(
        reducer,
        ties=ties,
        guided_matching=False,
        importance=None if reducer.ensemble == "size" else reducer.importance,
    )
    if reducer.keys == "mean_heads":
        reducer = dataclasses.replace(reducer, keys="all_heads")
    check_against_loops(view, r, reducer, same_pairs=True)


@given(views(), st.sampled_from([crossget.CrossGET, crossget.ToMe, crossget.Random, crossget.Ward]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_invariants(case: tuple[View, int], method: type[Merging], tied: bool) -> None:
    view, r = case
    reducer = method(1).resolved(TOWER)
    out = reducer.reduce(view, r)
    if out is None:
        assert limit(view, r) == 0
        return
    tokens, sizes, plan = out
    batch, count, _ = view.tokens.shape
    assert sizes is not None
    assert tokens.shape == (batch, count - limit(view, r), 8)
    before = torch.ones(batch, count) if view.sizes is None else view.sizes
    assert torch.equal(plan.kept, plan.kept.sort(1).values)
    for row in range(batch):
        mine, pairs = own(view, row), merged_pairs(view, row, r, plan)
        everything, dropped = plan.source[row].tolist(), plan.source[row, len(pairs) :]
        sources, destinations = ([mine[pair[i]] for pair in pairs] for i in (0, 1))
        assert len(set(everything)) == len(everything)
        assert not set(everything) & set(destinations)
        assert not view.protected[row, everything + destinations].any()
        assert sizes[row].sum() == before[row].sum() - before[row, dropped].sum()
        kept = plan.kept[row].tolist()
        assert sorted(kept + everything) == list(range(count))
        for new, old in enumerate(kept):
            assert plan.index[row, old] == new
        for source, destination in zip(sources, destinations, strict=True):
            assert plan.index[row, source] == plan.index[row, destination]
        # The way there and back again: every input position gets its group's token.
        back = crossget.unmerge(tokens, plan.index, torch.zeros_like(tokens[:, :1]))[row]
        assert torch.equal(back[kept], tokens[row])
        untouched = [i for i in kept if i not in destinations]
        torch.testing.assert_close(back[untouched], view.tokens[row, untouched], rtol=2e-2, atol=1e-6)


WARDS = [
    crossget.Ward(1), crossget.Ward(1, importance="class_attention"), crossget.Ward(1, matching="ward", key_stride=1),
]  # fmt: skip
METHODS = [
    crossget.CrossGET(1), crossget.ToMe(1), crossget.TopK(1), crossget.Random(1),
    crossget.CrossGET(1, matching="bipartite", ensemble="normalized"), crossget.CrossGET(1, matching="random"),
]  # fmt: skip


@given(views(tied=True), st.sampled_from(METHODS))
@settings(max_examples=150, deadline=None)
def test_a_row_loses_what_it_loses_alone(case: tuple[Seen, int], reducer: Reducer) -> None:
    """Similarities are exact and often equal: padding cannot change a rounding, and must not change how ties break."""
    check_alone(*case, reducer.resolved(TOWER))


@given(views(), st.sampled_from([*WARDS, *METHODS]))
@settings(max_examples=100, deadline=None)
def test_a_row_without_ties_loses_what_it_loses_alone(case: tuple[Seen, int], reducer: Reducer) -> None:
    view, r = case
    view.tokens, view.keys, view.queries = view.tokens.double(), view.keys.double(), view.queries.double()
    if isinstance(reducer, Merging) and reducer.matching != "random":
        reducer = dataclasses.replace(reducer, ties="stable")  # two nearest neighbours tie
    check_alone(view, r, reducer.resolved(TOWER))


def check_alone(view: Seen, r: int, reducer: Reducer) -> None:
    assert view.received is not None
    assert isinstance(view.guide, Tensor)
    guides = [(own(view, row), int(guide)) for row, guide in enumerate(view.guide)]
    view.guide = torch.tensor([guide if guide in mine else mine[0] for mine, guide in guides])  # no padding guides
    out = reducer.reduce(view, r)
    for row in range(len(view.tokens)):
        mine = own(view, row)
        several = (row + 1, *[-1] * 3)  # the random choice depends on the row
        alone = View(
            view.tokens[row, mine].expand(several[:3]), view.queries[row][:, mine].expand(several),
            view.keys[row][:, mine].expand(several), view.received[row, mine].expand(several[:2]),
            None if view.sizes is None else view.sizes[row, mine].expand(several[:2]),
            view.protected[row, mine].expand(several[:2]), view.n_protected, None,
            torch.tensor([mine.index(int(view.guide[row]))] * (row + 1)),
        )  # fmt: skip
        found, count = reducer.reduce(alone, r), limit(view, r, row)
        assert (found is None) == (count == 0)
        if found is None or out is None:
            continue
        tokens, _, plan = out
        assert [mine.index(i) for i in plan.source[row, :count].tolist()] == found[2].source[row].tolist()
        stay = torch.isin(plan.kept[row], torch.tensor(mine))
        torch.testing.assert_close(tokens[row, stay], found[0][row], rtol=2e-2, atol=1e-5)
        index = plan.index[row, mine]
        positions = torch.where(index < 0, index, (stay.long().cumsum(0) - 1)[index])
        assert torch.equal(positions, found[2].index[row])


@given(views(), st.sampled_from(["size", "normalized"]))
@settings(max_examples=50, deadline=None)
def test_constants_are_preserved(case: tuple[View, int], ensemble: Any) -> None:
    view, r = case
    view.tokens = torch.full_like(view.tokens, 3.0)
    out = crossget.CrossGET(1, ensemble=ensemble).resolved(TOWER).reduce(view, r)
    if out is not None:
        torch.testing.assert_close(out[0], torch.full_like(out[0], 3.0))


def test_guided_ensemble_does_not_preserve_constants() -> None:
    """The reference's ensemble is not an average once sizes differ: the reason for `normalized`."""
    torch.manual_seed(0)
    view = View(
        torch.full((1, 12, 4), 3.0), torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8), None,
        torch.arange(1.0, 13.0)[None], torch.zeros(1, 12, dtype=torch.bool), 0, None, torch.tensor([11]),
    )  # fmt: skip
    out = crossget.CrossGET(1).resolved(TOWER).reduce(view, 4)
    assert out is not None
    assert (out[0] - 3.0).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_drops_the_least_important(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    protected = torch.zeros(2, 9, dtype=torch.bool)
    protected[:, 0] = True
    view = View(
        torch.randn(2, 9, 4, dtype=dtype), *torch.randn(2, 2, 2, 9, 8).to(dtype).unbind(0), None, None, protected, 1
    )
    reducer = crossget.TopK(1).resolved(TOWER)
    out = reducer.reduce(view, 3)
    assert out is not None
    tokens, sizes, plan = out
    assert sizes is None
    assert plan.destination is None
    for row in range(2):
        keys = view.keys[row].transpose(0, 1).flatten(1).float()
        queries = view.queries[row].transpose(0, 1).flatten(1)
        score = reference.guide_importance(keys / keys.norm(dim=-1, keepdim=True), queries, 0)
        drop = sorted(range(1, 9), key=lambda i: score[i])[:3]
        assert set(plan.source[row].tolist()) == set(drop)
        assert torch.equal(tokens[row], view.tokens[row, [i for i in range(9) if i not in drop]])
        assert (plan.index[row, drop] == -1).all()


def test_selection_carries_no_gradient_and_values_do() -> None:
    torch.manual_seed(0)
    tokens, queries, keys = (torch.randn(*s, requires_grad=True) for s in [(1, 10, 4), (1, 2, 10, 8), (1, 2, 10, 8)])
    protected = torch.zeros(1, 10, dtype=torch.bool)
    view = View(tokens, queries, keys, None, None, protected, 0, None, torch.tensor([9]))
    out = crossget.CrossGET(1).resolved(TOWER).reduce(view, 3)
    assert out is not None
    out[0].square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(-1) > 0).all()
    assert queries.grad is None
    assert keys.grad is None


def test_random_matching_repeats_itself_and_listens_to_its_seed() -> None:
    torch.manual_seed(0)
    keys = torch.randn(4, 1, 50, 8)
    view = View(torch.randn(4, 50, 4), keys, keys, None, None, torch.zeros(4, 50, dtype=torch.bool), 0)
    plans = [crossget.Random(1, seed=seed).resolved(TOWER).reduce(view, 10) for seed in (0, 0, 1)]
    pairs = [(out[2].source, out[2].destination) for out in plans if out is not None]
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(pairs[0][1], pairs[1][1])  # type: ignore[arg-type]
    assert not torch.equal(pairs[0][0], pairs[2][0])
    assert len({tuple(row.tolist()) for row in pairs[0][0]}) == 4  # rows differ


# Ward -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", ["ward", "ward_graph"])
@given(views(), st.booleans(), st.sampled_from(["tokens", "all_heads", "mean_heads"]))
@settings(max_examples=40, deadline=None)
def test_ward_equals_loops(matching: Any, case: tuple[Seen, int], by_attention: bool, keys: Any) -> None:
    view, r = case
    assert view.attention is not None
    view.received = view.attention[:, 0].double()  # of the class token, in float64: costs are not to come close
    view.tokens, view.keys = view.tokens.double(), view.keys.double()
    importance: Any = "class_attention" if by_attention else None
    reducer = crossget.Ward(1, keys=keys, key_stride=1, matching=matching, importance=importance).resolved(TOWER)
    out = reducer.reduce(view, r)
    count = limit(view, r)
    if out is None:
        assert count == 0
        return
    tokens, sizes, plan = out
    for row in range(len(tokens)):
        at, count = own(view, row), limit(view, r, row)
        mine = [1.0] * len(at) if view.sizes is None else view.sizes[row, at].tolist()
        attention = [sum(mine) * float(a) for a in view.received[row, at]]
        masses = [s + a if by_attention else s for s, a in zip(mine, attention, strict=True)]
        image = reference.Image(
            view.tokens[row, at], mine, view.protected[row, at].tolist(), torch.empty(0), [],
        )  # fmt: skip
        heads = view.keys[row][:, at]
        points = {
            "tokens": view.tokens[row, at],
            "all_heads": heads.transpose(0, 1).flatten(1),
            "mean_heads": heads.mean(0),
        }
        if matching == "ward":
            pairs = reference.ward(image, points[keys], masses, count, view.n_protected)
        else:
            pairs = reference.ward_graph(image, points[keys], masses, count)
        assert merged_pairs(view, row, r, plan) == pairs
        for new, position in enumerate(plan.kept[row].tolist()):
            if position not in at:
                continue
            old = at.index(position)
            group = [old, *(a for a, b in pairs if b == old)]
            mean = sum(masses[i] * view.tokens[row, at[i]] for i in group) / sum(masses[i] for i in group)
            torch.testing.assert_close(tokens[row, new], mean)
            assert sizes is not None
            assert float(sizes[row, new]) == sum(mine[i] for i in group)


@given(views(), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_ward_does_not_see_an_offset(case: tuple[Seen, int], offset: float) -> None:
    view, r = case
    reducer = crossget.Ward(1).resolved(TowerFacts("tower", has_class_token=False))
    moved = dataclasses.replace(view, tokens=view.tokens.double() + offset)
    plans = [reducer.reduce(one, r) for one in (dataclasses.replace(view, tokens=view.tokens.double()), moved)]
    assert (plans[0] is None) == (plans[1] is None)
    for plan, other in [plans]:
        if plan is not None and other is not None:
            assert torch.equal(plan[2].source, other[2].source)
            assert torch.equal(plan[2].index, other[2].index)


@pytest.mark.parametrize("matching", ["ward", "ward_graph"])
def test_ward_joins_the_light_before_the_heavy(matching: Any) -> None:
    """Four tokens at equal distances: the pair whose masses are smaller joins, also where their cosine is no larger."""
    tokens = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [10.0, 1.0], [10.0, 2.0]]])
    protected = torch.zeros(1, 4, dtype=torch.bool)
    for sizes, joined in (
        ([5.0, 5.0, 1.0, 1.0], {2, 3}),
        ([1.0, 1.0, 5.0, 5.0], {0, 1}),
        ([9.0, 1.0, 2.0, 2.0], {0, 1}),
    ):
        view = View(tokens, tokens[None], tokens[None], None, torch.tensor([sizes]), protected, 0)
        reducer = crossget.Ward(1, key_stride=1, matching=matching)
        out = reducer.resolved(TowerFacts("tower", has_class_token=False)).reduce(view, 1)
        assert out is not None
        assert {out[2].source.item(), out[2].destination.item()} == joined  # type: ignore[union-attr]


def test_even_attention_weighs_as_size_does() -> None:
    sizes = torch.tensor([[1.0, 3.0, 2.0]])
    score = importance.by_class_attention(sizes / sizes.sum(), sizes)
    torch.testing.assert_close(score, torch.full((1, 3), 2.0).log())
    assert importance.by_class_attention(torch.zeros(1, 3), sizes).abs().max() == 0


@pytest.mark.parametrize("has_class_token", [True, False])
def test_ward_weighs_by_size_unless_told_otherwise(has_class_token: bool) -> None:
    resolved = crossget.Ward(1).resolved(TowerFacts("t", has_class_token))
    assert (resolved.guided_matching, resolved.ensemble, resolved.needs_attention) == (False, "size", False)
    with pytest.raises(ValueError, match="importance='class_attention' .*class token.* t "):
        crossget.Ward(1, importance="class_attention").resolved(TowerFacts("t", has_class_token=False))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", ["none", "row", "square"])
def test_the_class_token_s_attention_is_what_the_block_computes(fused: bool, bias: str) -> None:
    """The score of the third block, with sizes and a mask of the host's in its attention, fused and eager."""
    place = torch.arange(10)
    mask = {
        "none": None,
        "row": (place // 3).float().view(1, 1, 1, 10),
        "square": (place[:, None] * 4.0 + place // 3).view(1, 1, 10, 10),  # another row for every query
    }[bias]

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            if fused:
                out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)
            else:
                scores = heads @ heads.transpose(-1, -2) * 0.5
                out = (scores if mask is None else scores + mask).softmax(-1) @ heads
            return x + out.transpose(1, 2).flatten(2)

    class Host(torch.nn.Sequential):
        pass

    @crossget.register(Host)
    def adapter(model: Host) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=list(model), width=8, prefix=1, class_token=True)]

    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    x[0, 4], x[0, 5], x[1, 4], x[1, 7] = x[0, 3], x[0, 3], x[1, 3], x[1, 6]  # these merge first
    model = Host(Block(), Block(), Block())
    method = crossget.Ward((1, 1, 2), importance="class_attention", norm_correction=False)
    try:
        with torch.no_grad(), crossget.attach(model, method) as attached, attached.recording():
            model(x)
    finally:
        crossget.unregister(Host)
    _, before, last = attached.records["visual"]
    assert before.sizes.tolist() == [[1, 1, 1, 3, 1, 1, 1, 1], [1, 1, 1, 2, 1, 2, 1, 1]]
    heads = before.features.unflatten(-1, (2, 4)).transpose(1, 2)
    scores = heads[:, :, :1] @ heads.transpose(-1, -2) * 0.5 + before.sizes.log()[:, None, None]
    if mask is not None:  # the members of a group have one value in the class token's row
        members = torch.tensor([[row.index(new) for new in range(8)] for row in before.source.tolist()])
        scores = scores + mask[0, 0, 0][members][:, None, None]
    received = scores.softmax(-1)[:, :, 0].mean(1)
    assert last.score is not None
    torch.testing.assert_close(last.score, (1 + received * 10 / before.sizes).log())


# Fields ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random, crossget.TopK, crossget.Ward])
def test_a_reducer_is_its_configuration(method: type[Reducer]) -> None:
    reducer = method([3, 2, 1])
    assert reducer == method((3, 2, 1))
    assert hash(reducer) == hash(method((3, 2, 1)))
    assert pickle.loads(pickle.dumps(reducer)) == reducer  # our own bytes
    assert dataclasses.replace(reducer, r=4) == method(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reducer.r = 5  # type: ignore[misc]
    resolved = reducer.resolved(TOWER)
    assert resolved.resolved(TOWER) == resolved


def test_the_default_is_the_reference() -> None:
    clip = crossget.CrossGET(16).resolved(TOWER)
    assert dataclasses.asdict(clip) == {
        "r": 16, "matching": "complete_graph", "guided_matching": True, "importance": "cross_token",
        "ensemble": "guided", "keys": "all_heads", "cross_token": True, "proportional_attention": True,
        "norm_correction": False, "class_token_only": False,
        "strip_cross_token": False, "ties": "torch", "key_stride": 1, "seed": None,
    }  # fmt: skip
    llava = crossget.CrossGET(13).resolved(TowerFacts("x", importance="attention", keys="mean_heads"))
    assert (llava.importance, llava.keys) == ("attention", "mean_heads")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crossget.CrossGET(-1), r"r is -1.*cannot be negative"),
        (lambda: crossget.CrossGET([1, -2]), r"r\[1\] is -2"),
        (
            lambda: crossget.CrossGET(1, matching="complet"),
            "matching='complet'.*'complete_graph', 'bipartite', 'ward', 'ward_graph', 'random'",
        ),
        (lambda: crossget.CrossGET(1, importance="cls"), "importance='cls'.*'cross_token', 'attention', 'class_token'"),
        (lambda: crossget.CrossGET(1, ties="reference"), "ties='reference'.*'torch', 'stable'"),
        (lambda: crossget.Ratio(0.7), "share is 0.7.*between 0 and 0.5"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("r", [1.5, "16", None, True])
def test_r_of_another_kind_is_refused(r: Any) -> None:
    with pytest.raises(TypeError, match="r is .*int"):
        crossget.CrossGET(r)


@pytest.mark.parametrize(
    ("reducer", "host", "message"),
    [
        (
            crossget.CrossGET(1, cross_token=False, importance="cross_token"),
            TOWER,
            "needs cross_token=True.*importance='class_token'",
        ),
        (
            crossget.CrossGET(1, importance="class_token"),
            TowerFacts("t", has_class_token=False),
            "needs a class token, and t has none",
        ),
        (crossget.TopK(1), TowerFacts("t", has_class_token=False), "importance='attention'"),
    ],
)
def test_what_cannot_work_on_a_tower_is_refused(reducer: Reducer, host: TowerFacts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reducer.resolved(host)


@pytest.mark.parametrize(("has_class_token", "importance"), [(True, "class_token"), (False, "attention")])
def test_the_cross_token_can_be_left_out_alone(has_class_token: bool, importance: str) -> None:
    resolved = crossget.CrossGET(1, cross_token=False).resolved(TowerFacts("t", has_class_token=has_class_token))
    assert (resolved.cross_token, resolved.importance) == (False, importance)


def test_text_guides_without_cross_token() -> None:
    crossget.CrossGET(1, cross_token=False).resolved(TowerFacts("text", guides_itself=True))


@pytest.mark.parametrize("bias", [None, (1, 1, 1, 9), (3, 1, 9, 9), (3, 4, 1, 9), (1, 4, 9, 9)], ids=str)
@pytest.mark.parametrize("at_once", [1, 81, 200, 324, 700, 10**6])
def test_attention_received_in_parts(bias: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "_CPU_SCORES", at_once)
    queries, keys = torch.randn(2, 3, 4, 9, 5, dtype=torch.float64).unbind(0)
    added = None if bias is None else torch.randn(bias, dtype=torch.float64)
    scores = queries @ keys.mT * 0.3 + (0 if added is None else added)
    expected = by_attention(scores.softmax(-1)).mean(1)
    torch.testing.assert_close(importance.attention_received(queries, keys, added, 0.3), expected)


@settings(deadline=None)
@given(views(), st.integers(1, 2000), st.booleans(), st.sampled_from([complete_graph, ward_graph]))
def test_tiles_choose_as_the_whole_square_does(
    case: tuple[View, int], budget: int, guided: bool, matching: Matching
) -> None:
    view, r = case
    keys = view.keys.transpose(1, 2).flatten(2).double()  # so that how a product is cut up decides nothing
    whole, tiled = (  # and two nearest neighbours tie on every processor
        Candidates(keys, view.protected, view.n_protected, view.valid, "stable", budget=b, sizes=view.sizes)
        for b in (BUDGET, budget)
    )
    r = whole.limit(r)
    importance = view.received.double() if guided and view.received is not None else None
    for one, other in zip(matching(whole, r, importance), matching(tiled, r, importance), strict=True):
        assert torch.equal(one, other)


@settings(deadline=None)
@given(views(tied=True), st.integers(1, 500), st.sampled_from(["torch", "stable"]))
def test_tiles_keep_ties(case: tuple[View, int], budget: int, ties: Any) -> None:
    view, r = case
    keys = view.keys.transpose(1, 2).flatten(2)
    whole, tiled = (
        Candidates(keys, view.protected, view.n_protected, view.valid, ties, budget=b) for b in (BUDGET, budget)
    )
    r = whole.limit(r)
    for one, other in zip(complete_graph(whole, r), complete_graph(tiled, r), strict=True):
        assert torch.equal(one, other)


def test_a_long_sequence_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, budget = 300, 9000
    largest = []
    cosines = Candidates.cosines

    def noted(self: Candidates, *which: Any) -> Tensor:
        made = cosines(self, *which)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(Candidates, "cosines", noted)
    keys = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0))
    protected = torch.zeros(2, tokens, dtype=torch.bool)
    tiled = complete_graph(Candidates(keys, protected, 0, budget=budget), 40)
    assert 4 * max(largest) <= budget  # a tile, and what is made of it
    for one, other in zip(complete_graph(Candidates(keys, protected, 0), 40), tiled, strict=True):
        assert torch.equal(one, other)


@settings(deadline=None)
@given(views(), st.integers(1, 300), st.booleans(), st.sampled_from([complete_graph, ward_graph]))
def test_bands_change_nothing(case: tuple[View, int], band: int, guided: bool, method: Matching) -> None:
    view, r = case
    keys = view.keys.transpose(1, 2).flatten(2)
    importance = view.received if guided else None
    found = []
    for size in (BAND, band):
        with mock.patch("crossget.methods.pairs.BAND", size):
            candidates = Candidates(keys, view.protected, view.n_protected, view.valid, "stable", sizes=view.sizes)
            found.append(method(candidates, candidates.limit(r), importance))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside, `most` at a time; those of kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in given:
                given.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("reducer", [crossget.CrossGET(20), crossget.Ward(20), crossget.ToMe(20)], ids=type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matching_holds_the_similarities_once(
    reducer: Merging, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bands: beside the similarities in float32 there is nothing of their size, in half precision either."""
    monkeypatch.setattr("crossget.methods.pairs.BAND", 1 << 12)
    tokens, width = 256, 32
    heads = torch.randn(1, 2, tokens, width // 2).to(dtype)
    protected = torch.arange(tokens)[None] < 1
    view = View(torch.randn(1, tokens, width).to(dtype), heads, heads, None, None, protected, 1, guide=0)
    reducer = reducer.resolved(dataclasses.replace(TOWER, guides_itself=True))
    with Living() as living:
        reducer.reduce(view, 20)
    pairs = 4 * tokens**2 // (4 if isinstance(reducer, crossget.ToMe) else 1)
    assert pairs <= living.most < 1.6 * pairs + 16 * 4 * tokens * width
