"""What a recorded forward leaves, block by block: against loops over lists."""

import copy
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

import crossget
from crossget.core.state import BlockRecord
from crossget.methods.matching import MergePlan
from crossget.methods.merging import ENSEMBLES
from crossget.methods.reducers import Merging, Reducer, _score

VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 3}
METHODS = [crossget.CrossGET(3), crossget.ToMe(3), crossget.Random(3), crossget.TopK(3)]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=64).eval()  # 16 patches
    return model


@pytest.fixture
def clip() -> Any:
    return open_clip.CLIP(24, VISION, TEXT).eval()  # 16 patches


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[MergePlan]:
    """What was decided, block by block."""
    made: list[MergePlan] = []

    def make(*arguments: Any) -> MergePlan:
        made.append(MergePlan(*arguments))
        return made[-1]

    monkeypatch.setattr("crossget.methods.matching.MergePlan", make)
    return made


def record(model: nn.Module, attached: crossget.Attachment, *inputs: Tensor) -> dict[str, list[BlockRecord]]:
    with torch.no_grad(), attached.recording():
        model(*inputs)
    return attached.records


def followed(plans: list[MergePlan], image: int, tokens: int) -> list[list[int]]:
    """Where each input token is behind each block: one token and one block at a time."""
    behind = []
    places = list(range(tokens))
    for plan in plans:
        sources, kept = plan.source[image].tolist(), plan.kept[image].tolist()
        destinations = [-1] * len(sources) if plan.destination is None else plan.destination[image].tolist()
        moved = [destinations[sources.index(at)] if at in sources else at for at in places]
        places = [kept.index(at) if at >= 0 else -1 for at in moved]
        behind.append(places)
    return behind


class TestHistory:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
    def test_is_what_the_plans_say_one_after_the_other(
        self, method: Reducer, vit: nn.Module, plans: list[MergePlan]
    ) -> None:
        with crossget.attach(vit, method) as attached:
            steps = record(vit, attached, torch.rand(2, 3, 64, 64))["visual"]
        assert len(steps) == len(plans) == 6
        for image in range(2):
            for step, places in zip(steps, followed(plans, image, 17), strict=True):
                assert step.source[image].tolist() == places
                counts = [places.count(token) for token in range(step.features.shape[1])]
                if method.resolved(attached.towers["visual"].facts).cross_token:
                    counts[-1] = 1  # it is no token of the host's
                assert step.sizes[image].tolist() == counts
        assert torch.equal(steps[-1].source, attached.source["visual"])

    def test_has_the_tokens_of_every_block(self, vit: Any) -> None:
        seen: list[Tensor] = []
        with crossget.attach(vit, crossget.CrossGET(2)) as attached:
            hooks = [b.register_forward_hook(lambda _, __, out: seen.append(out.clone())) for b in vit.blocks]
            steps = record(vit, attached, torch.rand(1, 3, 64, 64))["visual"]
            for hook in hooks:
                hook.remove()
            entering = attached.tokens["visual"]
        # Behind every block the host sees its full grid.
        assert [s.features.shape[1] for s in steps] == [*entering[1:], entering[-1] - 2]
        for step, out in zip(steps, seen, strict=True):
            assert torch.equal(crossget.unmerge(step.features, step.source), out)

    @pytest.mark.parametrize("ensemble", ["guided", "size", "normalized"])
    @pytest.mark.parametrize("method", [*METHODS, crossget.ToMe((2, 0, 4, 1, 0, 3))], ids=str)
    def test_weights_say_what_is_in_a_token(self, method: Reducer, ensemble: Any, vit: Any) -> None:
        """Of a model whose blocks add nothing, all that happens to tokens is that they are joined."""
        model = copy.deepcopy(vit)
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        given: list[Tensor] = []
        model.blocks[0].register_forward_pre_hook(lambda block, args: given.append(args[0].clone()))
        if isinstance(method, Merging):
            method = replace(method, ensemble=ensemble)
        with crossget.attach(model, method) as attached:
            steps = record(model, attached, torch.rand(2, 3, 64, 64))["visual"]
        for step in steps:
            assert step.weights is not None
            count = step.features.shape[1] - int(bool(attached.reducers["visual"].cross_token))
            for image in range(2):
                sums = torch.zeros(count, given[0].shape[2])
                total = torch.zeros(count)
                for token, group in enumerate(step.source[image].tolist()):
                    assert group >= 0 or step.weights[image, token] == 0
                    if group >= 0:
                        sums[group] += step.weights[image, token] * given[0][image, token]
                        total[group] += step.weights[image, token]
                torch.testing.assert_close(sums, step.features[image, :count], rtol=1e-4, atol=1e-5)
                if ensemble != "guided" or not isinstance(method, Merging):
                    torch.testing.assert_close(total, torch.ones(count))

    def test_an_ensemble_that_does_not_tell_leaves_no_weights(
        self, vit: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def first(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
            return tokens.gather(1, plan.kept[:, :, None].expand(-1, -1, tokens.shape[2])), sizes.gather(1, plan.kept)

        monkeypatch.setitem(ENSEMBLES, "size", first)
        with crossget.attach(vit, crossget.ToMe((0, 2, 0, 2, 0, 0))) as attached:
            steps = record(vit, attached, torch.rand(1, 3, 64, 64))["visual"]
        assert torch.equal(steps[0].weights, torch.ones(1, 17))
        assert all(step.weights is None for step in steps[1:])

    def test_has_the_scores_that_chose(self, vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        scores: list[Tensor] = []

        original = _score

        def score(*arguments: Any) -> Tensor:
            scores.append(original(*arguments))
            return scores[-1]

        monkeypatch.setattr("crossget.methods.reducers._score", score)
        with crossget.attach(vit, crossget.CrossGET((2, 0, 2, 0, 0, 1))) as attached:
            steps = record(vit, attached, torch.rand(1, 3, 64, 64))["visual"]
            entering = attached.tokens["visual"]
        assert [s.score is not None for s in steps] == [True, False, True, False, False, True]
        found = [s.score for s in steps if s.score is not None]
        assert all(torch.equal(a, b) for a, b in zip(found, scores, strict=True))
        assert [s.score.shape[1] for s in steps if s.score is not None] == [entering[i] for i in (0, 2, 5)]

    def test_a_method_that_asks_for_no_score_has_none(self, vit: nn.Module) -> None:
        with crossget.attach(vit, crossget.ToMe(3)) as attached:
            steps = record(vit, attached, torch.rand(1, 3, 64, 64))["visual"]
        assert all(s.score is None for s in steps)

    def test_both_towers(self, clip: Any) -> None:
        ids = torch.tensor([[1, 5, 6, 7, 49, 0, 0, 0]])
        with crossget.attach(clip, {"visual": crossget.CrossGET(2), "text": crossget.CrossGET(1)}) as attached:
            history = record(clip, attached, torch.rand(1, 3, 32, 32), ids)
        assert {name: len(steps) for name, steps in history.items()} == {"visual": 3, "text": 3}
        assert [int(s.source.max()) for s in history["text"]] == [6, 5, 4]

    def test_costs_nothing_and_says_so_where_nobody_asked(self, vit: nn.Module) -> None:
        with crossget.attach(vit, crossget.CrossGET(2)) as attached:
            with torch.no_grad():
                plain = vit(image := torch.rand(1, 3, 64, 64))
            with pytest.raises(RuntimeError, match=r"not recorded.*attached.recording\(\)"):
                _ = attached.records
            with torch.no_grad(), attached.recording():
                recorded = vit(image)
            assert len(attached.records["visual"]) == 6
            assert torch.equal(plain, recorded)
            with torch.no_grad():
                vit(image)
            with pytest.raises(RuntimeError, match="not recorded"):  # an older forward's is not passed off
                _ = attached.records

    def test_ends_with_its_block_also_after_an_error(self, vit: nn.Module) -> None:
        with crossget.attach(vit, crossget.CrossGET(2)) as attached:
            with pytest.raises(KeyError), attached.recording():
                raise KeyError
            assert not attached._towers["visual"].recording

    def test_gradient_checkpointing_leaves_the_same(self) -> None:
        model: Any = timm.create_model("test_vit", img_size=64)
        image = torch.rand(1, 3, 64, 64)
        with crossget.attach(model, crossget.CrossGET(2)) as attached:
            before = record(model, attached, image)["visual"]
            model.set_grad_checkpointing()
            with attached.recording():
                model(image).sum().backward()
            for a, b in zip(before, attached.records["visual"], strict=True):
                assert torch.equal(a.source, b.source)
                torch.testing.assert_close(a.features, b.features)
                assert not b.features.requires_grad


class TestEmbed:
    """The projection of single tokens into the space of texts."""

    def test_the_class_token_behind_the_last_block_becomes_the_models_own_feature(self, clip: Any) -> None:
        for model in (clip, timm_clip()):
            with crossget.attach(model, {"visual": crossget.ToMe(0)}) as attached, torch.no_grad():
                image = torch.rand(2, 3, 32, 32)
                expected = model.encode_image(image)
                step = record(model.visual, attached, image)["visual"][-1]
                embed = attached.towers["visual"].embed
                assert embed is not None
                torch.testing.assert_close(embed(step.features)[:, 0], expected)

    def test_so_it_does_in_transformers(self) -> None:
        from transformers import CLIPConfig, CLIPModel

        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        vision, texts = {**small, "image_size": 32, "patch_size": 8}, {**small, "vocab_size": 50}
        model: Any = CLIPModel(CLIPConfig(vision_config=vision, text_config=texts, projection_dim=24)).eval()
        image = torch.rand(2, 3, 32, 32)
        with crossget.attach(model, {"visual": crossget.ToMe(0)}) as attached, torch.no_grad():
            with attached.recording():
                pooled = model.vision_model(image).pooler_output
            embed = attached.towers["visual"].embed
            assert embed is not None
            own = embed(attached.records["visual"][-1].features)[:, 0]
            torch.testing.assert_close(own, model.visual_projection(pooled))


def timm_clip() -> Any:
    """An image tower of timm's, behind open_clip's projection."""
    vision = {"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "", "timm_proj": "linear"}
    return open_clip.CustomTextCLIP(24, {**vision, "timm_pool": "token"}, TEXT).eval()
