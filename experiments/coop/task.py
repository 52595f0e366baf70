"""What is minimised in prompt learning."""

from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from experiments.coop.prompts import PromptLearner


def logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return what a photograph [B, E] says of each class [K, E], as [B, K].

    Args:
        image, text: features, not normalised.
        scale: [] log of the inverse temperature.
    """
    return scale.exp().float() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T


class CoopTask(nn.Module):
    """Cross-entropy over the classes, and beside it the cross tokens' alignment, if there are any.

    Args:
        learner: of the prompts; its model is attached or not.
        attached: the model's attachment, with cross tokens registered in the model.
        share: weight of both losses. The reference has 0.5; rows without cross tokens that are compared with it have
            the same, so that all take steps of the same size.
        alignment: weight of the alignment beside the cross-entropy. The reference has 10.
    """

    def __init__(
        self,
        learner: PromptLearner,
        attached: crossget.Attachment | None = None,
        *,
        share: float = 0.5,
        alignment: float = 10.0,
    ) -> None:
        super().__init__()
        self.learner, self.model = learner, learner.clip.model
        self.share, self.alignment = share, alignment
        self._aligned = attached if attached is not None and len(attached.cross_tokens) == 2 else None

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of one batch, and its accuracy.

        Args:
            pixels: [B, 3, H, W].
            labels: [B] which class each is of.
        """
        image, text = self.learner.clip.encode_image(pixels), self.learner()
        found = logits(image, text, self.model.logit_scale)
        losses = {"cross_entropy": F.cross_entropy(found, labels)}
        losses["loss"] = self.share * losses["cross_entropy"]
        if self._aligned is not None:
            losses["alignment"] = self._aligned.alignment_loss(rows=labels)
            losses["loss"] = losses["loss"] + self.share * self.alignment * losses["alignment"]
        losses["accuracy"] = (found.argmax(-1) == labels).float().mean()
        return losses
