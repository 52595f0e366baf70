"""Parity with the reference implementation of LLaVA-1.5, on outputs that it gave (golden/) on a CPU.

Weights and inputs follow from their names, as for CLIP. They are loaded as the authors' checkpoints are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_inputs import GOLDEN, array, weight
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import crossget

LLAVA = json.loads((GOLDEN / "llava.json").read_text())
OUTPUTS = np.load(GOLDEN / "llava.npz")
VISION, LANGUAGE, SEED = LLAVA["vision"], LLAVA["language"], LLAVA["seed"]
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
IMAGE = 7  # an id that the recorded prompts do not use
# States to 2e-5 relative, gradients to 5e-5: tell-tale terms are small.
STATES: dict[str, float] = {"rtol": 2e-5, "atol": 5e-6}
GRADIENTS = 5e-5


def golden(name: str) -> Tensor:
    return torch.from_numpy(OUTPUTS[name])


def weights() -> dict[str, Tensor]:
    shapes = LLAVA["state_dict_shapes"]
    made = {name: weight(name, tuple(shape), SEED) for name, shape in shapes.items()}
    return {name: value for name, value in made.items() if not name.endswith(("inv_freq", "position_ids"))}


def build(attention: str = "sdpa") -> Any:
    vision = CLIPVisionConfig(
        hidden_size=VISION["hidden_size"], intermediate_size=VISION["intermediate_size"],
        num_hidden_layers=VISION["layers"], num_attention_heads=VISION["heads"], image_size=VISION["image_size"],
        patch_size=VISION["patch_size"], layer_norm_eps=1e-5, hidden_act="quick_gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=LANGUAGE["vocab_size"], hidden_size=LANGUAGE["hidden_size"],
        intermediate_size=LANGUAGE["intermediate_size"], num_hidden_layers=LANGUAGE["layers"],
        num_attention_heads=LANGUAGE["heads"], num_key_value_heads=LANGUAGE["heads"], rms_norm_eps=1e-6, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=LLAVA["select_layer"],
        vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as the authors publish theirs."""
    folder = tmp_path_factory.mktemp("reference")
    everything = weights()
    cross = {name: everything.pop(name) for name in list(everything) if "cross_" in name}
    torch.save(everything, folder / "pytorch_model.bin")
    torch.save(cross, folder / "cross_tokens.bin")
    language = {
        "hidden_size": LANGUAGE["hidden_size"], "intermediate_size": LANGUAGE["intermediate_size"],
        "num_hidden_layers": LANGUAGE["layers"], "num_attention_heads": LANGUAGE["heads"],
        "num_key_value_heads": LANGUAGE["heads"], "vocab_size": LANGUAGE["vocab_size"], "rms_norm_eps": 1e-6,
    }  # fmt: skip
    config = {
        "model_type": "llava_llama", **language, "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": LLAVA["select_layer"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def attached(model: Any, folder: Path) -> crossget.Attachment:
    return crossget.load_reference(model, folder, crossget.CrossGET(LLAVA["r"]))


def expanded(rows: list[list[int]], fill: int) -> Tensor:
    """Where the image's one placeholder stands in the prompt, as many as a processor would write."""
    places = [mark == LLAVA["image_token"] for mark in LLAVA["input_ids"][0]]
    return torch.tensor([
        [token for value, image in zip(row, places, strict=True) for token in ([fill] * PATCHES if image else [value])]
        for row in rows
    ])  # fmt: skip


def inputs() -> dict[str, Tensor]:
    size = VISION["image_size"]
    ids = expanded(LLAVA["input_ids"], IMAGE)
    pixels = array("images", (LLAVA["batch"], 3, size, size), SEED)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def parts(model: Any) -> Any:
    return model if "vision_tower" in model._modules else model.model


def test_hidden_states_of_the_image_tower(model: Any, attached: crossget.Attachment) -> None:
    """Also behind the last block, which nobody reads."""
    with torch.no_grad(), attached.recording():
        states = parts(model).vision_tower(inputs()["pixel_values"], output_hidden_states=True).hidden_states
    records = attached.records["visual"]
    assert len(states) == len(records) + 1 == VISION["layers"] + 1
    # The first is what the host gives to its blocks: the cross token is appended inside of them.
    torch.testing.assert_close(states[0], golden("vision.hidden_states.0")[:, :-1], **STATES)
    for i, record in enumerate(records, 1):
        torch.testing.assert_close(record.features, golden(f"vision.hidden_states.{i}"), **STATES)
    assert [state.shape for state in states[:-1]] == [states[0].shape] * len(records)


def test_features(model: Any, attached: crossget.Attachment) -> None:
    settings = {"vision_feature_layer": LLAVA["select_layer"], "vision_feature_select_strategy": "default"}
    seen: list[Tensor] = []
    hook = parts(model).multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        found = parts(model).get_image_features(pixel_values=inputs()["pixel_values"], **settings)
    hook.remove()
    torch.testing.assert_close(seen[0], golden("image_features"), **STATES)
    projected = getattr(found, "pooler_output", found)
    torch.testing.assert_close(torch.stack(list(projected)), golden("projected_features"), **STATES)


def test_logits_and_loss(model: Any, attached: crossget.Attachment) -> None:
    with torch.no_grad():
        out = model(**inputs(), labels=expanded(LLAVA["labels"], -100))
    torch.testing.assert_close(out.logits, golden("logits"), **STATES)
    assert float(out.loss) == pytest.approx(LLAVA["eval_loss"], rel=2e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_generated_tokens(model: Any, attached: crossget.Attachment, cache: bool) -> None:
    given = inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1000, "use_cache": cache}
    out = model.generate(**given, **options)
    answers = [row[len(LLAVA["input_ids"][0]) :] for row in LLAVA["generated"]]
    assert out[:, given["input_ids"].shape[1] :].tolist() == answers


def assert_gradient(found: Tensor | None, name: str) -> None:
    expected = golden(name).squeeze(0)
    torch.testing.assert_close(found, expected, rtol=GRADIENTS, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("weight_of_alignment", [LLAVA["alignment_weight"], 1])
def test_training(model: Any, attached: crossget.Attachment, weight_of_alignment: float) -> None:
    model.train()
    out = model(**inputs(), labels=expanded(LLAVA["labels"], -100))
    alignment = attached.alignment_loss()
    assert float(alignment.detach()) == pytest.approx(LLAVA["alignment_loss"], rel=2e-6)
    loss = out.loss + weight_of_alignment * alignment
    alone = weight_of_alignment == 1
    name = "train_loss_with_alignment_weight_1" if alone else "train_loss"
    assert float(loss.detach()) == pytest.approx(LLAVA[name], rel=2e-6)
    loss.backward()
    prefix = "alignment.grad" if alone else "grad"
    assert_gradient(attached.cross_tokens["visual"].grad, f"{prefix}.cross_image")
    assert_gradient(attached.cross_tokens["text"].grad, f"{prefix}.cross_text")
    if alone:
        assert_gradient(parts(model).multi_modal_projector.linear_1.weight.grad, "alignment.grad.projector")


def test_checkpointed_training_is_the_same(attached: crossget.Attachment, model: Any) -> None:
    model.train()
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    out = model(**inputs(), labels=expanded(LLAVA["labels"], -100))
    (out.loss + LLAVA["alignment_weight"] * attached.alignment_loss()).backward()
    assert_gradient(attached.cross_tokens["visual"].grad, "grad.cross_image")
    assert_gradient(attached.cross_tokens["text"].grad, "grad.cross_text")


def test_left_padding_changes_nothing(model: Any, attached: crossget.Attachment) -> None:
    """Where the reference would put its cross token on the padding."""
    given, padding = inputs(), 3
    for name, fill in (("input_ids", 0), ("attention_mask", 0)):
        given[name] = torch.nn.functional.pad(given[name], (padding, 0), value=fill)
    with torch.no_grad():
        logits = model(**given).logits[:, padding:]
    torch.testing.assert_close(logits, golden("logits"), rtol=2e-5, atol=2e-5)
