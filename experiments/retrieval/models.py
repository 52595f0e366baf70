"""The CLIPs that retrieval trains: any of open_clip or transformers, and a small one of our own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from crossget.demo.backbones import load_weights as read_weights

# A ViT-Tiny at 112 pixels (50 tokens) and a text tower of half its depth: trains on two CPU cores.
SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6},
}
SMALL_SIZE = 112


@dataclass(frozen=True)
class Clip:
    """A model of two towers in one space, whichever library it is from.

    Attributes:
        model: what `crossget.attach` takes; its `logit_scale` is the log of the inverse temperature.
        encode_image: [B, 3, H, W] -> [B, E], not normalised.
        encode_text: [B, T] token ids -> [B, E], not normalised.
        tokenize: captions -> [B, T] token ids.
        size: side of the square the model sees, in pixels.
        mean, std: per channel, of values in [0, 1].
    """

    model: Any
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """Return the way from a PIL image to [3, size, size].

        For training with the reference's augmentation: crops of 50 to 100 % of the area, mirroring, RandAugment.
        """
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        steps: list[Any] = [transforms.Resize((self.size, self.size), interpolation=bicubic)]
        if train:
            steps = [
                transforms.RandomResizedCrop(self.size, scale=(0.5, 1.0), interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.RandAugment(2, 5),
            ]
        steps += [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        composed: Callable[[Any], Tensor] = transforms.Compose(steps)
        return composed


def load_clip(name: str, weights: Path | None = None) -> Clip:
    """Return a CLIP in float32.

    Args:
        name: "small"; a model of open_clip, with a tag of pretrained weights or without ("ViT-B-16-quickgelu:openai");
            or "hf:" and a folder or an id on the hub of a transformers CLIPModel.
        weights: a file of `torch.save` or safetensors with the model's state dict, loaded over all that; for "small" a
            safetensors file of timm's vit_tiny_patch16_224 is taken, too: the vision tower to begin with.
    """
    if name.startswith("hf:"):
        clip = _from_transformers(name[3:])
    elif name == "small":
        clip = _small()
    else:
        clip = _from_open_clip(*name.partition(":")[::2])
    if weights is not None:
        load_weights(clip, weights)
    return clip


def load_weights(clip: Clip, file: Path) -> None:
    """Load a state dict into the model; a ViT-Tiny of timm into the vision tower of the small one.

    Raises:
        ValueError: the file is damaged, or holds no weights.
        RuntimeError: it is not of this model (torch names the keys).
    """
    state = {name: value.float() for name, value in read_weights(file).items()}
    if "blocks.0.attn.qkv.weight" in state:
        load_tower(clip, state)
    else:
        clip.model.load_state_dict(state)


def load_tower(clip: Clip, state: dict[str, Tensor]) -> None:
    """Load the parameters of timm's vit_tiny_patch16_224 into the vision tower of the small CLIP."""
    trunk = clip.model.visual.trunk
    own = {name: value for name, value in state.items() if not name.startswith("head.")}
    trunk.load_state_dict({**own, "pos_embed": _resampled(own["pos_embed"], trunk.pos_embed)})


def load_published_tower(clip: Clip) -> None:
    """Load the weights that timm publishes into the vision tower of the small CLIP."""
    import timm

    load_tower(clip, timm.create_model("vit_tiny_patch16_224", pretrained=True).state_dict())


def _resampled(positions: Tensor, like: Tensor) -> Tensor:
    """Position embeddings [1, 1 + N, C] for another grid."""
    from timm.layers import resample_abs_pos_embed

    side = int((like.shape[1] - 1) ** 0.5)
    resampled: Tensor = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)
    return resampled


def _small() -> Clip:
    import open_clip

    vision = {**SMALL["vision_cfg"], "timm_model_pretrained": False, "image_size": SMALL_SIZE}
    model = open_clip.CustomTextCLIP(SMALL["embed_dim"], vision, SMALL["text_cfg"])
    model.visual.trunk.set_input_size(img_size=SMALL_SIZE)
    context = SMALL["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    half = (0.5, 0.5, 0.5)
    return _of_open_clip(model, lambda texts: tokenizer(texts, context), SMALL_SIZE, half, half)


def _from_open_clip(name: str, tag: str) -> Clip:
    import open_clip

    model = open_clip.create_model(name, pretrained=tag or None)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    mean = getattr(model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return _of_open_clip(model, open_clip.get_tokenizer(name), side, tuple(mean), tuple(std))


def _of_open_clip(
    model: Any, tokenize: Callable[[list[str]], Tensor], size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Clip:
    return Clip(model, model.encode_image, model.encode_text, tokenize, size, mean, std)


def _from_transformers(path: str) -> Clip:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model: Any = CLIPModel.from_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    processor: Any = CLIPImageProcessor.from_pretrained(path)

    def tokenize(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        return ids

    def encode_image(pixels: Tensor) -> Tensor:
        features: Tensor = model.visual_projection(model.vision_model(pixels).pooler_output)
        return features

    def encode_text(ids: Tensor) -> Tensor:  # no mask: the end of text does not see the padding behind it
        features: Tensor = model.text_projection(model.text_model(ids).pooler_output)
        return features

    return Clip(
        model, encode_image, encode_text, tokenize, model.config.vision_config.image_size,
        tuple(processor.image_mean), tuple(processor.image_std),
    )  # fmt: skip


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, which: Tensor) -> Tensor:
    """The mean of the cross-entropies from images to texts and back, all pairs of one photograph being right.

    Args:
        image: [B, E] L2-normalised.
        text: [B, E] L2-normalised.
        scale: [] inverse temperature.
        which: [B] photograph of each pair.

    Source: reference implementation.
    """
    logits = scale * image @ text.T
    same = (which[:, None] == which[None, :]).to(logits.dtype)
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
