"""Choosing the parameters that are trained in a reduced model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from crossget.core.attachment import Attachment

Trained = Literal["cross_tokens", "prompts", "all"]


def parameter_groups(
    model: nn.Module,
    attached: Attachment | None = None,
    *,
    train: Trained = "all",
    prompts: Iterable[nn.Parameter] = (),
) -> dict[str, list[nn.Parameter]]:
    """Choose the parameters that are trained. `requires_grad` is set to True for these, and to False for all others.

    Args:
        model: the model whose weights may be trained.
        attached: the handle of the attached model, whose cross tokens are trained; None: there are none.
        train: "cross_tokens": these only; "prompts": the cross tokens and `prompts`; "all": these and the model's
            weights.
        prompts: learnable context tokens, which need not be parameters of `model`.

    Returns:
        The trained parameters in up to three groups, "cross_tokens", "prompts" and "weights", without empty ones and
        without duplicates. `[{"params": params, "name": name} for name, params in groups.items()]` are the groups of an
        optimiser.

    Raises:
        ValueError: nothing would be trained.
    """
    cross = [] if attached is None else list(attached.parameters())
    context = list(prompts)
    apart = {id(parameter) for parameter in (*cross, *context)}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    chosen = {
        "cross_tokens": cross,
        "prompts": context if train in ("prompts", "all") else [],
        "weights": weights if train == "all" else [],
    }
    groups = {name: parameters for name, parameters in chosen.items() if parameters}
    if not groups:
        raise ValueError(
            f"train={train!r} leaves nothing to train: the model has {len(cross)} cross token parameters and "
            f"{len(context)} prompts were given; attach CrossGET, or train='all'"
        )
    trained = {id(parameter) for parameters in groups.values() for parameter in parameters}
    for parameter in (*cross, *context, *weights):
        parameter.requires_grad_(id(parameter) in trained)
    return groups
