"""How tokens are merged: guided, size-weighted and normalised ensembles, norm correction, and `unmerge`.

A source is a token that is removed; its destination is the token that it is merged into. An ensemble takes `tokens`
[B, T, C], their `sizes` [B, T] (how many input tokens each one stands for), an `importance` [B, T] and a `MergePlan`.
It returns tokens [B, T - r, C] and sizes [B, T - r]. Sizes are float32, as bfloat16 counts exactly to 256 only, and
their sum does not change, but for padding that is dropped. Tokens carry gradients; sizes and importance do not.

An ensemble turns a destination x_b into x_b + sum over its sources a of (taken_a x_a - given_a x_b). It computes only
these two weights, so that tokens are read and written once. A token that nothing is merged into is copied.

Shapes: B batch, T tokens, C channels, r removed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods import kernels
from crossget.methods.indexing import size_of, take
from crossget.methods.matching import MergePlan


def guided(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Cross-guided ensemble: in each pair the more important token gets the larger weight.

    With y = size * token and (w_a, w_b) = 2 softmax(importance of source a, of destination b), the new token is
    y_b + sum over its sources of [w_a y_a + (w_b - 1) y_b], divided by the joint size. The authors' code computes the
    same. Where sizes differ, the weights do not sum to one; those of `normalized` do.

    Source: CrossGET (arXiv 2305.17455), section 3.3; the authors' implementation.
    """
    r = size_of(plan.source, 1)
    pairs = plan.pairs
    scores, pair_sizes = importance.gather(1, pairs), sizes.gather(1, pairs)
    source_size, destination_size = pair_sizes[:, :r], pair_sizes[:, r:]
    joint = _joint(sizes, source_size, plan)
    joint_size = joint.gather(1, plan.new_destination)
    excess = torch.tanh((scores[:, :r] - scores[:, r:]) / 2)  # w_a - 1, and 1 - w_b
    taken = torch.addcmul(source_size, excess, source_size) / joint_size
    given = torch.addcmul(source_size, excess, destination_size) / joint_size
    return _merge(tokens, plan, taken, given), joint


def size(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """The mean of source and destination, weighted by size; importance is ignored.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    source_size = sizes.gather(1, plan.source)
    joint = _joint(sizes, source_size, plan)
    share = source_size / joint.gather(1, plan.new_destination)
    return _merge(tokens, plan, share, share), joint


def normalized(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Convex form of `guided`: the mean of a destination and its sources, weighted by size * exp(importance).

    The weights of every new token sum to one. For one pair of equal sizes it equals `guided`.
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

    A mean of tokens is shorter than the tokens. The LayerNorm that follows rescales it to full norm, sqrt(C). If the
    LayerNorm came before the merge, the norm of the mean would be |sum_i w_i c_i LN(x_i)|, with the weights w_i of the
    ensemble. The ratio of this norm to sqrt(C) is returned. Attention values and MLP outputs are multiplied by it.

    Args:
        tokens: [B, T, C] before they were merged.
        before: [B, T] float32 c_i, what this function returned for these tokens in earlier blocks; None: all are 1.
        plan: the merge, with the weights that the ensemble has set.

    Returns:
        [B, T - r] float32 in [0, 1]; 1 for a token that no other was ever merged into.

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
    normed = F.layer_norm(take(tokens, pairs, plan.numbers).float(), (width,))
    if before is not None:
        normed = normed * before.gather(1, pairs)[:, :, None]
    change = torch.addcmul(
        normed[:, :r] * plan.taken[:, :, None], normed[:, r:], plan.given[:, :, None], value=-1
    ).view(-1, width)
    total = change.new_zeros(unmerged.numel(), width).index_add_(0, plan.rows, change)
    mean = total.index_select(0, plan.rows).view_as(normed[:, r:]) + normed[:, r:]
    norm = mean.norm(dim=-1).div(width**0.5).clamp(max=1)  # above 1 only with the guided ensemble's weights
    corrected = unmerged.scatter(1, plan.new_destination, norm.to(unmerged.dtype))
    if plan.dropped is None:
        return corrected
    merged = plan.without_dropped(torch.ones_like(plan.source, dtype=unmerged.dtype))
    joined = torch.zeros_like(unmerged).scatter_add(1, plan.new_destination, merged)
    return torch.where(joined > 0, corrected, unmerged)


def merge_by(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Merge other features of the same tokens [B, T, C] by a plan: [B, T - r, C].

    Raises:
        ValueError: the ensemble did not set the plan's weights.
    """
    if plan.destination is None:
        return take(tokens, plan.kept, plan.numbers)
    if plan.taken is None or plan.given is None:
        raise ValueError("the method's ensemble does not set MergePlan.taken and MergePlan.given: let it set them")
    return _merge(tokens, plan, plan.taken, plan.given)


def unmerge(tokens: Tensor, source: Tensor, fill: Tensor | None = None) -> Tensor:
    """Expand reduced tokens to the full grid: each input position gets the token that its input token was merged into.

    Args:
        tokens: [B, N, C] reduced tokens.
        source: [B, T] for each input token, the index in `tokens` of the token it was merged into; -1 if it was
            dropped. See `Attachment.source`.
        fill: [B, 1, C] value at the positions of dropped tokens. None: no token was dropped; an index of -1 is then an
            error.

    Returns:
        [B, T, C].
    """
    if fill is None:
        return take(tokens, source)
    return torch.where(source[:, :, None] < 0, fill, take(tokens, source.clamp(min=0)))


def _joint(sizes: Tensor, source_sizes: Tensor, plan: MergePlan) -> Tensor:
    """[B, T - r] the sizes after a merge, from the sizes [B, T] of all tokens and those [B, r] of the sources."""
    return sizes.scatter_add(1, plan.destinations(), plan.without_dropped(source_sizes)).gather(1, plan.kept)


def _merge(tokens: Tensor, plan: MergePlan, taken: Tensor, given: Tensor) -> Tensor:
    """The kept tokens, each with its sources merged into it: x_b + sum over a of (taken_a x_a - given_a x_b).

    Args:
        tokens: [B, T, C].
        plan: a plan with destinations; the weights are stored in it.
        taken: [B, r] float32, the weight of each source.
        given: [B, r] float32, the weight that its destination loses.

    Returns:
        [B, T - r, C].
    """
    taken, given = plan.taken, plan.given = plan.without_dropped(taken), plan.without_dropped(given)
    if kernels.usable(tokens):
        new_destination = plan.without_dropped(plan.new_destination, -1)
        return kernels.pull(tokens, plan.kept, plan.source, plan.destinations(), new_destination, taken, given)
    kept = take(tokens, plan.kept, plan.numbers)
    r, width = size_of(plan.source, 1), size_of(kept, 2)
    pairs = take(tokens, plan.pairs, plan.numbers)
    # The weights are float32, so half precision is summed in float32, too.
    change = pairs[:, :r] * taken[:, :, None]
    change = torch.addcmul(change, pairs[:, r:], given[:, :, None], value=-1).to(tokens.dtype)
    merged = kept.view(-1, width).index_add_(0, plan.rows, change.view(-1, width))
    return merged.view(kept.shape)
