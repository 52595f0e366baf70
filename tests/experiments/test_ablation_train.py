"""The ablation's trained runs, end to end on random weights and generated images, and what their report says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

from experiments.ablation import report_trained, settings, train
from experiments.ablation.presets import RECIPE_NOTES, RECIPES, TRAINED, TRAINED_REDUCTIONS
from experiments.lib import training
from experiments.lib.files import Json, pack

CIFAR = settings.SETTINGS["cifar10"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten class folders with two images each to train on, others to measure on, and random weights."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("inputs")
    for i in range(40):
        file = path / ("train", "test")[i % 2] / f"class{i // 2 % 10}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    torch.manual_seed(0)
    save_file(settings.vit_cifar().state_dict(), path / "vit.safetensors")
    return path


def options(inputs: Path, out: Path, **changes: Any) -> train.Options:
    given: dict[str, Any] = {"presets": ("dense", "control", "tome", "crossget"), "r": (8,), "seeds": (0,)}
    given = {**given, "batch": 5, "epochs": 2, **changes}
    return train.Options(
        "cifar10", inputs / "test", inputs / "train", inputs / "vit.safetensors", results=out, **given
    )  # fmt: skip


def read(out: Path, name: str) -> Any:
    return json.loads((out / "cifar10" / f"{name}.json").read_text())


def test_a_result_file_says_what_was_trained_and_with_what_outcome(inputs: Path, tmp_path: Path) -> None:
    assert train.STUDY.run(options(inputs, tmp_path)) == 4
    assert train.STUDY.run(options(inputs, tmp_path)) == 0
    content = read(tmp_path, "crossget_r8_seed0")
    assert str(inputs) not in json.dumps(content)
    assert list(content) == ["run", "command", "environment", "result", "seconds"]
    assert content["command"] == (
        "python -m experiments.run ablation-trained --epochs 2 --batch 5 --setting cifar10 --data test --train train "
        "--weights vit.safetensors --presets crossget --r 8 --seeds 0"
    )
    assert {name: source["n"] for name, source in content["run"]["data"].items()} == {"test": 20, "train": 20}
    assert content["run"]["data"]["test"]["list_sha256"] != content["run"]["data"]["train"]["list_sha256"]
    result = content["result"]
    assert (result["tokens"], result["recipe"]["seed"], len(result["history"])) == ([66, 58, 50, 42], 0, 2)
    assert result["recipe"]["lr"] == RECIPES["cifar10"].lr
    assert result["history"][1]["loss"] < result["history"][0]["loss"]
    assert len(result["cross_tokens"]) == 4
    assert min(result["cross_tokens"]) > 0.001
    assert result["divergence"] > 0
    dense, control = read(tmp_path, "dense")["result"], read(tmp_path, "control_seed0")["result"]
    assert (dense["agreement"], dense["divergence"]) == (100, 0)
    assert "recipe" not in dense
    # The control is compared with the model before it was trained on, and costs what that does.
    assert control["divergence"] > 0
    assert control["gflops"] == dense["gflops"]
    assert (control["tokens"], control["cross_tokens"]) == ([65] * 4, [])


def test_the_same_seed_gives_the_same_result_and_another_seed_another(inputs: Path, tmp_path: Path) -> None:
    wanted = options(inputs, tmp_path / "one", presets=("tome",), seeds=(0, 1), epochs=1)
    train.STUDY.run(wanted)
    torch.rand(3)  # what chance was taken before does not matter
    train.STUDY.run(replace(wanted, results=tmp_path / "two", seeds=(0,)))
    first = read(tmp_path / "one", "tome_r8_seed0")["result"]
    assert first == read(tmp_path / "two", "tome_r8_seed0")["result"]
    assert first["divergences"] != read(tmp_path / "one", "tome_r8_seed1")["result"]["divergences"]


def test_cross_tokens_alone_leave_the_weights(inputs: Path) -> None:
    row = TRAINED["cross_tokens"]
    run = train.Run("cifar10", "cross_tokens", 8, 0)
    model, attached = train.build(row, run, inputs / "vit.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert attached is not None
    assert train.sizes(attached) == [0] * 4
    data = train.labelled(settings.find_samples(CIFAR, inputs / "train"), CIFAR, seed=0)
    train.fit(model, attached, row, data, training.Recipe(epochs=1, batch=10, lr=0.01))
    attached.unregister_parameters()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert min(train.sizes(attached)) > 0


def test_augmentation_depends_on_seed_epoch_and_index_only(inputs: Path) -> None:
    samples = settings.find_samples(CIFAR, inputs / "train")
    data = train.labelled(samples, CIFAR, seed=0)
    pixels, label = data[3, 7]
    assert (pixels.shape, label) == ((3, 32, 32), samples.labels[7])
    assert torch.equal(pixels, data[3, 7][0])
    assert not torch.equal(pixels, data[4, 7][0])
    assert not torch.equal(pixels, train.labelled(samples, CIFAR, seed=1)[3, 7][0])
    photograph = Image.new("RGB", (300, 260), "red")
    assert settings.SETTINGS["imagenet"].transform(train=True)(photograph).shape == (3, 224, 224)


def test_the_queue_has_each_row_once_and_the_first_reduction_first(inputs: Path, tmp_path: Path) -> None:
    runs = train.grid(replace(options(inputs, tmp_path), presets=tuple(TRAINED), r=TRAINED_REDUCTIONS, seeds=(0, 1)))
    slugs = [run.slug for run in runs]
    assert len(set(slugs)) == len(slugs)
    assert [slugs.count(f"cifar10/{name}") for name in ("dense", "control_seed0", "control_seed1")] == [1, 1, 1]
    assert next(run.r for run in runs if TRAINED[run.preset].preset.swept) == TRAINED_REDUCTIONS[0]
    with pytest.raises(ValueError, match="unknown presets"):
        train.grid(replace(options(inputs, tmp_path), presets=("tomme",)))


# The report ---------------------------------------------------------------------------------------------------------


def entry(preset: str, r: int, seed: int, right: float, **changes: Any) -> Json:
    """A made-up result with 400 images, of which the first ones are classified rightly."""
    count = round(400 * right)
    trained = TRAINED[preset].train is not None
    return {
        "run": {
            "setting": "cifar10", "preset": preset, "r": r, "seed": seed, "weights": None,
            "data": {"test": {"n": 400}, "train": {"n": 20}},
        },
        "result": {
            "top1": 100 * right, "loss": 1 - right, "correct": "1" * count + "0" * (400 - count), "agreement": 90.0,
            "divergences": pack(np.zeros(400)), "gflops": {"dense": 2.0, "reduced": 1.5}, "tokens": [65, 57],
            **({"recipe": {**vars(RECIPES["cifar10"]), "seed": seed, **changes}} if trained else {}),
        },
    }  # fmt: skip


def made_up() -> list[Json]:
    results = [
        entry("dense", 0, 0, 0.7),
        entry("crossget_untrained", 8, 0, 0.6),
        entry("crossget_untrained", 4, 0, 0.6),
    ]
    for seed in (0, 1):
        results += [entry("control", 0, seed, 0.75)]
        for r in (4, 8):
            results += [
                entry("tome", r, seed, 0.7),
                entry("crossget", r, seed, 0.8 + 0.01 * seed),
                entry("full_bipartite", r, seed, 0.9),
                entry("cross_token", r, seed, 0.805 if r == 8 else 0.7),
            ]
    return results


def test_verdicts_follow_from_the_results() -> None:
    verdicts = report_trained.verdicts(made_up())
    words = {(verdict.question.compared, verdict.reductions): verdict.word for verdict in verdicts}
    assert words["`crossget` - `tome`", (8,)] == "yes"
    assert words["`crossget` - `full_bipartite`", (8,)] == "no: it hurts"
    assert words["`crossget` - `cross_token`", (8,)] == "not decided"
    assert words["`crossget` - `cross_token`", (4, 8)] == "yes"
    assert words["`control` - `dense`", (0,)] == "yes"
    # 60 to 80.5 % against 70 to 75 %.
    gain = next(verdict for verdict in verdicts if len(verdict.question.rows) == 2)
    assert gain.question.compared == "(`crossget` + `dense`) - (`crossget_untrained` + `control`)"
    assert gain.points.mean == pytest.approx(15.5)
    assert gain.by_seed == pytest.approx([15, 16])
    assert gain.loss_by_seed == pytest.approx([-0.15, -0.16])
    # What was not run is not answered.
    assert not any("full_size" in verdict.question.compared for verdict in verdicts)


def test_rows_are_compared_by_the_seeds_that_both_have() -> None:
    results = [entry("tome", 8, 0, 0.7), entry("crossget", 8, 0, 0.8), entry("crossget", 8, 1, 0.1)]
    (verdict,) = report_trained.verdicts(results)
    assert verdict.points.mean == pytest.approx(10)
    assert verdict.by_seed == pytest.approx([10])
    line = next(line for line in report_trained.chapter(results)[-1].splitlines() if "`crossget`" in line)
    assert "| **+10.0 [" in line
    assert report_trained.verdicts([results[0], results[2]]) == []


def test_the_chapter_is_built_from_the_results() -> None:
    paragraphs = report_trained.chapter(made_up())
    assert [text for text in paragraphs if text.startswith("### ")] == ["### r = 4", "### r = 8"]
    table = paragraphs[-1]
    row = next(line for line in table.splitlines() if "`crossget`" in line)
    assert [cell.strip() for cell in row.split("|")][1:8] == [
        "`crossget`",
        "CrossGET",
        "75",
        "80.5",
        "0.7",
        "0.195",
        "2",
    ]
    assert "**+10.5 [" in row
    assert report_trained.chapter([]) == []


def test_results_of_different_recipes_are_not_compared() -> None:
    with pytest.raises(ValueError, match="differ in their recipes"):
        report_trained.chapter([entry("tome", 8, 0, 0.7), entry("tome", 8, 1, 0.7, lr=1.0)])


def test_questions_name_rows_and_recipes_have_notes() -> None:
    assert set(RECIPE_NOTES) == set(RECIPES) == set(settings.SETTINGS)
    for question in report_trained.QUESTIONS:
        assert {*question.rows, *question.bases} <= set(TRAINED)
        assert len(question.rows) == len(question.bases)
