"""Time LLaVA-1.5 with random weights, dense and reduced.

Speed does not depend on the weights' values, so nothing is downloaded. In one run, in turns: the dense model with
torch's fused attention, CrossGET and ToMe-style merging. Measured are the time to the first new token (image tower and
prefill), the time of whole answers of fixed lengths, the memory that these need beyond the weights, and the cache.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import crossget
from crossget.checkpoints import hf_sizes as presets
from crossget.measure.generation import count_stages, numbers_in
from crossget.measure.speed import BenchmarkReport, benchmark
from crossget.methods.reducers import Reducer
from experiments.lib.files import Json, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Size = Literal["llava-1.5-7b", "llava-1.5-13b", "small", "tiny"]
DENSE, FIRST = "dense", "first token"


def own_config(width: int, depth: int, image: int) -> Any:
    """Return the configuration of a LLaVA for machines without a GPU: both models of the same width and depth."""
    shared = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    transformers: Any = importlib.import_module("transformers")
    vision = transformers.CLIPVisionConfig(**shared, intermediate_size=4 * width, image_size=image, patch_size=14)
    text = transformers.LlamaConfig(**shared, intermediate_size=11 * width // 4, vocab_size=4096, pad_token_id=0)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4095)


# Beside the published sizes: one with LLaVA's 577 tokens that a laptop runs, and one for the tests.
OWN = {"small": partial(own_config, 384, 12, 336), "tiny": partial(own_config, 64, 3, 112)}


def make(size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the model, drawn on its device."""
    if size not in OWN:
        return presets.build(size, dtype=dtype, device=device)
    transformers: Any = importlib.import_module("transformers")
    model: nn.Module = transformers.LlavaForConditionalGeneration(OWN[size]())
    return model.to(device, dtype).eval()


class Prompted(Protocol):
    """What `prompt` needs to know of a run."""

    @property
    def batch(self) -> int: ...

    @property
    def text_tokens(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Run:
    """One line of the queue: a model at one batch size."""

    size: Size
    batch: int
    dtype: str
    device: str
    r: int
    text_tokens: int
    new_tokens: tuple[int, ...]
    rounds: int
    seed: int = 0

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"llava/{self.size}_{self.device.partition(':')[0]}_{self.dtype}_batch{self.batch}_r{self.r}"


@dataclass(frozen=True)
class Options:
    """What to time."""

    size: tuple[Size, ...] = ("llava-1.5-7b", "llava-1.5-13b")
    """Models. The published sizes want a GPU of 40 GB; "small" is for a CPU."""
    batch: tuple[int, ...] = (1, 8, 32)
    """Prompts per call, each with one image."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and computation."""
    device: str = "cuda"
    """Where the model runs."""
    r: int = 13
    """Tokens removed per block of the image tower."""
    text_tokens: int = 64
    """Of a prompt, beside the image's."""
    new_tokens: tuple[int, ...] = (32, 128)
    """Lengths of the answers."""
    rounds: int = 5
    """Timed turns of each method."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for."""
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Run) if hasattr(options, f.name)}
    return [Run(**{**shared, "size": size, "batch": batch}) for size in options.size for batch in options.batch]


def prompt(model: Any, run: Prompted) -> dict[str, Tensor]:
    """Return a batch of prompts as a processor writes them for the dense model: no padding, one image each."""
    config = model.config
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    image_token = getattr(config, "image_token_id", None) or config.image_token_index
    generator = torch.Generator().manual_seed(run.seed)
    text = torch.randint(10, 1000, (run.batch, run.text_tokens), generator=generator)
    ids = torch.cat([text[:, :1], torch.full((run.batch, (size // patch) ** 2), image_token), text[:, 1:]], 1)
    pixels = torch.randn(run.batch, 3, size, size, generator=generator)
    ids, pixels = ids.to(run.device), pixels.to(run.device, DTYPES[run.dtype])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def generate(model: Any, length: int, **inputs: Tensor) -> Any:
    """Generate exactly so many tokens, greedily."""
    return model.generate(
        **inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length, return_dict_in_generate=True,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip


def cache_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Return the size of the cache behind the first new token."""
    out = generate(model, 1, **inputs)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    return sum(tensor.numel() * tensor.element_size() for tensor in numbers_in(cache))


def execute(run: Run) -> Json:
    """Time one model at one batch size, every method in turns."""
    torch.manual_seed(run.seed)
    model = make(run.size, DTYPES[run.dtype], run.device)
    inputs = prompt(model, run)
    methods: dict[str, Reducer] = {"CrossGET": crossget.CrossGET(run.r), "ToMe-style": crossget.ToMe(run.r)}
    stages = {FIRST: 1, **{f"{n} tokens": n for n in run.new_tokens}}
    reports = {
        name: benchmark(
            model, inputs, rounds=run.rounds, warmup=1, methods=methods, call=partial(generate, model, length)
        )
        for name, length in stages.items()
    }
    with torch.no_grad():
        costs = {DENSE: (cache_bytes(model, inputs), 1.0)}
        for name, reducer in methods.items():
            with crossget.attach(model, reducer):
                costs[name] = (cache_bytes(model, inputs), predicted(run, reducer))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = [row(name, method, reports[name], costs[method], stages[name], run.batch)
            for name in stages for method in costs]  # fmt: skip
    return {"run": asdict(run), "result": {"weights": weights, "rows": rows}}


def predicted(run: Run, reducer: Reducer) -> float:
    """Return by how much image tower and prefill should be faster, by multiply-adds."""
    model = make(run.size, torch.float32, "cpu" if run.size in OWN else "meta")
    with crossget.attach(model, reducer):
        return count_stages(model, run.text_tokens).speedup


def row(stage: str, method: str, report: BenchmarkReport, cost: tuple[int, float], length: int, batch: int) -> Json:
    """Return what one method needs for one stage."""
    found = report[method]
    low, high = found.speed_quartiles
    return {
        "stage": stage,
        "method": method,
        "seconds": round(found.median_seconds, 6),
        "speed": round(found.median_speed, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "tokens_per_second": round(batch * length / found.median_seconds, 3),
        "peak_memory": found.peak_memory,
        "cache": cost[0],
        # Decoding steps are not in the prediction, so it stands beside the first token only.
        "predicted": round(cost[1], 4) if stage == FIRST else None,
        "rounds": [round(seconds, 6) for seconds in found.seconds],
    }


COLUMNS = ["", "method", "ms", "speed", "by multiply-adds", "new tokens / s", "peak memory MiB", "cache MiB"]


def cells(content: Json) -> list[list[str]]:
    """Return the rows of one result."""
    rows = []
    for found in content["result"]["rows"]:
        low, high = found["quartiles"]
        dense = found["method"] == DENSE
        rows.append([
            found["stage"] if dense else "",
            found["method"],
            f"{1e3 * found['seconds']:.1f}",
            "1.00x" if dense else f"{found['speed']:.2f}x [{low:.2f}, {high:.2f}]",
            "" if dense or found["predicted"] is None else f"{found['predicted']:.2f}x",
            f"{found['tokens_per_second']:.1f}",
            f"{found['peak_memory'] / 2**20:.0f}",
            f"{found['cache'] / 2**20:.1f}",
        ])  # fmt: skip
    return rows


def table(content: Json) -> str:
    """Return one result as text."""
    run = content["run"]
    head = (
        f"LLaVA {run['size']}, batch {run['batch']}, {run['text_tokens']} text tokens, r = {run['r']}, {run['dtype']}, "
        f"{measured_on(content['environment'])}; speed is the ratio to dense, median and quartiles of "
        f"{run['rounds']} rounds"
    )
    return head + "\n\n" + markdown(cells(content), COLUMNS, 2)


def tables(contents: Sequence[Json]) -> str:
    """Return several results as one table of a page."""
    rows = []
    for content in sorted(contents, key=lambda content: content["run"]["batch"]):
        for stage, *others in cells(content):
            rows.append([f"batch {content['run']['batch']}, {stage}" if stage else "", *others])
    return markdown(rows, COLUMNS, 2)


STUDY = Study(
    "speed-llava", Options, grid, lambda options: execute, lambda run: {"size": (run.size,), "batch": (run.batch,)},
    lambda contents: "\n\n".join(map(table, contents)),
)  # fmt: skip
