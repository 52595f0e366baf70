"""Pages and results.csv are what the result files say."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")

from experiments import report, run
from experiments.lib import summary, tables
from experiments.lib.files import EXPERIMENTS, Json, pack, read_json, unpack, write_json
from experiments.lib.statistics import Interval, Seeds, compare_seeds
from experiments.retrieval import report as retrieval
from experiments.retrieval.presets import PRESETS, SETTINGS
from experiments.studies import PAGES, STUDIES, load_page, load_study

SLOW = {"ablation"}  # about 1,000 comparisons of 5,000 images


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PAGES])
def test_a_page_is_what_its_result_files_give(name: str) -> None:
    page = load_page(name)
    text = page.file.read_text(encoding="utf-8")
    assert f"{tables.BEGIN}\n\n{page.generated()}\n\n{tables.END}" in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert set(page.figures) <= set(pictures)
    assert all((page.file.parent / picture).is_file() for picture in pictures)


def test_every_study_has_its_name() -> None:
    assert {name: load_study(name).name for name in STUDIES} == {name: name for name in STUDIES}


def test_every_result_file_says_where_it_comes_from() -> None:
    for file in summary.result_files(EXPERIMENTS):
        result = read_json(file)
        assert {"run", "command", "environment", "result", "seconds"} <= set(result)
        assert re.fullmatch("[0-9a-f]{40}", result["environment"]["commit"])
        assert "/" not in re.sub(r"(timm|open_clip|torchvision)/|experiments/", "", result["command"])


def test_the_table_of_results_is_what_the_files_give() -> None:
    assert summary.FILE.read_text(encoding="utf-8") == summary.table()


def test_a_figure_is_found_in_the_table_by_one_line() -> None:
    with summary.FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "study", "setting", "method", "r", "seed", "flops_share", "metric", "value", "device", "commit", "file",
    ]  # fmt: skip
    (ward,) = (
        row for row in rows
        if (row["study"], row["method"], row["metric"]) == ("training_free", "ward", "top1")
        and row["setting"].startswith("imagenet") and "budget=58" in row["setting"]
    )  # fmt: skip
    result = read_json(EXPERIMENTS / ward["file"])["result"]
    assert float(ward["value"]) == pytest.approx(result["top1"], rel=1e-11)
    share = result["gflops"]["reduced"] / result["gflops"]["dense"]
    assert float(ward["flops_share"]) == pytest.approx(share, rel=1e-11)
    seeds = {
        row["seed"]: float(row["value"]) for row in rows
        if (row["study"], row["method"], row["r"], row["metric"]) == ("retrieval", "crossget", "4", "mean_recall")
    }  # fmt: skip
    assert seeds["mean"] == pytest.approx(np.mean([seeds[seed] for seed in "012"]))
    assert seeds["sd"] == pytest.approx(np.std([seeds[seed] for seed in "012"], ddof=1))
    assert all((EXPERIMENTS / row["file"]).exists() for row in rows)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing.*ablation, "):
        run.main([])
    with pytest.raises(SystemExit, match="got ablations; expected one of"):
        run.main(["ablations"])
    with pytest.raises(SystemExit, match=r"\['ablations'\].*ablation, "):
        report.main(["ablations"])


def test_a_study_is_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["flops"]) == 0
    assert "llava-1.5-7b" in capsys.readouterr().out


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


def test_a_page_is_written_with_its_figure(tmp_path: Path) -> None:
    environment = dict.fromkeys(("torch", "crossget", "device", "commit", "dirty"), "x")
    for result in RESULTS:
        file = tmp_path / "results" / f"{result['run']['preset']}{result['run']['seed']}.json"
        write_json(file, {**json.loads(json.dumps(result)), "environment": environment, "command": "c"})
    (tmp_path / "RESULTS.md").write_text(f"# Mine\n\n{tables.BEGIN}\n{tables.END}\n\nA finding.\n")
    page = replace(retrieval.PAGE, file=tmp_path / "RESULTS.md", results=tmp_path / "results")
    page.write()
    text = page.file.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("\n\nA finding.\n")
    assert page.generated() in text
    assert SETTINGS["flickr8k"].title in text
    assert (tmp_path / retrieval.FIGURE).stat().st_size > 10_000
    with pytest.raises(ValueError, match="no result file"):
        replace(page, results=tmp_path / "nothing").write()
    page.file.write_text("no marks\n")
    with pytest.raises(ValueError, match="has no lines"):
        page.write()
