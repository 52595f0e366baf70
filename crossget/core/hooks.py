"""The host's entry points that are wrapped while a model is attached, all of them.

Blocks do not know what the host's methods know: where a text ends, which blocks' outputs are looked at, how many image
tokens a prompt has room for. So something is put around these methods, or before these modules, on this model alone:

- A method that returns tokens of several blocks (`Tower.intermediates`): the grid is shown behind every block.
- A method that returns one token of the last block (`Tower.single_token_outputs`): that block may compute it alone.
- A text tower's token embedding (`Tower.text`): it tells where each text ends.
- A decoder's forward (`Tower.decoder`): it tells where each row's first real token is.
- forward and generate of a model with images in its prompts (`Tower.prompt`): prompts get fewer image tokens.
- Attributes of the host (`Tower.overrides`) have other values meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossget.core.adapters import IntermediatesHook, Prompt, SingleTokenOutput, Tower
from crossget.core.block_class import argument_names, has_own_forward, unwrap, wrap
from crossget.core.decoder_tower import cached_tokens, first_token
from crossget.core.image_prompts import around_generate, before_forward
from crossget.core.state import Shown
from crossget.core.tower import AttachedTower
from crossget.methods.indexing import size_of

Undo = Callable[[], Any]


def check_free(tower: Tower) -> None:
    """Refuse a tower on whose blocks or methods somebody else has put a forward or a method.

    Raises:
        ValueError: somebody has.
    """
    for layer, block in enumerate(tower.blocks):
        if has_own_forward(block):
            raise ValueError(
                f"block {layer} of tower {tower.name!r} has a forward of its own on the instance (another patch): "
                "remove it before attaching"
            )
    for module, method in _wrapped_methods(tower):
        if method in module.__dict__:
            raise ValueError(
                f"{type(module).__name__}.{method} is patched on the instance: remove that before attaching"
            )


def _wrapped_methods(tower: Tower) -> list[tuple[nn.Module, str]]:
    """The host's methods that get something around them."""
    found = [(hook.module, hook.method) for hook in tower.intermediates]
    found += [(output.module, output.method) for output in tower.single_token_outputs if output.method != "forward"]
    if tower.prompt is not None and hasattr(tower.prompt.models[0], "generate"):
        found.append((tower.prompt.models[0], "generate"))
    return found


def wrap_host(attached: AttachedTower) -> list[Undo]:
    """Wrap the entry points of a tower's host.

    Returns:
        What undoes it, to be called from the last to the first.
    """
    tower, undo = attached.tower, list[Undo]()
    for hook in tower.intermediates:
        names = argument_names(getattr(type(hook.module), hook.method))
        wrap(hook.module, hook.method, partial(_show_intermediates, attached, hook, names))
    for output in tower.single_token_outputs:
        if output.method == "forward":  # which others wrap, too (Accelerate)
            before, behind = partial(_before_single_token, attached, output), partial(_behind_single_token, attached)
            undo.append(output.module.register_forward_pre_hook(before).remove)
            undo.append(output.module.register_forward_hook(behind, always_call=True).remove)
        else:
            wrap(output.module, output.method, partial(_around_single_token, attached, output))
    if tower.text is not None:
        undo.append(tower.text.embedding.register_forward_pre_hook(partial(_note_ids, attached)).remove)
    if tower.decoder is not None:
        note = partial(_note_first_token, attached, argument_names(type(tower.decoder).forward))
        undo.append(tower.decoder.register_forward_pre_hook(note, with_kwargs=True).remove)
    if tower.prompt is not None:
        undo += _wrap_prompts(attached, tower.prompt)
    for holder, attribute, value in tower.overrides:
        undo.append(partial(setattr, holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, value)
    return undo + [partial(unwrap, module, method) for module, method in _wrapped_methods(tower)]


def _wrap_prompts(attached: AttachedTower, prompt: Prompt) -> list[Undo]:
    undo = []
    for model in prompt.models:
        hook = partial(before_forward, prompt, attached, argument_names(type(model).forward))
        undo.append(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
    outer: Any = prompt.models[0]
    if hasattr(outer, "generate"):
        wrap(outer, "generate", partial(around_generate, prompt, attached, argument_names(type(outer).generate)))
    return undo


# What is looked at ------------------------------------------------------------------------------------------------


def _show_intermediates(
    attached: AttachedTower, hook: IntermediatesHook, names: list[str], original: Callable[..., Any],
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run a host method that looks at the tokens between the blocks, and show it what it expects there."""
    if attached.shown_now() is not None:  # from inside another such method, which has said what it wants
        return original(*args, **kwargs)
    layers = None if hook.layers is None else hook.layers({**dict(zip(names, args)), **kwargs})  # noqa: B905
    skips = layers is not None and (hook.hides_rest or bool(attached.generating.get()))
    last = max(layers) if layers is not None and skips else attached.depth - 1
    visible = "grid" if hook.grid else attached.reduced
    attached.shown.set(Shown(visible, visible, last))
    try:
        return original(*args, **kwargs)
    finally:
        attached.shown.set(None)


def _expect_single_token(attached: AttachedTower, output: SingleTokenOutput) -> bool:
    """Say that the host method that runs from now on looks at one token; returns whether it does.

    Not if another one that has said what it wants calls it.
    """
    if not attached.reducer.class_token_only or attached.shown_now() is not None:
        return False
    if not output.applies(output.module) or _is_watched(attached.tower, output.module):
        return False
    attached.shown.set(Shown("tokens", "grid", attached.depth - 1, class_token_only=True))
    return True


def _is_watched(tower: Tower, module: nn.Module) -> bool:
    """Whether somebody has hooks that may see the last block's tokens: on that block, or on a part of the host."""
    if torch.compiler.is_compiling() or _COUNTING.get():
        return False
    last = tower.blocks[len(tower.blocks) - 1]
    hooks = [*last._forward_hooks.values()]
    for part in module.children():
        hooks += [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return any(getattr(hook, "func", hook).__module__ != __name__ for hook in hooks)


_COUNTING: ContextVar[bool] = ContextVar("_COUNTING", default=False)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Inside, the hooks on a model's modules count operators, and use no tokens."""
    token = _COUNTING.set(True)
    try:
        yield
    finally:
        _COUNTING.reset(token)


def _end_single_token(attached: AttachedTower) -> None:
    """Such a method has ended."""
    shown = attached.shown.get()
    if shown is not None and shown.class_token_only:
        attached.forget_shown()


def _around_single_token(
    attached: AttachedTower, output: SingleTokenOutput, original: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    if not _expect_single_token(attached, output):
        return original(*args, **kwargs)
    try:
        return original(*args, **kwargs)
    finally:
        _end_single_token(attached)


def _before_single_token(
    attached: AttachedTower, output: SingleTokenOutput, module: nn.Module, args: tuple[Any, ...]
) -> None:
    if _expect_single_token(attached, output) and not torch.compiler.is_compiling():
        # The module's call. A KeyboardInterrupt ends it without the hook behind it.
        attached.caller.set(sys._getframe(1))


def _behind_single_token(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    _end_single_token(attached)


# Where texts end, where tokens begin ------------------------------------------------------------------------------


def note_text_ids(attached: AttachedTower, ids: Tensor) -> None:
    """Keep for the tower's next forward where the texts with these token ids [B, T] end."""
    if attached.tower.text is not None:
        attached.noted.set((size_of(ids, 0), *attached.tower.text.locate(ids)))


def _note_ids(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...]) -> None:
    note_text_ids(attached, args[0])


def _note_first_token(
    attached: AttachedTower, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    tokens = given.get("inputs_embeds")
    cache = given.get("cache", given.get("past_key_values"))
    seen = given["input_ids"] if tokens is None else tokens
    attached.noted.set(first_token(seen, given.get("attention_mask"), cached_tokens(cache)))
