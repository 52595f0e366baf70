"""The Triton kernels against loops: on Triton's interpreter, which needs no GPU, and on a GPU with `-m gpu`.

The interpreter has to be chosen before Triton is imported. So `TestAgainstLoops` is for a GPU, and one test runs it
once more in a process of its own, where TRITON_INTERPRET=1 makes it a class for the CPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crossget import CrossGET
from crossget.methods import kernels
from crossget.methods.matching import Candidates
from crossget.methods.reducers import TowerFacts, View

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = int(os.environ.get("CROSSGET_TEST_EXAMPLES", "30"))  # of matching; the interpreter is slow
DEVICE = "cpu" if INTERPRETED else "cuda"
ROOT = Path(__file__).parents[2]
TRITON = ROOT / "crossget" / "methods" / "_triton.py"
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
needs_triton = pytest.mark.skipif(kernels._kernels() is None, reason="needs triton 3.4")


# Loops ----------------------------------------------------------------------------------------------------------------


def similarity_of(keys: Tensor, protected: Tensor) -> list[list[float]]:
    """[T, C], [T]: cosines, -inf where a pair must not be matched."""
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    rows = (unit @ unit.T).tolist()
    barred = protected.tolist()
    for i in range(len(rows)):
        for j in range(i, len(rows)):
            rows[j][i] = rows[i][j]
            if i == j or barred[i] or barred[j]:
                rows[i][j] = rows[j][i] = -math.inf
    return rows


def priority_of(rows: list[list[float]], importance: Tensor | None) -> list[float]:
    tokens, best = range(len(rows)), [max(row) for row in rows]
    priority = []
    for i in tokens:
        below = [j for j in tokens if best[j] < best[i] or (best[j] == best[i] and j > i)]
        partner = max((rows[i][j] for j in below), default=-math.inf)
        priority.append((0.0 if importance is None else float(importance[i])) - partner)
    return priority


def matching(rows: list[list[float]], r: int, importance: Tensor | None) -> tuple[list[int], list[int], float]:
    """Sources, destinations, and the smallest difference between two numbers of which one was chosen."""
    priority = priority_of(rows, importance)
    order = sorted(range(len(rows)), key=lambda i: priority[i])
    sources = order[:r]
    stay = [j for j in range(len(rows)) if j not in sources]
    destinations = [max(stay, key=lambda j: (rows[i][j], -j)) for i in sources]
    best = sorted({max(row) for row in rows})
    chosen = [priority[i] for i in order[: r + 1]]
    margins = [b - a for a, b in itertools.pairwise(best)]
    margins += [b - a for a, b in itertools.pairwise(chosen)]
    for i, j in zip(sources, destinations, strict=True):
        margins += [rows[i][j] - rows[i][k] for k in stay if k != j]
    return sources, destinations, min(margins, default=math.inf)


def pulled(tokens: Tensor, plan: tuple[Tensor, ...]) -> Tensor:
    kept, source, destination, arrived, take, give = plan
    images = []
    for b in range(len(tokens)):
        rows = [tokens[b, t] for t in kept[b].tolist()]
        for a, n in enumerate(arrived[b].tolist()):
            rows[n] = rows[n] + take[b, a] * tokens[b, source[b, a]] - give[b, a] * tokens[b, destination[b, a]]
        images.append(torch.stack(rows))
    return torch.stack(images)


# Inputs ---------------------------------------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same [B, T, C] in other strides."""
    if layout == "part of qkv":
        return torch.stack([x + 1, x, x - 1], 2)[:, :, 1]
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels apart":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


LAYOUTS = ["contiguous", "part of qkv", "tokens first", "channels apart"]


@st.composite
def candidates(draw: Any) -> tuple[Tensor, Tensor, int, Tensor | None, int, Tensor | None]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(5, 40))
    width = draw(st.sampled_from([8, 32, 40, 64, 96]))
    keys = torch.randn(batch, tokens, width, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    keys = laid_out(keys.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))
    place = torch.arange(tokens)
    protected = ((place == 0) | (place == tokens - 1)).expand(batch, tokens)
    n_protected, valid = 2, None
    if draw(st.booleans()):
        protected = protected | (place == torch.randint(tokens, (batch, 1), generator=generator))
        n_protected = 3
    if draw(st.booleans()):
        valid = place < torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    limit = (tokens - n_protected) // 2
    assume(limit > 0)
    importance = None
    if draw(st.booleans()):
        importance = torch.rand(batch, tokens, 2, generator=generator)[..., 1]  # with gaps
    return keys, protected, n_protected, valid, draw(st.one_of(st.just(limit), st.integers(1, limit))), importance


def moved(*tensors: Any) -> tuple[Any, ...]:
    """The tensors on the device; strides stay as they are."""
    return tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
        if isinstance(x, Tensor) and 0 not in x.stride()
        else x.to(DEVICE)
        if isinstance(x, Tensor)
        else x
        for x in tensors
    )


def plan_for(batch: int, tokens: int, r: int) -> tuple[Tensor, ...]:
    order = torch.rand(batch, tokens).argsort(1)
    source = order[:, :r]
    kept = order[:, r:].sort(1).values
    arrived = torch.randint(tokens - r, (batch, r))
    take, give = torch.rand(batch, r, 2).unbind(2)
    destination, give = kept.gather(1, arrived), give - 0.3
    if r > 1:  # one source is dropped
        arrived[0, -1], take[0, -1], give[0, -1], destination[0, -1] = -1, 0.0, 0.0, kept[0, 0]
    return kept, source, destination, arrived, take, give


# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> Any:
    """The interpreter multiplies bfloat16 as the integers it stores them as, and adds up in numpy's order, in which
    some processors give S_ij and S_ji another last bit. Here, in float64, they round to the same."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x: Any) -> Any:
        numbers = (x.data.astype("uint32") << 16).view("float32") if x.dtype.scalar == tl.bfloat16 else x.data
        return numbers.astype("float64")

    def dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        product = (widened(a) @ widened(b)).astype(total.data.dtype)
        return TensorHandle(product + total.data, total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@(lambda cls: needs_triton(cls if INTERPRETED else pytest.mark.gpu(cls)))
class TestAgainstLoops:
    @given(candidates())
    @settings(max_examples=EXAMPLES, phases=[Phase.generate])  # the interpreter is too slow to look for smaller cases
    def test_matching(self, case: tuple[Tensor, Tensor, int, Tensor | None, int, Tensor | None]) -> None:
        keys, protected, n_protected, valid, r, importance = case
        own = Candidates(keys, protected, n_protected, valid)
        counts = [r] * len(keys) if valid is None else own.removed(r).tolist()
        expected = []
        for b, count in enumerate(counts):
            rows = similarity_of(keys[b], own.protected[b])
            expected.append(matching(rows, count, None if importance is None else importance[b]))
        assume(min(margin for *_, margin in expected) > 4e-6)  # rounding decides nothing
        keys, protected, valid, importance = moved(keys, protected, valid, importance)
        given = Candidates(keys, protected, n_protected, valid)
        pick = None if valid is None else given.sources
        sources, destinations = kernels.complete_graph(keys, given.protected, r, importance, pick)
        for b, count in enumerate(counts):
            assert (sources[b, :count].tolist(), destinations[b, :count].tolist()) == expected[b][:2]
            rest = sources[b, count:].tolist()
            assert len(set(rest)) == r - count
            assert valid is None or own.padding[b, rest].all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matching_of_ties(self, dtype: torch.dtype) -> None:
        """Cosines are multiples of 1/16: which of equal priorities comes first is open, all else is not."""
        keys = torch.randn(2, 37, 16).sign().to(dtype)
        protected = torch.zeros(2, 37, dtype=torch.bool)
        sources, destinations = (x.cpu() for x in kernels.complete_graph(*moved(keys, protected, 15, None)))
        for b in range(2):
            rows = similarity_of(keys[b], protected[b])
            priority = priority_of(rows, None)
            picked = sources[b].tolist()
            assert len(set(picked)) == 15
            assert [priority[i] for i in picked] == sorted(priority)[:15]
            stay = [j for j in range(37) if j not in picked]
            assert destinations[b].tolist() == [max(stay, key=lambda j: (rows[i][j], -j)) for i in picked]

    def test_of_two_nearest_neighbours_the_earlier_looks_for_a_partner(self) -> None:
        keys = torch.eye(6)[None] + 0.01 * torch.randn(1, 6, 6)
        keys[0, 4] = keys[0, 1] + 0.1 * keys[0, 2]
        protected = torch.zeros(1, 6, dtype=torch.bool)
        source, destination = kernels.complete_graph(*moved(keys, protected, 1, None))
        assert (source.tolist(), destination.tolist()) == ([[1]], [[4]])

    def test_matching_of_keys_without_length_stays_in_bounds(self) -> None:
        keys, protected = torch.zeros(1, 9, 8), torch.zeros(1, 9, dtype=torch.bool)
        source, destination = kernels.complete_graph(*moved(keys, protected, 4, None))
        assert not set(source[0].tolist()) & set(destination[0].tolist())
        assert set(destination[0].tolist()) <= set(range(9))

    def test_matching_of_nothing(self) -> None:
        for batch, r in ((2, 0), (0, 3)):
            keys, protected = torch.randn(batch, 9, 8), torch.zeros(batch, 9, dtype=torch.bool)
            for found in kernels.complete_graph(*moved(keys, protected, r, None)):
                assert (found.shape, found.dtype) == ((batch, r), torch.long)

    def test_matching_carries_no_gradient(self) -> None:
        keys, protected = moved(torch.randn(1, 9, 8), torch.zeros(1, 9, dtype=torch.bool))
        for found in kernels.complete_graph(keys.requires_grad_(), protected, 2, None):
            assert not found.requires_grad

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("tokens", "r", "width", "layout"),
        [
            (7, 3, 8, "contiguous"),
            (19, 9, 40, "part of qkv"),
            (9, 8, 5, "tokens first"),
            (5, 0, 16, "contiguous"),
            (4, 2, 2100, "channels apart"),
        ],
    )
    def test_pull(self, tokens: int, r: int, width: int, dtype: torch.dtype, layout: str) -> None:
        x = laid_out(torch.randn(2, tokens, width).to(dtype), layout)
        plan = plan_for(2, tokens, r)
        exact = x.double().requires_grad_()
        grad = torch.randn(2, tokens - r, width).to(dtype)
        expected = pulled(exact, plan)
        expected.backward(grad.double())
        (mine,) = moved(x)
        out = kernels.pull(mine.requires_grad_(), *moved(*plan))
        out.backward(*moved(laid_out(grad, layout)))
        assert (out.dtype, mine.grad.dtype, mine.grad.shape) == (dtype, dtype, x.shape)
        # One rounding: half of the last bit. The interpreter cuts bfloat16 off instead, which costs up to all of it.
        rtol = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}[dtype]
        torch.testing.assert_close(out.cpu().double(), expected, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, rtol=rtol, atol=1e-6)

    def test_pull_of_more_sources_than_one_look(self) -> None:
        x, plan = torch.randn(1, 1030, 4), plan_for(1, 1030, 1027)
        out = kernels.pull(*moved(x, *plan))
        torch.testing.assert_close(out.cpu().double(), pulled(x.double(), plan), rtol=1e-5, atol=1e-5)

    def test_pull_takes_the_gradient_of_a_sum(self) -> None:
        """Which is one number, seen as many."""
        x, plan = torch.randn(2, 9, 8), plan_for(2, 9, 4)
        exact = x.double().requires_grad_()
        pulled(exact, plan).sum().backward()
        (mine,) = moved(x)
        kernels.pull(mine.requires_grad_(), *moved(*plan)).sum().backward()
        torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, rtol=1e-6, atol=1e-6)

    def test_a_second_gradient_is_refused(self) -> None:
        x, *plan = moved(torch.randn(1, 5, 4), *plan_for(1, 5, 2))
        out = kernels.pull(x.requires_grad_(), *plan)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in short", "whole"])
def test_on_the_interpreter(whole: bool) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["CROSSGET_TEST_EXAMPLES"] = "30" if whole else "8"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::DeprecationWarning",
        f"{__file__}::TestAgainstLoops",
        *([] if whole else ["-k", "not more_sources"]),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.gpu
@needs_triton
class TestOnTheDevice:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large(self, dtype: torch.dtype) -> None:
        keys = torch.randn(2, 577, 3 * 1000, device="cuda").to(dtype)[..., 1000:2000]
        protected = torch.zeros(2, 577, dtype=torch.bool, device="cuda")
        protected[:, [0, -1]] = True
        importance = torch.rand(2, 577, device="cuda")
        sources, destinations = kernels.complete_graph(keys, protected, 100, importance)
        for b in range(2):
            expected = matching(similarity_of(keys[b], protected[b]), 100, importance[b])
            if expected[2] > 4e-6:
                assert (sources[b].tolist(), destinations[b].tolist()) == expected[:2]

    def test_repeats_itself_to_the_last_bit(self) -> None:
        keys = torch.randn(4, 400, 768, device="cuda", dtype=torch.bfloat16)
        protected = torch.zeros(4, 400, dtype=torch.bool, device="cuda")
        x, *plan = moved(torch.randn(4, 400, 768), *plan_for(4, 400, 100))
        found = kernels.complete_graph(keys, protected, 50, None)
        out = kernels.pull(x, *plan)
        for _ in range(5):
            assert all(map(torch.equal, kernels.complete_graph(keys, protected, 50, None), found))
            assert torch.equal(kernels.pull(x, *plan), out)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_never_waits_for_the_device(self) -> None:
        keys = torch.randn(2, 60, 64, device="cuda")
        protected = torch.zeros(2, 60, dtype=torch.bool, device="cuda")
        x, *plan = moved(torch.randn(2, 60, 64), *plan_for(2, 60, 20))

        def step() -> None:
            kernels.complete_graph(keys, protected, 10, None)
            kernels.pull(x.requires_grad_(), *plan).sum().backward()

        step()  # chooses its tiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_usable(self) -> None:
        x = torch.zeros(1, device="cuda")
        assert kernels.usable(x) == (torch.cuda.get_device_capability() >= (8, 0))
        assert not kernels.usable(x.double())
        with kernels.disabled():
            assert not kernels.usable(x)


# When they are used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_not_usable_without_cuda(device: str) -> None:
    assert not kernels.usable(torch.zeros(1, device=device))


def test_not_usable_for_tensors_that_hold_no_data() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(1, device="cuda")
    assert x.is_cuda
    assert not kernels.usable(x)


class TestUsable:
    """Everything but the device, which is taken to be a good one."""

    X = torch.zeros(2)

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_runs_on", lambda tensor: True)
        monkeypatch.delenv("CROSSGET_TRITON", raising=False)

    def test_at_first(self) -> None:
        assert kernels.usable(self.X)

    def test_disabled(self) -> None:
        with kernels.disabled():
            with kernels.disabled():
                assert not kernels.usable(self.X)
            assert not kernels.usable(self.X)
        assert kernels.usable(self.X)
        with pytest.raises(KeyError), kernels.disabled():
            raise KeyError
        assert kernels.usable(self.X)

    @pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True)])
    def test_environment(self, value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CROSSGET_TRITON", value)
        assert kernels.usable(self.X) == expected

    def test_observed(self) -> None:
        seen = []

        def look(x: Tensor) -> Tensor:
            seen.append(kernels.usable(x))
            return x + 1

        torch.jit.trace(look, self.X, check_trace=False)
        torch.func.vmap(look)(self.X)
        with FlopCounterMode(display=False):
            look(self.X)
        assert seen == [False, False, False]

    def test_compiled(self) -> None:
        compiled = torch.compile(lambda x: x + 1 if kernels.usable(x) else x - 1, backend="eager", fullgraph=True)
        assert torch.equal(compiled(self.X), self.X - 1)


@pytest.mark.parametrize("ensemble", ["guided", "size", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_asks_for_what_the_kernels_answer(
    ensemble: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops stand in for the kernels: what they get has to lead to what the plain operators make of it."""
    keys, x = torch.randn(2, 4, 20, 8).to(dtype), torch.randn(2, 20, 12).to(dtype)
    protected = torch.zeros(2, 20, dtype=torch.bool)
    protected[:, [0, -1]] = True
    view = View(x, keys.flip(2), keys, None, torch.randint(1, 5, (2, 20)).float(), protected, 2, None, 19)
    reducer = CrossGET(6, ensemble=ensemble, ties="stable").resolved(TowerFacts("tower"))
    expected = reducer.reduce(view, 6)
    asked = []

    def in_loops(given: Tensor, protected: Tensor, r: int, importance: Any, pick: Any) -> tuple[Tensor, Tensor]:
        asked.append("matching")
        found = [matching(similarity_of(given[b], protected[b]), r, importance[b]) for b in range(2)]
        return torch.tensor([f[0] for f in found]), torch.tensor([f[1] for f in found])

    def joined(tokens: Tensor, *plan: Tensor) -> Tensor:
        asked.append("ensemble")
        return pulled(tokens.float(), plan).to(tokens.dtype)

    monkeypatch.setattr(kernels, "usable", lambda tensor: True)
    monkeypatch.setattr(kernels, "complete_graph", in_loops)
    monkeypatch.setattr(kernels, "pull", joined)
    found = reducer.reduce(view, 6)
    assert asked == (["matching", "ensemble"] if dtype in HALF else ["ensemble"])
    assert expected is not None
    assert found is not None
    assert torch.equal(found[2].source, expected[2].source)
    assert torch.equal(found[2].index, expected[2].index)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert torch.equal(found[1], expected[1])


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels._kernels.__wrapped__() is None


@pytest.mark.slow
def test_a_process_without_triton() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import crossget.methods.kernels
        assert "crossget.methods._triton" not in sys.modules
        assert crossget.methods.kernels._kernels() is None
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Compilation, for which a device is only a name -----------------------------------------------------------------------

_POINTERS = {
    "norms": "fp32", "best": "fp32", "protected": "i1", "group": "i8", "is_source": "i8",
    "importance": "fp32", "kept": "i64", "source": "i64", "new_destination": "i64", "taken": "fp32", "given": "fp32",
}  # fmt: skip
_OUT = {"priority": "fp32", "nearest": "i64"}
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compiled_to(capability: int, name: str, dtype: torch.dtype, which: int = 0, **constants: Any) -> dict[str, Any]:
    """The stages of a compilation, by name; the tile sizes are the ones at place `which`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("this Triton is asked in another way")
    kernel = getattr(importlib.import_module("crossget.methods._triton"), name)
    options = {"num_warps": 4}
    if name in ("pull", "push"):
        constants = {"BLOCK_R": 16, "BLOCK_C": 1024, **constants}
    else:
        configs = kernel.early_config_prune(kernel.configs, {"keys": torch.empty(0, dtype=dtype)})
        if which >= len(configs):
            pytest.skip("fewer tile sizes for this dtype")
        constants = {**configs[which].kwargs, **constants}
        options = {"num_warps": configs[which].num_warps, "num_stages": configs[which].num_stages}
        kernel = kernel.fn
    constants = {"C": 768, **constants}
    tensors = {**_POINTERS, **dict.fromkeys(("keys", "tokens", "grad"), _NAMES[dtype])}
    tensors["out"] = _OUT.get(name, _NAMES[dtype])
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else "i32"
        if argument in tensors and argument not in constants:
            signature[argument] = "*" + tensors[argument]
        # As torch's memory and most strides are.
        if signature[argument][0] == "*" or argument in ("keys_t", "tokens_t", "grad_n"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


# With tensor cores and without, for one kind of device; half precision in its other form and older devices are slow.
KINDS = [
    (torch.float32, 90),
    (torch.bfloat16, 90),
    *[pytest.param(dtype, 80, marks=pytest.mark.slow) for dtype in DTYPES],
    pytest.param(torch.float16, 90, marks=pytest.mark.slow),
]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
class TestCompilation:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @pytest.mark.parametrize(("dtype", "capability"), KINDS, ids=str)
    @pytest.mark.parametrize("name", ["row_max", "priority", "nearest"])
    def test_matching(self, name: str, dtype: torch.dtype, capability: int) -> None:
        stages = compiled_to(capability, name, dtype, which=1)
        assert stages["cubin"]
        assert f".target sm_{capability}" in stages["ptx"]
        assert "atom." not in stages["ptx"]
        assert ("mma" in stages["ptx"]) == (dtype in HALF)  # tensor cores, and no tf32

    @pytest.mark.parametrize(("dtype", "capability"), KINDS, ids=str)
    @pytest.mark.parametrize("name", ["pull", "push"])
    def test_ensemble(self, name: str, dtype: torch.dtype, capability: int) -> None:
        for more in ({}, {"C": 5000, "BLOCK_R": 1024, "BLOCK_C": 2048}):
            stages = compiled_to(capability, name, dtype, **more)
            assert stages["cubin"]
            assert "atom." not in stages["ptx"]
            assert "red.global" not in stages["ptx"]
            if dtype in HALF:
                assert f"cvt.rn.{_NAMES[dtype].replace('fp', 'f')}" in stages["ptx"]  # to the nearest

    @pytest.mark.parametrize(
        ("name", "constants"),
        [
            ("row_max", {"protected_t": 1, "C": 40}),
            ("priority", {"importance": None, "C": 1100}),
            pytest.param("row_max", {"C": 1100}, marks=pytest.mark.slow),
            pytest.param("nearest", {"C": 1100}, marks=pytest.mark.slow),
        ],
    )
    def test_what_may_be_absent_and_odd_widths(self, name: str, constants: dict[str, Any]) -> None:
        assert compiled_to(90, name, torch.bfloat16, **constants)["cubin"]

    def test_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the call to the launch, which is left out: arguments are bound and kernels compiled as for a device."""
        from triton.backends.compiler import GPUTarget
        from triton.runtime import JITFunction, driver

        if not hasattr(driver, "_active"):
            pytest.skip("this Triton keeps its device in another way")

        class Device:
            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 90, 32)

        dtype = torch.bfloat16
        # Kernels of its own, since they remember what they were compiled for.
        spec = importlib.util.spec_from_file_location(
            "crossget_triton_copy", ROOT / "crossget" / "methods" / "_triton.py"
        )
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        for kernel in (copy.row_max, copy.priority, copy.nearest):
            # One left: nothing to time.
            kernel.configs = kernel.early_config_prune(kernel.configs, {"keys": torch.empty(0, dtype=dtype)})[:1]
        compiled: dict[str, set[str]] = {}
        run = JITFunction.run

        def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
            kernel = run(self, *args, warmup=True, **kwargs)
            compiled.setdefault(self.__name__, set()).add(kernel.hash)

        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(kernels, "_kernels", lambda: copy)
        monkeypatch.setattr(driver, "_active", Device())
        for tokens, r in ((577, 17), (560, 32), (544, 24)):
            keys = torch.randn(2, tokens, 3, 64).to(dtype)[:, :, 1]
            protected = torch.zeros(1, tokens, dtype=torch.bool).expand(2, tokens)
            kernels.complete_graph(keys, protected, r, torch.rand(2, tokens))
            kernels.complete_graph(keys, protected, r, None)
            x = torch.randn(2, tokens, 64).to(dtype).requires_grad_()
            kernels.pull(x, *plan_for(2, tokens, r)).backward(torch.randn(2, tokens - r, 64).to(dtype))
        # With and without what is optional; other numbers of tokens need no other kernel.
        assert {name: len(found) for name, found in compiled.items()} == {
            "row_max": 1, "priority": 2, "nearest": 1, "pull": 1, "push": 1
        }  # fmt: skip

    @pytest.mark.slow
    @pytest.mark.parametrize("capability", [80, 90])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("which", range(4))
    @pytest.mark.parametrize("name", ["row_max", "priority", "nearest"])
    def test_every_tile_size(self, name: str, which: int, dtype: torch.dtype, capability: int) -> None:
        assert compiled_to(capability, name, dtype, which)["cubin"]
