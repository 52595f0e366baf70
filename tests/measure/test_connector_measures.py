"""Measures of a model of which the connector is reduced, alone or together with its image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from torch import nn

import crossget
from crossget import Keep, Ward
from crossget.measure.generation import count_stages, has_stages

pytestmark = pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")
KEEP = {"connector": Ward(Keep(0.25))}
C, KEYS = hf_models.WIDTH, hf_models.WIDTH // 2
VISION = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 7}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen() -> Any:
    """A Qwen2.5-VL whose units are of 14 x 14 pixels, in windows of two by two."""
    vision = {
        **VISION, "depth": 3, "num_heads": 4, "window_size": 28, "fullatt_block_indexes": [1], "out_hidden_size": C,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**hf_models.TEXT, "rope_parameters": AXES}, vision_config=vision, image_token_id=hf_models.IMAGE,
        video_token_id=6,
    )  # fmt: skip
    return hf_models.built(transformers.Qwen2_5_VLForConditionalGeneration, config)


def qwen3() -> Any:
    vision = {
        **VISION, "depth": 3, "num_heads": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": C,
    }  # fmt: skip
    text = {**hf_models.TEXT, "head_dim": 8, "rope_parameters": AXES}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=hf_models.IMAGE, video_token_id=6
    )
    return hf_models.built(transformers.Qwen3VLForConditionalGeneration, config)


def internvl() -> Any:
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [56, 56], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        text_config=transformers.LlamaConfig(**hf_models.TEXT), vision_config=vision, image_token_id=hf_models.IMAGE
    )
    return hf_models.built(transformers.InternVLForConditionalGeneration, config)


def smolvlm() -> Any:
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56}
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**hf_models.TEXT), vision_config=vision, scale_factor=2,
        image_token_id=hf_models.IMAGE,
    )  # fmt: skip
    return hf_models.built(transformers.SmolVLMForConditionalGeneration, config)


def gemma3() -> Any:
    vision = {
        **VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**hf_models.TEXT, "head_dim": 8}, vision_config=vision, mm_tokens_per_image=16,
        image_token_index=hf_models.IMAGE,
    )  # fmt: skip
    return hf_models.built(transformers.Gemma3ForConditionalGeneration, config)


# Name -> (model, arguments of count_stages, features of an image, features of a unit).
FAMILIES: dict[str, Any] = {
    "llava": (hf_models.llava, {}, 16, 16),
    "qwen2.5": (qwen, {"image_size": (56, 84)}, 24, 24),
    "qwen3": (qwen3, {"image_size": (56, 84)}, 24, 24),
    "internvl": (internvl, {"tiles": 3}, 48, 16),
    "smolvlm": (smolvlm, {"tiles": 3}, 48, 16),
    "gemma3": (gemma3, {}, 16, 16),
}


# One family whose tower takes images of any size is not slow.
@pytest.mark.parametrize(
    "name", [name if name == "qwen2.5" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_stages(name: str) -> None:
    """The language model gets what stays of every unit, and its cost is that of a shorter prompt."""
    make, given, features, unit = FAMILIES[name]
    model = make()
    with crossget.attach(model, KEEP):
        report = count_stages(model, 5, 2, **given)
    dense, reduced = report.dense, report.reduced
    assert reduced is not None
    assert (dense.image_tokens, reduced.image_tokens) == (features, features // 4)
    assert (dense.prompt, reduced.prompt) == (2 * features + 5, features // 2 + 5)
    for part in ("image tower", "connector"):
        assert dense.parts[part] == reduced.parts[part] > 0
    assert dense.cache == 3 * 2 * dense.prompt * KEYS
    assert reduced.cache == 3 * 2 * reduced.prompt * KEYS
    block = 2 * C * C + 2 * C * KEYS + 3 * C * 64  # of one token, without attention
    saved = dense.parts["language model"] - reduced.parts["language model"]
    pairs = dense.prompt**2 - reduced.prompt**2
    least = 3 * ((dense.prompt - reduced.prompt) * block + 2 * pairs * C)
    matching = 2 * features // unit * unit**2 * C  # an upper bound of all rounds
    assert least - matching <= saved <= least * 1.1
    assert report.speedup > 1
    assert dense.step > reduced.step


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_device_counts_the_same(name: str) -> None:
    make, given, _, _ = FAMILIES[name]
    found = []
    for device in ("cpu", "meta"):
        model = make().to(device)
        with crossget.attach(model, KEEP):
            report = count_stages(model, 5, 2, **given)
        found.append((report.dense, report.reduced))
    assert found[0] == found[1]


@pytest.mark.slow
def test_one_forward_costs_its_stages() -> None:
    """But for the logits of all tokens but the last."""
    model = qwen()
    inputs = prompt()
    with crossget.attach(model, KEEP):
        stages = count_stages(model, 5, image_size=(56, 84))
        whole = crossget.count_flops(model, inputs)
    assert stages.reduced is not None
    for count, cost in ((whole.dense, stages.dense), (whole.reduced, stages.reduced)):
        assert count is not None
        assert count.total == cost.prefill + (cost.prompt - 1) * C * 60


@pytest.mark.slow
def test_of_tiles_together() -> None:
    model = internvl()
    with crossget.attach(model, {"connector": Ward(Keep(5, per="image"))}):
        report = count_stages(model, 5, 2, tiles=3)
    assert report.reduced is not None
    assert report.reduced.image_tokens == 5


@pytest.mark.slow
def test_tower_and_connector() -> None:
    """The connector gets the eleven features that the tower leaves."""
    model = hf_models.llava()
    with crossget.attach(model, {"visual": crossget.CrossGET(2), "connector": Ward(Keep(4))}):
        both = count_stages(model, 5)
    with crossget.attach(model, crossget.CrossGET(2)):
        alone = count_stages(model, 5)
    assert list(both.dense.parts.values()) == list(alone.dense.parts.values())
    assert both.reduced is not None
    assert alone.reduced is not None
    assert both.reduced.parts["image tower"] == alone.reduced.parts["image tower"]
    assert both.reduced.parts["connector"] == alone.reduced.parts["projector"]
    assert (alone.reduced.image_tokens, both.reduced.image_tokens) == (11, 4)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (hf_models.llava, {"tiles": 2}, "LlavaForConditionalGeneration takes images of one size, without tiles"),
        (gemma3, {"tiles": 2}, "Gemma3ForConditionalGeneration does not cut an image into tiles"),
        (smolvlm, {"image_size": (56, 56)}, "SmolVLMForConditionalGeneration takes images of one size"),
        (qwen, {"tiles": 2}, "does not cut an image into tiles"),
        (qwen, {"image_size": (0, 56)}, "give numbers from 1 on"),
    ],
)
def test_what_has_no_effect_is_refused(make: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_stages(make(), 5, **given)


def test_without_stages() -> None:
    assert has_stages(qwen())
    assert not has_stages(transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_models.TEXT)))
    assert not has_stages(nn.Linear(2, 2))


# Other measures ------------------------------------------------------------------------------------------------------


def prompt() -> dict[str, Any]:
    """For `qwen`: an image of 24 units and five tokens of text."""
    ids = torch.tensor([[1, *[hf_models.IMAGE] * 24, 20, 21, 22, 23]])
    pixels = torch.randn(96, 3 * 2 * 49, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 12]]), "mm_token_type_ids": (ids == hf_models.IMAGE).long(),
    }  # fmt: skip


def test_benchmark() -> None:
    model = qwen()
    with crossget.attach(model, KEEP) as attached:
        report = crossget.benchmark(model, prompt(), rounds=1, warmup=0)
        assert [one.name for one in report.measurements] == ["dense", "attached"]
        assert attached.tokens["connector"] == [(24, 6)]
    report = crossget.benchmark(model, prompt(), rounds=1, warmup=0, methods={"a quarter": KEEP})
    assert report["a quarter"].method.startswith("{'connector': Ward(")


def test_training_and_files(tmp_path: Path) -> None:
    model = qwen()
    with crossget.attach(model, KEEP) as attached:
        model(**prompt())
        with pytest.raises(RuntimeError, match=r"alignment_loss\(\) needs two towers with cross tokens"):
            attached.alignment_loss()
        assert not list(attached.parameters())
        before = list(model.state_dict())
        attached.register_parameters(model)
        assert list(model.state_dict()) == before
        attached.unregister_parameters()
        with pytest.raises(ValueError, match="no tower of Attachment.* puts images into prompts"):
            attached.image_tokens  # noqa: B018
        attached.save(tmp_path)
        reducers = attached.reducers
    with crossget.load(model, tmp_path) as loaded:
        assert loaded.reducers == reducers


def test_what_is_for_towers_alone() -> None:
    model = qwen()
    with pytest.raises(ValueError, match="'connector', and the checks are of towers"):
        crossget.doctor(model, prompt(), KEEP)
    with pytest.raises(ValueError, match="tower='connector': a schedule is for the blocks of a tower; give .*Keep"):
        crossget.fit_schedule(model, prompt(), flops=0.5, tower="connector")
    with crossget.attach(model, KEEP), pytest.raises(ValueError, match=r"already attached: Attachment\(connector"):
        crossget.fit_schedule(model, prompt(), flops=0.5)
    assert crossget.count_flops(model, prompt()).reduced is None
