"""Image features reduced behind the connector: turns, ways to generate, threads, interruptions, wrong input.

What a way to generate must give is the same model's own reduced forward of the whole, without cache, row by row. That
this forward is right is the subject of test_hf_connector.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import flash_kernel
import pytest
import torch
import transformers
import vlm_models
from hf_models import VERSION
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlm_models import batch, types

import crossget
from crossget.core.connector import FACTS, reduce_features

pytestmark = pytest.mark.skipif(VERSION < (5, 19), reason="connectors can be reduced from transformers 5.19 on")

KEEP = {"connector": crossget.Ward(crossget.Keep(0.4))}
STEPS = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000,
    "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": list(range(6)),  # no word is among these
}  # fmt: skip
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next", "smolvlm", "paligemma", "gemma3"]
FAST = ["llava"]
GRIDS = ["llava", "qwen2_5_vl"]  # positions of an image grid, too


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
    kinds = types(model, ids)
    if model.config.model_type == "paligemma":  # what follows the prompt is causal
        kinds = {"token_type_ids": torch.cat([arguments["token_type_ids"], torch.ones_like(new)], 1)}
    return {**arguments, "input_ids": ids, "attention_mask": mask, **kinds}


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
        arguments = longer(model, arguments, found[-1][:, 6:].argmax(-1, keepdim=True) + 6)
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


BIDIRECTIONAL = ["paligemma", "gemma3"]  # the tokens of an image attend to each other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", of(FAMILIES))
def test_ways_to_generate(family: str, way: str) -> None:
    model = model_of(family)
    if family in BIDIRECTIONAL and way.startswith("chunks"):  # a chunk does not see the next one, dense or reduced
        arguments = batch(model, family, *ROWS)
        dense, chunks = (by_generate(model, arguments, **more)[1] for more in ({}, WAYS[way]))
        assert (dense - chunks).abs().max() > 0.1
        return
    # A row by itself has no padding: `generate` drops its mask.
    for arguments in (batch(model, family, *ROWS), batch(model, family, ROWS[1], numbers=[[1, 2]])):
        more, length = dict(WAYS[way]), arguments["input_ids"].shape[1]
        if "max_length" in more:
            more["max_length"] = length + STEPS
        with crossget.attach(model, KEEP):
            out = model.generate(**arguments, **{**GREEDY, **more})
            found = out.sequences[:, length:], torch.stack(out.logits, 1)
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


@pytest.mark.parametrize("family", of(["llava", "internvl", "llava_next", "smolvlm"]))
def test_prompts_as_embeddings(family: str) -> None:
    """Of the others, the dense host takes no embeddings, or needs ids for its positions."""
    model = model_of(family)
    arguments = batch(model, family, *ROWS)
    embeds = model.get_input_embeddings()(arguments["input_ids"]).detach()
    given = {k: v for k, v in arguments.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with crossget.attach(model, KEEP), torch.no_grad():
        expected = by_forward(model, arguments)
        assert_same(by_generate(model, given), expected)
        real = model(**arguments).logits[:, -3:]
        assert torch.equal(model(**given).logits[:, -3:], real)


# Turns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["", "#"], ids=["text", "new image"])
@pytest.mark.parametrize(
    "family", of(["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl"], ["llava", "qwen2_5_vl", "smolvlm"])
)
def test_a_second_turn_with_the_cache_of_the_first(family: str, new: str) -> None:
    model = model_of(family)
    rows = ["^ab#cd", "^#e"]
    first = batch(model, family, *rows)
    with crossget.attach(model, KEEP):
        out = model.generate(**first, **GREEDY)
        turn = batch(model, family, f"x{new}yz", f"u{new}vw", numbers=[[2], [3]] if new else [[], []])
        said = longer(model, first, out.sequences[:, -STEPS:])
        whole = longer(model, said, turn["input_ids"])
        images = {
            k: v for k, v in turn.items() if k not in ("input_ids", "attention_mask", *types(model, said["input_ids"]))
        }
        text = {
            k: v for k, v in whole.items() if k in ("input_ids", "attention_mask", *types(model, said["input_ids"]))
        }
        found = by_generate(model, {**text, **images, **cache_of(out)})
        everything = vlm_models.pixels(family, [[0, 2], [1, 3]] if new else [[0], [1]])
        assert_same(found, by_forward(model, {**text, **everything}))


@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"]))
def test_the_first_image_in_the_second_turn(family: str) -> None:
    """The cache of the first turn was made without images, and of some beginning that prompts share."""
    model = model_of(family)
    first = batch(model, family, "^ab", "^c")
    whole = batch(model, family, "^abx#yz", "^cu#vwst")
    with crossget.attach(model, KEEP):
        cache = model.generate(**first, **{**GREEDY, "max_new_tokens": 1})
        second = {
            k: v
            for k, v in whole.items()
            if k not in ("input_ids", "attention_mask", *types(model, first["input_ids"]))
        }
        ids = torch.cat([first["input_ids"], batch(model, family, "x#yz", "u#vwst")["input_ids"]], 1)
        text = {"input_ids": ids, "attention_mask": (ids != 0).long(), **types(model, ids)}
        found = by_generate(model, {**text, **second, **cache_of(cache)})
        assert_same(found, by_forward(model, {**text, **second}))
        with pytest.raises(ValueError, match="give the whole prompt and the cache to generate"):
            model(**{**text, **second, **cache_of(cache)})


@pytest.mark.parametrize("family", of(GRIDS, GRIDS))
def test_three_turns(family: str) -> None:
    model = model_of(family)
    texts, numbers = [("^a#", "^#bc"), ("x#y", "u#vw"), ("d", "efgh")], [[0, 1], [2, 3], []]
    with crossget.attach(model, KEEP):
        said, more = batch(model, family, *texts[0], numbers=[[0], [1]]), {}
        for turn, words in enumerate(texts):
            images = vlm_models.pixels(family, [[n] for n in numbers[turn]]) if numbers[turn] else {}
            if turn:
                new = batch(model, family, *words, numbers=[[n] for n in numbers[turn]] or [[], []])
                said = longer(model, said, new["input_ids"])
                said["attention_mask"][said["input_ids"] == 0] = 0
            text = {k: v for k, v in said.items() if not k.startswith(("pixel", "image"))}
            seen = [[n for of_turn in numbers[: turn + 1] for n in of_turn[row : row + 1]] for row in (0, 1)]
            expected = by_forward(model, {**text, **vlm_models.pixels(family, seen)})
            out = model.generate(**text, **images, **more, **GREEDY)
            assert_same((out.sequences[:, -STEPS:], torch.stack(out.logits, 1)), expected)
            said, more = longer(model, text, out.sequences[:, -STEPS:]), cache_of(out)


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


# Threads, interruptions, copies -------------------------------------------------------------------------------------


@pytest.fixture
def llava() -> Any:
    return model_of("llava")


def logits_of(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**arguments).logits
    return logits


def test_threads_with_images_and_reducers_of_their_own(llava: Any) -> None:
    calls = [
        (crossget.Ward(crossget.Keep(3)), batch(llava, "llava", "^ab#cd", numbers=[[0]])),
        (crossget.MaxMin(crossget.Keep(7)), batch(llava, "llava", "^#x#yz", numbers=[[1, 2]])),
    ]
    with crossget.attach(llava, KEEP) as attached:

        def run(number: int) -> tuple[Tensor, Tensor, Any]:
            reducer, arguments = calls[number]
            with attached.with_reducer({"connector": reducer}):
                return by_generate(llava, arguments)[1], logits_of(llava, arguments), attached.tokens

        expected = [run(0), run(1)]
        assert expected[0][2] == {"connector": [(16, 3)]}
        found: dict[int, list[Any]] = {0: [], 1: []}
        meet = threading.Barrier(2)
        hook = llava.model.language_model.layers[0].register_forward_pre_hook(lambda *_: wait(meet))

        def repeat(number: int) -> None:
            for _ in range(3):
                found[number].append(run(number))

        threads = [threading.Thread(target=repeat, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
        assert attached.reducers["connector"].r == crossget.Keep(0.4)
    for number in (0, 1):
        assert len(found[number]) == 3
        for generated, logits, tokens in found[number]:
            assert torch.equal(generated, expected[number][0])
            assert torch.equal(logits, expected[number][1])
            assert tokens == expected[number][2]


def wait(meet: threading.Barrier) -> None:
    """Both threads are in the same place at a time, as long as both run."""
    try:
        meet.wait(timeout=5)
    except threading.BrokenBarrierError:
        return


PLACES = ["model.vision_tower", "model.multi_modal_projector", "model.language_model.layers.1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_an_interruption_leaves_no_trace(llava: Any, place: str, error: type[BaseException]) -> None:
    one, two = batch(llava, "llava", *ROWS), batch(llava, "llava", "^x#y", numbers=[[3]])

    def stop(*_: Any) -> None:
        raise error("stopped")

    with crossget.attach(llava, KEEP):
        expected = by_generate(llava, two)[1], logits_of(llava, two)
        for call in (lambda: logits_of(llava, one), lambda: by_generate(llava, one)):
            hook = llava.get_submodule(place).register_forward_pre_hook(stop)
            with pytest.raises(error, match="stopped"):
                call()
            hook.remove()
            assert torch.equal(logits_of(llava, two), expected[1])
            assert torch.equal(by_generate(llava, two)[1], expected[0])
            text = batch(llava, "llava", "^abc")
            assert logits_of(llava, text).shape[1] == 4


def test_a_call_inside_of_a_call_is_fitted_by_itself(llava: Any) -> None:
    """Such as that of a callback of a generation."""
    one, two = batch(llava, "llava", *ROWS), batch(llava, "llava", "^x#y", numbers=[[3]])
    seen = []

    def ask(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(by_generate(llava, two)[1])
        return scores

    with crossget.attach(llava, KEEP):
        expected, inner = by_generate(llava, one)[1], by_generate(llava, two)[1]
        assert torch.equal(by_generate(llava, one, logits_processor=[ask])[1], expected)
    assert len(seen) == STEPS
    for logits in seen:
        assert torch.equal(logits, inner)


def test_pauses_and_other_reducers(llava: Any) -> None:
    arguments = batch(llava, "llava", *ROWS)
    dense = logits_of(llava, arguments), by_generate(llava, arguments)[1]
    with crossget.attach(llava, KEEP) as attached:
        reduced = logits_of(llava, arguments)
        assert reduced.shape[1] < dense[0].shape[1]
        with attached.paused():
            assert torch.equal(logits_of(llava, arguments), dense[0])
            assert torch.equal(by_generate(llava, arguments)[1], dense[1])
        assert torch.equal(logits_of(llava, arguments), reduced)
        with attached.with_reducer(crossget.Ward(crossget.Keep(1.0))):
            assert torch.equal(logits_of(llava, arguments), dense[0])
            assert torch.equal(by_generate(llava, arguments)[1], dense[1])
        assert torch.equal(logits_of(llava, arguments), reduced)
        attached.reducer = crossget.Ward(crossget.Keep(3))
        assert attached.reducer.r == crossget.Keep(3)
        logits_of(llava, arguments)
        assert attached.tokens == {"connector": [(16, 3)] * 3}
        with pytest.raises(ValueError, match="separators"):
            attached.reducer = crossget.Ward(crossget.Keep(3, separators=True))
        assert attached.reducer.r == crossget.Keep(3)
    assert torch.equal(logits_of(llava, arguments), dense[0])
    assert "generate" not in llava.__dict__
    assert not llava._forward_pre_hooks
    assert not llava.model._forward_pre_hooks


@pytest.mark.parametrize("family", of(GRIDS))
def test_a_copy_and_a_pickle_are_attached_by_themselves(family: str) -> None:
    model = vlm_models.build(family)
    with crossget.attach(model, KEEP) as attached:
        pickled = pickle.dumps(model)  # now: what a forward of transformers leaves on any model cannot be pickled
        arguments = batch(model, family, *ROWS)
        expected = logits_of(model, arguments), by_generate(model, arguments)[1]
        for other in (copy.deepcopy(model), pickle.loads(pickled)):
            theirs = crossget.attachment(other)
            assert theirs is not attached
            assert torch.equal(logits_of(other, arguments), expected[0])
            assert torch.equal(by_generate(other, arguments)[1], expected[1])
            theirs.reducer = crossget.Ward(crossget.Keep(2))
            logits_of(other, arguments)
            assert theirs.tokens["connector"][0][1] == 2
            theirs.detach()
            assert torch.equal(logits_of(model, arguments), expected[0])
            dense = logits_of(other, arguments)
            with attached.paused():
                assert torch.equal(dense, logits_of(model, arguments))


def test_save_and_load(llava: Any, tmp_path: Any) -> None:
    arguments = batch(llava, "llava", *ROWS)
    method = crossget.CrossGET(crossget.Keep(0.3, per="image", positions="renumbered"), proportional_attention=True)
    with crossget.attach(llava, {"connector": method, "visual": crossget.ToMe(2)}) as attached:
        expected, reducers = logits_of(llava, arguments), attached.reducers
        attached.save(tmp_path)
    with crossget.load(llava, tmp_path) as loaded:
        assert loaded.reducers == reducers
        assert torch.equal(logits_of(llava, arguments), expected)
    with crossget.attach(llava, KEEP) as attached:
        attached.save(tmp_path)
    with crossget.load(llava, tmp_path) as loaded:
        assert list(loaded.reducers) == ["connector"]
        assert loaded.reducers["connector"].r == crossget.Keep(0.4)


def test_what_is_attached_is_not_attached_again(llava: Any) -> None:
    with crossget.attach(llava, KEEP):
        for reducer in (KEEP, crossget.Ward(1), {**KEEP, "visual": crossget.Ward(1)}):
            with pytest.raises(ValueError, match="already attached"):
                crossget.attach(llava, reducer)
    with crossget.attach(llava, crossget.Ward(1)) as attached:
        with pytest.raises(ValueError, match="already attached"):
            crossget.attach(llava, KEEP)
        with pytest.raises(ValueError, match=r"\['connector'\]: attached are \['visual'\]"):
            attached.reducer = KEEP


# Wrong input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(llava: Any) -> Iterator[list[str]]:
    """What has run of the tower and of the language model."""
    ran: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, part in (("tower", llava.model.vision_tower), ("language", llava.model.language_model))
    ]
    yield ran
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("calls", ["forward", "generate"])
def test_wrong_input_is_refused_before_images_are_encoded(llava: Any, encoded: list[str], calls: str) -> None:
    arguments = batch(llava, "llava", *ROWS)
    tokens = arguments["input_ids"].shape[1]
    wrong = [
        ({"attention_mask": torch.zeros(2, 1, tokens, tokens)}, ValueError, r"attention_mask has the shape"),
        ({"attention_mask": torch.ones(2, tokens - 1)}, ValueError, r"attention_mask has the shape"),
        ({"attention_mask": torch.ones(1, tokens)}, ValueError, r"attention_mask has the shape"),
    ]
    with crossget.attach(llava, KEEP):
        right = logits_of(llava, arguments)
        for change, error, message in wrong:
            encoded.clear()
            with pytest.raises(error, match=message):
                (llava if calls == "forward" else llava.generate)(**{**arguments, **change})
            assert not encoded, message
        assert torch.equal(logits_of(llava, arguments), right)


@pytest.mark.parametrize("calls", ["forward", "generate"])
def test_other_numbers_of_images_are_refused(llava: Any, encoded: list[str], calls: str) -> None:
    arguments = batch(llava, "llava", *ROWS)
    one = batch(llava, "llava", "^abc#")
    cut = {name: value[:, :-3] for name, value in one.items() if name != "pixel_values"}
    with crossget.attach(llava, KEEP):
        for wrong in (
            {**arguments, "pixel_values": arguments["pixel_values"][:2]},
            {**arguments, "pixel_values": torch.cat([arguments["pixel_values"]] * 2)},
            {**cut, "pixel_values": one["pixel_values"]},
            {**batch(llava, "llava", "^abc"), "pixel_values": one["pixel_values"]},
        ):
            encoded.clear()
            with pytest.raises(ValueError, match=r"image tokens and the images have \d+ features"):
                (llava if calls == "forward" else llava.generate)(**wrong)
            assert encoded == ["tower"]  # only it tells the number of features


def test_a_prompt_without_text_for_a_method_that_needs_one(llava: Any, encoded: list[str]) -> None:
    arguments = batch(llava, "llava", "^ab#c", "#")
    encoded.clear()
    for method in (crossget.CrossGET, crossget.Determinantal):
        with (
            crossget.attach(llava, {"connector": method(crossget.Keep(4))}),
            pytest.raises(RuntimeError, match="row 1 has none"),
        ):
            llava(**arguments)
    assert not encoded


@pytest.mark.parametrize(
    ("family", "reducer", "message"),
    [
        ("llava", crossget.Ward(crossget.Keep(3, separators=True)), "no separators among its image features"),
        ("smolvlm", crossget.Ward(crossget.Keep(3, per="image")), "which tiles are of one image"),
        ("qwen2_5_vl", crossget.Ward(crossget.Keep(3, positions="renumbered")), "those of the image grid"),
        ("qwen3_5", crossget.Ward(crossget.Keep(3), proportional_attention=True), "of its 3 layers, 1 have scores"),
        ("llava", crossget.Ward(crossget.Keep(3), class_token_only=True), "class_token_only=True.*no effect"),
        ("llava", crossget.Ward(crossget.Keep(3), norm_correction=True), "norm_correction=True.*no effect"),
        ("llava", crossget.TopK(crossget.Keep(3), importance="class_token"), "class token.*use importance='tower_"),
        ("llava", crossget.CrossGET(crossget.Keep(3), strip_cross_token=True), "strip_cross_token=True.*no effect"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_by_attach(family: str, reducer: Any, message: str) -> None:
    model = model_of(family)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=message):
        crossget.attach(model, {"connector": reducer})
    if family == "llava":
        with pytest.raises(ValueError, match=message):
            crossget.attach(model, {"connector": reducer, "visual": crossget.Ward(1)})
    assert model.__dict__ == before
    assert not model._forward_pre_hooks


def test_what_is_no_reducer(llava: Any) -> None:
    with pytest.raises(TypeError, match="give a reducer such as"):
        crossget.attach(llava, {"connector": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="Keep is for image features behind the connector"):
        crossget.attach(llava, crossget.Ward(crossget.Keep(3)))
    with pytest.raises(TypeError, match="connector"):
        crossget.attach(torch.nn.Linear(2, 2), KEEP)


# Units, separators, positions ---------------------------------------------------------------------------------------


def test_all_tiles_of_an_image_together() -> None:
    """InternVL's are a run of placeholders; their features spread over the tiles by what these show."""
    model = model_of("internvl")
    arguments = batch(model, "internvl", "^ab##cd", "^#x###y")
    with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(10, per="image"))}) as attached:
        logits_of(model, arguments)
        assert attached.tokens == {"connector": [(32, 10), (16, 10), (48, 10)]}
        answers = by_generate(model, arguments)
        assert_same(answers, by_forward(model, arguments))
        alone = batch(model, "internvl", "^#x###y", numbers=[[2, 3, 4, 5]])
        assert torch.equal(by_generate(model, alone)[0], answers[0][1:])
        attached.reducer = crossget.Ward(crossget.Keep(10))
        logits_of(model, arguments)
        assert attached.tokens == {"connector": [(16, 10)] * 6}


@pytest.mark.parametrize("family", of(["llava_next", "llava_onevision"], ["llava_next"]))
def test_newlines_stay(family: str) -> None:
    model = model_of(family)
    arguments = batch(model, family, *ROWS)
    features = vlm_models.features(model, family, [[0], [1, 2]])
    newlines = [int((image == model.model.image_newline).all(1).sum()) for image in features]
    assert min(newlines) > 1
    with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(9, separators=True))}) as attached:
        assert_same(by_generate(model, arguments), by_forward(model, arguments))
        units = attached._connector.last_record.units  # type: ignore[union-attr]
        for unit, image, count in zip(units, features, newlines, strict=True):
            assert len(unit.kept) == 9 + count
            assert int((unit.tokens == model.model.image_newline).all(1).sum()) == count
            assert int((image[unit.kept] == model.model.image_newline).all(1).sum()) == count
        assert attached.tokens["connector"] == [(len(i), 9 + n) for i, n in zip(features, newlines, strict=True)]


def test_positions_of_the_prompt_or_counted_anew(llava: Any) -> None:
    arguments = batch(llava, "llava", *ROWS)
    seen = []
    hook = llava.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with crossget.attach(llava, {"connector": crossget.Ward(crossget.Keep(5))}) as attached:
        logits_of(llava, arguments)
        kept = [unit.kept for unit in attached._connector.last_record.units]  # type: ignore[union-attr]
        # "^ab#cdef" and "^a#g#hijk": 23 and 39 tokens, of which 12 and 17 stay
        rows = [
            [0, 1, 2, *(3 + kept[0]), *range(19, 23)],
            [0, 1, *(2 + kept[1]), 18, *(19 + kept[2]), *range(35, 39)],
        ]
        assert seen[-1][0, -12:].tolist() == rows[0]
        assert seen[-1][1].tolist() == rows[1]
        by_generate(llava, arguments)
        assert seen[-1][:, 0].tolist() == [23 + STEPS - 2, 39 + STEPS - 2]
        attached.reducer = crossget.Ward(crossget.Keep(5, positions="renumbered"))
        logits_of(llava, arguments)
        assert seen[-1][0, -12:].tolist() == list(range(12))
        assert seen[-1][1].tolist() == list(range(17))
        assert_same(by_generate(llava, arguments), by_forward(llava, arguments))
    hook.remove()


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "smolvlm", "internvl"], ["llava", "smolvlm"]))
@pytest.mark.parametrize("rows", [["^ab#c", "^defghij"], ["^abcdefgh", "^#x#y"]], ids=["second", "first"])
def test_a_row_without_an_image(family: str, rows: list[str]) -> None:
    model = model_of(family)
    arguments = batch(model, family, *rows)
    with crossget.attach(model, KEEP):
        found = by_generate(model, arguments)
        assert_same(found, by_forward(model, arguments))
        used = 0
        for row, text in enumerate(rows):
            count = text.count("#")
            alone = batch(model, family, text, numbers=[list(range(used, used + count))])
            used += count
            assert torch.equal(by_generate(model, alone)[0][0], found[0][row])


@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl"]))
def test_prompts_of_text_alone_are_the_dense_ones(family: str) -> None:
    model = model_of(family)
    arguments = batch(model, family, "^abc", "^defghij")
    dense = logits_of(model, arguments), by_generate(model, arguments)
    images = batch(model, family, *ROWS)
    with crossget.attach(model, KEEP):
        for _ in range(2):
            assert torch.equal(logits_of(model, arguments), dense[0])
            found = by_generate(model, arguments)
            assert torch.equal(found[0], dense[1][0])
            assert torch.equal(found[1], dense[1][1])
            logits_of(model, images)  # what it leaves on the model must not show in the next call


def test_image_tokens_that_are_hidden_as_padding(llava: Any) -> None:
    """A prompt that was cut in front, in the middle of an image: what is hidden is in no answer."""
    arguments = batch(llava, "llava", "#a#bc", "^x#yz" + "w" * 15)
    hidden = {**arguments, "attention_mask": arguments["attention_mask"].clone()}
    hidden["attention_mask"][0, :10] = 0
    with crossget.attach(llava, {"connector": crossget.Ward(crossget.Keep(6))}) as attached:
        found = by_generate(llava, hidden)
        assert attached.tokens == {"connector": [(16, 6)] * 3}
        assert_same(found, by_forward(llava, hidden))
        kept = attached._connector.last_record.units[0].kept  # type: ignore[union-attr]
        assert 0 < int((kept >= 10).sum()) < 6
        assert not torch.equal(found[1], by_generate(llava, arguments)[1])


@pytest.mark.parametrize("family", of(["qwen2_5_vl", "llava_onevision"], ["qwen2_5_vl"]))
def test_videos(family: str) -> None:
    model = model_of(family)
    if family == "qwen2_5_vl":
        values = torch.randn(2 * 4 * 6, 3 * 2 * 49)
        images: dict[str, Tensor] = {"pixel_values_videos": values, "video_grid_thw": torch.tensor([[2, 4, 6]])}
        given = images
    else:
        images = {"pixel_values_videos": torch.randn(1, 3, 3, 28, 28)}
        given = images
    with torch.no_grad():
        features = model.model.get_video_features(**given, return_dict=True).pooler_output
    n = sum(entry.reshape(-1, entry.shape[-1]).shape[0] for entry in features)
    ids = torch.tensor([[1, 7, *[vlm_models.VIDEO] * n, 8, 9]])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(model, ids), **images}
    with crossget.attach(model, KEEP) as attached:
        assert_same(by_generate(model, arguments), by_forward(model, arguments))
        counts = attached.tokens["connector"]
        assert sum(before for before, _ in counts) == n
        assert logits_of(model, arguments).shape[1] == 4 + sum(after for _, after in counts)
        assert 0.3 * n < sum(after for _, after in counts) < 0.5 * n


# Sizes in the language model ----------------------------------------------------------------------------------------


def copies(model: Any, family: str, row: str, numbers: list[int], units: list[Any]) -> dict[str, Any]:
    """The prompt [1, S, C] in which a reduced token stands as often as it has members, at the position of the first.

    Also the group [S] that each column is a copy of, and positions, by hand.
    """
    arguments = batch(model, family, row, numbers=[numbers])
    ids = arguments["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().clone()
    if family.startswith("qwen"):
        names = ("attention_mask", "mm_token_type_ids", "image_grid_thw")
        positions = model.model.get_rope_index(ids, **{name: arguments[name] for name in names})[0]
    else:
        positions = torch.arange(ids.shape[1])[None]
    places = (ids[0] == vlm_models.IMAGE).nonzero()[:, 0].split([len(unit.source) for unit in units])
    times = torch.ones(ids.shape[1], dtype=torch.long)
    for place, unit in zip(places, units, strict=True):
        times[place] = 0
        times[place[unit.kept]] = unit.sizes.long()
        embeds[0, place[unit.kept]] = unit.tokens
    column = torch.repeat_interleave(torch.arange(len(times)), times)
    return {"embeds": embeds[:, column], "positions": positions[..., column], "group": column}


def logits_of_copies(model: Any, prompt: dict[str, Any]) -> Tensor:
    """[V] behind the last one. Copies of one token see each other."""
    group = prompt["group"]
    hidden = group[:, None] < group[None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=prompt["embeds"], position_ids=prompt["positions"], attention_mask=mask, use_cache=False
        )
        return model.lm_head(out.last_hidden_state)[0]


def answer_of_copies(model: Any, prompt: dict[str, Any]) -> tuple[Tensor, Tensor]:
    found = []
    for _ in range(STEPS):
        found.append(logits_of_copies(model, prompt)[-1])
        answer = found[-1][6:].argmax() + 6
        embed = model.get_input_embeddings()(answer.view(1, 1)).detach()
        last = prompt["positions"].amax() + 1
        prompt = {
            "embeds": torch.cat([prompt["embeds"], embed], 1),
            "positions": torch.cat([prompt["positions"], last.expand_as(prompt["positions"][..., :1])], -1),
            "group": torch.cat([prompt["group"], prompt["group"][-1:] + 1]),
        }
    answers = torch.stack([logits[6:].argmax() + 6 for logits in found])
    return answers, torch.stack(found)


SIZED = {"connector": crossget.Ward(crossget.Keep(0.3), proportional_attention=True)}


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "llava_next", "internvl"], GRIDS))
def test_sizes_are_attention_over_copies(family: str, attention: str) -> None:
    model = model_of(family, attention)
    rows, numbers = ["^ab#cdef", "^a#g#hi"], [[0], [1, 2]]
    arguments = batch(model, family, *rows)
    with crossget.attach(model, SIZED) as attached:
        logits = logits_of(model, arguments)
        units = attached._connector.last_record.units  # type: ignore[union-attr]
        found = by_generate(model, arguments)
        assert_same(found, by_forward(model, arguments))
        static = by_generate(model, arguments, cache_implementation="static", disable_compile=True)
        assert_same(static, found)
        assert_same(by_generate(model, arguments, prefill_chunk_size=5), found)
        assert max(float(unit.sizes.max()) for unit in units) > 2
        attached.reducer = crossget.Ward(crossget.Keep(0.3))
        plain = logits_of(model, arguments)
    of_row = [units[:1], units[1:]]
    for row in (0, 1):
        prompt = copies(model, family, rows[row], numbers[row], of_row[row])
        expected = logits_of_copies(model, prompt)
        last = (prompt["group"].diff(append=torch.tensor([-1])) != 0).nonzero()[:, 0]  # of each group
        wanted = expected[last]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(logits[row, -len(last) :], wanted, rtol=1e-4, atol=2e-4 * scale)
        assert (plain[row, -len(last) :] - wanted).abs().max() > 0.01 * scale  # sizes matter here
        answers, steps = answer_of_copies(model, prompt)
        assert_same((found[0][row], found[1][row]), (answers, steps))


@pytest.mark.parametrize("family", of(GRIDS))
def test_sizes_in_later_turns_beams_and_steps_by_hand(family: str) -> None:
    model = model_of(family)
    first = batch(model, family, "^ab#cd", "^#e")
    with crossget.attach(model, SIZED):
        out = model.generate(**first, **GREEDY)
        turn = batch(model, family, "x#yz", "u#vw", numbers=[[4], [5]])
        whole = longer(model, longer(model, first, out.sequences[:, -STEPS:]), turn["input_ids"])
        images = {k: v for k, v in turn.items() if k.startswith(("pixel", "image"))}
        text = {k: v for k, v in whole.items() if not k.startswith(("pixel", "image"))}
        found = by_generate(model, {**text, **images, **cache_of(out)})
        assert_same(found, by_forward(model, {**text, **vlm_models.pixels(family, [[0, 4], [1, 5]])}))
        beams = {"num_beams": 3, "output_scores": True}
        both = model.generate(**batch(model, family, *ROWS), **GREEDY, **beams)
        for row, numbers in enumerate(([0], [1, 2])):
            one = model.generate(**batch(model, family, ROWS[row], numbers=[numbers]), **GREEDY, **beams)
            torch.testing.assert_close(both.sequences_scores[row], one.sequences_scores[0], rtol=1e-4, atol=1e-4)
        alone = batch(model, family, ROWS[1], numbers=[[1, 2]])
        answers, logits = by_forward(model, alone)
        with torch.no_grad():
            out, steps = model(**alone, use_cache=True), []
            for step in range(STEPS):
                steps.append(out.logits[:, -1])
                out = model(input_ids=answers[:, step : step + 1], **cache_of(out), use_cache=True)
        assert_same((answers, torch.stack(steps, 1)), (answers, logits))


@pytest.mark.parametrize("sliding", ["gemma3"])
def test_sizes_in_sliding_windows(sliding: str) -> None:
    """A window is cut from the keys in a cache of its own length."""
    model = model_of(sliding)
    arguments = batch(model, sliding, "^ab#cdefghi", "^a#g#hijklmnopqrstuvw")
    with crossget.attach(model, SIZED):
        expected = by_forward(model, arguments)
        assert_same(by_generate(model, arguments), expected)
        assert_same(by_generate(model, arguments, cache_implementation="static", disable_compile=True), expected)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is transformers' FlashAttention, with functions that run on a CPU."""
    functions = (flash_kernel.flash_attn_func, flash_kernel.flash_attn_varlen_func, None)
    padding = (flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: (*functions, *padding))
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return "flash_attention_2"


def set_kernel(model: Any, kernel: str) -> None:
    """Set the kernel of the language model. That of the whole is what `generate` looks at."""
    model.config._attn_implementation = kernel  # and of all parts
    model.config.vision_config._attn_implementation = "sdpa"


def without_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """A kernel that transformers gives no mask, as it knows none for it."""
    assert attention_mask is None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash_kernel.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True), None


def without_scaling(*args: Any, scaling: float, **more: Any) -> tuple[Tensor, None]:
    return without_mask(*args, scaling=0.5, **more)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register `without_mask` and `without_scaling`."""
    found = (without_mask, without_scaling)
    for one in found:
        transformers.AttentionInterface.register(one.__name__, one)
    yield
    for one in found:
        transformers.AttentionInterface._global_mapping.pop(one.__name__)


@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "llava_next", "internvl", "qwen3_vl"], GRIDS))
def test_sizes_where_a_kernel_takes_no_bias(family: str, flash_attention: str) -> None:
    """FlashAttention gets them as one more channel: rows with padding, caches, beams and later turns equal SDPA's."""
    model, kernel = vlm_models.build(family), flash_attention
    both, alone = batch(model, family, "^ab#cdef", "^a#g#hi"), batch(model, family, "^ab#cd", numbers=[[0]])
    ways: list[dict[str, Any]] = [
        {}, {"prefill_chunk_size": 5}, {"num_beams": 2}, {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ]  # fmt: skip
    turn = batch(model, family, "x#yz", numbers=[[4]])
    images = {k: v for k, v in turn.items() if k.startswith(("pixel", "image"))}

    def results() -> list[tuple[Tensor, Tensor]]:
        found = [by_generate(model, arguments, **way) for arguments in (both, alone) for way in ways]
        out = model.generate(**alone, **GREEDY)
        whole = longer(model, longer(model, alone, out.sequences[:, -STEPS:]), turn["input_ids"])
        text = {k: v for k, v in whole.items() if not k.startswith(("pixel", "image"))}
        found.append(by_generate(model, {**text, **images, **cache_of(out)}))
        ids = alone["input_ids"]
        logits = [model(**arguments).logits[:, -8:] for arguments in (both, alone)]  # these are no padding
        return [*found, *((ids, one) for one in logits)]

    method = crossget.Ward(crossget.Keep(0.3))
    with torch.no_grad(), crossget.attach(model, SIZED) as attached:
        expected = results()
        attached.reducer = method
        plain = results()
        attached.reducer = SIZED["connector"]
        set_kernel(model, kernel)
        found = results()
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        attached.reducer = method
        for one, other in zip(results(), plain, strict=True):
            assert_same(one, other)
        assert (plain[-1][1] - expected[-1][1]).abs().max() > 0.01 * expected[-1][1].abs().max()  # sizes matter here


def test_sizes_where_a_kernel_gets_no_mask(kernels: None) -> None:
    model = vlm_models.build("llava")
    arguments = batch(model, "llava", "^ab#cdef", numbers=[[0]])
    attention = model.model.language_model.layers[0].self_attn
    with crossget.attach(model, SIZED):
        expected = by_generate(model, arguments)
    set_kernel(model, "without_mask")
    names = list(ALL_ATTENTION_FUNCTIONS)
    before = {**attention.__dict__}
    with crossget.attach(model, SIZED):
        assert_same(by_generate(model, arguments), expected)
        assert attention.config._attn_implementation == "without_mask"
        copied = copy.deepcopy(model)
        assert copied.model.language_model.layers[0].self_attn.config.vocab_size == attention.config.vocab_size
        assert_same(by_generate(copied, arguments), expected)
        checkpoint(model.train(), use_reentrant=False)
        gradients = []
        for kernel in ("without_mask", "sdpa"):
            set_kernel(model, kernel)
            model(**arguments, labels=arguments["input_ids"], use_cache=False).loss.backward()
            gradients.append(attention.q_proj.weight.grad)
            model.zero_grad()
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    del copied
    gc.collect()
    assert attention.config is before["config"]
    assert attention.__dict__.keys() == before.keys()
    assert list(ALL_ATTENTION_FUNCTIONS) == names


def test_sizes_after_a_kernel_that_failed(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited for the failed call is not taken by a later one, and a kernel that is not asked for is an error."""
    model = vlm_models.build("llava")
    arguments, text = batch(model, "llava", "^ab#cd", numbers=[[0]]), {"input_ids": torch.tensor([[1, 7, 8, 9]])}
    attention = model.model.language_model.layers[1].self_attn
    set_kernel(model, "without_mask")
    with torch.no_grad(), crossget.attach(model, SIZED):
        expected, dense = model(**arguments).logits, model(**text).logits
        with monkeypatch.context() as patch:
            patch.setattr(attention.o_proj, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**arguments)
            patch.setattr(attention.v_proj, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**arguments)
        assert torch.equal(model(**text).logits, dense)
        assert torch.equal(model(**arguments).logits, expected)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", lambda hidden_states, **more: (hidden_states, None))
            with pytest.raises(RuntimeError, match="did not call the kernel 'without_mask'"):
                model(**arguments)
        assert torch.equal(model(**arguments).logits, expected)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [("flash_attention_2", "no further channel"), ("without_scaling", "changes its results")],
)
def test_kernels_that_take_no_sizes_are_refused(kernel: str, reason: str, kernels: None) -> None:
    """Here FlashAttention is not installed."""
    model = vlm_models.build("llava")
    arguments = batch(model, "llava", *ROWS)
    set_kernel(model, kernel)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=f"proportional_attention=True.*{kernel}.*{reason}"):
        crossget.attach(model, SIZED)
    assert model.__dict__ == before
    set_kernel(model, "sdpa")
    with crossget.attach(model, SIZED):
        set_kernel(model, kernel)  # after attaching
        model.model.vision_tower.register_forward_pre_hook(lambda *args: pytest.fail("encoded before the error"))
        with pytest.raises(RuntimeError, match=f"{kernel}.*{reason}"):
            model(**arguments)


def test_a_kernel_that_caps_scores_is_refused(flash_attention: str) -> None:
    model = vlm_models.build("llava")
    set_kernel(model, flash_attention)
    model.model.language_model.layers[0].self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="flash_attention_2.*behind a cap of the scores"):
        crossget.attach(model, SIZED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")  # transformers builds flex masks in this way
def test_sizes_in_flex_attention() -> None:
    model = vlm_models.build("llava")
    arguments = batch(model, "llava", *ROWS)
    with torch.no_grad(), crossget.attach(model, SIZED):
        expected = logits_of(model, arguments)
        set_kernel(model, "flex_attention")
        found = logits_of(model, arguments)
    # These are no padding.
    torch.testing.assert_close(found[:, -8:], expected[:, -8:], rtol=1e-4, atol=2e-4 * float(expected.max()))


# Tower and connector together ---------------------------------------------------------------------------------------


def by_two_steps(
    model: Any, family: str, row: str, numbers: list[int], tower: Any, keep: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The logits [T, V] of a row, and its answer: the tower reduced, then each image's features reduced, by hand."""
    with crossget.attach(model, {"visual": tower}), torch.no_grad():
        pixels = vlm_models.pixels(family, [numbers])
        features = list(model.model.get_image_features(**pixels, return_dict=True).pooler_output)
    reducer = crossget.Ward(1).resolved(FACTS)
    units = [reduce_features(reducer, image, max(1, round(keep * len(image)))) for image in features]
    embeds, positions, left = [], [], iter(units)
    count = 0
    for letter in row:
        if letter == "#":
            unit = next(left)
            embeds.append(unit.tokens)
            positions.append(count + unit.kept)
            count += len(unit.source)
        else:
            token = torch.tensor([1 if letter == "^" else 6 + ord(letter) % 54])
            embeds.append(model.get_input_embeddings()(token).detach())
            positions.append(torch.tensor([count]))
            count += 1
    x, p = torch.cat(embeds)[None], torch.cat(positions)[None]
    kinds = {"token_type_ids": torch.zeros_like(p)} if family == "paligemma" else {}
    found = []
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(
                inputs_embeds=x, position_ids=p, attention_mask=torch.ones_like(p), use_cache=False, **kinds
            ).logits[0]
        found.append(logits)
        answer = logits[-1, 6:].argmax() + 6
        x = torch.cat([x, model.get_input_embeddings()(answer.view(1, 1)).detach()], 1)
        p = torch.cat([p, torch.full_like(p[:, :1], count + len(found) - 1)], 1)
        kinds = {name: torch.cat([value, torch.ones_like(value[:, :1])], 1) for name, value in kinds.items()}
    last = torch.stack([logits[-1] for logits in found])
    return found[0], (last[:, 6:].argmax(-1) + 6, last)


@pytest.mark.parametrize("tower", [crossget.CrossGET(2), crossget.Ward(3)], ids=["crossget", "ward"])
@pytest.mark.parametrize("family", of(["llava", "paligemma"]))
def test_a_tower_and_the_connector_behind_it(family: str, tower: Any) -> None:
    model = model_of(family)
    arguments = batch(model, family, *ROWS)
    dense = vlm_models.features(model, family, [[0]])[0]
    labels = arguments["input_ids"].masked_fill(arguments["attention_mask"] == 0, -100)
    labels = labels.masked_fill((labels == vlm_models.IMAGE) | (labels == 1), -100)
    expected = [by_two_steps(model, family, ROWS[row], [[0], [1, 2]][row], tower, 0.4) for row in (0, 1)]
    with crossget.attach(model, {"visual": tower, "connector": crossget.Ward(crossget.Keep(0.4))}) as attached:
        found = by_generate(model, arguments)
        with torch.no_grad():
            out = model(**arguments, labels=labels)
        counts = attached.tokens["connector"]
        assert counts[0][0] < len(dense)
        assert counts == [(counts[0][0], round(0.4 * counts[0][0]))] * 3
        assert len(attached.tokens["visual"]) > 1
        assert_same(found, by_forward(model, arguments))
        for way in ({"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
            again = model.generate(**arguments, **{**GREEDY, **way})
            assert again.sequences.shape == (2, arguments["input_ids"].shape[1] + STEPS)
            assert way == {"num_beams": 2} or torch.equal(again.sequences[:, -STEPS:], found[0])
        turn = longer(model, arguments, found[0])
        if family == "llava":
            cache = cache_of(model.generate(**arguments, **GREEDY))
            then = {name: value for name, value in turn.items() if name != "pixel_values"}
            assert_same(by_generate(model, {**then, **cache}), by_forward(model, turn))
    assert "generate" not in model.__dict__
    losses, targets = [], []
    for row in (0, 1):
        logits, answer = expected[row]
        scale = float(logits.abs().max())
        torch.testing.assert_close(out.logits[row, -len(logits) :], logits, rtol=1e-4, atol=2e-4 * scale)
        assert_same((found[0][row], found[1][row]), answer)
        ids = [[-100] * counts[0][1] if c == "#" else [-100 if c == "^" else 6 + ord(c) % 54] for c in ROWS[row]]
        targets.append(torch.tensor([token for of_letter in ids for token in of_letter][1:]))
        losses.append(F.cross_entropy(logits[:-1], targets[-1], reduction="none", ignore_index=-100))
    mean = torch.cat(losses).sum() / (torch.cat(targets) >= 0).sum()
    torch.testing.assert_close(out.loss, mean, rtol=1e-4, atol=1e-4)


def test_a_tower_and_a_connector_are_taken_off_together() -> None:
    model = vlm_models.build("llava")
    arguments = batch(model, "llava", *ROWS)
    dense = logits_of(model, arguments), by_generate(model, arguments)[1]
    both = {"visual": crossget.CrossGET(2), "connector": crossget.Ward(crossget.Keep(0.4))}
    with crossget.attach(model, both) as attached:
        reduced = logits_of(model, arguments)
        with attached.paused():
            assert torch.equal(logits_of(model, arguments), dense[0])
        assert torch.equal(logits_of(model, arguments), reduced)
        with attached.with_reducer({"connector": crossget.Ward(crossget.Keep(1.0)), "visual": crossget.Ward(0)}):
            assert torch.equal(logits_of(model, arguments), dense[0])
            assert torch.equal(by_generate(model, arguments)[1], dense[1])
    assert torch.equal(logits_of(model, arguments), dense[0])
    assert torch.equal(by_generate(model, arguments)[1], dense[1])


# Training -----------------------------------------------------------------------------------------------------------


def with_labels(model: Any, family: str) -> dict[str, Any]:
    arguments = batch(model, family, *ROWS)
    labels = arguments["input_ids"].masked_fill(arguments["attention_mask"] == 0, -100)
    return {**arguments, "labels": labels.masked_fill((labels == vlm_models.IMAGE) | (labels == 1), -100)}


def gradients(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpoint(model: Any, **settings: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


@pytest.mark.parametrize("sized", [False, True], ids=["", "sizes"])
@pytest.mark.parametrize("family", of(["llava", "qwen2_5_vl", "qwen3_vl"]))
def test_gradient_checkpointing(family: str, sized: bool) -> None:
    """The recomputation runs when the call is over."""
    model = vlm_models.build(family).train()
    arguments = with_labels(model, family)
    with crossget.attach(model, SIZED if sized else KEEP):
        expected = gradients(model, arguments)
        assert {name.split(".")[1] for name in expected} >= {"language_model"}
        assert any("vision_tower" in name or "visual" in name for name in expected)
        checkpoint(model, use_reentrant=False)
        found = gradients(model, arguments)
        other = batch(model, family, "^x#y", numbers=[[3]])
        loss = model(**arguments).loss
        model(**other)  # in between forward and backward
        model.zero_grad()
        loss.backward()
        later = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1e-3, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)
        torch.testing.assert_close(later[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_re_entrant_checkpointing() -> None:
    model = vlm_models.build("llava").train()
    arguments = with_labels(model, "llava")
    with crossget.attach(model, SIZED):
        expected = gradients(model, arguments)
        checkpoint(model, use_reentrant=True)
        model.enable_input_require_grads()
        found = gradients(model, arguments)
    for name, gradient in expected.items():
        if "language_model.layers" in name:
            scale = max(1e-3, float(gradient.abs().max()))
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("order", ["adapters first", "connector first"])
def test_adapters_are_tuned_with_the_connector_reduced(order: str) -> None:
    peft = pytest.importorskip("peft")
    model = vlm_models.build("llava")
    arguments = with_labels(model, "llava")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    with crossget.attach(model, KEEP):
        expected = model(**arguments).loss.detach()
    if order == "connector first":
        attached = crossget.attach(model, KEEP)
        tuned = peft.get_peft_model(model, config)
    else:
        tuned = peft.get_peft_model(model, config)
        attached = crossget.attach(tuned, KEEP)
    torch.testing.assert_close(tuned(**arguments).loss.detach(), expected)  # a new adapter adds nothing
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.1), []
    for _ in range(8):
        loss = tuned(**arguments).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert attached.tokens["connector"] == [(16, 6)] * 3
    inputs = {name: value for name, value in arguments.items() if name != "labels"}
    assert_same(by_generate(tuned, inputs), by_forward(tuned.base_model.model, inputs))
    attached.detach()
    assert logits_of(tuned, inputs).shape[1] == inputs["input_ids"].shape[1]


def in_int8(language: nn.Module) -> None:
    """Weights in eight bits, by torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(language, quantization.Int8WeightOnlyConfig())


def in_four_bits(language: nn.Module) -> None:
    """Weights in four bits, by bitsandbytes."""
    layers = pytest.importorskip("bitsandbytes").nn
    for name, dense in [(name, one) for name, one in language.named_modules() if isinstance(one, nn.Linear)]:
        small = layers.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, torch.float32, quant_type="nf4"
        )
        small.load_state_dict(dense.state_dict())
        language.set_submodule(name, small.to("cpu"))  # this rounds the weights


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "most"), [(in_int8, 0.05), (in_four_bits, 0.5)])
def test_a_quantised_language_model(quantize: Any, most: float) -> None:
    model = vlm_models.build("llava")
    arguments = batch(model, "llava", *ROWS)
    with crossget.attach(model, KEEP):
        exact = logits_of(model, arguments)
    quantize(model.model.language_model)
    for reducer in (SIZED, KEEP):
        with crossget.attach(model, reducer) as attached:
            assert_same(by_generate(model, arguments), by_forward(model, arguments))
            rounded = logits_of(model, arguments)
            assert attached.tokens["connector"] == [(16, round(16 * reducer["connector"].r.tokens))] * 3
    assert 0 < (rounded - exact).abs().max() < most * exact.abs().max()


# Compiled models ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # of Dynamo
@pytest.mark.parametrize("reducer", [KEEP, SIZED], ids=["", "sizes"])
@pytest.mark.parametrize("family", GRIDS)
def test_compiled(family: str, reducer: Any) -> None:
    """The hooks run between graphs. What decodes with a static cache is compiled once, as in the dense model."""
    model = vlm_models.build(family)
    arguments, other = batch(model, family, *ROWS), batch(model, family, "^x#y", "^zw#vuv", numbers=[[3], [4]])
    with crossget.attach(model, reducer):
        expected = [logits_of(model, one) for one in (arguments, other)]
        answers = [by_generate(model, one) for one in (arguments, other)]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        for one, logits in zip((arguments, other), expected, strict=True):
            torch.testing.assert_close(logits_of(compiled, one), logits, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        config = transformers.CompileConfig(backend="eager", mode="default")
        config._compile_all_devices = True  # on a CPU, too
        model.generation_config.compile_config = config
        for one, answer in zip((arguments, other), answers, strict=True):
            assert_same(by_generate(model, one, cache_implementation="static"), answer)
        assert model._compiled_call is not None
    torch._dynamo.reset()
