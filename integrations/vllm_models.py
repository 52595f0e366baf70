"""vLLM's own classes with fewer image tokens: for each name in `vllm.MODELS` a class, made when it is asked for.

vLLM writes the placeholders of an image into the prompt before the image is encoded, in another process. So the number
of tokens that stay is a function of the image's size, and goes to the model with the image (`_PLAN`). The model reduces
the features of each image by itself, as vLLM keeps them for all prompts that have the image.

Ordinary positions are counted anew, as the runner does for any prompt. Positions on the image's grid (M-RoPE) are those
of the full prompt: the place of each feature that stays travels behind its channels, and vLLM asks for the positions
when the features are put into a prompt (its interface for pruned videos, `SupportsMultiModalPruning`).

Without a setting, vLLM's own classes are made.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llava import modeling_llava  # not the class, which has the name of one of vLLM's
from vllm.model_executor.models.registry import _VLLM_MODELS
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from crossget.core import saving
from crossget.core.attach import attach
from crossget.core.connector import reduce_features
from crossget.integrations.vllm import KEY, MODELS, TILED, Settings, settings_of

_PLAN = "crossget_plan"  # of an image: the number of its units, of the features of one, and of those that stay
_TILES = ("num_image_patches", "image_num_patches")  # of an image: the names that vLLM has for their number
_AXES = 3
_UNMOVED = -1  # in place of a place: the token's position is left as it is


def __getattr__(name: str) -> Any:
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, native = _VLLM_MODELS[name]
    cls = reduced(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), native), name)
    return globals().setdefault(name, cls)


def reduced(native: Any, name: str) -> Any:
    """A class of vLLM's with fewer image tokens, and the processor of its prompts."""
    cls = type(name, (_Model, native), {"__module__": __name__, "native": native})
    own = native._processor_factory

    def processor(info: Any, dummy_inputs: Any) -> Any:
        made = own.processor(info, dummy_inputs)
        settings = settings_of(info.get_hf_config())
        if settings is None:
            return made
        kind = type(made)
        shorter: Any = object.__new__(type(kind.__name__, (_Processor, kind), {"__module__": __name__}))
        shorter.__dict__.update(made.__dict__, crossget=settings)
        return shorter

    return MULTIMODAL_REGISTRY.register_processor(processor, info=own.info, dummy_inputs=own.dummy_inputs)(cls)


# Prompts -------------------------------------------------------------------------------------------------------------


class _Processor:
    """What a processor of vLLM's does otherwise: an image is replaced with as many placeholders as features stay."""

    info: Any
    crossget: Settings

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Of most tokens: with them the memory is planned, and a request can ask for all tokens of an image."""
        made = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return made if self.crossget.tower else dataclasses.replace(made, hf_processor_mm_kwargs={KEY: {"keep": 1.0}})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _without_share(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without_share(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        config, share = self.info.get_hf_config(), hf_processor_mm_kwargs.get(KEY)
        kwargs = _without_share(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        found = []
        for update in updates:
            if update.modality == "image":
                items = out_mm_kwargs.get("image", [])  # without those whose prompts are cached
                contents = [_details(update.replacement, index) for index in range(len(items))]
                shorter = [_shorter(*pair, self.crossget, config, share) for pair in zip(contents, items, strict=True)]
                update = dataclasses.replace(update, replacement=shorter.__getitem__)
            found.append(update)
        return found


def _without_share(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}


def _details(replacement: Any, index: int) -> Any:
    content = replacement(index) if callable(replacement) else replacement
    return content if isinstance(content, PromptUpdateDetails) else PromptUpdateDetails.from_seq(content)


def _shorter(content: Any, item: Any, settings: Settings, config: Any, share: Any) -> Any:
    """What an image is replaced with, without the placeholders for which nothing will come. Writes the image's plan."""
    ids = torch.tensor(content.full)
    where = (torch.ones_like(ids) if content.is_embed is None else content.is_embed(content.full)).nonzero()[:, 0]
    units = 1
    if config.model_type in TILED:
        units = int(next(item[name].data for name in _TILES if name in item))
    length = len(where) // units
    kept = settings.kept(length, config, share)
    plan = torch.tensor([units, length, kept])
    item[_PLAN] = MultiModalFieldElem(data=plan, field=MultiModalBatchedField(keep_on_cpu=True))
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[where] = False
    stays[where[_evenly(units * length, units * kept)]] = True
    is_embed = torch.zeros_like(stays)
    is_embed[where] = True
    is_embed = is_embed[stays]
    return PromptUpdateDetails(ids[stays].tolist(), None if content.is_embed is None else lambda full: is_embed)


def _evenly(n: int, k: int) -> Tensor:
    """[k] places among n; of runs of equal length, the same number in each."""
    return torch.arange(k) * n // k


# Models --------------------------------------------------------------------------------------------------------------


class _Model:
    """What a model of vLLM's does otherwise: the features of each image are reduced when they are encoded."""

    native: Any
    config: Any
    crossget: Settings

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if settings_of(vllm_config.model_config.hf_config) is None:
            return cls.native(vllm_config=vllm_config, prefix=prefix)
        new: Any = super().__new__
        return new(cls) if new is object.__new__ else new(cls, vllm_config=vllm_config, prefix=prefix)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            raise ValueError(f"with cudagraph_mm_encoder no tokens are reduced: leave it or the setting {KEY!r} out")
        self.crossget = cast("Settings", settings_of(config.hf_config))  # otherwise __new__ makes another class
        self.model_config = config
        self.moves_positions = bool(config.uses_mrope)
        if self.moves_positions:
            # The runner reads these two when the model is made.
            self.supports_multimodal_pruning = True
            config.multimodal_config.video_pruning_rate = 1e-6
            _ask_for_positions_on_cpus()
        self.saved = saving.read(config.model)[1] if (Path(config.model) / saving.FILE).is_file() else {}
        if self.crossget.tower:
            self.vision_tower = _Tower(self, self.saved.get("visual"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load the weights of a checkpoint. vLLM may also read those that `Attachment.save` wrote beside them."""
        return super().load_weights(one for one in weights if one[0] not in self.saved)  # type: ignore[misc]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        plans, grids = kwargs.pop(_PLAN, None), kwargs.get("image_grid_thw")
        if self.crossget.tower and "pixel_values" in kwargs:
            features = self.vision_tower(kwargs["pixel_values"])
        else:
            features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if plans is None:
            return [F.pad(one, (0, _AXES), value=_UNMOVED) for one in features] if self.moves_positions else features
        grids = [None] * len(plans) if grids is None else grids.tolist()
        # One image may come without the axis of images.
        return [self._reduced(*one) for one in zip(features, plans.tolist(), grids, strict=True)]

    def _reduced(self, features: Tensor, plan: Sequence[int], grid: Sequence[int] | None) -> Tensor:
        """The features of one image that stay [k, C], with their places [k, C + 3] where positions are on a grid.

        Args:
            features: [n, C]; C has the features for several layers one after the other (deepstack).
            plan: see `_PLAN`.
            grid: of the image, in frames and patches; None: not known.
        """
        units, length, kept = plan
        features = features.reshape(-1, features.shape[-1])
        made = kept if self.crossget.tower else length
        if len(features) != units * made:
            raise RuntimeError(
                f"an image has {len(features)} features, and its prompt was written for {units} x {made}: this model "
                "cannot be served with fewer image tokens"
            )
        if self.crossget.tower:
            return features
        width = self.model_config.hf_text_config.hidden_size
        sides = _sides(length, grid)
        found = []
        for unit in features.split(length):
            layers = [unit[:, width:]] if unit.shape[1] > width else []
            out = reduce_features(self.crossget.reducer, unit[:, :width], kept, grid=sides, carried=layers)
            parts = [out.tokens, *out.carried]
            if self.moves_positions:
                parts.append(_places(sides, out.kept).to(unit))
            found.append(torch.cat(parts, 1))
        return torch.cat(found)

    # Positions on the image's grid -----------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """[3, T] the positions in the full prompt, with those of arbitrary features of each image, and their offset."""
        tokens: list[int] = []
        stays: list[bool] = []
        features, end = [], 0
        for feature in sorted(mm_features, key=lambda one: int(one.mm_position.offset)):
            place = feature.mm_position
            text, end = input_tokens[end : place.offset], place.offset + place.length
            own, columns = input_tokens[place.offset : end], torch.arange(place.length)
            if _PLAN in feature.data:
                units, length, kept = feature.data[_PLAN].data.tolist()
                first = 0 if place.is_embed is None else int(place.is_embed.nonzero()[0])
                columns = columns.repeat_interleave(torch.where(columns == first, units * (length - kept) + 1, 1))
            is_embed = None if place.is_embed is None else place.is_embed[columns]
            moved = dataclasses.replace(place, offset=len(tokens + text), length=len(columns), is_embed=is_embed)
            features.append(dataclasses.replace(feature, mm_position=moved))
            tokens += text + [own[column] for column in columns.tolist()]
            stays += [True] * (len(text) + 1) + (columns[1:] != columns[:-1]).tolist()
        tokens += input_tokens[end:]
        stays += [True] * (len(tokens) - len(stays))
        full, _ = super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]
        return full[:, torch.tensor(stays)], int(full.max()) + 1 - len(input_tokens)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """Set the positions of the image tokens whose features come now, and take their places off the features."""
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        following = int(mrope_positions.max()) + 1 - len(ids)
        if not multimodal_embeddings:
            return [], mrope_positions, following
        placeholders = [getattr(self.config, f"{kind}_token_id", -1) for kind in ("image", "video")]
        is_feature = torch.isin(ids, torch.tensor(placeholders, device=ids.device))
        order = torch.arange(len(ids), device=ids.device)
        before = torch.where(is_feature, 0, order).cummax(0).values  # the last token of text so far
        places = torch.cat(list(multimodal_embeddings))[:, -_AXES:].round().long().to(ids.device)
        columns = (is_feature & (order >= num_computed_tokens)).nonzero()[: len(places), 0]
        moves = places[:, 0] != _UNMOVED
        columns, places = columns[moves], places[moves]
        positions = mrope_positions.clone()
        positions[:, columns] = mrope_positions[:, before[columns]] + 1 + places.T
        return [one[:, :-_AXES] for one in multimodal_embeddings], positions, following


class _Tower(nn.Module):
    """The image tower of transformers' LLaVA-1.5 with a reducer, in place of vLLM's, which has other blocks.

    Args:
        model: of vLLM; its projector is used.
        cross_tokens: [L, C]; None: they are those of an untrained model.
    """

    def __init__(self, model: Any, cross_tokens: Tensor | None) -> None:
        super().__init__()
        config = model.config
        like = next(model.multi_modal_projector.parameters())
        with torch.device("meta"):  # all but the image tower is left there
            host: Any = modeling_llava.LlavaForConditionalGeneration(config).eval()
        self.vision_model = type(host.model.vision_tower)(config.vision_config).eval().to(like)
        host.model.vision_tower, host.model.multi_modal_projector = self.vision_model, model.multi_modal_projector
        attached = attach(host, {"visual": model.crossget.reducer})
        if cross_tokens is not None and attached.cross_tokens:
            attached.set_cross_tokens({"visual": cross_tokens})
        self._host = [host]  # in a list, as it is no part of this module

    def forward(self, pixels: Tensor) -> Any:
        """The features [images, n, C], behind the projector."""
        out = self._host[0].model.get_image_features(pixel_values=pixels, return_dict=True)
        return out.pooler_output

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a checkpoint; returns their names."""
        found = {name: one for name, one in weights if not name.endswith("position_ids")}
        short = {name.removeprefix("vision_model."): one for name, one in found.items()}
        self.vision_model.load_state_dict(short)
        return set(found)


def _sides(length: int, grid: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width of the grid of a unit, in features; None: they are not known."""
    if grid is None:
        side = math.isqrt(length)
        return (side, side) if side * side == length else None
    frames, height, width = (int(n) for n in grid)
    merged = math.isqrt(frames * height * width // length)
    return height // merged, width // merged


def _places(sides: tuple[int, int] | None, kept: Tensor) -> Tensor:
    """[k, 3] frame, row and column of the features that stay [k], in the grid of an image."""
    if sides is None:
        raise RuntimeError("the positions of the language model are on a grid of the image, which is not known")
    return torch.stack([torch.zeros_like(kept), kept // sides[1], kept % sides[1]], 1)


def _ask_for_positions_on_cpus() -> None:
    """vLLM's runner for CPUs loads models in its own way, and does not ask whether they move positions."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        CPUModelRunner.is_multimodal_pruning_enabled = property(
            lambda runner: getattr(getattr(runner, "model", None), "moves_positions", False), lambda runner, value: None
        )
