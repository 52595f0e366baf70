"""recall@k, both ways."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.lib.data import read_image
from experiments.retrieval.data import Photo
from experiments.retrieval.models import Clip

Ranks = npt.NDArray[np.int64]


@torch.no_grad()
def encode(clip: Clip, photos: Sequence[Photo], batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return image features [N, E], text features [M, E], both L2-normalised, and the photograph [M] of each text."""
    clip.model.eval().to(device)
    transform = clip.transform(train=False)
    texts = [caption for photo in photos for caption in photo.captions]
    owner = torch.tensor([i for i, photo in enumerate(photos) for _ in photo.captions])

    def in_batches(
        items: Sequence[Any], prepare: Callable[[Any], Tensor], encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        pieces = (items[start : start + batch] for start in range(0, len(items), batch))
        return torch.cat([F.normalize(encode(prepare(piece).to(device)).float(), dim=-1).cpu() for piece in pieces])

    images = in_batches(
        photos, lambda some: torch.stack([read_image(p.file, transform) for p in some]), clip.encode_image
    )
    return images, in_batches(texts, clip.tokenize, clip.encode_text), owner


def ranks(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[Ranks, Ranks]:
    """Return at which place the right answer comes, 0 being the first.

    Args:
        images: [N, E] L2-normalised.
        texts: [M, E] L2-normalised.
        owner: [M] which image each text is about.

    Returns:
        [N] for each image, the best place of one of its texts; [M] for each text, the place of its image. What is as
        near as the right answer counts as before it: a model that says the same of everything finds nothing.
    """
    similarity = images.double() @ texts.double().T
    own = similarity[owner, torch.arange(len(owner))]
    best = torch.full((len(images),), -torch.inf, dtype=torch.float64).scatter_reduce(0, owner, own, "amax")
    mine = owner[None, :] == torch.arange(len(images))[:, None]
    before = ((similarity >= best[:, None]) & ~mine).sum(1)
    to_image = (similarity >= own[None, :]).sum(0) - 1
    return before.numpy(), to_image.numpy()


def recalls(place: Ranks) -> dict[str, float]:
    """Return recall@1, 5 and 10 in %."""
    return {f"r@{k}": 100 * float((place < k).mean()) for k in (1, 5, 10)}
