"""The program that times connectors, run whole on a small model: what it measures, not how fast it is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tyro

from experiments.speed.connector import STUDY, Options, Run, grid, tables
from experiments.speed.report import of_kind

SMALL: dict[str, Any] = {
    "size": "tiny", "image_tokens": (63,), "keep": (0.5, 0.25), "text_tokens": 8, "dtype": "float32", "rounds": 2,
}  # fmt: skip
pytestmark = pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("speed")
    assert STUDY.run(Options(**SMALL, results=folder)) == 1
    assert STUDY.run(Options(**SMALL, results=folder)) == 0  # it has its result
    return json.loads((folder / "connector" / "tiny_cpu_float32_batch1_image63.json").read_text())


def test_rows(content: Any) -> None:
    rows = content["result"]["rows"]
    assert [(row["method"], row["image_tokens"]) for row in rows] == [
        ("dense", 64),
        ("keep 0.5", 32),
        ("keep 0.25", 16),
    ]
    for row in rows:
        assert len(row["rounds"]) == 2
        assert row["seconds"] > 0
        assert row["quartiles"][0] <= row["speed"] <= row["quartiles"][1]
        assert row["cache"] == 2 * 2 * (row["image_tokens"] + 8) * 16 * 4  # two layers; keys and values of width 16
    assert 1 == rows[0]["share"] > rows[1]["share"] > rows[2]["share"]
    assert content["environment"]["torch"]
    assert content["run"]["seed"] == 0


def test_the_command_repeats_the_run(content: Any) -> None:
    words = shlex.split(content["command"])
    assert words[:4] == ["python", "-m", "experiments.run", "speed-connector"]
    assert grid(tyro.cli(Options, args=words[4:])) == [Run(**{**content["run"], "keep": (0.5, 0.25)})]


def test_the_table(content: Any) -> None:
    assert of_kind([content], "connector") == [content]
    assert of_kind([content], "llava") == of_kind([content], "towers") == of_kind([content], "operators") == []
    lines = tables([content]).splitlines()
    assert lines[0].startswith("tiny, batch 1, 8 text tokens, float32, ")
    assert sum("keep 0.5" in line for line in lines) == 1
