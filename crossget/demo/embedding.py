"""`crossget embed`: the embeddings of many images by a reduced model, with Ray Data."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from crossget.core.attach import attach, load
from crossget.core.files import read_json
from crossget.demo import backbones
from crossget.demo.compare import VISUAL, Reduction, read_image
from crossget.demo.viewer import METHODS, Method
from crossget.integrations import ray_data

if TYPE_CHECKING:
    from PIL.Image import Image

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EmbedOptions:
    """Options of `crossget embed`.

    Attributes:
        images: a folder of images, Parquet files or shards of WebDataset, or one such file.
        out: the folder to write.
        model: a name of open_clip or timm, or a folder of transformers with a CLIP, SigLIP, DINOv2 or the like.
        method: a name of `viewer.METHODS`; None is Ward.
        r: tokens to remove per block of the image tower.
        saved: a folder that `Attachment.save` wrote, instead of `method` and `r`.
        checkpoint: a file of weights, see `crossget.demo.backbones.make`.
        pretrained: a tag of the host, see there.
        seed: of random weights.
        dtype: of weights and computation.
        id: see `crossget.integrations.ray_data.Options`, as for all that follow.
    """

    images: str
    out: str
    model: str
    method: Method | None = None
    r: Reduction | None = None
    saved: Path | None = None
    checkpoint: Path | None = None
    pretrained: str = backbones.DEFAULT
    seed: int = 0
    dtype: DType = "float32"
    id: str | None = None
    image: str = "image"
    actors: int | None = None
    batch: int = 32
    device: Literal["cpu", "cuda"] = "cpu"
    shard_rows: int = 4096
    sample: int = 256
    address: str | None = None

    def __post_init__(self) -> None:
        if self.saved is not None and (self.r is not None or self.method is not None):
            raise ValueError("--saved has a method and its r already: leave out --method and --r")
        if self.saved is None and self.r is None:
            raise ValueError("how much is to be removed? Give --r, or --saved; --r 0 embeds with the dense model")


@dataclass(frozen=True)
class Prepare:
    """The bytes of a picture's file -> the model's input [3, H, W]."""

    preprocess: Callable[[Image], Tensor]

    def __call__(self, content: bytes) -> Tensor:
        try:
            image = read_image(io.BytesIO(content))
        except Exception as error:  # damaged bytes raise whatever the code that they reach happens to raise
            reason = str(error).partition("<_io")[0].strip() or type(error).__name__  # without the name of the buffer
            raise ValueError(f"not an image that Pillow can read: {reason}") from error
        return self.preprocess(image)


def run(options: EmbedOptions, log: Callable[[str], None] = print) -> ray_data.Report:
    """Embed the images.

    Args:
        options: of the command.
        log: called with lines for the user.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: the request cannot be carried out, or the run stopped; the message
            says what can be done.
    """
    ray_data.require_ray()
    how = ray_data.Options(
        options.id, options.image, options.actors, options.batch, options.device, options.shard_rows, options.sample,
        options.address,
    )  # fmt: skip
    return ray_data.embed(options.images, options.out, make_encoder(options, log), how)


def make_encoder(options: EmbedOptions, log: Callable[[str], None] = print) -> ray_data.Encoder:
    """The reduced model of the options, with what turns pictures into its inputs.

    Raises:
        ValueError: there is no such model, or its weights cannot be had: random ones are used on request only.
    """
    if Path(options.model).is_dir():
        model, preprocess, features, title = _from_folder(options)
    else:
        backbone = backbones.make(
            options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, seed=options.seed
        )
        if backbone.random and options.pretrained != backbones.NONE:
            raise ValueError(
                f"{backbone.random_reason}: give --checkpoint FILE, a folder of transformers as --model, or "
                "--pretrained none for random weights"
            )
        if backbone.random:
            log("random weights: their embeddings mean nothing, and hide what a reduction costs")
        model, preprocess, title = backbone.model, backbone.preprocess, backbone.title
        features = partial(backbones.image_features, backbone.host)
    model = model.to(getattr(torch, options.dtype)).eval()
    if options.saved is not None:
        load(model, options.saved)
    else:
        attach(model, {VISUAL: METHODS[options.method or "ward"](options.r or 0)})
    return ray_data.Encoder(model, Prepare(preprocess), features, f"{title}, {options.dtype}")


def _from_folder(
    options: EmbedOptions,
) -> tuple[nn.Module, Callable[[Image], Tensor], Callable[[nn.Module, Tensor], Tensor], str]:
    """A model of transformers that `save_pretrained` wrote.

    Raises:
        ValueError: the folder has no model, or an option for models with a name is given.
        RuntimeError: transformers is not installed.
    """
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model {folder}: a folder without config.json: expected what save_pretrained wrote, or a name"
        )
    if options.checkpoint is not None or options.pretrained != backbones.DEFAULT:
        raise ValueError(f"--checkpoint and --pretrained are for models with a name, and {folder} has its own weights")
    if not backbones.installed("transformers"):
        raise RuntimeError('transformers is not installed: pip install "crossget[transformers]"')
    from transformers import AutoImageProcessor, AutoModel

    kind = read_json(folder / "config.json").get("model_type")
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return model, _Processor(processor), _pooled, f"transformers {kind} in {folder}"


@dataclass(frozen=True)
class _Processor:
    """An image processor of transformers as a function: picture -> [3, H, W]."""

    processor: Any

    def __call__(self, image: Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _pooled(model: Any, images: Tensor) -> Tensor:
    """Embeddings [B, C] of a model of transformers: CLIP's projected ones, or the pooled output.

    Raises:
        TypeError: it has neither.
    """
    out = model.get_image_features(pixel_values=images) if hasattr(model, "get_image_features") else model(images)
    features = out if isinstance(out, Tensor) else getattr(out, "pooler_output", None)
    if features is None:
        raise TypeError(
            f"{type(model).__name__} has no pooled output: wrap it as a crossget.integrations.ray_data.Encoder"
        )
    return torch.as_tensor(features)
