"""Training: cross tokens as parameters of a module, and what is trained."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import crossget
from crossget.core.training import parameter_groups

timm = pytest.importorskip("timm")

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> Any:
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )


def test_registered_cross_tokens_are_parameters_like_any_other() -> None:
    model = vit()
    before = list(model.state_dict())
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    with torch.no_grad():
        attached.cross_tokens["visual"].normal_()
    expected = model(IMAGE)
    parameter = attached.cross_tokens["visual"]
    attached.register_parameters(model, per_block=False)
    assert dict(model.named_parameters())["crossget.visual"] is parameter is attached.cross_tokens["visual"]
    assert list(attached.parameters()) == [parameter]
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)
    attached.unregister_parameters()
    assert list(model.state_dict()) == before
    assert attached.cross_tokens["visual"] is parameter
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)
    attached.unregister_parameters()


def test_what_stands_in_the_module_is_what_is_used() -> None:
    """Sharding puts other parameters in place for the time of a forward, and loading a state dict writes there."""
    model = vit()
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    plain = model(IMAGE)
    attached.register_parameters(model, per_block=False)
    model.crossget.visual = nn.Parameter(torch.ones(3, 32))
    changed = model(IMAGE)
    assert not torch.equal(changed, plain)
    changed.sum().backward()
    assert model.crossget.visual.grad is not None
    state = model.state_dict()
    state["crossget.visual"] = torch.zeros(3, 32)
    model.load_state_dict(state)
    torch.testing.assert_close(model(IMAGE), plain, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_registered_cross_tokens_of_their_own(copied: Any) -> None:
    model = vit()
    crossget.attach(model, crossget.CrossGET(r=2)).register_parameters(model)
    other = copied(model)
    found = list(crossget.attachment(other).parameters())
    assert found == list(other.crossget.parameters())
    assert not {*map(id, found)} & {*map(id, model.crossget.parameters())}
    crossget.attachment(other).detach()
    assert not hasattr(other, "crossget")
    assert hasattr(model, "crossget")


def test_detach_takes_them_out_and_a_pause_does_not() -> None:
    model = vit()
    before = list(model.state_dict())
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    attached.register_parameters(model)
    with attached.paused():
        assert "crossget.visual.0" in model.state_dict()
    assert list(attached.parameters()) == list(model.crossget.parameters())
    attached.detach()
    assert list(model.state_dict()) == before


def test_a_reducer_set_later_brings_its_cross_tokens_along() -> None:
    model = vit()
    attached = crossget.attach(model, crossget.ToMe(r=2))
    attached.register_parameters(model)
    assert not list(model.crossget.parameters())
    attached.reducer = crossget.CrossGET(r=2)
    assert [p.shape for p in attached.parameters()] == [(32,)] * 3
    assert list(attached.parameters()) == list(model.crossget.parameters())


def test_registering_twice_or_where_the_name_is_taken_is_refused() -> None:
    model = vit()
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    taken = nn.Module()
    taken.crossget = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'crossget' already"):
        attached.register_parameters(taken)
    attached.register_parameters(model)
    with pytest.raises(RuntimeError, match="unregister_parameters"):
        attached.register_parameters(model)
    attached.detach()
    with pytest.raises(RuntimeError, match="detached"):
        attached.register_parameters(model)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("train", ["cross_tokens", "prompts", "all"])
def test_only_what_is_chosen_is_trained(train: Any, registered: bool) -> None:
    model = vit()
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    if registered:
        attached.register_parameters(model)
    prompts = [nn.Parameter(torch.zeros(4, 32))]
    groups = parameter_groups(model, attached, train=train, prompts=prompts)
    expected = {"cross_tokens": ["cross_tokens"], "prompts": ["cross_tokens", "prompts"]}
    assert list(groups) == expected.get(train, ["cross_tokens", "prompts", "weights"])
    chosen = {id(p) for parameters in groups.values() for p in parameters}
    everything = [*attached.parameters(), *prompts, *(p for n, p in model.named_parameters() if "crossget" not in n)]
    assert sum(len(parameters) for parameters in groups.values()) == len(chosen)
    assert [p.requires_grad for p in everything] == [id(p) in chosen for p in everything]
    model(IMAGE).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attached.parameters())
    assert (model.head.weight.grad is None) == (train != "all")


def test_nothing_to_train_is_an_error() -> None:
    model = vit()
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, train="cross_tokens")
    assert all(p.requires_grad for p in model.parameters())


def two_towers() -> Any:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, text)


def test_texts_that_several_images_share_are_aligned_with_each_of_them() -> None:
    """Picking the classes' rows by label is what running the text tower once for each image would be."""
    model = two_towers()
    attached = crossget.attach(model, {"visual": crossget.CrossGET(r=2), "text": crossget.CrossGET(r=1)})
    for parameter in attached.parameters():
        nn.init.normal_(parameter, std=0.1)
    classes = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0], [18, 7, 19, 0, 0, 0, 0, 0], [18, 5, 6, 7, 8, 19, 0, 0]])
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([2, 0, 2, 1, 0])
    model.encode_image(images)
    model.encode_text(classes[labels])
    losses = [attached.alignment_loss()]
    model.encode_image(images)
    model.encode_text(classes)
    with pytest.raises(ValueError, match="as many images as texts"):
        attached.alignment_loss()
    losses.append(attached.alignment_loss(rows=labels))
    torch.testing.assert_close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss, list(attached.parameters())) for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_model_without_images_in_prompts_has_no_image_tokens() -> None:
    attached = crossget.attach(vit(), crossget.CrossGET(r=2))
    with pytest.raises(ValueError, match="no tower of .* puts images into prompts"):
        attached.image_tokens  # noqa: B018


def test_one_parameter_per_block_is_the_same_model() -> None:
    model = vit()
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    attached.set_cross_tokens({"visual": values})
    expected = model(IMAGE)
    attached.register_parameters(model)
    assert list(attached.parameters()) == [model.crossget.visual[layer] for layer in range(3)]
    assert torch.equal(attached.cross_tokens["visual"], values)
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)
    model(IMAGE).sum().backward()
    assert all(parameter.grad is not None for parameter in attached.parameters())
    attached.set_cross_tokens({"visual": 2 * values})
    attached.unregister_parameters()
    assert isinstance(attached.cross_tokens["visual"], nn.Parameter)
    assert torch.equal(attached.cross_tokens["visual"], 2 * values)
    attached.reducer = crossget.ToMe(r=2)
    attached.detach()


# timm's groups of parameters ------------------------------------------------------------------------------------------


def of_family(name: str) -> Any:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return getattr(timm.models, name)(**options)


def settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """By name of a parameter: the factor of its learning rate, and its weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group.get("lr_scale"), group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["VisionTransformer", "Eva", "VisionTransformerDistilled", "Beit"])
def test_layer_wise_learning_rates_of_timm_are_those_of_the_blocks(name: str, copied: bool) -> None:
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = of_family(name)
    before = dict(model.__dict__)
    plain = settings(model, param_groups_layer_decay(model, 0.05, model.no_weight_decay()))
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    attached.register_parameters(model)
    model = copy.deepcopy(model) if copied else model
    by_hand = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
    made = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.75).param_groups
    for groups in (by_hand, made):
        found = settings(model, groups)
        for layer in range(3):
            scale = plain[f"blocks.{layer}.norm1.weight"][0]
            assert found.pop(f"crossget.visual.{layer}") == (scale, 0.0)
        assert found == plain, "the others' are as before"
    attached.detach()
    if not copied:
        assert model.__dict__.keys() == before.keys()


@pytest.mark.parametrize("per_block", [False, True])
def test_cross_tokens_have_no_weight_decay_in_timm(per_block: bool) -> None:
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    model = of_family("VisionTransformer")
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    attached.register_parameters(model, per_block)
    by_hand = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    made = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05).param_groups
    for groups in (by_hand, made):
        found = settings(model, groups)
        ours = [decay for name, (_, decay) in found.items() if name.startswith("crossget.")]
        assert ours == [0.0] * (3 if per_block else 1)
        assert found["blocks.0.attn.qkv.weight"][1] == 0.05


def test_one_parameter_for_all_blocks_has_no_layer_wise_learning_rate() -> None:
    model = of_family("VisionTransformer")
    crossget.attach(model, crossget.CrossGET(r=2)).register_parameters(model, per_block=False)
    with pytest.warns(UserWarning, match="per_block=False"):
        model.group_matcher()


def test_matchers_that_are_functions_and_patched_methods() -> None:
    class Own(timm.models.VisionTransformer):  # type: ignore[misc]
        def group_matcher(self, coarse: bool = False) -> Any:
            return lambda name: int(name.split(".")[1]) if name.startswith("blocks.") else 99

    model = Own(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    attached = crossget.attach(model, crossget.CrossGET(r=2))
    attached.register_parameters(model)
    assert [model.group_matcher()(name) for name in ("crossget.visual.2", "blocks.1.x", "head.bias")] == [2, 1, 99]
    attached.unregister_parameters()
    model.no_weight_decay = set
    with pytest.raises(ValueError, match="no_weight_decay is patched"):
        attached.register_parameters(model)
    assert not hasattr(model, "crossget")
    assert "group_matcher" not in model.__dict__
