"""Attaching a reducer to a model, in place: `attach`, `load`, `find_towers`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from crossget.core import saving
from crossget.core.adapters import absent_towers, adapted_towers, has_adapter, reason_against
from crossget.core.attachment import Attachment, attach_towers, marked
from crossget.core.block_class import owner_of
from crossget.core.connector import AttachedConnector, Connector
from crossget.core.discovery import FoundTowers, discover, warn_about
from crossget.core.example_inputs import example_inputs
from crossget.core.inputs import AnyInputs
from crossget.core.merge_units import AttachedUnits, UnitTower
from crossget.core.tower_choice import by_tower, split_connector
from crossget.methods.reducers import Reducer

_MOST_REASONS = 10  # in an error


def find_towers(model: nn.Module, inputs: AnyInputs | None = None) -> FoundTowers:
    """The towers of a model, which `attach` reduces.

    The towers of a model with an adapter are those that the adapter lists, and no forward runs. In any other model
    they are found by watching a forward, and proved by further ones (`crossget.core.discovery`). The result is a list
    of `Tower`. Printed, it says what is known about each, and what cannot be reduced and why. `crossget.register`
    takes it, so that later no forward is needed.

    Args:
        model: an instance of `nn.Module`, not attached. Of a compiled, data-parallel, averaged or PEFT model, it is the
            model inside.
        inputs: what a model without adapter is run on: a tensor, a tuple of positional arguments, a mapping of keyword
            arguments, or a function that runs the model. Give two different images (texts, clips) or more. None: random
            images, for models of timm, open_clip, torchvision and transformers whose configuration tells their size.

    Raises:
        TypeError: nothing in the model can be reduced (the message says why), or `inputs` is None and no inputs are
            known for the model.
        RuntimeError: the adapter found nothing to reduce.
    """
    model = unwrapped(model)
    if has_adapter(model):
        try:
            return FoundTowers(adapted_towers(model))
        except TypeError:  # a part of the model has none
            if inputs is None:
                raise
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    reason, given = reason_against(model), inputs
    if inputs is None:
        inputs = None if reason else example_inputs(model)
    if inputs is None:
        inner = next((path for path, module in model.named_modules() if path and has_adapter(module)), None)
        if inner is not None and not reason:
            raise TypeError(
                f"cannot reduce {name}: it has no adapter, but {type(model.get_submodule(inner)).__qualname__} in it "
                f"has one. Attach to that, as in crossget.attach(model.get_submodule({inner!r}), reducer); or give two "
                "different images as inputs=, to look for towers in a forward of the whole"
            )
        raise TypeError(
            f"cannot reduce {name}: {reason or 'it has no adapter, and no inputs are known for it'}. Give two "
            "different images, as in crossget.attach(model, reducer, inputs=images), to look for its towers in a "
            "forward; or write an adapter with crossget.register (docs/backbones.md)"
        )
    try:
        found = discover(model, inputs)
    except Exception as error:  # the host's own code, on inputs that were made for it
        if given is not None:
            raise
        raise TypeError(
            f"cannot reduce {name}: it has no adapter, and it does not run on random inputs of its kind "
            f"({type(error).__name__}: {error}). Give two different images, as in crossget.attach(model, reducer, "
            "inputs=images), to look for its towers in a forward"
        ) from error
    if not found:
        lines = str(found).splitlines() or ["no two modules pass one sequence of tokens from each to the next"]
        more = [f"and {len(lines) - _MOST_REASONS} more"] if len(lines) > _MOST_REASONS else []
        reasons = "\n".join([*lines[:_MOST_REASONS], *more])
        raise TypeError(
            f"cannot reduce {name}{': ' * bool(reason)}{reason}: in a forward on the given inputs, no tower was found "
            f"that can be reduced:\n{reasons}\n"
            "If its blocks do pass one sequence [B, T, C], write an adapter with crossget.register (docs/backbones.md)"
        )
    return found


def attach(model: nn.Module, reducer: Reducer | Mapping[str, Reducer], inputs: AnyInputs | None = None) -> Attachment:
    """Attach a reducer to a model, in place: its tokens are reduced from the next forward on.

    Args:
        model: any model of images, text or audio with transformer blocks, see `crossget.find_towers`.
        reducer: one for the model, or a dict by tower name. A single reducer on a model with several towers reduces the
            image tower. If it has a cross token, the other towers get one, too, with r = 0, as in the authors' code.
            The name "connector" is for the image features that a language model gets, see `crossget.Keep`.
        inputs: two different inputs for a model without adapter, see `crossget.find_towers`.

    Returns:
        The handle. `Attachment.detach` undoes it, and so does the end of `with` on the handle.

    Raises:
        TypeError: the model is not supported (the message says why), or `reducer` is not a reducer.
        ValueError: the model is attached already, a tower's name is unknown, or the reducer cannot work on the tower.
        RuntimeError: the adapter found nothing to reduce.

    Warns:
        DiscoveryWarning: the model has no adapter. It says what was found, proved and assumed.
    """
    check_not_attached(model)
    behind, reducer = split_connector(reducer)
    units, reducer = _attached_units(model, reducer) if inputs is None else (None, reducer)
    connector = None
    if behind is not None:
        named = set(reducer) if isinstance(reducer, Mapping) else {"visual"} if reducer is not None else set()
        connector = AttachedConnector(
            find_connector(model), behind, has_copies=units is not None,
            tower_reduced=units is not None or "visual" in named,
        )  # fmt: skip
    if reducer is None:
        return attach_towers([], {}, connector, units)
    found = find_towers(model, inputs)
    chosen = by_tower({tower.name: tower for tower in found}, reducer, absent_towers(model))
    attached = attach_towers(found, chosen, connector)
    if found.discovered:
        warn_about(model, found)
    return attached


def _attached_units(model: nn.Module, reducer: Any) -> tuple[AttachedUnits | None, Any]:
    """The packed tower with merge units, if the reducer is for one, and what is for other towers (None: nothing is)."""
    model = unwrapped(model)
    if reducer is None or has_adapter(model) or not _is_of_transformers(model):
        return None, reducer
    units: UnitTower | None = importlib.import_module("crossget.integrations.hf_units").find_units(model)
    if units is None or (isinstance(reducer, Mapping) and "visual" not in reducer):
        return None, reducer
    if isinstance(reducer, Mapping):
        others = sorted(set(reducer) - {"visual"})
        if others:
            raise ValueError(f"reducer names the towers {others}: {type(model).__name__} has ['connector', 'visual']")
        reducer = reducer["visual"]
    if not isinstance(reducer, Reducer):
        raise TypeError(f"reducer is {reducer!r}: give a reducer such as crossget.Ward(crossget.Ratio(0.1))")
    return AttachedUnits(units, reducer), None


def _is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(model).__mro__)


def find_connector(model: nn.Module) -> Connector:
    """The connector of a model of images and text.

    Raises:
        TypeError: none is known; the message says why.
    """
    model = unwrapped(model)
    if _is_of_transformers(model):
        found: Connector = importlib.import_module("crossget.integrations.hf_connector").find_connector(model)
        return found
    raise TypeError(f"{type(model).__name__} has no known connector: those of models of transformers can be reduced")


def check_not_attached(model: nn.Module) -> None:
    """Check that a model is not attached.

    Raises:
        ValueError: it is.
    """
    previous = find_attachment(model)
    if previous is not None:
        raise ValueError(
            f"already attached: {previous}. Call .detach() on the handle that attach returned (or "
            "crossget.attachment(model).detach()), or set its .reducer"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a wrapper that runs it unchanged.

    Such wrappers are those of torch.compile, DataParallel and DistributedDataParallel, torch's AveragedModel, and a
    PEFT model.
    """
    while True:
        inner: Any = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, nn.DataParallel | DistributedDataParallel | AveragedModel):
            inner = model.module
        elif type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "get_base_model"):
            inner = cast("Any", model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def find_attachment(model: nn.Module) -> Attachment | None:
    """The model's attachment; None if it has none."""
    owners = (owner for module in model.modules() for owner in (owner_of(module), marked(module)))
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


def attachment(model: nn.Module) -> Attachment:
    """The handle of an attached model. Use it for a copy or an unpickled model, for example.

    Raises:
        ValueError: the model is not attached.
    """
    found = find_attachment(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not attached: call crossget.attach(model, reducer) first")
    return found


def load(model: nn.Module, folder: str | Path, inputs: AnyInputs | None = None) -> Attachment:
    """Attach the reducers and cross tokens that `Attachment.save` has written.

    Args:
        model: a model of the same architecture, not attached.
        folder: a local folder, or the id of a repository on the Hugging Face hub.
        inputs: two different inputs for a model without adapter, as for `crossget.attach`.

    Returns:
        The handle, as from `crossget.attach`.

    Raises:
        FileNotFoundError: the folder has no `crossget.safetensors`.
        ValueError: the model is attached already, or the file is damaged, was written by a newer version, names an
            unknown method, or does not fit the model.
        TypeError: the model is not supported.
    """
    check_not_attached(model)
    reducers, weights, where = saving.read(folder)
    try:
        return attach_with(model, reducers, weights, where, inputs=inputs)
    except ValueError as error:
        raise ValueError(f"cannot attach {where}: {error}") from error


def attach_with(
    model: nn.Module,
    reducer: Reducer | Mapping[str, Reducer],
    cross_tokens: Mapping[str, Tensor],
    where: str,
    previous: Attachment | None = None,
    inputs: AnyInputs | None = None,
) -> Attachment:
    """Attach a reducer and set its cross tokens. If they do not fit the model, it stays detached.

    Args:
        model: the model.
        reducer: as for `crossget.attach`.
        cross_tokens: per tower [L, C].
        where: the source of the cross tokens, for messages.
        previous: the handle of a model that is attached already. Only its cross tokens are set.
        inputs: as for `crossget.attach`.

    Returns:
        The handle.

    Raises:
        ValueError: the cross tokens of a tower are missing or have another shape, or there are some for a tower that is
            not attached.
    """
    attached = previous or attach(model, reducer, inputs)
    try:
        _set_cross_tokens(attached, cross_tokens, where)
    except ValueError:
        if previous is None:
            attached.detach()
        raise
    return attached


def _set_cross_tokens(attached: Attachment, weights: Mapping[str, Tensor], where: str) -> None:
    """See `attach_with`."""
    expected = {name: tuple(p.shape) for name, p in attached.cross_tokens.items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if name in expected or name in attached.towers}
    unknown = sorted(set(weights) - set(attached.towers))
    if unknown or any(found.get(name) != shape for name, shape in expected.items()):
        raise ValueError(f"{where} has cross tokens {found} {unknown or ''}: this attachment needs {expected}")
    attached.set_cross_tokens({name: weights[name] for name in expected})
