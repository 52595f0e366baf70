"""Towers, and the adapters that find them in a model.

A tower is a list of transformer blocks that pass one sequence of tokens from each to the next. An adapter is a list of
declared towers, or a function from a model to its towers. It is looked up by the classes in the model's MRO. The module
with the adapters of a library is imported when a model of that library is first used. `register` adds an adapter:

    tower = crossget.Tower("visual", crossget.Blocks("layers"), width=read("width"), prefix=1, class_token=True)
    crossget.register(MyViT, towers=[tower])
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from crossget.core.block_class import base_of
from crossget.core.layout import BATCH_FIRST, BatchFirst
from crossget.core.state import TokenState
from crossget.methods.reducers import ImportanceName, KeysName, TowerFacts

# Libraries with adapters. Those of `timm` are in crossget.integrations.timm, and so on.
_HOSTS = ("timm", "open_clip", "transformers")
# transformers has a package for each family of models. Its name -> the module of crossget.integrations with the
# adapter.
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


# The implementations of attention in transformers that can be recognised. Others are kernels, no torch functions.
RECOGNISED_KERNELS = ("eager", "sdpa")


class Blocks(Sequence[nn.Module]):
    """The blocks of a tower, looked up at every access, so that a host's list may be cut or replaced.

    Args:
        path: the path from the owner to the list, such as "encoder.layers"; or several paths, each to one block.
        owner: the model, or a module in it; None: no model is known yet, see `register` and `Tower.of`.
    """

    def __init__(self, path: str | Sequence[str], owner: nn.Module | None = None) -> None:
        self.path, self.owner = path, owner

    def __repr__(self) -> str:
        return f"Blocks({self.path!r})"

    @property
    def _list(self) -> Any:
        if isinstance(self.path, str):
            return self._at(self.path)
        return [self._at(path) for path in self.path]

    def _at(self, path: str) -> Any:
        if self.owner is None:
            raise RuntimeError(f"the blocks at {self.path!r} belong to no model yet: call Tower.of(model)")
        found: Any = self.owner
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def __len__(self) -> int:
        return len(self._list)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return list(self._list)[index]


class Read:
    """The value of a declared tower's field that is read from the model, see `read`."""

    def __init__(self, source: str | Callable[[Any], Any], add: int = 0) -> None:
        self.source, self.add = source, add

    def __repr__(self) -> str:
        named = getattr(self.source, "func", self.source)  # of a partial function
        source = getattr(named, "__qualname__", repr(named))
        return f"read({source}, add={self.add})" if self.add else f"read({source})"

    def __call__(self, model: nn.Module) -> Any:
        if not isinstance(self.source, str):
            return self.source(model)
        value = attrgetter(self.source)(model)
        return value + self.add if self.add else value


def read(source: str | Callable[[Any], Any], add: int = 0) -> Any:
    """The value of a field of a `Tower` that is declared for all models of a class, and differs between them.

    `read("config.hidden_size")` is the width of most models of transformers. The value is read in `Tower.of`, whenever
    a model is attached.

    Args:
        source: the path from the model to the value, or a function from the model to the value.
        add: a number that is added to the value at the path.
    """
    return Read(source, add)


@dataclass
class TextInput:
    """How the end-of-text token of each text is found. Here this is the token that the tower pools, whichever it is.

    Attributes:
        embedding: the token embedding. The host calls it with the token ids [B, T] before the blocks run.
        locate: a function of the ids [B, T] with two results. The first is the position [B] of the end-of-text token;
            None: the tower pools the mean of all tokens. The second is [B, T] false for padding; None: the tower treats
            padding like text, as CLIP does, or padding is found in the attention's mask.
        single_token: the tower pools a single token, whose position `locate` returns. The end-of-text token is then the
            guide, and the cross token is a copy of it before every block. Otherwise the cross token is the guide, and
            starts as the mean of the tokens that are no padding.
    """

    embedding: nn.Module
    locate: Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
    single_token: bool = True


@dataclass
class IntermediatesHook:
    """A method of the host that uses the outputs of certain blocks, such as `get_image_features`.

    Attributes:
        module, method: the module, and the name of its method.
        layers: a function from a call's arguments, by name, to the numbers of the blocks whose outputs are used (from
            0).
        grid: the method expects one token for every input position. False: it can use the reduced tokens.
        hides_rest: blocks after the last used one have no effect on the method's result, so that they are skipped.
            Otherwise they are skipped inside `generate` only.
    """

    module: nn.Module
    method: str
    layers: Callable[[Mapping[str, Any]], Sequence[int]]
    grid: bool = True
    hides_rest: bool = False


class Features(NamedTuple):
    """Which tokens of an image tower become the features of an image in a prompt.

    Attributes:
        tokens: T0, the number of tokens of one image in the dense model.
        layer: number of the block whose output is used, from 0; -1: the input of the first block.
        dropped: number of leading tokens of that output that are not used.
    """

    tokens: int
    layer: int
    dropped: int


@dataclass
class SingleTokenOutput:
    """A method of the host whose result depends on a single token of the tower's output.

    That token is the end-of-text token or, in a tower of images, the class token. See `Reducer.class_token_only`.

    Attributes:
        module, method: the module, and the name of its method.
        applies: a function of the module that returns whether this holds for the module's present settings. It must not
            be a lambda if attached models are pickled.
    """

    module: nn.Module
    applies: Callable[[Any], bool]
    method: str = "forward"


@dataclass
class Prompt:
    """The form of prompts with images, which have one placeholder token for every feature of an image.

    Attributes:
        models: the modules whose forward takes such prompts, the outermost first. Only the first has a `generate`.
        placeholder: id of the placeholder token.
        input_embeddings: a function without arguments that returns the token embedding of the language model.
        features: a function from a call's arguments, by name, to the `Features` of its images.
        pad: id of the padding token.
        images_after_cache: `generate` takes images beside a filled cache.
    """

    models: Sequence[nn.Module]
    placeholder: int
    input_embeddings: Callable[[], nn.Module]
    features: Callable[[Mapping[str, Any]], Features]
    pad: int = 0
    images_after_cache: bool = True

    @property
    def fill(self) -> int:
        """Id of the token that shorter rows are filled up with. It is no placeholder, whatever `pad` is."""
        return self.pad if self.pad != self.placeholder else int(self.pad == 0)


class Prefilled(NamedTuple):
    """The results of a prefill.

    Attributes:
        cache: keys and values, in the host's own form.
        image_tokens: number of tokens of one image that the image tower returns.
        prompt: number of tokens that the language model gets.
        context: any other input of the decoding steps.
    """

    cache: Any
    image_tokens: int
    prompt: int
    context: Any = None


@dataclass
class Stages:
    """The stages in which a model of images and text generates, for `crossget.measure.generation`.

    Attributes:
        parts: lists of modules, by name, from the image tower on. All other modules belong to the language model.
        pixels: shape of the pixel values of one image, such as [3, H, W].
        prefill: a function that runs the prefill, of the pixel values of N images, [N, *pixels], and token ids [1, T].
        step: a function that runs one decoding step, of a token id [1, 1] and the results of the prefill. Its result is
            not used.
    """

    parts: Mapping[str, Sequence[nn.Module]]
    pixels: tuple[int, ...]
    prefill: Callable[[Tensor, Tensor], Prefilled]
    step: Callable[[Tensor, Prefilled], Any]


@dataclass(repr=False)
class Tower:
    """A tower: transformer blocks that pass one sequence of tokens [B, T, C] from each to the next.

    Attributes:
        name: the name of the tower, usually "visual" or "text".
        blocks: the blocks, in the order they run. `Blocks("blocks", model)` follows a list that is cut or replaced
            later.
        width: C, the number of channels of a token.
        prefix: number of leading tokens that are never merged: class token, registers, start-of-text token.
        fixed: positions of other tokens that are never merged, negative ones from the end.
        class_token: the first token is a class token.
        causal: a token attends to itself and earlier tokens only.
        padding: a mask of the attention may hide padding.
        layout: how the blocks get their tokens: BATCH_FIRST [B, T, C], TOKENS_FIRST [T, B, C] or PACKED [B * T, C].
        makes_tables: the blocks make tables with one row per token inside, see `crossget.core.tables.TableOperands`.
        loop: number of blocks that the only module in `blocks` runs in its own forward; 0: every block is a module.
        text: how the end-of-text token is found; None for a tower that takes no text.
        restore: the last block returns the full grid, one token for every input position, so that the code after it
            needs no change. False: it returns the reduced tokens.
        importance, keys: the importance and keys of the CrossGET authors' code for such a backbone.
        project: a function from cross tokens [N, C] to the joint space of the model's towers [N, E], for the alignment
            loss. The function must give its own parameters no gradient. None: there is no such function.
        embed: a function from tokens [.., C] of the last block to the joint space of images and texts [.., E]: what the
            host applies to the token that it pools. `crossget show` compares tokens with texts by it. None: there is
            no such function of a single token.
        intermediates: the methods of the host that use the outputs of certain blocks only, or take reduced tokens.
        single_token_outputs: the methods of the host whose result depends on a single token of the last block. They
            need a class token or an end-of-text token, and `restore`.
        fit_arguments: a function (block, name, value, state) that returns an argument of the block for the remaining
            tokens, if the argument has one row per token (a rotary table, say); otherwise the value itself. It is
            called if the tokens are no longer exactly the host's. `state` is a `crossget.core.state.TokenState`.
        masks: names of the block's arguments that are masks [B or 1, H or 1, T, T]. Such an argument is replaced by the
            mask for the remaining tokens. Name it if the block checks or cuts its mask before the attention gets it.
        keeps_cross_token: the reduced tokens that the tower returns include the cross token.
        guided: it gets a cross token, with r = 0, if one reducer with a cross token is attached to the image tower.
        prompt: the form of prompts, if they have one placeholder for every token that the tower returns.
        decoder: the module that runs the blocks, if the tower is a language model that generates. Its tokens are not
            merged, and the cross token replaces its first token.
        overrides: triples (object, attribute, value): attributes that have another value while the model is attached.
        notes: what is known about a tower that `find_towers` has found by itself: what was seen, proved and assumed.
    """

    name: str
    blocks: Sequence[nn.Module]
    width: int
    prefix: int = 0
    fixed: Sequence[int] = ()
    class_token: bool = False
    causal: bool = False
    padding: bool = False
    layout: BatchFirst = BATCH_FIRST
    makes_tables: bool = False
    loop: int = 0
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
    guided: bool = True
    prompt: Prompt | None = None
    decoder: nn.Module | None = None
    overrides: Sequence[tuple[Any, str, Any]] = ()
    notes: Sequence[str] = field(default=(), compare=False)

    def __repr__(self) -> str:
        """The tower as an expression, without fields that have their default."""
        values = ((one, getattr(self, one.name)) for one in fields(self) if one.name not in ("name", "blocks"))
        changed = [f"{one.name}={value!r}" for one, value in values if one.compare and value != one.default]
        return f"Tower({', '.join([repr(self.name), f'blocks={self.blocks!r}', *changed])})"

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.loop or len(self.blocks)

    def of(self, model: nn.Module | None) -> Tower:
        """The declared tower of a model, with what is `read` from it; in None: of no model yet.

        Raises:
            TypeError: a field holds modules, which belong to one model.
        """
        if not isinstance(self.blocks, (Blocks, Read)):
            raise TypeError(
                f"tower {self.name!r} lists modules as its blocks: give the path to them, such as "
                "Blocks('encoder.layers')"
            )
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if model is None:
            held = [name for name, value in values.items() if name not in ("blocks", "overrides") and _holds(value)]
            if held:
                raise TypeError(
                    f"tower {self.name!r} holds modules of one model in {', '.join(held)}: declare a function of the "
                    f"model instead, {held[0]}=crossget.core.adapters.read(function)"
                )
            blocks = Blocks(self.blocks.path) if isinstance(self.blocks, Blocks) else self.blocks
            return replace(self, blocks=blocks, overrides=self.overrides if isinstance(self.overrides, Read) else ())
        known = {name: value(model) for name, value in values.items() if isinstance(value, Read)}
        found: Any = known["blocks"] if isinstance(self.blocks, Read) else Blocks(self.blocks.path, model)
        overrides = *known.get("overrides", ()), *recognised_kernels(found.owner, found.path)
        return replace(self, **known | {"blocks": found, "overrides": overrides})

    def __str__(self) -> str:
        """The tower in one line: "visual: 12 blocks (Block), prefix 1, class token"."""
        kinds = ", ".join(sorted({base_of(block).__name__ for block in self.blocks}))
        parts = [f"{self.depth} blocks ({f'in {kinds}' if self.loop else kinds})", f"prefix {self.prefix}"]
        parts += [f"{len(self.fixed)} more protected tokens"] if self.fixed else []
        parts += ["class token"] if self.class_token else []
        parts += ["causal"] if self.causal else []
        parts += [] if self.reducible else ["generates: cross token only"]
        return f"{self.name}: {', '.join(parts)}"

    @property
    def facts(self) -> TowerFacts:
        """The properties of this tower that a reducer needs."""
        return TowerFacts(
            f"tower {self.name!r}",
            self.class_token,
            self.has_end,
            self.importance,
            self.keys,
            keeps_cross_token=self.keeps_cross_token,
            single_token_output=bool(self.single_token_outputs),
        )

    @property
    def reducible(self) -> bool:
        """Whether its tokens can be merged: it is no language model that generates."""
        return self.decoder is None

    @property
    def has_end(self) -> bool:
        """Whether its texts have an end-of-text token. It is protected, and is the guide."""
        return self.text is not None and self.text.single_token

    def n_reserved(self, cross_token: bool) -> int:
        """The number of tokens of a row that are never removed: the protected ones."""
        return self.prefix + len(self.fixed) + int(cross_token) + int(self.has_end)


def _holds(value: Any) -> bool:
    """Whether a field's value holds a module."""
    if isinstance(value, partial):
        value = [value.func, *value.args, *value.keywords.values()]
    elif is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).values())
    elif isinstance(value, MethodType):
        value = [value.__self__]
    return any(map(_holds, value)) if isinstance(value, (list, tuple)) else isinstance(value, nn.Module)


def recognised_kernels(model: nn.Module, path: str | Sequence[str]) -> tuple[tuple[Any, str, Any], ...]:
    """The overrides that make the blocks at a path use SDPA, if their model's attention is a kernel not recognised."""
    path, module = path if isinstance(path, str) else path[0], model
    overrides: list[tuple[Any, str, Any]] = []
    for name in ("", *path.split(".")):
        module = getattr(module, name) if name else module
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, *RECOGNISED_KERNELS):
            overrides.append((config, "_attn_implementation", "sdpa"))
    return tuple(overrides)


Adapter = Callable[[Any], "list[Tower]"]
AdapterT = TypeVar("AdapterT", bound=Adapter)
_adapters: dict[type, Adapter] = {}


@overload
def register(*backbones: type[nn.Module]) -> Callable[[AdapterT], AdapterT]: ...


@overload
def register(*backbones: type[nn.Module], towers: Sequence[Tower]) -> None: ...


def register(*backbones: type[nn.Module], towers: Sequence[Tower] | None = None) -> Any:
    """Register an adapter, a function from a model to its towers: as a decorator, or as a list of towers.

    Args:
        backbones: the classes of the models. The adapter is used for their subclasses, too.
        towers: the towers, with the paths of their blocks, as `find_towers` returns them. They hold for every model of
            these classes. What differs between the models is declared with `read`. None:
            `register` returns a decorator for a function.

    Raises:
        TypeError: a backbone is not a subclass of nn.Module, or a tower holds modules instead of paths.
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
    if towers is not None:
        _adapters.update(dict.fromkeys(backbones, Declared([tower.of(None) for tower in towers])))
        return None

    def add(adapter: AdapterT) -> AdapterT:
        _adapters.update(dict.fromkeys(backbones, adapter))
        return adapter

    return add


class Declared:
    """The adapter of models whose towers are given by the paths of their blocks."""

    def __init__(self, towers: Sequence[Tower]) -> None:
        self.towers = towers
        self.__module__, self.__qualname__ = __name__, repr(towers)

    def __call__(self, model: nn.Module) -> list[Tower]:
        return [tower.of(model) for tower in self.towers]


def is_registered(cls: type) -> bool:
    """Whether exactly this class has an adapter in this process."""
    return cls in _adapters


def unregister(backbone: type[nn.Module]) -> None:
    """Remove the adapter of exactly this class.

    Raises:
        KeyError: it has none.
    """
    del _adapters[backbone]


def absent_towers(model: nn.Module) -> dict[str, str]:
    """Why a supported model lacks a tower (it is convolutional, say), by the name of the tower."""
    for cls in type(model).__mro__:
        for module in load_integrations(cls):
            if hasattr(module, "absent"):
                reasons: dict[str, str] = module.absent(model)
                return reasons
    return {}


def has_adapter(model: nn.Module) -> bool:
    """Whether the model's class, or one of its bases, has an adapter."""
    return _adapter_of(model) is not None


def _adapter_of(model: nn.Module) -> Adapter | None:
    for cls in type(model).__mro__:
        load_integrations(cls)
        if cls in _adapters:
            return _adapters[cls]
    return None


def reason_against(model: nn.Module) -> str:
    """Why no tower can be found in a model without adapter; empty if this is not known before a forward."""
    if isinstance(model, torch.jit.ScriptModule):
        return "it is a TorchScript model, whose compiled code cannot be watched: load it without jit"
    for cls in type(model).__mro__:
        for module in load_integrations(cls):
            reason: str = module.impossible(model) if hasattr(module, "impossible") else ""
            if reason:
                return reason
    return ""


def adapted_towers(model: nn.Module) -> list[Tower]:
    """The towers of a model, by its adapter.

    Raises:
        TypeError: it has none. The message gives the reason, if it is known.
        RuntimeError: the adapter found nothing to reduce.
    """
    adapter = _adapter_of(model)
    if adapter is None:
        reason = reason_against(model) or "no adapter is registered for it or its bases"
        raise TypeError(f"cannot reduce {_name(type(model))}: {reason}")
    towers = adapter(model)
    _check(towers, model, adapter)
    return towers


def load_integrations(cls: type) -> list[Any]:
    """Import the modules with the adapters for a class. The one of its family (in transformers) comes first."""
    places = cls.__module__.split(".")
    names = [FAMILIES[places[2]]] if places[:2] == ["transformers", "models"] and places[2] in FAMILIES else []
    names += [host for host in _HOSTS if places[0] == host]
    return [importlib.import_module(f"crossget.integrations.{name}") for name in names]


def _check(towers: list[Tower], model: nn.Module, adapter: Adapter) -> None:
    """Raise a RuntimeError if an adapter's towers cannot be reduced."""
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
        not_modules = [type(block).__name__ for block in tower.blocks if not isinstance(block, nn.Module)]
        if not_modules:
            raise RuntimeError(
                f"{where}: tower {tower.name!r} lists {not_modules} among its blocks, which are no modules"
            )
        if tower.single_token_outputs and not (tower.restore and (tower.class_token or tower.has_end)):
            raise RuntimeError(
                f"{where}: tower {tower.name!r} has single_token_outputs, which need a class token or end-of-text "
                "token, and restore=True: it has no such token or restore=False"
            )


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
