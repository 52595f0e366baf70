"""transformers: what the adapters of its families share. The families are in files of their own, hf_clip and so on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crossget.registry import Tower

# Where a tower's blocks are, below the module that runs them; the names have changed between versions.
_STACKS = ("encoder.layers", "encoder.layer", "layers", "layer")
# These compute attention where crossget can see it; the others are kernels that hide it.
_SEEN = ("eager", "sdpa")
# The families, each in a file of its own.
FAMILIES = ("CLIP", "LLaVA-1.5")


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower, in the order they run."""
    for path in _STACKS:
        found: Any = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    raise RuntimeError(
        f"{type(tower).__name__} has its blocks in none of {', '.join(_STACKS)}: a version not known here"
    )


def kernel(config: Any) -> list[tuple[Any, str, Any]]:
    """While attached, a tower set up with another attention kernel runs SDPA, which has fused kernels of its own."""
    return [] if config._attn_implementation in _SEEN else [(config, "_attn_implementation", "sdpa")]


def inner(model: Any, name: str) -> Any:
    """`model.name`, which in older versions stands between a model and its parts, or the model itself."""
    return model._modules.get(name, model)


def language_model(model: Any) -> Tower:
    """A language model that generates, behind an image tower: its first token plays the cross token's part."""
    runs = inner(model, "model")  # before 4.52 it stood in a model with a head
    return Tower("text", blocks=blocks(runs), width=runs.config.hidden_size, project=as_it_is, decoder=runs)


def as_it_is(tokens: Tensor) -> Tensor:
    """Cross tokens that are in the shared space already."""
    return tokens


def first_setting(config: Any, *names: str) -> Any:
    """The first of these settings that is there and not None, in a configuration or that of its language model."""
    holders = (config, getattr(config, "text_config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if value is not None), None)


def image_token(config: Any) -> int:
    """The token id that stands for image features in a prompt."""
    return int(first_setting(config, "image_token_id", "image_token_index"))


def grid_tokens(config: Any) -> int:
    """How many patches an image has, of the configuration of an image tower."""
    sizes = [config.image_size, config.patch_size]
    (height, width), (down, across) = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    return int((height // down) * (width // across))


def explain(model: nn.Module) -> str:
    """Why a model of transformers has no adapter."""
    return f"{type(model).__name__} is not among the models of transformers that are known here: {', '.join(FAMILIES)}"
