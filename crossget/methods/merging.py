"""How tokens are merged: guided, size-weighted and normalised ensembles, norm correction, and the way back.

Every ensemble takes `tokens` [B, T, C], their `sizes` [B, T] (how many input tokens each stands for), an
`importance` [B, T] and a `MergePlan`, and returns tokens [B, T - r, C] and sizes [B, T - r]. Sizes are float32
(bfloat16 counts exactly to 256 only), and their sum does not change. The values carry gradients; sizes and importance
do not.

Every ensemble turns a destination x_b into x_b + sum over its sources a of (taken_a x_a - given_a x_b), and computes
only these two weights. So tokens are read and written once, and tokens that nothing is merged into are copied.

Shapes: B batch, T tokens, C channels, r removed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods import kernels
from crossget.methods.indexing import flat, size_of, take
from crossget.methods.matching import MergePlan


def guided(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Cross-guided ensemble: in each pair the more important token gets the larger weight.

    With y = size * token and (w_a, w_b) = 2 softmax(importance of source a, of destination b), the new token is
    y_b + sum over its sources of [w_a y_a + (w_b - 1) y_b], divided by the joint size. The reference computes this.
    It is no weighted average where sizes differ: a constant is not quite preserved. `normalized` preserves it.

    Source: CrossGET (arXiv 2305.17455), section 3.3; reference implementation.
    """
    r = size_of(plan.source, 1)
    pairs = plan.pairs
    scores, pair_sizes = importance.gather(1, pairs), sizes.gather(1, pairs)
    source_size, destination_size = pair_sizes[:, :r], pair_sizes[:, r:]
    joint = _joint(sizes, source_size, plan)
    whole = joint.gather(1, plan.new_destination)
    lean = torch.tanh((scores[:, :r] - scores[:, r:]) / 2)  # w_a - 1, and 1 - w_b
    taken = torch.addcmul(source_size, lean, source_size) / whole
    given = torch.addcmul(source_size, lean, destination_size) / whole
    return _merge(tokens, plan, taken, given), joint


def size(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean; importance is ignored.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    source_size = sizes.gather(1, plan.source)
    joint = _joint(sizes, source_size, plan)
    share = source_size / joint.gather(1, plan.new_destination)
    return _merge(tokens, plan, share, share), joint


def normalized(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Convex form of the guided ensemble: the mean of a group, weighted by size * exp(importance).

    Every new token is a weighted average of the tokens it stands for, so constants are preserved. For one pair of
    equal sizes it equals `guided`.
    """
    weights = sizes * (importance - importance.amax(1, keepdim=True)).exp()
    source_weight = weights.gather(1, plan.source)
    share = source_weight / _joint(weights, source_weight, plan).gather(1, plan.new_destination)
    return _merge(tokens, plan, share, share), _joint(sizes, sizes.gather(1, plan.source), plan)


Ensemble = Callable[[Tensor, Tensor, Tensor, MergePlan], "tuple[Tensor, Tensor]"]
ENSEMBLES: dict[str, Ensemble] = {"guided": guided, "size": size, "normalized": normalized}


@torch.no_grad()
def norm_correction(tokens: Tensor, before: Tensor | None, plan: MergePlan) -> Tensor:
    """The norm of the mean direction of the tokens that each new token was merged from.

    LayerNorm rescales the (shorter) mean of merged tokens to full norm. The mean of the normed tokens themselves has a
    norm of |sum_i w_i c_i LN(x_i)| / sqrt(C), with the weights w_i of the ensemble, where full norm is 1. So what
    follows the LayerNorm is too large by the inverse of that: values and MLP outputs are multiplied by this norm.

    Args:
        tokens: [B, T, C] before they were merged.
        before: [B, T] float32 c_i, this function's results for `tokens`; None: all one.
        plan: after an ensemble has set its weights.

    Returns:
        [B, T - r] float32 in [0, 1]; 1 for a token that nothing was ever merged into.

    Raises:
        ValueError: the ensemble did not set the plan's weights.
    """
    unmerged = torch.ones_like(plan.kept, dtype=torch.float32) if before is None else before.gather(1, plan.kept)
    if plan.destination is None:
        return unmerged
    if plan.taken is None or plan.given is None:
        raise ValueError(
            "norm_correction=True needs the weights of every merge, and this method's ensemble does not set "
            "MergePlan.taken and MergePlan.given: let it set them, or use norm_correction=False"
        )
    pairs, r, width = plan.pairs, size_of(plan.source, 1), size_of(tokens, 2)
    normed = F.layer_norm(take(tokens, pairs).float(), (width,))
    if before is not None:
        normed = normed * before.gather(1, pairs)[:, :, None]
    change = normed * torch.cat([plan.taken, -plan.given], 1)[:, :, None]
    rows = flat(torch.cat([plan.new_destination, plan.new_destination], 1), size_of(unmerged, 1))
    total = change.new_zeros(unmerged.numel(), width).index_add_(0, rows, change.view(-1, width))
    mean = take(total.view(*unmerged.shape, width), plan.new_destination) + normed[:, r:]
    norm = mean.norm(dim=-1).div(width**0.5).clamp(max=1)  # above 1 only where the guided ensemble is no average
    return unmerged.scatter(1, plan.new_destination, norm.to(unmerged.dtype))


def unmerge(tokens: Tensor, source: Tensor, fill: Tensor | None = None) -> Tensor:
    """Bring reduced tokens back to the grid they came from: each input position gets the token it was merged into.

    Args:
        tokens: [B, N, C] reduced.
        source: [B, T] the token of `tokens` that each input token was merged into; -1 for one that was dropped.
        fill: [B, 1, C] what positions of dropped tokens get. None says that no token was dropped; -1 in `source` is
            then an error of the indexing.

    Returns:
        [B, T, C].
    """
    if fill is None:
        return take(tokens, source)
    return torch.where(source[:, :, None] < 0, fill, take(tokens, source.clamp(min=0)))


def _joint(sizes: Tensor, source_sizes: Tensor, plan: MergePlan) -> Tensor:
    """[B, T - r] the sizes of the tokens that stay, from `sizes` [B, T] of all and `source_sizes` [B, r]."""
    return sizes.scatter_add(1, plan.destinations(), source_sizes).gather(1, plan.kept)


def _merge(tokens: Tensor, plan: MergePlan, taken: Tensor, given: Tensor) -> Tensor:
    """The tokens that stay, each with its sources merged in: x_b + sum over a of (taken_a x_a - given_a x_b).

    Args:
        tokens: [B, T, C].
        plan: with destinations.
        taken: [B, r] float32, weight of each source.
        given: [B, r] float32, what its destination loses in weight.

    Returns:
        [B, T - r, C].
    """
    plan.taken, plan.given = taken, given
    if kernels.usable(tokens):
        return kernels.pull(tokens, plan.kept, plan.source, plan.destinations(), plan.new_destination, taken, given)
    kept = take(tokens, plan.kept)
    left, r, width = size_of(kept, 1), size_of(plan.source, 1), size_of(kept, 2)
    pairs = take(tokens, plan.pairs)
    # In float32 for half precision, as the weights are.
    change = pairs[:, :r] * taken[:, :, None]
    change = torch.addcmul(change, pairs[:, r:], given[:, :, None], value=-1).to(tokens.dtype)
    merged = kept.view(-1, width).index_add_(0, flat(plan.new_destination, left), change.view(-1, width))
    return merged.view(kept.shape)
