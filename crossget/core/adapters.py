"""From a model to its towers: class -> adapter, found along the MRO, loaded when the class is first met.

An adapter is a function that says where a backbone's towers are; it knows no method. `register` adds one:

    @crossget.register(MyViT)
    def my_vit(model: MyViT) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=model.layers, width=model.width, prefix=1, class_token=True)]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from crossget.core.block_class import base_of
from crossget.core.state import TokenState
from crossget.methods.reducers import ImportanceName, KeysName, TowerFacts

# A host's package -> the module of crossget.integrations that knows it.
_HOSTS = ("timm", "open_clip", "transformers")
# transformers has a package for each family of models; families whose adapters are the same share one.
FAMILIES = {
    "clip": "hf_clip",
    "siglip": "hf_siglip",
    "siglip2": "hf_siglip2",
    "vit": "hf_vit",
    "deit": "hf_vit",
    "dinov2": "hf_dinov2",
    "dinov2_with_registers": "hf_dinov2",
    "dinov3_vit": "hf_dinov3",
    "blip": "hf_blip",
    "blip_2": "hf_blip2",
    "instructblip": "hf_blip2",
    "llava": "hf_llava",
    "llava_next": "hf_llava_next",
    "llava_onevision": "hf_llava_onevision",
    "internvl": "hf_internvl",
    "gemma3": "hf_gemma3",
    "paligemma": "hf_paligemma",
}


class Blocks(Sequence[nn.Module]):
    """The blocks of a tower, looked up each time: a host's list may be cut or replaced while it is attached.

    Args:
        owner: the module that has the list.
        path: of the list below it, "encoder.layers" for instance.
    """

    def __init__(self, owner: nn.Module, path: str) -> None:
        self.owner, self.path = owner, path

    @property
    def _now(self) -> Any:
        found: Any = self.owner
        for name in self.path.split("."):
            found = getattr(found, name)
        return found

    def __len__(self) -> int:
        return len(self._now)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return list(self._now)[index]


@dataclass
class TextInput:
    """How the end of each text is found.

    Attributes:
        embedding: the token embedding. The host calls it with the token ids [B, T] before the blocks run.
        locate: a function of the ids [B, T]. It returns the position [B] of the token that the tower pools (None: it
            pools the mean of all tokens), and which tokens are no padding [B, T] (None: the tower treats padding like
            text, as CLIP does).
        pools_one: `locate` returns a position. The token there is the guide, and the cross token is a copy of it before
            every block. Otherwise the cross token starts as the mean of the tokens that are no padding, and is the
            guide.
    """

    embedding: nn.Module
    locate: Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
    pools_one: bool = True


@dataclass
class IntermediatesHook:
    """A method of the host that uses the outputs of several blocks, such as `forward_intermediates`.

    Attributes:
        module, method: the module, and the name of its method.
        layers: a function of a call's arguments, by name. It returns the blocks whose outputs are used. None: possibly
            every block's.
        grid: the method expects as many tokens as the first block gets. False: it takes the reduced tokens.
        hides_rest: the method's result does not depend on blocks after the last used one, so that they need not run.
            Otherwise these are left out inside `generate` only.
    """

    module: nn.Module
    method: str
    layers: Callable[[Mapping[str, Any]], Sequence[int]] | None = None
    grid: bool = True
    hides_rest: bool = False


class Features(NamedTuple):
    """What of a tower's tokens becomes features of a prompt.

    Attributes:
        tokens: T0, the tokens of one image in the dense model.
        layer: the block whose output becomes features.
        dropped: leading tokens of that output that are left out.
    """

    tokens: int
    layer: int
    dropped: int


@dataclass
class SingleTokenOutput:
    """A method of the host whose result depends on one token of the tower's output alone.

    That token is the end of text or, in a tower that takes no text, the class token. See `Reducer.class_token_only`.

    Attributes:
        module, method: the module, and the name of its method.
        applies: a function of the module: whether this is so with the module's present settings. No lambda, if attached
            models are to be pickled.
    """

    module: nn.Module
    applies: Callable[[Any], bool]
    method: str = "forward"


@dataclass
class Prompt:
    """How prompts hold images: one placeholder token for every feature of an image.

    Attributes:
        models: modules whose forward takes such prompts, the outermost first; `generate` is a method of that one.
        placeholder: id of the placeholder token.
        embedding: the token embedding, to find placeholders in embeddings.
        features: a function of a call's keyword arguments: what each of its images becomes.
        pad: id of the token that prompts are padded with.
    """

    models: Sequence[nn.Module]
    placeholder: int
    embedding: nn.Module
    features: Callable[[Mapping[str, Any]], Features]
    pad: int = 0


class Prefilled(NamedTuple):
    """What a prefill leaves for the decoding steps.

    Attributes:
        cache: keys and values, in the host's own form.
        image_tokens: tokens of one image that leave the image tower.
        prompt: tokens that the language model gets.
        context: anything else that a decoding step needs.
    """

    cache: Any
    image_tokens: int
    prompt: int
    context: Any = None


@dataclass
class Stages:
    """How a model of images and text generates, so that `crossget.measure.generation` can count its stages.

    Attributes:
        parts: modules by name, from the image tower on. Modules in none of them belong to the language model.
        pixels: shape of one image.
        prefill: a function of pixel values [N, ...] and text ids [1, T].
        step: a function of an id [1, 1] and of what the prefill returned; what it returns is not used.
    """

    parts: Mapping[str, Sequence[nn.Module]]
    pixels: tuple[int, int, int]
    prefill: Callable[[Tensor, Tensor], Prefilled]
    step: Callable[[Tensor, Prefilled], Any]


@dataclass
class Tower:
    """A tower: transformer blocks that pass one sequence of tokens [B, T, C] from each to the next.

    Attributes:
        name: "visual" or "text", usually.
        blocks: the blocks, in the order they run. `Blocks(model, "blocks")` follows a list that is cut or replaced
            later.
        width: C, the channels of a token.
        prefix: number of leading tokens that are never merged: class token, registers, start of text.
        class_token: the first token is a class token.
        causal: a token attends to itself and earlier tokens only.
        padding: a mask given to the attention may hide padding.
        text: how the end of each text is found; None for a tower that takes no text.
        restore: the last block returns as many tokens as the first one gets, so that the code after it needs no change.
            False: it returns the reduced tokens.
        importance, keys: what the reference uses on such a backbone.
        project: a function of cross tokens [N, C] into the space that the model's towers share, for the alignment loss.
            That loss must not train its parameters. None: there is no such function.
        embed: a function of tokens [.., C] of the last block into the joint space of images and texts [.., E]: what the
            host does with the token that it pools. None: there is no such function of a single token.
        intermediates: methods of the host that use the outputs of several blocks.
        single_token_outputs: methods of the host whose result depends on one token of the last block alone. The tower
            has a class token or ends of text then, and `restore` is True.
        fit_arguments: a function of a block, an argument's name, its value and the tokens' state. It returns the value
            for the tokens that are left, where an argument has one row per token (a rotary table, say). It is called
            when the tokens are no longer the host's own.
        masks: names of a block's arguments that are masks [B or 1, H or 1, T, T]. The block gets them for the tokens
            that are left. To be named where a block checks or cuts its mask before the attention gets it.
        keeps_cross_token: the reduced tokens that the tower returns include the cross token.
        prompt: how prompts hold the tower's tokens, where they have to become shorter with them.
        decoder: the module that runs the blocks, if the tower is a language model that generates. Its tokens are not
            merged, and its first token takes the part of the cross token.
        overrides: (object, attribute, value) that are set while attached.
    """

    name: str
    blocks: Sequence[nn.Module]
    width: int
    prefix: int = 0
    class_token: bool = False
    causal: bool = False
    padding: bool = False
    text: TextInput | None = None
    restore: bool = True
    importance: ImportanceName = "cross_token"
    keys: KeysName = "all_heads"
    project: Callable[[Tensor], Tensor] | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    intermediates: Sequence[IntermediatesHook] = ()
    single_token_outputs: Sequence[SingleTokenOutput] = ()
    fit_arguments: Callable[[nn.Module, str, Any, TokenState], Any] | None = None
    masks: Sequence[str] = ()
    keeps_cross_token: bool = False
    prompt: Prompt | None = None
    decoder: nn.Module | None = None
    overrides: Sequence[tuple[Any, str, Any]] = ()

    def __str__(self) -> str:
        """The tower in one line: "visual: 12 blocks (Block), prefix 1, class token"."""
        kinds = ", ".join(sorted({base_of(block).__name__ for block in self.blocks}))
        parts = [f"{len(self.blocks)} blocks ({kinds})", f"prefix {self.prefix}"]
        parts += ["class token"] if self.class_token else []
        parts += ["causal"] if self.causal else []
        parts += [] if self.reducible else ["generates: cross token only"]
        return f"{self.name}: {', '.join(parts)}"

    @property
    def facts(self) -> TowerFacts:
        """What a reducer has to know of this tower."""
        return TowerFacts(
            f"tower {self.name!r}",
            self.class_token,
            self.has_end,
            self.importance,
            self.keys,
            self.embed is not None,
            keeps_cross_token=self.keeps_cross_token,
            single_token_output=bool(self.single_token_outputs),
        )

    @property
    def reducible(self) -> bool:
        """Its tokens can be merged: it is no language model that generates."""
        return self.decoder is None

    @property
    def has_end(self) -> bool:
        """The tower pools one token of each text. It is protected, and is the guide."""
        return self.text is not None and self.text.pools_one

    def n_reserved(self, cross_token: bool) -> int:
        """How many tokens of a row always stay: the protected ones, and in padded texts one of either kind."""
        padded = self.padding and self.text is not None
        return self.prefix + int(cross_token) + int(self.has_end) + 2 * int(padded)


Adapter = Callable[[Any], "list[Tower]"]
AdapterT = TypeVar("AdapterT", bound=Adapter)
_adapters: dict[type, Adapter] = {}


def register(*backbones: type[nn.Module]) -> Callable[[AdapterT], AdapterT]:
    """Decorator on a function model -> towers, for models of the given classes and their subclasses.

    Raises:
        TypeError: a backbone is not a class of modules.
        ValueError: a backbone has an adapter already.
    """
    for backbone in backbones:
        if not (isinstance(backbone, type) and issubclass(backbone, nn.Module)):
            raise TypeError(f"register takes classes of nn.Module, not {backbone!r}")
        if backbone in _adapters:
            raise ValueError(
                f"{_name(backbone)} has the adapter {_name(_adapters[backbone])} already: subclass the backbone and "
                "register that, or unregister it first (crossget.unregister)"
            )

    def add(adapter: AdapterT) -> AdapterT:
        _adapters.update(dict.fromkeys(backbones, adapter))
        return adapter

    return add


def is_registered(cls: type) -> bool:
    """Whether exactly this class has an adapter in this process."""
    return cls in _adapters


def unregister(backbone: type[nn.Module]) -> None:
    """Forget the adapter of exactly this class.

    Raises:
        KeyError: it has none.
    """
    del _adapters[backbone]


def absent_towers(model: nn.Module) -> dict[str, str]:
    """Why a supported model lacks a tower that its kind may have (a convolutional image tower, say), by name."""
    for cls in type(model).__mro__:
        for module in load_integrations(cls):
            if hasattr(module, "absent"):
                reasons: dict[str, str] = module.absent(model)
                return reasons
    return {}


def find_towers(model: nn.Module) -> list[Tower]:
    """The towers that `attach` would reduce.

    Raises:
        TypeError: no adapter knows the model; the message says why, where that is known.
        RuntimeError: the adapter found nothing to reduce.
    """
    reasons: list[str] = []
    for cls in type(model).__mro__:
        modules = load_integrations(cls)
        if cls in _adapters:
            towers = _adapters[cls](model)
            _check(towers, model, _adapters[cls])
            return towers
        found = [module.explain(model) for module in modules if hasattr(module, "explain")]
        reasons += filter(None, found)  # a family's own, if it has one to give, before its host's
    if isinstance(model, torch.jit.ScriptModule):
        reasons = ["it is a TorchScript model, whose compiled code cannot be watched: load it without jit"]
    reason = reasons[0] if reasons else "no adapter is registered for it or its bases"
    known = ", ".join(sorted({_name(cls) for cls in _adapters})) or "none yet"
    raise TypeError(
        f"cannot reduce {_name(type(model))}: {reason}. If its blocks do carry one sequence [B, T, C], write an "
        f"adapter with crossget.register (docs/backbones.md). Registered in this process: {known}"
    )


def load_integrations(cls: type) -> list[Any]:
    """The adapters' modules for a class, loaded if they were not; the one for its family comes first."""
    places = cls.__module__.split(".")
    names = [FAMILIES[places[2]]] if places[:2] == ["transformers", "models"] and places[2] in FAMILIES else []
    names += [host for host in _HOSTS if places[0] == host]
    return [importlib.import_module(f"crossget.integrations.{name}") for name in names]


def _check(towers: list[Tower], model: nn.Module, adapter: Adapter) -> None:
    where = f"{_name(adapter)} on {_name(type(model))}"
    if not towers:
        reasons = "".join(f"; {name}: {reason}" for name, reason in absent_towers(model).items())
        raise RuntimeError(f"{where} found no tower: nothing would be reduced{reasons}")
    names = [tower.name for tower in towers]
    if len(set(names)) != len(names):
        raise RuntimeError(f"{where} gave the tower names {names}: each tower needs a name of its own")
    for tower in towers:
        if len(tower.blocks) == 0:
            raise RuntimeError(f"{where} found no block in tower {tower.name!r}: nothing would be reduced")
        strangers = [type(block).__name__ for block in tower.blocks if not isinstance(block, nn.Module)]
        if strangers:
            raise RuntimeError(
                f"{where}: tower {tower.name!r} lists {strangers} among its blocks, which are no modules"
            )
        if tower.single_token_outputs and not (tower.restore and (tower.class_token or tower.has_end)):
            raise RuntimeError(
                f"{where}: tower {tower.name!r} has single_token_outputs, which look at its class token or the end "
                "of its texts on the full grid, and has no such token or restore=False"
            )


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
