"""Time the choices behind the reducer's speed, operator by operator.

Each choice is timed beside what it was chosen over, in turns, on the tokens of ViT-B/16's first block.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import crossget
from crossget.measure.speed import calling, quartiles, take_turns
from crossget.methods.indexing import take
from crossget.methods.pairs import bound_of, symmetric
from crossget.methods.reducers import Reducer, TowerFacts, View
from experiments.lib.files import Json, short_name
from experiments.lib.study import Study
from experiments.lib.tables import markdown

RESULTS = Path(__file__).parent / "results"
HEADS, REMOVED = 12, 16
STEP = "all: CrossGET's step instead of ToMe-style's"


@dataclass(frozen=True)
class Options:
    """What to time."""

    batch: int = 8
    """Images."""
    tokens: int = 198
    """Of an image, the cross token among them."""
    width: int = 768
    """Channels of a token."""
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("float32", "bfloat16")
    """Of tokens, keys and queries."""
    rounds: int = 31
    """Timed turns of each."""
    flex: bool = True
    """FlexAttention too, which has to be compiled: with torch 2.6 or newer and a C++ compiler."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""
    overwrite: bool = False
    """Run again what has a result file."""


@dataclass(frozen=True)
class Run:
    """One line of the queue."""

    batch: int
    tokens: int
    width: int
    dtype: str
    rounds: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        return f"operators/{self.dtype}_batch{self.batch}"


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def pairs(run: Run, flex: bool = False) -> dict[str, Pair]:
    """Return by choice: what was chosen, and what it was chosen over; with FlexAttention if `flex`."""
    dtype, generator = getattr(torch, run.dtype), torch.Generator().manual_seed(0)
    batch, tokens, width = run.batch, run.tokens, run.width
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
    qkv = torch.randn(batch, tokens, 3, HEADS, width // HEADS, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    keys = k.transpose(1, 2).flatten(2)
    wide, half = keys.float(), keys.bfloat16()
    similarity = wide @ wide.transpose(1, 2)
    inverse_norms = torch.linalg.vector_norm(wide, dim=-1).reciprocal()
    priority = torch.rand(batch, tokens, generator=generator)
    rank = torch.rand(batch, tokens, generator=generator).argsort(1).float()
    kept = torch.rand(batch, tokens, generator=generator).argsort(1)[:, REMOVED:].sort(1).values
    bias = torch.rand(batch, 1, 1, tokens, generator=generator).to(dtype)
    scale = (width // HEADS) ** -0.5
    # Eight more channels, as kernels want them: one carries the bias, the others nothing.
    extra = torch.cat([bias.transpose(2, 3).expand(-1, HEADS, -1, 1), torch.zeros_like(k[..., :7])], -1)
    wide_k, wide_q = torch.cat([k, extra], -1), torch.cat([q, torch.full_like(q[..., :8], 1 / scale)], -1)

    def masked() -> Any:
        return similarity.masked_fill(rank[:, None, :] <= rank[:, :, None], -torch.inf).amax(-1)

    def bounded() -> Any:
        return torch.minimum(similarity, bound_of(rank, rank)).amax(-1)

    attended = {"sizes: a mask instead of FlexAttention": flexible(q, k, v, bias)} if flex else {}
    return {
        "rank: minimum instead of a mask": (bounded, masked),
        "norms: scale the products instead of the keys": (
            lambda: similarity * (inverse_norms[:, :, None] * inverse_norms[:, None, :]),
            lambda: wide * inverse_norms[:, :, None],
        ),
        "norms: of the keys instead of the products' diagonal": (
            lambda: torch.linalg.vector_norm(wide, dim=-1).reciprocal(),
            lambda: similarity.flatten(1)[:, :: tokens + 1].rsqrt(),
        ),
        "sources: a sort instead of a top-k": (
            lambda: priority.argsort(1)[:, :REMOVED],
            lambda: priority.topk(REMOVED, 1, largest=False).indices,
        ),
        "rows: copied whole instead of gathered": (
            lambda: take(x, kept),
            lambda: x.gather(1, kept[:, :, None].expand(-1, -1, width)),
        ),
        "sizes: a mask instead of wider heads": (
            lambda: F.scaled_dot_product_attention(q, k, v, bias),
            lambda: F.scaled_dot_product_attention(wide_q, wide_k, v, scale=scale),
        ),
        "sizes: a mask instead of none": (
            lambda: F.scaled_dot_product_attention(q, k, v, bias),
            lambda: F.scaled_dot_product_attention(q, k, v),
        ),
        **attended,
        "product of keys: all instead of 3/4, the rest copied": (
            lambda: torch.bmm(wide, wide.transpose(1, 2)),
            lambda: symmetric(wide),
        ),
        "product of keys: float32 instead of bfloat16": (
            lambda: torch.bmm(wide, wide.transpose(1, 2)),
            lambda: torch.bmm(half, half.transpose(1, 2)),
        ),
        STEP: (
            partial(reduce, crossget.CrossGET(REMOVED), x, q, k),
            partial(reduce, crossget.ToMe(REMOVED), x, q, k),
        ),
    }


def flexible(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Pair:
    """Return attention with a bias [B, 1, 1, T] on the keys, as a mask and by FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    sizes = bias[:, 0, 0]

    def add(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + sizes[image, key]

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(F.scaled_dot_product_attention, q, k, v, bias), partial(compiled, q, k, v, score_mod=add)


def reduce(reducer: Reducer, x: Tensor, q: Tensor, k: Tensor) -> Any:
    """Make one step of a reducer, from what an attention has compared to fewer tokens."""
    tokens = int(x.shape[1])
    place = torch.arange(tokens)
    protected = ((place == 0) | (place == tokens - 1)).expand(len(x), tokens)
    view = View(x, q, k, None, torch.ones(len(x), tokens), protected, 2, None, tokens - 1)
    return reducer.resolved(TowerFacts("a tower")).reduce(view, REMOVED)


class Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def execute(run: Run, flex: bool = False) -> Json:
    """Time every pair."""
    # As a model's forward has left it: before, the allocator gives every block of this size back to the system.
    torch.empty(7 << 20).fill_(0)
    rows, made = [], pairs(run, flex)
    with torch.no_grad():
        for name, (chosen, other) in made.items():
            turns = {"chosen": partial(calling, chosen), "other": partial(calling, other)}
            seconds = take_turns(turns, torch.device("cpu"), run.rounds, warmup=2)
            rows.append({
                "choice": name,
                **{side: statistics.median(values) for side, values in seconds.items()},
                **{f"{side}_quartiles": quartiles(tuple(values)) for side, values in seconds.items()},
            })  # fmt: skip
        with Count() as counted:
            made[STEP][0]()
    return {"run": asdict(run), "result": {"rows": rows, "operators": counted.operators}}


COLUMNS = ["instead of", "processor", "batch", "dtype", "chosen, ms", "other, ms"]


def table(contents: Sequence[Json]) -> str:
    """Return results as one table."""
    rows = [
        [
            row["choice"],
            short_name(content["environment"]),
            content["run"]["batch"],
            content["run"]["dtype"],
            *(_ms(row, side) for side in ("chosen", "other")),
        ]
        for content in contents
        for row in content["result"]["rows"]
    ]
    return markdown(rows, COLUMNS, 2)


def _ms(row: Json, side: str) -> str:
    low, high = (1e3 * value for value in row[f"{side}_quartiles"])
    return f"{1e3 * row[side]:.2f} [{low:.2f}, {high:.2f}]"


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for."""
    return [Run(options.batch, options.tokens, options.width, dtype, options.rounds) for dtype in options.dtype]


STUDY = Study(
    "speed-operators", Options, grid, lambda options: partial(execute, flex=options.flex),
    lambda run: {"dtype": (run.dtype,)}, table,
)  # fmt: skip
