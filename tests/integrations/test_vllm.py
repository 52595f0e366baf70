"""vLLM with fewer image tokens: the same answers as transformers with the same settings."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import vllm_hosts
from vllm_hosts import image_text, picture

import crossget

# Where CROSSGET_REQUIRE names it, as in .ci/run, these run, and fail if it is not there.
REQUIRED = "vllm" in os.environ.get("CROSSGET_REQUIRE", "").split(",")
if importlib.util.find_spec("vllm") is None and not REQUIRED:
    pytest.skip("no vllm: it needs an environment of its own", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
STEPS = 6
CLOSE = 1e-4
# Chunks of a prefill that end inside of images, and blocks of the prefix cache that do.
ENGINE: dict[str, Any] = {
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
        if attached is not None and attached.connector is not None and numbers:
            left = sum(before - after for before, after in attached.tokens["connector"])
        found.append(Answer(int(given["input_ids"].shape[1]) - left, tokens.tolist(), chances))
    return found


class Served:
    """A model that vLLM runs, beside the same one of transformers.

    It runs in this process, as another one takes long to import everything. But vLLM's Transformers backend changes
    classes of transformers, and gets a process of its own.

    Attributes:
        model, folder: of transformers, and where it is saved.
        llm: of vLLM.
    """

    def __init__(
        self, family: str, folder: Path, setting: dict[str, Any] | None, *, saves: bool = True, **engine: Any
    ) -> None:
        from vllm import LLM

        self.family, self.folder = family, folder
        self.model = vllm_hosts.save(family, folder) if saves else None
        overrides = {} if setting is None else {"crossget": setting}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int("model_impl" in engine))
        self.llm: Any = LLM(str(folder), hf_overrides=overrides, **{**ENGINE, **engine})

    def stop(self) -> None:
        """End the model, so that another one can run in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

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
    one.stop()


def reducer(served: Served, share: float = 0.25) -> Any:
    positions: Any = "original" if "qwen" in served.family else "renumbered"
    return {"connector": crossget.Ward(crossget.Keep(share, positions=positions))}


def test_answers_are_those_of_transformers(served: Served) -> None:
    with crossget.attach(served.model, reducer(served)):
        wanted = expected(served.model, served.folder, served.family)
    check(served.answers(), wanted)


def test_a_prefix_with_a_part_of_an_image_is_cached(served: Served) -> None:
    again = [("# w1 # w2 # w3", [1, 0, 1]), ("# w1 # w2 # w4 w5", [1, 0, 1])]
    served.answers(again[:1])
    found = served.answers_and_cached(again)
    assert all(cached >= ENGINE["block_size"] for _, cached in found)
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


def test_a_request_for_all_image_tokens_has_the_dense_answers(served: Served) -> None:
    # One image: vLLM's cache of encoded images takes no more than that of LLaVA-OneVision in such an engine.
    check(served.answers(PROMPTS[:1], 1.0), expected(served.model, served.folder, served.family, PROMPTS[:1]))


def test_many_at_once_are_answered_as_alone(served: Served) -> None:
    prompts = [(f"w{number} # w{number % 7}", [number % 3]) for number in range(32)]
    alone = [answer for prompt in prompts for answer in served.answers([prompt])]
    check(served.answers(prompts), alone)


# The tower of LLaVA-1.5 -----------------------------------------------------------------------------------------------


def test_merging_in_the_tower_of_llava_is_that_of_transformers(tmp_path: Path) -> None:
    """With cross tokens that were saved beside the weights."""
    model = vllm_hosts.save("llava", tmp_path)
    with crossget.attach(model, {"visual": crossget.CrossGET(r=8)}) as attached:
        for parameter in attached.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        attached.save(tmp_path)
        wanted = expected(model, tmp_path, "llava")
    # Two blocks remove eight tokens each, and the cross token is a feature.
    wanted = [one._replace(prompt=one.prompt - 15 * len(n)) for one, (_, n) in zip(wanted, PROMPTS, strict=True)]
    served = Served("llava", tmp_path, {"method": "CrossGET", "r": 8}, saves=False)
    try:
        check(served.answers(), wanted)
    finally:
        served.stop()


# Without the setting --------------------------------------------------------------------------------------------------

DENSE = """
import json, pathlib, sys
import torch
from test_vllm import Served
served = Served("llava", pathlib.Path(sys.argv[1]), None)
answers = served.answers()
pathlib.Path(sys.argv[2]).write_text(json.dumps([[a.prompt, a.tokens, a.chances.tolist()] for a in answers]))
served.stop()
"""


def test_without_the_setting_nothing_changes(tmp_path: Path) -> None:
    """Bit for bit, beside a process that loads no plugin."""
    found = []
    for number, plugins in enumerate((None, "none")):
        out = tmp_path / f"{number}.json"
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(vllm_hosts.__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": paths, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
        run = [sys.executable, "-c", DENSE, str(tmp_path / "model"), str(out)]
        subprocess.run(run, env=environment, check=True, capture_output=True, timeout=600)
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]


# Wrong settings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models without weights."""
    import transformers

    folders = {}
    for name, config in {
        "llava": vllm_hosts.config("llava")[1],
        "qwen2_5_vl": vllm_hosts.config("qwen2_5_vl")[1],
        "text": transformers.LlamaConfig(**vllm_hosts.TEXT, architectures=["LlamaForCausalLM"]),
        "paligemma": transformers.PaliGemmaConfig(architectures=["PaliGemmaForConditionalGeneration"]),
    }.items():
        folders[name] = tmp_path_factory.mktemp(name)
        if name in ("llava", "qwen2_5_vl"):
            config.architectures = [f"{vllm_hosts.config(name)[0]}ForConditionalGeneration"]
        config.save_pretrained(folders[name])
    return folders


WARD = {"method": "Ward", "keep": 0.25}
WRONG = [
    ("llava", {**WARD, "method": "Wart"}, "one of the methods AveragePool, CrossGET"),
    ("llava", {**WARD, "keep": 0}, "at least one token stays"),
    ("llava", {**WARD, "keep": 1.5}, "a share is above 0 and at most 1"),
    ("llava", {**WARD, "keep": "half"}, "give the number of tokens that stay"),
    ("llava", {"method": "Ward"}, "expected one of keep"),
    ("llava", {**WARD, "r": 8}, "expected one of keep"),
    ("llava", {**WARD, "wide": True}, "wide"),
    ("llava", {**WARD, "method": "CrossGET"}, "guided by the text of a prompt"),
    ("llava", {**WARD, "method": "Determinantal"}, "guided by the text of a prompt"),
    ("llava", {**WARD, "proportional_attention": True}, "vLLM's kernels take none"),
    ("qwen2_5_vl", {"method": "CrossGET", "r": 8}, "r merges in the tower of LLaVA-1.5"),
    ("text", WARD, "LlamaForCausalLM takes no images"),
    ("paligemma", WARD, "serve the model with --model-impl transformers"),
]


@pytest.mark.parametrize(("model", "setting", "message"), WRONG, ids=lambda value: None)
def test_a_wrong_setting_stops_the_start(
    model: str, setting: dict[str, Any], message: str, configs: dict[str, Path]
) -> None:
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with pytest.raises(ValueError, match=message):
        ModelConfig(str(configs[model]), skip_tokenizer_init=True, hf_overrides={"crossget": setting})


def test_another_version_of_vllm_serves_without_the_setting_only() -> None:
    from crossget.integrations import vllm

    post_init = vllm._checking(lambda self: None, "0.31.2")
    post_init(SimpleNamespace(hf_config=SimpleNamespace()))
    with pytest.raises(ValueError, match="crossget serves with vLLM 0.32, and this is 0.31.2"):
        post_init(SimpleNamespace(hf_config=SimpleNamespace(crossget=WARD)))


# A server -------------------------------------------------------------------------------------------------------------


class Server:
    """`vllm serve` with chat requests over HTTP."""

    def __init__(self, family: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {name.replace("_", "-"): value for name, value in ENGINE.items() if name != "enforce_eager"}
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--enforce-eager"]
        command += ["--trust-request-mm-kwargs"]  # without it a request cannot set its own share
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--port={port}", "--served-model-name=it", "--hf-overrides", json.dumps({"crossget": WARD})]
        self.url, self.family = f"http://127.0.0.1:{port}", family
        self.log = folder / "server.log"
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        for _ in range(3600):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-4000:])
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.5)
        self.stop()
        raise RuntimeError("the server does not answer")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def answer(self, text: str, numbers: list[int], **more: Any) -> Answer:
        """Ask with images at each "#" of a text."""
        images, content = iter(numbers), []
        for part in filter(str.strip, re.split("(#)", text)):
            if part == "#":
                png = io.BytesIO()
                picture(next(images)).save(png, "PNG")
                url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
                content.append({"type": "image_url", "image_url": {"url": url}})
            else:
                content.append({"type": "text", "text": part.strip()})
        body = {
            "model": "it", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": STEPS,
            "ignore_eos": True, "logprobs": True, "return_token_ids": True, **more,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as out:
            found = json.load(out)
        (choice,) = found["choices"]
        chances = torch.tensor([step["logprob"] for step in choice["logprobs"]["content"]])
        return Answer(found["usage"]["prompt_tokens"], choice["token_ids"], chances)


def test_a_server_answers_over_http(tmp_path: Path) -> None:
    """One image, two and none; a request's own share; 32 clients at once; another start."""
    family = "qwen2_5_vl"
    model = vllm_hosts.save(family, tmp_path)
    with crossget.attach(model, {"connector": crossget.Ward(crossget.Keep(0.25))}) as attached:
        wanted = expected(model, tmp_path, family)
        attached.reducer = {"connector": crossget.Ward(crossget.Keep(0.5))}
        half = expected(model, tmp_path, family, PROMPTS[:1])
    server = Server(family, tmp_path)
    try:
        check([server.answer(*prompt) for prompt in PROMPTS], wanted)
        check([server.answer(*PROMPTS[0], mm_processor_kwargs={"crossget": {"keep": 0.5}})], half)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.answer(*PROMPTS[0], mm_processor_kwargs={"crossget": {"keep": 0}})
        many = [(f"w{number} # w{number % 7}", [number % 3]) for number in range(32)]
        alone = [server.answer(*prompt) for prompt in many]
        with concurrent.futures.ThreadPoolExecutor(32) as clients:
            check(list(clients.map(lambda prompt: server.answer(*prompt), many)), alone)
    finally:
        server.stop()
    server = Server(family, tmp_path)
    try:
        check([server.answer(*prompt) for prompt in PROMPTS], wanted)
    finally:
        server.stop()
