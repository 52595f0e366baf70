"""transformers: the connector of a model of images and text, by one rule for all families.

A model follows the rule if its `forward` takes `mm_encoder_outputs` (transformers 5.18 and newer): what
`get_image_features` returns, in the order of the placeholders of the prompt.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn

from crossget.core.adapters import RECOGNISED_KERNELS
from crossget.core.connector import Connector

FIRST_VERSION = "5.18"
# What the rule does not tell, by the model_type of a configuration.
_UNITS = dict.fromkeys(("granite_docling", "idefics2", "idefics3", "smolvlm"), "run")  # an entry has a row's tiles
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
    )


def _attentions(model: Any) -> list[nn.Module] | str:
    """The attentions of the language model; the reason if a layer has another kind of memory, or an unknown kernel."""
    language = model.get_decoder() if hasattr(model, "get_decoder") else model.language_model
    config = getattr(language, "config", None)
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in RECOGNISED_KERNELS:
        return f"its kernel is {kernel!r}; use SDPA, as by model.set_attn_implementation('sdpa')"
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
