"""A conversation as LLaVA-1.5 was trained on it: the template v1, its tokens, and which of them are learnt.

The text is one line, an image standing at the beginning of the turn that mentions it:

    SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>

What is learnt is each answer and the `</s>` behind it. Text between two of `<image>` and `</s>` is tokenised alone, as
if a text began there. The tokenizer that LLaVA was trained with does that by itself, newer ones do not, so it is done
here, and the tokens do not depend on which one is at hand.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from experiments.lib.data import BadData

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
IMAGE, END = "<image>", "</s>"
ANSWER = f" {ROLES['gpt']}: "
IGNORED = -100

Turn = Mapping[str, Any]


class Encoded(NamedTuple):
    """A conversation's tokens, an image being one of them, and what is learnt: the token itself, or IGNORED."""

    ids: list[int]
    labels: list[int]


def render(turns: Sequence[Turn], has_image: bool) -> str:
    """Return the text of a conversation.

    Args:
        turns: `from` is human or gpt in turns, `value` the text. A first turn that is not human's is left out.
        has_image: `<image>` is an image; otherwise it is text, and stays where it is.

    Raises:
        BadData: roles are unknown, or do not take turns.
    """
    turns = turns[1:] if turns and turns[0]["from"] != "human" else turns
    text = SYSTEM + " "
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn["from"] != expected:
            raise BadData(f"turn {i} is from {turn['from']!r}: expected {expected!r}, human and gpt take turns")
        value = turn["value"]
        if has_image and IMAGE in value:
            value = f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()
        text += ROLES[expected] + ":"
        if value:  # as in the original: an empty answer is not even ended
            text += f" {value}{END if expected == 'gpt' else ' '}"
    return text


@dataclass(frozen=True)
class Encoder:
    """Makes tokens and labels of conversations.

    Attributes:
        tokenizer: of the language model.
        image: id of the image token.
        limit: longest sequence of the language model.
    """

    tokenizer: Any
    image: int
    limit: int = 2048

    def __call__(self, turns: Sequence[Turn], has_image: bool) -> Encoded:
        """Return tokens and labels, not cut to the limit.

        A text that does not fall apart into rounds of a question and an answer (some turn holds `</s>` or
        ` ASSISTANT: `, the last answer is missing) has no labels, with a warning. One whose readable part alone is
        longer than the limit keeps the labels of that part. This is the original's rule.

        Raises:
            BadData: as for `render`.
        """
        texts = render(turns, has_image).split(END)
        rounds = [self._tokens(text, has_image) for text in texts]
        ids = [self.tokenizer.bos_token_id]
        for i, tokens in enumerate(rounds):
            ids += [self._end] * (i > 0) + tokens
        labels = [IGNORED] * len(ids)
        position = 1
        for text, tokens in zip(texts, rounds, strict=True):
            if text.count(ANSWER) != 1:
                break
            # The space in front of an answer is part of the answer's first token.
            question = len(self._tokens(text.partition(ANSWER)[0] + ANSWER, has_image)) - 1
            end = position + len(tokens) + 1
            labels[position + question : end] = ids[position + question : end]
            position = end
        if position != len(ids) and position < self.limit:
            warnings.warn(f"nothing is learnt from this conversation, its turns are unclear: {texts}", stacklevel=2)
            labels = [IGNORED] * len(ids)
        return Encoded(ids, labels)

    @property
    def _end(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(END))

    def _tokens(self, text: str, has_image: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(IMAGE) if has_image else [text]):
            ids += [self.image] * (i > 0)
            if part:
                # Where there is no image, <image> must not become the image token.
                plain = {"split_special_tokens": True} if IMAGE in part else {}
                ids += self.tokenizer(self._space + part, add_special_tokens=False, **plain)["input_ids"]
        return ids

    @cached_property
    def _space(self) -> str:
        """What gives a text its leading space: the tokenizer itself, or, in newer ones, only if it has none."""
        with_space, without = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a", "a"))
        return " " if with_space == without else ""
