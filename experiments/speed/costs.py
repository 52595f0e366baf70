"""Time what CrossGET costs beside the forward pass.

Five costs, each with a result file of its own: attaching and detaching, importing, the first call of a compiled model,
the matching of long sequences, and the memory that a forward pass needs at most. Models have random weights, so nothing
is downloaded, and all runs on the CPU.
"""

import contextlib
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import crossget
from crossget.measure.speed import calling, peak_memory, quartiles
from crossget.methods.matching import Candidates, complete_graph
from crossget.methods.pairs import BAND, BUDGET
from experiments.lib.files import ROOT, Json, check_names, measured_on
from experiments.lib.study import Study
from experiments.lib.tables import markdown
from experiments.speed.towers import CROSSGET, DENSE, SETUPS, TOME, TowerName, placed, variants
from experiments.speed.towers import Options as TowerOptions

RESULTS = Path(__file__).parent / "results"
Cost = Literal["attach", "import", "compile", "length", "memory"]
COSTS: tuple[Cost, ...] = get_args(Cost)
UNLIMITED, WHOLE_BYTES = 1 << 62, 2 << 30
Clock = Callable[[], float]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cost: tuple[Cost, ...] = COSTS
    """Which costs."""
    models: tuple[str, ...] = ("timm/vit_base_patch16_224", "open_clip/ViT-B-16")
    """Models to attach to, each as library/name."""
    r: int = 16
    """Tokens removed per block."""
    attach_rounds: int = 20
    """How often each model is attached to and detached from."""
    import_rounds: int = 10
    """Pairs of imports."""
    compiled: str = "timm/vit_base_patch16_224"
    """Model to compile, as library/name; it is called with one image."""
    backend: str = "inductor"
    """Of torch.compile."""
    compile_rounds: int = 1
    """How often it is compiled, dense and reduced."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 12288, 16384)
    """Tokens to match, an eighth of which is removed."""
    width: int = 768
    """Channels of a token."""
    budget: int = BUDGET
    """Similarities to hold at a time, to compare with no limit."""
    length_rounds: int = 3
    """Timed matchings of each length."""
    towers: tuple[TowerName, ...] = TowerOptions.towers
    """Towers whose memory is measured, as in `experiments.speed.towers`."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of their weights and computation."""
    batch: int = 1
    """Images or texts of their call."""
    seed: int = 0
    """Of tokens and weights."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Measure again what has a result file."""


# What each cost depends on.
SETTINGS: dict[Cost, tuple[str, ...]] = {
    "attach": ("models", "r", "attach_rounds", "seed"),
    "import": ("import_rounds",),
    "compile": ("compiled", "r", "backend", "compile_rounds", "seed"),
    "length": ("lengths", "width", "budget", "length_rounds", "seed"),
    "memory": ("towers", "dtypes", "batch"),
}


@dataclass(frozen=True)
class Run:
    """One line of the queue: one cost."""

    cost: Cost
    options: Options

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"costs/{self.cost}"

    @property
    def settings(self) -> Json:
        """The options that the cost depends on."""
        return {name: getattr(self.options, name) for name in SETTINGS[self.cost]}


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a cost, a model or a backend is not known.
    """
    check_names("costs", options.cost, COSTS)
    if "attach" in options.cost:
        for model in options.models:
            library_of(model)
    if "compile" in options.cost:
        library_of(options.compiled)
        check_names("backends", [options.backend], torch.compiler.list_backends(exclude_tags=()))
    return [Run(cost, options) for cost in options.cost]


def library_of(model: str) -> tuple[Any, str]:
    """Return the library of a model and the model's name there.

    Raises:
        ValueError: there is no such model.
    """
    library, _, name = model.partition("/")
    check_names("library of a model, as in library/name:", [library], ["timm", "open_clip"])
    module: Any = importlib.import_module(library)
    if name not in module.list_models():
        raise ValueError(f"unknown model {model!r}: see {library}.list_models()")
    return module, name


def make(model: str, seed: int) -> nn.Module:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    module, name = library_of(model)
    made: nn.Module = module.create_model(name)
    return made.eval()


def image_for(model: Any) -> Tensor:
    """Return an image of the size that a model wants."""
    if hasattr(model, "pretrained_cfg"):
        height, width = model.pretrained_cfg["input_size"][-2:]
    else:
        size = model.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(1, 3, height, width)


def spread(values: Sequence[float]) -> Json:
    """Return median, quartiles and the values themselves."""
    return {
        "median": round(statistics.median(values), 6),
        "quartiles": [round(value, 6) for value in quartiles(tuple(values))],
        "rounds": [round(value, 6) for value in values],
    }


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(clocks: dict[str, Clock], rounds: int) -> dict[str, list[float]]:
    """Return what each clock reads, round by round; the order turns around in every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for i in range(rounds):
        for name in list(clocks)[:: -1 if i % 2 else 1]:
            seconds[name].append(clocks[name]())
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, reference: str) -> Json:
    """Return by how much one takes longer than the other, round by round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[reference], strict=True)])


def in_child(code: str, *arguments: str, **variables: str) -> str:
    """Return the last line that a fresh interpreter prints for some code.

    Raises:
        RuntimeError: the code failed.
    """
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"a fresh interpreter failed:\n{child.stderr[-2000:]}")
    return child.stdout.splitlines()[-1]


def attaching(options: Options) -> list[Json]:
    """Time attaching to and detaching from each model."""
    rows = []
    for name in options.models:
        model = make(name, options.seed)
        crossget.attach(model, crossget.CrossGET(options.r)).detach()  # imports what it needs
        attach, detach = [], []
        for _ in range(options.attach_rounds):
            start = time.perf_counter()
            attached = crossget.attach(model, crossget.CrossGET(options.r))
            attach.append(time.perf_counter() - start)
            detach.append(timed(attached.detach))
        rows.append({"model": name, "attach": spread(attach), "detach": spread(detach)})
    return rows


IMPORTS = {"torch": "import torch", "torch, crossget": "import torch, crossget"}


def import_seconds(statement: str) -> float:
    """Return the seconds of an import in a fresh interpreter, whose own start is not counted."""
    return float(in_child(f"import time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"))


def importing(options: Options) -> list[Json]:
    """Time imports with and without crossget, in turns."""
    clocks: dict[str, Clock] = {name: functools.partial(import_seconds, code) for name, code in IMPORTS.items()}
    clocks["torch, crossget"]()  # writes bytecode, and reads the files into the system's cache
    seconds = alternate(clocks, options.import_rounds)
    return [{"import": name, "seconds": spread(seconds[name]), "ratio": ratios(seconds, name, "torch")}
            for name in IMPORTS]  # fmt: skip


FIRST_CALL = """
import json, sys
from experiments.speed import costs
print(json.dumps(costs.first_call(*json.loads(sys.argv[1]))))
"""


def first_call(model: str, r: int | None, backend: str, seed: int) -> tuple[float, int]:
    """Compile a model, attached unless r is None; return the seconds of its first call and the number of kernels."""
    metrics: Any = importlib.import_module("torch._inductor.metrics")
    built = make(model, seed)
    image = image_for(built)
    with torch.no_grad(), contextlib.nullcontext() if r is None else crossget.attach(built, crossget.CrossGET(r)):
        built(image)  # what any first call sets up is not the compiler's cost
        compiled = torch.compile(built, fullgraph=True, backend=backend)
        seconds = timed(lambda: compiled(image))
    return seconds, metrics.generated_kernel_count


def compiling(options: Options) -> list[Json]:
    """Compile the model, dense and reduced, in turns, each time in a fresh process with an empty cache."""
    kernels: dict[str, int] = {}

    def compile_once(name: str, r: int | None) -> float:
        arguments = json.dumps([options.compiled, r, options.backend, options.seed])
        with tempfile.TemporaryDirectory() as cache:
            cold = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
            seconds, kernels[name] = json.loads(in_child(FIRST_CALL, arguments, **cold))
        return float(seconds)

    methods = {DENSE: None, CROSSGET: options.r}
    clocks: dict[str, Clock] = {name: functools.partial(compile_once, name, r) for name, r in methods.items()}
    seconds = alternate(clocks, options.compile_rounds)
    return [{"method": name, "seconds": spread(seconds[name]), "ratio": ratios(seconds, name, DENSE),
             "kernels": kernels[name]} for name in methods]  # fmt: skip


def whole_bytes(tokens: int) -> int:
    """Return what a matching without a limit holds at a time: the similarities, and the bounds of a band of them."""
    return 4 * (tokens**2 + min(tokens**2, BAND))


def matching(options: Options) -> list[Json]:
    """Time the matching of one sequence of each length, within the budget and, where that fits, without a limit."""
    return [match(tokens, options) for tokens in options.lengths]


def match(tokens: int, options: Options) -> Json:
    """Time the matching of one sequence, of which the first token is protected."""
    generator = torch.Generator().manual_seed(options.seed)
    keys = torch.randn(1, tokens, options.width, generator=generator)
    protected = torch.arange(tokens)[None] == 0

    def pairs(budget: int) -> tuple[Tensor, Tensor]:
        return complete_graph(Candidates(keys, protected, 1, budget=budget), tokens // 8)

    budgets = {"budget": options.budget, "whole": UNLIMITED}
    if whole_bytes(tokens) >= WHOLE_BYTES:
        del budgets["whole"]
    runs = {name: functools.partial(pairs, budget) for name, budget in budgets.items()}
    with torch.no_grad():
        # First, since its calls also warm up.
        turns = {name: functools.partial(calling, run) for name, run in runs.items()}
        memory = {name: peak_memory(turn, keys.device) for name, turn in turns.items()}
        clocks: dict[str, Clock] = {name: functools.partial(timed, run) for name, run in runs.items()}
        seconds = alternate(clocks, options.length_rounds)
        chosen = [as_set(*run()) for run in runs.values()]
    same = len(chosen[0] & chosen[-1]) / len(chosen[0]) if "whole" in runs else None
    found = {name: {"seconds": spread(seconds[name]), "peak_memory": memory[name]} for name in runs}
    return {"tokens": tokens, "r": tokens // 8, "tiled": tokens**2 > options.budget, **found,
            "same": None if same is None else same == 1, "pairs_in_common": same}  # fmt: skip


def as_set(source: Tensor, destination: Tensor) -> set[tuple[int, int]]:
    """Return the pairs of a batch of one."""
    return set(zip(source[0].tolist(), destination[0].tolist(), strict=True))


def remembering(options: Options) -> list[Json]:
    """Measure the peak memory of a forward pass of each tower, dense and reduced.

    It does not depend on the machine in float32, and in bfloat16 by what its kernels copy.
    """
    return [remember(tower, dtype, options.batch) for tower in options.towers for dtype in options.dtypes]


def remember(tower: str, dtype: str, batch: int) -> Json:
    """Measure the peak memory of one tower, beyond weights and inputs."""
    setup, precision = SETUPS[tower], getattr(torch, dtype)
    forms = variants(setup, precision, "cpu")
    x = placed(setup.inputs(batch), "cpu", precision)
    with torch.no_grad():
        peaks = {
            name: peak_memory(functools.partial(calling, functools.partial(forms[name], x)), torch.device("cpu"))
            for name in (DENSE, CROSSGET, TOME)
        }
    return {"tower": tower, "dtype": dtype, "peak_memory": peaks}


MEASURES: dict[Cost, Callable[[Options], list[Json]]] = {
    "attach": attaching,
    "import": importing,
    "compile": compiling,
    "length": matching,
    "memory": remembering,
}


def execute(run: Run) -> Json:
    """Measure one cost."""
    return {"run": {"cost": run.cost, **run.settings}, "result": {"rows": MEASURES[run.cost](run.options)}}


def shown(found: Json, unit: float = 1.0, digits: int = 2) -> str:
    """Return median and quartiles, in a unit; one round has no quartiles."""
    median, low, high = (f"{value / unit:.{digits}f}" for value in [found["median"], *found["quartiles"]])
    return median if len(found["rounds"]) == 1 else f"{median} [{low}, {high}]"


def attach_cells(row: Json) -> list[str]:
    return [row["model"], *(shown(row[name], 1e-3, 3) for name in ("attach", "detach"))]


def import_cells(row: Json) -> list[str]:
    return [row["import"], shown(row["seconds"]), shown(row["ratio"], digits=3)]


def compile_cells(row: Json) -> list[str]:
    return [row["method"], shown(row["seconds"], digits=1), shown(row["ratio"]), str(row["kernels"])]


def length_cells(row: Json) -> list[str]:
    cells = [str(row["tokens"]), str(row["r"]), "yes" if row["tiled"] else "no"]
    for found in (row["budget"], row.get("whole")):
        cells += [shown(found["seconds"], 1e-3, 1), f"{found['peak_memory'] / 2**20:.1f}"] if found else ["", ""]
    same = row["pairs_in_common"]
    return [*cells, "" if same is None else "all" if row["same"] else f"{100 * same:.2f} %"]


def memory_cells(row: Json) -> list[str]:
    dense, *reduced = row["peak_memory"].values()
    return [row["tower"], row["dtype"], f"{dense / 2**20:.1f}", *(f"{peak / dense:.2f}" for peak in reduced)]


CELLS: dict[Cost, tuple[Callable[[Json], list[str]], list[str]]] = {
    "attach": (attach_cells, ["model", "attach ms", "detach ms"]),
    "import": (import_cells, ["import", "s", "ratio to torch"]),
    "compile": (compile_cells, ["method", "first call s", "ratio to dense", "kernels"]),
    "length": (length_cells, ["tokens", "r", "tiled", "ms", "peak MiB", "unlimited ms", "peak MiB", "pairs in common"]),
    "memory": (memory_cells, ["tower", "dtype", "dense, MiB", "CrossGET to dense", "ToMe-style to dense"]),
}


def heading(content: Json) -> str:
    """Return what one result's table shows, in a line."""
    run = content["run"]
    what = {
        "attach": "Attaching CrossGET with r = {r}, and detaching it; {attach_rounds} rounds",
        "import": "Importing in a fresh interpreter; {import_rounds} pairs",
        "compile": "First call of {compiled}, compiled by {backend}, CrossGET with r = {r}; {compile_rounds} rounds",
        "length": "Matching one sequence of {width} channels with a budget of {budget} similarities, and without a "
        "limit; {length_rounds} rounds",
        "memory": "Peak memory of a forward pass in eager mode, beyond weights and inputs, batch {batch}",
    }[run["cost"]].format(**run)
    spread = "" if run["cost"] == "memory" else "; median and quartiles"
    return f"{what}; {measured_on(content['environment'])}{spread}"


def table(content: Json) -> str:
    """Return one result as text."""
    cells, columns = CELLS[content["run"]["cost"]]
    rows = [cells(row) for row in content["result"]["rows"]]
    return f"{heading(content)}\n\n{markdown(rows, columns)}"


def tables(contents: Sequence[Json]) -> str:
    """Return several results as tables."""
    ordered = sorted(contents, key=lambda content: COSTS.index(content["run"]["cost"]))
    return "\n\n".join(table(content) for content in ordered)


STUDY = Study("speed-costs", Options, grid, lambda options: execute, lambda run: {"cost": (run.cost,)}, tables)
