"""Time image and text towers, dense and reduced.

In one run, in turns: the dense model, CrossGET, ToMe-style merging, Ward, and the ideal, which is the dense model's
blocks at CrossGET's token counts without any reducer: what CrossGET takes longer than that is the reducer's own cost.
Speed does not depend on the weights' values, so they are random and nothing is downloaded.
"""

import contextlib
import copy
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import crossget
from crossget.core.attach import find_attachment
from crossget.integrations._support import NumbersOnCPU
from crossget.measure.speed import calling, peak_memory, quartiles, take_turns
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import planned_tokens
from experiments.lib.files import Json, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown
from experiments.speed.ideal import cut

RESULTS = Path(__file__).parent / "results"
DENSE, CROSSGET, TOME, WARD, IDEAL = "dense", "CrossGET", "ToMe-style", "Ward", "ideal"
METHODS = (DENSE, CROSSGET, TOME, WARD, IDEAL)
CHECKPOINTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"
"""Setting of Dynamo that lets a graph watch the block in a checkpoint."""
TowerName = Literal[
    "vit-b", "vit-l-336", "vit-h", "dinov2-s-518", "dinov2-l-518", "clip-text", "llava-tower", "tiny", "tiny-text",
    "tiny-llava",
]  # fmt: skip


class Entry(nn.Module):
    """A model and the method of it that is timed."""

    def __init__(self, model: nn.Module, setup: "Setup") -> None:
        super().__init__()
        self.model = model
        self.method = setup.method
        self.options = dict(setup.options)

    def forward(self, x: Tensor) -> Any:
        """Call the method."""
        return getattr(self.model, self.method)(x, **self.options)


@dataclass(frozen=True)
class Setup:
    """A tower to time.

    Attributes:
        make: returns the model with random weights.
        r: tokens removed per block.
        inputs: returns inputs for a batch.
        tower: its name in the model.
        method: what is called.
        options: what it is called with, beside the inputs.
        multiple: the tokens left behind a block are a multiple of this number.
    """

    make: Callable[[], nn.Module]
    r: int
    inputs: Callable[[int], Tensor]
    tower: str = "visual"
    method: str = "__call__"
    options: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1


def timm(name: str, **options: Any) -> nn.Module:
    """Return a model of timm."""
    model: nn.Module = importlib.import_module("timm").create_model(name, **options)
    return model


def open_clip(**changes: Any) -> nn.Module:
    """Return open_clip's ViT-B-16, or another one with the same text tower."""
    library: Any = importlib.import_module("open_clip")
    model: nn.Module = library.CLIP(**{**library.get_model_config("ViT-B-16"), **changes})
    return model


def llava(width: int, depth: int, image: int) -> nn.Module:
    """Return a LLaVA with the image tower in question and next to no language model."""
    transformers: Any = importlib.import_module("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, intermediate_size=4 * width,
        image_size=image, patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, vocab_size=64, pad_token_id=0
    )
    model: nn.Module = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    )
    return model


def images(size: int, batch: int) -> Tensor:
    """Return noise [B, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def texts(batch: int) -> Tensor:
    """Return token ids [B, 77]. They end early, so that the end of text is there when the ideal has cut the others."""
    ids = torch.randint(1, 1000, (batch, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 2] = 49407
    ids[:, 3:] = 0
    return ids


TINY = {"embed_dim": 64, "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}}  # fmt: skip
# As LLaVA-1.5 does by itself; older versions of transformers want to be told.
FEATURES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
LLAVA: Any = {"method": "get_image_features", "options": FEATURES}
# r so that about half of the multiply-adds are left; those of texts and LLaVA are the reference's.
SETUPS: Mapping[str, Setup] = {
    "vit-b": Setup(partial(timm, "vit_base_patch16_224"), 16, partial(images, 224)),
    "vit-l-336": Setup(partial(timm, "vit_large_patch14_clip_336"), 23, partial(images, 336)),
    "vit-h": Setup(partial(timm, "vit_huge_patch14_clip_224"), 7, partial(images, 224)),
    "dinov2-s-518": Setup(partial(timm, "vit_small_patch14_dinov2"), 110, partial(images, 518)),
    "dinov2-l-518": Setup(partial(timm, "vit_large_patch14_dinov2"), 55, partial(images, 518)),
    "clip-text": Setup(open_clip, 6, texts, "text", "encode_text"),
    "llava-tower": Setup(partial(llava, 1024, 24, 336), 13, partial(images, 336), **LLAVA),
    "tiny": Setup(partial(timm, "test_vit"), 13, partial(images, 160)),
    "tiny-text": Setup(partial(open_clip, **TINY), 6, texts, "text", "encode_text"),
    "tiny-llava": Setup(partial(llava, 64, 3, 112), 5, partial(images, 112), **LLAVA),
}


@dataclass(frozen=True)
class Run:
    """One line of the queue: a tower at one batch size."""

    tower: str
    batch: int
    dtype: str
    device: str
    mode: str
    train: bool
    rounds: int
    multiple: int = 1
    checkpointing: bool = False

    @property
    def slug(self) -> str:
        """The result file's name."""
        kind = f"{self.mode}_train" if self.train else self.mode
        kind += "_checkpointing" if self.checkpointing else ""
        kind += f"_multiples{self.multiple}" if self.multiple > 1 else ""
        return f"towers/{self.tower}_{self.device.partition(':')[0]}_{self.dtype}_{kind}_batch{self.batch}"


@dataclass(frozen=True)
class Options:
    """What to time."""

    towers: tuple[TowerName, ...] = (
        "vit-b", "vit-l-336", "vit-h", "dinov2-s-518", "dinov2-l-518", "clip-text", "llava-tower",
    )  # fmt: skip
    """Towers."""
    batch: tuple[int, ...] = (1, 8, 32, 128)
    """Images or texts per call; what does not fit is said so in its result."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and computation."""
    device: str = "cuda"
    """Where the model runs."""
    mode: Literal["eager", "compile", "blocks"] = "eager"
    """Without torch.compile, with it, or with every block compiled by itself for all numbers of tokens."""
    multiple: int = 1
    """The tokens left behind a block are a multiple of this number."""
    train: bool = False
    """Time a forward and backward pass in training mode."""
    checkpointing: bool = False
    """With `train`: every block is recomputed in the backward pass."""
    rounds: int = 11
    """Timed turns of each method."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: they make no sense, or ask for a device that is not there.
    """
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: give --device cpu")
    if min(options.rounds, options.multiple, min(options.batch, default=0)) < 1:
        raise ValueError(
            f"--rounds {options.rounds} --batch {options.batch} --multiple {options.multiple}: expected numbers of at "
            "least 1"
        )
    if options.checkpointing and not options.train:
        raise ValueError("--checkpointing was given without --train: only a training step recomputes anything")
    shared = {f.name: getattr(options, f.name) for f in fields(Run) if f.name not in ("tower", "batch")}
    return [Run(tower, batch, **shared) for tower in options.towers for batch in options.batch]


def variants(setup: Setup, dtype: torch.dtype, device: str) -> dict[str, Entry]:
    """Return the model in every form. All share their weights."""
    torch.manual_seed(0)
    dense = Entry(setup.make().to(device, dtype).eval(), setup)
    weights = {id(tensor): tensor for tensor in [*dense.parameters(), *dense.buffers()]}
    forms = {name: dense if name == DENSE else copy.deepcopy(dense, dict(weights)) for name in METHODS}
    for name, reducer in reducers(setup).items():
        crossget.attach(forms[name].model, {setup.tower: reducer})
    blocks = next(t for t in crossget.find_towers(forms[IDEAL].model) if t.name == setup.tower).blocks
    cut(blocks, counts_of(forms[CROSSGET], setup, placed(setup.inputs(1), device, dtype)))
    return forms


def counts_of(form: Entry, setup: Setup, x: Tensor) -> list[int]:
    """Return how many tokens enter each block of an attached model, and how many leave the last one that runs."""
    attached = crossget.attachment(form.model)
    tower, reducer = attached.towers[setup.tower], attached.reducers[setup.tower]
    ran: list[int] = []
    # With some versions of transformers, blocks behind the features that LLaVA reads are left out.
    hooks = [
        next(block.children()).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(tower.blocks)
    ]
    with torch.no_grad():
        form(x)
    for hook in hooks:
        hook.remove()
    first, depth = attached.tokens[setup.tower][0], len(tower.blocks)
    counts = planned_tokens(reducer.schedule, depth, first, tower.n_reserved(bool(reducer.cross_token)))
    return counts[: max(ran) + 2]


def placed(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Return inputs where and as the model wants them."""
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def reducers(setup: Setup) -> dict[str, Reducer]:
    """Return the reducers that are timed."""
    r = setup.r if setup.multiple == 1 else crossget.Aligned(setup.r, setup.multiple)
    return {CROSSGET: crossget.CrossGET(r), TOME: crossget.ToMe(r), WARD: crossget.Ward(r)}


def step(form: Callable[[Tensor], Any], parameters: Sequence[nn.Parameter], x: Tensor) -> None:
    """Run forward and backward, and leave nothing behind that the next call would free."""
    pooled(form(x)).float().sum().backward()
    for parameter in parameters:
        parameter.grad = None


def pooled(out: Any) -> Tensor:
    """Return the features of what a model returns: in transformers the form differs between versions."""
    while not isinstance(out, Tensor):
        out = getattr(out, "pooler_output", None) if hasattr(out, "pooler_output") else out[0]
    return out


def calls(
    run: Run, setup: Setup, forms: Mapping[str, Entry], x: Tensor
) -> tuple[dict[str, Callable[[], Any]], dict[str, Json]]:
    """Return what is timed of each method, and what it took to compile it."""
    for form in forms.values():
        form.train(run.train)
        if run.checkpointing:
            recomputed(form.model)

    def call_of(form: Entry, called: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return partial(step, called, trainable(form), x) if run.train else partial(called, x)

    if run.mode == "eager":
        return {name: call_of(form, form) for name, form in forms.items()}, {}
    found: dict[str, Callable[[], Any]] = {}
    costs: dict[str, Json] = {}
    torch._dynamo.reset()
    with nothing_cached():  # what compiles first starts the compiler
        torch.compile(torch.sin)(x.float())
    for name, form in forms.items():
        form(x)  # sets up what cannot be traced: transformers' hooks, for one
        found[name] = call_of(form, blocks_compiled(form, setup) if run.mode == "blocks" else compiled(form, x.is_cuda))
        costs[name] = first_call(found[name])
    return found, costs


def trainable(form: Entry) -> list[nn.Parameter]:
    """Return the parameters of a form, with those of what is attached to it."""
    attachment = find_attachment(form)
    return [*form.parameters(), *(attachment.parameters() if attachment else [])]


def recomputed(model: Any) -> None:
    """Switch on gradient checkpointing, which timm, open_clip and versions of transformers call differently."""
    names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def compiled(form: Entry, on_cuda: bool) -> Callable[[Tensor], Any]:
    """Return the form, to be compiled when it is called: as a whole, for these shapes, by itself.

    All forms are of one class and share its code, with which torch keeps what it compiles. There is no reset between
    them: the earlier ones would be compiled again. Where torch can, it keeps them apart; elsewhere its guards do.
    """
    # A graph break is an error. CUDA graphs where there is CUDA.
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead" if on_cuda else "default"}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    call: Callable[[Tensor], Any] = torch.compile(form, **options)
    return call


def blocks_compiled(form: Entry, setup: Setup) -> Entry:
    """Return the form, with blocks that are compiled when they are called, each by itself for all numbers of tokens."""
    attached = find_attachment(form.model)
    found = {t.name: t for t in crossget.find_towers(form.model)} if attached is None else attached.towers
    for block in found[setup.tower].blocks:
        block.compile(dynamic=True)
    return form


def nothing_cached() -> contextlib.AbstractContextManager[None]:
    """Return a context in which what was compiled before, also by other processes, does not help."""
    inductor: Any = importlib.import_module("torch._inductor.utils")
    context: contextlib.AbstractContextManager[None] = (
        getattr(inductor, "fresh_cache", None) or inductor.fresh_inductor_cache
    )()
    return context


def first_call(call: Callable[[], Any]) -> Json:
    """Make the call that compiles, and return what that took."""
    metrics: Any = importlib.import_module("torch._inductor.metrics")
    metrics.reset()
    # All forms of a model share the code of their blocks, and with it the number of graphs that torch allows.
    config: Any = importlib.import_module("torch._dynamo.config")
    changes: Json = {"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": 64}
    if hasattr(config, CHECKPOINTS):
        changes[CHECKPOINTS] = True
    start = time.perf_counter()
    with nothing_cached(), config.patch(changes):
        call()
    return {"seconds": round(time.perf_counter() - start, 3), "kernels": metrics.generated_kernel_count}


def launches(call: Callable[[], Any], device: torch.device, depth: int) -> float | None:
    """Return kernels launched per block in one call; None without a GPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    # The host's calls of CUDA's runtime are among the events, too, and so are copies.
    kernels = [
        event
        for event in profile.events() or []
        if event.device_type.name == "CUDA" and not event.name.lower().startswith(("memcpy", "memset"))
    ]
    return round(len(kernels) / depth, 1)


def flops(setup: Setup) -> dict[str, int]:
    """Return multiply-adds of one image or text."""
    counted: dict[str, int] = {}
    with torch.device("meta"), NumbersOnCPU():
        model = setup.make().eval()
    entry, x = Entry(model, setup), setup.inputs(1).to("meta")
    for name, reducer in reducers(setup).items():
        with crossget.attach(model, {setup.tower: reducer}):
            report = crossget.count_flops(entry, x)
        counted[DENSE], counted[name] = report.dense.total, report.total
    return counted


def execute(run: Run) -> Json:
    """Time one tower at one batch size, every method in turns."""
    setup, device = replace(SETUPS[run.tower], multiple=run.multiple), torch.device(run.device)
    result: Json = {"flops": flops(setup), "r": setup.r, "rows": []}
    try:
        result |= timed(run, setup, device, result["flops"])
    except torch.cuda.OutOfMemoryError as error:
        result["does_not_fit"] = str(error).partition("\n")[0]
    return {"run": asdict(run), "result": result}


def timed(run: Run, setup: Setup, device: torch.device, counted: Mapping[str, int]) -> Json:
    """Return the depth of the tower, and a row for each method."""
    dtype = getattr(torch, run.dtype)
    forms = variants(setup, dtype, run.device)
    depth = len(crossget.attachment(forms[CROSSGET].model).towers[setup.tower].blocks)
    x = placed(setup.inputs(run.batch), run.device, dtype)
    with torch.set_grad_enabled(run.train):
        made, costs = calls(run, setup, forms, x)
        turns = {name: partial(calling, call) for name, call in made.items()}
        seconds = take_turns(turns, device, run.rounds, warmup=1)
        # A CUDA graph keeps its memory between calls, so that none needs any.
        meters = {} if run.mode != "eager" and device.type == "cuda" else turns
        memory = {name: peak_memory(turn, device) for name, turn in meters.items()}
        rows = [
            row(name, seconds, memory, counted)
            | {"compile": costs.get(name), "launches": launches(made[name], device, depth)}
            for name in METHODS
        ]
    return {"depth": depth, "rows": rows}


def row(
    name: str, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, int], counted: Mapping[str, int]
) -> Json:
    """Return what one method took."""
    speed = tuple(a / b for a, b in zip(seconds[DENSE], seconds[name], strict=True))
    over = tuple(b / a - 1 for a, b in zip(seconds[IDEAL], seconds[name], strict=True))
    promised = counted[DENSE] / counted[CROSSGET if name == IDEAL else name]
    return {
        "method": name,
        "seconds": round(statistics.median(seconds[name]), 6),
        "speed": round(statistics.median(speed), 4),
        "quartiles": [round(value, 4) for value in quartiles(speed)],
        "promised": round(promised, 4),
        "realised": round(statistics.median(speed) / promised, 4),
        "over_ideal": round(statistics.median(over), 4),
        "over_ideal_quartiles": [round(value, 4) for value in quartiles(over)],
        "peak_memory": memory.get(name),
        "memory": round(memory[name] / memory[DENSE], 4) if name in memory else None,
        "rounds": [round(value, 6) for value in seconds[name]],
    }


REDUCED = (CROSSGET, TOME, WARD)
COLUMNS = ["tower", "", "batch", "dense, ms", "by FLOPs", *REDUCED, IDEAL, *(f"{n} above the ideal" for n in REDUCED)]


def kind_of(run: Json) -> str:
    """Return what is timed of a tower: its dtype, how it runs, and the multiple of its token counts."""
    kind = f"{run['dtype']}, {run['mode']}" + (", training step" if run["train"] else "")
    kind += ", checkpointing" if run.get("checkpointing") else ""
    return kind + (f", multiples of {run['multiple']}" if run.get("multiple", 1) > 1 else "")


def cells(content: Json) -> list[str]:
    """Return the row of one result."""
    run, result = content["run"], content["result"]
    head = [run["tower"], kind_of(run), str(run["batch"])]
    if "does_not_fit" in result:
        return [*head, "does not fit", *[""] * (len(COLUMNS) - 4)]
    found = {row["method"]: row for row in result["rows"]}
    speeds = [f"{found[name]['speed']:.2f}x [{_span(found[name]['quartiles'])}]" for name in (*REDUCED, IDEAL)]
    above = [f"{100 * found[name]['over_ideal']:+.1f} %" for name in REDUCED]
    return [*head, f"{1e3 * found[DENSE]['seconds']:.1f}", f"{found[CROSSGET]['promised']:.2f}x", *speeds, *above]


def _span(quartiles: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in quartiles)


def in_order(contents: Sequence[Json]) -> list[Json]:
    """Return results as they are shown: by tower, then by dtype, kind and batch."""
    order = {name: place for place, name in enumerate(SETUPS)}
    kinds = ["eager", "blocks", "compile"]

    def place(run: Json) -> tuple[Any, ...]:
        how = run["dtype"], run["train"], run.get("checkpointing", False), run.get("multiple", 1)
        return run["device"], order[run["tower"]], *how, kinds.index(run["mode"]), run["batch"]

    return sorted(contents, key=lambda content: place(content["run"]))


def table(contents: Sequence[Json]) -> str:
    """Return results as one table."""
    return markdown([cells(content) for content in in_order(contents)], COLUMNS, 3)


def shown(contents: Sequence[Json]) -> str:
    """Return results of one machine with its name."""
    return f"{measured_on(contents[0]['environment'])}\n\n{table(contents)}"


STUDY = Study(
    "speed-towers", Options, grid, lambda options: execute, lambda run: {"towers": (run.tower,), "batch": (run.batch,)},
    shown,
)  # fmt: skip
