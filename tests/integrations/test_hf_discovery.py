"""Families of transformers without an adapter, in small random models: what is found, proved and refused.

The table of all families is in experiments/models/transformers.md, and a sample of it is refilled by a slow test. Here
are the kinds that differ: relative tables, tokens at other places, readers of every block, frames and tiles in the
batch, packed images, padded images, and what takes a declaration.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor, nn

import crossget
from crossget.core.tables import Positions
from crossget.demo.tiny_transformers import add_noise

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SIZES = {**SMALL, "image_size": 32, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 32}


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(0))


def built(family: str, name: str, config: str, **values: Any) -> Any:
    """A model with noise on all parameters, in eval mode. Skips where the version has no such family."""
    try:
        home, configs = (
            importlib.import_module(f"transformers.models.{family}.{kind}_{family}")
            for kind in ("modeling", "configuration")
        )
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    model = getattr(home, name)(getattr(configs, config)(**values)).eval()
    with torch.no_grad():
        add_noise(model)
    return model


def run(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return inputs() if callable(inputs) and not isinstance(inputs, Tensor) else model(**inputs)


def leaves(out: Any) -> list[Tensor]:
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else [out]
    return [leaf for value in values for leaf in (leaves(value) if not isinstance(value, Tensor) else [value])]


def beit() -> tuple[Any, Any]:
    relative = {"use_relative_position_bias": True, "use_shared_relative_position_bias": False}
    return built("beit", "BeitModel", "BeitConfig", **SIZES, **relative), {"pixel_values": images()}


def shared_table() -> tuple[Any, Any]:
    relative = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
    return built("beit", "BeitModel", "BeitConfig", **SIZES, **relative), {"pixel_values": images()}


def yolos() -> tuple[Any, Any]:
    sizes = {**SIZES, "image_size": [32, 32], "num_detection_tokens": 5, "use_mid_position_embeddings": True}
    return built("yolos", "YolosModel", "YolosConfig", **sizes), {"pixel_values": images()}


def dpt() -> tuple[Any, Any]:
    values = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    model = built("dpt", "DPTForDepthEstimation", "DPTConfig", **{**SIZES, "num_hidden_layers": 4, **values})
    return model, {"pixel_values": images()}


def depth_anything() -> tuple[Any, Any]:
    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=4,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    values = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "patch_size": 4}
    model = built(
        "depth_anything", "DepthAnythingForDepthEstimation", "DepthAnythingConfig", backbone_config=backbone, **values
    )
    return model, {"pixel_values": images()}


def videomae() -> tuple[Any, Any]:
    sizes = {**SIZES, "num_frames": 4, "tubelet_size": 2, "patch_size": 8}
    return built("videomae", "VideoMAEModel", "VideoMAEConfig", **sizes), {"pixel_values": images(2, 4, 3, 32, 32)}


def vivit() -> tuple[Any, Any]:
    sizes = {**SMALL, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}
    return built("vivit", "VivitModel", "VivitConfig", **sizes), {"pixel_values": images(2, 4, 3, 32, 32)}


def x_clip() -> tuple[Any, Any]:
    vision = {**SIZES, "num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 48}
    vision |= {"mit_num_attention_heads": 2, "mit_num_hidden_layers": 1, "drop_path_rate": 0.0}
    model = built(
        "x_clip", "XCLIPModel", "XCLIPConfig", vision_config=vision, text_config=TEXT, projection_dim=32,
        prompt_num_attention_heads=2, prompt_layers=1,
    )  # fmt: skip
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images(2, 2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs


def mllama() -> tuple[Any, Any]:
    sizes = {**SMALL, "attention_heads": 2, "num_global_layers": 1, "image_size": 32, "patch_size": 4}
    values = {**sizes, "max_num_tiles": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64}
    values["supported_aspect_ratios"] = [[1, 1], [1, 2], [2, 1]]
    model = built("mllama", "MllamaVisionModel", "MllamaVisionConfig", **values)
    ratios = {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long) * 2}
    return model, {"pixel_values": images(2, 1, 2, 3, 32, 32), **ratios, "aspect_ratio_mask": torch.ones(2, 1, 2)}


def llama4() -> tuple[Any, Any]:
    vision = {**SMALL, "image_size": 32, "patch_size": 4, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 48}
    vision |= {"projector_output_dim": 48, "vision_output_dim": 48, "intermediate_size": 128}
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 48}
    config = {"vision_config": vision, "text_config": text}
    model = built("llama4", "Llama4ForConditionalGeneration", "Llama4Config", **config)
    return model, lambda: model.get_image_features(
        pixel_values=images(), vision_feature_layer=-1, vision_feature_select_strategy="default"
    )


def qwen2_vl() -> tuple[Any, Any]:
    home = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    configs = importlib.import_module("transformers.models.qwen2_vl.configuration_qwen2_vl")
    sizes = {"embed_dim": 32, "hidden_size": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    torch.manual_seed(0)
    config = configs.Qwen2VLVisionConfig(**sizes, spatial_merge_size=2)
    if hf_models.VERSION < (5, 0):
        pytest.skip("the attention of this version is over the packed sequence, with a mask between images")
    model = home.Qwen2VisionTransformerPretrainedModel._from_config(config).eval()
    with torch.no_grad():
        add_noise(model)
    return model, {"hidden_states": images(2 * 64, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 8, 8]] * 2)}


def idefics3(family: str = "idefics3", name: str = "Idefics3") -> tuple[Any, Any]:
    vision = {**SIZES, "num_channels": 3}
    text = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "model_type": "llama"}
    config = {"vision_config": vision, "text_config": text, "scale_factor": 2, "image_token_id": 59}
    model = built(family, f"{name}Model", f"{name}Config", **config)
    # What the processor gives: two images per text, the last one smaller, padded at its right and bottom.
    pixels, mask = images(2, 2, 3, 32, 32), torch.ones(2, 2, 32, 32, dtype=torch.bool)
    mask[:, 1, 16:] = False
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 2:34] = 59
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, {**inputs, "pixel_attention_mask": mask, "use_cache": False}


def smolvlm() -> tuple[Any, Any]:
    return idefics3("smolvlm", "SmolVLM")


def mae() -> tuple[Any, Any]:
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    model = built("vit_mae", "ViTMAEForPreTraining", "ViTMAEConfig", **SIZES, **decoder, decoder_intermediate_size=48)
    return model, {"pixel_values": images(), "noise": torch.rand(2, 64, generator=torch.Generator().manual_seed(0))}


def owlvit() -> tuple[Any, Any]:
    text = {**TEXT, "max_position_embeddings": 16}
    model = built("owlvit", "OwlViTModel", "OwlViTConfig", vision_config=SIZES, text_config=text, projection_dim=16)
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    return model, {"pixel_values": images(), "input_ids": ids}


# The model and its inputs, and the expected image tower: its blocks, prefix, other protected tokens, class token.
KINDS: dict[str, tuple[Callable[[], tuple[Any, Any]], tuple[int, int, int, bool]]] = {
    "relative tables": (beit, (3, 1, 0, True)),
    "one relative table": (shared_table, (3, 1, 0, True)),
    "detection tokens at the end": (yolos, (3, 1, 5, True)),
    "four blocks are read": (dpt, (4, 1, 0, True)),
    "a backbone is read": (depth_anything, (4, 1, 0, True)),
    "tubelets": (videomae, (3, 0, 0, False)),
    "tubelets and a class token": (vivit, (3, 1, 0, True)),
    "frames in the batch": (x_clip, (3, 1, 0, True)),
    "image features, class token at the end": (llama4, (3, 0, 1, False)),
    "packed images": (qwen2_vl, (3, 0, 0, False)),
    "padded images": (idefics3, (3, 0, 0, False)),
    "padded images of SmolVLM": (smolvlm, (3, 0, 0, False)),
    "masked autoencoder": (mae, (3, 1, 0, True)),
    "contrastive": (owlvit, (3, 1, 0, True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_tower_is_found_proved_and_reduced(kind: str) -> None:
    make, expected = KINDS[kind]
    model, inputs = make()
    dense = leaves(run(model, inputs))
    found = crossget.find_towers(model, inputs)
    visual = next(tower for tower in found if tower.name.partition(".")[0] == "visual")
    assert (visual.depth, visual.prefix, len(visual.fixed), visual.class_token) == expected
    assert not visual.causal
    for method in (crossget.Ward, crossget.CrossGET):
        with crossget.attach(model, method(2), inputs=inputs) as attached:
            reduced = leaves(run(model, inputs))
            assert {name.partition(".")[0] for name in attached.tokens} == {"visual"}
            tokens = attached.tokens[visual.name]
            assert tokens == [tokens[0] - 2 * layer for layer in range(visual.depth)]
        assert [x.shape for x in reduced] == [x.shape for x in dense]
        assert all(torch.isfinite(x).all() for x in reduced if x.is_floating_point())
    assert all(torch.equal(x, y) for x, y in zip(leaves(run(model, inputs)), dense, strict=True))


def test_tiles_in_the_batch() -> None:
    model, inputs = mllama()
    found = crossget.find_towers(model, inputs)
    # Each tile has a class token in front, and 7 tokens of padding behind its 64 patches.
    facts = [(tower.name, tower.depth, tower.prefix, len(tower.fixed), tower.causal) for tower in found]
    assert facts == [("visual", 3, 1, 15, False)]
    dense = run(model, inputs).last_hidden_state
    with crossget.attach(model, crossget.Ward(2), inputs=inputs):
        assert run(model, inputs).last_hidden_state.shape == dense.shape


def test_packed_images_of_several_sizes_are_refused() -> None:
    model, inputs = qwen2_vl()
    other = {"hidden_states": inputs["hidden_states"][:96], "grid_thw": torch.tensor([[1, 8, 8], [1, 8, 4]])}
    with pytest.raises(TypeError, match=r"blocks: .*\[64, 32\] tokens: expected images of one size"):
        crossget.attach(model, crossget.Ward(2), inputs=other)
    with (
        crossget.attach(model, crossget.Ward(2), inputs=inputs),
        pytest.raises(RuntimeError, match=r"\[64, 32\] tokens: expected images of one size"),
    ):
        run(model, other)
    assert isinstance(leaves(run(model, other))[0], Tensor)


def test_positions_made_inside_take_one_line() -> None:
    """V-JEPA 2's blocks make positions from the number of their tokens, unless they get them as an argument."""
    sizes = {**SMALL, "crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "tubelet_size": 2}
    predictor = {"pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}
    model = built("vjepa2", "VJEPA2Model", "VJEPA2Config", **sizes, **predictor, pred_num_mask_tokens=2)
    inputs = {"pixel_values_videos": images(2, 4, 3, 32, 32), "skip_predictor": True}
    with pytest.raises(TypeError, match=r"encoder.layer: block 0 .*positions made inside"):
        crossget.attach(model, crossget.Ward(2), inputs=inputs)
    tower = crossget.Tower("visual", crossget.Blocks("encoder.layer"), 32, fit_arguments=Positions("position_mask"))
    crossget.register(type(model), towers=[tower])
    try:
        assert crossget.doctor(model, inputs, crossget.Ward(2)).ok
        assert crossget.doctor(model, inputs, crossget.CrossGET(2)).ok
    finally:
        crossget.unregister(type(model))


def test_text_and_audio_are_reduced_if_they_are_named() -> None:
    model, inputs = owlvit()
    with crossget.attach(model, {"text": crossget.Ward(1)}, inputs=inputs) as attached:
        run(model, inputs)
        assert attached.tokens == {"text": [16, 15, 14]}


def test_a_model_of_known_size_needs_no_inputs() -> None:
    model, inputs = beit()
    with crossget.attach(model, crossget.Ward(2)) as attached:
        run(model, inputs)
        assert attached.tokens["visual"] == [65, 63, 61]
    with pytest.raises(TypeError, match="meta device"):
        crossget.attach(model.to("meta"), crossget.Ward(2))
