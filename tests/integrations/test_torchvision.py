"""torchvision: its ViT has no adapter. The tower is found, and its configuration tells the size of the images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

import crossget
from crossget.core.discovery import DiscoveryWarning
from crossget.methods.reducers import Reducer

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit() -> nn.Module:
    """A ViT of 64 patches and a class token, with noise on every parameter: torchvision's head is zero at first."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_the_tower_is_found_without_inputs(vit: nn.Module) -> None:
    (tower,) = crossget.find_towers(vit)
    assert str(tower) == "visual: 4 blocks (EncoderBlock), prefix 1, class token"
    assert list(tower.blocks) == list(vit.get_submodule("encoder.layers").children())


@pytest.mark.parametrize(
    "method", [crossget.Ward(4), crossget.ToMe(4), crossget.CrossGET(4)], ids=lambda one: repr(one)
)
def test_attach_needs_no_inputs(vit: nn.Module, method: Reducer) -> None:
    with torch.no_grad():
        dense = vit(IMAGES)
        with pytest.warns(DiscoveryWarning, match=r"VisionTransformer has no adapter"):
            attached = crossget.attach(vit, method)
        reduced = vit(IMAGES)
        extra = int(bool(method.cross_token))
        assert attached.tokens == {"visual": [65 + extra - 4 * layer for layer in range(4)]}
        attached.detach()
        assert torch.equal(vit(IMAGES), dense)
    assert reduced.shape == dense.shape
    assert not torch.equal(reduced, dense)


def test_windows_are_refused() -> None:
    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    ).eval()
    with pytest.raises(TypeError, match=r"features\.1: it gets an image grid"):
        crossget.attach(model, crossget.Ward(2), inputs=IMAGES)
