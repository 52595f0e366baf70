"""Ways to call a model of transformers on two different images, audio clips or texts, found by the names of arguments.

Many are tried, since an argument such as `pixel_values` has another layout in every family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.demo.tiny_transformers import IMAGE, PATCH

BATCH = 2
ONE_AND_TWO, _TILES = "one and two images per text", "images of up to 4 tiles"
_GRID = IMAGE // PATCH  # patches in a row of a packed image
# Parts of a configuration, in the order in which numbers are looked up in them.
_PARTS = ("vision_config", "image_config", "audio_config", "vq_config", "encoder", "backbone_config", "text_config")
_METHODS = ("forward", "get_image_features", "get_audio_features")
_TEXT = ("input_ids", "attention_mask", "decoder_input_ids", "bbox")


@dataclass(frozen=True)
class Way:
    """A way to call a model.

    Attributes:
        method: such as "forward(pixel_values)".
        layout: such as "images", and the other arguments.
        call: calls it; every call has the same inputs and the same random numbers.
        arguments: of the call.
    """

    method: str
    layout: str
    call: Callable[[], Any]
    arguments: Mapping[str, Tensor]

    def __str__(self) -> str:
        return f"{self.method}: {self.layout}"


def ways(model: nn.Module) -> Iterator[Way]:
    """Ways to call a model which may succeed, the likely ones first.

    With images or audio first, also of a part of the model alone; then with texts.
    """
    yield from _calls(model, "", media=True)
    for name, part in model.named_modules():
        if name and hasattr(part, "main_input_name"):
            yield from _calls(part, f"{name}.", media=True)
    yield from _calls(model, "", media=False)


def ways_to_encode(model: nn.Module) -> Iterator[Way]:
    """Ways to call `get_image_features` on three images for two texts, one and two, of different sizes where it can."""
    numbers = _Numbers(getattr(model, "config", None), ((8, 8), (4, 8), (8, 4)))
    calls = _calls(model, "", media=True, numbers=numbers, methods=("get_image_features",))
    found = [way for way in calls if _TEXT[0] not in way.arguments]
    yield from sorted(found, key=lambda way: not way.layout.startswith((ONE_AND_TWO, _TILES)))


def _calls(
    model: nn.Module, prefix: str, *, media: bool, numbers: _Numbers | None = None, methods: Sequence[str] = _METHODS
) -> Iterator[Way]:
    numbers = numbers or _Numbers(getattr(model, "config", None))
    others = _companions(numbers)
    for name in methods:
        method = getattr(model, name, None)
        if method is None:
            continue
        parameters = inspect.signature(method).parameters
        required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        for main, layout, tensor, own in _layouts(parameters, numbers, media):
            seen = []
            if own and own.keys().isdisjoint(parameters):
                continue
            own = {key: value for key, value in own.items() if key in parameters}
            # Texts come second: with a text, a language model asks for placeholders of images in it.
            for extra in (required, [*required, *_TEXT], [*required, *others]):
                more = {key: others[key] for key in extra if key in parameters and key in others and key != main}
                arguments = {**more, main: tensor, **own}
                if set(required) <= arguments.keys() and arguments.keys() not in seen:
                    seen.append(arguments.keys())
                    beside = [key for key in arguments if key != main]
                    yield Way(
                        f"{prefix}{name}({main})", ", ".join([layout, *beside]), _call(method, arguments), arguments
                    )


def _call(method: Callable[..., Any], arguments: Mapping[str, Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.random.fork_rng(devices=[]):  # masked autoencoders draw their mask in the forward
            torch.manual_seed(0)
            return method(**arguments)

    return call


class _Numbers:
    """Numbers of a configuration and of its parts, by the first of several names that one of them has.

    Args:
        config: the configuration.
        grids: height and width of each packed image, in patches.
    """

    def __init__(self, config: Any, grids: Sequence[tuple[int, int]] = ((_GRID, _GRID),) * BATCH) -> None:
        self.config, self.batch = config, len(grids)
        self.grids = torch.tensor(grids)

    def __call__(self, *names: str, default: int) -> int:
        value = self._find(self.config, names)
        value = value[-1] if isinstance(value, list | tuple) and value else value
        return value if isinstance(value, int) and value > 0 else default

    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        value = self._find(self.config, ("image_size", "img_size", "input_image_size"))
        if isinstance(value, Mapping):
            return int(value.get("height", IMAGE)), int(value.get("width", IMAGE))
        if isinstance(value, list | tuple) and len(value) == 2:
            return int(value[0]), int(value[1])
        return (value, value) if isinstance(value, int) else (IMAGE, IMAGE)

    def _find(self, config: Any, names: tuple[str, ...]) -> Any:
        own = (getattr(config, name, None) for name in names)
        value = next((value for value in own if value is not None), None)
        if value is None and config is not None:
            known = [part for part in _PARTS if hasattr(config, part)]
            parts = [*known, *(key for key in vars(config) if key.endswith("_config") and key not in known)]
            inside = (
                self._find(getattr(config, part), names) for part in parts if hasattr(getattr(config, part), "to_dict")
            )
            value = next((value for value in inside if value is not None), None)
        return value


def _layouts(
    parameters: Mapping[str, inspect.Parameter], numbers: _Numbers, media: bool
) -> Iterator[tuple[str, str, Tensor, dict[str, Tensor]]]:
    """The argument that images, audio or texts are given in, its layout, the tensor, and what belongs to it.

    A layout is left out if the method takes none of the arguments that belong to it.
    """
    found = [name for name in _MEDIA if name in parameters]
    if "grid_thw" in parameters:
        found.append("hidden_states")
    if media:
        for name in found:
            for layout, tensor, own in _MEDIA[name](numbers) if name in _MEDIA else _packed(numbers):
                yield name, layout, tensor, own
    elif "input_ids" in parameters:
        yield "input_ids", "texts", _texts(numbers), {}
    elif not found:
        first = next((name for name in parameters if name not in ("args", "kwargs")), "")
        for layout, tensor in _unknown(numbers):
            yield first, layout, tensor, {}


Layouts = Iterator[tuple[str, Tensor, dict[str, Tensor]]]


def _images(numbers: _Numbers) -> Layouts:
    height, width = numbers.size()
    channels = numbers("num_channels", "in_channels", "in_chans", default=3)
    patch, frames = numbers("patch_size", default=PATCH), numbers("num_frames", "frames_per_clip", default=4)
    images, video = _random(numbers.batch, channels, height, width), _random(numbers.batch, frames, 3, height, width)
    yield "images", images, {}
    yield "one image per text", images[:, None], {}
    yield "one image per text", images[:, None], {"pixel_attention_mask": _ones(numbers.batch, 1, height, width).bool()}
    yield from _packed(numbers)
    yield "videos", video, {}
    shapes = numbers.grids * torch.tensor([height // patch, width // patch]) // _GRID
    patches = shapes.prod(1)
    real = torch.arange(int(patches.max())) < patches[:, None]
    flat = {"pixel_attention_mask": real.long(), "spatial_shapes": shapes}
    yield "patches [B, N, D]", _random(*real.shape, patch * patch * 3), flat
    tiles = numbers("max_num_tiles", default=4)
    aspect = {"aspect_ratio_ids": _ones(numbers.batch, 1), "aspect_ratio_mask": _ones(numbers.batch, 1, tiles)}
    yield "tiles", _random(numbers.batch, 1, tiles, 3, height, width), aspect
    sizes = {"target_sizes": numbers.grids}
    yield "a row of patches", _random(numbers.batch, 3, patch, patch * _GRID**2), sizes
    yield "grey images", images[:, :1], {}
    yield "two images per text", images[:, None].repeat(1, 2, 1, 1, 1), {}
    x, y = torch.arange(_GRID).repeat(_GRID), torch.arange(_GRID).repeat_interleave(_GRID)
    places = {"image_position_ids": torch.stack([x, y], 1).expand(numbers.batch, -1, -1)}
    yield "patches with places", _random(numbers.batch, _GRID**2, patch * patch * 3), places
    yield (
        "patches of a grid",
        _random(int(numbers.grids.prod(1).sum()), patch * patch * 3),
        {"image_grid_hw": numbers.grids},
    )
    yield "plain patches", _random(numbers.batch, _GRID**2, patch * patch * 3), {}
    sizes = {"image_sizes": torch.tensor([[height, 2 * width], [2 * height, width], [2 * height, 2 * width]])}
    if numbers.batch == len(sizes["image_sizes"]):
        yield _TILES, _random(numbers.batch, 5, channels, height, width), sizes
        rows = torch.stack([images[0], torch.zeros_like(images[0]), images[1], images[2]])
        rows = rows.view(2, 2, *images.shape[1:])
        yield ONE_AND_TWO, rows, {}
        yield ONE_AND_TWO, rows, {"pixel_attention_mask": torch.tensor([[True, False], [True, True]])}
        pools = torch.randint(_GRID**2, (14, 4), generator=_generator())
        pooled = {"image_token_pooling": pools, "image_grids": torch.tensor([[2, 4, 0, 0], [2, 2, 0, 0], [1, 2, 0, 0]])}
        yield "plain patches", _random(numbers.batch, _GRID**2, patch * patch * 3), pooled
        packed = int(numbers.grids.prod(1).sum())
        yield "one row of all patches", _random(1, 3, patch, patch * packed), {"target_sizes": numbers.grids}


def _packed(numbers: _Numbers) -> Layouts:
    """All patches of the batch in one sequence [N, D], cut by a grid (time, height, width) for each image."""
    patch = numbers("patch_size", default=PATCH)
    frames = numbers("temporal_patch_size", default=2)
    grid = F.pad(numbers.grids, (1, 0), value=1)
    own = {"image_grid_thw": grid, "grid_thw": grid, "merge_sizes": torch.tensor([2] * numbers.batch)}
    own["image_merge_sizes"] = own["merge_sizes"]
    count = int(numbers.grids.prod(1).sum())
    yield "packed patches, with time", _random(count, 3 * frames * patch * patch), own
    yield "packed patches", _random(count, 3 * patch * patch), own
    yield "packed patches [N, 3, P, P]", _random(count, 3, patch, patch), own


def _videos(numbers: _Numbers) -> Layouts:
    yield "videos", _random(numbers.batch, numbers("num_frames", "frames_per_clip", default=4), 3, *numbers.size()), {}


def _audio(numbers: _Numbers) -> Layouts:
    mel = numbers("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", default=80)
    length, longest = numbers("max_source_positions", default=64), numbers("max_length", default=128)
    for layout, shape in (
        ("[B, mel, time]", (mel, 2 * length)),
        ("[B, time, mel]", (longest, mel)),
        ("waves", (8000,)),
        ("[B, 128, mel]", (128, mel)),
        ("[B, 1, 1001, mel]", (1, 1001, mel)),
        ("[B, mel, 3000]", (mel, 3000)),
        ("waves with a channel", (1, 8000)),
        ("[B, 128, 160]", (128, 160)),
    ):
        sound = _random(numbers.batch, *shape)
        yield layout, sound, {}
        for axis in range(1, min(sound.ndim, 3)):
            yield f"{layout}, mask of axis {axis}", sound, {"attention_mask": _ones(numbers.batch, sound.shape[axis])}


def _flattened(numbers: _Numbers) -> Layouts:
    # The first two columns are row and column of a patch, from 1.
    rows = torch.arange(_GRID).repeat_interleave(_GRID) + 1.0
    places = torch.stack([rows, torch.arange(_GRID).repeat(_GRID) + 1.0], 1).expand(numbers.batch, -1, -1)
    for patch in (16, numbers("patch_size", default=PATCH)):
        yield "flattened", torch.cat([places, _random(numbers.batch, _GRID**2, patch * patch * 3)], 2), {}


def _unknown(numbers: _Numbers) -> Iterator[tuple[str, Tensor]]:
    height, width = numbers.size()
    yield "images", _random(numbers.batch, numbers("num_channels", "in_channels", default=3), height, width)
    yield "tokens", _random(numbers.batch, 24, numbers("hidden_size", "d_model", default=64))


# What is given in an argument: the layouts in which families take it.
_MEDIA: dict[str, Callable[[_Numbers], Layouts]] = {
    "pixel_values": _images,
    "pixel_values_images": _images,
    "pixel_values_videos": _videos,
    "input_features": _audio,
    "input_values": _audio,
    "flattened_patches": _flattened,
}


def _companions(numbers: _Numbers) -> dict[str, Tensor]:
    """Arguments that are given beside images, audio or texts, by their names."""
    ids = _texts(numbers)
    height, width = numbers.size()
    frames = numbers("num_frames", default=4)
    boxes = torch.randint(0, 50, (*ids.shape, 4), generator=_generator()).sort(-1).values  # left, top, right, bottom
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids,
        "bbox": boxes,
        "qformer_input_ids": ids,
        "image": _random(numbers.batch, 3, 224, 224),
        "image_sizes": numbers.grids * torch.tensor([height, width]) // _GRID,
        "visual_feats": _random(numbers.batch, 12, numbers("visual_feat_dim", default=64)),
        "visual_pos": _random(numbers.batch, 12, 4).sigmoid(),
        "prompt_pixel_values": _random(numbers.batch, 3, height, width),
        "prompt_masks": _random(numbers.batch, 3, height, width),
        "pixel_values": _random(numbers.batch, frames, 3, height, width),
        "audio_values": _random(numbers.batch, 1, 64, 128),
        "high_res_pixel_values": _random(numbers.batch, 3, height, width),
        "is_longer": torch.zeros(numbers.batch, 1, dtype=torch.bool),
    }


def _texts(numbers: _Numbers) -> Tensor:
    length = min(24, numbers("max_position_embeddings", default=24))
    return torch.randint(3, 50, (numbers.batch, length), generator=_generator())


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
