"""The doctor checks the reducer that it is given, and finds what is wrong."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import crossget
from crossget.core.attach import find_attachment

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5,
}  # fmt: skip


def vit() -> Any:
    torch.manual_seed(0)
    return VisionTransformer(**SIZES).eval()


def failed(diagnosis: Any) -> list[str]:
    return [check.question for check in diagnosis.checks if not check.ok]


def test_the_default_is_ward() -> None:
    diagnosis = crossget.doctor(vit(), IMAGE)
    assert diagnosis.ok
    text = str(diagnosis)
    assert "r = 0 is the untouched model: Ward, largest difference 0.0e+00" in text
    assert "visual 65 61 57" in text
    assert "FAIL" not in text


@pytest.mark.parametrize(
    ("reducer", "tokens"),
    [
        (crossget.CrossGET(4), "66 62 58"),
        (crossget.CrossGET(4, importance="cross_token"), "66 62 58"),
        (crossget.ToMe((9, 0, 3)), "65 56 56"),
        (crossget.TopK(crossget.Ratio(0.25)), "65 49 37"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_healthy_model(reducer: Any, tokens: str) -> None:
    diagnosis = crossget.doctor(vit(), IMAGE, reducer)
    assert diagnosis.ok
    assert f"visual {tokens}" in str(diagnosis)
    assert f"{type(reducer).__name__}, largest difference 0.0e+00" in str(diagnosis)


class Greedy(crossget.ToMe):
    """Removes one token more than it is asked for."""

    def reduce(self, view: Any, r: int) -> Any:
        return super().reduce(view, r + 1)


def test_a_reducer_that_does_not_keep_to_its_schedule_is_found() -> None:
    diagnosis = crossget.doctor(vit(), IMAGE, Greedy(4))
    assert failed(diagnosis) == ["r > 0 reaches the planned tokens"]
    assert "visual 65 60 55 (planned [65, 61, 57])" in str(diagnosis)


def test_an_adapter_that_changes_the_model_is_found() -> None:
    class Changed(VisionTransformer):
        pass

    crossget.register(Changed)(
        lambda m: [crossget.Tower("visual", m.blocks, 48, prefix=1, class_token=True, overrides=[(m.norm, "eps", 0.1)])]
    )
    try:
        diagnosis = crossget.doctor(Changed(**SIZES).eval(), IMAGE)
    finally:
        crossget.unregister(Changed)
    assert failed(diagnosis) == ["r = 0 is the untouched model"]


def test_towers_by_name() -> None:
    vision = open_clip.CLIPVisionCfg(layers=2, width=24, head_width=12, patch_size=8, image_size=32)
    model = open_clip.CLIP(16, vision, open_clip.CLIPTextCfg(12, 60, width=24, heads=2, layers=2)).eval()
    diagnosis = crossget.doctor(model, (IMAGE, torch.randint(1, 60, (2, 12))), {"text": crossget.ToMe(1)})
    assert diagnosis.ok
    assert "visual" not in str(diagnosis)


def test_a_model_that_changes_with_every_run() -> None:
    model = vit()
    model.head.register_forward_hook(lambda module, args, out: out + torch.rand(()))
    diagnosis = crossget.doctor(model, IMAGE)
    assert not diagnosis.ok
    assert failed(diagnosis)[0] == "the model repeats itself"


def test_a_wrong_adapter_is_found() -> None:
    """The adapter names a block that the model does not call. That raises no error, but the plan is not met."""
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
        diagnosis = crossget.doctor(Lazy().eval(), IMAGE, crossget.CrossGET(4))
    finally:
        crossget.unregister(Lazy)
    assert "r > 0 reaches the planned tokens" in failed(diagnosis)
    assert "(planned [65, 61, 57])" in str(diagnosis)


@pytest.mark.parametrize(
    ("reducer", "error", "message"),
    [
        (crossget.Ward(0), ValueError, r"no token.*\['visual'\]: give .*r > 0"),
        ({"visual": crossget.ToMe((0, 0, 0))}, ValueError, "removes no token"),
        ({"text": crossget.ToMe(4)}, ValueError, r"\['text'\].*\['visual'\]"),
        (4, TypeError, "reducer is 4: give a reducer"),
        (crossget.CrossGET((4, 4)), ValueError, "2 layers.*3 blocks"),
    ],
)
def test_what_cannot_be_checked_is_refused(reducer: Any, error: type[Exception], message: str) -> None:
    model = vit()
    with pytest.raises(error, match=message):
        crossget.doctor(model, IMAGE, reducer)
    assert find_attachment(model) is None


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\) first"):
        crossget.doctor(vit().train(), IMAGE)


def test_a_model_without_tensors_in_its_output_is_refused() -> None:
    model = vit()
    model.register_forward_hook(lambda module, args, out: "a text")
    with pytest.raises(ValueError, match="returned no tensor"):
        crossget.doctor(model, IMAGE)


def test_an_attached_model_is_refused_and_stays_attached() -> None:
    model = vit()
    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        with pytest.raises(ValueError, match="already attached"):
            crossget.doctor(model, IMAGE)
        assert attached.is_attached
