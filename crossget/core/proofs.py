"""Proofs: that a block's tokens can be reduced, and that a reducer works on a whole model.

A block is called on some of its tokens, and must give what it gives on all of them with the others hidden from its
attention. This is what a reduction does to it. A block with a convolution, a window or positions made from the current
number of tokens fails. If hidden tokens still have an effect (a mixing of attention probabilities over heads), the
block must give the same in another order of its tokens.

A model gives its dense output with r = 0, bit for bit. With r > 0 every block gets the planned number of tokens.
Detached, it is as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from crossget.core.adapters import Tower
from crossget.core.attachment import Attachment, attach_towers, attached_tower
from crossget.core.block_class import argument_names
from crossget.core.inputs import tensors_in
from crossget.core.layout import APPENDING, BATCH_FIRST, PACKED, TOKENS_FIRST, BatchFirst
from crossget.core.loop_tower import count_blocks
from crossget.core.probe import Attentions, ModuleCall
from crossget.core.state import Forward, HostOutputs, TokenState
from crossget.core.tables import TableLayout, TableRows
from crossget.core.tower import AttachedTower, BlockCall
from crossget.methods.indexing import take
from crossget.methods.reducers import Reducer, ToMe
from crossget.methods.schedules import planned_tokens

# Names of the arguments in which blocks of language models get their cache.
CACHES = {"past_key_values", "past_key_value", "layer_past", "cache", "cache_params", "kv_cache"}
_MOST_APPENDED = 16  # tokens that a block may append to its own for its attention
# How far the output of a block on some of its tokens may be from that on all of them, as a share of the largest change
# that the block makes to a token.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
_HALF_TOLERANCE = 6e-2


class Refused(Exception):
    """A tower cannot be reduced. The message says why."""


# A block --------------------------------------------------------------------------------------------------------------


def recognise(call: ModuleCall) -> tuple[BatchFirst, int]:
    """The layout of a module's tokens, and the number of blocks in it.

    Raises:
        Refused: no attention over its tokens with a residual was recognised.
    """
    if any(call.kwargs.get(name) is not None for name in CACHES):
        raise Refused("it keeps a cache: it is a language model that generates")
    sizes: list[tuple[int, int]] = []
    try:
        with torch.no_grad(), Attentions(lambda queries, keys: sizes.append((queries, keys))):
            call.module.forward(call.tokens, *call.args, **call.kwargs)
    except Exception as error:  # it cannot be called a second time: it has filled a cache, say
        raise Refused(f"called by itself, it fails: {why(error)}") from error
    if not sizes:
        raise Refused("no attention was seen in it: it has none, or one in a kernel that hides its keys")
    layouts = _layouts(sizes, call.tokens)
    if not layouts:
        found = ", ".join(f"{queries} queries and {keys} keys" for queries, keys in dict.fromkeys(sizes))
        raise Refused(
            f"its attention is not over all tokens of {list(call.tokens.shape)}, but in windows or groups of {found}"
        )
    problem = ""
    for layout in layouts:
        tower = Tower("", [call.module], width=int(call.tokens.shape[-1]), layout=layout)
        try:
            if layout is BATCH_FIRST:
                state = _state(tower, call, AttachedTower(tower, ToMe(r=0)))
                count = count_blocks(call.module, call.tokens, state, call.args, call.kwargs)
                if count:
                    return layout, count
            else:
                _run_all(tower, call)
                return layout, 1
        except Exception as error:  # a module of any kind is called here, with a mode that may not fit it
            problem = problem or why(error)
        if layout is PACKED and "showed no" in problem:
            problem = "its attention does not run image by image over the packed sequence"
    raise Refused(problem or "its attention over all tokens is followed by no sum with its input (a residual)")


def _layouts(sizes: Sequence[tuple[int, int]], tokens: Tensor) -> list[BatchFirst]:
    """The layouts of tokens in which one of the attentions in a call is over all of them.

    Args:
        sizes: the numbers of queries and keys of each.
        tokens: [B, T, C], [T, B, C] or [N, C].
    """
    if tokens.dim() == 2:
        return [PACKED]
    square = {queries for queries, keys in sizes if queries == keys}
    first, second = (int(n) for n in tokens.shape[:2])
    found = [layout for size, layout in ((second, BATCH_FIRST), (first, TOKENS_FIRST)) if size in square]
    return [*found, *([APPENDING] if any(second < size <= second + _MOST_APPENDED for size in square) else [])]


def prove_blocks(tower: Tower, calls: Sequence[ModuleCall]) -> Tower:
    """The tower with the way in which its tables follow the tokens, after every block is proved.

    Args:
        tower: the tower.
        calls: one call of each of its blocks.

    Raises:
        Refused: a block gives something else on a part of its tokens.
    """
    with overriding(tower):
        variants: list[Tower] = []
        worst = 0.0
        for number, call in enumerate(calls):
            reason = ""
            for candidate in variants or list(_variants(tower, call)):
                error, problem = _error_of(candidate, call)
                if not problem:
                    variants, worst = [candidate], max(worst, error)
                    break
                reason = reason or problem
            else:
                raise Refused(f"block {number} ({type(call.module).__name__}): {reason}")
    (proved,) = variants
    notes = [f"every block gives the same on a part of its tokens, up to {worst:.0e} (proved)"]
    if proved.fit_arguments is not None or proved.makes_tables:
        where = "among the arguments" if proved.fit_arguments is not None else "inside the blocks"
        notes.append(f"tables with one row per token {where} (proved)")
    return replace(proved, notes=(*tower.notes, *notes))


def _variants(tower: Tower, call: ModuleCall) -> Iterable[Tower]:
    """The tower with each way in which tables may follow the tokens; the last ones are tables inside the block."""
    yield tower
    if not tower.loop:
        names = argument_names(type(call.module).forward)[1:]
        arguments = [*zip(names, call.args), *call.kwargs.items()]  # noqa: B905
        masks = [name for name, value in arguments if "mask" in name and isinstance(value, Tensor) and value.dim() == 4]
        if masks:  # some blocks check the shapes of their masks
            tower = replace(tower, masks=masks)
            yield tower
        state = _state(tower, call, AttachedTower(tower, ToMe(r=0)))
        if TableRows("b1n").tables(arguments, state):
            for layout in get_args(TableLayout):
                yield replace(tower, fit_arguments=TableRows(layout))
            yield replace(tower, fit_arguments=TableRows("bn"), makes_tables=True)
        yield replace(tower, makes_tables=True)


def _error_of(tower: Tower, call: ModuleCall) -> tuple[float, str]:
    """The error of a block on a part of its tokens, relative to the largest change that it makes to a token.

    The second value says why the block cannot be reduced. It is empty if it can.
    """
    try:
        return _prove_block(tower, call), ""
    except Refused as reason:
        return float("inf"), str(reason)
    except Exception as error:  # the block's own code, with fewer tokens than it expects
        return float("inf"), f"on a part of its tokens it fails: {why(error)}"


def _prove_block(tower: Tower, call: ModuleCall) -> float:
    """See `_error_of`.

    Raises:
        Refused: the error is too large.
    """
    tolerance = _TOLERANCE.get(call.tokens.dtype, _HALF_TOLERANCE)
    error = _subset_error(tower, call)
    if not error < tolerance and not tower.causal and not tower.loop:
        error = min(error, _order_error(tower, call))
    if not error < tolerance:
        raise Refused(
            f"on a part of its tokens it gives something else than on all of them (relative difference {error:.1e}): a "
            "convolution, a window, or positions made inside"
        )
    return error


def _subset_error(tower: Tower, call: ModuleCall) -> float:
    """Compare the block on 4 of 5 of its tokens, others for each image, with the block where the fifth is hidden."""
    attached = attached_tower(tower, ToMe(r=0))
    state = _state(tower, call, attached)
    batch, length = (int(n) for n in state.positions.shape)
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)).to(call.tokens.device)
    order = order.masked_fill(state.protected, 2.0)
    n_hidden = max(1, min(length // 5, length - state.forward.n_protected - 2))
    kept = order.argsort(1)[:, n_hidden:].sort(1).values
    sizes = torch.zeros(batch, length, device=kept.device).scatter(1, kept, 1.0)
    hidden = replace(state, sizes=sizes)  # log(0): no token attends to them
    return _difference_on(attached, call, kept, state, hidden)


def _order_error(tower: Tower, call: ModuleCall) -> float:
    """Compare the block on its tokens in another order, except the protected ones, with the block on them in order."""
    attached = attached_tower(tower, ToMe(r=0))
    state = _state(tower, call, attached)
    batch, length = (int(n) for n in state.positions.shape)
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)).to(call.tokens.device)
    kept = order.masked_fill(state.protected, -1.0).argsort(dim=1, stable=True)
    return _difference_on(attached, call, kept, state, state)


def _difference_on(
    attached: AttachedTower, call: ModuleCall, kept: Tensor, state: TokenState, reference: TokenState
) -> float:
    """The largest difference between a block on the tokens at `kept` [B, T] and on all of them, see `_prove_block`."""
    tokens = attached.tower.layout.to_batch(call.tokens, len(kept))
    # All tokens in another order are a new sequence, for which masks and tables stay as they are.
    is_part = kept.shape[1] < tokens.shape[1]
    part = replace(state, positions=kept, protected=state.protected.gather(1, kept), reduced=is_part)
    expected = take(_run(attached, call, tokens, reference), kept)
    found = _run(attached, call, take(tokens, kept), part)
    if found.shape != expected.shape:
        raise Refused(f"on {kept.shape[1]} of its {tokens.shape[1]} tokens it returns {list(found.shape)}")
    change = (expected - take(tokens, kept)).abs().max().clamp(min=1e-12)
    return float(((found - expected).abs().max() / change).float())


def _run(attached: AttachedTower, call: ModuleCall, tokens: Tensor, state: TokenState) -> Tensor:
    """[B, T, C] the output of a block for tokens [B, T, C] in this state; nothing is merged."""
    block_call = BlockCall(state, 0, "tokens")
    host_tokens = attached.tower.layout.from_batch(tokens)
    out = attached.run_forward(
        call.module, call.module.forward, (host_tokens, *call.args), dict(call.kwargs), block_call
    )
    return attached.tower.layout.to_batch(out[0] if isinstance(out, tuple) else out, len(tokens))


def _run_all(tower: Tower, call: ModuleCall) -> Tensor:
    attached = attached_tower(tower, ToMe(r=0))
    state = _state(tower, call, attached)
    return _run(attached, call, tower.layout.to_batch(call.tokens, len(state.positions)), state)


def _state(tower: Tower, call: ModuleCall, attached: AttachedTower) -> TokenState:
    """The state before a block of all its tokens."""
    batch = int(tower.layout.batch(call.tokens, [*call.args, *call.kwargs.values()]))
    length = int(tower.layout.to_batch(call.tokens, batch).shape[1])
    forward = Forward(
        attached, attached.reducer, 1, length, prefix=tower.prefix, causal=tower.causal, class_token=tower.class_token,
        padding=False, has_end=False, outputs=HostOutputs("tokens", "tokens", 0), fixed=tower.fixed,
    )  # fmt: skip
    return TokenState.start(forward, batch, call.tokens.device)


@contextmanager
def overriding(tower: Tower) -> Iterator[None]:
    """Context in which the tower's overrides apply."""
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in tower.overrides]
    for holder, name, value in tower.overrides:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def why(error: Exception) -> str:
    """The reason of an error, in one line."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, Refused | RuntimeError) else f"{type(error).__name__}: {text}"
    return text if len(text) < 300 else f"{text[:300]} ..."


# The whole model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One check of a model: what is claimed, whether it holds, and the numbers."""

    question: str
    ok: bool
    detail: str


def prove_model(
    model: nn.Module, run: Callable[[], Any], towers: Sequence[Tower], dense: Any = None, reducer: Reducer | None = None
) -> dict[str, str]:
    """Why a reducer does not work on towers of a model: name -> reason, empty for a tower where it works.

    Args:
        model: the model, in eval mode.
        run: runs it.
        towers: the towers.
        dense: what `run` returned before; None: it is run.
        reducer: the method. ToMe(r=2) if None.
    """
    reducer = ToMe(r=2) if reducer is None else reducer
    before = outputs_of(model, run() if dense is None else dense)

    def reason(some: Sequence[Tower]) -> str:
        try:
            checks = check_model(model, run, before, some, {tower.name: reducer for tower in some})
        except Exception as error:  # the model's own code, with fewer tokens than it expects
            return why(error)
        return "; ".join(f"{check.question} does not hold: {check.detail}" for check in checks if not check.ok)

    if not towers or not reason(towers):
        return {tower.name: "" for tower in towers}
    return {tower.name: reason([tower]) for tower in towers}


def check_model(
    model: nn.Module, run: Callable[[], Any], dense: list[Tensor], towers: Sequence[Tower],
    reducers: Mapping[str, Reducer],
) -> tuple[Check, ...]:  # fmt: skip
    """Check that reducers work on a model.

    Args:
        model: the model, not attached, in eval mode.
        run: runs it.
        dense: its output tensors.
        towers: its towers.
        reducers: the method of each tower, by name.
    """
    before = _structure(model)
    with attach_towers(towers, {name: _without_effect(one) for name, one in reducers.items()}):
        exact = _exact(dense, outputs_of(model, run()), reducers)
    with attach_towers(towers, reducers) as attached:
        reduced = outputs_of(model, run())
        effect = _effect(attached)
    again, after = outputs_of(model, run()), _structure(model)
    gap = difference(dense, again)
    repeats = gap if gap == 0.0 else difference(again, outputs_of(model, run()))
    return (
        Check("the model repeats itself", repeats == 0.0, f"largest difference between two runs {repeats:.1e}"),
        exact,
        effect,
        _finite(dense, reduced),
        *([_shapes(dense, reduced)] if all(tower.restore for tower in towers) else []),
        _no_trace(gap, before == after),
    )


def outputs_of(model: nn.Module, out: Any) -> list[Tensor]:
    """The tensors in what a model returned.

    Raises:
        ValueError: there are none.
    """
    tensors = list(tensors_in(out))
    if not tensors:
        raise ValueError(f"{type(model).__name__} returned no tensor, so that no outputs can be compared")
    return tensors


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two lists of tensors; infinite where shapes differ. NaN equals NaN."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    gaps = (
        float((x.float().nan_to_num() - y.float().nan_to_num()).abs().max())
        for x, y in zip(a, b, strict=True)
        if x.numel() and not torch.equal(x, y)
    )
    return max(gaps, default=0.0)


def removes_tokens(reducer: Reducer, tower: Tower) -> bool:
    """Whether some block is to remove tokens."""
    return tower.reducible and any(reducer.schedule.removed(layer, tower.depth, 1000) for layer in range(tower.depth))


def _without_effect(reducer: Reducer) -> Reducer:
    """A reducer of the same class that changes no bit: r = 0, no cross token, and all tokens in the last block."""
    changes: dict[str, Any] = {"r": 0, "cross_token": False, "class_token_only": False}
    if getattr(reducer, "importance", None) == "cross_token":
        changes["importance"] = None
    return replace(reducer, **{one.name: changes[one.name] for one in fields(reducer) if one.name in changes})


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """Classes, attributes, hooks, state dict keys and repr of a model, for comparison."""
    modules = tuple(
        (name, type(module), tuple(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    )
    return modules, tuple(model.state_dict()), repr(model)


def _exact(dense: list[Tensor], unmerged: list[Tensor], reducers: Mapping[str, Reducer]) -> Check:
    gap = difference(dense, unmerged)
    names = ", ".join(dict.fromkeys(type(reducer).__name__ for reducer in reducers.values()))
    return Check("r = 0 is the untouched model", gap == 0.0, f"{names}, largest difference {gap:.1e}")


def _effect(attached: Attachment) -> Check:
    details, ok = [], True
    for name, seen in attached.tokens.items():
        tower, reducer = attached.towers[name], attached.reducers[name]
        if not tower.reducible:
            continue
        n_reserved = tower.n_reserved(bool(reducer.cross_token))
        planned = planned_tokens(reducer.schedule, tower.depth, seen[0] if seen else 0, n_reserved)
        removes = removes_tokens(reducer, tower)
        ok = ok and seen == planned[:-1] and (planned[-1] < planned[0] or not removes)
        mismatch = "" if seen == planned[:-1] else f" (planned {planned[:-1]})"
        details.append(f"{name} {' '.join(map(str, seen)) or 'did not run'}{mismatch}")
    return Check("r > 0 reaches the planned tokens", ok, "; ".join(details))


def _finite(dense: list[Tensor], reduced: list[Tensor]) -> Check:
    """Whether the reduced output is finite where the dense one is."""
    bad = sum(int((~torch.isfinite(x)).sum()) for x in reduced if x.is_floating_point())
    allowed = sum(int((~torch.isfinite(x)).sum()) for x in dense if x.is_floating_point())
    return Check("the reduced output is finite", bad <= allowed, f"{bad} values are not")


def _shapes(dense: list[Tensor], reduced: list[Tensor]) -> Check:
    pairs = [(list(x.shape), list(y.shape)) for x, y in zip(dense, reduced, strict=False) if x.shape != y.shape]
    detail = f"{len(reduced)} tensors" + ("" if len(dense) == len(reduced) else f" instead of {len(dense)}")
    detail += "".join(f", {y} instead of {x}" for x, y in pairs[:3])
    return Check("the reduced output has the dense output's shapes", not pairs and len(dense) == len(reduced), detail)


def _no_trace(gap: float, same: bool) -> Check:
    detail = f"largest difference {gap:.1e}, classes, hooks, keys and repr {'unchanged' if same else 'CHANGED'}"
    return Check("detaching leaves no trace", gap == 0.0 and same, detail)
