"""What both kinds of shorter prompts share: those for a reduced tower, and those behind the connector."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Arguments with one entry per token of a prompt, [B, T, ..], and their values at padding.
PADDING_VALUES = {"inputs_embeds": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
RECORD = "_crossget_prompt"


@dataclass(frozen=True)
class PromptRecord:
    """What is known of a shorter prompt.

    Attributes:
        place: [B, T] the column of the shorter prompt that each column of the prompt has become; -1 if it left.
        positions: [.., B, W] of the shorter prompt.
        following: [.., B, 1] the position behind the prompt. It is not the last one plus 1 if the prompt ends in an
            image: the features at its end may have left.
        log_sizes: [B, W] log(size) of the tokens; None: the language model's attention takes no sizes.
    """

    place: Tensor
    positions: Tensor
    following: Tensor
    log_sizes: Tensor | None

    def cached(self, tokens: int) -> tuple[Tensor, int]:
        """The places [B, S] of the columns that are in the cache: those of the prompt, and of what was generated.

        Args:
            tokens: the number of tokens in the cache.

        Returns:
            The places, and the number of columns of the shorter prompt that they make.
        """
        width = int(self.positions.shape[-1])
        answers = torch.arange(width, max(width, tokens), device=self.place.device)
        return torch.cat([self.place, answers.expand(len(self.place), -1)], 1), max(width, tokens)


def record_of(holder: Any) -> PromptRecord | None:
    """What is known of the prompt in a cache, or of the one that a tensor belongs to."""
    found: PromptRecord | None = getattr(holder, RECORD, None)
    return found


def first_given(arguments: Mapping[str, Any], *names: str) -> Any:
    """The first of these arguments that is given and not None."""
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def outer(real: Tensor) -> Tensor:
    """[B, T] true before the first and after the last true element of each row."""
    count = real.long()
    return (count.cumsum(1) == 0) | (count.flip(1).cumsum(1).flip(1) == 0)


def with_prompt(ids: Tensor, answers: Tensor) -> Tensor:
    """Prompts [B, T] and answers [B * n, A] -> [B * n, T + A], for n answers per prompt."""
    return torch.cat([ids.repeat_interleave(len(answers) // len(ids), 0).to(answers.device), answers], 1)


def shift_limits(arguments: dict[str, Any], by: int) -> None:
    """Change limits on the total length, which includes the prompt, by the change of the prompt's length."""
    config = arguments.get("generation_config")
    if config is not None and arguments["generation_config"].max_new_tokens is None:
        config = arguments["generation_config"] = copy.deepcopy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name, None) not in (None, 0, type(config)().__dict__.get(name)):
                setattr(config, name, getattr(config, name) + by)
    for name in ("max_length", "min_length"):
        if arguments.get(name):
            arguments[name] += by
