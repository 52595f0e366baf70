"""How speed and memory are measured. No test depends on how fast this machine is."""

import importlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import crossget
from crossget.measure.environment import environment
from crossget.measure.speed import BenchmarkReport, Measurement, _peak_on_cpu, benchmark


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + self.mlp(x)


class Toy(nn.Module):
    """Records every call: whether it is in training, whether gradients are on, and whether a reducer is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool, str]] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        attached = type(self.blocks[0]) is not Block
        self.calls.append((self.training, torch.is_grad_enabled(), "reduced" if attached else "dense"))
        for block in self.blocks:
            x = block(x)
        return {"x": self.dropout(x) * scale}


@pytest.fixture(autouse=True)
def toy_adapter() -> Iterator[None]:
    def toy(model: Toy) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=model.blocks, width=16, prefix=1, class_token=True)]

    crossget.register(Toy)(toy)
    yield
    crossget.unregister(Toy)


X = torch.randn(3, 12, 16)
METHODS = {"guided": crossget.CrossGET(2), "pruned": crossget.TopK(2)}


def test_methods_are_attached_in_turn_and_taken_off_again() -> None:
    model = Toy()
    report = benchmark(model, X, rounds=3, warmup=1, methods=METHODS)
    assert [m.name for m in report.measurements] == ["dense", "guided", "pruned"]
    assert all(len(m.seconds) == len(m.speed) == 3 for m in report.measurements)
    assert [type(block) for block in model.blocks] == [Block, Block]
    assert crossget.attach(model, crossget.CrossGET(2)).is_attached


def test_every_round_times_every_method_and_the_order_rotates() -> None:
    model = Toy()
    benchmark(model, X, rounds=3, warmup=0, methods={"only": crossget.CrossGET(2)})
    timed = [state for _, _, state in model.calls[: 3 * 2 * 2]]  # the memory pass comes after
    dense, only = ["dense"] * 2, ["reduced"] * 2  # an untimed call and a timed one
    assert timed == [*dense, *only, *only, *dense, *dense, *only]


def test_it_runs_in_eval_mode_without_gradients_and_puts_the_flags_back() -> None:
    model = Toy().train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    benchmark(model, X, rounds=1, warmup=0, methods=METHODS)
    assert {(training, grad) for training, grad, _ in model.calls} == {(False, False)}
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_an_attached_model_is_compared_with_itself_paused() -> None:
    model = Toy()
    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        report = benchmark(model, (X,), rounds=2, warmup=0)
        assert attached.is_attached
    assert [m.name for m in report.measurements] == ["dense", "attached"]
    assert {state for _, _, state in model.calls} == {"dense", "reduced"}
    assert report["attached"].method.startswith("CrossGET(2")


def test_a_failing_model_is_left_as_it_was() -> None:
    model = Toy()
    with pytest.raises(TypeError, match="unexpected keyword"):
        benchmark(model, {"x": X, "nonsense": 1}, rounds=1, methods=METHODS)
    assert model.training
    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        with pytest.raises(TypeError, match="unexpected keyword"):
            benchmark(model, {"x": X, "nonsense": 1}, rounds=1)
        assert attached.is_attached


def test_the_fast_path_stays_on() -> None:
    class Watcher(Toy):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            seen.append(torch.backends.mha.get_fastpath_enabled())
            return super().forward(x, scale)

    seen: list[bool] = []
    benchmark(Watcher(), X, rounds=1, warmup=0, methods=METHODS)
    assert all(seen)


def test_speed_is_the_median_of_the_ratios_round_by_round() -> None:
    slow_machine = Measurement("m", "", (1.0, 2.0, 4.0), (2.0, 1.5, 1.0), 8, 0)
    assert slow_machine.median_seconds == 2.0
    assert slow_machine.median_speed == 1.5
    assert slow_machine.images_per_second == 4.0
    assert slow_machine.quartiles == (1.5, 3.0)
    assert slow_machine.speed_quartiles == (1.25, 1.75)
    assert Measurement("m", "", (1.0,), (1.0,), 8, 0).quartiles == (1.0, 1.0)


def test_dense_is_measured_against_itself() -> None:
    report = benchmark(Toy(), {"x": X, "scale": 2.0}, rounds=2, warmup=0, methods=METHODS)
    assert report["dense"].speed == (1.0, 1.0)
    guided = report["guided"]
    assert guided.speed == tuple(a / b for a, b in zip(report["dense"].seconds, guided.seconds, strict=True))
    assert guided.batch == 3
    with pytest.raises(KeyError, match="'dense', 'guided', 'pruned'"):
        report["another"]


def test_speed_is_the_ratio_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the model advances: 4 seconds for a dense call, 1 for a reduced one."""
    now = 0.0

    class Clocked(Toy):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            nonlocal now
            now += 4.0 if type(self.blocks[0]) is Block else 1.0
            return super().forward(x, scale)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    report = benchmark(Clocked(), X, rounds=3, warmup=1, methods={"m": crossget.CrossGET(2)})
    monkeypatch.undo()
    assert report["dense"].seconds == (4.0, 4.0, 4.0)
    assert report["m"].seconds == (1.0, 1.0, 1.0)
    assert report["m"].speed == (4.0, 4.0, 4.0)
    assert report["m"].images_per_second == 3.0


# Memory ---------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_what_lives_at_once() -> None:
    x = torch.randn(1000, 100)
    size = x.numel() * 4

    def two_alive() -> None:
        a = x + 1
        b = a * 2
        del a
        b.neg()

    def freed_at_once() -> None:
        for _ in range(5):
            x + 1

    for function, alive in ((two_alive, 2), (freed_at_once, 1)):
        peak = _peak_on_cpu(function)
        assert alive * size <= peak < alive * size + 1000


def test_what_a_call_leaves_behind_is_not_charged_to_the_next() -> None:
    kept: dict[str, Tensor] = {}

    def keeps() -> None:
        kept["last"] = torch.zeros(100_000)

    assert _peak_on_cpu(keeps) < 400_000 + 1000  # the old one is freed after the new one is made


def test_memory_is_measured_with_each_method_attached() -> None:
    """The model allocates one MiB for every token that the block leaves; what kernels allocate is far less."""

    class Wide(Toy):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"x": torch.empty(int(self.blocks[0](x).shape[1]), 2**20, dtype=torch.uint8)}

    def adapter(model: Wide) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=model.blocks[:1], width=16, prefix=1, class_token=True, restore=False)]

    crossget.register(Wide)(adapter)
    try:
        report = benchmark(Wide(), torch.randn(1, 64, 16), rounds=1, warmup=0, methods={"m": crossget.TopK(31)})
    finally:
        crossget.unregister(Wide)
    assert report["dense"].peak_memory == pytest.approx(64 * 2**20, abs=2**20)
    assert report["m"].peak_memory == pytest.approx(33 * 2**20, abs=2**20)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_attached_model_does_not_take_methods() -> None:
    model = Toy()
    with crossget.attach(model, crossget.CrossGET(2)), pytest.raises(ValueError, match="already attached"):
        benchmark(model, X, methods=METHODS)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (X, {}, "nothing to compare with"),
        (X, {"methods": {}}, "nothing to compare with"),
        (X, {"methods": {"dense": crossget.CrossGET(2)}}, "the name 'dense', which stands for"),
        (X, {"methods": METHODS, "rounds": 0}, "rounds=0"),
        (X, {"methods": METHODS, "warmup": -1}, "warmup=-1"),
        ((3,), {"methods": METHODS}, "no tensor"),
        (X.to("meta"), {"methods": METHODS}, r"crossget\.count_flops"),
    ],
)
def test_what_cannot_be_measured_is_refused(inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(Toy(), inputs, **options)


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a tensor, a tuple"):
        benchmark(Toy(), [X], methods=METHODS)  # type: ignore[arg-type]


# Reports --------------------------------------------------------------------------------------------------------------


def report() -> BenchmarkReport:
    where = {**environment(), "dtype": "float32", "batch": 8}
    measurements = (
        Measurement("dense", "", (0.2, 0.2), (1.0, 1.0), 8, 2**21),
        Measurement("guided", "CrossGET(r=2)", (0.1, 0.1), (2.0, 2.0), 8, 2**20),
    )
    return BenchmarkReport("Toy", ((8, 3, 4, 4),), 2, 1, measurements, where)


def test_the_table() -> None:
    lines = str(report()).splitlines()
    assert lines[0].startswith("Toy, inputs [8, 3, 4, 4], float32, ")
    assert lines[0].endswith(f"torch {torch.__version__}; 2 rounds")
    assert lines[4].split() == [
        "dense",
        "200.00",
        "200.00",
        "-",
        "200.00",
        "40.0",
        "1.00x",
        "1.00",
        "-",
        "1.00",
        "2.0",
        "MiB",
    ]
    assert lines[5].split()[:6] == ["guided", "100.00", "100.00", "-", "100.00", "80.0"]


def test_json_holds_every_round_and_the_environment() -> None:
    loaded = json.loads(report().to_json())
    assert loaded["measurements"][1]["seconds"] == [0.1, 0.1]
    assert loaded["measurements"][1]["median_speed"] == 2.0
    assert loaded["measurements"][1]["method"] == "CrossGET(r=2)"
    assert loaded["environment"]["torch"] == torch.__version__
    assert loaded["environment"]["dtype"] == "float32"


def test_the_type_that_is_computed_in_is_reported() -> None:
    def dtype(model: Toy, x: Tensor) -> str:
        found: str = benchmark(model, x, rounds=1, warmup=0, methods=METHODS).environment["dtype"]
        return found

    assert dtype(Toy(), X) == "float32"
    assert dtype(Toy().bfloat16(), X.bfloat16()) == "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtype(Toy(), X) == "autocast bfloat16"


def test_environment_says_where_a_number_comes_from() -> None:
    where = environment()
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert where["cuda"] is None
    assert where["device"]
    assert "fvcore" in where
    json.dumps(where)


@pytest.mark.parametrize(
    ("lines", "device", "instructions"),
    [
        ("model name\t: Some Xeon\nflags\t\t: fpu avx2 amx_bf16 amx_tile", "Some Xeon", ["avx2", "amx_bf16"]),
        ("BogoMIPS\t: 50\nFeatures\t: fp asimd bf16", None, ["asimd", "bf16"]),
        ("model name\t: Old\nflags\t\t: fpu sse2", "Old", None),
        (None, None, None),
    ],
)  # fmt: skip
def test_a_processor_is_told_by_its_instructions(
    lines: str | None,
    device: str | None,
    instructions: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines + "\n\n" + lines.replace("Some", "Other"))
    monkeypatch.setattr(importlib.import_module("crossget.measure.environment"), "_CPUINFO", tmp_path / "cpuinfo")
    where = environment()
    assert where.get("instructions") == instructions
    assert where["device"] == (device or platform.processor() or platform.machine())


@pytest.mark.gpu
def test_on_a_gpu_memory_comes_from_its_allocator() -> None:
    model = Toy().cuda()
    found = benchmark(model, X.cuda(), rounds=3, warmup=1, methods=METHODS)
    assert found.environment["cuda"] == torch.version.cuda
    assert found.environment["device"] == torch.cuda.get_device_name()
    assert all(m.peak_memory > 0 for m in found.measurements)
