"""The program that times embedding with Ray Data: what it makes of the seconds, and a whole run on a tiny model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from crossget.integrations import ray_data
from experiments.lib.files import read_results
from experiments.speed.embed import DENSE, REDUCED, STUDY, Options, grid, row, tables
from experiments.speed.report import of_kind

MISSING = [name for name in ray_data.PACKAGES if importlib.util.find_spec(name) is None]
REQUIRED = "ray" in os.environ.get("CROSSGET_REQUIRE", "").split(",")
SMALL: dict[str, Any] = {"models": ("timm:test_vit",), "r": 13, "pictures": 8, "pixels": 64, "batch": 4, "rounds": 1}


def test_the_start_is_taken_off() -> None:
    (run,) = grid(Options(pictures=100, batch=20, rounds=2))
    seconds = {
        DENSE: {"start": [10.0, 10.0], "rounds": [90.0, 90.0]},
        REDUCED: {"start": [10.0, 10.0], "rounds": [50.0, 50.0]},
    }
    found = row(run, REDUCED, seconds)
    assert (found["images_per_second"], found["images_per_second_beyond_start"], found["speed"]) == (2.0, 2.0, 2.0)
    assert row(run, DENSE, seconds)["speed"] == 1


def test_what_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="--pictures 31: expected at least 1, and two batches per actor"):
        grid(Options(pictures=31, batch=16))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason='pip install "crossget[ray]"')
def test_dense_and_reduced_are_measured(tmp_path: Path) -> None:
    assert STUDY.run(Options(**SMALL, results=tmp_path)) == 1
    assert STUDY.run(Options(**SMALL, results=tmp_path)) == 0  # it has its result
    contents = read_results(tmp_path)
    assert of_kind(contents, "embed") == contents
    assert of_kind(contents, "towers") == of_kind(contents, "operators") == of_kind(contents, "costs") == []
    (content,) = contents
    assert [found["method"] for found in content["result"]["rows"]] == [DENSE, REDUCED]
    assert all(found["images_per_second"] > 0 and len(found["rounds"]) == 1 for found in content["result"]["rows"])
    assert "timm:test_vit, r = 13, 8 files of 64 x 64 pixels" in tables(contents)
