"""Cross tokens that an optimiser, or a copy of the weights, leaves out."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import crossget
from crossget.core.updates import UntrainedWarning

timm = pytest.importorskip("timm")

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd without a rate": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


def vit() -> Any:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    nn.init.normal_(model.head.weight)  # zero weights would let no gradient through
    return model


def attached_vit() -> tuple[Any, crossget.Attachment]:
    model = vit()
    return model, crossget.attach(model, crossget.CrossGET(r=2))


def forward_backward(model: Any) -> None:
    model(IMAGE).square().sum().backward()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[str]:
    """The messages of the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            forward_backward(model)
            optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in found if issubclass(one.category, UntrainedWarning)]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_an_optimiser_without_the_cross_tokens_is_noticed_once(make: Any) -> None:
    model, _ = attached_vit()
    optimizer = make(model.parameters())
    (message,) = train(model, optimizer)
    assert "tower 'visual'" in message
    assert "register_parameters(model) before the optimiser is made" in message
    assert train(model, optimizer) == []


@pytest.mark.parametrize("registered", [False, True, "per block"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_an_optimiser_with_them_is_not(make: Any, registered: Any) -> None:
    model, attached = attached_vit()
    if registered:
        attached.register_parameters(model, per_block=registered == "per block")
    found = {id(p): p for p in (*model.parameters(), *attached.parameters())}
    assert train(model, make(list(found.values()))) == []


@pytest.mark.parametrize("per_block", [False, True])
def test_registering_after_the_optimiser_was_made_is_noticed(per_block: bool) -> None:
    model, attached = attached_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    attached.register_parameters(model, per_block)
    assert len(train(model, optimizer)) == 1


def test_both_towers_of_a_model_make_one_warning() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(16, vision, text)
    attached = crossget.attach(model, {"visual": crossget.CrossGET(r=2), "text": crossget.CrossGET(r=1)})
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0], [18, 7, 19, 0, 0, 0, 0, 0]])

    def step() -> None:
        image, text_features = model.encode_image(IMAGE), model.encode_text(ids)
        ((image * text_features).sum() + attached.alignment_loss()).backward()
        optimizer.step()

    step()
    with pytest.warns(UntrainedWarning, match="tower 'visual'"):
        step()
    step()


def accumulated(model: Any, attached: crossget.Attachment) -> None:
    optimizer = torch.optim.AdamW([*model.parameters(), *attached.parameters()])
    for step in range(4):
        forward_backward(model)
        if step % 2:
            optimizer.step()


def loaded_after_a_backward(model: Any, attached: crossget.Attachment) -> None:
    state = {name: value + 1 for name, value in model.state_dict().items()}
    forward_backward(model)
    model.load_state_dict(state)
    forward_backward(model)


def initialised_after_a_forward(model: Any, attached: crossget.Attachment) -> None:
    model(IMAGE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    forward_backward(model)


def frozen_tower(model: Any, attached: crossget.Attachment) -> None:
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(3):
        forward_backward(model)
        optimizer.step()


def frozen_cross_tokens(model: Any, attached: crossget.Attachment) -> None:
    for parameter in attached.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        forward_backward(model)
        optimizer.step()


def without_gradients(model: Any, attached: crossget.Attachment) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    forward_backward(model)
    optimizer.step()
    with torch.no_grad():
        model(IMAGE)
    model.eval()(IMAGE)


def another_method(model: Any, attached: crossget.Attachment) -> None:
    attached.reducer = crossget.ToMe(r=2)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        forward_backward(model)
        optimizer.step()


@pytest.mark.parametrize(
    "use",
    [
        accumulated, loaded_after_a_backward, initialised_after_a_forward, frozen_tower, frozen_cross_tokens,
        without_gradients, another_method,
    ],
)  # fmt: skip
def test_nothing_is_said_about(use: Any) -> None:
    """Warnings are errors in the tests."""
    use(*attached_vit())


def test_frozen_first_blocks_hide_nothing() -> None:
    model, _ = attached_vit()
    model.blocks[:2].requires_grad_(False)
    assert len(train(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))) == 1


def test_recomputed_blocks_and_copies() -> None:
    model, _ = attached_vit()
    model.set_grad_checkpointing()
    model(IMAGE)
    other = copy.deepcopy(model)
    assert len(train(other, torch.optim.SGD(other.parameters(), lr=0.1))) == 1
    assert len(train(model, torch.optim.SGD(model.parameters(), lr=0.1))) == 1


# Copies: the table in docs/training.md --------------------------------------------------------------------------------


def ema(model: Any) -> Any:
    from timm.utils import ModelEmaV3

    other = ModelEmaV3(model, decay=0.0)
    return other, lambda: other.update(model)


def averaged(model: Any) -> Any:
    other = AveragedModel(model)
    return other, lambda: other.update_parameters(model)


@pytest.mark.parametrize("registered", [False, True, "per block"])
@pytest.mark.parametrize("make", [ema, averaged])
def test_averages_of_weights_have_registered_cross_tokens_only(make: Any, registered: Any) -> None:
    model, attached = attached_vit()
    if registered:
        attached.register_parameters(model, per_block=registered == "per block")
    other, update = make(model)
    attached.set_cross_tokens({"visual": torch.ones(3, 32)})
    update()
    expected = torch.ones(3, 32) if registered else torch.zeros(3, 32)
    assert torch.equal(crossget.attachment(other).cross_tokens["visual"].detach(), expected)


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("registered", [False, True, "per block"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_a_copy_has_the_values_in_tensors_of_its_own(copied: Any, registered: Any) -> None:
    model, attached = attached_vit()
    attached.set_cross_tokens({"visual": torch.randn(3, 32, generator=torch.Generator().manual_seed(1))})
    if registered:
        attached.register_parameters(model, per_block=registered == "per block")
    other = crossget.attachment(copied(model))
    assert torch.equal(other.cross_tokens["visual"], attached.cross_tokens["visual"])
    own = {parameter.data_ptr() for parameter in attached.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in other.parameters())


@pytest.mark.parametrize("registered", [False, True, "per block"])
def test_casts_and_shared_memory_reach_registered_cross_tokens_only(registered: Any) -> None:
    model, attached = attached_vit()
    if registered:
        attached.register_parameters(model, per_block=registered == "per block")
    model.share_memory()
    assert all(parameter.is_shared() == bool(registered) for parameter in attached.parameters())
    model.to(torch.float64)
    expected = torch.float64 if registered else torch.float32
    assert all(parameter.dtype == expected for parameter in attached.parameters())
    assert model(IMAGE.double()).dtype == torch.float64, "the forward casts them"
    model.to("meta")
    assert all(parameter.is_meta == bool(registered) for parameter in attached.parameters())


def test_a_state_dict_has_registered_cross_tokens_only() -> None:
    model, attached = attached_vit()
    before = set(model.state_dict())
    attached.register_parameters(model)
    assert set(model.state_dict()) - before == {f"crossget.visual.{layer}" for layer in range(3)}
    attached.unregister_parameters()
    assert set(model.state_dict()) == before
