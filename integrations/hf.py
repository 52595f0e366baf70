"""transformers: what the adapters of its families share. The families are in files of their own, hf_clip and so on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers.utils.generic
from torch import Tensor, nn

from crossget.core.adapters import Blocks, Features, IntermediatesHook, Prompt, Tower, find_towers

# Where a tower's blocks are, below the module that runs them; the names have changed between versions.
_STACKS = ("encoder.layers", "encoder.layer", "layers", "layer")
# These compute attention where crossget can see it; the others are kernels that hide it.
_SEEN = ("eager", "sdpa")
# What blocks call the masks they get. Some versions check their shape, some cut them to as many keys as they see.
MASKS = ("attention_mask", "causal_attention_mask")


def tower(name: str, part: Any, **fields: Any) -> Tower:
    """A tower of the part of a model that has the blocks.

    Masks hide padding, and in newer versions any patch that the caller wants to hide.
    """
    config = part.config
    return Tower(
        name, blocks=blocks(part), width=config.hidden_size, masks=MASKS, padding=True, overrides=kernel(config),
        **fields,
    )  # fmt: skip


def vit(model: Any, prefix: int = 1, **fields: Any) -> Tower:
    """The image tower of a ViT with a class token, with or without a head."""
    return tower("visual", model.base_model, prefix=prefix, class_token=True, **fields)


def backbone(model: nn.Module) -> list[IntermediatesHook]:
    """What reads a backbone's blocks: its forward lays the hidden states of several out on the image grid."""
    return [IntermediatesHook(model, "forward")]


def blocks(tower: nn.Module) -> Blocks:
    """The blocks of a tower, in the order they run."""
    for path in _STACKS:
        found: Any = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return Blocks(tower, path)
    raise RuntimeError(
        f"{type(tower).__name__} has its blocks in none of {', '.join(_STACKS)}: a version not known here"
    )


def kernel(config: Any) -> list[tuple[Any, str, Any]]:
    """While attached, a tower set up with another attention kernel runs SDPA, which has fused kernels of its own."""
    return [] if config._attn_implementation in _SEEN else [(config, "_attn_implementation", "sdpa")]


def inner(model: Any, name: str) -> Any:
    """`model.name`, which in older versions stands between a model and its parts, or the model itself."""
    return model._modules.get(name, model)


def parts_of(model: Any) -> Any:
    """Where a model of images and text has its image tower and language model: inside of it since 4.52."""
    return inner(model, "model")


def image_tower(parts: Any) -> Tower:
    """The image tower in a model of images and text.

    Raises:
        TypeError: it is of a class that cannot be reduced; the message says why.
    """
    (tower,) = find_towers(parts.vision_tower)
    return tower


def layers_used(config: Any, depth: int, arguments: Mapping[str, Any]) -> list[int]:
    """The blocks whose output get_image_features reads: hidden state 0 is what the first block gets."""
    chosen = arguments.get("vision_feature_layer")
    chosen = config.vision_feature_layer if chosen is None else chosen
    return [index % (depth + 1) - 1 for index in ([chosen] if isinstance(chosen, int) else chosen)]


def on_the_grid(model: Any, *methods: str) -> list[Tower]:
    """The towers of a model that lays image tokens out on their grid: what these methods read is restored."""
    parts = parts_of(model)
    tower = image_tower(parts)
    layers = partial(layers_used, model.config, len(tower.blocks))
    intermediates = [IntermediatesHook(parts, method, layers) for method in methods]
    return [dataclasses.replace(tower, intermediates=intermediates), language_model(parts.language_model)]


def prompt(model: Any, parts: Any, features: Callable[[Mapping[str, Any]], Features]) -> Prompt:
    """Prompts of a model of images and text, with one image token for every feature."""
    return Prompt(
        models=[model] if parts is model else [model, parts],
        placeholder=image_token(model.config),
        embedding=model.get_input_embeddings(),
        features=features,
        pad=_setting(model.config, "pad_token_id") or 0,
    )


def image_token(config: Any) -> int:
    """The id that stands for image features in a prompt."""
    return int(_setting(config, "image_token_id", "image_token_index"))


def run_language_model(model: Any, language: Any, cache: Any = None, **tokens: Tensor) -> Any:
    """Run a language model on some tokens up to the logits of the last one; returns the cache.

    Args:
        model: has the head, unless the language model has one of its own, as before 4.52.
        language: the language model.
        cache: of the tokens before.
        tokens: `input_ids` or `inputs_embeds`.
    """
    if runs_on_meta(language) and not hasattr(transformers.utils.generic, "maybe_autocast"):
        raise RuntimeError(
            f"transformers {transformers.__version__} cannot run a language model on the meta device (its rotary "
            "embedding asks for autocast there): count with transformers >= 5.0, or give the model real weights"
        )
    head = getattr(language, "lm_head", None) or model.lm_head
    return run_decoder(inner(language, "model"), head, cache, **tokens)


def run_decoder(runs: Any, head: Any, cache: Any = None, **given: Any) -> Any:
    """Run a decoder on some tokens, and its head on the last one; returns the cache."""
    # The cache's name has changed in 5.24.
    name = "cache" if "cache" in inspect.signature(runs.forward).parameters else "past_key_values"
    out = runs(**given, use_cache=True, **({} if cache is None else {name: cache}))
    head(out[0][:, -1:])
    return out[name]


def runs_on_meta(module: nn.Module) -> bool:
    """Whether a module has no real weights."""
    return next(module.parameters()).is_meta


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that is there and not None, in a configuration or that of its language model."""
    holders = (config, getattr(config, "text_config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if value is not None), None)


def language_model(model: Any) -> Tower:
    """A language model that generates, behind an image tower: its first token plays the cross token's part."""
    runs = inner(model, "model")  # before 4.52 it stood in a model with a head
    return Tower("text", blocks=blocks(runs), width=runs.config.hidden_size, project=as_it_is, decoder=runs)


def as_it_is(tokens: Tensor) -> Tensor:
    """Cross tokens that are in the shared space already."""
    return tokens


def grid_tokens(config: Any) -> int:
    """How many patches an image has, of the configuration of an image tower."""
    sizes = [config.image_size, config.patch_size]
    (height, width), (down, across) = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    return int((height // down) * (width // across))
