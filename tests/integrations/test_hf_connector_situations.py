"""Image features reduced behind the connector: turns, ways to generate, threads, interruptions, wrong input.

What a way to generate must give is the same model's own reduced forward of the whole, without cache, row by row. That
this forward is right is the subject of test_hf_connector.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import vlm_models
from hf_models import VERSION
from torch import Tensor
from vlm_models import batch, types

import crossget

pytestmark = pytest.mark.skipif(VERSION < (5, 19), reason="connectors can be reduced from transformers 5.19 on")

KEEP = {"connector": crossget.Ward(crossget.Keep(0.4))}
STEPS = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next", "smolvlm", "paligemma", "gemma3"]
FAST = ["llava", "qwen2_5_vl"]


def of(families: list[str], fast: list[str] = FAST) -> list[Any]:
    """Parameters of a test; those that are not fast are slow tests."""
    return [family if family in fast else pytest.param(family, marks=pytest.mark.slow) for family in families]


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    return vlm_models.build(family, attention)


def longer(model: Any, arguments: dict[str, Any], new: Tensor) -> dict[str, Any]:
    """The arguments with further tokens [B, N] behind the prompts."""
    ids = torch.cat([arguments["input_ids"], new], 1)
    mask = torch.cat([arguments["attention_mask"], torch.ones_like(new)], 1)
    return {**arguments, "input_ids": ids, "attention_mask": mask, **types(model, ids)}


def last_logits(model: Any, arguments: dict[str, Any]) -> Tensor:
    """[B, V] of a forward without cache."""
    names = {"batch_num_images"}
    with torch.no_grad():
        return model(**{k: v for k, v in arguments.items() if k not in names}, use_cache=False).logits[:, -1]


def by_forward(model: Any, arguments: dict[str, Any], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Answers [B, steps] and their logits [B, steps, V], every one of a forward of the whole."""
    found = []
    for _ in range(steps):
        found.append(last_logits(model, arguments))
        arguments = longer(model, arguments, found[-1].argmax(-1, keepdim=True))
    return arguments["input_ids"][:, -steps:], torch.stack(found, 1)


def by_generate(model: Any, arguments: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """The same of `generate`."""
    settings = {**GREEDY, **more}
    out = model.generate(**arguments, **settings)
    ids = arguments.get("input_ids")
    if ids is not None:
        assert torch.equal(out.sequences[: len(ids), : ids.shape[1]], ids)
    return out.sequences[:, -settings["max_new_tokens"] :], torch.stack(out.logits, 1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-4 * float(expected[1].abs().max()))


def cache_of(out: Any) -> dict[str, Any]:
    return {"cache": out["cache"]} if "cache" in out else {"past_key_values": out["past_key_values"]}


# Ways to generate ---------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 7": {"prefill_chunk_size": 7},
    "limit on the whole": {"max_new_tokens": None, "max_length": 0},
}
ROWS = ["^ab#cdef", "^a#g#hijk"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", of(FAMILIES))
def test_ways_to_generate(family: str, way: str) -> None:
    model = model_of(family)
    arguments, more = batch(model, family, *ROWS), dict(WAYS[way])
    if "max_length" in more:
        more["max_length"] = arguments["input_ids"].shape[1] + STEPS
    with crossget.attach(model, KEEP):
        out = model.generate(**arguments, **{**GREEDY, **more})
        found = out.sequences[:, arguments["input_ids"].shape[1] :], torch.stack(out.logits, 1)
        assert_same(found, by_forward(model, arguments))


@pytest.mark.parametrize("family", of(FAMILIES))
def test_prompt_lookup(family: str) -> None:
    model = model_of(family)
    arguments = batch(model, family, "^ab#cdefgcdefgcd")
    with crossget.attach(model, KEEP):
        found = model.generate(**arguments, **{**GREEDY, "max_new_tokens": 6}, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences[:, -6:], by_forward(model, arguments, 6)[0])


@pytest.mark.parametrize("family", of(FAMILIES))
def test_beams(family: str) -> None:
    model = model_of(family)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with crossget.attach(model, KEEP):
        out = model.generate(**batch(model, family, *ROWS), **GREEDY, **beams)
        for row, numbers in enumerate(([0], [1, 2])):
            alone = batch(model, family, ROWS[row], numbers=[numbers])
            one = model.generate(**alone, **GREEDY, **beams)
            mine = slice(2 * row, 2 * row + 2)
            assert torch.equal(out.sequences[mine, -STEPS:], one.sequences[:, -STEPS:])
            torch.testing.assert_close(out.sequences_scores[mine], one.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", of([f for f in FAMILIES if not f.startswith("qwen")]))
def test_prompts_as_embeddings(family: str) -> None:
    """Hosts with positions of a grid need ids for them."""
    model = model_of(family)
    arguments = batch(model, family, *ROWS)
    embeds = model.get_input_embeddings()(arguments["input_ids"]).detach()
    if family == "gemma3":  # it scales inside of the embedding
        assert embeds.abs().max() > 1
    given = {k: v for k, v in arguments.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with crossget.attach(model, KEEP), torch.no_grad():
        expected = by_forward(model, arguments)
        assert_same(by_generate(model, given), expected)
        real = model(**arguments).logits[:, -3:]
        assert torch.equal(model(**given).logits[:, -3:], real)


# Turns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["", "#"], ids=["text", "new image"])
@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl"], ["llava", "qwen2_5_vl", "smolvlm"]))
def test_a_second_turn_with_the_cache_of_the_first(family: str, new: str) -> None:
    model = model_of(family)
    rows = ["^ab#cd", "^#e"]
    first = batch(model, family, *rows)
    with crossget.attach(model, KEEP):
        out = model.generate(**first, **GREEDY)
        turn = batch(model, family, f"x{new}yz", f"u{new}vw", numbers=[[2], [3]] if new else [[], []])
        said = longer(model, first, out.sequences[:, -STEPS:])
        whole = longer(model, said, turn["input_ids"])
        images = {k: v for k, v in turn.items() if k not in ("input_ids", "attention_mask", *types(model, said["input_ids"]))}
        text = {k: v for k, v in whole.items() if k in ("input_ids", "attention_mask", *types(model, said["input_ids"]))}
        found = by_generate(model, {**text, **images, **cache_of(out)})
        everything = vlm_models.pixels(family, [[0, 2], [1, 3]] if new else [[0], [1]])
        assert_same(found, by_forward(model, {**text, **everything}))


@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "llava_next"]))
def test_steps_by_hand_without_positions(family: str) -> None:
    model = model_of(family)
    arguments = batch(model, family, *ROWS)
    with crossget.attach(model, KEEP), torch.no_grad():
        answers, logits = by_forward(model, arguments)
        out = model(**arguments, use_cache=True)
        short = out.logits.shape[1]
        mask = (torch.arange(short) >= short - torch.tensor([[n] for n in lengths(model, family)])).long()
        found = [out.logits[:, -1]]
        for step in range(STEPS - 1):
            mask = torch.cat([mask, mask[:, -1:]], 1)
            out = model(input_ids=answers[:, step : step + 1], attention_mask=mask, **cache_of(out), use_cache=True)
            found.append(out.logits[:, -1])
        assert_same((answers, torch.stack(found, 1)), (answers, logits))


def lengths(model: Any, family: str) -> list[int]:
    """The numbers of tokens of the shorter prompts of `ROWS`."""
    counts = [len(image) for image in vlm_models.features(model, family, [[0], [1, 2]])]
    kept = [max(1, round(0.4 * n)) for n in counts]
    return [len(ROWS[0]) - 1 + kept[0], len(ROWS[1]) - 2 + kept[1] + kept[2]]
