"""How tokens join: guided, size-weighted and normalised ensembles, and the way back.

Every ensemble takes `tokens` [B, T, C], their `sizes` [B, T] (how many input tokens each stands for), an
`importance` [B, T] and a `MergePlan`, and returns tokens [B, T - r, C] and sizes [B, T - r]. Sizes are float32 (bfloat16
counts exactly to 256 only) and always sum to what they summed to before. The values carry gradients; sizes and
importance do not.

All of them move a destination x_b by what its sources x_a ask for, x_b + sum over a of (take_a x_a - give_a x_b), and
differ in the two weights only. So the tokens are read and written once, and those that nobody joins are copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crossget.methods import kernels
from crossget.methods.matching import MergePlan, flat, take


def guided(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Cross-guided ensemble: in each pair the more important token gets the larger share.

    With y = size * token and (w_a, w_b) = 2 softmax(importance of source a, of destination b):
    y_b + sum over its sources of [w_a y_a + (w_b - 1) y_b], divided by the joint size. This is what the reference
    computes. It is not an average once sizes differ: a constant is not quite preserved; `normalized` is the
    variant that preserves it.

    Source: CrossGET (arXiv 2305.17455), section 3.3; reference implementation.
    """
    r = int(plan.source.shape[1])
    pairs = plan.pairs
    scores, masses = importance.gather(1, pairs), sizes.gather(1, pairs)
    mine, other = masses[:, :r], masses[:, r:]
    joint = _joint(sizes, mine, plan)
    whole = joint.gather(1, plan.arrived)
    lean = torch.tanh((scores[:, :r] - scores[:, r:]) / 2)  # w_a - 1, and 1 - w_b
    return _pull(tokens, plan, torch.addcmul(mine, lean, mine) / whole, torch.addcmul(mine, lean, other) / whole), joint


def size(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean; importance is not looked at.

    Source: ToMe (arXiv 2210.09461), section 3.
    """
    mine = sizes.gather(1, plan.source)
    joint = _joint(sizes, mine, plan)
    share = mine / joint.gather(1, plan.arrived)
    return _pull(tokens, plan, share, share), joint


def normalized(tokens: Tensor, sizes: Tensor, importance: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Convex form of the guided ensemble: the mean of a group, weighted by size * exp(importance).

    Every new token is a weighted average of the tokens it stands for, so constants are preserved. For one pair of
    equal sizes it equals `guided`.
    """
    weights = sizes * (importance - importance.amax(1, keepdim=True)).exp()
    mine = weights.gather(1, plan.source)
    share = mine / _joint(weights, mine, plan).gather(1, plan.arrived)
    return _pull(tokens, plan, share, share), _joint(sizes, sizes.gather(1, plan.source), plan)


Ensemble = Callable[[Tensor, Tensor, Tensor, MergePlan], "tuple[Tensor, Tensor]"]
ENSEMBLES: dict[str, Ensemble] = {"guided": guided, "size": size, "normalized": normalized}


@torch.no_grad()
def norm_correction(tokens: Tensor, before: Tensor | None, plan: MergePlan) -> Tensor:
    """How far the members of each new token point in one direction: the length of the mean of their directions.

    A layer norm brings every token to one length, a mean as well, though the mean of what it makes of the members is
    shorter: |sum_i w_i c_i LN(x_i)| / sqrt(C), with the shares w_i that the ensemble gave them. What is linear in the
    normed token, a value of the attention, is too long by that factor.

    Args:
        tokens: [B, T, C] that an ensemble has joined.
        before: [B, T] float32 their own norm_correction c_i; None: all one.
        plan: with which.

    Returns:
        [B, T - r] float32 in [0, 1]; 1 for a token that stands for itself.
    """
    stay = plan.kept.new_ones(plan.kept.shape, dtype=torch.float32) if before is None else before.gather(1, plan.kept)
    if plan.destination is None or plan.taken is None or plan.given is None:
        return stay
    pairs, r, width = plan.pairs, int(plan.source.shape[1]), int(tokens.shape[2])
    normed = F.layer_norm(take(tokens, pairs).float(), (width,))
    if before is not None:
        normed = normed * before.gather(1, pairs)[:, :, None]
    change = normed * torch.cat([plan.taken, -plan.given], 1)[:, :, None]
    rows = flat(torch.cat([plan.arrived, plan.arrived], 1), int(stay.shape[1]))
    pulled = change.new_zeros(stay.numel(), width).index_add_(0, rows, change.view(-1, width))
    joined = take(pulled.view(*stay.shape, width), plan.arrived) + normed[:, r:]
    length = joined.norm(dim=-1).div(width**0.5).clamp(max=1)  # the guided ensemble is no average
    return stay.scatter(1, plan.arrived, length)


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
        return take(tokens, source)
    return torch.where(source[:, :, None] < 0, fill, take(tokens, source.clamp(min=0)))


def _joint(sizes: Tensor, leaving: Tensor, plan: MergePlan) -> Tensor:
    """[B, T - r] the sizes of the groups; `leaving` [B, r] are those of the sources."""
    return sizes.scatter_add(1, plan.joined, leaving).gather(1, plan.kept)


def _pull(tokens: Tensor, plan: MergePlan, taken: Tensor, given: Tensor) -> Tensor:
    """The tokens that stay, each moved by its sources: x_b + sum over a of (taken_a x_a - given_a x_b).

    Args:
        tokens: [B, T, C].
        plan: with destinations.
        taken: [B, r] float32, of each source.
        given: [B, r] float32, of its destination.

    Returns:
        [B, T - r, C].
    """
    plan.taken, plan.given = taken, given
    if kernels.usable(tokens):
        return kernels.pull(tokens, plan.kept, plan.source, plan.joined, plan.arrived, taken, given)
    stay = take(tokens, plan.kept)
    left, r, width = int(stay.shape[1]), int(plan.source.shape[1]), int(stay.shape[2])
    both = take(tokens, plan.pairs)
    # In float32 for half precision, as the weights are.
    change = both[:, :r] * taken[:, :, None]
    change = torch.addcmul(change, both[:, r:], given[:, :, None], value=-1).to(tokens.dtype)
    joined = stay.view(-1, width).index_add_(0, flat(plan.arrived, left), change.view(-1, width))
    return joined.view(stay.shape)
