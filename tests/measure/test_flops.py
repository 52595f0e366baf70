"""`count_flops`: every number is a formula or a count that others published, and equal to the last digit."""

import dataclasses
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import crossget
from crossget.measure.flops import FlopReport, count_flops, count_once

# A toy ViT whose count is a formula -----------------------------------------------------------------------------------

WIDTH, HEADS, HIDDEN, CLASSES, PATCH, SIDE = 24, 4, 60, 7, 4, 16
PATCHES = (SIDE // PATCH) ** 2
TOKENS = PATCHES + 1


class Attention(nn.Module):
    """The same attention on four kernels."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        if kernel == "multihead":
            self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        else:
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "multihead":
            return self.mha(x, x, x, need_weights=False)[0]
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kernel == "fused":
            x = functional.scaled_dot_product_attention(q, k, v)
        elif self.kernel == "eager":
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            flat = (part.reshape(batch * HEADS, tokens, -1) for part in (q, k, v))
            q, k, v = flat
            scores = torch.baddbmm(
                torch.zeros(1, 1, 1, device=x.device), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5
            )
            x = torch.bmm(scores.softmax(-1), v).reshape(batch, HEADS, tokens, -1)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(kernel), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    def __init__(self, kernel: str = "fused", blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(kernel) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.fixture(autouse=True)
def toy_adapter() -> Iterator[None]:
    def toy(model: ToyViT) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=model.blocks, width=WIDTH, prefix=1, class_token=True)]

    crossget.register(ToyViT)(toy)
    yield
    crossget.unregister(ToyViT)


def block_formula(tokens: int, left: int, matching: int = 0) -> int:
    """Multiply-adds of one block that `tokens` enter and `left` leave."""
    attention = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
    mlp = 2 * left * WIDTH * HIDDEN
    norms = 5 * tokens * WIDTH + 5 * left * WIDTH
    return attention + matching + mlp + norms


def toy_formula(blocks: int = 2, r: int = 0, cross: int = 0) -> int:
    """Multiply-adds of the toy for one image; the guided complete-graph matching included where r > 0."""
    total = PATCHES * 3 * PATCH**2 * WIDTH
    tokens = TOKENS + cross
    for _ in range(blocks):
        removed = min(r, (tokens - 1 - cross) // 2)
        similarity_and_importance = (tokens**2 + tokens) * WIDTH if removed else 0
        total += block_formula(tokens, tokens - removed, similarity_and_importance)
        tokens -= removed
    return total + 5 * TOKENS * WIDTH + WIDTH * CLASSES  # the tokens are back on the full grid before the last norm


def name(reducer: Any) -> str:
    return "dense" if reducer is None else type(reducer).__name__


def image(batch: int = 1, device: str = "cpu") -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, device=device)


KERNELS = ["fused", "eager", "baddbmm", "multihead"]
METHODS = [None, crossget.CrossGET(4), crossget.ToMe(4), crossget.TopK(4), crossget.Random(4)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("training", [False, True])
def test_dense_count_is_the_formula_on_every_kernel(kernel: str, training: bool) -> None:
    model = ToyViT(kernel).train(training)
    report = count_flops(model, image())
    assert report.total == report.dense.total == toy_formula()
    assert report.reduced is None
    assert report.by_module[""] == report.total
    assert report.by_module["blocks.0"] == block_formula(TOKENS, TOKENS)
    assert report.unsupported == {}


def test_the_fast_path_of_multihead_attention_is_taken_and_counted() -> None:
    model = ToyViT("multihead").eval()
    assert "_native_multi_head_attention" in count_flops(model, image()).by_operator
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = count_flops(model, image())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert "_native_multi_head_attention" not in slow.by_operator
    assert slow.total == toy_formula()


@pytest.mark.parametrize(
    ("kernel", "r"),
    [
        *[("fused", r) for r in (0, 3, 6, 100)],
        *[(kernel, 3) for kernel in ("eager", "multihead")],
        *[pytest.param(kernel, r, marks=pytest.mark.slow) for kernel in ("eager", "multihead") for r in (0, 6, 100)],
    ],
)
def test_reduced_count_is_the_formula_matching_included(kernel: str, r: int) -> None:
    model = ToyViT(kernel).eval()
    with crossget.attach(model, crossget.CrossGET(r)):
        report = count_flops(model, image())
    assert report.dense.total == toy_formula()
    assert report.total == toy_formula(r=r, cross=1)
    assert report.ratio == report.total / report.dense.total
    assert report.unsupported == {}


def test_bipartite_matching_compares_half_with_half() -> None:
    model = ToyViT().eval()
    with crossget.attach(model, crossget.ToMe(4)):
        report = count_flops(model, image())
    expected, tokens = toy_formula(r=4), TOKENS
    for _ in range(2):
        sources = (tokens - 1) // 2
        similarity = sources * (tokens - 1 - sources) * (WIDTH // HEADS)  # of the keys' mean over heads
        expected += similarity - (tokens**2 + tokens) * WIDTH
        tokens -= 4
    assert report.total == expected


@pytest.mark.parametrize("reducer", [None, crossget.CrossGET(4), crossget.TopK(4)], ids=name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_of_four_costs_four_times_as_much(kernel: str, reducer: Any) -> None:
    if kernel == "baddbmm" and reducer is not None:
        pytest.skip("that attention is not one that a block is reduced by")
    model = ToyViT(kernel).eval()
    parameters = () if reducer is None else tuple(crossget.attach(model, reducer).parameters())
    one, four = (count_once(model, image(batch), parameters).total for batch in (1, 4))
    assert four == 4 * one


@pytest.mark.parametrize(
    ("kernel", "reducer"),
    [
        ("fused", METHODS[0]),
        ("fused", METHODS[1]),
        ("multihead", METHODS[1]),
        *[
            pytest.param(kernel, reducer, marks=pytest.mark.slow)
            for kernel in ("fused", "eager", "multihead")
            for reducer in METHODS
            if not (reducer is METHODS[1] or (kernel, reducer) == ("fused", None)) or kernel == "eager"
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_the_meta_device_counts_what_the_real_one_counts(kernel: str, reducer: Any) -> None:
    reports = []
    for device in ("cpu", "meta"):
        model = ToyViT(kernel).eval().to(device)
        if reducer is not None:
            crossget.attach(model, reducer)
        reports.append(count_flops(model, image(2, device)))
    real, meta = reports
    assert meta.dense.by_module == real.dense.by_module
    assert meta.by_module == real.by_module
    assert meta.unsupported == real.unsupported == {}


# Operators ------------------------------------------------------------------------------------------------------------


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def total(function: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    report = count_flops(Apply(function), tuple(torch.randn(shape) for shape in shapes))
    assert report.unsupported == {}
    return report.total


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(2, 3, 5, 7), (2, 3, 7, 11)], 2 * 3 * 5 * 7 * 11),
        (torch.matmul, [(5, 7), (2, 3, 7, 11)], 2 * 3 * 5 * 7 * 11),
        (torch.matmul, [(2, 5, 7), (7,)], 2 * 5 * 7),
        (torch.matmul, [(7,), (2, 7, 5)], 2 * 7 * 5),
        (torch.matmul, [(7,), (7,)], 7),
        (torch.mv, [(5, 7), (7,)], 5 * 7),
        (torch.dot, [(7,), (7,)], 7),
        (torch.inner, [(3, 7), (5, 7)], 3 * 5 * 7),
        (torch.linalg.vecdot, [(3, 7), (3, 7)], 3 * 7),
        (torch.addmm, [(11,), (5, 7), (7, 11)], 5 * 7 * 11),
        (torch.addmv, [(5,), (5, 7), (7,)], 5 * 7),
        (torch.baddbmm, [(2, 5, 11), (2, 5, 7), (2, 7, 11)], 2 * 5 * 7 * 11),
        (functional.layer_norm, [(3, 5, 7)], None),
        (lambda x, w: functional.conv2d(x, w, padding=1), [(2, 3, 8, 8), (4, 3, 3, 3)], 2 * 4 * 8 * 8 * 27),
        (lambda x, w: functional.conv2d(x, w, padding="same"), [(2, 3, 8, 8), (4, 3, 3, 3)], 2 * 4 * 8 * 8 * 27),
        (lambda x, w: functional.conv2d(x, w, groups=3), [(2, 3, 8, 8), (6, 1, 3, 3)], 2 * 6 * 6 * 6 * 9),
        (lambda x, w: functional.conv1d(x, w, stride=2), [(2, 3, 8), (4, 3, 2)], 2 * 4 * 4 * 6),
    ],
)
def test_formulas_of_operators(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], expected: int | None
) -> None:
    if function is functional.layer_norm:
        weights = torch.ones(7), torch.zeros(7)
        assert total(lambda x: functional.layer_norm(x, (7,), *weights), *shapes) == 5 * 3 * 5 * 7
    else:
        assert total(function, *shapes) == expected


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bhid,bhjd->bhij", [(2, 3, 57, 13), (2, 3, 59, 13)], 2 * 3 * 57 * 59 * 13),
        ("bhij, bhjd -> bhid", [(2, 3, 57, 59), (2, 3, 59, 13)], 2 * 3 * 57 * 59 * 13),
        ("...ij,...jk->...ik", [(2, 3, 5, 7), (3, 7, 11)], 2 * 3 * 5 * 7 * 11),
        ("ij,jk", [(57, 59), (59, 61)], 57 * 59 * 61),
        ("ij,jk->i", [(57, 59), (59, 61)], 57 * 59),  # k is summed first, and a sum counts 0
        ("i,j->ij", [(57,), (59,)], 57 * 59),
        ("ij->ji", [(57, 59)], 0),
        ("ij,jk,kl->il", [(2, 3), (3, 5), (5, 7)], 2 * 3 * 5 + 2 * 5 * 7),
    ],
)
def test_einsum_to_the_last_digit(equation: str, shapes: list[tuple[int, ...]], expected: int) -> None:
    assert total(lambda *operands: torch.einsum(equation, *operands), *shapes) == expected


def test_attention_with_other_lengths_widths_and_fewer_key_heads() -> None:
    attend = functional.scaled_dot_product_attention
    assert total(attend, (2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 4)) == 2 * 3 * 5 * 9 * (8 + 4)
    assert total(lambda q, k, v: attend(q, k, v, is_causal=True), *[(1, 2, 6, 8)] * 3) == 2 * 2 * 6 * 6 * 8


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="grouped-query attention is newer than this torch")
def test_grouped_query_attention_counts_the_query_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert total(attend, (1, 6, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)) == 2 * 6 * 5 * 5 * 8


def test_the_fast_path_of_the_encoder_layer_counts_like_its_parts() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    fast, slow = (count_flops(layer.train(training), torch.randn(2, 9, WIDTH)) for training in (False, True))
    assert fast.total == slow.total == 2 * block_formula(9, 9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_with_any_padding(device: str) -> None:
    for padding in (0, 1, (1, 2), "same", "valid"):
        model = nn.Conv2d(3, 4, 3, padding=padding, device=device)
        out = model(torch.empty(1, 3, 9, 9, device=device))
        assert count_flops(model, torch.empty(1, 3, 9, 9, device=device)).total == out.numel() * 27
    strided = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, device=device)
    out = strided(torch.empty(1, 3, 9, 9, device=device))
    assert count_flops(strided, torch.empty(1, 3, 9, 9, device=device)).total == out.numel() * 27


def test_transposed_convolutions() -> None:
    model = nn.ConvTranspose2d(3, 4, 2, 2)
    assert count_flops(model, torch.ones(1, 3, 8, 8)).total == 8 * 8 * 3 * 4 * 2 * 2
    with pytest.raises(RuntimeError, match="cannot be traced on the meta device"):
        count_flops(model.to("meta"), torch.ones(1, 3, 8, 8, device="meta"))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_what_counts_nothing_is_listed_by_kind() -> None:
    def function(x: Tensor) -> Tensor:
        return Doubled.apply(functional.avg_pool2d(functional.gelu(x.softmax(-1) + x.mean()), 2))

    report = count_flops(Apply(function), torch.randn(1, 2, 4, 4))
    assert report.total == 0
    assert report.unsupported == {"aten::avg_pool2d": 1, "prim::PythonOp.Doubled": 1}
    assert report.dense.zero == {"aten::add": 1, "aten::gelu": 1, "aten::mean": 1, "aten::softmax": 1}
    assert "no formula, missing from the total: aten::avg_pool2d x1, prim::PythonOp.Doubled x1" in str(report)
    assert "counted as 0 by convention: aten::add x1, aten::gelu x1, aten::mean x1, aten::softmax x1" in str(report)
    assert json.loads(report.to_json())["dense"]["unsupported"] == report.unsupported


def test_rms_norm_counts_zero_fused_or_not() -> None:
    def by_hand(x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    assert total(by_hand, (2, 3, 8)) == total(lambda x: functional.rms_norm(x, (8,)), (2, 3, 8)) == 0


# What the trace would lose --------------------------------------------------------------------------------------------


class ReadsSecondToLast(nn.Module):
    """LLaVA's way: all blocks run, the last one's output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return functional.linear(states[-2], self.read.weight)


def test_a_layer_that_runs_in_vain_counts() -> None:
    report = count_flops(ReadsSecondToLast(), torch.randn(1, 8))
    assert report.total == 4 * 64
    assert report.by_module["layers.2"] == 64


def test_modules_that_were_not_called_are_named() -> None:
    report = count_flops(ReadsSecondToLast(), torch.randn(1, 8))
    assert report.dense.uncalled == ("unused", "read")
    assert "never called (unused, or counted in their parent): read, unused" in str(report)


# Inputs and outputs ---------------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    name: str = "output"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: {"y": y, "none": None},
        lambda y: OrderedDict(y=y, others=(y, None, [y, 3])),
        lambda y: Output(y),
        lambda y: (None, [y, {"z": (y,)}], "text", 2),
        lambda y: y.sum(),
    ],
    ids=["tensor", "dict", "ordered", "dataclass", "nested", "scalar"],
)
def test_outputs_of_any_form(wrap: Callable[[Tensor], Any]) -> None:
    layer = nn.Linear(4, 5)
    assert count_flops(Apply(lambda x: wrap(layer(x)), layer), torch.randn(3, 4)).total == 3 * 4 * 5


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor | None, *, times: int, pair: Any = None, flag: bool = False) -> Tensor:
        if x is None:
            x = pair[1]["x"]
        for _ in range(times):
            out: Tensor = self.layer(x)
        return out


def test_inputs_of_any_form() -> None:
    model, x = Picky(), torch.randn(3, 4)
    assert count_flops(model, {"x": x, "times": 2, "flag": True}).total == 2 * 60
    assert count_flops(model, {"x": None, "times": 3, "pair": [0, {"x": x}]}).total == 3 * 60
    assert count_flops(model.layer, x).total == count_flops(model.layer, (x,)).total == 60
    assert count_flops(model, {"x": x, "times": 1}).inputs == ((3, 4),)


def test_a_tensor_given_three_times_stays_one() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(1, 9, WIDTH)
    report = count_flops(attention, (x, x, x))
    assert report.total == 4 * 9 * WIDTH**2 + 2 * 9**2 * WIDTH
    assert report.inputs == ((1, 9, WIDTH),)


@pytest.mark.parametrize("inputs", [[torch.ones(1, 4)], 3, None])
def test_inputs_of_another_type_are_refused(inputs: Any) -> None:
    with pytest.raises(TypeError, match=r"tensor, a tuple .*mapping"):
        count_flops(nn.Linear(4, 4), inputs)


def test_a_compiled_model_counts_as_what_it_was_compiled_from() -> None:
    model = ToyViT().eval()
    assert count_flops(torch.compile(model, backend="eager"), image()).total == toy_formula()


# Nothing is left behind -----------------------------------------------------------------------------------------------


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise KeyError("on purpose")
        return self.layers(x)


def snapshot(model: nn.Module) -> Any:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), type(m), sorted(vars(m)))
            for m in model.modules()
        ],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_model_and_process_are_left_as_they_were(training: bool, fail: bool) -> None:
    model = WithBatchNorm()
    model.train(False)
    model.layers.train(training)  # a mixture must stay one
    before = snapshot(model)
    if fail:
        with pytest.raises(KeyError, match="on purpose"):
            count_flops(model, {"x": torch.ones(2, 3, 8, 8), "fail": True})
    else:
        count_flops(model, torch.arange(384.0).reshape(2, 3, 8, 8))
    after = snapshot(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:5] == before[1:5]
    assert torch.equal(after[5], before[5])
    assert not torch.jit.is_tracing()


def test_an_attached_model_stays_attached_also_after_a_failure() -> None:
    model = ToyViT().eval()
    attached = crossget.attach(model, crossget.CrossGET(4))
    expected = model(x := image(2))
    with pytest.raises(RuntimeError):
        count_flops(model, torch.randn(1, 5, SIDE, SIDE))
    count_flops(model, x)
    assert attached.is_attached
    assert attached.tokens == {"visual": [TOKENS + 1, TOKENS - 3]}
    assert torch.equal(model(x), expected)
    assert all(type(count) is int for count in attached.tokens["visual"])


def test_nothing_is_logged_and_no_logger_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    before = (logger.level, logger.disabled, logger.propagate, list(logger.handlers), logging.root.manager.disable)
    with caplog.at_level(logging.DEBUG):
        count_flops(ReadsSecondToLast(), torch.randn(1, 8))
    assert not caplog.records
    assert before == (
        logger.level, logger.disabled, logger.propagate, list(logger.handlers), logging.root.manager.disable
    )  # fmt: skip


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_outside_gives_the_same(context: Callable[[], Any]) -> None:
    model = ToyViT().eval()
    with context(), crossget.attach(model, crossget.CrossGET(4)):
        assert count_flops(model, image()).total == toy_formula(r=4, cross=1)


# Reports --------------------------------------------------------------------------------------------------------------


def reduced_report() -> FlopReport:
    model = ToyViT().eval()
    with crossget.attach(model, crossget.CrossGET(4)):
        return count_flops(model, image(2))


def test_the_table_shows_both_counts_and_their_ratio() -> None:
    report = reduced_report()
    lines = report.table(depth=2).splitlines()
    assert lines[0] == f"ToyViT, inputs [2, 3, {SIDE}, {SIDE}]: multiply-adds"
    assert lines[1].startswith("visual: CrossGET(4")
    assert lines[3].split() == ["module", "dense", "reduced", "ratio"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[5:] if line.startswith(("total", "blocks", "norm"))}
    expected = [f"{report.dense.total:,}", f"{report.total:,}", f"{report.ratio:.1%}"]
    assert cells["total"] == expected
    assert cells["norm"][2] == "100.0%"
    assert set(cells) == {"total", "blocks", "blocks.0", "blocks.1", "norm"}
    assert str(report) == report.table()


def test_the_depth_of_the_table() -> None:
    report = reduced_report()
    assert "blocks.0.attn.qkv" in report.table(depth=4)
    assert "blocks.0.attn" not in report.table(depth=2)
    assert "blocks" not in report.table(depth=0)
    with pytest.raises(ValueError, match="depth=-1"):
        report.table(depth=-1)


def test_the_dense_table_has_one_column() -> None:
    lines = count_flops(ToyViT(), image()).table(depth=0).splitlines()
    assert lines[2].split() == ["module", "dense"]
    assert lines[4].split() == ["total", f"{toy_formula():,}"]


def test_json_holds_everything() -> None:
    report = reduced_report()
    loaded = json.loads(report.to_json())
    assert loaded["dense"]["total"] == 2 * toy_formula()
    assert loaded["reduced"]["total"] == 2 * toy_formula(r=4, cross=1)
    assert loaded["reduced"]["by_module"] == report.by_module
    assert loaded["ratio"] == report.ratio
    assert loaded["reducers"]["visual"].startswith("CrossGET(4")


def test_reports_are_frozen() -> None:
    report = count_flops(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "another"  # type: ignore[misc]


def test_a_part_of_an_attached_model_is_counted_reduced_too() -> None:
    model = ToyViT().eval()
    wrapper = nn.Sequential(model)
    with crossget.attach(model, crossget.CrossGET(4)):
        report = count_flops(wrapper, image())
    assert report.dense.total == toy_formula()
    assert report.total == toy_formula(r=4, cross=1)


# Hosts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [None, crossget.CrossGET(4)], ids=name)
def test_timm_counts_the_same_with_fused_and_eager_attention(reducer: Any) -> None:
    timm = pytest.importorskip("timm")
    totals = []
    for fused in (True, False):
        model = timm.create_model("test_vit", depth=2).eval()
        for block in model.blocks:
            block.attn.fused_attn = fused
        if reducer is not None:
            crossget.attach(model, reducer)
        totals.append(count_flops(model, torch.randn(1, 3, 160, 160)).total)
    assert totals[0] == totals[1]


def test_transformers_counts_its_own_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    totals = set()
    for implementation in ("sdpa", "eager"):
        config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, attn_implementation=implementation)
        model = transformers.CLIPVisionModel(config).eval()
        assert model.config._attn_implementation == implementation
        totals |= {count_flops(model, {"pixel_values": torch.randn(1, 3, 32, 32)}).total}
        totals |= {count_flops(model.to("meta"), {"pixel_values": torch.randn(1, 3, 32, 32, device="meta")}).total}
    tokens, width, hidden = 17, 32, 64
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden + 2 * 5 * tokens * width
    # two blocks, the patches, the norm before the blocks, and the norm of the class token behind them
    assert totals == {2 * block + 16 * 3 * 64 * width + 5 * tokens * width + 5 * width}


# The reference's numbers ----------------------------------------------------------------------------------------------

# Multiply-adds that the authors' training logs state for one 224-pixel image and one caption of 77 tokens (CLIP
# ViT-B/16), by (vision r, text r); None is the dense model.
REFERENCE = {None: 20567068160, (16, 0): 12035655936, (0, 6): 19274950400, (16, 6): 10611509504}
VISION_WIDTH, TEXT_WIDTH, LENGTH, IMAGE_TOKENS, EMBEDDING = 768, 512, 77, 197, 512
NORM = 5


def captions(device: str, end: int = 5) -> Tensor:
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    ids[0, : end + 1] = torch.tensor([49406, *[320] * (end - 1), 49407])
    return ids.to(device)


def clip(device: str = "meta") -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    with torch.device(device):
        model: nn.Module = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16")).eval()
    return model


def text_tokens_left(r: int) -> int:
    """Of 77 tokens and a cross token, after 12 blocks that keep start, end and cross token."""
    tokens = LENGTH + 1
    for _ in range(12):
        tokens -= min(r, (tokens - 3) // 2)
    return tokens


def differences(r: tuple[int, int] | None) -> dict[str, int]:
    """Ours minus the reference's, term by term."""
    terms = {
        "ln_post: all tokens here, the class token there": NORM * VISION_WIDTH * (IMAGE_TOKENS - 1),
        "the product of image and text features: there only": -EMBEDDING,
    }
    if r is not None:
        left = text_tokens_left(r[1])
        terms["ln_pre: the cross token goes through it there only"] = -NORM * VISION_WIDTH
        terms["ln_final: the restored tokens here, those left there"] = NORM * TEXT_WIDTH * (LENGTH - left)
    return terms


@pytest.mark.parametrize(
    "r",
    [(16, 6), *[pytest.param(r, marks=pytest.mark.slow) for r in (None, (16, 0), (0, 6))]],
    ids=str,
)
def test_every_multiply_add_of_the_reference_is_accounted_for(r: tuple[int, int] | None) -> None:
    model = clip()
    inputs = (torch.empty(1, 3, 224, 224, device="meta"), captions("meta"))
    parameters: tuple[nn.Parameter, ...] = ()
    if r is not None:
        attached = crossget.attach(model, {"visual": crossget.CrossGET(r[0]), "text": crossget.CrossGET(r[1])})
        parameters = tuple(attached.parameters())
    count = count_once(model, inputs, parameters)
    assert count.total == REFERENCE[r] + sum(differences(r).values())
    assert r is not None or count.total == 20567820288
    assert count.unsupported == {}


def test_tokens_left_in_the_text_tower() -> None:
    assert (text_tokens_left(0), text_tokens_left(6)) == (78, 8)


@pytest.mark.slow
def test_real_weights_count_like_the_meta_device_wherever_the_caption_ends() -> None:
    model = clip("cpu")
    image_ = torch.zeros(1, 3, 224, 224)
    assert count_flops(model, (image_, captions("cpu"))).total == 20567820288
    crossget.attach(model, {"visual": crossget.CrossGET(16), "text": crossget.CrossGET(6)})
    totals = {count_flops(model, (image_, captions("cpu", end))).total for end in (1, 5, 30, 76)}
    assert totals == {REFERENCE[16, 6] + sum(differences((16, 6)).values())}
