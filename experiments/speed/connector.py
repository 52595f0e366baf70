"""Time the prefill with fewer image features behind the connector, beside the share of the multiply-adds.

Speed does not depend on the weights' values, so nothing is downloaded: a language model of the sizes of Qwen2-0.5B with
random weights, behind an image tower of one narrow block. Dense and reduced models take turns in one run. The reduction
of the features is timed by itself as well.
"""

import dataclasses
import importlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import crossget
from crossget.core.connector import reduce_features
from crossget.measure.generation import count_stages
from crossget.measure.speed import benchmark, calling, take_turns
from crossget.methods.reducers import Reducer
from experiments.lib.files import Json, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown
from experiments.speed.llava import DENSE, DTYPES, cache_bytes, generate, prompt

RESULTS = Path(__file__).parent / "results"
PATCH = 14
TEXTS = {
    "qwen2-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1200,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One line of the queue: a model at one number of image tokens."""

    size: Literal["qwen2-0.5b", "tiny"]
    image_tokens: int
    keep: tuple[float, ...]
    batch: int
    text_tokens: int
    dtype: str
    device: str
    rounds: int
    seed: int = 0

    @property
    def side(self) -> int:
        """Patches of a side of the square image whose number is the nearest to `image_tokens`."""
        return round(math.sqrt(self.image_tokens))

    @property
    def slug(self) -> str:
        """The result file's name."""
        device = self.device.partition(":")[0]
        return f"connector/{self.size}_{device}_{self.dtype}_batch{self.batch}_image{self.image_tokens}"


@dataclass(frozen=True)
class Options:
    """What to time."""

    size: Literal["qwen2-0.5b", "tiny"] = "qwen2-0.5b"
    """Sizes of the language model; "tiny" is for the tests."""
    image_tokens: tuple[int, ...] = (1000, 2000, 3000)
    """Features of the image; the nearest square is taken."""
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Shares of them that stay."""
    batch: int = 1
    """Prompts per call, each with one image."""
    text_tokens: int = 64
    """Of a prompt, beside the image's."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and computation."""
    device: str = "cpu"
    """Where the model runs."""
    rounds: int = 7
    """Timed turns of each model."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for."""
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Run) if hasattr(options, f.name)}
    return [Run(**{**shared, "image_tokens": number}) for number in options.image_tokens]


def make(run: Run, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the model, drawn on its device."""
    transformers: Any = importlib.import_module("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, patch_size=PATCH,
        image_size=PATCH * run.side,
    )  # fmt: skip
    text = transformers.Qwen2Config(**TEXTS[run.size], pad_token_id=0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=TEXTS[run.size]["vocab_size"] - 1,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def execute(run: Run) -> Json:
    """Time one model at one number of image tokens, dense and reduced in turns."""
    torch.manual_seed(run.seed)
    model = make(run, DTYPES[run.dtype], run.device)
    inputs = prompt(model, run)
    methods = {f"keep {keep:g}": {"connector": crossget.Ward(crossget.Keep(keep))} for keep in run.keep}
    # No rounds to warm up: an untimed call precedes every timed one, and takes up to half a minute on a CPU.
    report = benchmark(model, inputs, rounds=run.rounds, warmup=0, methods=methods, call=partial(generate, model, 1))
    counted = make(run, torch.float32, "meta")
    costs = {DENSE: (cache_bytes(model, inputs), 1.0, run.side**2, 0.0)}
    for name, reducer in methods.items():
        with crossget.attach(counted, reducer):
            stages = count_stages(counted, run.text_tokens)
        with crossget.attach(model, reducer) as attached:
            tokens = stages.reduced.image_tokens if stages.reduced else run.side**2
            step = reducing(run, attached.reducers["connector"], tokens)
            costs[name] = (cache_bytes(model, inputs), 1 / stages.speedup, tokens, step)
    rows = []
    for name, (cache, share, tokens, step) in costs.items():
        found = report[name]
        rows.append({
            "method": name,
            "image_tokens": tokens,
            "seconds": round(found.median_seconds, 6),
            "speed": round(found.median_speed, 4),
            "quartiles": [round(value, 4) for value in found.speed_quartiles],
            "cache": cache,
            "share": round(share, 4),
            "reducing": round(step, 6),
            "rounds": [round(seconds, 6) for seconds in found.seconds],
        })  # fmt: skip
    return {"run": asdict(run), "result": {"rows": rows}}


def reducing(run: Run, reducer: Reducer, tokens: int) -> float:
    """Return the median of the seconds in which the features of all images of a batch are reduced to so many."""
    chance = torch.Generator().manual_seed(run.seed)
    width = TEXTS[run.size]["hidden_size"]
    images = torch.randn(run.batch, run.side**2, width, generator=chance).to(run.device, DTYPES[run.dtype])

    def reduce() -> None:
        for features in images:
            reduce_features(reducer, features, tokens)

    with torch.no_grad():
        seconds = take_turns({"reduce": partial(calling, reduce)}, torch.device(run.device), run.rounds, warmup=2)
    return statistics.median(seconds["reduce"])


COLUMNS = ["", "image tokens", "ms", "speed", "by multiply-adds", "reducing, % of it", "cache MiB"]


def cells(content: Json) -> list[list[str]]:
    """Return the rows of one result."""
    rows = []
    for found in content["result"]["rows"]:
        low, high = found["quartiles"]
        dense = found["method"] == DENSE
        rows.append([
            found["method"],
            f"{found['image_tokens']:,}",
            f"{1e3 * found['seconds']:.1f}",
            "1.00x" if dense else f"{found['speed']:.2f}x [{low:.2f}, {high:.2f}]",
            "" if dense else f"{1 / found['share']:.2f}x",
            "" if dense else f"{100 * found['reducing'] / found['seconds']:.1f}",
            f"{found['cache'] / 2**20:.1f}",
        ])  # fmt: skip
    return rows


def tables(contents: Sequence[Json]) -> str:
    """Return the results as text, one table each."""
    parts = []
    for content in sorted(contents, key=lambda content: (content["run"]["dtype"], int(content["run"]["image_tokens"]))):
        run = content["run"]
        parts.append(
            f"{run['size']}, batch {run['batch']}, {run['text_tokens']} text tokens, {run['dtype']}, "
            f"{measured_on(content['environment'])}; time to the first new token; speed is the ratio to dense, median "
            f"and quartiles of {run['rounds']} rounds\n\n" + markdown(cells(content), COLUMNS, 1)
        )
    return "\n\n".join(parts)


STUDY = Study(
    "speed-connector", Options, grid, lambda options: execute, lambda run: {"image_tokens": (run.image_tokens,)}, tables
)
