"""Image features scored by the attention that their tokens receive in the image tower."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget import Ward
from crossget.core import tower_attention as ta
from crossget.core.attach import find_connector
from crossget.core.connector import FACTS, reduce_features
from crossget.core.tower_attention import ScoredTower
from crossget.demo import connector_models
from crossget.demo.connector_checks import Example
from crossget.integrations import hf_connector
from crossget.measure.generation import count_stages
from crossget.methods import importance
from crossget.methods.importance import mean_attention
from tests.support import hf_models
from tests.support.commits import commit

pytestmark = pytest.mark.skipif(hf_models.VERSION < (5, 18), reason="models take no encoded images before 5.18")

TOP = crossget.TopK(crossget.Keep(0.4), importance="tower_attention")
# With a class token, by SigLIP, with tiles and newlines, with shuffled pixels, packed, packed in windows, deepstack.
FAMILIES = ("llava", "gemma3", "llava_next", "internvl", "smolvlm", "mistral3", "qwen2_5_vl", "qwen3_vl")
SAMPLE = 6  # families of a slow test


@functools.cache
def example(family: str) -> Example:
    return connector_models.example(family)


def scored(prompts: Example, reducer: crossget.Reducer = TOP) -> tuple[list[Tensor], Any]:
    """The attention [n] of each unit of a forward, and its handle."""
    seen: list[Tensor] = []
    with crossget.attach(prompts.model, {"connector": reducer}) as attached, torch.no_grad():
        place: Any = attached.connector
        reduce = place.reduce

        def watched(features: Tensor, **given: Any) -> Any:
            seen.append(given["received"])
            return reduce(features, **given)

        place.reduce = watched
        prompts.model(**prompts.inputs)
    return seen, place.last_record.units


def encoding(prompts: Example) -> dict[str, Any]:
    """The arguments of `get_image_features`."""
    names = inspect.signature(prompts.connector.parts.get_image_features).parameters
    return {name: value for name, value in prompts.inputs.items() if name in names} | {"return_dict": True}


def tower(prompts: Example) -> ScoredTower:
    found = prompts.connector.scored
    assert isinstance(found, ScoredTower)
    return found


def by_hand(prompts: Example) -> Tensor:
    """[B, T] or [1, N] the attention in one block, from its queries and keys."""
    block: Any = tower(prompts).blocks[tower(prompts).number]
    seen: dict[str, Any] = {}

    def keep(name: str, *given: Any) -> None:
        seen.setdefault(name, given[2])  # the output of a projection, the arguments of the block

    hooks = [block.register_forward_pre_hook(partial(keep, "block"), with_kwargs=True)]
    for path, part in block.named_modules():
        name = path.rpartition(".")[2]
        if name in ("q_proj", "k_proj", "qkv"):
            hooks.append(part.register_forward_hook(partial(keep, name)))
    with torch.no_grad():
        prompts.connector.parts.get_image_features(**encoding(prompts))
    for hook in hooks:
        hook.remove()
    vision = prompts.model.config.vision_config
    heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    if "qkv" not in seen:
        q, k = (seen[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        return weights[:, 0] if tower(prompts).has_class_token else weights.mean(1)
    q, k, _ = seen["qkv"].unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    cos, sin = seen["block"]["position_embeddings"]
    half = q.shape[-1] // 2
    q, k = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (q, k))
    lengths = prompts.inputs["image_grid_thw"].prod(1).tolist()
    parts = zip(q.split(lengths, 1), k.split(lengths, 1), strict=True)
    return torch.cat([(a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1).mean((0, 1)) for a, b in parts])[None]


def by_gradients(prompts: Example, attention: Tensor) -> list[Tensor]:
    """The mean attention of the tokens that each feature is made of, [n] per unit; 0 if it is made of none.

    Which these are is told by gradients, through the host's own modules.
    """
    connector, arguments, blocks = prompts.connector, encoding(prompts), tower(prompts).blocks
    channels = next(p for p in blocks[0].parameters() if p.dim() == 1).shape[0]
    packed = len(attention) == 1 and "image_grid_thw" in prompts.inputs
    shape = attention.shape[packed:]
    tokens = torch.randn(*shape, channels, generator=torch.Generator().manual_seed(5)).requires_grad_()
    for block in blocks:
        block.forward = lambda *_, **__: tokens  # type: ignore[method-assign, assignment]
    try:
        entries = connector.features(connector.parts.get_image_features(**arguments))
    finally:
        for block in blocks:
            del block.forward
    features = torch.cat(entries)
    direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(6))
    rows = [torch.autograd.grad(one @ direction, tokens, retain_graph=True)[0] for one in features]
    influence = torch.stack([row.abs().sum(-1).flatten() for row in rows])
    members = (influence > 1e-6 * influence.max()).float()
    assert 1 <= members.sum(1).max() <= 16
    means = members @ attention.flatten() / members.sum(1).clamp(min=1)
    return list(means.split([len(entry) for entry in entries]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral3"])
def test_the_features_whose_tokens_get_most_attention_stay(family: str) -> None:
    prompts = example(family)
    with torch.no_grad():
        dense = prompts.model(**prompts.inputs).logits
    wanted = by_gradients(prompts, by_hand(prompts))
    received, units = scored(prompts)
    if prompts.connector.units == "run":  # its entries are rows
        wanted = [*wanted[:1], *wanted[1].chunk(2)]
    assert len(received) == len(units) == len(wanted) == 3
    for attention, expected, unit in zip(received, wanted, units, strict=True):
        torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-7)
        assert unit.kept.tolist() == sorted(expected.topk(len(unit.kept)).indices.tolist())
    with torch.no_grad():
        assert torch.equal(prompts.model(**prompts.inputs).logits, dense)


def agrees(family: str) -> None:
    """Any attention gets to the features that its tokens become, and all of it is shared by the images' features."""
    prompts = example(family)
    received, _ = scored(prompts)
    attention = torch.cat(tower_attention(prompts), -1)
    wanted = torch.cat(by_gradients(prompts, attention))
    torch.testing.assert_close(torch.cat(received), wanted, rtol=1e-4, atol=1e-7)
    assert wanted.std() > 0


def tower_attention(prompts: Example) -> list[Tensor]:
    """[B, T] of each attention of the block, as it is read."""
    seen: list[list[Tensor]] = []
    made = ta._Watching.__init__

    def init(self: Any, *given: Any) -> None:
        made(self, *given)
        seen.append(self.received)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ta._Watching, "__init__", init)
        with crossget.attach(prompts.model, {"connector": TOP}):
            prompts.model(**prompts.inputs)
    return seen[0]


def test_one_image_sees_itself_in_a_packed_tower() -> None:
    """Pixtral's: one attention for all images, with a mask."""
    agrees("mistral3")


@pytest.mark.slow
def test_all_families_that_are_scored() -> None:
    there = sorted(set(hf_connector._SCORED) & set(connector_models.families()))
    for family in random.Random(commit()).sample(there, SAMPLE):
        agrees(family)


def test_eager_attention_scores_as_sdpa_does() -> None:
    for family in ("llava", "qwen2_5_vl"):
        prompts = example(family)
        first, _ = scored(prompts)
        vision = (prompts.model.model.vision_tower if family == "llava" else prompts.model.model.visual).config
        vision._attn_implementation = "eager"
        try:
            again, _ = scored(prompts)
        finally:
            vision._attn_implementation = "sdpa"
        for one, other in zip(first, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_padding_of_an_image_scores_nothing() -> None:
    queries, keys = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    real = torch.arange(6)[None] < torch.tensor([[6], [4]])
    found = mean_attention(queries, keys, torch.zeros(2, 1, 1, 6).masked_fill(~real[:, None, None], -torch.inf), 0.5)
    square = torch.zeros(2, 1, 6, 6).masked_fill(~real[:, None, None], -torch.inf)
    assert torch.equal(mean_attention(queries, keys, square, 0.5), found)
    for row, count in enumerate((6, 4)):
        alone = mean_attention(queries[row, None, :, :count], keys[row, None, :, :count], None, 0.5)
        torch.testing.assert_close(found[row, :count], alone[0])
        assert not found[row, count:].any()


def test_scores_are_computed_for_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(2, 4, 7, 4), torch.randn(2, 2, 7, 4)
    whole = mean_attention(queries, keys, None, 0.5)
    weights = (queries @ keys.repeat_interleave(2, 1).transpose(-1, -2) * 0.5).softmax(-1)
    torch.testing.assert_close(whole, weights.mean((1, 2)))
    monkeypatch.setattr(importance, "_MEAN_SCORES", 3 * 2 * 4 * 7)
    torch.testing.assert_close(mean_attention(queries, keys, None, 0.5), whole)


def test_attention_of_merged_features_is_summed() -> None:
    x, attention = torch.randn(12, 8), torch.rand(12)
    seen: list[Tensor] = []

    class Half(Ward):
        def reduce(self, view: Any, r: int) -> Any:
            assert view.received is not None
            seen.append(view.received[0])
            return super().reduce(view, r)

    method = Half(crossget.Keep(3), importance="tower_attention").resolved(FACTS)
    unit = reduce_features(method, x, 3, received=attention)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], attention / attention.sum())
    torch.testing.assert_close(seen[1].sum(), torch.tensor(1.0))
    one = reduce_features(dataclasses.replace(method, r=6), x, 6, received=attention)
    torch.testing.assert_close(
        seen[1], torch.zeros(6).index_add_(0, one.source, attention / attention.sum()), rtol=1e-5, atol=1e-7
    )
    other = reduce_features(method, x, 3, received=attention.flip(0) ** 4)
    assert not torch.equal(unit.source, other.source)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generation_and_rows_alone(family: str) -> None:
    prompts = example(family)
    with crossget.attach(prompts.model, {"connector": TOP}) as attached, torch.no_grad():
        settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        answers = prompts.model.generate(**prompts.inputs, **settings)[:, -3:]
        source = attached.source["connector"]
        for step in range(3):
            more = prompts.inputs | {
                "input_ids": torch.cat([prompts.ids, answers[:, :step]], 1),
                "attention_mask": F.pad(prompts.mask, (0, step), value=1),
            }
            more |= {n: F.pad(more[n], (0, step)) for n in ("mm_token_type_ids",) if n in more}
            assert torch.equal(prompts.model(**more).logits[:, -1].argmax(-1), answers[:, step])
            assert torch.equal(attached.source["connector"], source)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on how it checkpoints
def test_gradients_with_checkpointing() -> None:
    prompts = example("llava")
    model = copy.deepcopy(prompts.model).train()
    found = []
    with crossget.attach(model, {"connector": TOP}) as attached:
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(**prompts.inputs, labels=prompts.labels).loss.backward()
            weights = [p.grad for name, p in model.named_parameters() if "vision_tower" in name and "mlp" in name]
            found.append([g.clone() for g in weights if g is not None])
            assert attached.tokens["connector"][0] == (64, 26)
    assert sum(float(g.abs().sum()) for g in found[0]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_training_in_half_precision_with_dropout(family: str) -> None:
    """The scores pass through the host in float32, and no dropout changes them."""
    prompts = copy.copy(example(family))
    prompts.model = copy.deepcopy(prompts.model).to(torch.bfloat16)
    prompts.connector = find_connector(prompts.model)
    images = {name: value.bfloat16() for name, value in prompts.inputs.items() if value.is_floating_point()}
    prompts.inputs = prompts.inputs | images
    wanted, _ = scored(prompts)
    for module in prompts.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    projector = getattr(prompts.model.model, "multi_modal_projector", None)
    if family == "llava_next":
        projector.act = nn.Sequential(projector.act, nn.Dropout(0.9))
    prompts.model.train()
    received, units = scored(prompts)
    for one, other, unit in zip(received, wanted, units, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
        assert len(unit.kept) == max(1, round(0.4 * len(one)))


def test_an_offloaded_model() -> None:
    """Its weights are on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    prompts = copy.copy(example("llava"))
    wanted, _ = scored(prompts)
    prompts.model = copy.deepcopy(prompts.model)
    accelerate.cpu_offload(prompts.model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in prompts.model.parameters())
    for one, other in zip(scored(prompts)[0], wanted, strict=True):
        assert torch.equal(one, other)


def test_an_error_in_the_block_leaves_no_trace() -> None:
    prompts = example("llava")
    block: Any = tower(prompts).blocks[tower(prompts).number]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with crossget.attach(prompts.model, {"connector": TOP}), torch.no_grad():
        expected = prompts.model(**prompts.inputs).logits
        hook = block.mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            prompts.model(**prompts.inputs)
        hook.remove()
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(prompts.model(**prompts.inputs).logits, expected)
    assert not block._forward_hooks.keys() & block._forward_pre_hooks.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # of Dynamo
def test_a_compiled_tower() -> None:
    """Its graph is whole, and it shows no attention, which is said. A compiled model shows it."""
    prompts = example("llava")
    model = copy.deepcopy(prompts.model)
    with torch.no_grad():
        with crossget.attach(model, {"connector": TOP}):
            expected = model(**prompts.inputs).logits
            torch._dynamo.reset()
            assert torch.allclose(torch.compile(model, backend="eager")(**prompts.inputs).logits, expected, atol=1e-4)
        torch._dynamo.reset()
        model.model.vision_tower.compile(backend="eager", fullgraph=True)
        with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(0.4))}) as attached:
            model(**prompts.inputs)
            attached.reducer = TOP
            with pytest.raises(RuntimeError, match="showed no attention"):
                model(**prompts.inputs)
    torch._dynamo.reset()


def test_counted_stages() -> None:
    """On the meta device no feature has a score."""
    with torch.device("meta"):
        model = copy.deepcopy(example("llava").model).to("meta")
    with crossget.attach(model, {"connector": TOP}):
        stages = count_stages(model, 8)
    assert stages.reduced is not None
    assert stages.reduced.image_tokens == 26


def test_what_has_no_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="for image features behind the connector, and not for"):
        crossget.attach(example("llava").model, crossget.TopK(4, importance="tower_attention"))
    both = {"visual": crossget.Ward(2), "connector": TOP}
    for family in ("llava", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="cannot be had: it is reduced, too"):
            crossget.attach(example(family).model, both)
    with pytest.raises(ValueError, match="it is not known how its tokens become features; use another importance"):
        crossget.attach(example("ovis2").model, {"connector": TOP})
    prompts = example("llava")
    encoded: list[int] = []
    hook = prompts.model.model.vision_tower.register_forward_pre_hook(lambda *_: encoded.append(1))
    with crossget.attach(prompts.model, {"connector": TOP}):
        given = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
        with pytest.raises(ValueError, match="got encoded images as mm_encoder_outputs"):
            prompts.model(**given, mm_encoder_outputs={"image": prompts.encoded})
    vision = prompts.model.model.vision_tower.config
    vision._attn_implementation = "flex_attention"
    try:
        with pytest.raises(ValueError, match="its kernel is 'flex_attention'"):
            crossget.attach(prompts.model, {"connector": TOP})
    finally:
        vision._attn_implementation = "sdpa"
    hook.remove()
    assert not encoded


def test_methods_that_drop_need_no_scores_of_the_language_model() -> None:
    """They have no sizes to add, so linear attention and any kernel will do."""
    prompts = example("qwen3_5")
    assert isinstance(prompts.connector.attentions, str)
    for method in (TOP, crossget.MaxMin(crossget.Keep(0.4)), crossget.Determinantal(crossget.Keep(0.4))):
        with crossget.attach(prompts.model, {"connector": method}) as attached, torch.no_grad():
            prompts.model(**prompts.inputs)
            assert attached.tokens["connector"] == [(16, 6), (8, 3), (8, 3)]
