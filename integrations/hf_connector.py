"""transformers: the connector of a model of images and text, by one rule for all families.

A model follows the rule if its `forward` takes `mm_encoder_outputs` (transformers 5.18 and newer): what
`get_image_features` returns, in the order of the placeholders of the prompt.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from crossget.core.adapters import RECOGNISED_KERNELS, Prefilled, Stages
from crossget.core.attach import find_attachment
from crossget.core.connector import AttachedConnector, Connector
from crossget.core.connector_prompts import Encoded, read_features
from crossget.core.tower_attention import ScoredTower
from crossget.integrations import hf
from crossget.integrations._support import ValuesOnCPU

FIRST_VERSION = "5.18"
# What the rule does not tell, by the model_type of a configuration.
_UNITS = dict.fromkeys(("granite_docling", "idefics2", "idefics3", "smolvlm"), "run")  # an entry has a row's tiles
# Whose image features are tokens of the tower or means of some, by tests/integrations/test_hf_tower_attention.py.
_SCORED = (
    "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "dots3_note", "ernie4_5_vl_moe", "exaone4_5",
    "gemma3", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "hyperclovax_vision_v2", "idefics3", "internvl",
    "janus", "kimi_k25", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision", "minimax_m3_vl",
    "mistral3", "paddleocr_vl", "paligemma", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "smolvlm", "video_llama_3",
)  # fmt: skip
_FIELDS = {"llama4": "last_hidden_state", "fuyu": "last_hidden_state", "granite4_vision": "deepstack_features"}


def find_connector(model: Any) -> Connector:
    """The connector of a model.

    Raises:
        TypeError: the model does not follow the rule; the message says why.
    """
    name, forward = type(model).__name__, inspect.signature(type(model).forward).parameters
    parts = model.base_model if hasattr(model.base_model, "get_image_features") else model
    if not hasattr(parts, "get_image_features"):
        raise TypeError(f"{name} has no connector: it has no get_image_features")
    if "mm_encoder_outputs" not in forward:
        known = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 18)
        raise TypeError(
            f"the connector of {name} cannot be reduced: its forward takes no mm_encoder_outputs"
            + (
                ""
                if known
                else f", as models do from transformers {FIRST_VERSION} on; this is {transformers.__version__}"
            )
        )
    required = [one.name for one in forward.values() if one.default is one.empty and one.name not in ("self", "kwargs")]
    if required:
        raise TypeError(f"the connector of {name} cannot be reduced: its forward needs {', '.join(required)}")
    placeholders = {}
    for modality in ("image", "video"):
        # A model of image codes has the id in its map between codes and words.
        holders = (model.config, getattr(parts, "vocabulary_mapping", None))
        token = next((t for one in holders if (t := getattr(one, f"{modality}_token_id", None)) is not None), None)
        if token is not None and hasattr(parts, f"get_{modality}_features"):
            placeholders[modality] = int(token)
    if "image" not in placeholders:
        raise TypeError(f"the connector of {name} cannot be reduced: its configuration has no image_token_id")
    kind = model.config.model_type
    return Connector(
        model,
        parts,
        placeholders,
        _FIELDS.get(kind, "pooler_output"),
        _UNITS.get(kind, "entry"),  # type: ignore[arg-type]
        inner=() if parts is model else (parts,),
        separator="image_newline" if getattr(parts, "image_newline", None) is not None else None,
        attentions=_attentions(model),
        scored=_scored(model, parts),
    )


def _attentions(model: Any) -> list[nn.Module] | str:
    """The attentions of the language model; the reason if a layer has another kind of memory."""
    language = model.get_decoder() if hasattr(model, "get_decoder") else model.language_model
    config = getattr(language, "config", None)
    found = []
    for module in language.modules():
        names = inspect.signature(type(module).forward).parameters
        layer = getattr(module, "layer_idx", None)
        if (
            layer is not None
            and "attention_mask" in names
            and not names.keys().isdisjoint({"cache", "past_key_values"})
            and hasattr(module, "o_proj")
        ):
            found.append(module)
    layers = getattr(config, "num_hidden_layers", None)
    return found if len(found) == layers else f"of its {layers} layers, {len(found)} have scores"


def _scored(model: Any, parts: Any) -> ScoredTower | str:
    """The image tower, whose attention scores the features; the reason if it cannot."""
    tower = next((getattr(parts, path) for path in _TOWERS if hasattr(parts, path)), None)
    if model.config.model_type not in _SCORED or tower is None:
        return "it is not known how its tokens become features"
    kernel = getattr(getattr(tower, "config", None), "_attn_implementation", None)
    if kernel not in RECOGNISED_KERNELS:
        return f"its kernel is {kernel!r}; use SDPA, as by model.set_attn_implementation('sdpa')"
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    blocks = list(max(lists, key=lambda one: len(list(one))))
    number = max(0, len(blocks) - 2)
    whole = [n for n in getattr(tower, "fullatt_block_indexes", None) or [] if n < len(blocks)]
    if whole and number not in whole:  # a window is no image
        number = max(whole)
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    language = model.get_decoder() if hasattr(model, "get_decoder") else model.language_model
    return ScoredTower(blocks, number, not names.isdisjoint(("class_embedding", "cls_token")), [language])


# Counting ------------------------------------------------------------------------------------------------------------

_TOWERS = ("visual", "vision_tower", "vision_model")
_CONNECTORS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "patch_merger")
# Models whose processor cuts an image into tiles of one size, and whose features are not rearranged behind the tower.
_TILED = ("idefics3", "internvl", "smolvlm")
_SIDE = 1024  # in pixels, of an image of any size where none is given


@dataclass(frozen=True)
class _Image:
    """One image as the tower gets it.

    Attributes:
        shape: of its pixel values.
        tiles: the number of tiles.
        patches: height and width in patches; None: the tower takes no images of any size.
        grid: height and width of the features of one unit; None: they are not known.
    """

    shape: tuple[int, ...]
    tiles: int
    patches: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None


def stages(model: Any, size: tuple[int, int] | None = None, tiles: int | None = None) -> Stages:
    """The stages of a model with a connector.

    Args:
        model: the model.
        size: height and width in pixels of the image, for a tower that takes images of any size. It is rounded to whole
            merged patches. None: 1024 x 1024.
        tiles: the number of tiles of an image, for a model of tiles; None: 1.

    Raises:
        TypeError: the model has no connector, or what its tower gets is not known.
        ValueError: the size or the number of tiles has no effect, or is not positive.
    """
    connector = find_connector(model)
    parts, name = connector.parts, type(model).__name__
    tower = next((getattr(parts, path) for path in _TOWERS if hasattr(parts, path)), None)
    arguments = inspect.signature(parts.get_image_features).parameters.values()
    required = [one.name for one in arguments if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if tower is None or set(required) - {"pixel_values"}:
        unknown = "no image tower of a known name" if tower is None else f"an image tower that needs {required}"
        raise TypeError(
            f"the stages of {name} are not defined: it has {unknown}; crossget.count_flops counts a forward"
        )
    image = _image(model, {one.name for one in arguments}, size, tiles)
    inside = dict(tower.named_children())
    joins = [part for path in _CONNECTORS for part in (getattr(parts, path, None), inside.pop(path, None)) if part]
    return Stages(
        parts={"image tower": [*inside.values()], "connector": joins},
        pixels=image.shape,
        prefill=partial(_prefill, connector, image),
        step=partial(_step, model),
    )


def _image(model: Any, arguments: set[str], size: tuple[int, int] | None, tiles: int | None) -> _Image:
    """See `stages`; `arguments` are the names of those of `get_image_features`."""
    name, vision = type(model).__name__, model.config.vision_config
    tiled, any_size = model.config.model_type in _TILED, "image_grid_thw" in arguments
    if tiles is not None and not tiled:
        raise ValueError(f"{name} does not cut an image into tiles: leave the number of tiles out")
    if size is not None and not any_size:
        raise ValueError(f"{name} takes images of one size: leave the size of the image out")
    if min(*(size or (1, 1)), 1 if tiles is None else tiles) < 1:
        raise ValueError(f"an image of {size} pixels and {tiles} tiles: give numbers from 1 on")
    if any_size:
        patch, merge = int(vision.patch_size), int(vision.spatial_merge_size)
        height, width = (max(1, round(side / (patch * merge))) for side in size or (_SIDE, _SIDE))
        values = vision.in_channels * vision.temporal_patch_size * patch**2
        shape = (height * width * merge**2, int(values))
        return _Image(shape, 1, (height * merge, width * merge), (height, width))
    sides = vision.image_size
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    return _Image((tiles or 1, 3, int(height), int(width)), tiles or 1)


def _prefill(connector: Connector, image: _Image, pixels: Tensor, text: Tensor) -> Prefilled:
    """Run by parts: the forward reads the values of ids, which the meta device lacks."""
    model, count = connector.model, len(pixels)
    encoded = read_features(connector, _features(connector, image, pixels))
    words = model.get_input_embeddings()(text)[0]
    attachment = find_attachment(model)
    features: Sequence[Tensor] = [encoded.flat]
    if attachment is not None and attachment.connector is not None:
        features = _reduced(attachment.connector, image, encoded, count, words.mean(0))
    prompt = torch.cat([*features, words])[None]
    cache = hf.run_language_model(model, model.get_decoder(), inputs_embeds=prompt)
    return Prefilled(cache, (int(prompt.shape[1]) - len(words)) // count, int(prompt.shape[1]))


def _features(connector: Connector, image: _Image, pixels: Tensor) -> Any:
    """What `get_image_features` returns for pixel values [N, *image.shape]."""
    # On the CPU, hosts can read sizes of grids, and see that a tile is not padding, which is 0.
    device = torch.device("cpu") if pixels.is_meta else pixels.device
    pixels = torch.ones(pixels.shape, device=device, dtype=pixels.dtype)
    given: dict[str, Any] = {}
    if image.patches is not None:
        given["image_grid_thw"] = torch.tensor([[1, *image.patches]] * len(pixels), device=device)
        pixels = pixels.flatten(0, 1)
    elif connector.units != "run":  # otherwise pixels of all tiles of a row of the batch
        pixels = pixels.flatten(0, 1)
    with ValuesOnCPU() if device.type == "cpu" else contextlib.nullcontext():
        return connector.parts.get_image_features(pixel_values=pixels, **given, return_dict=True)


def _reduced(
    attached: AttachedConnector, image: _Image, encoded: Encoded, count: int, text: Tensor
) -> Sequence[Tensor]:
    """The features that stay of each unit of `count` images, which are alike."""
    units = count if attached.keep.per == "image" else count * image.tiles
    length = len(encoded.flat) // units
    side = math.isqrt(length)
    square = (side, side) if side * side == length else None
    found = []
    for start in range(0, len(encoded.flat), length):
        part = slice(start, start + length)
        unit = attached.reduce(
            encoded.flat[part], text=text if attached.uses_text else None, separators=None, grid=image.grid or square,
            received=torch.ones_like(encoded.flat[part, 0]) if attached.reducer.needs_tower_attention else None,
            carried=[layer[part] for layer in encoded.layers],
        )  # fmt: skip
        found.append(unit.tokens)
    return found


def _step(model: Any, token: Tensor, left: Prefilled) -> Any:
    return hf.run_language_model(model, model.get_decoder(), left.cache, input_ids=token)
