"""lmms-eval's LLaVA with fewer image tokens: its own chat `llava_hf`, with a reducer attached to the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from lmms_eval.models.chat.llava_hf import LlavaHf
from loguru import logger  # lmms-eval's
from PIL.Image import Image
from PIL.Image import new as new_image

import crossget
from crossget.core.saving import CONFIG_FILE, WEIGHTS_FILE
from crossget.methods.reducers import Reducer

_METHODS: dict[str, type[Reducer]] = {"crossget": crossget.CrossGET, "tome": crossget.ToMe}
_REFERENCE_R = 13


# lmms-eval has no annotations that a type checker may read (no py.typed).
class LlavaCrossget(LlavaHf):  # type: ignore[misc]
    """`--model llava_crossget`: a LLaVA of transformers, its image tokens reduced.

    Args:
        pretrained: a folder or the id of a repository on the Hugging Face hub. What `Attachment.save` wrote may lie
            beside the model, as `crossget convert` leaves it: its reducers and cross tokens are attached then.
        r: tokens that every block of the image tower removes, in place of the saved r. Not given, it is what was
            saved, otherwise the reference's 13. 0 is the dense model: nothing is attached, saved cross tokens neither
            (a saved r of 0 keeps them, where no r is given).
        method: "crossget": the saved reducers, otherwise `crossget.CrossGET`. "tome": `crossget.ToMe`, which has no
            use for saved cross tokens.
        image_aspect_ratio: "pad" fills images up to squares, with the mean colour, as LLaVA-1.5 was trained and is
            evaluated by its authors; "crop" leaves it to transformers' processor, which cuts squares out, as
            lmms-eval's `llava_hf` does. Models other than LLaVA-1.5 have processors of their own, which stay.
        revision: of a hub repository.
        device: that the model is moved to.
        device_map: transformers'. Not given, it is the process's device.
        batch_size: 1.
        more: everything else that lmms-eval's `llava_hf` takes.

    Raises:
        ValueError: r, method, image_aspect_ratio, batch_size or pretrained is not one of these.
    """

    is_simple = False  # a chat class, as the manifest says: lmms-eval refuses one that does not agree

    def __init__(
        self,
        pretrained: str,
        r: int | None = None,
        method: str = "crossget",
        image_aspect_ratio: str = "pad",
        revision: str = "main",
        device: str = "cuda",
        device_map: str = "",
        batch_size: int | str = 1,
        **more: Any,
    ) -> None:
        pretrained = str(pretrained)  # lmms-eval makes a number of what looks like one
        _check(r, method, image_aspect_ratio, batch_size)
        saved = _saved(pretrained, revision) if method == "crossget" and r != 0 else None
        if not device_map and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            device_map = str(device)  # LlavaHf hands its default, "", to transformers, which takes it for a device
        super().__init__(
            pretrained=pretrained, revision=revision, device=device, device_map=device_map, batch_size=1, **more
        )
        if image_aspect_ratio == "pad" and self.model.config.model_type == "llava":
            own: Any = self._image_processor
            self._image_processor: Any = PaddingProcessor(own)
        self.attached = _attach(self.model, saved, r, method)
        logger.info(f"llava_crossget: {self.attached or 'the dense model'}{f' from {saved}' if saved else ''}")

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """LlavaHf's, but a failure ends the run: LlavaHf would log it, answer "" and let that be scored."""
        try:
            with _failing(self.model):
                answers: list[Any] = super().generate_until(requests)
        except _Failure as failure:
            raise RuntimeError(f"llava_crossget could not answer: {failure.__cause__}") from failure.__cause__
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: LlavaHf's looks for the answer where it would be if an image were one token.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "llava_crossget answers by generating: give tasks of the output_type generate_until. lmms-eval's "
            "loglikelihood for LLaVA does not count the image's tokens"
        )


class PaddingProcessor:
    """A processor that fills images up to squares first.

    Args:
        processor: of transformers. Everything but the images is its own business.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Any = None, **given: Any) -> Any:
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        return self.processor(images=images and [_square(image, colour) for image in images], **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def _square(image: Image, colour: tuple[int, ...]) -> Image:
    """The image in the middle of a square of one colour."""
    image = image.convert("RGB")
    size = max(image.size)
    square = new_image("RGB", (size, size), colour)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def _check(r: Any, method: Any, image_aspect_ratio: Any, batch_size: Any) -> None:
    # From lmms-eval's command line r=-1 and r=13.0 come as floats, r=None as the string 'None'.
    if r is not None and (type(r) is not int or r < 0):
        raise ValueError(f"r={r!r}: expected a whole number from 0 on, as in r={_REFERENCE_R}, or no r")
    if method not in _METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(_METHODS)}")
    if image_aspect_ratio not in ("pad", "crop"):
        raise ValueError(f"image_aspect_ratio={image_aspect_ratio!r}: expected pad or crop")
    if str(batch_size) != "1":
        raise ValueError(f"batch_size {batch_size}: lmms-eval's LLaVA answers one question at a time, --batch_size 1")


def _saved(pretrained: str, revision: str) -> Path | None:
    """The folder with what `Attachment.save` wrote beside the model; None if there is nothing."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder if (folder / CONFIG_FILE).is_file() else None
    try:
        config = hf_hub_download(pretrained, CONFIG_FILE, revision=revision)
    except HFValidationError as error:
        raise ValueError(
            f"pretrained={pretrained}: neither a folder here nor the id of a hub repository ({error})"
        ) from None
    except LocalEntryNotFoundError:  # the hub is out of reach
        # None: not in the cache. Otherwise the cache remembers that the repository has no such file.
        if try_to_load_from_cache(pretrained, CONFIG_FILE, revision=revision) is None:
            logger.warning(
                f"the hub cannot be asked whether {pretrained} has a {CONFIG_FILE}, and the cache does not know: going "
                "on as if it had none"
            )
        return None
    except EntryNotFoundError:
        return None
    hf_hub_download(pretrained, WEIGHTS_FILE, revision=revision)
    return Path(config).parent


def _attach(model: Any, saved: Path | None, r: int | None, method: str) -> crossget.Attachment | None:
    if r == 0:
        return None
    if saved is None:
        return crossget.attach(model, _METHODS[method](r=_REFERENCE_R if r is None else r))
    attached = crossget.load(model, saved)
    if r is not None:
        attached.reducer = {"visual": dataclasses.replace(attached.reducers["visual"], r=r)}
    return attached


class _Failure(BaseException):
    """What `generate` raised, in a shape that LlavaHf's `except Exception` lets through."""


@contextlib.contextmanager
def _failing(model: Any) -> Iterator[None]:
    """Inside, whatever the model's `generate` raises comes as a `_Failure`."""
    generate = model.generate
    before = model.__dict__.get("generate")

    @functools.wraps(generate)
    def loud(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            raise _Failure from error

    model.generate = loud
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before
