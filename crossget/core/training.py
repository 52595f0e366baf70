"""What training a reduced model takes beside the host's own: which parameters are trained."""

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
    """Choose what is trained: gradients are asked for there and nowhere else in the model.

    Args:
        model: whose weights may be trained.
        attached: whose cross tokens are trained; None for a model without.
        train: "cross_tokens" alone; "prompts": the cross tokens and `prompts`; "all": these and the model's weights.
        prompts: learnable context tokens, which need not be parameters of `model`.

    Returns:
        Of "cross_tokens", "prompts" and "weights" those that are trained and not empty, for the groups of an optimiser:
        `[{"params": params, "name": name} for name, params in groups.items()]`. A shared parameter is in one group.

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
