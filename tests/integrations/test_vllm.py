"""vLLM with fewer image tokens: the same answers as transformers with the same settings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import crossget

# Where CROSSGET_REQUIRE names it, as in .ci/run, these run, and fail if it is not there.
REQUIRED = "vllm" in os.environ.get("CROSSGET_REQUIRE", "").split(",")
if importlib.util.find_spec("vllm") is None and not REQUIRED:
    pytest.skip("no vllm: it needs an environment of its own", allow_module_level=True)

import vllm_hosts
from vllm_hosts import image_text, picture

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
STEPS = 6
CLOSE = 1e-4
# Chunks of a prefill that end inside of images, and blocks of the prefix cache that do.
ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32,
    "max_num_batched_tokens": 48, "kv_cache_memory_bytes": 1 << 27, "seed": 0,
}  # fmt: skip
PROMPTS = [("w1 # w2 w3", [0]), ("w4 # w5 # w6", [1, 2]), ("w7 w8 w9", [])]


class Answer(NamedTuple):
    """What a prompt is answered with.

    Attributes:
        prompt: the number of its tokens.
        tokens: the ids of the answer.
        chances: [steps] the log probability of each.
    """

    prompt: int
    tokens: list[int]
    chances: torch.Tensor


def check(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.prompt == other.prompt
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.chances, other.chances, rtol=0, atol=CLOSE)


def expected(model: Any, folder: Path, family: str, prompts: Sequence[tuple[str, list[int]]] = PROMPTS) -> list[Answer]:
    """What transformers answers."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for text, numbers in prompts:
        images = {"images": [picture(number) for number in numbers]} if numbers else {}
        given = processor(text=text.replace("#", image_text(family)), return_tensors="pt", **images)
        given.pop("token_type_ids", None)
        out = model.generate(
            **given, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = out.sequences[0, -STEPS:]
        chances = torch.stack(out.logits, 1)[0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        attached = crossget.core.attach.find_attachment(model)
        left = 0
        if attached is not None and numbers:
            left = sum(before - after for before, after in attached.tokens["connector"])
        found.append(Answer(int(given["input_ids"].shape[1]) - left, tokens.tolist(), chances))
    return found


class Served:
    """A model that vLLM runs in a process of its own, beside the same one of transformers.

    Attributes:
        model, folder: of transformers, and where it is saved.
        llm: of vLLM.
    """

    def __init__(self, family: str, folder: Path, setting: dict[str, Any] | None, **engine: Any) -> None:
        from vllm import LLM

        self.family, self.folder = family, folder
        self.model = vllm_hosts.save(family, folder)
        overrides = {} if setting is None else {"crossget": setting}
        self.llm: Any = LLM(str(folder), hf_overrides=overrides, **{**ENGINE, **engine})

    def answers(self, prompts: Sequence[tuple[str, list[int]]] = PROMPTS, share: Any = None) -> list[Answer]:
        return [answer for answer, _ in self.answers_and_cached(prompts, share)]

    def answers_and_cached(
        self, prompts: Sequence[tuple[str, list[int]]], share: Any = None
    ) -> list[tuple[Answer, int]]:
        """The answers, and for each the number of tokens of its prompt that were cached."""
        from vllm import SamplingParams

        requests = []
        for text, numbers in prompts:
            request: dict[str, Any] = {"prompt": text.replace("#", image_text(self.family))}
            if numbers:
                request["multi_modal_data"] = {"image": [picture(number) for number in numbers]}
                if share is not None:
                    request["mm_processor_kwargs"] = {"crossget": {"keep": share}}
            requests.append(request)
        how = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=0, ignore_eos=True)
        found = []
        for out in self.llm.generate(requests, how, use_tqdm=False):
            tokens = list(out.outputs[0].token_ids)
            chances = [step[token].logprob for step, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
            answer = Answer(len(out.prompt_token_ids), tokens, torch.tensor(chances))
            found.append((answer, out.num_cached_tokens))
        return found


CASES = {
    "llava": ("llava", {}), "llava-transformers": ("llava", {"model_impl": "transformers"}),
    "llava_next": ("llava_next", {}), "llava_onevision": ("llava_onevision", {}), "internvl": ("internvl", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {}), "qwen2_5_vl-transformers": ("qwen2_5_vl", {"model_impl": "transformers"}),
    "qwen3_vl": ("qwen3_vl", {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, engine = CASES[request.param]
    one = Served(family, tmp_path_factory.mktemp("model"), {"method": "Ward", "keep": 0.25}, **engine)
    yield one
    one.llm.llm_engine.engine_core.shutdown()


def reducer(served: Served, share: float = 0.25) -> Any:
    positions: Any = "original" if "qwen" in served.family else "renumbered"
    return {"connector": crossget.Ward(crossget.Keep(share, positions=positions))}


def test_answers_are_those_of_transformers(served: Served) -> None:
    with crossget.attach(served.model, reducer(served)):
        wanted = expected(served.model, served.folder, served.family)
    check(served.answers(), wanted)


def test_a_prefix_with_a_part_of_an_image_is_cached(served: Served) -> None:
    again = [("w1 # w2 w3", [0]), ("w1 # w4 # w2", [0, 1])]
    served.answers(again[:1])
    found = served.answers_and_cached(again)
    assert any(cached > 0 for _, cached in found)
    with crossget.attach(served.model, reducer(served)):
        check([answer for answer, _ in found], expected(served.model, served.folder, served.family, again))


def test_a_request_can_set_its_own_share(served: Served) -> None:
    """After the server's own share, whose encoded images are not taken for it."""
    prompts = PROMPTS[:2]
    served.answers(prompts)
    with crossget.attach(served.model, reducer(served, 0.5)):
        wanted = expected(served.model, served.folder, served.family, prompts)
    check(served.answers(prompts, 0.5), wanted)
    with crossget.attach(served.model, reducer(served)):
        check(served.answers(prompts), expected(served.model, served.folder, served.family, prompts))


def test_many_at_once_are_answered_as_alone(served: Served) -> None:
    prompts = [(f"w{number} # w{number % 7}", [number % 3]) for number in range(32)]
    alone = [answer for prompt in prompts for answer in served.answers([prompt])]
    check(served.answers(prompts), alone)
