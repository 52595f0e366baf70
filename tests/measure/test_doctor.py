from __future__ import annotations

import pytest
import torch
from torch import nn

import crossget

timm = pytest.importorskip("timm")
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()


def test_a_healthy_model() -> None:
    diagnosis = crossget.doctor(vit(), IMAGE)
    assert diagnosis.ok
    text = str(diagnosis)
    assert "r = 0 is the untouched model: largest difference 0.0e+00" in text
    assert "visual 66 62 58" in text
    assert "FAIL" not in text


def test_a_model_that_changes_with_every_run() -> None:
    model = vit()
    model.head.register_forward_hook(lambda module, args, out: out + torch.rand(()))
    diagnosis = crossget.doctor(model, IMAGE)
    assert not diagnosis.ok
    assert next(check.question for check in diagnosis.checks if not check.ok) == "the model repeats itself"


def test_a_wrong_adapter_is_found() -> None:
    """An adapter that leaves out a block: no error, but the plan is not met by what the model does."""
    model = vit()

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.inner.patch_embed(image)
            for block in self.inner.blocks[:2]:
                x = block(x)
            return x.mean(1)

    crossget.register(Lazy)(lambda m: [crossget.Tower("visual", list(m.inner.blocks), 48)])
    try:
        diagnosis = crossget.doctor(Lazy().eval(), IMAGE)
    finally:
        crossget.unregister(Lazy)
    assert not diagnosis.ok
    assert "(planned [65, 61, 57])" in str(diagnosis)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\) first"):
        crossget.doctor(vit().train(), IMAGE)


def test_an_attached_model_is_refused_and_stays_attached() -> None:
    model = vit()
    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        with pytest.raises(ValueError, match="already attached"):
            crossget.doctor(model, IMAGE)
        assert attached.is_attached
