"""How many tokens `output_hidden_states=True` shows, for each kind of tower: the table of docs/transformers.md."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch

import crossget

transformers = pytest.importorskip("transformers")

PIXELS = torch.randn(2, 3, 32, 32)
DENSE = 17  # a class token and 16 patches
R = 2


def hidden(tower: Any, **inputs: Any) -> list[int]:
    with torch.no_grad():
        return [states.shape[1] for states in tower(PIXELS, output_hidden_states=True, **inputs).hidden_states]


@pytest.mark.parametrize(
    ("reducer", "last"),
    [
        (crossget.CrossGET(R), {"clip": DENSE, "blip": 9, "llava": 10}),
        (crossget.CrossGET(R, strip_cross_token=True), {"llava": 9}),
        (crossget.Ward(R), {"clip": DENSE, "blip": 9, "llava": 9}),
    ],
    ids=["CrossGET", "stripped", "Ward"],
)
def test_tokens_by_kind_of_tower(reducer: Any, last: dict[str, int]) -> None:
    models: dict[str, Any] = {
        "clip": hf_models.built(transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**hf_models.VISION)),
        "blip": hf_models.built(
            transformers.BlipModel,
            transformers.BlipConfig(vision_config=hf_models.VISION, text_config=hf_models.TEXT),
            "eager",
        ),
        "llava": hf_models.llava(),
    }
    towers: dict[str, Any] = {"blip": lambda m: m.vision_model, "llava": lambda m: getattr(m, "model", m).vision_tower}
    for name, behind in last.items():
        with crossget.attach(models[name], reducer):
            tower = towers.get(name, lambda m: m)(models[name])
            assert hidden(tower) == [DENSE, DENSE, DENSE, DENSE, behind], name


@pytest.mark.skipif(hf_models.VERSION < (4, 50), reason="LLaVA takes one layer before 4.50")
def test_several_layers_of_llava_are_on_the_grid() -> None:
    model = hf_models.llava(vision_feature_layer=[-2, -1])
    parts = getattr(model, "model", model)
    with crossget.attach(model, crossget.CrossGET(R)), torch.no_grad():
        seen: list[Any] = []
        hook = parts.vision_tower.register_forward_hook(lambda _, __, out: seen.append(out))
        parts.get_image_features(
            pixel_values=PIXELS, vision_feature_layer=[-2, -1], vision_feature_select_strategy="default"
        )
        hook.remove()
    shown = [states for states in seen[0].hidden_states if states is not None]  # new versions leave the others out
    assert len(shown) >= 2
    assert {states.shape[1] for states in shown} == {DENSE}
