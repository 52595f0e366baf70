"""The rows of the CoOp table: what is attached, where the prompts come from, whether they are trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from crossget import CrossGET, ToMe
from crossget.methods.reducers import Reducer
from experiments.lib.training import Recipe

Reducers = Mapping[str, Reducer]
R = int | tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        label: how tables call it.
        make: the towers' reducers, from r; None leaves the model alone.
        prompts: "template": the hand-written ones; "noise": random ones; "coop": those that the row `coop` has learnt.
        trained: whether prompts and cross tokens are trained.
        share, alignment: weights of the losses, see `task.CoopTask`.
        swept: whether r matters.
    """

    label: str
    make: Callable[[R], Reducers | None]
    prompts: Literal["template", "noise", "coop"] = "coop"
    trained: bool = True
    share: float = 0.5
    alignment: float = 10.0
    swept: bool = True


def _dense(r: R) -> Reducers | None:
    return None


def _tome(r: R) -> Reducers:
    return {"visual": ToMe(r)}


def _crossget(r: R) -> Reducers:
    return {"visual": CrossGET(r), "text": CrossGET(0)}


PRESETS: dict[str, Preset] = {
    "zero_shot": Preset("dense, hand-written prompts", _dense, prompts="template", trained=False, swept=False),
    "coop": Preset("dense, CoOp", _dense, prompts="noise", share=1.0, swept=False),
    "coop_control": Preset("dense, CoOp, trained on (the control)", _dense, swept=False),
    "tome": Preset("ToMe", _tome),
    "crossget": Preset("CrossGET", _crossget),
    "tome_untrained": Preset("ToMe, not trained", _tome, trained=False),
    "crossget_untrained": Preset("CrossGET, not trained", _crossget, trained=False),
}


@dataclass(frozen=True)
class Setting:
    """A model and its recipes.

    Attributes:
        title: how reports call it.
        model: see `experiments.retrieval.models.load_clip`.
        base: recipe of the row `coop`.
        recipe: of the rows that go on from it.
        r: tokens removed per block of the image tower, by the rounded % of multiply-adds that are left with CrossGET.
        counted: what these % are of.
        seeds: of the photographs drawn, of random prompts, and of order and augmentation.
        crop: smallest crop in training, as a share of the area.
        changes: by data set, what is different in both recipes.
    """

    title: str
    model: str
    base: Recipe
    recipe: Recipe
    r: Mapping[int, R]
    counted: str
    seeds: tuple[int, ...]
    crop: float = 0.08
    changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


# CoOp's recipe, then the reference's. Both have Dassl's weight decay. The batch is that of the configuration; the
# reference's script starts eight processes, on eight GPUs `--batch 256` does the same.
COOP = Recipe(
    epochs=200, batch=32, lr=0.002, weight_decay=5e-4, optimizer="sgd", schedule="cosine_by_epoch", warmup=1.0,
    warmup_lr=1e-5, precision="fp16",
)  # fmt: skip
REFERENCE = replace(COOP, lr=0.05)

# Encoding a hundred prompts costs more than a batch of small photographs: few, small steps are what two cores afford.
_SMALL = Recipe(epochs=4, batch=32, lr=0.05, weight_decay=5e-4, optimizer="sgd")

SETTINGS = {
    "reference": Setting(
        "CLIP ViT-B/16",
        "ViT-B-16-quickgelu:openai",
        COOP,
        REFERENCE,
        r={80: 8, 69: 12, 58: 16},
        counted="one photograph with one prompt",
        seeds=(1, 2, 3),
        # EuroSAT's ten classes are too few for a larger batch on eight GPUs.
        changes={"imagenet": {"epochs": 50, "lr": 0.02}, "eurosat": {"batch": 16}},
    ),
    "caltech101_small": Setting(
        "small CLIP (ViT-Tiny, 112 px)",
        "small",
        replace(_SMALL, epochs=10),
        _SMALL,
        r={80: (2, 2, 2, 2, 2, 1) * 2, 69: (3, 3, 3, 2) * 3, 58: (4, 4, 3) * 4},
        counted="one photograph (the prompts are encoded once for all)",
        seeds=(0, 1, 2),
        crop=0.5,
    ),
}


def recipe_of(setting: Setting, dataset: str, preset: Preset) -> Recipe:
    """Return the recipe that a row is trained by."""
    changes: dict[str, float] = dict(setting.changes.get(dataset, {}))
    if preset.prompts != "noise":
        return replace(setting.recipe, **changes)  # type: ignore[arg-type]
    changes.pop("lr", None)  # CoOp's own is the same on all sets
    return replace(setting.base, **changes)  # type: ignore[arg-type]
