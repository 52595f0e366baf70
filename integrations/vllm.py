"""vLLM: the plugin that serves models with fewer image tokens.

    vllm serve MODEL --hf-overrides '{"crossget": {"method": "Ward", "keep": 0.25}}'

vLLM calls `register` at the start of each of its processes (entry point `vllm.general_plugins`). This file says what is
served and with which settings, and imports vLLM late; the classes that vLLM runs are in vllm_models.py.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from crossget.core.attach import attach
from crossget.core.connector import FACTS
from crossget.methods import diversity, reducers
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import Keep, planned_tokens

SUPPORTED = ("0.32",)
KEY = "crossget"  # of the setting in --hf-overrides, and of a request's share in mm_processor_kwargs
# vLLM's classes that are served with fewer image tokens, by the name of an architecture. The first two are those that
# `--model-impl transformers` runs every model of images and text with.
MODELS = (
    "TransformersMultiModalForCausalLM",
    "TransformersMultiModalMoEForCausalLM",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
_METHODS: dict[str, type[Reducer]] = {
    kind.__name__: kind
    for kind in (
        reducers.CrossGET, reducers.Random, reducers.ToMe, reducers.TopK, reducers.Ward,
        diversity.AveragePool, diversity.Determinantal, diversity.MaxMin,
    )
}  # fmt: skip
# Models whose images are encoded as tiles, each of which is one unit (`Keep`), by the model_type of a configuration.
TILED = ("aya_vision", "cohere2_vision", "got_ocr2", "idefics3", "internvl", "smolvlm")


@dataclass(frozen=True)
class Settings:
    """What `--hf-overrides` says of a server.

    Attributes:
        reducer: the method, with all fields resolved.
        tower: the tokens are merged in the image tower, and not behind the connector.
    """

    reducer: Reducer
    tower: bool

    def kept(self, features: int, config: Any, share: Mapping[str, Any] | None = None) -> int:
        """The number of features of a unit that stay.

        Args:
            features: of the unit, without reduction.
            config: of the model.
            share: what a request sets, as `{"keep": 0.5}`; None: nothing.

        Raises:
            ValueError: the share is not valid.
        """
        if self.tower:
            if share is not None:
                raise ValueError(f"{KEY}={share}: the tokens are merged in the image tower, as the server was set up")
            return _kept_in_tower(self.reducer, features, config)
        schedule = self.reducer.schedule
        if share is not None:
            if not isinstance(share, Mapping) or set(share) != {"keep"}:
                raise ValueError(f'{KEY}={share}: a request sets the share as {{"keep": 0.5}}, and nothing else')
            schedule = _valid(f"{KEY}={share}", lambda: Keep(share["keep"]))
        return features - min(schedule.removed(0, 1, features), features - 1)


def register() -> None:
    """Make vLLM's classes known that serve with fewer image tokens, and have every model's settings checked."""
    from vllm import ModelRegistry, __version__
    from vllm.config import ModelConfig

    if not hasattr(ModelConfig.__post_init__, KEY):
        ModelConfig.__post_init__ = _checking(ModelConfig.__post_init__, __version__)
    if _is_supported(__version__):
        for name in MODELS:
            ModelRegistry.register_model(name, f"crossget.integrations.vllm_models:{name}")
    else:
        log = logging.getLogger("vllm.plugins")
        log.warning("%s: the setting %r is refused, and without it nothing changes", _wrong(__version__), KEY)


def _is_supported(version: str) -> bool:
    return version.startswith(tuple(f"{one}." for one in SUPPORTED))


def _wrong(version: str) -> str:
    return f"crossget serves with vLLM {', '.join(SUPPORTED)}, and this is {version}"


def _checking(original: Callable[..., None], version: str) -> Callable[..., None]:
    """ModelConfig's `__post_init__`, which checks the setting in the end: a wrong one stops the start."""

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if getattr(getattr(self, "hf_config", None), KEY, None) is not None:
            if not _is_supported(version):
                raise ValueError(f"{_wrong(version)}: install one of those, or leave the setting {KEY!r} out")
            check(self)

    setattr(post_init, KEY, True)
    return post_init


def check(model_config: Any) -> None:
    """Check the setting of a model that is to be served.

    Raises:
        ValueError: the model takes no images, or its class is not known here, or the setting is wrong.
    """
    name, multimodal = model_config.architecture, model_config.multimodal_config
    config = model_config.hf_config
    if multimodal is None or all(getattr(config, f"image_token_{part}", None) is None for part in ("id", "index")):
        raise ValueError(f"the setting {KEY!r} reduces image tokens, and {name} takes no images: leave it out")
    if name not in MODELS:
        raise ValueError(
            f"the setting {KEY!r} is not known for vLLM's class {name}: serve the model with --model-impl transformers"
        )
    if multimodal.video_pruning_rate:
        raise ValueError(f"the setting {KEY!r} and --video-pruning-rate do not go together: leave one of them out")
    if KEY in (multimodal.mm_processor_kwargs or {}):
        raise ValueError(f"--mm-processor-kwargs has {KEY!r}, which is for requests: a server's is in --hf-overrides")
    settings = settings_of(config)
    if settings is not None and settings.tower and name != "LlavaForConditionalGeneration":
        raise ValueError(f"the setting {KEY!r} has r, which merges in the tower of LLaVA-1.5; for {name} give keep")


def settings_of(config: Any) -> Settings | None:
    """The settings in the configuration of a model; None: there are none.

    Raises:
        ValueError: they are wrong.
    """
    found = getattr(config, KEY, None)
    if found is None:
        return None
    settings: Settings = _valid(f"the setting {KEY!r} is {found}", lambda: _read(found, config))
    return settings


def _valid(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def _read(found: Any, config: Any) -> Settings:
    fields = dict(found) if isinstance(found, Mapping) else {}
    kind = _METHODS.get(fields.pop("method", None))
    if kind is None:
        raise ValueError(f'expected {{"method": .., "keep": ..}} with one of the methods {", ".join(sorted(_METHODS))}')
    if ("keep" in fields) == ("r" in fields):
        raise ValueError(
            "expected one of keep, the image tokens that stay or their share, and r, which merges in the tower"
        )
    if "r" in fields:
        return Settings(_for_tower(kind(**fields), config), tower=True)
    reducer = kind(Keep(fields.pop("keep")), **fields).resolved(FACTS)
    if reducer.cross_token or reducer.needs_text:
        raise ValueError(
            f"{kind.__name__} is guided by the text of a prompt, and vLLM encodes an image once for all prompts: take "
            "another method" + (", or cross_token=false" if reducer.cross_token else "")
        )
    if isinstance(reducer, reducers.Joining) and reducer.proportional_attention:
        raise ValueError("proportional_attention adds a bias to attention scores, and vLLM's kernels take none")
    return Settings(reducer, tower=False)


def _for_tower(reducer: Reducer, config: Any) -> Reducer:
    """The method as it is resolved for the image tower of transformers' LLaVA-1.5, which is as in the reference."""
    from transformers import LlavaForConditionalGeneration

    vision = getattr(config, "vision_config", None)
    if config.model_type != "llava" or getattr(vision, "model_type", None) != "clip_vision_model":
        raise ValueError("r merges in the tower of LLaVA-1.5, which is a CLIP; for other models give keep")
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with attach(model, {"visual": reducer}) as attached:
        return attached.reducers["visual"]


def _kept_in_tower(reducer: Reducer, features: int, config: Any) -> int:
    """The features that LLaVA-1.5 makes of an image, of those that it makes without reduction."""
    depth = config.vision_config.num_hidden_layers
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    extra = int(reducer.cross_token)
    layer = config.vision_feature_layer % (depth + 1)
    counts = planned_tokens(reducer.schedule, depth, features + dropped + extra, 1 + extra)
    return int(counts[layer] - dropped)
