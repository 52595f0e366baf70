"""The program that times towers, run whole on tiny ones: what it measures, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import crossget
from contract import COMPILES
from experiments.lib.files import ROOT, read_results
from experiments.speed import gpu, report, towers
from experiments.speed.ideal import cut
from experiments.speed.towers import (
    CROSSGET,
    DENSE,
    IDEAL,
    METHODS,
    SETUPS,
    STUDY,
    Options,
    grid,
    row,
    table,
    variants,
)

TINY = ("tiny", "tiny-text", "tiny-llava")
SMALL: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch": (2,), "rounds": 2}


def blocks_of(form: Any, setup: Any) -> list[Any]:
    return list(next(t for t in crossget.find_towers(form.model) if t.name == setup.tower).blocks)


def note_tokens(module: Any, counts: list[int]) -> None:
    def note(_: Any, args: Any, kwargs: Any) -> None:
        counts.append(int((args[0] if args else kwargs["hidden_states"]).shape[1]))

    module.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", TINY)
def test_the_ideal_has_crossgets_counts(name: str) -> None:
    """In front of the attention and behind it, in every block that runs."""
    setup = SETUPS[name]
    forms = variants(setup, torch.float32, "cpu")
    entered: dict[str, list[int]] = {CROSSGET: [], IDEAL: []}
    left: dict[str, list[int]] = {CROSSGET: [], IDEAL: []}
    for method in entered:
        for block in blocks_of(forms[method], setup):
            note_tokens(next(block.children()), entered[method])
            note_tokens(block.mlp, left[method])
        with torch.no_grad():
            forms[method](setup.inputs(2))
    assert entered[IDEAL] == entered[CROSSGET]
    assert left[IDEAL] == left[CROSSGET] == [count - setup.r for count in entered[IDEAL]]
    weights = {id(p) for p in forms[DENSE].parameters()}
    assert all({id(p) for p in form.parameters()} == weights for form in forms.values())


@pytest.mark.parametrize("name", TINY)
def test_the_ideal_that_keeps_all_tokens_is_the_dense_model(name: str) -> None:
    setup = SETUPS[name]
    forms, x = variants(setup, torch.float32, "cpu"), setup.inputs(2)
    counts: list[int] = []
    for block in blocks_of(forms[DENSE], setup):
        note_tokens(block, counts)
    with torch.no_grad():
        expected = towers.pooled(forms[DENSE](x))
        cut(blocks_of(forms[IDEAL], setup), [*counts, counts[-1]])
        torch.testing.assert_close(towers.pooled(forms[IDEAL](x)), expected)


def test_the_end_of_text_outlives_the_cut() -> None:
    setup = SETUPS["tiny-text"]
    forms, ids = variants(setup, torch.float32, "cpu"), setup.inputs(2)
    with torch.no_grad():  # it sees only what is in front of it
        torch.testing.assert_close(forms[IDEAL](ids), forms[DENSE](ids))


def test_a_block_without_an_ideal_is_named() -> None:
    with pytest.raises(TypeError, match="no ideal is known for a Linear"):
        cut([torch.nn.Linear(1, 1)], [1, 1])


@pytest.mark.parametrize(
    ("name", "train"),
    [
        # What needs a GPU, below, measures it, too; and a tower that is trained is among the others.
        *[pytest.param("tiny", train, marks=pytest.mark.slow) for train in (False, True)],
        ("tiny-text", False),
        ("tiny-llava", False),
        ("tiny-llava", True),
    ],
)
def test_every_method_is_measured(name: Any, train: bool, tmp_path: Path) -> None:
    options = Options(towers=(name,), train=train, results=tmp_path, **SMALL)
    assert STUDY.run(options) == 1
    assert STUDY.run(options) == 0  # it has a result
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    rows = content["result"]["rows"]
    assert [found["method"] for found in rows] == list(METHODS)
    assert all(len(found["rounds"]) == 2 and found["peak_memory"] > 0 for found in rows)
    dense, reduced, tome, ward, ideal = rows
    assert (dense["speed"], dense["promised"], dense["memory"]) == (1, 1, 1)
    assert reduced["promised"] == ideal["promised"] < tome["promised"]
    assert ward["promised"] > 1
    assert ideal["over_ideal"] == 0
    counted = content["result"]["flops"]
    assert reduced["promised"] == pytest.approx(counted[DENSE] / counted[CROSSGET], abs=1e-4)
    assert ("--train" in content["command"]) == train
    text = table([content])
    assert len(text.splitlines()) == 3
    assert all(f"{found['speed']:.2f}x [" in text for found in rows[1:])


def test_what_is_promised_and_what_is_realised() -> None:
    seconds = {DENSE: [4.0, 8.0], CROSSGET: [2.5, 5.0], IDEAL: [2.0, 4.0]}
    memory = {DENSE: 10, CROSSGET: 5, IDEAL: 4}
    found = row(CROSSGET, seconds, memory, {DENSE: 200, CROSSGET: 100})
    assert (found["speed"], found["promised"], found["realised"]) == (1.6, 2.0, 0.8)
    assert (found["over_ideal"], found["memory"]) == (0.25, 0.5)


def test_the_queue() -> None:
    runs = grid(Options(towers=("vit-b", "vit-h"), batch=(1, 8), device="cpu"))
    assert [(run.tower, run.batch) for run in runs] == [("vit-b", 1), ("vit-b", 8), ("vit-h", 1), ("vit-h", 8)]
    with pytest.raises(ValueError, match="--checkpointing was given without --train"):
        grid(Options(checkpointing=True, device="cpu"))
    for wrong in ({"rounds": 0}, {"batch": ()}, {"multiple": 0}):
        with pytest.raises(ValueError, match="--rounds .* --multiple .*: expected numbers of at least 1"):
            grid(Options(device="cpu", **wrong))


def test_aligned_runs_have_results_of_their_own(tmp_path: Path) -> None:
    for multiple in (1, 16):
        assert STUDY.run(Options(towers=("tiny",), multiple=multiple, results=tmp_path, **SMALL)) == 1
    plain, aligned = sorted(read_results(tmp_path), key=lambda content: content["run"]["multiple"])
    assert aligned["result"]["flops"] != plain["result"]["flops"]
    assert "float32, eager, multiples of 16" in table([aligned])


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nSee the documentation")

    monkeypatch.setattr(towers, "timed", full)
    monkeypatch.setattr(towers, "flops", lambda setup: {})
    assert STUDY.run(Options(towers=("tiny",), results=tmp_path, **SMALL)) == 1
    (content,) = read_results(tmp_path)
    assert content["result"]["does_not_fit"] == "CUDA out of memory."
    assert "does not fit" in table([content])


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
def test_each_form_is_compiled_once_and_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also transformers' models, which set something up in their first call that cannot be traced."""
    compile_with: Any = torch.compile
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def traced(
        model: Any, *, mode: str = "", fullgraph: bool = True, dynamic: bool = False, isolate_recompiles: bool = False
    ) -> Any:
        options = {"isolate_recompiles": True} if isolate_recompiles else {}
        return compile_with(model, backend=count, fullgraph=fullgraph, dynamic=dynamic, **options)

    monkeypatch.setattr(torch, "compile", traced)
    setup = SETUPS["tiny-llava"]
    forms, x = variants(setup, torch.float32, "cpu"), setup.inputs(2)
    (run,) = grid(Options(towers=("tiny-llava",), mode="compile", **SMALL))
    with torch.no_grad():
        made, costs = towers.calls(run, setup, forms, x)
        assert tuple(made) == tuple(costs) == METHODS
        for name in METHODS:
            torch.testing.assert_close(towers.pooled(made[name]()), towers.pooled(forms[name](x)))
    assert len(graphs) == 1 + len(METHODS)  # the first one starts the compiler


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at inputs of a graph
@pytest.mark.parametrize(
    ("tower", "mode", "checkpointing"),
    [("tiny", "compile", False), ("tiny", "blocks", True), ("tiny-llava", "blocks", True)],
)
def test_a_compiled_training_step_is_measured(
    tower: Any, mode: Any, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with: Any = torch.compile

    def traced(model: Any, mode: str = "", **options: Any) -> Any:  # without inductor, which takes minutes
        return compile_with(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    shared = {"mode": mode, "train": True, "checkpointing": checkpointing, "results": tmp_path}
    assert STUDY.run(Options(towers=(tower,), **shared, **SMALL)) == 1
    (content,) = read_results(tmp_path)
    assert all(found["compile"]["seconds"] > 0 for found in content["result"]["rows"])
    assert f"{mode}, training step" in table([content])


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
@pytest.mark.parametrize(("tower", "mode", "multiple"), [("tiny-text", "compile", 1), ("tiny", "blocks", 8)])
def test_compiled(tmp_path: Path, tower: Any, mode: Any, multiple: int) -> None:
    options = Options(towers=(tower,), mode=mode, multiple=multiple, results=tmp_path, **SMALL)
    assert STUDY.run(options) == 1
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())["result"]["rows"]
    assert all(found["compile"]["seconds"] > 0 and found["compile"]["kernels"] > 0 for found in rows)


def test_every_measurement_that_needs_a_gpu_has_its_name() -> None:
    jobs = gpu.queue(gpu.Options())
    assert jobs[0].name == "kernels"
    assert len({job.name for job in jobs}) == len(jobs)


HIDDEN = ("tyro", "accelerate", "tensorboard", "matplotlib", "open_clip", "pytest", "skimage")


@pytest.mark.slow
def test_without_other_packages(tmp_path: Path) -> None:
    """Nothing but torch, timm, transformers and crossget is needed for what needs a GPU."""
    code = (
        f"import runpy, sys\nfor name in {HIDDEN}: sys.modules[name] = None\n"
        f"sys.argv = ['gpu', '--small', '--device', 'cpu', '--results', {str(tmp_path)!r}]\n"
        "runpy.run_module('experiments.speed.gpu', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no waiting: done\ntiny: done" in done.stdout
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_what_needs_a_package_that_is_not_there_is_skipped() -> None:
    job = gpu.Job("kernels", 1, lambda: None, ("timm", "no_such_package"))
    assert gpu.work_off([job], 10) == {"kernels": "skipped: not installed: no_such_package"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(gpu.Options())
    with pytest.raises(ValueError, match="CUDA.*--device cpu"):
        STUDY.run(Options())


def test_what_would_come_too_late_is_not_started() -> None:
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds
        if seconds == 7:
            raise RuntimeError("out of luck")

    jobs = [gpu.Job(f"{seconds} s", seconds, partial(take, seconds)) for seconds in (50, 7, 60, 20)]
    assert gpu.work_off(jobs, 100, lambda: now[0]) == {
        "50 s": "done", "7 s": "FAILED: RuntimeError: out of luck", "60 s": "not started: no time left", "20 s": "done",
    }  # fmt: skip


def test_the_figure(tmp_path: Path) -> None:
    report.draw(read_results(towers.RESULTS), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
