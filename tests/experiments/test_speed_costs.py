"""The program for the costs beside the forward pass, run on tiny models: what it measures, not how fast it is."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from contract import COMPILES
from experiments.lib.files import read_results
from experiments.speed import costs
from experiments.speed.costs import COSTS, STUDY, Options, execute, grid, table, tables

SMALL: dict[str, Any] = {
    "models": ("timm/test_vit", "open_clip/ViT-S-32-alt"), "r": 4, "attach_rounds": 2, "import_rounds": 1,
    "compiled": "timm/test_vit", "backend": "eager", "compile_rounds": 1,
    "lengths": (16, 64), "width": 8, "budget": 1 << 10, "length_rounds": 2,
    "towers": ("tiny", "tiny-text"), "dtypes": ("float32",), "batch": 2,
}  # fmt: skip

# Older versions of torch cannot compile an attached model.
HERE: Any = tuple(cost for cost in COSTS if COMPILES or cost != "compile")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("costs")
    assert STUDY.run(Options(**SMALL, cost=HERE, results=folder)) == len(HERE)
    return folder


def content(folder: Path, cost: str) -> Any:
    return json.loads((folder / "costs" / f"{cost}.json").read_text())


def check_spread(found: Any, rounds: int) -> None:
    low, high = found["quartiles"]
    assert 0 < low <= found["median"] <= high
    assert len(found["rounds"]) == rounds


@pytest.mark.slow
@pytest.mark.parametrize("cost", HERE)
def test_every_cost_has_a_file(results: Path, cost: str) -> None:
    found = content(results, cost)
    assert set(found) == {"run", "command", "environment", "result", "seconds"}
    assert found["run"]["cost"] == cost
    assert found["environment"]["device"]


@pytest.mark.slow
def test_attach(results: Path) -> None:
    rows = content(results, "attach")["result"]["rows"]
    assert [row["model"] for row in rows] == list(SMALL["models"])
    for row in rows:
        check_spread(row["attach"], 2)
        check_spread(row["detach"], 2)


@pytest.mark.slow
def test_import(results: Path) -> None:
    rows = content(results, "import")["result"]["rows"]
    assert [row["import"] for row in rows] == ["torch", "torch, crossget"]
    for row in rows:
        check_spread(row["seconds"], 1)
        check_spread(row["ratio"], 1)
    assert rows[0]["ratio"]["median"] == 1


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
def test_compile(results: Path) -> None:
    rows = content(results, "compile")["result"]["rows"]
    assert [row["method"] for row in rows] == ["dense", "CrossGET"]
    for row in rows:
        check_spread(row["seconds"], 1)
        check_spread(row["ratio"], 1)
        assert row["kernels"] == 0  # this backend generates none


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    (run,) = grid(Options(**{**SMALL, "backend": "inductor"}, cost=("compile",)))
    dense, reduced = execute(run)["result"]["rows"]
    assert 0 < dense["kernels"] < reduced["kernels"]


@pytest.mark.slow
def test_length(results: Path) -> None:
    rows = content(results, "length")["result"]["rows"]
    assert [(row["tokens"], row["r"], row["tiled"]) for row in rows] == [(16, 2, False), (64, 8, True)]
    for row in rows:
        assert row["same"] is True
        assert row["pairs_in_common"] == 1
        for name in ("budget", "whole"):
            check_spread(row[name]["seconds"], 2)
            assert row[name]["peak_memory"] > 0
    assert costs.whole_bytes(64) <= rows[1]["whole"]["peak_memory"]  # what kernels need beside it is theirs


def test_memory() -> None:
    widths = {"float32": 4, "bfloat16": 2}
    (run,) = grid(Options(**{**SMALL, "dtypes": tuple(widths)}, cost=("memory",)))
    rows = execute(run)["result"]["rows"]
    assert {(row["tower"], row["dtype"]) for row in rows} == set(itertools.product(SMALL["towers"], widths))
    for row in rows:
        peaks = row["peak_memory"]
        assert list(peaks) == ["dense", "CrossGET", "ToMe-style"]
        # What any block of the dense model holds at least: its hidden layer. What kernels need beside it is theirs.
        hidden = {"tiny": 101 * 4 * 64, "tiny-text": 77 * 4 * 64}[row["tower"]]
        assert peaks["dense"] >= widths[row["dtype"]] * hidden
        assert min(peaks.values()) > 0
    assert costs.memory_cells(rows[0])[3:] == [f"{rows[0]['peak_memory'][m] / rows[0]['peak_memory']['dense']:.2f}"
                                               for m in ("CrossGET", "ToMe-style")]  # fmt: skip


def test_what_does_not_fit_is_matched_within_the_budget_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "WHOLE_BYTES", costs.whole_bytes(64))
    (run,) = grid(Options(**SMALL, cost=("length",)))
    rows = execute(run)["result"]["rows"]
    assert ["whole" in row for row in rows] == [True, False]
    assert [row["same"] for row in rows] == [True, None]
    assert rows[1]["pairs_in_common"] is None


def test_pairs_are_counted_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(candidates: Any, r: int) -> Any:
        source, destination = complete_graph(candidates, r)
        if candidates.budget == costs.UNLIMITED:
            return source.flip(1), destination.flip(1).index_fill(1, source.new_tensor([0]), -1)
        return source, destination

    complete_graph = costs.complete_graph
    monkeypatch.setattr(costs, "complete_graph", other)
    row = costs.match(64, Options(**SMALL))
    assert row["pairs_in_common"] == 7 / 8
    assert row["same"] is False
    assert costs.length_cells(row)[-1] == "87.50 %"


@pytest.mark.slow
def test_a_run_that_is_there_is_not_repeated(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {cost: content(results, cost) for cost in HERE}
    assert STUDY.run(Options(**SMALL, cost=HERE, results=results)) == 0
    assert {cost: content(results, cost) for cost in HERE} == before
    printed = capsys.readouterr().out
    assert all(table(found) in printed for found in before.values())


@pytest.mark.slow
@pytest.mark.parametrize("cost", HERE)
def test_the_command_repeats_the_run(results: Path, cost: str) -> None:
    words = shlex.split(content(results, cost)["command"])
    assert words[:4] == ["python", "-m", "experiments.run", "speed-costs"]
    (run,) = grid(tyro.cli(Options, args=words[4:]))
    assert json.loads(json.dumps({"cost": run.cost, **run.settings})) == content(results, cost)["run"]


@pytest.mark.slow
def test_the_tables_of_a_page(results: Path) -> None:
    text = tables(read_results(results))
    starts = ["Attaching CrossGET with r = 4", "Importing", "First call of timm/test_vit", "Matching one sequence"]
    starts += ["Peak memory of a forward pass"]
    starts = [start for start in starts if COMPILES or not start.startswith("First call")]
    paragraphs = text.split("\n\n")
    assert [p.startswith(start) for p, start in zip(paragraphs[::2], starts, strict=True)] == [True] * len(HERE)
    assert [p.count("\n") for p in paragraphs[1::2]] == [3] * len(HERE)  # a head, a line and two rows each
    assert all(line.startswith("|") and line.endswith("|") for p in paragraphs[1::2] for line in p.splitlines())
    assert [cell.strip() for cell in paragraphs[-3].splitlines()[-1].split("|")][1:4] == ["64", "8", "yes"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cost": ("disk",)}, "unknown costs ['disk']; there are ['attach', 'compile', 'import', 'length', 'memory']"),
        ({"models": ("test_vit",)}, "as in library/name: ['test_vit']; there are ['open_clip', 'timm']"),
        ({"models": ("timm/vit",)}, "unknown model 'timm/vit': see timm.list_models()"),
        ({"compiled": "open_clip/vit"}, "unknown model 'open_clip/vit': see open_clip.list_models()"),
        ({"backend": "fast"}, "unknown backends ['fast']"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        STUDY.run(Options(**{**SMALL, **wrong}, results=tmp_path))
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_failing_interpreter_tells_why() -> None:
    with pytest.raises(RuntimeError, match="a fresh interpreter failed:(.|\n)*no such luck"):
        costs.in_child("raise SystemExit('no such luck')")


def test_the_published_settings_are_the_default() -> None:
    assert [run.cost for run in grid(Options())] == list(COSTS)
    settings = {run.cost: run.settings for run in grid(Options())}
    assert settings["attach"]["models"] == ("timm/vit_base_patch16_224", "open_clip/ViT-B-16")
    assert settings["compile"]["r"] == 16
    assert settings["length"]["budget"] == 1 << 26
