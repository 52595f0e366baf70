"""Models in wrappers, and parts of models that are replaced after they are attached."""

from __future__ import annotations

import copy
from typing import Any

import hf_models
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import crossget
from contract import COMPILES

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes).eval()


def in_peft(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))


WRAPPERS: dict[str, Any] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "average": AveragedModel,
    "peft": in_peft,
    "compile in data parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if COMPILES or "compile" not in name])
def test_attach_finds_the_model_in_a_wrapper(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](vit()).eval()
    dense = wrapped(IMAGES)
    with crossget.attach(wrapped, crossget.Ward(8)) as attached:
        reduced = wrapped(IMAGES)
        assert attached.tokens["visual"] == [65, 57, 49]
        assert not torch.equal(reduced, dense)
        with pytest.raises(ValueError, match="already attached"):
            crossget.attach(wrapped, crossget.Ward(8))
    torch.testing.assert_close(wrapped(IMAGES), dense)


class Wrapper(nn.Module):
    """What nobody knows, with a supported model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"backbone": vit()})

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.parts["backbone"].forward_features(image)
        return features[:, 1:].mean(1)


def test_an_unknown_wrapper_is_told_where_the_model_is() -> None:
    model = Wrapper().eval()
    with pytest.raises(TypeError, match=r"VisionTransformer in it.*get_submodule\('parts.backbone'\)"):
        crossget.attach(model, crossget.Ward(8))
    with crossget.attach(model.get_submodule("parts.backbone"), crossget.Ward(8)) as attached:
        model(IMAGES)
        assert attached.tokens["visual"] == [65, 57, 49]
    with crossget.attach(model, crossget.Ward(8), inputs=IMAGES) as attached:
        assert model(IMAGES).shape == (2, 32)
        assert attached.tokens["visual"] == [65, 57, 49]
        assert attached.towers["visual"].blocks.path == "parts.backbone.blocks"  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["visual_projection", "text_projection"])
def test_the_alignment_loss_uses_the_present_projections(part: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config=hf_models.VISION, text_config=hf_models.TEXT, projection_dim=16)
    model = hf_models.built(transformers.CLIPModel, config)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        model(input_ids=ids, pixel_values=IMAGES)
        return attached.alignment_loss()

    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        before = loss()
        new = copy.deepcopy(getattr(model, part))
        new.weight.data.neg_()
        setattr(model, part, new)
        after = loss()
        getattr(model, part).weight.data.neg_()
        assert not torch.allclose(before, after)
        torch.testing.assert_close(loss(), before)


def test_blocks_that_are_cut_after_attach() -> None:
    model = vit()
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(8)) as attached:
        model.blocks = model.blocks[:-1]
        assert model.forward_features(IMAGES).shape == (2, 65, 32)
        assert attached.tokens["visual"] == [66, 58]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_a_copy_of_an_attached_block_among_the_blocks_is_named_and_does_not_outlive_the_attachment(layer: int) -> None:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2).eval()
    images = torch.randn(2, 3, 32, 32)
    dense = model(images)
    attached = crossget.attach(model, crossget.Ward(3))
    reduced = model(images)
    model.blocks[layer] = copy.deepcopy(model.blocks[layer])
    with pytest.raises(RuntimeError, match=r"blocks \[.*\] of tower 'visual' came after crossget.attach"):
        model(images)
    attached.detach()
    assert torch.equal(model(images), dense)
    with crossget.attach(model, crossget.Ward(3)):
        assert torch.equal(model(images), reduced)
