"""Tokens and labels of LLaVA's conversations, against a plain restatement of the rule on characters."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_tuning import backend, wrapped

from experiments.lib.data import BadData
from experiments.llava.conversation import Encoder, render

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LEGACY, NEWER = (wrapped(backend([], legacy)) for legacy in (True, False))
IMAGE = LEGACY.convert_tokens_to_ids("<image>")


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def text_of(values: list[str], has_image: bool) -> str:
    """The conversation as one line."""
    text = SYSTEM + " "
    for i, value in enumerate(values):
        if has_image and "<image>" in value:
            rest = value.replace("<image>", "").strip()
            value = f"<image>\n{rest}" if rest else "<image>"
        text += "ASSISTANT:" if i % 2 else "USER:"
        text += f" {value}" + ("</s>" if i % 2 else " ") if value else ""
    return text


def restated(tokenizer: Any, values: list[str], has_image: bool) -> tuple[list[int], list[int]]:
    """Tokens of the whole text at once; learnt are those whose characters lie in an answer.

    An answer goes from the space behind "ASSISTANT:" to its "</s>". If there is not exactly one in front of every
    "</s>", and nothing behind the last one, nothing is learnt. The tokenizer is of the kind LLaVA was trained with.
    """
    text = text_of(values, has_image)
    spans, begin = [], 0
    for part in text.split("</s>")[:-1]:
        spans.append((begin + part.find(" ASSISTANT: ") + len(" ASSISTANT:"), begin + len(part) + len("</s>")))
        begin = spans[-1][1]
    *parts, behind = text.split("</s>")
    clear = not behind and all(part.count(" ASSISTANT: ") == 1 for part in parts)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = made["input_ids"]
    learnt = [
        clear and any(a <= start and end <= b for a, b in spans) and end > start
        for start, end in made["offset_mapping"]
    ]
    return [1, *ids], [-100, *(token if yes else -100 for token, yes in zip(ids, learnt, strict=True))]


def assert_as_restated(tokenizer: Any, values: list[str], has_image: bool) -> None:
    found = Encoder(tokenizer, tokenizer.convert_tokens_to_ids("<image>"), 10**9)(turns(*values), has_image)
    assert tuple(found) == restated(tokenizer, values, has_image)


# Samples of the data ------------------------------------------------------------------------------------------------

words = st.sampled_from(
    ["A dog", "red", "a  chair", "USER:", "ASSISTANT:", "\n", "\n\n", "  two", "it's.", "é", "図", "0.12", "<", ">"]
)  # fmt: skip
texts = st.lists(words, min_size=1, max_size=6).map(" ".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[str], bool]:
    """As in the data: questions and answers in turns, the image first, or last in the first question."""
    values = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
    flat = [text for pair in values for text in pair]
    has_image = draw(st.booleans())
    if has_image:
        flat[0] = draw(st.sampled_from(["<image>\n{}", "{}\n<image>", "{} <image> {}", "<image>"])).replace(
            "{}", flat[0]
        )
    return flat, has_image


@pytest.mark.filterwarnings("ignore:nothing is learnt")
@given(conversations())
@settings(max_examples=300, deadline=None)
def test_tokens_and_labels_are_those_of_the_rule(case: tuple[list[str], bool]) -> None:
    assert_as_restated(LEGACY, *case)


@pytest.mark.filterwarnings("ignore:nothing is learnt")
@given(conversations())
@settings(max_examples=100, deadline=None)
def test_tokens_do_not_depend_on_the_kind_of_tokenizer(case: tuple[list[str], bool]) -> None:
    values, has_image = case
    older, newer = (Encoder(tokenizer, IMAGE)(turns(*values), has_image) for tokenizer in (LEGACY, NEWER))
    assert older == newer


@pytest.mark.filterwarnings("ignore:nothing is learnt")
@pytest.mark.parametrize("values", [
    ["q", "a</s>b"], ["q</s>", "a"], ["q", "a ASSISTANT: b"], ["q ASSISTANT: b", "a"], ["q", ""], ["q"], ["", "a"],
    ["q", "", "p", "a"], ["q", "a", "p", ""], ["q", "a", "p"], [], ["q ASSISTANT: b", ""], ["q", "</s>"],
])  # fmt: skip
def test_odd_conversations(values: list[str]) -> None:
    assert_as_restated(LEGACY, values, False)


def test_the_thousand_samples() -> None:
    home = os.environ.get("CROSSGET_DATA")
    if home is None:
        pytest.skip("CROSSGET_DATA does not name the folder that has llava_eval/train/llava_v1_5_mix1k.jsonl")
    lines = (Path(home) / "llava_eval/train/llava_v1_5_mix1k.jsonl").read_text(encoding="utf-8").split("\n")
    samples = [json.loads(line) for line in lines if line]
    assert len(samples) == 1000
    values = [[turn["value"] for turn in sample["conversations"]] for sample in samples]
    every = [value for sample in values for value in sample]
    older, newer = (wrapped(backend(every, legacy, size=4000)) for legacy in (True, False))
    learnt = 0
    for sample, its in zip(samples, values, strict=True):
        assert_as_restated(older, its, "image" in sample)
        encoded = Encoder(newer, newer.convert_tokens_to_ids("<image>"))(sample["conversations"], "image" in sample)
        assert tuple(encoded) == restated(older, its, "image" in sample)
        learnt += sum(label != -100 for label in encoded.labels)
    assert learnt > 20_000


# One by one ---------------------------------------------------------------------------------------------------------


def test_an_example() -> None:
    talk = turns("What is it?\n<image>", "A dog", "How many?", "2")
    assert render(talk, True) == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A dog</s>USER: How many? ASSISTANT: 2</s>"
    )
    ids, labels = Encoder(LEGACY, IMAGE)(talk, True)
    assert ids[0] == 1
    assert ids.count(IMAGE) == 1
    learnt = [label for label in labels if label != -100]
    assert LEGACY.convert_ids_to_tokens(learnt) == ["▁A", "▁dog", "</s>", "▁", "<0x32>", "</s>"]
    before = LEGACY.convert_ids_to_tokens(ids)[: ids.index(IMAGE) + 3]
    assert before[-5:] == ["▁USER:", "▁", "<image>", "▁", "<0x0A>"]


def test_a_first_turn_that_is_not_from_human_is_left_out() -> None:
    talk = turns("Hello", "q", "a", first="gpt")
    assert render(talk, False) == render(talk[1:], False)


def test_image_tokens_in_text_without_image_are_text() -> None:
    ids, _ = Encoder(LEGACY, IMAGE)(turns("<image> is a tag", "yes"), False)
    assert IMAGE not in ids
    assert "<image> is a tag" in LEGACY.decode(ids)


@pytest.mark.parametrize(("roles", "message"), [
    (["human", "human"], "turn 1 is from 'human': expected 'gpt'"),
    (["human", "gpt", "gpt"], "turn 2 is from 'gpt': expected 'human'"),
    (["human", "bot"], "turn 1 is from 'bot': expected 'gpt'"),
    (["system", "gpt"], "turn 0 is from 'gpt': expected 'human'"),
])  # fmt: skip
def test_roles_that_do_not_take_turns(roles: list[str], message: str) -> None:
    with pytest.raises(BadData, match=message):
        render([{"from": role, "value": "x"} for role in roles], False)


def test_what_is_unclear_is_not_learnt_and_says_so() -> None:
    with pytest.warns(UserWarning, match="nothing is learnt"):
        _, labels = Encoder(LEGACY, IMAGE)(turns("q", "a", "p", "a ASSISTANT: b"), False)
    assert set(labels) == {-100}


def test_beyond_the_limit_the_readable_part_keeps_its_labels() -> None:
    """The original does not compare lengths there."""
    talk = turns("q", "a", "p", "a ASSISTANT: b")
    _, whole = Encoder(LEGACY, IMAGE)(talk[:2], False)
    ids, labels = Encoder(LEGACY, IMAGE, limit=len(whole))(talk, False)
    assert labels == whole + [-100] * (len(ids) - len(whole))
