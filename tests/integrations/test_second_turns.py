"""transformers' LLaVA-1.5 and PaliGemma: conversations that continue with the cache of an earlier call.

The expected logits are those of one forward of the whole conversation, whose prompts are shortened by the tests.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import DENSE, IMAGE, VERSION, images, paligemma, prompts
from torch import Tensor, nn
from transformers import DynamicCache

import crossget

ANSWER = {
    "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [0, IMAGE],
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
REDUCED = {2: 11, 3: 8, 4: 5}  # image tokens with this r; a batch of two images has 32, which 8 divides
NEW_IMAGES = VERSION >= (5, 0)  # before, transformers ignores pixels beside a cache


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = hf_models.llava()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(params=REDUCED, ids=lambda r: f"r={r}")
def attached(model: nn.Module, request: pytest.FixtureRequest) -> Iterator[crossget.Attachment]:
    with crossget.attach(model, crossget.CrossGET(r=request.param)) as handle, torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0, 0.3)
        yield handle


def keep(attached: crossget.Attachment) -> int:
    return REDUCED[attached.reducers["visual"].r]  # type: ignore[index]


def cache_of(out: Any) -> dict[str, Any]:
    """The argument of the next call that takes the cache of this output."""
    return {"cache": out.cache} if "cache" in out else {"past_key_values": out.past_key_values}


def cache_object_of(out: Any) -> tuple[str, Any]:
    """The name and value of that argument, where it is an object that can be changed."""
    ((name, cache),) = cache_of(out).items()
    if isinstance(cache, tuple):
        pytest.skip("this transformers returns a tuple of keys and values")
    return name, cache


def short(ids: Tensor, mask: Tensor, keep: int) -> list[Tensor]:
    """Each row without padding and without the image tokens that are removed."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        row = row[real != 0]
        seen = (row == IMAGE).long().cumsum(0) - 1
        rows.append(row[(row != IMAGE) | (seen % DENSE < keep)])
    return rows


def whole(model: Any, ids: Tensor, mask: Tensor, pixels: list[Tensor], keep: int, last: int) -> Tensor:
    """[B, last, V] logits of the last tokens of a conversation, row by row, without a cache."""
    found = []
    for row, own in zip(short(ids, mask, keep), pixels, strict=True):
        given = {"pixel_values": own} if len(own) else {}
        found.append(model(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **given).logits[0, -last:])
    return torch.stack(found)


def assert_same_logits(model: Any, out: Any, mask: Tensor, pixels: list[Tensor], keep: int) -> None:
    """The logits of an answer are those of one forward of the conversation that it ends."""
    logits = torch.stack(out.logits, 1)
    steps = logits.shape[1]
    seen = torch.cat([mask, mask.new_ones(len(mask), steps)], 1)
    expected = whole(model, out.sequences, seen, pixels, keep, steps + 1)[:, :-1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def longer(out: Any, mask: Tensor, ids: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A conversation and its mask, with these tokens and their mask behind an answer."""
    answered = torch.cat([mask, mask.new_ones(len(mask), out.sequences.shape[1] - mask.shape[1])], 1)
    own = torch.ones_like(ids) if own is None else own
    return torch.cat([out.sequences, ids], 1), torch.cat([answered, own], 1)


CONVERSATIONS = {
    "one row": (["^ab#cd"], ["xyz"]),
    "padding": (["^ab#cdefgh", "^#c"], ["xyz", "uvw"]),
    "image at the end": (["^ab#", "^cd#"], ["xyz", "uvw"]),
    "several images": (["^a#b#c", "^#def"], ["xyz", "uvw"]),
    "second turns of other lengths": (["^ab#c", "^#cde"], ["x", "uvwxyz"]),
    "no image in one row": (["^a#b", "^cd"], ["xy", "uv"]),
    "text only": (["^abc"], ["xy"]),
    "a second image": (["^ab#cd"], ["x#y"]),
    "second images": (["^ab#cd", "^#cd"], ["x#y", "#uv"]),
    "a second image in one row": (["^ab#cd", "^#cd"], ["x#yz", "uv"]),
    "images in the second turn only": (["^ab", "^cde"], ["x##yz", "#uv"]),
}  # fmt: skip


def pixels_of(first: list[str], second: list[str]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The images of the first turn, those of the second, and all by row."""
    counts = [row.count("#") for row in first], [row.count("#") for row in second]
    one, two = images(9)[: sum(counts[0])], images(9)[sum(counts[0]) : sum(map(sum, counts))]
    rows = zip(one.split(counts[0]), two.split(counts[1]), strict=True)
    return one, two, [torch.cat(pair) for pair in rows]


def given(pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels} if len(pixels) else {}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_second_turn(model: Any, attached: crossget.Attachment, name: str) -> None:
    first, second = CONVERSATIONS[name]
    one, two, rows = pixels_of(first, second)
    ids, mask = prompts(*first)
    out = model.generate(input_ids=ids, attention_mask=mask, **given(one), **ANSWER)
    assert_same_logits(model, out, mask, list(one.split([row.count("#") for row in first])), keep(attached))
    ids, mask = longer(out, mask, *prompts(*second))
    more = {"input_ids": ids, "attention_mask": mask, **given(two), **cache_of(out), **ANSWER}
    if len(two) and not NEW_IMAGES:
        with pytest.raises(ValueError, match="ignores images beside a cache"):
            model.generate(**more)
        return
    out = model.generate(**more)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    assert_same_logits(model, out, mask, rows, keep(attached))
    ids, mask = longer(out, mask, prompts(*["klm"] * len(first))[0])  # a third turn
    out = model.generate(input_ids=ids, attention_mask=mask, **cache_of(out), **ANSWER)
    assert_same_logits(model, out, mask, rows, keep(attached))


def test_nothing_new_and_no_mask(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cdefgh", "^#c")
    out = model.generate(input_ids=ids, pixel_values=images(2), **ANSWER)
    ids, mask = longer(out, mask, ids[:, :0])
    out = model.generate(input_ids=ids, **cache_of(out), **ANSWER)
    assert_same_logits(model, out, mask, list(images(2).split(1)), keep(attached))


CHANGED: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "rows repeated": lambda cache: cache.batch_repeat_interleave(2),
    "rows reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "one row": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_cache_that_was_changed(model: Any, attached: crossget.Attachment, change: str) -> None:
    ids, mask = prompts("^a#b#cdefgh", "^#c")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(3), **ANSWER)
    ids, mask = longer(out, mask, prompts("xyz", "uvw")[0])
    pixels = [images(3)[:2], images(3)[2:]]
    name, cache = cache_object_of(out)
    cache = CHANGED[change](cache) or cache
    order = {"rows repeated": [0, 0, 1, 1], "rows reordered": [1, 0], "one row": [1]}.get(change, [0, 1])
    out = model.generate(input_ids=ids[order], attention_mask=mask[order], **{name: cache}, **ANSWER)
    assert_same_logits(model, out, mask[order], [pixels[row] for row in order], keep(attached))


def cropped(cache: Any, length: int) -> Any:
    """The cache with its first tokens."""
    cache.crop(length - cache.get_seq_length())
    assert cache.get_seq_length() == length
    return cache


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_another_question_about_the_same_image(model: Any, attached: crossget.Attachment, columns: int) -> None:
    """The cache is cropped to the common beginning of two prompts: into the first turn."""
    ids, mask = prompts("^ab#cdef")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
    name, cache = cache_object_of(out)
    cache = cropped(cache, 3 + keep(attached) + columns)
    ids, mask = prompts("^ab#cdexyz")
    out = model.generate(input_ids=ids, attention_mask=mask, **{name: cache}, **ANSWER)
    assert_same_logits(model, out, mask, [images(1)], keep(attached))


def test_a_cache_cropped_in_front_of_the_image(model: Any, attached: crossget.Attachment) -> None:
    if not NEW_IMAGES:
        pytest.skip("transformers ignores pixels beside a cache before 5.0")
    ids, mask = prompts("^ab#cdef")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
    name, cache = cache_object_of(out)
    more = {"input_ids": ids, "attention_mask": mask, name: cropped(cache, 3), **ANSWER}
    with pytest.raises(ValueError, match="0 new images and a cache of 3 tokens"):
        model.generate(**more)
    out = model.generate(**more, pixel_values=images(2)[1:])
    assert_same_logits(model, out, mask, [images(2)[1:]], keep(attached))


def test_only_the_new_tokens(model: Any, attached: crossget.Attachment) -> None:
    if not NEW_IMAGES:
        pytest.skip("transformers takes whole conversations only before 5.0")
    first, second = ["^a#b#cd", "^#c"], ["x#y", "uv"]
    one, two, rows = pixels_of(first, second)
    ids, mask = prompts(*first)
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=one, **ANSWER)
    new, own = prompts(*second)
    ids, mask = longer(out, mask, new, own)
    new = torch.cat([out.sequences[:, -1:], new], 1)  # the last token of an answer is not in the cache
    then = model.generate(input_ids=new, attention_mask=mask, pixel_values=two, **cache_of(out), **ANSWER)
    then.sequences = torch.cat([ids, then.sequences[:, new.shape[1] :]], 1)
    assert_same_logits(model, then, mask, rows, keep(attached))


def test_a_loop_of_forwards(model: Any, attached: crossget.Attachment) -> None:
    """The mask and the positions are those of the caller's tokens, as in a loop for the dense model."""
    first = ["^a#b#cd", "^#c"]
    one, _, rows = pixels_of(first, ["", ""])
    ids, mask = prompts(*first)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=one, use_cache=True)
    seen = [out.logits[:, -1]]
    for _ in range(3):
        ids = torch.cat([ids, seen[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        out = model(input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions, **cache_of(out))
        seen.append(out.logits[:, -1])
    expected = whole(model, ids, mask, rows, keep(attached), 4)
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=1e-5, atol=1e-5)
    out = model.generate(  # and `generate` goes on
        input_ids=torch.cat([ids, seen[-1].argmax(-1, keepdim=True)], 1),
        attention_mask=torch.cat([mask, mask.new_ones(2, 1)], 1), **cache_of(out), **ANSWER,
    )  # fmt: skip
    assert_same_logits(model, out, torch.cat([mask, mask.new_ones(2, 1)], 1), rows, keep(attached))


def test_a_cache_of_the_caller(model: Any, attached: crossget.Attachment) -> None:
    cache = DynamicCache(config=model.config.text_config) if VERSION >= (4, 56) else DynamicCache()
    ids, mask = prompts("^ab#cd")
    plain = {**ANSWER, "return_dict_in_generate": False, "output_logits": False}
    name = "cache" if VERSION >= (5, 24) else "past_key_values"
    answered = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=images(1), **{name: cache}, **plain
    )  # fmt: skip
    ids = torch.cat([answered, prompts("xyz")[0]], 1)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: cache}, **ANSWER)
    assert_same_logits(model, out, torch.ones_like(ids), [images(1)], keep(attached))


def test_assisted(model: Any, attached: crossget.Attachment) -> None:
    """The cache was cropped after each guess that was wrong."""
    ids, mask = prompts("^ab#cdef")
    pixels = images(1)
    out = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, **ANSWER, prompt_lookup_num_tokens=3
    )  # fmt: skip
    ids, mask = longer(out, mask, prompts("xyz")[0])
    out = model.generate(input_ids=ids, attention_mask=mask, **cache_of(out), **ANSWER)
    assert_same_logits(model, out, mask, [pixels], keep(attached))


def test_beams_in_the_second_turn(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cd")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
    ids, mask = longer(out, mask, prompts("xyz")[0])
    given = {"input_ids": ids, "attention_mask": mask, "num_beams": 3, **ANSWER}
    expected = model.generate(pixel_values=images(1), **given).sequences
    name, cache = cache_object_of(out)
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(**given, **{name: cache}).sequences, expected)


def test_a_static_cache(model: Any, attached: crossget.Attachment) -> None:
    if VERSION < (5, 0):
        pytest.skip("the constructor of a static cache takes other arguments before 5.0")
    name = "cache" if VERSION >= (5, 24) else "past_key_values"
    cache = {name: transformers.StaticCache(config=model.config.text_config, max_cache_len=64)}
    ids, mask = prompts("^a#b#cdefgh", "^#c")
    out = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=images(3), disable_compile=True, **cache, **ANSWER
    )
    ids, mask = longer(out, mask, prompts("xyz", "uvw")[0])
    out = model.generate(input_ids=ids, attention_mask=mask, disable_compile=True, **cache, **ANSWER)
    assert_same_logits(model, out, mask, [images(3)[:2], images(3)[2:]], keep(attached))


def test_another_reducer_in_the_second_turn(model: Any, attached: crossget.Attachment) -> None:
    """The images in the cache keep their number of tokens."""
    ids, mask = prompts("^ab#cd")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
    before = keep(attached)
    attached.reducer = {"visual": crossget.CrossGET(r=1)}
    ids, mask = longer(out, mask, prompts("xyz")[0])
    out = model.generate(input_ids=ids, attention_mask=mask, **cache_of(out), **ANSWER)
    attached.reducer = {"visual": crossget.CrossGET(r={n: r for r, n in REDUCED.items()}[before])}
    assert_same_logits(model, out, mask, [images(1)], before)


def test_without_cache(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^a#b#c", "^#def")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(3), use_cache=False, **ANSWER)
    ids, mask = longer(out, mask, prompts("xyz", "uvw")[0])
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(3), use_cache=False, **ANSWER)
    assert_same_logits(model, out, mask, [images(3)[:2], images(3)[2:]], keep(attached))


# Caches that cannot be continued -----------------------------------------------------------------------------------


def test_a_cache_from_before_the_attach(model: Any) -> None:
    ids, mask = prompts("^ab#cd")
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
        ids, mask = longer(out, mask, prompts("xyz")[0])
        with crossget.attach(model, crossget.CrossGET(r=3)):
            with pytest.raises(ValueError, match="holds 24 tokens, and this attached model has not filled it"):
                model.generate(input_ids=ids, attention_mask=mask, **cache_of(out), **ANSWER)
            reduced = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
        ids, mask = longer(reduced, mask, prompts("xyz")[0])
        with crossget.attach(model, crossget.CrossGET(r=3)), pytest.raises(ValueError, match="has not filled it"):
            model.generate(input_ids=ids, attention_mask=mask, **cache_of(reduced), **ANSWER)


def test_a_cache_of_text_from_before_the_attach(model: Any) -> None:
    """There is no image in it that could have been reduced."""
    if not NEW_IMAGES:
        pytest.skip("transformers ignores pixels beside a cache before 5.0")
    ids, mask = prompts("^abcd")
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        ids, mask = prompts("^abcd#efg")
        with crossget.attach(model, crossget.ToMe(r=3)):
            out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **cache_of(out), **ANSWER)
            assert_same_logits(model, out, mask, [images(1)], 16 - 9)


def test_prompts_that_do_not_belong_to_the_cache(model: Any, attached: crossget.Attachment) -> None:
    ids, mask = prompts("^ab#cd")
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(1), **ANSWER)
    for row in ("^abc#dvwxyz", "^ab##xyz", "^abcdefghijklmnopqrstuvwxyz"):
        other, real = prompts(row)
        with pytest.raises(ValueError, match=r"0 new images and a cache of \d+ tokens: expected the sequences"):
            model.generate(input_ids=other, attention_mask=real, **cache_of(out), **ANSWER)
    with pytest.raises(ValueError, match="give the whole conversation"):
        model.generate(input_ids=ids[:, :3], attention_mask=mask[:, :3], **cache_of(out), **ANSWER)
    with pytest.raises(ValueError, match="attention_mask has 9 columns for 1 new tokens and a cache of"):
        model(input_ids=ids[:, -1:], attention_mask=torch.ones(1, 9), **cache_of(out))


# PaliGemma ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 3])
def test_paligemma(r: int) -> None:
    """The cached second turn is that of prompts that were short from the beginning."""
    torch.manual_seed(0)
    model: Any = paligemma()
    ids = torch.cat([torch.full((2, 16), IMAGE), torch.tensor([[1, 7, 8, 9], [1, 10, 11, 12]])], 1)
    more = torch.tensor([[20, 21], [30, 31]])
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(r=r)):
        found = []
        for prompt in (ids, ids[:, 4 * r :]):
            mask = torch.ones_like(prompt)
            out = model.generate(input_ids=prompt, attention_mask=mask, pixel_values=images(2), **ANSWER)
            then, mask = longer(out, mask, more)
            out = model.generate(input_ids=then, attention_mask=mask, **cache_of(out), **ANSWER)
            found.append(torch.stack(out.logits))
        assert torch.equal(*found)


# Image tokens that the mask hides ----------------------------------------------------------------------------------


@pytest.mark.parametrize("generates", [True, False], ids=["generate", "forward"])
def test_images_hidden_by_the_mask(model: Any, attached: crossget.Attachment, generates: bool) -> None:
    """An image at the start of a row, which the mask hides with the tokens in front of it, still has features."""
    rows = ["#^ab#cd", "^ab##cd"]
    ids, mask = prompts(*rows)
    mask[0, :DENSE] = 0
    if generates:
        out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(4), **ANSWER)
        assert_same_logits(model, out, mask, [images(4)[1:2], images(4)[2:]], keep(attached))
        return
    found = model(input_ids=ids, attention_mask=mask, pixel_values=images(4)).logits[:, -3:]
    expected = whole(model, ids, mask, [images(4)[1:2], images(4)[2:]], keep(attached), 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_of_image_tokens(model: Any, attached: crossget.Attachment) -> None:
    """They have no image, which the dense model refuses as well."""
    ids, mask = prompts("^ab#cdef", "^#c")
    with pytest.raises(ValueError, match=r"\[16, 21\] image tokens for 2 images.* In rows \[1\] the attention mask"):
        model(input_ids=ids.masked_fill(mask == 0, IMAGE), attention_mask=mask, pixel_values=images(2))


def test_the_pad_token_is_the_image_token(model: Any) -> None:
    """Rows that are filled up here are not filled up with image tokens."""
    rows = ["^a#b#c", "^#defghijklmnopqrstuvw"]
    ids, _ = prompts(*rows)
    mask = torch.ones_like(ids)
    for config in (model.config, model.config.text_config):
        config.pad_token_id = IMAGE
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(r=3)):
        out = model.generate(input_ids=ids, attention_mask=mask, pixel_values=images(3), **ANSWER)
        assert_same_logits(model, out, mask, [images(3)[:2], images(3)[2:]], REDUCED[3])


def test_the_newest_transformers_runs_everything() -> None:
    assert NEW_IMAGES or int(transformers.__version__.split(".")[0]) < 5
