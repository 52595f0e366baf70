"""Learnable context tokens in front of class names, for any model whose text tower crossget knows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import crossget
from crossget.checkpoints.authors import dassl_state
from crossget.methods.reducers import Reducer
from experiments.lib.data import generator
from experiments.retrieval.models import Clip

# What a learner's parameters and buffers are called in Dassl; the others than the first follow from names and model.
CONTEXT, PREFIX, SUFFIX = "ctx", "token_prefix", "token_suffix"


class PromptLearner(nn.Module):
    """The classes' text features, from prompts `[SOS] [context] class name . [EOT]` whose context is learnt.

    The model runs as it is, on token ids that hold the context's places: only what its embedding gives there is
    replaced. So positions, masks and pooling are the model's own, and an attached text tower reads the ids as ever.

    Args:
        clip: attached or not; its parameters are not the learner's.
        names: of the K classes.
        tokens: how many are learnt.
        class_specific: whether each class has its own context.
        seed: of the context before training, which is normal with a standard deviation of 0.02.

    Raises:
        TypeError: the model has no text tower that is known here.
        ValueError: a prompt does not fit the text tower.
    """

    ids: Tensor
    """[K, T] token ids with placeholders."""

    def __init__(
        self, clip: Clip, names: Sequence[str], tokens: int = 16, *, class_specific: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        text = next((tower.text for tower in crossget.find_towers(clip.model) if tower.text is not None), None)
        if text is None:
            raise TypeError(f"{type(clip.model).__name__} has no text tower that prompts could be learnt for")
        ids, self.start = placeholders(clip.tokenize, names, tokens)
        self.register_buffer("ids", ids, persistent=False)
        self.clip, self._embedding = clip, (text.embedding,)  # in a tuple: not a part of this module
        shape = (tokens, int(self.embedding.weight.shape[1]))
        if class_specific:
            shape = (len(names), *shape)  # type: ignore[assignment]
        self.ctx = nn.Parameter(0.02 * torch.randn(shape, generator=generator(seed)))

    @property
    def embedding(self) -> Any:
        """The text tower's embedding of token ids."""
        return self._embedding[0]

    def forward(self) -> Tensor:
        """Return the text features [K, E], not normalised."""
        handle = self.embedding.register_forward_hook(self._put_context)
        try:
            return self.clip.encode_text(self.ids)
        finally:
            handle.remove()

    def _put_context(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        """Replace the placeholders' embeddings in [K, T, C]."""
        context = self.ctx.to(embedded.dtype).expand(len(embedded), *self.ctx.shape[-2:])
        end = self.start + context.shape[1]
        return torch.cat([embedded[:, : self.start], context, embedded[:, end:]], 1)


def placeholders(tokenize: Callable[[list[str]], Tensor], names: Sequence[str], tokens: int) -> tuple[Tensor, int]:
    """Return token ids [K, T] of prompts with `tokens` placeholders, and where these start.

    Raises:
        ValueError: a prompt is longer than the text tower.
    """
    ids, empty = tokenize([name.replace("_", " ") + "." for name in names]), tokenize([""])[0]
    start = int(bool((ids[:, 0] == empty[0]).all()))  # behind the start token, where the tokenizer has one
    pad = empty[-1]
    places = torch.arange(1, ids.shape[1] + 1)
    lengths = ((ids != pad) * places).amax(1) + int(empty[start] == pad)  # some end texts with what they pad with
    room = ids.shape[1] - int(lengths.max())
    if not 0 < tokens <= room:
        longest = names[int(lengths.argmax())]
        raise ValueError(
            f"{tokens} context tokens do not fit: with {longest!r} a prompt takes {int(lengths.max())} more, and the "
            f"text tower has {ids.shape[1]} in all. Choose 1 to {room} (--context)"
        )
    held = tokenize(["X"])[:, start : start + 1].expand(len(ids), tokens)
    return torch.cat([ids[:, :start], held, ids[:, start : ids.shape[1] - tokens]], 1), start


def load_dassl(
    learner: PromptLearner, path: str | Path, reducer: Reducer | Mapping[str, Reducer] | None = None
) -> crossget.Attachment | None:
    """Load a checkpoint that CoOp or the reference's CoOp wrote with Dassl, `model.pth.tar-N`.

    Of CoOp's it has the prompts alone; of the reference's also encoders and cross tokens, which go into the learner's
    model as `crossget.load_reference` does it.

    Args:
        learner: with as many context tokens; class names may differ, unless the context is class-specific.
        path: the file; only tensors are read, never code.
        reducer: see `crossget.load_reference`.

    Returns:
        The model's attachment, if the file has encoders.

    Raises:
        ValueError: keys are missing, left over or misshapen (they are named), or it is a checkpoint of another CLIP.
            Nothing is loaded then.
    """
    state = dassl_state(path)
    whole = any(name.startswith("image_encoder.") for name in state)
    prompts = {
        name.removeprefix("prompt_learner."): value
        for name, value in state.items()
        if not whole or name.startswith("prompt_learner.")
    }
    extra = sorted(set(prompts) - {CONTEXT, PREFIX, SUFFIX})
    if CONTEXT not in prompts or extra:
        raise ValueError(f"{path}: expected the prompts {CONTEXT!r}, found {sorted(prompts)}; left over: {extra}")
    context = prompts[CONTEXT]
    if context.shape != learner.ctx.shape:
        raise ValueError(
            f"{path}: {CONTEXT} has shape {list(context.shape)}, the prompt learner needs {list(learner.ctx.shape)}: "
            "[context tokens, width], or [classes, context tokens, width] if they are class-specific"
        )
    if PREFIX in prompts and learner.start:
        with torch.no_grad():
            own = learner.embedding(learner.ids[:1, :1]).float()
        if not torch.allclose(own[0, 0], prompts[PREFIX][0, 0].to(own.device, torch.float32), atol=1e-3):
            raise ValueError(
                f"{path} was trained with another CLIP than this one: the start token's embedding ({PREFIX}) differs"
            )
    attached = crossget.load_reference(learner.clip.model, path, reducer) if whole else None
    with torch.no_grad():
        learner.ctx.copy_(context)
    return attached
