"""Measure every row of the ablation without training."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.methods.reducers import Reducer
from experiments.ablation.presets import PRESETS, REDUCTIONS
from experiments.ablation.settings import Images, Measuring
from experiments.lib.files import Json, check_names, pack
from experiments.lib.study import Study

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One line of the queue: a row of `presets.PRESETS` at one r."""

    setting: str
    preset: str
    r: int
    seed: int

    @property
    def slug(self) -> str:
        """The result file's name."""
        seed = f"_seed{self.seed}" if PRESETS[self.preset].seeded else ""
        r = f"_r{self.r}" if PRESETS[self.preset].swept else ""
        return f"{self.setting}/{self.preset}{r}{seed}"


@dataclass(frozen=True)
class Options(Measuring):
    """What to measure, and on which images."""

    presets: tuple[str, ...] = tuple(PRESETS)
    """Rows to run."""
    r: tuple[int, ...] = REDUCTIONS
    """Tokens removed per block."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the rows in which chance takes part; the others use the first."""
    results: Path = field(default=RESULTS)
    """Where the result files go."""


def grid(options: Options) -> list[Run]:
    """Return all runs that the options ask for.

    Raises:
        ValueError: a preset does not exist.
    """
    check_names("presets", options.presets, PRESETS)
    # Seeds outermost: a program stopped early has seen every row once.
    return [
        Run(options.setting, name, r, seed)
        for seed in options.seeds
        for name in options.presets
        if PRESETS[name].seeded or seed == options.seeds[0]
        for r in (options.r if PRESETS[name].swept else (0,))
    ]


def described(reducer: Reducer | None) -> Json | None:
    """Return a reducer for a result file."""
    return None if reducer is None else {"name": type(reducer).__name__, **asdict(reducer)}


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, batch: int, device: str) -> Tensor:
    """Return the logits [N, classes] of all images, on the CPU."""
    return torch.cat([model(images.to(device)).float().cpu() for images in pixels.split(batch)])


def measure(logits: Tensor, labels: Tensor, dense: Tensor) -> Json:
    """Return how well logits predict the labels, and how near they are to the dense model's.

    Args:
        logits: [N, classes].
        labels: [N].
        dense: [N, classes] of the untouched model.

    Returns:
        `top1` in %, `n`, `correct` (a string of 0 and 1, in the images' order), `agreement` (% of images with the
        dense model's answer), `loss` (cross-entropy), `divergence` (KL from the dense model's distribution, which shows
        small differences that the number of right answers does not) and `divergences`, image by image, packed.
    """
    answer = logits.argmax(1)
    correct = (answer == labels).tolist()
    divergence = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="none").sum(1)
    return {
        "top1": round(100 * sum(correct) / len(correct), 4),
        "n": len(correct),
        "agreement": round(100 * float((answer == dense.argmax(1)).double().mean()), 4),
        "loss": round(float(F.cross_entropy(logits, labels)), 6),
        "divergence": round(float(divergence.mean()), 6),
        "correct": "".join("1" if right else "0" for right in correct),
        "divergences": pack(divergence.numpy()),
    }


def evaluate(
    model: nn.Module, images: Images, reducer: Reducer | None, dense: Tensor, batch: int = 50, device: str = "cpu"
) -> Json:
    """Attach the reducer, classify all images, count, and detach.

    Args:
        model: one tower, untouched.
        images: what to classify.
        reducer: None measures the untouched model.
        dense: [N, classes] the untouched model's logits.
        batch: images per forward.
        device: where the model is.

    Returns:
        See `score`.
    """
    if reducer is None:
        return score(model, None, images, dense, batch, device)
    with crossget.attach(model, reducer) as attached:
        return score(model, attached, images, dense, batch, device)


def score(
    model: nn.Module,
    attached: crossget.Attachment | None,
    images: Images,
    dense: Tensor,
    batch: int = 50,
    device: str = "cpu",
) -> Json:
    """Classify all images with the model as it is, attached or not, and count.

    Returns:
        `measure`'s entries, `resolved` (the reducer with the host's values in place of None), `tokens` entering each
        block, and `gflops` of one image, dense and reduced.
    """
    logits = predict(model, images.pixels, batch, device)
    return {**measure(logits, images.labels, dense), **cost(model, attached, images.pixels[:1].to(device))}


def cost(model: nn.Module, attached: crossget.Attachment | None, one: Tensor) -> Json:
    """Return what is attached, the tokens entering each block, and multiply-adds of one image / 10^9."""
    if attached is None:
        # The tokens of a model without a reducer are those of a reducer that removes none.
        with crossget.attach(model, crossget.ToMe(0)) as nothing:
            return cost(model, nothing, one)
    flops = crossget.count_flops(model, one)
    ((tower, tokens),) = attached.tokens.items()
    gflops = {"dense": flops.dense.total / 1e9, "reduced": flops.total / 1e9}
    return {"resolved": asdict(attached.reducers[tower]), "tokens": tokens, "gflops": gflops}


def load(options: Options) -> Callable[[Run], Json]:
    """Return the function that measures one run."""
    model, images = options.load()
    dense = predict(model, images.pixels, options.batch, options.device)
    given = options.given(images)

    def measured(run: Run) -> Json:
        reducer = PRESETS[run.preset].make(run.r, run.seed)
        config = {**asdict(run), "reducer": described(reducer), **given}
        return {"run": config, "result": evaluate(model, images, reducer, dense, options.batch, options.device)}

    return measured


STUDY = Study(
    "ablation", Options, grid, load, lambda run: {"presets": (run.preset,), "r": (run.r,), "seeds": (run.seed,)}
)
