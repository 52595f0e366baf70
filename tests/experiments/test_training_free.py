"""The training-free comparison, end to end on random weights, and the page that shows its results."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("matplotlib")

import crossget
from crossget.methods.reducers import Reducer
from experiments.ablation import settings
from experiments.lib.files import read_results
from experiments.lib.statistics import paired_ratio
from experiments.training_free import presets, report, run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result files of three rows on ten generated images."""
    from safetensors.torch import save_file

    tmp_path = tmp_path_factory.mktemp("training_free")
    for i in range(20):
        file = tmp_path / "images" / f"class{i % 10}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    torch.manual_seed(0)
    save_file(settings.vit_cifar().state_dict(), tmp_path / "vit.safetensors")
    options = run.Options(
        "cifar10", tmp_path / "images", tmp_path / "vit.safetensors", presets=("dense", "tome", "ward"), budgets=(58,),
        results=tmp_path / "results",
    )  # fmt: skip
    assert run.STUDY.run(options) == 3
    assert run.STUDY.run(options) == 0  # everything has its file
    return tmp_path


def test_every_row_is_fitted_from_below_and_reported(measured: Path) -> None:
    results = {r["run"]["preset"]: r for r in read_results(measured / "results")}
    assert results["dense"]["result"]["divergence"] == 0
    assert results["dense"]["run"]["data"]["half"] == "confirm"
    assert results["dense"]["result"]["n"] == 10
    share = {name: r["result"]["gflops"]["reduced"] for name, r in results.items()}
    assert abs(share["tome"] / share["dense"] - 0.58) < 0.02  # one r more or less changes 0.03
    assert share["tome"] - 0.03 < share["ward"] <= share["tome"]
    reducer = crossget.Ward(results["ward"]["run"]["reducer"]["r"])
    with crossget.attach(settings.vit_cifar().eval(), reducer) as attached:  # the closed form is what is counted
        model = attached.towers["visual"].single_token_outputs[0].module
        assert crossget.count_flops(model, torch.zeros(1, 3, 32, 32)).total == round(1e9 * share["ward"])
    assert results["ward"]["result"]["resolved"]["ensemble"] == "size"
    assert str(measured) not in json.dumps(results)
    text = replace(report.PAGE, results=measured / "results").generated()
    assert "ViT of 4 blocks, CIFAR-10" in text
    assert "| ToMe " in text


def test_a_budget_out_of_reach_is_named() -> None:
    meter = run.Meter(settings.vit_cifar().eval(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"Ratio\(share=0.1\).* leaves more than 30.0 %"):
        meter.fit(lambda share: crossget.Ward(crossget.Ratio(share)), 0.1, 0.3)


def test_parts_are_exchanged_on_the_same_tokens() -> None:
    """A row that takes another's schedule is not fitted: it has the same tokens."""
    fitted: dict[tuple[str, int], Reducer] = {
        ("tome", 58): crossget.ToMe(14),
        ("ward", 58): crossget.Ward(3),
    }
    meter = run.Meter(settings.vit_cifar().eval(), torch.zeros(1, 3, 32, 32))
    for name in ("ward_keys", "ward_cosine"):
        reducer = run.reducer_of(run.Run("cifar10", name, 58, "choose"), meter, fitted)
        assert reducer is not None
        assert reducer.r == 3
    assert not meter.known


def test_the_ratio_of_two_means() -> None:
    values = np.random.default_rng(0).random(50) + 1
    assert paired_ratio(2 * values, values) == pytest.approx((2, 2, 2))
    found = paired_ratio(values, values[::-1].copy())
    assert found.mean == pytest.approx(1)
    assert found.low < 1 < found.high
    with pytest.raises(ValueError, match="same items"):
        paired_ratio(values, values[1:])


def test_a_constant_may_be_no_whole_number() -> None:
    schedule = presets.constant(2.5, 4)
    assert sum(schedule.removed(layer, 4, 99) for layer in range(4)) == 10
    assert {schedule.removed(layer, 4, 99) for layer in range(4)} == {2, 3}
