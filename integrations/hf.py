"""Functions that several adapters of transformers use. There is one file per family of models: hf_clip and so on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers
import transformers.utils.generic
from torch import Tensor, nn

from crossget.core.adapters import (
    Blocks,
    Features,
    IntermediatesHook,
    Prompt,
    Tower,
    adapted_towers,
    read,
)

# Paths from a module to the list of blocks that it runs. They differ between versions.
_BLOCK_PATHS = ("encoder.layers", "encoder.layer", "layers", "layer")
_PREPARE = transformers.GenerationMixin.prepare_inputs_for_generation
# The names of the blocks' mask arguments. Some versions check the shape of a mask, others cut it to the number of keys.
MASKS = ("attention_mask", "causal_attention_mask")


def encoder(name: str, part: str = "base_model", **fields: Any) -> Tower:
    """The declared tower of an encoder, for every model that has it as a part or that is it.

    Its masks hide padding and, in newer versions, any patch that the caller chooses.

    Args:
        name: name of the tower.
        part: name of the module that contains the blocks. Where a model has no such module, it is the model itself.
        fields: other fields of the tower.
    """
    declared = {"masks": MASKS, "padding": True, **fields}
    return Tower(name, read(partial(_blocks_in, part)), read(partial(_width_in, part)), **declared)


def _blocks_in(part: str, model: Any) -> Blocks:
    return blocks(_part(model, part))


def _width_in(part: str, model: Any) -> int:
    return int(_part(model, part).config.hidden_size)


def _part(model: Any, name: str) -> Any:
    return model.base_model if name == "base_model" else inner(model, name)


# The image tower of a ViT with a class token, with or without a head.
VIT = encoder("visual", prefix=1, class_token=True)


def blocks(tower: nn.Module) -> Blocks:
    """The blocks of a module, in the order they run.

    Raises:
        RuntimeError: there is no list of blocks at any of the known paths.
    """
    for path in _BLOCK_PATHS:
        found: Any = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return Blocks(path, tower)
    raise RuntimeError(
        f"{type(tower).__name__} has no list of blocks at any of {', '.join(_BLOCK_PATHS)}: this version of "
        "transformers is not known"
    )


def inner(model: Any, name: str) -> Any:
    """`model.name` if there is such a submodule, which only some versions have; otherwise the model itself."""
    return model._modules.get(name, model)


def parts_of(model: Any) -> Any:
    """The module that contains image tower and language model: since 4.52 a submodule of the model."""
    return inner(model, "model")


def image_tower(parts: Any) -> Tower:
    """The image tower in a model of images and text.

    Raises:
        TypeError: it is of a class that cannot be reduced; the message says why.
    """
    (tower,) = adapted_towers(parts.vision_tower)
    return tower


def layers_used(config: Any, depth: int, arguments: Mapping[str, Any]) -> list[int]:
    """The blocks whose outputs get_image_features uses, as numbers from 0; -1 is the input of the first block."""
    chosen = arguments.get("vision_feature_layer")
    chosen = config.vision_feature_layer if chosen is None else chosen
    return [index % (depth + 1) - 1 for index in ([chosen] if isinstance(chosen, int) else chosen)]


def on_the_grid(model: Any, *methods: str) -> list[Tower]:
    """The towers of a model that needs image tokens on their grid.

    Args:
        model: the model.
        methods: the methods that use the image tower's outputs, and get the full grid.
    """
    parts = parts_of(model)
    tower = image_tower(parts)
    layers = partial(layers_used, model.config, len(tower.blocks))
    intermediates = [IntermediatesHook(parts, method, layers) for method in methods]
    return [dataclasses.replace(tower, intermediates=intermediates), language_model(parts.language_model)]


def prompt(model: Any, parts: Any, features: Callable[[Mapping[str, Any]], Features]) -> Prompt:
    """The form of the prompts of a model of images and text, with one placeholder for every image feature."""
    return Prompt(
        models=[model] if parts is model else [model, parts],
        placeholder=image_token(model.config),
        input_embeddings=model.get_input_embeddings,
        features=features,
        pad=_setting(model.config, "pad_token_id") or 0,
        # Before 5.0, pixels are forwarded with the first token of a conversation only.
        images_after_cache="is_first_iteration" in inspect.signature(_PREPARE).parameters,
    )


def image_token(config: Any) -> int:
    """The id of the placeholder for image features."""
    return int(_setting(config, "image_token_id", "image_token_index"))


def run_language_model(model: Any, language: Any, cache: Any = None, **tokens: Tensor) -> Any:
    """Run a language model, with its head on the last token only; returns the cache.

    Args:
        model: the module with the head `lm_head`, unless the language model has one, as before 4.52.
        language: the language model.
        cache: keys and values of earlier tokens; None: there are none.
        tokens: `input_ids` or `inputs_embeds`.

    Raises:
        RuntimeError: the model is on the meta device, which this version of transformers cannot run.
    """
    if runs_on_meta(language) and not hasattr(transformers.utils.generic, "maybe_autocast"):
        raise RuntimeError(
            f"transformers {transformers.__version__} cannot run a language model on the meta device (its rotary "
            "embedding asks for autocast there): count with transformers >= 5.0, or give the model real weights"
        )
    head = getattr(language, "lm_head", None) or model.lm_head
    runs = inner(language, "model")
    if cache is None and "config" in inspect.signature(transformers.DynamicCache).parameters:
        cache = transformers.DynamicCache(config=runs.config)  # some models make none under a tracer
    return run_decoder(runs, head, cache, **tokens)


def run_decoder(runs: Any, head: Any, cache: Any = None, **given: Any) -> Any:
    """Run a decoder on some tokens, and its head on the last one. Returns the cache."""
    # Up to 5.23 the argument is called past_key_values.
    name = "cache" if "cache" in inspect.signature(runs.forward).parameters else "past_key_values"
    out = runs(**given, use_cache=True, **({} if cache is None else {name: cache}))
    head(out[0][:, -1:])
    return out[name]


def runs_on_meta(module: nn.Module) -> bool:
    """Whether a module has no real weights."""
    return next(module.parameters()).is_meta


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that exists and is not None, in a configuration or in its text_config."""
    holders = (config, getattr(config, "text_config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if value is not None), None)


def language_model(model: Any) -> Tower:
    """The tower of a language model that generates: the cross token replaces its first token."""
    runs = inner(model, "model")  # before 4.52 a submodule of a model with a head
    return Tower("text", blocks=blocks(runs), width=runs.config.hidden_size, project=identity, decoder=runs)


def identity(tokens: Tensor) -> Tensor:
    """The projection of cross tokens that are in the joint space already."""
    return tokens


def grid_tokens(config: Any) -> int:
    """The number of patches of an image, from the configuration of an image tower."""
    sizes = [config.image_size, config.patch_size]
    (height, width), (down, across) = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    return int((height // down) * (width // across))
