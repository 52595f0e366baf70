"""What is minimised in retrieval."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.methods.alignment import Divergence
from experiments.lib.processes import gather_rows
from experiments.retrieval.models import Clip, contrastive_loss


class RetrievalTask(nn.Module):
    """Contrastive loss, and beside it the cross tokens' alignment, if there are any.

    Args:
        clip: attached or not.
        attached: its attachment, with cross tokens registered in `clip.model`.
        weight: of the alignment; 1 - weight is that of the contrastive loss. The reference has 0.5. Without cross
            tokens the contrastive loss is weighted the same, so that all rows take steps of the same size.
        gather: contrast with the pairs of all processes; the reference contrasts within each process.
        divergence: of the alignment.
    """

    def __init__(
        self,
        clip: Clip,
        attached: crossget.Attachment | None = None,
        *,
        weight: float = 0.5,
        gather: bool = False,
        divergence: Divergence = "reference",
    ) -> None:
        super().__init__()
        self.model = clip.model
        # FSDP2 shards no scalars. A state dict with one value fits both.
        self.model.logit_scale = nn.Parameter(self.model.logit_scale.detach().reshape(1))
        # What FSDP2 shards one by one.
        blocks = [block for tower in crossget.find_towers(self.model) for block in tower.blocks]
        self._no_split_modules = sorted({type(block).__name__ for block in blocks})
        self.weight, self.gather, self.divergence = weight, gather, divergence
        self._clip = clip
        self._aligned = attached if attached is not None and len(attached.cross_tokens) == 2 else None

    def forward(self, pixels: Tensor, ids: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return the losses of one batch.

        Args:
            pixels: [B, 3, H, W].
            ids: [B, T] token ids.
            image: [B] which photograph each pair is of.
        """
        clip: Any = self._clip
        features = [F.normalize(clip.encode_image(pixels), dim=-1), F.normalize(clip.encode_text(ids), dim=-1)]
        scale = self.model.logit_scale.clamp(0, math.log(100)).exp()
        rows = [*features, image]
        if self.gather:
            rows = [gather_rows(part) for part in rows]
        losses = {"contrastive": contrastive_loss(rows[0].float(), rows[1].float(), scale, rows[2])}
        losses["loss"] = (1 - self.weight) * losses["contrastive"]
        if self._aligned is not None:
            losses["alignment"] = self._aligned.alignment_loss(self.divergence)
            losses["loss"] = losses["loss"] + self.weight * losses["alignment"]
        return losses
