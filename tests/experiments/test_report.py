"""The page of results is what the result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")

from experiments import report
from experiments.lib.files import ROOT, Json, pack, read_results, unpack, write_json
from experiments.lib.statistics import Interval, Seeds, compare_seeds
from experiments.retrieval import report as retrieval
from experiments.retrieval.presets import PRESETS, SETTINGS

PAGE = ROOT / "docs" / "results.md"


def test_the_committed_page_is_what_the_files_give() -> None:
    assert PAGE.read_text() == report.render()


def test_its_figures_are_there() -> None:
    text = PAGE.read_text()
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert names
    assert all((PAGE.parent / name).is_file() for name in names)


def test_every_result_file_says_where_it_comes_from() -> None:
    for folder, _ in report.CHAPTERS.values():
        for result in read_results(report.EXPERIMENTS / folder):
            assert {"run", "command", "environment", "result", "seconds"} <= set(result)
            assert re.fullmatch("[0-9a-f]{40}", result["environment"]["commit"])
            assert "seed" in result["run"]
            assert re.search(r"sha256': '[0-9a-f]{64}'", str(result["run"]))
            assert "/" not in result["command"].replace("experiments/", "")


def made(preset: str, r: int, seed: int, hits: float, **run: Any) -> Json:
    """A result of four photographs with two captions each, of which a share is found at once."""
    chance = np.random.default_rng([int(100 * hits), r, seed])
    places = {
        "image_to_text": np.where(chance.random(40) < hits, 0, 99),
        "text_to_image": np.where(chance.random(80) < hits, 3, 99),
    }
    recall = {way: {f"r@{k}": 100 * float((place < k).mean()) for k in (1, 5, 10)} for way, place in places.items()}
    packed = {way: pack(place.astype(np.float64)) for way, place in places.items()}
    return {
        "run": {
            "setting": "flickr8k", "preset": preset, "r": r, "seed": seed, "split": "val", "model": "small",
            "data": {"train": {"photos": 9}, "eval": {"photos": 40}}, "weights": {"sha256": "0"}, **run,
        },
        "result": {
            **recall, "places": packed, "captions": [2] * 40, "gflops": {"dense": 2.0, "reduced": 1.5},
            **({"recipe": {"epochs": 2, "batch": 8, "lr": 0.1, "seed": seed}} if PRESETS[preset].train else {}),
        },
        "seconds": 60,
    }  # fmt: skip


RESULTS = [
    made("dense", 0, 0, 0.5), *(made("control", 0, seed, 0.6) for seed in range(3)),
    *(made("tome", 4, seed, 0.3) for seed in range(3)), *(made("crossget", 4, seed, 0.9) for seed in range(3)),
]  # fmt: skip


def test_a_photograph_counts_the_same_however_many_captions_it_has() -> None:
    result = RESULTS[0]["result"]
    values = retrieval.per_photo(result)
    recalls = [result[way][f"r@{k}"] for way in retrieval.WAYS for k in retrieval.KS]
    assert 100 * float(values.mean()) == pytest.approx(sum(recalls) / 6)
    to_image = unpack(result["places"]["text_to_image"])
    to_text = unpack(result["places"]["image_to_text"])
    for i in range(40):
        own = [float((to_text[i] < k) + np.mean(to_image[2 * i : 2 * i + 2] < k)) for k in (1, 5, 10)]
        assert values[i] == pytest.approx(sum(own) / 6)


def test_what_the_data_say() -> None:
    text = "\n\n".join(retrieval.chapter(RESULTS))
    line = next(line for line in text.splitlines() if "Is CrossGET better than ToMe?" in line)
    assert line.rstrip(" |").endswith("better")
    assert re.search(r"\*\*\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]\*\*", line)
    assert "ToMe minus dense, trained on (the control)" in text
    compared = [line for line in text.splitlines() if line.startswith("|")]
    assert not any("bipartite" in line for line in compared), "what was not run is not compared"
    assert "Planned and not run: `tome` at r = 3, seeds 0 1 2;" in text
    table = retrieval.gather(RESULTS)["flickr8k"]
    assert table["crossget", 4].seeds == 3
    assert table["dense", 0].spread is None
    assert table["tome", 4].mean < table["control", 0].mean < table["crossget", 4].mean


def test_rows_are_compared_over_the_seeds_that_both_have() -> None:
    ones, twos = np.ones(5), np.full(5, 2.0)
    row: Seeds = {0: ones, 1: twos}
    assert compare_seeds(row, {0: ones}) == Interval(0, 0, 0)
    assert compare_seeds(row, {1: ones, 2: np.zeros(5)}) == Interval(1, 1, 1)
    assert compare_seeds(row, {2: ones}) is None
    assert compare_seeds(row, {None: ones}) == Interval(0.5, 0.5, 0.5)
    assert compare_seeds({None: ones}, row) == Interval(-0.5, -0.5, -0.5)
    assert compare_seeds({None: twos}, {None: ones}) == Interval(1, 1, 1)


@pytest.mark.parametrize("change", [{"weights": {"sha256": "1"}}, {"split": "test"}, {"model": "other"}])
def test_rows_that_cannot_be_compared_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="differ in data, weights or recipe"):
        retrieval.gather([*RESULTS, made("tome", 4, 5, 0.3, **change)])
    other = made("tome", 4, 5, 0.3)
    other["result"]["recipe"]["lr"] = 0.2
    with pytest.raises(ValueError, match="differ in data, weights or recipe"):
        retrieval.gather([*RESULTS, other])


def test_the_program_writes_page_and_figure(tmp_path: Path) -> None:
    for result in RESULTS:
        run = result["run"]
        environment = dict.fromkeys(("torch", "device", "commit", "dirty"), "x")
        file = tmp_path / "experiments/retrieval/results" / f"{run['preset']}{run['seed']}.json"
        write_json(file, {**json.loads(json.dumps(result)), "environment": environment, "command": "c"})
    (tmp_path / "docs").mkdir()
    report.main(report.Options(tmp_path / "experiments", tmp_path / "docs"))
    text = (tmp_path / "docs/results.md").read_text()
    assert text == report.render(tmp_path / "experiments")
    assert SETTINGS["flickr8k"].title in text
    assert (tmp_path / "docs/results/retrieval.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no result file"):
        report.render(tmp_path / "nothing")
