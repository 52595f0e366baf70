"""Time a server of vLLM's with random weights, dense and with fewer image tokens, by vLLM's own `vllm bench serve`.

Needs an environment with vLLM 0.32 and crossget (docs/beyond.md). Speed does not depend on the weights' values, so
nothing is downloaded: the model is a LLaVA-1.5 of a size of its own. In one run, one server after the other answers the
same requests of several clients at once, each with one image.
"""

import base64
import contextlib
import dataclasses
import importlib
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.lib.files import Json, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown
from experiments.speed.llava import RESULTS, own_config

Size = Literal["tiny", "0.6b"]
# Width and depth of the image tower and of the language model, and side of an image in pixels.
SIZES = {"tiny": (64, 3, 112), "0.6b": (1024, 24, 336)}
DENSE = "dense"
STARTS = 1800  # seconds that a server may take to start


@dataclass(frozen=True)
class Run:
    """A model at one share."""

    size: Size
    method: str
    share: float
    clients: int
    requests: int
    text_tokens: int
    answer_tokens: int
    dtype: str

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"serving/{self.size}_{self.dtype}_{self.method}_share{self.share:g}_clients{self.clients}"


@dataclass(frozen=True)
class Options:
    """What to time."""

    size: tuple[Size, ...] = ("tiny", "0.6b")
    """Models."""
    method: str = "Ward"
    """Of crossget, behind the connector."""
    share: tuple[float, ...] = (0.25,)
    """Shares of the image tokens that stay."""
    clients: int = 8
    """Requests that are answered at a time."""
    requests: int = 48
    """Timed requests of each server."""
    text_tokens: int = 64
    """Of a request, beside its image."""
    answer_tokens: int = 16
    """Length of the answers."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights and computation."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for."""
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Run) if hasattr(options, f.name)}
    return [Run(**{**shared, "size": size, "share": share}) for size in options.size for share in options.share]


def save(size: Size, folder: Path) -> None:
    """Save a model with random weights, and its processor."""
    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("tokenizers")
    files: Any = importlib.import_module("safetensors.torch")
    width, depth, image = SIZES[size]
    config = own_config(width, depth, image)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder, max_shard_size="100GB")
    path = folder / "model.safetensors"
    # Published checkpoints have the names from before transformers 5.
    weights = files.load_file(path)
    nested = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    files.save_file(nested, path, {"format": "pt"})
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(config.text_config.vocab_size - 5)), "<image>"]
    words_to_ids = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(words_to_ids)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens={"image_token": "<image>"}
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image})
    transformers.LlavaProcessor(
        images, fast, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% else %}<image>{% endif %} {% endfor %}{% endfor %}",
    ).save_pretrained(folder)  # fmt: skip


@contextlib.contextmanager
def serving(folder: Path, setting: Json | None, run: Run) -> Iterator[str]:
    """Context in which a server answers at the address that it yields."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*vllm("serve"), str(folder), f"--port={port}", f"--dtype={run.dtype}", "--max-model-len=1024"]
    command += [f"--max-num-seqs={run.clients}", "--no-enable-prefix-caching", f"--kv-cache-memory-bytes={1 << 30}"]
    if setting is not None:
        command += ["--hf-overrides", json.dumps({"crossget": setting})]
    log = folder / "server.log"
    with log.open("w", encoding="utf-8") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + STARTS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def vllm(command: str) -> list[str]:
    """Return the beginning of a command line of vLLM's."""
    return [str(Path(sys.executable).with_name("vllm")), command]


def prompt_tokens(address: str, folder: Path, run: Run) -> int:
    """Return how many tokens a prompt with an image has, as the server counts them."""
    from PIL import Image

    side, png = SIZES[run.size][2], io.BytesIO()
    Image.new("RGB", (side, side)).save(png, "PNG")
    image = {"url": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "w1"}]
    body = {"model": str(folder), "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return int(json.load(answer)["usage"]["prompt_tokens"])


def ask(address: str, folder: Path, run: Run) -> Json:
    """Return what vLLM's benchmark measures."""
    size = SIZES[run.size][2]
    command = [*vllm("bench"), "serve", "--backend=openai-chat", f"--base-url={address}", f"--model={folder}"]
    command += ["--endpoint=/v1/chat/completions", "--dataset-name=random-mm", f"--num-prompts={run.requests}"]
    command += [f"--max-concurrency={run.clients}", f"--num-warmups={run.clients}", "--ignore-eos", "--disable-tqdm"]
    command += [f"--random-input-len={run.text_tokens}", f"--random-output-len={run.answer_tokens}", "--temperature=0"]
    command += ["--random-mm-base-items-per-request=1", f"--random-mm-bucket-config={{({size}, {size}, 1): 1.0}}"]
    command += ["--save-result", f"--result-dir={folder}", "--result-filename=bench.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: Json = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    if found["completed"] != run.requests:
        raise RuntimeError(f"{found['completed']} of {run.requests} requests were answered")
    return {
        "requests_per_second": found["request_throughput"],
        "first_token_ms": found["median_ttft_ms"],
    }


def execute(run: Run) -> Json:
    """Time both servers."""
    torch.manual_seed(0)
    rows: list[Json] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(run.size, folder)
        reduced = {"method": run.method, "keep": run.share}
        for label, setting in ((DENSE, None), (f"{run.method}, keep {run.share:g}", reduced)):
            with serving(folder, setting, run) as address:
                counted = prompt_tokens(address, folder, run)
                if rows and counted >= rows[0]["prompt_tokens"]:
                    raise RuntimeError(
                        f"a prompt with an image has {counted} tokens with crossget and {rows[0]['prompt_tokens']} "
                        "without: the server has not loaded crossget's plugin; install crossget beside vLLM"
                    )
                rows.append({"method": label, "prompt_tokens": counted, **ask(address, folder, run)})
    return {"run": asdict(run), "result": {"rows": rows}}


COLUMNS = ["", "requests/s", "ratio", "ms to the first token", "ratio"]


def tables(contents: Sequence[Json]) -> str:
    """Return the results as text, one table each."""
    parts = []
    for content in contents:
        run, (dense, *_) = content["run"], content["result"]["rows"]
        rows = [
            [
                row["method"],
                f"{row['requests_per_second']:.2f}",
                f"{row['requests_per_second'] / dense['requests_per_second']:.2f}x",
                f"{row['first_token_ms']:.0f}",
                f"{dense['first_token_ms'] / row['first_token_ms']:.2f}x",
            ]
            for row in content["result"]["rows"]
        ]
        parts.append(
            f"LLaVA-1.5 of the size {run['size']}, {(SIZES[run['size']][2] // 14) ** 2} image and {run['text_tokens']} "
            f"text tokens, answers of {run['answer_tokens']}, {run['clients']} clients, {run['dtype']}, "
            f"{measured_on(content['environment'])}\n\n" + markdown(rows, COLUMNS, 1)
        )
    return "\n\n".join(parts)


STUDY = Study(
    "speed-serving", Options, grid, lambda options: execute,
    lambda run: {"size": (run.size,), "share": (run.share,)}, tables,
)  # fmt: skip
