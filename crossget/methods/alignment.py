"""The alignment loss: it draws the cross tokens of two towers together, in the joint space of both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Literal["reference", "jensen_shannon"]


def alignment_loss(first: Tensor, second: Tensor, divergence: Divergence = "reference") -> Tensor:
    """Divergence between the projected cross tokens of two towers, averaged over layers.

    Args:
        first: [L1, B, E] cross tokens of each block of one tower, projected into the joint space.
        second: [L2, B, E] the same for the other tower. If L1 and L2 differ, the layers of the smaller tower are
            repeated.
        divergence: "reference" is (KL(m||a) + KL(m||b)) / 2 with m the mean of the two distributions a and b (softmax
            over E), which the released checkpoints were trained with; "jensen_shannon" is (KL(a||m) + KL(b||m)) / 2,
            as in the paper.

    Returns:
        The loss, summed over E and averaged over layers and batch.

    Raises:
        ValueError: the batches or widths differ.

    Source: CrossGET (arXiv 2305.17455), section 3.1; the authors' implementation.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"the towers' cross tokens are {list(first.shape)} and {list(second.shape)}: batch and width must agree; "
            "run both towers on as many images as texts"
        )
    layers = max(first.shape[0], second.shape[0])
    first, second = (_repeat(side, layers).flatten(0, 1) for side in (first, second))
    kind = torch.promote_types(first.dtype, torch.float32)  # half precision has too few digits for small divergences
    a, b = first.log_softmax(-1, dtype=kind), second.log_softmax(-1, dtype=kind)
    mean = (a.exp() + b.exp()) / 2
    if divergence == "reference":
        return (F.kl_div(a, mean, reduction="batchmean") + F.kl_div(b, mean, reduction="batchmean")) / 2
    if divergence == "jensen_shannon":
        log = mean.log()
        return (
            F.kl_div(log, a, reduction="batchmean", log_target=True)
            + F.kl_div(log, b, reduction="batchmean", log_target=True)
        ) / 2
    raise ValueError(f"divergence={divergence!r}: choose 'reference' or 'jensen_shannon'")


def _repeat(side: Tensor, layers: int) -> Tensor:
    """Repeat l layers evenly to get L: layer i is repeated floor((i+1) L / l) - floor(i L / l) times."""
    given = side.shape[0]
    if given == layers:
        return side
    counts = [(i + 1) * layers // given - i * layers // given for i in range(given)]
    return side.repeat_interleave(torch.tensor(counts, device=side.device), 0)
