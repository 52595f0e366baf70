"""All entry points of the host that are wrapped while a model is attached.

A block does not have all that it needs: where a text ends, which blocks' outputs the host uses, how many image tokens a
prompt has. So these methods of the host are wrapped, or get a forward hook, on the attached model only:

- Methods that use tokens of certain blocks (`Tower.intermediates`): later blocks are skipped where their output cannot
  be seen, and a method that takes reduced tokens gets these.
- Methods that use one token of the last block (`Tower.single_token_outputs`): that block then computes this token only.
- The token embedding of a text tower (`Tower.text`): it gets the token ids, from which the end of each text is found.
- The forward of a decoder (`Tower.decoder`): it gets the mask, from which each row's first token is found.
- forward and generate of a model with images in its prompts (`Tower.prompt`): prompts get fewer image tokens.

Attributes of the host (`Tower.overrides`) have other values while the model is attached.
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
from crossget.core.connector_prompts import ConnectorPrompts
from crossget.core.decoder_tower import cached_tokens, first_token
from crossget.core.image_prompts import after_forward, around_generate, before_forward
from crossget.core.state import HostOutputs
from crossget.core.tower import AttachedTower
from crossget.methods.indexing import size_of

Undo = Callable[[], Any]


def check_not_patched(tower: Tower) -> None:
    """Check that no instance has a patched forward or method where crossget sets its own.

    Raises:
        ValueError: a block has a forward, or a module a method, of its own on the instance.
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
    """The modules and names of the host's methods that are wrapped."""
    found = [(hook.module, hook.method) for hook in tower.intermediates]
    found += [(output.module, output.method) for output in tower.single_token_outputs if output.method != "forward"]
    if tower.prompt is not None and hasattr(tower.prompt.models[0], "generate"):
        found.append((tower.prompt.models[0], "generate"))
    return found


def wrap_host(attached: AttachedTower, connector: ConnectorPrompts | None = None) -> list[Undo]:
    """Wrap the entry points of a tower's host.

    Args:
        attached: the tower.
        connector: of the same model. Its prompts are fitted after those of the tower.

    Returns:
        Functions that undo it, to be called from the last to the first.
    """
    tower, undo = attached.tower, list[Undo]()
    for hook in tower.intermediates:
        names = argument_names(getattr(type(hook.module), hook.method))
        wrap(hook.module, hook.method, partial(_around_intermediates, attached, hook, names))
    for output in tower.single_token_outputs:
        if output.method == "forward":  # hooks, as others replace forward, too (accelerate)
            before, after = partial(_before_single_token, attached, output), partial(_after_single_token, attached)
            undo.append(output.module.register_forward_pre_hook(before).remove)
            undo.append(output.module.register_forward_hook(after, always_call=True).remove)
        else:
            wrap(output.module, output.method, partial(_around_single_token, attached, output))
    if tower.text is not None:
        undo.append(tower.text.embedding.register_forward_pre_hook(partial(_before_embedding, attached)).remove)
    if tower.decoder is not None:
        before = partial(_before_decoder, attached, argument_names(type(tower.decoder).forward))
        undo.append(tower.decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
    if tower.prompt is not None:
        undo += _wrap_prompts(attached, tower.prompt, connector)
    for holder, attribute, value in tower.overrides:
        undo.append(partial(setattr, holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, value)
    return undo + [partial(unwrap, module, method) for module, method in _wrapped_methods(tower)]


def _wrap_prompts(attached: AttachedTower, prompt: Prompt, connector: ConnectorPrompts | None) -> list[Undo]:
    undo = []
    for model in prompt.models:
        hook = partial(before_forward, prompt, attached, argument_names(type(model).forward))
        undo.append(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.append(model.register_forward_hook(partial(after_forward, attached), with_kwargs=True).remove)
    outer: Any = prompt.models[0]
    if hasattr(outer, "generate"):
        names = argument_names(type(outer).generate)
        wrap(outer, "generate", partial(_around_generate, prompt, attached, connector, names))
    return undo


def _around_generate(
    prompt: Prompt, attached: AttachedTower, connector: ConnectorPrompts | None, names: list[str],
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """`generate` on a prompt for the tower's reduced tokens and then for those that stay behind the connector."""

    def behind_the_tower(*args: Any, **kwargs: Any) -> Any:
        if connector is None:
            return original(*args, **kwargs)
        return connector.around_generate(names, original, args, kwargs)

    return around_generate(prompt, attached, names, behind_the_tower, args, kwargs)


# Which outputs the host uses ---------------------------------------------------------------------------------------


def _around_intermediates(
    attached: AttachedTower, hook: IntermediatesHook, names: list[str], original: Callable[..., Any],
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run a host method that uses the outputs of certain blocks, which then return what it expects."""
    if attached.current_outputs() is not None:  # called inside another entry point, whose outputs apply
        return original(*args, **kwargs)
    layers = hook.layers({**dict(zip(names, args)), **kwargs})  # noqa: B905
    can_skip = hook.hides_rest or bool(attached.generating.get())
    last_used = max(layers) if can_skip else attached.depth - 1
    form = "grid" if hook.grid else attached.reduced_form(attached.reducer)
    attached.outputs.set(HostOutputs(form, form, last_used))
    try:
        return original(*args, **kwargs)
    finally:
        attached.outputs.set(None)


def _expect_single_token(attached: AttachedTower, output: SingleTokenOutput) -> bool:
    """Let the last block compute one token only, for the host method that is about to run.

    Returns:
        Whether it will: the reducer asks for it, the method's result depends on one token only, no hook may read the
        others, and the method is not called inside another entry point.
    """
    if not attached.reducer.class_token_only or attached.current_outputs() is not None:
        return False
    if not output.applies(output.module) or _has_token_hooks(attached.tower, output.module):
        return False
    attached.outputs.set(HostOutputs("grid", "grid", attached.depth - 1, class_token_only=True))
    return True


def _has_token_hooks(tower: Tower, module: nn.Module) -> bool:
    """Whether hooks of others may read the last block's tokens: on this block, or on a child of the host's module."""
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
    """Context in which hooks on a model's modules only count operators or take the time, and do not read tokens."""
    token = _COUNTING.set(True)
    try:
        yield
    finally:
        _COUNTING.reset(token)


def _end_single_token(attached: AttachedTower) -> None:
    """Undo `_expect_single_token`, when the host method has ended."""
    outputs = attached.outputs.get()
    if outputs is not None and outputs.class_token_only:
        attached.forget_outputs()


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


def _after_single_token(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
    _end_single_token(attached)


# Where texts end, and where decoders' tokens begin ------------------------------------------------------------------


def set_text_ends(attached: AttachedTower, ids: Tensor) -> None:
    """Set, for the tower's next forward, where the texts with these token ids [B, T] end."""
    if attached.tower.text is not None:
        attached.text_info.set((size_of(ids, 0), *attached.tower.text.locate(ids)))


def _before_embedding(attached: AttachedTower, module: nn.Module, args: tuple[Any, ...]) -> None:
    set_text_ends(attached, args[0])


def _before_decoder(
    attached: AttachedTower, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = {**dict(zip(names, args)), **kwargs}  # noqa: B905
    tokens = given.get("inputs_embeds")
    cache = given.get("cache", given.get("past_key_values"))
    tokens = given["input_ids"] if tokens is None else tokens
    attached.text_info.set(first_token(tokens, given.get("attention_mask"), cached_tokens(cache)))
