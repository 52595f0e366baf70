"""Load the checkpoints of the reference implementation into models that are there already.

`crossget.convert` makes a folder for transformers out of a LLaVA, for those who have no model yet.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossget.checkpoints import llava_format
from crossget.core.adapters import find_towers
from crossget.core.attachment import Attachment, attach_with, find_attachment
from crossget.methods.reducers import CrossGET, Reducer

_CLIP_CROSS = {"visual": "visual.transformer.cross_image", "text": "transformer.cross_text"}
# Archives of OpenAI's models carry these integers beside the weights.
_OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}
# What the model's parts are called in checkpoints of the reference's CoOp, which has no token embedding in them.
_DASSL = {"image_encoder.": "visual.", "text_encoder.": "", "logit_scale": "logit_scale"}
_DASSL_PROMPTS, _EMBEDDING = "prompt_learner.", "token_embedding.weight"
# Such a checkpoint has a scheduler in it as it lay in memory, with its optimiser.
_DASSL_OBJECTS = {
    "torch.optim.lr_scheduler": ("CosineAnnealingLR", "StepLR", "MultiStepLR"),
    "torch.optim.sgd": ("SGD",),
    "torch.optim.adam": ("Adam",),
    "torch.optim.adamw": ("AdamW",),
}
# What changes the outputs of a LLaVA and does not show in the shapes of its weights.
_UNSEEN_TEXT = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act")


def load_reference(
    model: nn.Module, path: str | Path, reducer: Reducer | Mapping[str, Reducer] | None = None
) -> Attachment:
    """Load a checkpoint of the reference implementation, and attach.

    - CLIP, into open_clip's: a file `{"model": state_dict}` with OpenAI's key names plus the cross tokens of both
      towers. The reference's r is (16, 0). Or Dassl's file of the reference's CoOp, `{"state_dict": ...}`, whose
      prompts are left to `experiments.coop.prompts.load_dassl`; the token embedding is not in it and stays the model's.
    - LLaVA, into transformers' LlavaForConditionalGeneration: a folder in LLaVA's original layout with
      `cross_tokens.bin` (or with the cross tokens among the weights), LoRA merged. The reference's r is 13 in the
      vision tower. A vision tower that is not in the folder stays the model's own, and where the model has more tokens
      than the checkpoint, so do the embeddings and the head of the others.

    No checkpoint says r: an attached model keeps its reducers, otherwise `reducer` is attached, otherwise the
    reference's.

    Args:
        model: of the same architecture (OpenAI's CLIPs use QuickGELU: "ViT-B-16-quickgelu" in open_clip).
        path: the checkpoint; only tensors are read, never code.
        reducer: as for `crossget.attach`.

    Returns:
        The attachment; the model's own weights are the checkpoint's now.

    Raises:
        TypeError: the model is neither.
        FileNotFoundError: a file is not there.
        ValueError: keys are missing, left over or misshapen (they are named), the checkpoint is of another kind, or
            `reducer` is given for a model that is attached already. Nothing is loaded or attached then.
    """
    previous = find_attachment(model)
    if previous is not None and reducer is not None:
        raise ValueError("the model is attached already, so reducer would be ignored: detach first, or leave it out")
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{path} is neither a file (a CLIP of the reference) nor a folder (a LLaVA)")
    if _is(model, "transformers.models.llava.", "LlavaForConditionalGeneration"):
        if source.is_file():
            raise ValueError(f"{path} is a file, and the model a LLaVA: give the folder that it is in")
        return _load_llava(model, source, reducer, previous)
    if _is(model, "open_clip.", "CLIP"):
        if source.is_dir():
            raise ValueError(f"{path} is a folder, and the model a CLIP: give the checkpoint file")
        return _load_clip(model, source, reducer, previous)
    raise TypeError(
        f"{type(model).__module__}.{type(model).__name__} cannot take a checkpoint of the reference: expected "
        "open_clip.CLIP (not CustomTextCLIP), or transformers.LlavaForConditionalGeneration"
    )


def _is(model: nn.Module, home: str, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith(home) for cls in type(model).__mro__)


# CLIP ----------------------------------------------------------------------------------------------------------------


def _load_clip(
    model: nn.Module, path: Path, reducer: Reducer | Mapping[str, Reducer] | None, previous: Attachment | None
) -> Attachment:
    content = _load_without_objects(path)
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    if "model" in keys and isinstance(content["model"], dict):
        state = {name: value for name, value in content["model"].items() if name not in _OPENAI_EXTRAS}
    elif "state_dict" in keys and isinstance(content["state_dict"], dict):
        state = _from_dassl(content["state_dict"], path)
        state[_EMBEDDING] = model.state_dict()[_EMBEDDING]
    else:
        raise ValueError(
            f'{path} is not a CLIP checkpoint of the reference: expected {{"model": state_dict}} or Dassl\'s '
            f'{{"state_dict": state_dict}}, found {keys}'
        )
    cross = {tower: state.pop(key) for tower, key in _CLIP_CROSS.items() if key in state}
    missing = [key for tower, key in _CLIP_CROSS.items() if tower not in cross]
    llava_format.check_shapes(
        _shapes(model.state_dict()), _shapes(state), str(path), type(model).__name__, missing=missing
    )
    towers = {tower.name: tower for tower in find_towers(model)}
    for name, value in cross.items():
        shape = (1, len(towers[name].blocks), towers[name].width)
        if tuple(value.shape) != shape:
            raise ValueError(f"{path}: {_CLIP_CROSS[name]} has shape {tuple(value.shape)}, the tower needs {shape}")
    _warn_activation(model, str(path))
    cross = {tower: value.squeeze(0) for tower, value in cross.items()}
    attached = attach_with(model, CrossGET(r=16) if reducer is None else reducer, cross, str(path), previous)
    model.load_state_dict(state)
    return attached


def dassl_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of Dassl's, `model.pth.tar-N`, by its own keys.

    Raises:
        ValueError: there is none, or the file holds other objects than Dassl puts there.
    """
    content = _load_without_objects(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} is not a file of Dassl\'s: expected {{"state_dict": ...}}, found {found}')
    state: dict[str, Tensor] = content["state_dict"]
    return state


def _from_dassl(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Under OpenAI's keys, without the prompts."""
    if not any(name.startswith("image_encoder.") for name in state):
        raise ValueError(
            f"{path} has no image_encoder, it has {llava_format.listed(sorted(state))}: prompts alone go into a prompt "
            "learner, with experiments.coop.prompts.load_dassl"
        )
    renamed = {}
    for name, value in state.items():
        start = next((start for start in _DASSL if name.startswith(start)), "")
        if not name.startswith(_DASSL_PROMPTS):
            renamed[_DASSL.get(start, "") + name[len(start) :]] = value
    return renamed


class _LeftOut:
    """What stands for an object that is not wanted: it takes what the file says about it and forgets it."""

    def __setstate__(self, state: object) -> None:
        pass


@contextlib.contextmanager
def _objects_left_out() -> Iterator[None]:
    """Inside, torch.load with `weights_only=True` passes over Dassl's schedulers, and runs nothing of theirs."""
    stands = [
        type(name, (_LeftOut,), {"__module__": module}) for module, names in _DASSL_OBJECTS.items() for name in names
    ]
    # An optimiser's state is a defaultdict(dict), which is not filled under weights_only=True: it becomes a dict.
    filled = type("defaultdict", (), {"__module__": "collections", "__new__": lambda cls, *of: {}})
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([*stands, filled, dict])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load_without_objects(path: Path) -> Any:
    with _objects_left_out():
        return llava_format.load_pickle(path)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, llava_format.Shape]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _warn_activation(model: nn.Module, path: str) -> None:
    names = {type(module).__name__ for module in model.modules()}
    if "GELU" in names and "QuickGELU" not in names:
        warnings.warn(
            f"{path} was trained with QuickGELU and this model uses GELU, so features will be off: make the model with "
            'a "-quickgelu" name or force_quick_gelu=True',
            stacklevel=4,
        )


# LLaVA ---------------------------------------------------------------------------------------------------------------


def _load_llava(
    model: nn.Module, folder: Path, reducer: Reducer | Mapping[str, Reducer] | None, previous: Attachment | None
) -> Attachment:
    found = llava_format.read_folder(folder)
    found.require_cross_tokens(" from_pretrained and crossget.attach are for that")
    own = llava_format.parameters(model)
    if own[llava_format.HEAD] is own[llava_format.EMBEDDING]:
        raise ValueError(f"the model ties its head to its embeddings, and {folder} has both: tie_word_embeddings=False")
    expected = {
        name: _of_the_first(value, found.stored.get(name), name)
        for name, value in own.items()
        if found.has_tower or not name.startswith(llava_format.TOWER)
    }
    shapes = {name: one.shape for name, one in found.stored.items()}
    llava_format.check_shapes(expected, shapes, str(folder), type(model).__name__)
    _check_settings(model, found)
    towers = {tower.name: (len(tower.blocks), tower.width) for tower in find_towers(model)}
    llava_format.check_cross(found.cross, towers)
    reducer = CrossGET(r=13) if reducer is None else reducer
    attached = attach_with(model, reducer, found.cross_tokens(), str(folder), previous)
    with torch.no_grad():
        for (name, one), value in zip(found.stored.items(), llava_format.tensors(found.stored.values()), strict=True):
            own[name][: one.shape[0]].copy_(value)
    return attached


def _of_the_first(value: Tensor, stored: llava_format.Stored | None, name: str) -> llava_format.Shape:
    """The shape that a parameter's tensor must have: the first tokens may be all that the checkpoint knows."""
    rows = int(value.shape[0])
    if name in llava_format.VOCABULARY and stored is not None and stored.shape:
        rows = min(rows, stored.shape[0])
    return (rows, *value.shape[1:])


def _check_settings(model: Any, found: llava_format.Original) -> None:
    config = model.config
    text = config.text_config
    own = {name: getattr(text, name, None) for name in _UNSEEN_TEXT}
    own["rope_theta"] = own["rope_theta"] or (getattr(text, "rope_parameters", None) or {}).get("rope_theta")
    own.update({name: getattr(config, name) for name in found.settings})
    wanted = {**{name: found.text[name] for name in _UNSEEN_TEXT}, **found.settings}
    differs = [f"{name}: {own[name]!r} for {value!r}" for name, value in wanted.items() if own[name] != value]
    if differs:
        raise ValueError(f"the model is not set up as {found.folder} says: {', '.join(differs)}. Nothing was loaded")
