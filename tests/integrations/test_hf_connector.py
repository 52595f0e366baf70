"""Image features reduced behind the connector, on tiny models of families whose prompts differ."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import crossget
from crossget.core.connector import AttachedConnector
from crossget.demo import connector_checks, connector_models
from crossget.demo.connector_checks import NEW, Example, difference
from crossget.demo.connector_models import Row
from tests.support import hf_models
from tests.support.commits import commit

FAMILIES = ("llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "mistral3")
KEEP = crossget.Keep(0.4)
MERGING = (crossget.CrossGET(KEEP), crossget.ToMe(KEEP), crossget.Random(KEEP), crossget.Ward(KEEP))
DROPPING = (crossget.TopK(KEEP, importance="attention"), crossget.MaxMin(KEEP), crossget.Determinantal(KEEP))
FIRST = (5, 18)  # the first version whose models take encoded images

new = pytest.mark.skipif(hf_models.VERSION < FIRST, reason="models take no encoded images before 5.18")


@functools.cache
def example(family: str) -> Example:
    return connector_models.example(family)


def attach(model: Any, reducer: crossget.Reducer | None = None) -> crossget.Attachment:
    return crossget.attach(model, {"connector": reducer or crossget.Ward(KEEP)})


def alone(prompts: Example, row: int) -> dict[str, Any]:
    """The inputs of one row without padding, with its encoded images."""
    connector, real = prompts.connector, prompts.mask[row] > 0
    entries = prompts.entries
    own = [row] if prompts.by_row else prompts.rows[row]
    starts = torch.tensor([0, *map(len, entries)]).cumsum(0)
    flat = torch.cat([entries[i] for i in own])
    layers = [torch.cat([layer[starts[i] : starts[i + 1]] for i in own]) for layer in connector.layers(prompts.encoded)]
    encoded = connector.replaced(prompts.encoded, flat, layers, [len(entries[i]) for i in own])
    names = [name for name in prompts.inputs if name.endswith("_ids") or name == "attention_mask"]
    tokens = {name: prompts.inputs[name][row : row + 1, real] for name in names}
    grids = {name: value[prompts.rows[row]] for name, value in prompts.inputs.items() if name == "image_grid_thw"}
    return {**tokens, **grids, "mm_encoder_outputs": {"image": encoded}}


def right_padded(prompts: Example) -> dict[str, Any]:
    padding = [int(n) for n in (prompts.mask == 0).sum(1)]

    def moved(values: Tensor) -> Tensor:
        return torch.stack([row.roll(-by, 0) for row, by in zip(values, padding, strict=True)])

    columns = prompts.ids.shape
    return {name: moved(value) if value.shape == columns else value for name, value in prompts.inputs.items()}


def real_rows(logits: Tensor, lengths: list[int], *, left: bool) -> Tensor:
    return torch.cat([row[-n:] if left else row[:n] for row, n in zip(logits, lengths, strict=True)])


def state(model: Any) -> dict[str, Any]:
    """The attributes, class and number of hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = model.named_modules()
    return {name: (type(m), set(vars(m)), *(len(getattr(m, kind)) for kind in hooks)) for name, m in modules}


@new
@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_with_the_oracle_and_detaches(family: str) -> None:
    prompts = example(family)
    with torch.no_grad():  # the host adds hooks of its own in its first forward
        dense = prompts.model(**prompts.inputs).logits
    before = state(prompts.model)
    connector_checks.check(prompts)
    assert state(prompts.model) == before
    with torch.no_grad():
        assert torch.equal(prompts.model(**prompts.inputs).logits, dense)


@new
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_and_padding_has_no_side(family: str) -> None:
    prompts = example(family)
    with attach(prompts.model) as attached, torch.no_grad():
        batch = prompts.model(**prompts.inputs).logits
        planned = attached.tokens["connector"]
        right = prompts.model(**right_padded(prompts)).logits
        rows = [prompts.model(**alone(prompts, row)).logits[0] for row in range(2)]
    lengths = [len(row) for row in rows]
    left = int(prompts.mask.sum()) - sum(n - k for n, k in planned)
    assert sum(lengths) == left < int(prompts.mask.sum())
    assert difference(real_rows(batch, lengths, left=True), torch.cat(rows)) < 1e-4
    assert difference(real_rows(right, lengths, left=False), torch.cat(rows)) < 1e-4


@new
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_batch_are_those_of_its_rows(family: str) -> None:
    prompts = example(family)
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False,
        "pad_token_id": 0, "suppress_tokens": prompts.special,
    }  # fmt: skip
    with attach(prompts.model):
        batch = prompts.model.generate(**prompts.inputs, **settings)
        rows = [prompts.model.generate(**alone(prompts, row), **settings) for row in range(2)]
    assert batch.shape == (4, prompts.ids.shape[1] + NEW)
    assert torch.equal(batch[:, :-NEW], prompts.ids.repeat_interleave(2, 0))
    assert torch.equal(batch[:, -NEW:], torch.cat([row[:, -NEW:] for row in rows]))


@new
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_image_tower(family: str) -> None:
    prompts = example(family)
    tower = [p for name, p in prompts.model.named_parameters() if "vision" in name or "visual" in name]
    with attach(prompts.model):
        loss = prompts.model(**prompts.inputs, labels=prompts.labels).loss
    found = torch.autograd.grad(loss, tower, allow_unused=True)
    assert sum(float(gradient.abs().sum()) for gradient in found if gradient is not None) > 0


@new
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reducer", [*MERGING, *DROPPING], ids=lambda reducer: type(reducer).__name__)
def test_methods(family: str, reducer: crossget.Reducer) -> None:
    prompts = example(family)
    with attach(prompts.model, reducer) as attached, attached.recording(), torch.no_grad():
        logits = prompts.model(**prompts.inputs).logits
    planned = AttachedConnector(prompts.connector, reducer)
    assert [n for n, _ in attached.tokens["connector"]] == prompts.images
    assert all(k == planned.n_kept(n) < n for n, k in attached.tokens["connector"])
    for record, (n, k) in zip(attached.records["connector"], attached.tokens["connector"], strict=True):
        assert record.sizes.sum() == (n if reducer in MERGING else k)
    assert logits.isfinite().all()
    assert attached.reducers["connector"].cross_token == isinstance(reducer, crossget.CrossGET)


@new
def test_the_text_of_the_prompt_guides() -> None:
    prompts = example("llava")
    words = torch.where(prompts.is_image | (prompts.mask == 0), prompts.ids, prompts.ids.flip(0).roll(1, 1) % 40 + 3)
    other = {**prompts.inputs, "input_ids": words}
    for reducer, guided in ((crossget.CrossGET(KEEP), True), (crossget.ToMe(KEEP), False)):
        with attach(prompts.model, reducer) as attached, torch.no_grad():
            prompts.model(**prompts.inputs)
            first = attached.source["connector"]
            prompts.model(**other)
        assert torch.equal(first, attached.source["connector"]) != guided


@new
def test_a_grid_is_pooled() -> None:
    prompts = example("internvl")
    with attach(prompts.model, crossget.AveragePool(crossget.Keep(4))) as attached, torch.no_grad():
        prompts.model(**prompts.inputs)
    expected = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
    assert torch.equal(attached.source["connector"], expected.expand(3, -1))


@new
def test_older_names_of_pixels() -> None:
    prompts = example("video_llava")
    names = {"pixel_values": "pixel_values_images"}
    older = {names.get(name, name): value for name, value in prompts.inputs.items()}
    with attach(prompts.model) as attached, torch.no_grad():
        expected = prompts.model(**prompts.inputs).logits
        assert torch.equal(prompts.model(**older).logits, expected)
        assert attached.tokens["connector"] == [(64, 26)] * 3


@new
def test_pixels_that_are_not_encoded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, encoded = example("llava"), []
    features = prompts.connector.parts.get_image_features
    monkeypatch.setattr(
        prompts.connector.parts, "get_image_features", lambda pixel_values, **_: encoded.append(features(pixel_values))
    )
    with attach(prompts.model), pytest.raises(ValueError, match="got pixel_values_videos, whose features cannot"):
        prompts.model(**prompts.inputs, pixel_values_videos=torch.zeros(1, 2, 3, 64, 64))
    assert not encoded


def test_models_that_do_not_follow_the_rule() -> None:
    config = transformers.BlipConfig()
    with torch.device("meta"):
        model = transformers.BlipForConditionalGeneration(config)
    with pytest.raises(TypeError, match="BlipForConditionalGeneration has no connector: it has no get_image_features"):
        crossget.attach(model, {"connector": crossget.Ward(KEEP)})


@pytest.mark.skipif(hf_models.VERSION >= FIRST, reason="this version has encoded images")
def test_an_older_version_is_named() -> None:
    with pytest.raises(TypeError, match="from transformers 5.18 on; this is "):
        crossget.attach(hf_models.llava(), {"connector": crossget.Ward(KEEP)})


# The page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "experiments/models/connectors.md").read_text(encoding="utf-8")
SAMPLE = 15  # families


@pytest.mark.slow
@new
def test_no_family_of_the_page_is_lost() -> None:
    version, supported = connector_models.listed(PAGE)
    there = connector_models.families()
    if transformers.__version__ == version:
        assert set(supported) <= set(there), "the page lists families that are not there: write it again"
    known = sorted(set(supported) & set(there))
    families = random.Random(commit()).sample(known, min(SAMPLE, len(known)))
    rows = {row.family: row for row in connector_models.support_matrix(families)}
    assert {family: rows[family].cause for family in families if not rows[family].done} == {}


def test_the_page_is_read_as_it_was_written() -> None:
    rows = [
        Row("llava", "LlavaForConditionalGeneration", "images", "masked columns", ""),
        Row("blip-2", "Blip2ForConditionalGeneration", cause="its forward\nneeds pixel_values"),
    ]
    page = connector_models.markdown(rows)
    assert connector_models.listed(page) == (transformers.__version__, ["llava"])
    assert "1 of 2 families can be reduced." in page
    assert "| blip-2 | `Blip2ForConditionalGeneration` | its forward needs pixel_values |" in page


def test_the_page_lists_the_families_that_are_tested() -> None:
    assert set(FAMILIES) <= set(connector_models.listed(PAGE)[1])
