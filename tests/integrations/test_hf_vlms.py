"""transformers' other models of images and text: those whose grid is restored, PaliGemma's prompts, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import IMAGE, TEXT, VERSION, VISION, built, paligemma
from torch import Tensor, nn

import contract
import crossget
from contract import Case
from crossget.core.block_class import argument_names

R = 2
ANSWER = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [IMAGE]}


def config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**settings)


def llava_next(attention: str = "sdpa") -> nn.Module:
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    made = config(
        "LlavaNextConfig", vision_config=vision, text_config={**TEXT, "model_type": "llama"}, image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], vision_feature_layer=-2,
    )  # fmt: skip
    return built(transformers.LlavaNextForConditionalGeneration, made, attention)


def llava_next_inputs() -> tuple[Any, ...]:
    """Images of 50 x 60 give four tiles and the whole image: 70 features each."""
    ids = _ids(70)
    pixels = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return ids, pixels, torch.tensor([[50, 60], [50, 60]]), torch.ones_like(ids)


def internvl(attention: str = "sdpa") -> nn.Module:
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"}
    made = config(
        "InternVLConfig", vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE,
        image_seq_length=4,
    )  # fmt: skip
    return built(transformers.InternVLForConditionalGeneration, made, attention)


def internvl_inputs() -> tuple[Any, ...]:
    ids = _ids(4)
    return ids, hf_models.images(2), torch.ones_like(ids)


def llava_onevision(attention: str = "sdpa") -> nn.Module:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    made = config(
        "LlavaOnevisionConfig", vision_config=vision, text_config={**TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return built(transformers.LlavaOnevisionForConditionalGeneration, made, attention)


def llava_onevision_inputs() -> tuple[Any, ...]:
    ids, pixels, sizes, mask = llava_next_inputs()
    return ids, pixels, sizes, None, None, mask


def gemma3(attention: str = "sdpa") -> nn.Module:
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 64}
    made = config(
        "Gemma3Config", vision_config=vision, text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip
    return built(transformers.Gemma3ForConditionalGeneration, made, attention)


def paligemma_inputs() -> tuple[Any, ...]:
    ids = torch.cat([torch.full((2, 16), IMAGE), torch.ones(2, 1, dtype=torch.long), _words(2, 5)], 1)
    return ids, hf_models.images(2), torch.ones_like(ids)


def _words(rows: int, count: int) -> Tensor:
    return torch.randint(6, 60, (rows, count), generator=torch.Generator().manual_seed(3))


def _ids(features: int) -> Tensor:
    """Prompts with one image each."""
    start = torch.ones(2, 1, dtype=torch.long)
    return torch.cat([start, _words(2, 2), torch.full((2, features), IMAGE), _words(2, 4)], 1)


def case(id: str, make: Callable[[str], nn.Module], inputs: Callable[[], tuple[Any, ...]], **flags: Any) -> list[Any]:
    """The case for each of two kinds of attention. What records hidden states in transformers cannot be pickled."""
    name = id.replace("_", "-")
    needed = {"internvl": "InternVLConfig", "gemma3": "Gemma3Config"}.get(id, "LlavaConfig")
    missing = pytest.mark.skipif(not hasattr(transformers, needed), reason=f"this transformers has no {needed}")
    cases = []
    for attention in ("sdpa", "eager"):
        settings = {"compiles": False, "pickles": False, "fused": attention == "sdpa", **flags}
        one = Case(f"{name}-{attention}", partial(make, attention), inputs, R, **settings)
        cases.append(pytest.param(one, id=one.id, marks=missing))
    return cases


CASES = [
    *case("llava_next", llava_next, llava_next_inputs),
    *case("llava_onevision", llava_onevision, llava_onevision_inputs),
    *case("internvl", internvl, internvl_inputs),
    *case("gemma3", gemma3, internvl_inputs),
    *case("paligemma", paligemma, paligemma_inputs, shortens=True),
]


# The towers are CLIP's and SigLIP's, whose eager attention is tested as such, but for InternVL's.
@pytest.mark.parametrize("probe", contract.OTHERS, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(lambda id: "sdpa" in id or "internvl" in id, CASES))
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


# LLaVA-OneVision has SigLIP's, Gemma 3's and PaliGemma's are the same.
@pytest.mark.parametrize("probe", contract.OF_BLOCKS, ids=contract.name)
@pytest.mark.parametrize(
    "case", contract.slow_unless(lambda id: id.startswith(("internvl", "llava-onevision-s")), CASES)
)
def test_contract_of_blocks(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


def test_every_family_is_there_on_the_newest() -> None:
    assert VERSION < (5, 0) or not any(mark.args[0] for param in CASES for mark in param.marks)


def keyword(model: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
    names = argument_names(type(model).forward)
    return {name: value for name, value in zip(names, inputs, strict=False) if value is not None}


@pytest.mark.parametrize("case", [param for param in CASES if "sdpa" in param.id])
def test_generates_as_before(case: Case) -> None:
    model, inputs = contract.build(case)
    given = keyword(model, inputs)
    width = given["input_ids"].shape[1]
    dense = model.generate(**given, **ANSWER)  # type: ignore[operator]
    with crossget.attach(model, crossget.ToMe(r=0)):
        assert torch.equal(model.generate(**given, **ANSWER), dense)  # type: ignore[operator]
    with crossget.attach(model, crossget.CrossGET(r=R)) as attached:
        out = model.generate(**given, **ANSWER)  # type: ignore[operator]
        assert torch.equal(out[:, :width], given["input_ids"])
        assert torch.equal(out, model.generate(**given, use_cache=False, **ANSWER))  # type: ignore[operator]
        visual = attached.tokens["visual"]
        assert [a - b for a, b in pairwise(visual)] == [R] * (len(visual) - 1)
        left = {name: value[:1] for name, value in given.items()}
        assert torch.equal(model.generate(**left, **ANSWER), out[:1])  # type: ignore[operator]
    assert torch.equal(model.generate(**given, **ANSWER), dense)  # type: ignore[operator]


def test_paligemma_with_suffixes() -> None:
    """Training: the prefix is seen by all, the suffix causally, and labels follow the tokens."""
    torch.manual_seed(0)
    model: Any = paligemma()
    ids, pixels, mask = paligemma_inputs()
    kinds = torch.zeros_like(ids)
    kinds[:, -3:] = 1
    labels = ids.masked_fill(kinds == 0, -100)
    keep = 16 - R * VISION["num_hidden_layers"]
    short = torch.cat([ids[:, :keep], ids[:, 16:]], 1)
    with crossget.attach(model, crossget.CrossGET(r=R)):
        out = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, token_type_ids=kinds, labels=labels)
        fits = model(
            input_ids=short, pixel_values=pixels, attention_mask=torch.ones_like(short),
            token_type_ids=kinds[:, 16 - keep :], labels=labels[:, 16 - keep :],
        )  # fmt: skip
        assert out.logits.shape[1] == ids.shape[1] - 16 + keep
        assert torch.equal(out.loss, fits.loss)
        out.loss.backward()


# What cannot be reduced ----------------------------------------------------------------------------------------------


def test_qwen2_vl_has_merge_units() -> None:
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    settings = {"text_config": text} if VERSION >= (4, 52) else text
    with torch.device("meta"):
        made = transformers.Qwen2VLConfig(**settings, vision_config=vision)
        model = transformers.Qwen2VLForConditionalGeneration(made)
    with pytest.raises(ValueError, match="CrossGET.* has a cross token, and the tower 'visual'"):
        crossget.attach(model, crossget.CrossGET(r=2))
    with crossget.attach(model, crossget.Ward(r=2)) as attached:
        assert "visual: 2 blocks (Qwen2VLVisionBlock), merge units of 4 patches" in str(attached)


def test_swin_is_refused() -> None:
    model = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]))
    with pytest.raises(TypeError, match="(?s)SwinModel: .*windows"):
        crossget.attach(model, crossget.CrossGET(r=2))


def test_one_block_is_no_tower() -> None:
    model = transformers.BertModel(transformers.BertConfig(**TEXT | {"num_hidden_layers": 1}))
    with pytest.raises(TypeError, match="BertModel: .*inputs"):
        crossget.attach(model, crossget.CrossGET(r=2))
