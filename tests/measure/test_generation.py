"""Multiply-adds of generating, against formulas, and the same on the meta device as with real numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hf_models
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crossget
from crossget.checkpoints.hf_sizes import PRESETS, build
from crossget.measure.generation import GenerationCost, StageReport, count_stages

R = 2
C, MLP, VOCABULARY = hf_models.WIDTH, 64, 60
KEYS = C // 2  # of grouped queries: two heads of four
SLOW = pytest.mark.slow


def image_tower(tokens: list[int], plain: bool, run: int = 4) -> int:
    """Multiply-adds of a CLIP tower whose blocks get these numbers of tokens, of which the first `run` are run."""
    total = 16 * 3 * 8 * 8 * C + 5 * 17 * C + 5 * C  # patches; the norm in front, and the one over the class token
    for count, left in list(zip(tokens, [*tokens[1:], tokens[-1]], strict=True))[:run]:
        total += 5 * count * C + 4 * count * C * C + 2 * count * count * C  # norm, projections, attention
        total += 5 * left * C + 2 * left * C * MLP
        if not plain:  # attention once more, for importance, and cosines of keys that are averaged over four heads
            total += count * count * C + count * count * C // 4
    return total


def language_model(tokens: int, cached: int = 0) -> int:
    """Multiply-adds of three Llama blocks and the logits of the last token."""
    block = 2 * tokens * C * C + 2 * tokens * C * KEYS + 2 * tokens * (cached + tokens) * C + 3 * tokens * C * MLP
    return 3 * block + C * VOCABULARY


def rotary(tokens: int) -> int:
    """Angles are a product of positions and frequencies, which older versions compute by a matrix product."""
    return tokens * C // 4 // 2


def counted(model: Any, text: int, images: int) -> StageReport:
    with crossget.attach(model, crossget.CrossGET(r=R)) as attached:
        report = count_stages(model, text, images)
        assert attached.is_attached
    return report


@pytest.fixture(scope="module")
def llava_report() -> StageReport:
    """Of five tokens of text and two images."""
    return counted(hf_models.llava(), 5, 2)


@pytest.mark.parametrize(
    ("text", "images"), [(5, 2), *[pytest.param(*case, marks=SLOW) for case in ((1, 1), (1, 2), (7, 1), (7, 2))]]
)
def test_llava_by_formula(text: int, images: int, llava_report: StageReport) -> None:
    report = llava_report if (text, images) == (5, 2) else counted(hf_models.llava(), text, images)
    dense, reduced = report.dense, report.reduced
    assert reduced is not None
    assert dense.parts["image tower"] == images * image_tower([17] * 4, plain=True)
    # The model does not use the last block, so it does not run.
    assert reduced.parts["image tower"] == images * image_tower([18, 16, 14, 12], plain=False, run=3)
    for cost, features in ((dense, 16), (reduced, 11)):
        prompt = images * features + text
        assert (cost.image_tokens, cost.prompt) == (features, prompt)
        assert cost.parts["projector"] == images * features * 2 * C * C
        assert cost.parts["language model"] - language_model(prompt) in (0, rotary(prompt))
        assert cost.step - language_model(1, prompt) in (0, rotary(1))
        assert cost.cache == 3 * 2 * prompt * KEYS
    assert report.speedup == dense.prefill / reduced.prefill > 1


def on(device: str, model: Any, r: int | None) -> tuple[GenerationCost, GenerationCost | None]:
    model = model.to(device)
    if r is None:
        report = count_stages(model, 5, 2)
    else:
        with crossget.attach(model, crossget.CrossGET(r=r)):
            report = count_stages(model, 5, 2)
    return report.dense, report.reduced


@pytest.mark.skipif(hf_models.VERSION < (5, 0), reason="transformers runs no language model on meta before 5.0")
@pytest.mark.slow
@pytest.mark.parametrize("r", [None, R], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_meta_device_counts_the_same(r: Any, attention: str, llava_report: StageReport) -> None:
    if r == R and attention == "sdpa":
        real: Any = llava_report.dense, llava_report.reduced
    else:
        real = on("cpu", hf_models.llava(attention), r)
    assert on("meta", hf_models.llava(attention), r) == real
    assert (real[1] is None) == (r is None)


@pytest.mark.skipif(hf_models.VERSION >= (5, 0), reason="transformers runs language models on meta from 5.0 on")
def test_old_versions_on_the_meta_device() -> None:
    with pytest.raises(RuntimeError, match=r"meta device .*transformers >= 5.0"):
        count_stages(hf_models.llava().to("meta"))


@pytest.mark.slow
@pytest.mark.skipif((4, 53) <= hf_models.VERSION < (5, 0), reason="these make masks by vmap, which jit cannot trace")
def test_the_stages_are_what_the_model_does(llava_report: StageReport) -> None:
    """Together they cost what one forward of the model costs, but for the logits of all tokens but the last."""
    model = hf_models.llava()
    ids, mask = hf_models.prompts("^##abcd")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": hf_models.images(2)}
    with crossget.attach(model, crossget.CrossGET(r=R)) as attached, attached.generating():
        whole = crossget.count_flops(model, inputs)
    assert llava_report.reduced is not None
    for count, cost in ((whole.dense, llava_report.dense), (whole.reduced, llava_report.reduced)):
        assert count is not None
        assert count.total == cost.prefill + (cost.prompt - 1) * C * VOCABULARY


def blip() -> Any:
    text = {**hf_models.TEXT, "encoder_hidden_size": C, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = transformers.BlipConfig(text_config=text, vision_config=hf_models.VISION, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config).eval()


def blip2() -> Any:
    text = transformers.OPTConfig(
        hidden_size=C, ffn_dim=MLP, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=C,
        vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    former = {
        "hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": MLP,
        "encoder_hidden_size": C, "cross_attention_frequency": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=hf_models.VISION, qformer_config=former, text_config=text.to_dict(), num_query_tokens=6,
        image_token_index=59,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config).eval()


def other_tower(tokens: list[int], plain: bool) -> int:
    """BLIP's and BLIP-2's: no norm in front, one over all tokens behind and one more over the class token."""
    cross = 0 if plain else 1
    total = 16 * 3 * 8 * 8 * C + 5 * (tokens[-1] - cross) * C + 5 * C
    for count, left in pairwise(tokens):
        total += 5 * count * C + 4 * count * C * C + 2 * count * count * C + 5 * left * C + 2 * left * C * MLP
        total += 0 if plain else count * count * C + count * C  # similarity of all tokens, and with the guide
    return total


@pytest.mark.parametrize(
    ("make", "images"), [pytest.param(*case, marks=SLOW) for case in ((blip, 1), (blip, 2), (blip2, 1), (blip2, 2))]
)
def test_blip_by_formula(make: Callable[[], Any], images: int) -> None:
    report = counted(make(), 5, images)
    dense, reduced = report.dense, report.reduced
    assert reduced is not None
    assert dense.parts["image tower"] == images * other_tower([17] * 5, plain=True)
    assert reduced.parts["image tower"] == images * other_tower([18, 16, 14, 12, 10], plain=False)
    assert (dense.image_tokens, reduced.image_tokens) == (17, 9)
    if make is blip2:
        queries = images * 6
        assert dense.prompt == reduced.prompt == queries + 5
        assert dense.cache == reduced.cache == 2 * 2 * dense.prompt * C
        assert dense.parts["language model"] == reduced.parts["language model"]
        assert dense.step == reduced.step
        # One of two layers attends to the image: projections of its tokens, and attention to them.
        saved = images * (2 * 8 * C * C + 2 * 6 * 8 * C)
        assert dense.parts["Q-Former"] - reduced.parts["Q-Former"] == saved
    else:
        # Both layers attend to the image; each step does, too.
        assert dense.prompt == reduced.prompt == 5
        saved = images * 2 * (2 * 8 * C * C + 2 * 5 * 8 * C)
        assert dense.parts["language model"] - reduced.parts["language model"] == saved


@pytest.mark.slow
@pytest.mark.parametrize("make", [blip, blip2])
def test_the_meta_device_counts_the_same_of_blip(make: Callable[[], Any]) -> None:
    if hf_models.VERSION < (5, 0):
        pytest.skip("transformers runs no language model on meta before 5.0")
    assert on("meta", make(), R) == on("cpu", make(), R)


def test_blip2_with_an_encoder() -> None:
    model = blip2()
    model.config.text_config.is_encoder_decoder = True
    with pytest.raises(TypeError, match=r"BLIP-2 .*\(T5\)"):
        count_stages(model)


def test_a_model_as_it_is_has_one_column(llava_report: StageReport) -> None:
    plain = count_stages(hf_models.llava(), 5, 2)
    assert (plain.dense, plain.reduced, plain.speedup) == (llava_report.dense, None, 1)
    assert "reduced" not in plain.table()


def test_the_report_as_text_and_json(llava_report: StageReport) -> None:
    report = llava_report
    found = json.loads(report.to_json())
    assert found["prefill"] == {"dense": report.dense.prefill, "reduced": report.reduced.prefill}  # type: ignore[union-attr]
    assert found["speedup"] == report.speedup
    table = str(report)
    assert table.startswith(
        "LlavaForConditionalGeneration, 2 image(s) and 5 text tokens: multiply-adds\nvisual: CrossGET"
    )
    assert (
        f"cache at 16 bits, bytes  {2 * report.dense.cache:>9,}".split()
        == next(line for line in table.splitlines() if line.startswith("cache")).split()[:6]
    )
    assert table.endswith(f"predicted speed-up of image tower and prefill: {report.speedup:.2f}x")


def test_a_model_without_stages() -> None:
    with pytest.raises(TypeError, match="Linear .*LLaVA-1.5, BLIP.*connector"):
        count_stages(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="text_tokens=0, images=1: .*at least one"):
        count_stages(hf_models.llava(), 0)


# Published models ----------------------------------------------------------------------------------------------------

# In millions. Older versions of transformers do not tie BLIP's output matrix and have 247.4, as its repository says.
PARAMETERS = {
    "llava-1.5-7b": 7063.4, "llava-1.5-13b": 13351.5, "clip-vit-large-patch14-336": 427.9, "blip-base-384": 224.0,
    "blip2-opt-2.7b": 3744.8, "qwen2.5-vl-7b": 8292.2, "qwen3-vl-8b": 8767.1, "internvl3-8b": 7944.4,
    "smolvlm2-2.2b": 2246.8, "gemma3-4b": 4300.1,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_size(name: str) -> None:
    if not hasattr(transformers, PRESETS[name].architecture):
        with pytest.raises(RuntimeError, match=f"transformers .* has no .*{name}.*install a newer version"):
            build(name)
        return
    model = build(name, dtype=torch.bfloat16)
    untied = 23.442 if name == "blip-base-384" and hf_models.VERSION < (4, 49) else 0
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name] + untied, abs=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in model.parameters())
    assert not model.training
    assert torch.get_default_dtype() == torch.float32


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"'llava': .*llava-1.5-7b, llava-1.5-13b"):
        build("llava")


class CountBytes(TorchDispatchMode):
    """Inside, `allocated` is the sum of the bytes of all tensors that operators return, but for those on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.allocated += leaf.numel() * leaf.element_size()
        return out


@pytest.mark.slow
@pytest.mark.skipif(hf_models.VERSION < (5, 0), reason="transformers runs no language model on meta before 5.0")
def test_counting_on_meta_allocates_next_to_nothing() -> None:
    model = hf_models.llava()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.to("meta")
    with CountBytes() as count, crossget.attach(model, crossget.CrossGET(r=R)):
        count_stages(model, 5, 2)
    assert count.allocated < weights / 100
