"""The ablation's programs, end to end on random weights and generated images."""

import csv
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("matplotlib")

import crossget
from experiments.ablation import report, run, settings
from experiments.ablation.presets import COMPARISONS, FULL, METHODS, PRESETS
from experiments.lib import files, tables
from experiments.lib.files import Json, file_digest, unpack
from experiments.lib.statistics import paired_bootstrap
from experiments.lib.study import pending, work_through


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten class folders with two images each."""
    images = tmp_path_factory.mktemp("inputs") / "images"
    for i in range(20):
        picture(images / f"class{i % 10}" / f"{i}.png", i)
    return images


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    """Random weights of the CIFAR model in half precision."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file, parameters = folder.parent / "vit.safetensors", settings.vit_cifar().state_dict()
    save_file({name: value.half() for name, value in parameters.items()}, file)
    return file


@pytest.fixture
def images(folder: Path) -> settings.Images:
    return settings.load_images(settings.SETTINGS["cifar10"], folder)


@pytest.fixture
def model(weights: Path) -> nn.Module:
    return settings.load_model(settings.SETTINGS["cifar10"], weights)


def options(tmp_path: Path, folder: Path, weights: Path, **changes: object) -> run.Options:
    given = {"presets": ("dense", "tome", "random", "crossget"), "r": (2, 8), "seeds": (0, 1), "batch": 8}
    return run.Options("cifar10", folder, weights, results=tmp_path / "results", **{**given, **changes})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, folder: Path, weights: Path) -> Path:
    """The folder of a whole run, whose results no test changes."""
    tmp_path = tmp_path_factory.mktemp("measured")
    assert run.STUDY.run(options(tmp_path, folder, weights)) == 1 + 2 + 4 + 2
    return tmp_path


def test_a_run_leaves_one_result_file_each_and_is_not_repeated(tmp_path, folder, weights, measured):
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    wanted = options(tmp_path, folder, weights)
    names = sorted(file.stem for file in (tmp_path / "results" / "cifar10").iterdir())
    assert names == sorted(
        ["dense", "tome_r2", "tome_r8", "crossget_r2", "crossget_r8"]
        + [f"random_r{r}_seed{seed}" for r in (2, 8) for seed in (0, 1)]
    )
    assert run.STUDY.run(wanted) == 0
    (tmp_path / "results" / "cifar10" / "tome_r8.json").unlink()
    assert run.STUDY.run(wanted) == 1
    assert run.STUDY.run(options(tmp_path, folder, weights, presets=("tome",), r=(8,), overwrite=True)) == 1


def test_a_result_file_says_what_was_run_where_and_with_what_outcome(weights, measured):
    text = (measured / "results" / "cifar10" / "crossget_r8.json").read_text()
    assert str(measured) not in text
    assert str(weights.parent) not in text
    content = json.loads(text)
    assert list(content) == ["run", "command", "environment", "result", "seconds"]
    assert content["run"]["reducer"]["name"] == "CrossGET"
    assert content["run"]["weights"] == {"file": "vit.safetensors", "sha256": file_digest(weights)}
    assert {"commit", "dirty", "source_sha256", "torch"} <= set(content["environment"])
    result = content["result"]
    assert result["tokens"] == [66, 58, 50, 42]
    assert result["gflops"]["reduced"] < result["gflops"]["dense"]
    assert len(result["correct"]) == result["n"] == 20
    assert result["top1"] == 5 * result["correct"].count("1")
    divergences = unpack(result["divergences"])
    assert divergences.shape == (20,)
    assert divergences.mean() == pytest.approx(result["divergence"], rel=0.02, abs=2e-6)
    dense = json.loads((measured / "results" / "cifar10" / "dense.json").read_text())["result"]
    assert dense["tokens"] == [65] * 4
    assert dense["gflops"]["reduced"] == dense["gflops"]["dense"] == result["gflops"]["dense"]
    assert (dense["agreement"], dense["divergence"]) == (100, 0)


def reduced(model: nn.Module, pixels: Tensor, name: str) -> tuple[Tensor, list[int]]:
    """Logits, and the tokens entering each block."""
    preset = PRESETS[name]
    reducer = preset.make(8 if preset.swept else 0, 0)
    assert reducer is not None
    with crossget.attach(model, reducer) as attached:
        return run.predict(model, pixels, 10, "cpu"), attached.tokens["visual"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "dense"])
def test_every_preset_reduces_and_lets_go_of_the_model(name, model, images):
    dense = run.predict(model, images.pixels, 10, "cpu")
    logits, tokens = reduced(model, images.pixels, name)
    assert not torch.allclose(logits, dense, atol=1e-6)
    assert (tokens[-1] < tokens[0]) == PRESETS[name].swept
    assert torch.equal(run.predict(model, images.pixels, 10, "cpu"), dense)


def test_presets_differ_from_one_another(model, images):
    # An untrained cross token is the class token's twin, and the rules for ties may decide alike: those may agree.
    names = sorted(set(PRESETS) - {"dense", "full_class_token", "full_stable", "untrained_stable"})
    outcomes = {name: reduced(model, images.pixels, name)[0] for name in names}
    for one, other in itertools.combinations(names, 2):
        assert not torch.allclose(outcomes[one], outcomes[other], rtol=0, atol=1e-6), f"{one} does what {other} does"


def test_seeds_matter_where_chance_takes_part_only():
    for preset in PRESETS.values():
        assert (preset.make(8, 0) == preset.make(8, 1)) == (not preset.seeded)


def test_comparisons_name_presets():
    for base, others in COMPARISONS.items():
        assert {base, *others} <= set(PRESETS)
    assert set(report.LINES) <= set(METHODS)
    assert PRESETS["crossget"].make(8, 0) == type(FULL)(8)


def test_the_report_is_rebuilt_and_keeps_what_is_written_by_hand(tmp_path, measured):
    file = tmp_path / "RESULTS.md"
    file.write_text(f"# Ablation without training\n\n{tables.BEGIN}\n{tables.END}\n")
    page = replace(report.PAGE, file=file, results=measured / "results")
    page.write()
    first = file.read_text()
    assert "| ToMe: bipartite, size-weighted" in first
    assert (tmp_path / "figures" / "accuracy_over_flops.png").stat().st_size > 10_000
    file.write_text(first.replace("# Ablation without training", "# Mine\n\nA finding."))
    page.write()
    assert file.read_text() == first.replace("# Ablation without training", "# Mine\n\nA finding.")
    file.write_text("no marks")
    with pytest.raises(ValueError, match="put them where the tables belong"):
        page.write()


def test_the_report_refuses_results_of_different_images(tmp_path, folder, weights):
    run.STUDY.run(options(tmp_path, folder, weights, presets=("dense",)))
    run.STUDY.run(options(tmp_path, folder, weights, presets=("tome",), r=(8,), limit=10))
    with pytest.raises(ValueError, match="differ in their images"):
        replace(report.PAGE, results=tmp_path / "results").generated()
    with pytest.raises(ValueError, match="no result file"):
        replace(report.PAGE, results=tmp_path / "nothing").generated()


def test_images_are_listed_by_table_or_by_folder(tmp_path, folder):
    by_folder = settings.list_samples(folder)
    assert by_folder == sorted(by_folder)
    assert dict(by_folder)["class3/13.png"] == 3
    table = tmp_path / "sample"
    picture(table / "images" / "a.png", 0)
    with (table / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "wnid", "name"), ("images/a.png", 999, "n0", "thing")])
    assert settings.list_samples(table) == [("images/a.png", 999)]
    loaded = settings.load_images(settings.SETTINGS["imagenet"], table)
    assert loaded.pixels.shape == (1, 3, 224, 224)
    assert loaded.source["folder"] == "sample"
    with pytest.raises(ValueError, match="label 999"):
        settings.load_images(settings.SETTINGS["cifar10"], table)
    with pytest.raises(ValueError, match="no image in"):
        settings.list_samples(tmp_path)


def test_a_wrong_choice_is_refused(tmp_path, folder, weights):
    with pytest.raises(ValueError, match="unknown presets"):
        run.STUDY.run(options(tmp_path, folder, weights, presets=("tomme",)))
    with pytest.raises(ValueError, match="no weights are published"):
        settings.load_model(settings.SETTINGS["cifar10"], None)
    with pytest.raises(RuntimeError, match="Missing key"):
        settings.load_model(settings.SETTINGS["imagenet"], weights)


def test_bootstrap_is_that_of_resampled_items():
    chance = np.random.default_rng(1)
    a, b = (chance.integers(0, 2, 200).astype(float) for _ in range(2))
    interval = paired_bootstrap(a, b)
    items = chance.integers(0, 200, (20_000, 200))
    low, high = np.quantile((a - b)[items].mean(1), [0.025, 0.975])
    assert interval.mean == pytest.approx((a - b).mean())
    assert interval.low == pytest.approx(low, abs=0.011)
    assert interval.high == pytest.approx(high, abs=0.011)
    assert paired_bootstrap(a, b) == interval
    assert paired_bootstrap(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap(a, b[:-1])


def test_the_code_is_named_also_where_there_is_no_commit(monkeypatch, tmp_path):
    here = files.environment()
    assert len(here["source_sha256"]) == 64
    assert here["dirty"] in (True, False, None)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setitem(os.environ, "GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert files.environment()["commit"] is None
    assert files.environment()["dirty"] is None


def test_an_interrupted_run_leaves_no_result(tmp_path):
    def execute(line: run.Run) -> Json:
        if line.preset == "tome":
            raise RuntimeError("stopped")
        return {"run": {}, "result": {}}

    runs = [run.Run("cifar10", name, 0, 0) for name in ("dense", "tome", "topk")]
    with pytest.raises(RuntimeError, match="stopped"):
        work_through(runs, tmp_path, execute, command=lambda line: "", environment={})
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["dense.json"]
    assert pending(runs, tmp_path) == runs[1:]
