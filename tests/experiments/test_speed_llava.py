"""The speed program, run whole on a small LLaVA: what it measures, not how fast it is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tyro

from experiments.speed import llava
from experiments.speed.llava import STUDY, Options, Run, execute, grid, table

SMALL: dict[str, Any] = {
    "size": ("tiny",), "device": "cpu", "dtype": "float32", "r": 3, "text_tokens": 8, "new_tokens": (3,), "rounds": 2,
}  # fmt: skip
PATCHES = (112 // 14) ** 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("speed")
    assert STUDY.run(Options(**SMALL, batch=(2,), results=folder)) == 1
    return folder


def content(folder: Path, batch: int) -> Any:
    return json.loads((folder / "llava" / f"tiny_cpu_float32_batch{batch}_r3.json").read_text())


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_method_at_every_stage(results: Path, batch: int) -> None:
    assert STUDY.run(Options(**SMALL, batch=(batch,), results=results)) == (batch != 2)  # which has its result
    found = content(results, batch)
    rows = found["result"]["rows"]
    assert [(row["stage"], row["method"]) for row in rows] == [
        (stage, method) for stage in ("first token", "3 tokens") for method in ("dense", "CrossGET", "ToMe-style")
    ]
    for row in rows:
        assert len(row["rounds"]) == 2
        assert row["seconds"] > 0
        assert row["quartiles"][0] <= row["speed"] <= row["quartiles"][1]
        assert row["tokens_per_second"] == pytest.approx(
            batch * (1 if row["stage"] == "first token" else 3) / row["seconds"], rel=1e-2
        )
    assert all(row["speed"] == 1 for row in rows if row["method"] == "dense")
    # Three layers, keys and values, of which two blocks of the image tower are read.
    features = {"dense": PATCHES, "CrossGET": PATCHES + 1 - 2 * 3, "ToMe-style": PATCHES - 2 * 3}
    for row in rows:
        assert row["cache"] == batch * 3 * 2 * (features[row["method"]] + 8) * 64 * 4
        assert (row["predicted"] is not None) == (row["stage"] == "first token")
    assert 1 == rows[0]["predicted"] < rows[1]["predicted"] < rows[2]["predicted"]
    assert found["environment"]["device"]


def test_a_run_that_is_there_is_not_repeated(results: Path) -> None:
    assert STUDY.run(Options(**SMALL, batch=(2,), results=results)) == 0


def test_the_command_repeats_the_run(results: Path) -> None:
    words = shlex.split(content(results, 2)["command"])
    assert words[:4] == ["python", "-m", "experiments.run", "speed-llava"]
    options = tyro.cli(Options, args=words[4:])
    assert grid(options) == [Run(**{**content(results, 2)["run"], "new_tokens": (3,)})]


def test_the_table(results: Path) -> None:
    text = table(content(results, 2))
    assert text.startswith("LLaVA tiny, batch 2, 8 text tokens, r = 3, float32, ")
    lines = [line.split() for line in text.splitlines()]
    assert ["|", "first", "token", "|", "dense", "|"] in [line[:6] for line in lines]
    assert sum("CrossGET" in line for line in lines) == 2


def test_the_published_sizes_are_the_default() -> None:
    runs = grid(Options())
    assert [(run.size, run.batch) for run in runs] == [
        (size, batch) for size in ("llava-1.5-7b", "llava-1.5-13b") for batch in (1, 8, 32)
    ]
    assert {run.dtype for run in runs} == {"bfloat16"}
    assert {run.r for run in runs} == {13}
    assert len({run.slug for run in runs}) == 6


@pytest.mark.slow
@pytest.mark.skipif(hf_models.VERSION < (5, 0), reason="transformers runs no language model on meta before 5.0")
def test_published_sizes_are_predicted_without_weights() -> None:
    import crossget

    (run, *_) = grid(Options(batch=(1,)))
    assert llava.predicted(run, crossget.CrossGET(13)) == pytest.approx(1.8646, abs=1e-4)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    (run,) = grid(Options(**{**SMALL, "device": "cuda", "dtype": "bfloat16"}, batch=(2,)))
    rows = execute(run)["result"]["rows"]
    assert all(row["peak_memory"] > 0 for row in rows)
