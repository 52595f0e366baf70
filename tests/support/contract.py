"""What every adapter must pass: the probes, run on a small random model for each class of host.

A test file lists its cases and runs all probes on them (PROBES, or OTHERS and OF_BLOCKS apart):

    @pytest.mark.parametrize("probe", contract.PROBES, ids=contract.name)
    @pytest.mark.parametrize("case", CASES, ids=contract.name)
    def test_contract(case, probe):
        probe(case)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crossget
from crossget.core.adapters import adapted_towers
from crossget.core.discovery import discover
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import planned_tokens

# Dynamo has learned to trace a TorchFunctionMode, and an attribute set on a tensor, by this version.
COMPILES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


@dataclass(frozen=True)
class Case:
    """A small model: how to make it, what to feed it, how many tokens to remove per block."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    r: int = 2
    compiles: bool = True
    fused: bool = True  # the host calls scaled_dot_product_attention
    shortens: bool = False  # what comes out is shorter, as the tower's tokens stay reduced
    skipped: int = 0  # blocks that are not run, as nobody reads them
    hands_on: bool = False  # text blocks return more than their tokens: a bias, or keys and values
    parallel: bool = False  # its MLP runs beside the attention, in front of the residual
    pickles: bool = True  # the host can be pickled itself after it has run


def name(thing: Any) -> str:
    return str(getattr(thing, "id", getattr(thing, "__name__", thing)))


def slow_unless(keep: Callable[[str], bool], cases: Iterable[Any]) -> list[Any]:
    """The same cases, or parameters of a test, of which those whose id is not to be kept are slow."""
    params = [pytest.param(case, id=case.id) if isinstance(case, Case) else case for case in cases]
    kept = ((param, () if keep(param.id) else (pytest.mark.slow,)) for param in params)
    return [pytest.param(*param.values, id=param.id, marks=(*param.marks, *slow)) for param, slow in kept]


def build(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model with every parameter perturbed: layer scales, zero-initialised biases and embeddings all matter."""
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(1)
    return model, case.inputs()


def leaves(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return leaves(model(*inputs))


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def everywhere(model: nn.Module, reducer: Reducer) -> dict[str, Reducer]:
    towers = crossget.find_towers(model)
    return {tower.name: reducer if tower.reducible else dataclasses.replace(reducer, r=0) for tower in towers}


def identity(model: nn.Module) -> Any:
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    inside = [(key, type(module), sorted(module.__dict__)) for key, module in model.named_modules()]
    return inside, hooks, list(model.state_dict()), repr(model)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# The probes ---------------------------------------------------------------------------------------------------------


def a_forward_shows_the_declared_tower(case: Case) -> None:
    """What the adapter says of an image tower is what a forward shows."""
    model, inputs = build(case)
    (declared,) = (tower for tower in adapted_towers(model) if tower.name == "visual")
    (found,) = (tower for tower in discover(model, inputs) if tower.name == "visual")
    assert list(found.blocks) == list(declared.blocks)
    assert (found.width, found.prefix, found.class_token) == (declared.width, declared.prefix, declared.class_token)


def zero_is_identity(case: Case) -> None:
    model, inputs = build(case)
    with without_fast_path():
        dense = run(model, inputs)
        for reducer in (
            crossget.ToMe(r=0),
            crossget.CrossGET(r=0, cross_token=False, guided_matching=False, ensemble="size"),
        ):
            with crossget.attach(model, everywhere(model, reducer)) as attached:
                assert all_equal(run(model, inputs), dense)
                assert attached.tokens.keys() == {tower.name for tower in crossget.find_towers(model)}


def reaches_planned_tokens(case: Case) -> None:
    model, inputs = build(case)
    dense = run(model, inputs)
    for method in (crossget.CrossGET, crossget.ToMe, crossget.Random):
        with crossget.attach(model, everywhere(model, method(r=case.r))) as attached:
            out = run(model, inputs)
            assert ([x.shape for x in out] != [x.shape for x in dense]) == case.shortens
            assert all(torch.isfinite(x).all() for x in out if x.is_floating_point())
            assert not all_equal(out, dense)
            for tower_name, tokens in attached.tokens.items():
                tower, reducer = attached.towers[tower_name], attached.reducers[tower_name]
                if not tower.reducible:
                    assert len(set(tokens)) == bool(reducer.cross_token)
                    continue
                reserved = tower.n_reserved(bool(reducer.cross_token))
                plan = planned_tokens(reducer.schedule, len(tower.blocks), tokens[0], reserved)
                assert tokens == plan[:-1]
                assert plan[-1] < plan[0]
                source = attached.source[tower_name]
                assert source.shape[1] == tokens[0] - bool(reducer.cross_token)
                assert int(source.max()) == plan[-1 - case.skipped] - 1 - bool(reducer.cross_token)


def what_is_unread_may_be_skipped(case: Case) -> None:
    """The result stays, and the last blocks do less exactly where the host's call reads one token of them."""
    model, inputs = build(case)
    towers = crossget.find_towers(model)
    layers = [layer for tower in towers for layer in tower.blocks[-1].modules() if isinstance(layer, nn.Linear)]
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    outs, work = [], []
    for skip in (False, True):
        with crossget.attach(
            model, everywhere(model, crossget.ToMe(r=case.r, class_token_only=None if skip else False))
        ):
            seen.clear()
            outs.append(run(model, inputs))
            work.append(sum(seen))
    for out, expected in zip(*outs, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    single_token_outputs = [readout for tower in towers for readout in tower.single_token_outputs]
    assert (work[1] < work[0]) == (
        not case.parallel and any(readout.applies(readout.module) for readout in single_token_outputs)
    )


def detach_leaves_no_trace(case: Case) -> None:
    model, inputs = build(case)
    dense, before = run(model, inputs), identity(model)
    attached = crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r)))
    assert list(model.state_dict()) == before[2]
    assert repr(model) == before[3]
    assert [key for key, _ in model.named_modules()] == [key for key, _, _ in before[0]]
    run(model, inputs)
    attached.detach()
    assert identity(model) == before
    assert all_equal(run(model, inputs), dense)
    with pytest.raises(RuntimeError, match="already detached"):
        attached.detach()


class Boom(Exception):
    pass


@contextlib.contextmanager
def exploding(model: nn.Module, case: Case) -> Iterator[None]:
    """Inside, the last block that runs raises in its first linear layer."""

    def explode(*_: Any) -> None:
        raise Boom

    block = crossget.find_towers(model)[0].blocks[-1 - case.skipped]
    hooks = [m.register_forward_pre_hook(explode) for m in block.modules() if isinstance(m, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def detaches_after_an_exception(case: Case) -> None:
    model, inputs = build(case)
    dense, before = run(model, inputs), identity(model)
    reducers = everywhere(model, crossget.CrossGET(r=case.r))
    with exploding(model, case), pytest.raises(Boom), crossget.attach(model, reducers) as attached:
        run(model, inputs)
    assert not attached.is_attached
    assert identity(model) == before
    assert all_equal(run(model, inputs), dense)


def survives_an_exception(case: Case) -> None:
    model, inputs = build(case)
    with crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r))):
        expected = run(model, inputs)
        with exploding(model, case), pytest.raises(Boom):
            run(model, inputs)
        assert all_equal(run(model, inputs), expected)


def refuses_to_attach_twice(case: Case) -> None:
    model, inputs = build(case)
    dense = run(model, inputs)
    crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r)))
    with pytest.raises(ValueError, match=r"already attached.*detach\(\)"):
        crossget.attach(model, crossget.CrossGET(r=1))
    crossget.attachment(model).detach()  # the way out that the message names
    assert all_equal(run(model, inputs), dense)


def intermediates_keep_their_shape(case: Case) -> None:
    model, inputs = build(case)
    host = getattr(model, "visual", model)
    dense_features = features = None
    reducer = crossget.CrossGET(r=case.r)
    with torch.no_grad():
        if hasattr(host, "forward_features"):
            dense_features = leaves(host.forward_features(inputs[0]))
        dense = _intermediates(host, inputs)
        with crossget.attach(model, everywhere(model, reducer)) as attached:
            if dense_features is not None:
                features = leaves(host.forward_features(inputs[0]))
            reduced = _intermediates(host, inputs)
            shown = attached.tokens.get("visual") if dense or features else None
            again = run(model, inputs)
    if features is not None and dense_features is not None:
        assert [x.shape for x in features] == [x.shape for x in dense_features]
    assert [x.shape for x in reduced] == [x.shape for x in dense]
    if dense and shown:
        assert shown[-1] < shown[0]
        assert not all_equal(reduced, dense)
    assert all(torch.isfinite(x).all() for x in again)


def _intermediates(host: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    if not hasattr(host, "forward_intermediates"):
        return []
    return leaves(host.forward_intermediates(inputs[0]))


def checkpointing_changes_nothing(case: Case) -> None:
    model, inputs = build(case)
    switch = _checkpointing(model)
    if switch is None:
        return
    dense = []
    for enabled in (False, True):
        switch(enabled)
        dense.append(leaves(model(*inputs)))
    with crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r))) as attached, without_fast_path():
        results = []
        for enabled in (False, True):
            switch(enabled)
            model.zero_grad()
            for parameter in attached.parameters():
                parameter.grad = None
            out = leaves(model(*inputs))
            sum(x.square().mean() for x in out if x.requires_grad).backward()
            grads = [p.grad for p in (*model.parameters(), *attached.parameters()) if p.grad is not None]
            results.append((out, [grad.clone() for grad in grads], attached.tokens))
        switch(False)
    (out, grads, tokens), (out_again, grads_again, tokens_again) = results
    assert tokens == tokens_again
    assert len(grads) == len(grads_again) > 0
    # To the last bit, unless the host itself adds up in another order then: BLIP's decoder does without its cache.
    exact = all_equal(*dense)
    torch.testing.assert_close(out_again, out, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    torch.testing.assert_close(grads_again, grads, rtol=1e-5, atol=1e-6)


def _checkpointing(model: Any) -> Callable[[bool], None] | None:
    """What turns the host's gradient checkpointing on and off."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return getattr(model, "set_grad_checkpointing", None)
    model.train()  # transformers checkpoints in training only; the small models have no dropout
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.24

    def switch(enabled: bool) -> None:
        options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} if enabled else {}
        getattr(model, f"{kind}_checkpointing_{'enable' if enabled else 'disable'}")(**options)

    return switch


def copies_are_independent(case: Case) -> None:
    model, inputs = build(case)
    with crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r))) as attached:
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.1)
        expected = run(model, inputs)
        copies = [copy.deepcopy(model)]
        if case.pickles:
            copies.append(pickle.loads(pickle.dumps(model)))  # our own bytes
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copies.append(torch.load(buffer, weights_only=False))
        for other in copies:
            handle = crossget.attachment(other)
            assert handle is not attached
            assert handle.reducers == attached.reducers
            assert all_equal(run(other, inputs), expected)
            assert (
                crossget.find_towers(other)[0].blocks[0] is not attached.towers[next(iter(attached.towers))].blocks[0]
            )
            handle.detach()
            assert not all_equal(run(other, inputs), expected)
        assert all_equal(run(model, inputs), expected)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all_equal(run(model, inputs), expected)


def threads_and_neighbours_do_not_disturb(case: Case) -> None:
    model, inputs = build(case)
    other = copy.deepcopy(model)
    with (
        crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r))),
        crossget.attach(other, everywhere(other, crossget.ToMe(r=1))),
    ):
        jobs = [(model, inputs), (other, inputs), (model, tuple(_flip(x) for x in inputs))]
        expected = [run(*job) for job in jobs]
        found: list[bool] = []

        def work(number: int) -> None:
            found.extend(all_equal(run(*jobs[number]), expected[number]) for _ in range(2))

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 2, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8


def _flip(x: Any) -> Any:
    return x.flip(0) if isinstance(x, Tensor) else x


def compiles_to_one_graph(case: Case) -> None:
    if not (COMPILES and case.compiles):
        return
    model, inputs = build(case)
    # How a CPU orders equal values depends on their number. A compiled graph sorts a row together with its padding.
    padded = any(isinstance(x, Tensor) and not x.is_floating_point() and bool((x == 0).any()) for x in inputs)
    every_ties: tuple[Literal["torch", "stable"], ...] = ("torch", "stable") if padded else ("torch",)
    for ties in every_ties:
        reducer = crossget.CrossGET(r=case.r, ties=ties)
        with crossget.attach(model, everywhere(model, reducer)) as attached, without_fast_path():
            expected, tokens = run(model, inputs), attached.tokens
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            with torch.no_grad():
                out = leaves(compiled(*inputs))
            assert attached.tokens == tokens
        if ties == every_ties[-1]:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def autocast_works(case: Case) -> None:
    model, inputs = build(case)
    with crossget.attach(model, everywhere(model, crossget.CrossGET(r=case.r))) as attached:
        run(model, inputs)
        tokens = attached.tokens
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, inputs)
        assert attached.tokens == tokens
    assert all(torch.isfinite(x).all() for x in out)


class _FusedCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def fused_attention_stays(case: Case) -> None:
    if not case.fused:
        return
    model, inputs = build(case)
    counts = []
    with without_fast_path():
        for reducer in (None, crossget.CrossGET(r=case.r), crossget.CrossGET(r=case.r, importance="attention")):
            context = (
                contextlib.nullcontext() if reducer is None else crossget.attach(model, everywhere(model, reducer))
            )
            with context, _FusedCalls() as calls:
                run(model, inputs)
            counts.append(calls.count)
    assert counts[0] > 0
    assert counts[1:] == [counts[0] - case.skipped] * 2


PROBES = [
    zero_is_identity,
    reaches_planned_tokens,
    what_is_unread_may_be_skipped,
    detach_leaves_no_trace,
    detaches_after_an_exception,
    survives_an_exception,
    refuses_to_attach_twice,
    intermediates_keep_their_shape,
    checkpointing_changes_nothing,
    copies_are_independent,
    threads_and_neighbours_do_not_disturb,
    compiles_to_one_graph,
    autocast_works,
    fused_attention_stays,
]
# What these say of blocks, one host shows for all that have the same blocks.
OF_BLOCKS = [
    detaches_after_an_exception,
    survives_an_exception,
    checkpointing_changes_nothing,
    copies_are_independent,
    threads_and_neighbours_do_not_disturb,
    fused_attention_stays,
]
OTHERS = [probe for probe in PROBES if probe not in OF_BLOCKS]
