"""`crossget show --keep`: which features of an image stay behind the connector, drawn on the image, as a picture.

The model is one of transformers that generates text from images, with its processor. One forward of each method on the
photograph and a question tells which features it merges or drops.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossget.core.attach import attach, find_connector
from crossget.core.connector import NAME, ReducedUnit
from crossget.demo import figures
from crossget.demo.compare import Photograph, load_photograph
from crossget.demo.outputs import PICTURE, check_output, save_figure
from crossget.demo.viewer import ABOUT, METHODS, NAMES
from crossget.methods.reducers import Reducer, TopK
from crossget.methods.schedules import Keep

QUESTION = "Describe the image."
MAX_UNITS = 4  # in the picture


@dataclass(frozen=True)
class ConnectorOptions:
    """Options of `crossget show --keep`.

    Attributes:
        image: a file, or the name of a photograph of scikit-image; None is the first of these.
        model: a folder with a model and its processor, or their id on the Hugging Face hub.
        keep: the features that stay.
        methods: names from `crossget.demo.viewer.METHODS`, one below the other.
        question: about the image.
        png: the picture to write, *.png, *.svg or *.pdf. A file that no command wrote is not replaced.
        device: where the model runs.
    """

    image: Path | None
    model: str
    keep: Keep
    methods: Sequence[str] = ("ward", "topk")
    question: str = QUESTION
    png: Path = Path("crossget_show.png")
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods {' '.join(self.methods)}: give each of {', '.join(METHODS)} once at most")
        check_output("--png", self.png, PICTURE)


@dataclass
class ConnectorView:
    """The units of one image, reduced by each method.

    Attributes:
        options: of the command.
        photograph: the input.
        pictures: [H, W, 3] in 0 to 1, what each unit (image or tile) shows.
        units: per method, the units after the reduction.
    """

    options: ConnectorOptions
    photograph: Photograph
    pictures: list[Tensor]
    units: dict[str, list[ReducedUnit]]

    def picture(self) -> Any:
        """A matplotlib figure: a row of each method, a column of each unit."""
        rows = [self._row(name, units[:MAX_UNITS]) for name, units in self.units.items()]
        before = figures.Panel(self.pictures[0], "as the model sees it")
        rows = [(title, [before, *panels]) for title, panels in rows]
        footer = [
            "Features of one colour and outline are merged into one. Dark ones are dropped; the others stay.",
            f"Question: {self.options.question}",
        ]
        count = len(next(iter(self.units.values())))
        if count > MAX_UNITS:
            footer.append(f"The first {MAX_UNITS} of {count} tiles.")
        if self.photograph.credit:
            footer.append(f"Photograph: {self.photograph.name}, {self.photograph.credit}")
        title = f"{Path(self.options.model).name}, {self.options.keep} behind the connector"
        return figures.draw_rows(title, "What the language model gets of the image.", rows, footer)

    def _row(self, name: str, units: Sequence[ReducedUnit]) -> tuple[str, list[figures.Panel]]:
        panels = []
        for picture, unit in zip(self.pictures, units, strict=False):
            groups = figures.follow_groups([unit.source.cpu()])[1]
            colours = figures.colour_groups(groups[None], _grid(unit))
            caption = f"{len(unit.source)} features, {len(unit.kept)} after"
            drawn = figures.group_map(picture, groups, colours, _grid(unit))
            panels.append(figures.Panel(drawn, caption, figures.colour_of(NAMES[name])))
        return f"{NAMES[name]}: {ABOUT[name]}", panels


def _grid(unit: ReducedUnit) -> tuple[int, int]:
    """The grid of a unit.

    Raises:
        ValueError: it is not known.
    """
    if unit.grid is None:
        raise ValueError(
            f"a unit of {len(unit.source)} image features lies on no known grid, as with newlines among them: it "
            "cannot be drawn"
        )
    return unit.grid


def run(options: ConnectorOptions, log: Callable[[str], None] = print) -> ConnectorView:
    """Run all methods on the photograph, and write the picture.

    Args:
        options: of the command.
        log: called with lines for the user.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: the request cannot be carried out; the message says why.
    """
    figures.require_matplotlib()
    photograph = load_photograph(options.image)
    transformers: Any = importlib.import_module("transformers")
    log(f"loading {options.model}")
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, torch_dtype="auto")
    model = model.to(options.device).eval()
    scored = not isinstance(find_connector(model).scored, str)
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    inputs = processor(images=[photograph.image], text=[_prompt(processor, options.question)], return_tensors="pt").to(
        options.device
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    units = {name: _units(model, inputs, _reducer(name, options.keep, scored)) for name in options.methods}
    pictures = _pictures(processor, inputs, photograph, len(units[options.methods[0]]))
    view = ConnectorView(options, photograph, pictures, units)
    save_figure(view.picture(), options.png)
    return view


def _reducer(name: str, keep: Keep, scored: bool) -> Reducer:
    """The method; TopK by the tower's attention, where that is known."""
    make: Callable[[Any], Reducer] = METHODS[name]
    if name == "topk":
        make = partial(TopK, importance="tower_attention" if scored else "attention")
    return make(keep)


def _prompt(processor: Any, question: str) -> str:
    """The question about an image, in the form of the model's chats if there is one."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    if getattr(processor, "chat_template", None):
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    return f"{processor.image_token}\n{question}"


@torch.no_grad()
def _units(model: Any, inputs: Mapping[str, Tensor], reducer: Reducer) -> list[ReducedUnit]:
    with attach(model, {NAME: reducer}) as attached:
        model(**inputs)
        place: Any = attached.connector
        return list(place.last_record.units)


def _pictures(processor: Any, inputs: Mapping[str, Tensor], photograph: Photograph, count: int) -> list[Tensor]:
    """[H, W, 3] what each of so many units shows."""
    pixels = inputs["pixel_values"]
    if pixels.dim() >= 4 and pixels.shape[-3] == 3:
        pixels = pixels.flatten(0, -4)
        if len(pixels) == count:
            images = processor.image_processor
            mean, std = (torch.tensor(getattr(images, f"image_{name}")).view(3, 1, 1) for name in ("mean", "std"))
            return list((pixels.float().cpu() * std + mean).permute(0, 2, 3, 1).clamp(0, 1))
    if count == 1:  # packed patches of the whole image
        whole = photograph.image.convert("RGB")
        values = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
        return [values.view(whole.height, whole.width, 3) / 255]
    raise ValueError(f"which part of the image each of the {count} units shows is not known: they cannot be drawn")
