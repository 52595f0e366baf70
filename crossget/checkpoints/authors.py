"""Load the checkpoints of the authors' reference implementation into an existing model of open_clip or transformers.

Where there is no model yet, the command `crossget convert` makes a folder for transformers out of a LLaVA checkpoint.
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
from crossget.core import files
from crossget.core.attach import attach_with, find_attachment, find_towers
from crossget.core.attachment import Attachment
from crossget.methods.reducers import CrossGET, Reducer

_CLIP_CROSS = {"visual": "visual.transformer.cross_image", "text": "transformer.cross_text"}
# Archives of OpenAI's models carry these integers beside the weights.
_OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}
# Prefixes in checkpoints of the reference's CoOp (saved by Dassl) -> CLIP's own. They contain no token embedding.
_DASSL = {"image_encoder.": "visual.", "text_encoder.": "", "logit_scale": "logit_scale"}
_DASSL_PROMPTS, _EMBEDDING = "prompt_learner.", "token_embedding.weight"
_KINDS = 'CLIP checkpoint of the reference: expected {"model": state_dict} or Dassl\'s {"state_dict": state_dict}'
# Classes that such a checkpoint may have pickled: the scheduler and, through it, the optimiser.
_DASSL_OBJECTS = {
    "torch.optim.lr_scheduler": ("CosineAnnealingLR", "StepLR", "MultiStepLR"),
    "torch.optim.sgd": ("SGD",),
    "torch.optim.adam": ("Adam",),
    "torch.optim.adamw": ("AdamW",),
}
# Settings that change the outputs of a LLaVA and cannot be told from the shapes of its weights.
_TEXT_SETTINGS = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act")


def load_reference(
    model: nn.Module, path: str | Path, reducer: Reducer | Mapping[str, Reducer] | None = None
) -> Attachment:
    """Load a checkpoint of the reference implementation, and attach.

    - CLIP, into open_clip's: a file `{"model": state_dict}` with OpenAI's key names plus the cross tokens of both
      towers. The reference uses r = 16 in the vision tower and 0 in the text tower. Or the file that Dassl saves for
      the reference's CoOp, `{"state_dict": ...}`: its prompts are loaded by `experiments.coop.prompts.load_dassl`, and
      the token embedding, which it lacks, stays the model's.
    - LLaVA, into transformers' LlavaForConditionalGeneration: a folder in LLaVA's original layout with
      `cross_tokens.bin` (or with the cross tokens among the weights), LoRA merged. The reference uses r = 13 in the
      vision tower. If the folder has no vision tower, the model keeps its own. If the model has a larger vocabulary
      than the checkpoint, the embeddings and the head of the additional tokens stay the model's.

    Checkpoints do not contain r. An attached model keeps its reducers; otherwise `reducer` is attached; without it,
    CrossGET with the reference's r.

    Args:
        model: of the same architecture (OpenAI's CLIPs use QuickGELU: "ViT-B-16-quickgelu" in open_clip).
        path: the checkpoint. Only tensors are loaded; no pickled code runs.
        reducer: as for `crossget.attach`.

    Returns:
        The attachment. The model has the checkpoint's weights.

    Raises:
        TypeError: the model is neither.
        FileNotFoundError: a file is missing.
        ValueError: keys are missing, unexpected or of another shape (the message names them), weights are sparse,
            quantised, without numbers or not finite, a file is damaged, the checkpoint is of another kind, or `reducer`
            is given for an attached model. Nothing is loaded or attached then: all is checked before the first weight
            is changed.
    """
    previous = find_attachment(model)
    if previous is not None and reducer is not None:
        raise ValueError(
            "the model is attached, so `reducer` would be ignored: detach it first, or leave `reducer` out"
        )
    hollow = [name for name, value in model.state_dict(keep_vars=True).items() if value.is_meta]
    if hollow:
        raise ValueError(
            f"the model has weights on the meta device, which cannot be loaded: {llava_format.abbreviated(hollow)}; "
            "load the checkpoint before the model is offloaded"
        )
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{path} is neither a file (a CLIP of the reference) nor a folder (a LLaVA)")
    if _is(model, "transformers.models.llava.", "LlavaForConditionalGeneration"):
        if source.is_file():
            raise ValueError(f"{path} is a file, but the model is a LLaVA: give the folder of the checkpoint")
        return _load_llava(model, source, reducer, previous)
    if _is(model, "open_clip.", "CLIP"):
        if source.is_dir():
            raise ValueError(f"{path} is a folder, but the model is a CLIP: give the checkpoint file")
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
    content = _load_tensors(path)
    # Without cross tokens that `Attachment.register_parameters` has put among the model's parameters.
    crosses = {id(value) for value in previous.parameters()} if previous else set()
    own = {n: value.detach() for n, value in model.state_dict(keep_vars=True).items() if id(value) not in crosses}
    if isinstance(content, dict) and "model" in content:
        given = _state_in(content, "model", path)
        state = {name: value for name, value in given.items() if name not in _OPENAI_EXTRAS}
    else:
        state = _from_dassl(_state_in(content, "state_dict", path), path)
        state[_EMBEDDING] = own[_EMBEDDING]
    cross = {tower: state.pop(key) for tower, key in _CLIP_CROSS.items() if key in state}
    missing = [key for tower, key in _CLIP_CROSS.items() if tower not in cross]
    llava_format.check_shapes(_shapes(own), _shapes(state), str(path), type(model).__name__, missing=missing)
    _check_values({**state, **{_CLIP_CROSS[tower]: value for tower, value in cross.items()}}, own, path)
    towers = {tower.name: tower for tower in find_towers(model)}
    for name, value in cross.items():
        shape = (1, len(towers[name].blocks), towers[name].width)
        if tuple(value.shape) != shape:
            raise ValueError(f"{path}: {_CLIP_CROSS[name]} has shape {tuple(value.shape)}, the tower needs {shape}")
    _warn_activation(model, str(path))
    cross = {tower: value.squeeze(0) for tower, value in cross.items()}
    attached = attach_with(model, CrossGET(r=16) if reducer is None else reducer, cross, str(path), previous)
    model.load_state_dict(state, strict=False)  # the keys have been checked
    return attached


def _state_in(content: Any, key: str, path: Path, kind: str = _KINDS) -> dict[str, Tensor]:
    """The state dict under a key of a file.

    Raises:
        ValueError: there is none.
    """
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is not a {kind}, found {found}")
    others = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    if others:
        raise ValueError(f"{path} has entries that are not tensors: {llava_format.abbreviated(others)}")
    return state


def _check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise where tensors cannot be weights.

    Raises:
        ValueError: the message names them.
    """
    bad = []
    for name, value in state.items():
        counts = name in own and not own[name].is_floating_point()  # such as the batches that a BatchNorm has seen
        reason = files.reason_against(value.float() if counts and value.dtype == own[name].dtype else value)
        if reason:
            bad.append(f"{name} is {reason}")
    if bad:
        raise ValueError(f"{path}: {llava_format.abbreviated(bad)}. Nothing was loaded")


def dassl_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file that Dassl saved, `model.pth.tar-N`, under its own keys.

    Raises:
        ValueError: there is none, or the file contains other objects than Dassl saves.
    """
    return _state_in(
        _load_tensors(Path(path)), "state_dict", Path(path), 'file of Dassl\'s: expected {"state_dict": ...}'
    )


def _from_dassl(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict under OpenAI's keys, without the prompts."""
    if not any(name.startswith("image_encoder.") for name in state):
        raise ValueError(
            f"{path} has no image_encoder, only {llava_format.abbreviated(sorted(state))}: load prompts without a "
            "model with experiments.coop.prompts.load_dassl"
        )
    renamed = {}
    for name, value in state.items():
        start = next((start for start in _DASSL if name.startswith(start)), "")
        if not name.startswith(_DASSL_PROMPTS):
            renamed[_DASSL.get(start, "") + name[len(start) :]] = value
    return renamed


class _Ignored:
    """Replaces a pickled object that is not needed: it accepts the object's state and drops it."""

    def __setstate__(self, state: object) -> None:
        pass


@contextlib.contextmanager
def _ignore_training_state() -> Iterator[None]:
    """Inside, torch.load with `weights_only=True` skips Dassl's schedulers and runs none of their code."""
    replacements = [
        type(name, (_Ignored,), {"__module__": module}) for module, names in _DASSL_OBJECTS.items() for name in names
    ]
    # The state of an optimiser is a defaultdict(dict), which weights_only=True cannot fill: it is loaded as a dict.
    plain_dict = type("defaultdict", (), {"__module__": "collections", "__new__": lambda cls, *args: {}})
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([*replacements, plain_dict, dict])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load_tensors(path: Path) -> Any:
    with _ignore_training_state():
        return files.load_pickle(path)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, llava_format.Shape]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _warn_activation(model: nn.Module, path: str) -> None:
    names = {type(module).__name__ for module in model.modules()}
    if "GELU" in names and "QuickGELU" not in names:
        warnings.warn(
            f"{path} was trained with QuickGELU, but this model uses GELU, so its features will be wrong: create the "
            'model with a "-quickgelu" name or with force_quick_gelu=True',
            stacklevel=4,
        )


# LLaVA ---------------------------------------------------------------------------------------------------------------


def _load_llava(
    model: Any, folder: Path, reducer: Reducer | Mapping[str, Reducer] | None, previous: Attachment | None
) -> Attachment:
    source = llava_format.inspect_folder(folder)
    source.require_cross_tokens(" use from_pretrained and crossget.attach")
    own = llava_format.parameters(model)
    if own[llava_format.HEAD] is own[llava_format.EMBEDDING]:
        raise ValueError(
            f"the model ties its head to its embeddings, but {folder} has both: set tie_word_embeddings=False"
        )
    expected = {
        name: _expected_shape(value, source.stored.get(name), name)
        for name, value in own.items()
        if source.has_tower or not name.startswith(llava_format.TOWER)
    }
    shapes = {name: item.shape for name, item in source.stored.items()}
    llava_format.check_shapes(expected, shapes, str(folder), type(model).__name__)
    _check_settings(model, source)
    source.check_layer(model.config.vision_config.num_hidden_layers)
    towers = {tower.name: (tower.depth, tower.width) for tower in find_towers(model)}
    llava_format.check_cross_tokens(source.cross, towers)
    for _ in llava_format.load_tensors(source.stored.values()):
        pass  # raises where numbers are not finite, before anything is changed
    reducer = CrossGET(r=13) if reducer is None else reducer
    attached = attach_with(model, reducer, source.cross_tokens(), str(folder), previous)
    with torch.no_grad():
        for (name, item), value in zip(
            source.stored.items(), llava_format.load_tensors(source.stored.values()), strict=True
        ):
            own[name][: item.shape[0]].copy_(value)
    return attached


def _expected_shape(value: Tensor, stored: llava_format.StoredTensor | None, name: str) -> llava_format.Shape:
    """The shape that the checkpoint's tensor must have; its vocabulary may be smaller than the model's."""
    rows = int(value.shape[0])
    if name in llava_format.VOCABULARY and stored is not None and stored.shape:
        rows = min(rows, stored.shape[0])
    return (rows, *value.shape[1:])


def _check_settings(model: Any, source: llava_format.LlavaFolder) -> None:
    config = model.config
    text = config.text_config
    own = {name: getattr(text, name, None) for name in _TEXT_SETTINGS}
    own["rope_theta"] = own["rope_theta"] or (getattr(text, "rope_parameters", None) or {}).get("rope_theta")
    own.update({name: getattr(config, name) for name in source.settings})
    wanted = {**{name: source.text[name] for name in _TEXT_SETTINGS}, **source.settings}
    differs = [f"{name} is {own[name]!r}, expected {value!r}" for name, value in wanted.items() if own[name] != value]
    if differs:
        raise ValueError(
            f"the model's configuration differs from {source.folder}: {', '.join(differs)}. Nothing was loaded"
        )
