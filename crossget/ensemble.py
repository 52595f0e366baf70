"""How tokens join: guided, size-weighted and normalised ensembles, and the way back.

Every ensemble takes `tokens` [B, T, C], their `sizes` [B, T] (how many input tokens each stands for), an
`importance` [B, T] and a `Plan`, and returns tokens [B, T - r, C] and sizes [B, T - r]. Sizes are float32 (bfloat16
counts exactly to 256 only) and always sum to what they summed to before. The values carry gradients; sizes and
importance do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crossget.matching import Plan


def guided(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Cross-guided ensemble: in each pair the more important token gets the larger share.

    With y = size * token and (w_a, w_b) = 2 softmax(importance of source a, of destination b):
    y_b + sum over its sources of [w_a y_a + (w_b - 1) y_b], divided by the joint size. This is what the reference
    computes. It is not an average once sizes differ: a constant is not quite preserved; `normalized` is the
    variant that preserves it.

    Source: CrossGET (arXiv 2305.17455), section 3.3; reference implementation.
    """
    destination = _destinations(plan)
    weight = 2 * _pair(importance, plan).softmax(-1)
    mass = tokens * sizes[:, :, None]
    gain = weight[..., :1] * _take(mass, plan.source) + (weight[..., 1:] - 1) * _take(mass, destination)
    mass = _add(mass, destination, gain.to(mass.dtype))
    sizes = _joint(sizes, plan)
    return _divide(_take(mass, plan.kept), sizes, tokens.dtype), sizes


def size(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean; importance is not looked at.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    mass = tokens * sizes[:, :, None]
    mass = _add(mass, _destinations(plan), _take(mass, plan.source))
    sizes = _joint(sizes, plan)
    return _divide(_take(mass, plan.kept), sizes, tokens.dtype), sizes


def normalized(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Convex form of the guided ensemble: the mean of a group, weighted by size * exp(importance).

    Every new token is a weighted average of the tokens it stands for, so constants are preserved. For one pair of
    equal sizes it equals `guided`.
    """
    weight = sizes * (importance - importance.amax(1, keepdim=True)).exp()
    mass = tokens * weight[:, :, None]
    destination = _destinations(plan)
    mass = _add(mass, destination, _take(mass, plan.source))
    weight = weight.scatter_add(1, destination, weight.gather(1, plan.source))
    new = _divide(_take(mass, plan.kept), weight.gather(1, plan.kept), tokens.dtype)
    return new, _joint(sizes, plan)


Ensemble = Callable[[Tensor, Tensor, Tensor, Plan], "tuple[Tensor, Tensor]"]
ENSEMBLES: dict[str, Ensemble] = {"guided": guided, "size": size, "normalized": normalized}


def unmerge(tokens: Tensor, source: Tensor, fill: Tensor | None = None) -> Tensor:
    """Bring reduced tokens back to the grid they came from: each input position gets its group's token.

    Args:
        tokens: [B, N, C] reduced.
        source: [B, T] the token of `tokens` that each input token went into; -1 for one that was dropped.
        fill: [B, 1, C] what dropped tokens get. None says that nothing was dropped: -1 is then an error of the
            indexing.

    Returns:
        [B, T, C].
    """
    if fill is None:
        return _take(tokens, source)
    return torch.where(source[:, :, None] < 0, fill, _take(tokens, source.clamp(min=0)))


def _destinations(plan: Plan) -> Tensor:
    if plan.destination is None:
        raise ValueError("the plan drops its sources: there is nothing to join; use a plan with destinations")
    return plan.destination


def _pair(importance: Tensor, plan: Plan) -> Tensor:
    both = (importance.gather(1, plan.source), importance.gather(1, _destinations(plan)))
    return torch.stack(both, -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _add(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return x.scatter_add(1, index[:, :, None].expand(-1, -1, x.shape[2]), values)


def _joint(sizes: Tensor, plan: Plan) -> Tensor:
    return sizes.scatter_add(1, _destinations(plan), sizes.gather(1, plan.source)).gather(1, plan.kept)


def _divide(mass: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    return (mass / by[:, :, None]).to(dtype)
