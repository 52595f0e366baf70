"""Create a backbone by name: the model of open_clip or timm, its weights, preprocessing and tokenizer.

The host downloads pretrained weights. An unreachable hub is detected within seconds: it gets one request with a time
limit before the host starts, whose own retries take up to a minute.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import socket
import ssl
import threading
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crossget.core import files
from crossget.integrations._support import NumbersOnCPU

if TYPE_CHECKING:
    from PIL.Image import Image

HOSTS = ("open_clip", "timm")  # in the order in which names are looked up
# The extra that installs each host; models of transformers come from checkpoints/hf_sizes.py, or from users.
PACKAGES = {"open_clip": "open-clip", "timm": "timm", "transformers": "transformers"}
DEFAULT = "default"  # --pretrained: the weights that the host prefers
NONE = "none"
HUB_TIMEOUT = 5.0  # seconds until the hub's first answer

# Keys under which training programs save the model.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
_COUNTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DataParallel and torch.compile
_HTTP_PACKAGES = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}


@dataclass
class Backbone:
    """A model in evaluation mode, and its inputs.

    Attributes:
        model: the host's model.
        host: "open_clip" or "timm".
        name: the host's name of the model.
        weights: the source of the weights: a tag, a file, or "random".
        random: whether the weights are random.
        random_reason: why no weights were loaded, in one line; empty if random weights were requested.
        preprocess: the host's preprocessing, PIL image -> [3, H, W].
    """

    model: nn.Module
    host: str
    name: str
    weights: str
    random: bool
    random_reason: str
    preprocess: Callable[[Image], Tensor] = field(repr=False)

    @property
    def has_text_tower(self) -> bool:
        """Whether the model has a text tower."""
        return self.host == "open_clip"

    @property
    def title(self) -> str:
        """Host, name and weights, for headings."""
        return f"{self.host} {self.name} ({'random weights' if self.random else self.weights})"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input images."""
        if self.host == "timm":
            return _timm_size(self.model)
        size: int | Sequence[int] = self.model.visual.image_size  # type: ignore[union-attr, assignment]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def context_length(self) -> int:
        """Number of tokens of a text."""
        return int(_text_attribute(self.model, "context_length"))

    def random_inputs(self, batch: int, *, text: bool) -> tuple[Tensor, ...]:
        """Random inputs on the model's device: images [B, 3, H, W] and, optionally, token ids [B, L].

        Args:
            batch: number of images, and of texts.
            text: whether to add token ids. The last id is the largest, which many text towers take as end of text.
        """
        device = next(self.model.parameters()).device
        images = torch.rand(batch, 3, *self.image_size, device=device)
        if not text:
            return (images,)
        ids = torch.randint(1, 100, (batch, self.context_length), device=device)
        ids[:, -1] = int(_text_attribute(self.model, "vocab_size")) - 1
        return images, ids

    def image_features(self, images: Tensor) -> Tensor:
        """Image features [B, C]: CLIP's embedding, or the input of the classifier."""
        return image_features(self.host, self.model, images)

    def text_features(self, ids: Tensor) -> Tensor:
        """CLIP's embeddings of texts [B, C]."""
        model: Any = self.model
        return torch.as_tensor(model.encode_text(ids))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L], on the model's device.

        Raises:
            ConnectionError: the tokenizer is neither installed nor cached, and the hub does not answer.
        """
        import open_clip

        device = next(self.model.parameters()).device
        with _bounded_network() as reachable:
            try:
                ids: Tensor = open_clip.get_tokenizer(self.name)(list(texts))
            except Exception as error:
                if is_offline(error):
                    raise ConnectionError(f"the tokenizer is not in the cache, and {reachable}") from error
                raise
        return ids.to(device)


def image_features(host: str, model: Any, images: Tensor) -> Tensor:
    """Image features [B, C] of a host's model: CLIP's embedding, or the input of timm's classifier."""
    features = model.encode_image(images) if host == "open_clip" else _before_classifier(model, images)
    return torch.as_tensor(features).flatten(1)


def _before_classifier(model: Any, images: Tensor) -> Any:
    """The input of timm's classifier, taken in the model's own forward."""
    head = model.get_classifier()
    if not isinstance(head, nn.Module):  # distilled models have two classifiers
        return model.forward_head(model.forward_features(images), pre_logits=True)
    seen: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        out = model(images)
    finally:
        hook.remove()
    return seen[0] if seen else out  # a model without classifier may not call one


def make(
    name: str,
    *,
    pretrained: str = DEFAULT,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Backbone:
    """Create a backbone by name.

    Args:
        name: a model of open_clip or timm, optionally with "open_clip:" or "timm:" in front.
        pretrained: a tag of the host. "default" is the host's preferred tag, or random weights where it is not
            available; "none" is random weights.
        checkpoint: a file of weights, instead of `pretrained`.
        device: where the model runs. On "meta" no weights are loaded.
        seed: of the random weights.

    Raises:
        ValueError: no such model, tag or file, or the file does not fit.
        ConnectionError: the weights of the tag cannot be downloaded.
        RuntimeError: the host is not installed.
    """
    host, name = find(name)
    maker = _Maker(host, name, torch.device(device), seed)
    if maker.device.type == "meta":
        return maker.from_scratch("")
    if checkpoint is not None:
        return maker.from_file(checkpoint)
    if pretrained == NONE:
        return maker.from_scratch("")
    if pretrained == DEFAULT:
        return maker.from_default()
    return maker.from_tag(pretrained)


def find(name: str) -> tuple[str, str]:
    """The host that has a model of that name, and the name without the host in front.

    Raises:
        ValueError: no host has it (the message lists similar names), or both have.
        RuntimeError: the requested host, or every host, is not installed.
    """
    host, colon, rest = name.partition(":")
    if colon and host in HOSTS:
        if _import(host) is None:
            raise RuntimeError(f'{host} is not installed: pip install "crossget[{PACKAGES[host]}]"')
        hosts, name = [host], rest
    else:
        hosts = [host for host in HOSTS if _import(host) is not None]
    if not hosts:
        raise RuntimeError('neither open_clip nor timm is installed: pip install "crossget[open-clip,timm]"')
    having = [host for host in hosts if _has(host, name)]
    if len(having) > 1:
        raise ValueError(f"both hosts have a model {name!r}: write " + " or ".join(f"{host}:{name}" for host in having))
    if not having:
        raise ValueError(_unknown(name, hosts))
    return having[0], name


def installed(host: str) -> bool:
    """Whether a host can be imported."""
    return _import(host) is not None


def is_offline(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is an unreachable hub: no network, offline mode, or an empty cache."""
    chain: BaseException | None = error
    while chain is not None:
        if _is_network_error(chain):
            return True
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _import(host: str) -> Any:
    """The host's module, or None where it is not installed."""
    try:
        return importlib.import_module(host)
    except ModuleNotFoundError as error:
        if error.name in PACKAGES:
            return None
        raise


def _has(host: str, name: str) -> bool:
    library = _import(host)
    return bool(library.is_model(name)) if host == "timm" else name in library.list_models()


def _unknown(name: str, hosts: Sequence[str]) -> str:
    known = {host: list(_import(host).list_models()) for host in hosts}
    message = f"no model {name!r} in " + " or ".join(f"{host} ({len(names)} names)" for host, names in known.items())
    missing = [host for host in HOSTS if host not in hosts and _import(host) is None]
    if missing:
        message += f'; {missing[0]} is not installed: pip install "crossget[{PACKAGES[missing[0]]}]"'
    close = _close(name, [n for names in known.values() for n in names])
    return message + ("; did you mean " + ", ".join(close) + "?" if close else "; `crossget models` lists them")


def _close(name: str, known: Sequence[str]) -> list[str]:
    """Similar names, ignoring case."""
    by_lower = {n.lower(): n for n in known}
    return [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.6)]


# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class _Maker:
    """Creates one model in the ways that `make` offers."""

    host: str
    name: str
    device: torch.device
    seed: int

    def from_scratch(self, why: str) -> Backbone:
        if _config_is_on_hub(self.host, self.name):
            return self._downloaded(None, "the configuration of its text tower is", why)
        model, preprocess = self._create(None)
        return Backbone(model, self.host, self.name, "random", True, why, preprocess)

    def from_tag(self, tag: str) -> Backbone:
        known = self._tags()
        if tag not in known:
            offer = f"choose one of {', '.join(known)}" if known else "it has no tags"
            raise ValueError(f"{self.host} {self.name} has no pretrained weights {tag!r}: {offer}")
        return self._downloaded(tag, f"weights {tag!r} are")

    def from_default(self) -> Backbone:
        known = self._tags()
        if not known:
            return self.from_scratch(f"{self.host} has no pretrained weights for {self.name}")
        tag = "openai" if "openai" in known else known[0]
        try:
            return self._downloaded(tag, f"weights {tag!r} are")
        except ConnectionError as error:
            return self.from_scratch(str(error))

    def _downloaded(self, tag: str | None, what: str, why: str = "") -> Backbone:
        """Create the model with files from the hub or its cache.

        Raises:
            ConnectionError: they are not in the cache and the hub cannot be reached; other errors are the host's own.
        """
        with _bounded_network() as state:
            try:
                model, preprocess = self._create(tag)
            except Exception as error:
                if is_offline(error):
                    raise ConnectionError(f"{what} not in the cache, and {state}") from error
                raise
        return Backbone(model, self.host, self.name, tag or "random", tag is None, why, preprocess)

    def from_file(self, path: Path) -> Backbone:
        weights = load_weights(path)
        model, preprocess = self._create(None)
        if self.host == "timm":
            _resize_classifier(model, weights)
        _check_fit(model, weights, path, self.name)
        model.load_state_dict(weights)
        return Backbone(model.to(self.device), self.host, self.name, str(path), False, "", preprocess)

    def _tags(self) -> list[str]:
        if self.host == "open_clip":
            return list(_import("open_clip").list_pretrained_tags_by_model(self.name))
        return _timm_tags(self.name)

    def _create(self, tag: str | None) -> tuple[nn.Module, Callable[[Image], Tensor]]:
        torch.manual_seed(self.seed)
        make_one = _make_open_clip if self.host == "open_clip" else _make_timm
        # Weights are created on the CPU, so that they are the same for every device, or on the meta device.
        inside = self.device if self.device.type == "meta" else torch.device("cpu")
        with _quiet(), inside, NumbersOnCPU():
            model, preprocess = make_one(self.name, tag, inside)
        return model.to(self.device).eval(), preprocess


def _config_is_on_hub(host: str, name: str) -> bool:
    """Whether the configuration of the text tower, a model of transformers, is on the hub."""
    config = _import(host).get_model_config(name) if host == "open_clip" else None
    return "hf_model_name" in (config or {}).get("text_cfg", {})


def _make_open_clip(name: str, tag: str | None, device: torch.device) -> tuple[nn.Module, Callable[[Image], Tensor]]:
    import inspect

    import open_clip

    options: dict[str, Any] = {}
    if tag is None:
        # Text towers from transformers would download their own weights; open_clip 3.0 renamed the option.
        known = inspect.signature(open_clip.create_model).parameters
        options["pretrained_text" if "pretrained_text" in known else "pretrained_hf"] = False
    else:
        # The configuration of a tag says whether it was trained with QuickGELU; the architecture's name may not.
        options["force_quick_gelu"] = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=tag, device=device, **options)
    return model, preprocess


def _make_timm(name: str, tag: str | None, device: torch.device) -> tuple[nn.Module, Callable[[Image], Tensor]]:
    import timm
    from timm.data import create_transform, resolve_data_config

    full_name = name if not tag or "." in name else f"{name}.{tag}"
    model: nn.Module = timm.create_model(full_name, pretrained=tag is not None)
    return model, create_transform(**resolve_data_config({}, model=model), is_training=False)


def _timm_size(model: nn.Module) -> tuple[int, int]:
    from timm.data import resolve_data_config

    _, height, width = resolve_data_config({}, model=model)["input_size"]
    return height, width


def _timm_tags(name: str) -> list[str]:
    """Tags of a timm model that have weights, the preferred one first; a tag in the name is the only one."""
    import timm

    architecture, _, tag = name.partition(".")
    names = [name] if tag else timm.list_models(architecture, pretrained=True)
    configs = [config for n in names if (config := timm.get_pretrained_cfg(n)) is not None and config.has_weights]
    default = timm.get_pretrained_cfg(name)
    # Sorting is stable: after the preferred tag, the order is the host's.
    return sorted((str(c.tag) for c in configs), key=lambda t: default is None or t != default.tag)


def _text_attribute(model: Any, name: str) -> Any:
    """An attribute of the model (CLIP) or of its module `text` (newer classes)."""
    for holder in (model, getattr(model, "text", None)):
        if getattr(holder, name, None) is not None:
            return getattr(holder, name)
    raise TypeError(
        f"{type(model).__name__} has no attribute {name}, so no random texts can be made for its text tower"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors or torch file; no pickled code runs.

    Raises:
        ValueError: there is no such file, it is damaged, it contains no tensors, or tensors that cannot be weights.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: expected a safetensors or torch file")
    content = _load_file(path)
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {_unwrapped(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{path} contains no tensors, only {', '.join(map(str, list(content)[:5])) or 'nothing'}")
    for name, value in weights.items():
        # Integers count, in a BatchNorm, say.
        plain = value.dtype in _COUNTS and value.layout is torch.strided and not value.is_meta
        reason = None if plain else files.reason_against(value)
        if reason:
            raise ValueError(f"{path}: {name} is {reason}")
    return weights


def _load_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        file = files.open_safetensors(path)
        found: dict[str, Tensor] = files.named(path, lambda: {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        return found
    content = files.load_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains a {type(content).__name__}, expected a state dict")
    return content


def _unwrapped(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _resize_classifier(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the model as many classes as the checkpoint, which may be of a fine-tuned model."""
    head = model.get_classifier()
    names = [name for name, module in model.named_modules() if module is head]
    trained = weights.get(f"{names[0]}.weight") if names else None
    if trained is not None and trained.shape[0] != model.num_classes:
        model.reset_classifier(int(trained.shape[0]))


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str) -> None:
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    both = expected.keys() & weights.keys()
    shapes = [key for key in expected if key in both and expected[key].shape != weights[key].shape]
    parts = [
        f"{len(keys)} {what} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
        for keys, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
        if keys
    ]
    if parts:
        raise ValueError(
            f"{path} does not fit {name}: of {len(expected)} entries {', '.join(parts)}; "
            "give the name of the architecture that the file was saved from"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The network


@contextmanager
def _bounded_network() -> Iterator[str]:
    """Inside, an unreachable hub fails within seconds; yields the reason, for messages."""
    from huggingface_hub import constants

    before, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    unreachable = before or not _hub_answers(HUB_TIMEOUT)
    # In offline mode the hub's client uses its cache at once; otherwise it would retry for most of a minute.
    constants.HF_HUB_OFFLINE = unreachable
    socket.setdefaulttimeout(timeout or 2 * HUB_TIMEOUT)  # older hosts download with urllib, which has no time limit
    try:
        if before:
            yield "HF_HUB_OFFLINE is set"
        else:
            yield f"{constants.ENDPOINT} cannot be reached" if unreachable else "the download broke off"
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(timeout)


def _hub_answers(seconds: float) -> bool:
    """Whether the hub answers within a time, also where its address lookup hangs."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    errors: list[BaseException | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            errors.append(None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if not errors:
        return False
    if errors[0] is not None and not is_offline(errors[0]):
        raise errors[0]
    return errors[0] is None


def _is_network_error(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return True
    if getattr(error, "response", None) is not None or isinstance(error, urllib.error.HTTPError):
        return False  # the server answered with an error
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError | urllib.error.URLError):
        return True
    # The hub's client has used several HTTP libraries; their errors without a response are failed connections.
    return any(cls.__module__.partition(".")[0] in _HTTP_PACKAGES for cls in type(error).__mro__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the hosts' logs about missing weights, which the commands report themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
