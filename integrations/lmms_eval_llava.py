"""lmms-eval's LLaVA with fewer image tokens: its own chat `llava_hf`, with a reducer attached to the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from lmms_eval.models.chat.llava_hf import LlavaHf
from loguru import logger  # lmms-eval's
from PIL.Image import Image
from PIL.Image import new as new_image

import crossget
from crossget.core.saving import FILE
from crossget.methods.reducers import Reducer

_METHODS: dict[str, type[Reducer]] = {"crossget": crossget.CrossGET, "tome": crossget.ToMe}
_REFERENCE_R = 13


# lmms-eval has no annotations that a type checker may read (no py.typed).
class LlavaCrossget(LlavaHf):  # type: ignore[misc]
    """`--model llava_crossget`: a LLaVA of transformers with reduced image tokens.

    Args:
        pretrained: a folder, or the id of a repository on the Hugging Face hub. If it also has the files of
            `Attachment.save`, as `crossget convert` writes them, the saved reducers and cross tokens are attached.
        r: number of tokens that every block of the image tower removes. None: the saved r or, without saved files, 13
            as in the authors' code. 0: nothing is attached, not even saved cross tokens (use a saved r of 0 for them).
        method: "crossget": the saved reducers or, without saved files, `crossget.CrossGET`. "tome": `crossget.ToMe`,
            without cross tokens.
        image_aspect_ratio: "pad": pad images to squares with the mean colour, as the authors of LLaVA-1.5 train and
            evaluate it. "crop": transformers' processor crops images to squares, as in lmms-eval's `llava_hf`. It has
            no effect on models other than LLaVA-1.5, which have other processors.
        revision: revision of a hub repository.
        device: the device of the model.
        device_map: as in transformers. If empty, the process's device.
        batch_size: 1, the only one supported.
        more: all other arguments of lmms-eval's `llava_hf`.

    Raises:
        ValueError: one of r, method, image_aspect_ratio, batch_size and pretrained has no valid value.
    """

    is_simple = False  # a chat class; lmms-eval refuses a class that does not agree with its manifest

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
        pretrained = str(pretrained)  # lmms-eval converts what looks like a number
        _check(r, method, image_aspect_ratio, batch_size)
        saved = _saved(pretrained, revision) if method == "crossget" and r != 0 else None
        if not device_map and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            device_map = str(device)  # LlavaHf passes its default "" on to transformers, which takes it for a device
        super().__init__(
            pretrained=pretrained, revision=revision, device=device, device_map=device_map, batch_size=1, **more
        )
        if image_aspect_ratio == "pad" and self.model.config.model_type == "llava":
            own: Any = self._image_processor
            self._image_processor: Any = PaddingProcessor(own)
        self.attached = _attach(self.model, saved, r, method)
        logger.info(f"llava_crossget: {self.attached or 'the dense model'}{f' from {saved}' if saved else ''}")

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """LlavaHf's method, except that a failure ends the run. LlavaHf itself logs it, and its answer "" is scored."""
        answers: list[Any] = raising("llava_crossget", self.model, super().generate_until)(requests)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: LlavaHf computes the position of the answer as if an image were one token.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "llava_crossget answers by generating: give tasks of the output_type generate_until. lmms-eval's "
            "loglikelihood for LLaVA does not count the image's tokens"
        )


class PaddingProcessor:
    """A processor that pads images to squares first.

    Args:
        processor: the processor of transformers, which does everything else.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Any = None, **given: Any) -> Any:
        colour = tuple(int(255 * mean) for mean in self.processor.image_processor.image_mean)
        return self.processor(images=images and [_square(image, colour) for image in images], **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def _square(image: Image, colour: tuple[int, ...]) -> Image:
    """The image, centred on a square of one colour."""
    image = image.convert("RGB")
    size = max(image.size)
    square = new_image("RGB", (size, size), colour)
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def _check(r: Any, method: Any, image_aspect_ratio: Any, batch_size: Any) -> None:
    # lmms-eval's command line passes r=-1 and r=13.0 as floats, and r=None as the string 'None'.
    if r is not None and (type(r) is not int or r < 0):
        raise ValueError(f"r={r!r}: expected a whole number from 0 on, as in r={_REFERENCE_R}, or no r")
    if method not in _METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(_METHODS)}")
    if image_aspect_ratio not in ("pad", "crop"):
        raise ValueError(f"image_aspect_ratio={image_aspect_ratio!r}: expected pad or crop")
    if str(batch_size) != "1":
        raise ValueError(f"batch_size {batch_size}: lmms-eval's LLaVA answers one question at a time, --batch_size 1")


def _saved(pretrained: str, revision: str) -> Path | None:
    """The folder with the file of `Attachment.save`; None if the model has none."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder if (folder / FILE).is_file() else None
    try:
        saved = hf_hub_download(pretrained, FILE, revision=revision)
    except HFValidationError as error:
        raise ValueError(
            f"pretrained={pretrained}: neither a folder here nor the id of a hub repository ({error})"
        ) from None
    except LocalEntryNotFoundError:  # the hub cannot be reached
        # None: the cache does not know. Otherwise it has stored that the repository has no such file.
        if try_to_load_from_cache(pretrained, FILE, revision=revision) is None:
            logger.warning(
                f"the hub cannot be asked whether {pretrained} has a {FILE}, and the cache does not know: going "
                "on as if it had none"
            )
        return None
    except EntryNotFoundError:
        return None
    return Path(saved).parent


def _attach(model: Any, saved: Path | None, r: int | None, method: str) -> crossget.Attachment | None:
    """Attach, see `LlavaCrossget` for the arguments; None with r = 0."""
    if r == 0:
        return None
    if saved is None:
        return crossget.attach(model, _METHODS[method](r=_REFERENCE_R if r is None else r))
    attached = crossget.load(model, saved)
    if r is not None:
        attached.reducer = {"visual": dataclasses.replace(attached.reducers["visual"], r=r)}
    return attached


def raising(name: str, model: Any, answer: Callable[..., Any]) -> Callable[..., Any]:
    """A method that answers requests such that an exception of the model's `generate` ends the run.

    Args:
        name: of the model in lmms-eval, for the message.
        model: whose `generate` it calls.
        answer: the method.
    """

    def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            with _raising_failures(model):
                return answer(*args, **kwargs)
        except _Failure as failure:
            raise RuntimeError(f"{name} could not answer: {failure.__cause__}") from failure.__cause__

    return answering


class _Failure(BaseException):
    """Wraps an exception of `generate`. It is no `Exception`, so LlavaHf's `except Exception` does not catch it."""


@contextlib.contextmanager
def _raising_failures(model: Any) -> Iterator[None]:
    """Context in which exceptions of the model's `generate` are raised as `_Failure`."""
    generate = model.generate
    before = model.__dict__.get("generate")

    @functools.wraps(generate)
    def raising(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            raise _Failure from error

    model.generate = raising
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before
