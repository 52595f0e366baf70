"""The rows of the retrieval table: what is attached, what is trained, for how long. All start at one dense model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from crossget import CrossGET, ToMe
from crossget.methods.alignment import Divergence
from crossget.methods.reducers import Reducer
from experiments.lib.training import Recipe

Reducers = Mapping[str, Reducer]
FULL = CrossGET(r=0)


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        label: how tables and legends call it.
        make: the towers' reducers, from the tokens that are removed per block of the image and the text tower; None
            leaves the model alone.
        train: what is trained; None: nothing, the dense model's weights are used as they are.
        weight, divergence: of the alignment loss.
        swept: whether r matters.
    """

    label: str
    make: Callable[[int, int], Reducers | None]
    train: Literal["all", "cross_tokens"] | None = "all"
    weight: float = 0.5
    divergence: Divergence = "reference"
    swept: bool = True


def vision(method: Reducer) -> Callable[[int, int], Reducers]:
    """Reduce the image tower; the text tower has its cross tokens, if the method has any."""

    def make(r: int, r_text: int) -> Reducers:
        guided = isinstance(method, CrossGET) and method.cross_token is not False
        return {"visual": replace(method, r=r), **({"text": replace(method, r=0)} if guided else {})}

    return make


def part(label: str, **fields: object) -> Preset:
    """Return CrossGET in the image tower with some of its parts exchanged."""
    return Preset(label, vision(replace(FULL, **fields)))  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = {
    "dense": Preset("dense", lambda r, r_text: None, train=None, swept=False),
    "control": Preset("dense, trained on (the control)", lambda r, r_text: None, swept=False),
    "tome": Preset("ToMe", vision(ToMe(r=0))),
    "crossget": Preset("CrossGET, image tower", vision(FULL)),
    "tome_untrained": Preset("ToMe, not trained", vision(ToMe(r=0)), train=None),
    "crossget_untrained": Preset("CrossGET, not trained", vision(FULL), train=None),
    "cross_tokens": Preset("CrossGET, cross tokens trained alone", vision(FULL), train="cross_tokens"),
    "text": Preset("CrossGET, text tower", lambda r, r_text: {"visual": FULL, "text": replace(FULL, r=r_text)}),
    "both": Preset(
        "CrossGET, both towers", lambda r, r_text: {"visual": replace(FULL, r=r), "text": replace(FULL, r=r_text)}
    ),
    "bipartite": part("matching: bipartite", matching="bipartite"),
    "size": part("ensemble: size", ensemble="size"),
    "unguided": part("guided matching: off", guided_matching=False),
    "no_cross_token": part("cross token: off", cross_token=False, importance="class_token"),
    "no_alignment": Preset("alignment loss: off", vision(FULL), weight=0.0),
    "jensen_shannon": Preset("alignment loss: Jensen-Shannon", vision(FULL), divergence="jensen_shannon"),
}

# CrossGET with one part taken away.
PARTS = ("bipartite", "size", "unguided", "no_cross_token", "no_alignment", "jensen_shannon")
# What is run first when time is short.
FIRST = ("dense", "control", "tome", "crossget")


@dataclass(frozen=True)
class Setting:
    """A model and its data, with the recipe that its rows are trained by.

    Attributes:
        title: how reports call it.
        model: see `models.load_clip`.
        recipe: of every row that is trained.
        captions: see `data.Pairs`.
        r: by tokens removed per block of the image tower, those of the text tower.
        pretrain: recipe and initial weights of the dense model, where we train it ourselves.
    """

    title: str
    model: str
    recipe: Recipe
    captions: Literal["all", "one"]
    r: Mapping[int, int] = field(default_factory=lambda: {16: 6})
    pretrain: Recipe | None = None


# As in the reference, whose batch is 64 on each of 8 GPUs.
REFERENCE = Recipe(epochs=12, batch=512, lr=1e-5, weight_decay=0.05, schedule="cosine_by_epoch", precision="fp16")

SETTINGS = {
    "flickr30k": Setting("CLIP ViT-B/16, Flickr30k", "ViT-B-16-quickgelu:openai", REFERENCE, "all"),
    "coco": Setting("CLIP ViT-B/16, COCO", "ViT-B-16-quickgelu:openai", REFERENCE, "all"),
    "flickr8k": Setting(
        "small CLIP (ViT-Tiny, 112 px), Flickr8k",
        "small",
        Recipe(
            epochs=2, batch=128, lr=2e-4, weight_decay=0.05, warmup=0.1, clip=1.0,
            lr_factors={"model.visual.trunk": 0.5},
        ),
        "one",
        r={4: 2, 3: 2, 2: 1},
        pretrain=Recipe(
            epochs=16, batch=128, lr=1e-3, weight_decay=0.1, warmup=1.0, clip=1.0,
            lr_factors={"model.visual.trunk": 0.1},
        ),
    ),
}  # fmt: skip
