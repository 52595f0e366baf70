"""`class_token_only`: the last block runs for one token, where the result of the call depends on that one alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import crossget
from crossget.core.adapters import SingleTokenOutput, Tower
from crossget.methods.reducers import Reducer

VisionTransformer = pytest.importorskip("timm").models.VisionTransformer
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **kwargs}).eval()


def rows_in_last_mlp(model: Any, call: Any) -> int:
    seen: list[int] = []
    hook = model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(int(args[0].shape[1])))
    try:
        call()
    finally:
        hook.remove()
    (count,) = seen
    return count


METHODS = [crossget.CrossGET(8), crossget.ToMe(8), crossget.Ward(8), crossget.TopK(8), crossget.Random(8)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_logits_stay_and_cost_less(method: Reducer) -> None:
    model = small()
    logits, costs = [], []
    for skip in (False, True):
        with torch.no_grad(), crossget.attach(model, replace(method, class_token_only=skip)) as attached:
            rows = rows_in_last_mlp(model, lambda: logits.append(model(IMAGE)))
            assert rows == 1 if skip else rows > 1
            costs.append(crossget.count_flops(model, IMAGE).total)
            assert attached.source["visual"].shape == (2, 65)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    assert costs[1] < costs[0]


@pytest.mark.parametrize("name", ["forward_features", "get_intermediate_layers", "forward_intermediates"])
def test_who_asks_for_features_gets_them(name: str) -> None:
    model, found = small(), []
    for skip in (False, True):
        with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=skip)):
            model(IMAGE)  # which says that it reads one token, and takes it back
            found.append([leaf for leaf in tree_leaves(getattr(model, name)(IMAGE)) if isinstance(leaf, Tensor)])
    assert len(found[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change", [{"global_pool": "avg"}, {"global_pool": ""}, {"global_pool": "map"}, {"class_token": False}]
)
def test_other_heads_read_all_tokens(change: dict[str, Any]) -> None:
    model = small(**change, **({"global_pool": "avg"} if "class_token" in change else {}))
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=None)):
        assert rows_in_last_mlp(model, lambda: model(IMAGE)) > 1


def test_the_head_is_looked_at_in_every_call() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=True)):
        assert rows_in_last_mlp(model, lambda: model(IMAGE)) == 1
        model.reset_classifier(5, "avg")
        assert rows_in_last_mlp(model, lambda: model(IMAGE)) > 1


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=True)):
        with pytest.raises(Exception, match="mat1|shape|size|expected"):
            model(torch.zeros(2, 4, 32, 32))
        assert rows_in_last_mlp(model, lambda: model.forward_features(IMAGE)) > 1


def test_the_last_block_leaves_the_others_as_they_came() -> None:
    model, found = small(), {}
    with torch.no_grad():
        for skip in (False, True):
            reducer = crossget.ToMe((8, 8, 0), class_token_only=skip)
            with crossget.attach(model, reducer) as attached, attached.recording():
                model(IMAGE)
                assert attached.tokens["visual"] == [65, 57, 49]
                features = [record.features for record in attached.records["visual"]]
                assert torch.equal(features[-1][:, 1:], features[-2][:, 1:]) == skip
                found[skip] = features[-1]
    torch.testing.assert_close(found[True][:, 0], found[False][:, 0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[True][:, 1:], found[False][:, 1:])


def test_who_looks_at_the_other_tokens_gets_them() -> None:
    """Code of a subclass, a method replaced on the model, and hooks behind the last block."""

    class Averaging(VisionTransformer):  # type: ignore[misc,valid-type]
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return self.head(x[:, 1:].mean(1))  # type: ignore[no-any-return]

    def check(model: Any) -> None:
        outs = []
        for skip in (False, None):
            with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=skip)):
                outs.append(model(IMAGE))
                assert rows_in_last_mlp(model, lambda: model(IMAGE)) > 1
        assert torch.equal(*outs)

    model = small()
    check(Averaging(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5).eval())
    model.forward_head = lambda x, pre_logits=False: model.head(x[:, 1:].mean(1))
    check(model)
    del model.forward_head
    for part in (model.blocks[-1], model.norm, model.blocks):
        seen: list[Tensor] = []
        hook = part.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        check(model)
        hook.remove()
        assert torch.equal(seen[0], seen[2])  # each check runs the model twice


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_call_that_is_broken_off_leaves_nothing(error: type[BaseException]) -> None:
    model = small()

    def interrupt(*_: Any) -> None:
        raise error

    with torch.no_grad(), crossget.attach(model, crossget.Ward(4)):
        expected = model.forward_features(IMAGE)
        for part in (model.patch_embed, model.blocks[0].mlp, model.blocks[-1].mlp):
            hook = (
                part.fc1.register_forward_pre_hook(interrupt)
                if hasattr(part, "fc1")
                else (part.proj.register_forward_pre_hook(interrupt))
            )
            with pytest.raises(error):
                model(IMAGE)
            hook.remove()
            assert torch.equal(model.forward_features(IMAGE), expected)


def test_gradients_are_the_same() -> None:
    grads = []
    for skip in (False, True):
        model = small()
        model.set_grad_checkpointing(skip)  # whose recomputation has to skip, too
        with crossget.attach(model, crossget.CrossGET(8, class_token_only=skip)) as attached:
            model.train()
            model(IMAGE).square().sum().backward()
            grads.append([p.grad for p in [*model.parameters(), *attached.parameters()]])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_budget_counts_it() -> None:
    model = small()
    found = crossget.fit_schedule(model, IMAGE, flops=0.7, reducer=crossget.ToMe(0, class_token_only=True))
    assert 0.68 < found.measured <= 0.7
    assert found.schedule.r[-1] == 0  # nothing is merged there
    plain = crossget.fit_schedule(model, IMAGE, flops=0.7, reducer=crossget.ToMe(0))
    assert sum(found.schedule.r[:-1]) < sum(plain.schedule.r[:-1])
    out = crossget.fit_schedule(model, IMAGE, tokens_out=30, reducer=crossget.ToMe(0, class_token_only=True))
    assert (out.measured, out.tokens[-1]) == (30, 31)


def test_texts_whose_end_is_read() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 20, "vocab_size": 99, "width": 64, "heads": 2, "layers": 3}
    ids = torch.randint(1, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[0, 5], ids[1, 19], ids[2, 11] = 98, 98, 98
    for make in (open_clip.CLIP, open_clip.CustomTextCLIP):
        model = make(32, vision, text).eval()
        last = (model.text if make is open_clip.CustomTextCLIP else model).transformer.resblocks[-1]
        seen: list[int] = []
        last.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(int(args[0].shape[1])))
        features = []
        for skip in (False, True):
            method = crossget.ToMe(3, class_token_only=skip)
            with torch.no_grad(), crossget.attach(model, {"visual": method, "text": method}):
                features.append((model.encode_text(ids), model.encode_image(IMAGE), *model(IMAGE, ids)))
        assert seen[2:] == [1, 1]
        assert min(seen[:2]) > 1
        for one, other in zip(*features, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Returning(nn.Module):
    """A host whose method, not forward, reads one token; another one calls it and reads all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = small()

    def classify(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.forward_features(x))  # type: ignore[no-any-return]


def test_a_method_of_another_name() -> None:
    @crossget.register(Returning)
    def adapter(model: Returning) -> list[Tower]:
        (tower,) = crossget.find_towers(model.vit)
        tower.single_token_outputs = [SingleTokenOutput(model, lambda model: True, "classify")]
        return [tower]

    try:
        model = Returning().eval()
        with torch.no_grad(), crossget.attach(model, crossget.ToMe(8, class_token_only=True)):
            assert rows_in_last_mlp(model.vit, lambda: model.classify(IMAGE)) == 1
            assert rows_in_last_mlp(model.vit, lambda: model.vit(IMAGE)) > 1
            with pytest.raises(Exception, match="mat1|shape|size|expected"):
                model.classify(torch.zeros(2, 4, 32, 32))
            assert rows_in_last_mlp(model.vit, lambda: model.vit(IMAGE)) > 1
        assert "classify" not in model.__dict__
    finally:
        crossget.unregister(Returning)


@pytest.mark.parametrize("wrong", [{"class_token": False}, {"restore": False}], ids=str)
def test_readouts_need_a_token_to_read(wrong: dict[str, Any]) -> None:
    @crossget.register(Returning)
    def adapter(model: Returning) -> list[Tower]:
        (tower,) = crossget.find_towers(model.vit)
        return [replace(tower, **wrong)]

    try:
        with pytest.raises(RuntimeError, match="'visual' has single_token_outputs.*no such token or restore=False"):
            crossget.attach(Returning(), crossget.ToMe(8))
    finally:
        crossget.unregister(Returning)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="an older Dynamo cannot trace what is watched")
@pytest.mark.slow
def test_compiled() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.Ward(8)):
        expected = model(IMAGE)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGE), expected, rtol=1e-5, atol=1e-5)
        features = torch.compile(model.forward_features, backend="aot_eager")
        assert features(IMAGE).shape == (2, 65, 32)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [crossget.Ward(0), crossget.ToMe(0, class_token_only=True), crossget.Ward((0, 0, 0))]
)
def test_nothing_is_skipped_where_nothing_is_removed(method: Any) -> None:
    class Averaging(VisionTransformer):  # type: ignore[misc,valid-type]
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            logits: Tensor = self.head(x[:, 1:].mean(1))
            return logits

    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    for cls in (VisionTransformer, Averaging):
        torch.manual_seed(0)
        model = cls(**sizes).eval()
        image = torch.randn(2, 3, 32, 32)
        dense = model(image)
        with crossget.attach(model, method) as attached:
            assert torch.equal(model(image), dense)
            assert not attached._towers["visual"].last_record.class_token_only
