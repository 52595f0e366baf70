"""The studies of published models, end to end on small ones with random weights, and the tables of their results."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

import crossget
from crossget.methods.reducers import TowerFacts, View
from experiments.lib.files import Json, pack, read_results, unpack
from experiments.real import budgets, clip, distill, evidence, picture, precision, report, saliency, speed, zero_shot
from experiments.real.presets import ROWS, fit
from tests.support.small_clip import registered

NAME = "real-small"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
DINOV2 = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "mlp_ratio": 2, "image_size": 518}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights, photographs of ten classes and their texts, in a folder; open_clip knows the CLIP."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("real")
    with registered(NAME, CONFIG, folder):
        torch.manual_seed(0)
        tower = {key: 2 * value for key, value in clip.image_tower(NAME).state_dict().items()}
        save_file(tower, folder / "clip.safetensors")  # larger than at the start: features depend on the photograph
        save_file(Dinov2Model(Dinov2Config(**DINOV2)).state_dict(), folder / "dinov2.safetensors")
        (folder / "dinov2.json").write_text(json.dumps(DINOV2))
        save_file(saliency.Decoder((24, 256, 128, 64)).state_dict(), folder / "decoder.safetensors")
        near = torch.randn(16) + 0.1 * torch.randn(2, 10, 16)  # so near that no photograph is sure of its class
        sets = {"one": near[0], "two": near[1], "other": torch.randn(3, 16)}
        save_file(sets, folder / "texts.safetensors")
        rows = []
        for i in range(12):
            for part in ("photos", f"classes/train/{i % 3}", f"classes/test/{i % 3}"):
                (folder / part).mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"{i:02}.png")
            rows.append({"file": f"{i:02}.png", "label": i % 10})
        with (folder / "photos" / "labels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "label"])
            writer.writeheader()
            writer.writerows(rows)
        yield folder


def given(files: Path) -> dict[str, Any]:
    """The options that all studies of the CLIP take."""
    return {
        "data": files / "photos", "texts": files / "texts.safetensors", "sets": ("one", "two"),
        "weights": files / "clip.safetensors", "model": NAME,
    }  # fmt: skip


def measured(study: Any, options: Any) -> list[Json]:
    """Run a study twice: the second time there is nothing to do. Returns the result files."""
    count = study.run(options)
    assert count == len(study.grid(options))
    assert study.run(options) == 0
    return read_results(options.results)


def test_zero_shot_from_photographs_to_tables(files: Path, tmp_path: Path) -> None:
    options = zero_shot.Options(**given(files), presets=("dense", "tome"), budgets=(69,), batch=3, results=tmp_path)
    contents = measured(zero_shot.STUDY, options)
    assert len(contents) == 4
    assert str(files) not in json.dumps(contents)
    rows = report.zero_shot_rows(contents)
    assert list(rows) == [("dense", 100), ("tome", 69)]
    assert rows["dense", 100].divergence.shape == (2, 12)
    assert rows["dense", 100].divergence.max() == 0
    assert 0.6 < rows["tome", 69].share <= 0.69
    # The same by hand, photograph by photograph: the odd ones come first.
    loaded = replace(options, batch=12).load()
    with torch.no_grad():
        dense = F.normalize(loaded.tower(loaded.images.pixels), dim=-1)
        (tome,) = [c for c in contents if (c["run"]["preset"], c["run"]["half"]) == ("tome", "odd")]
        with crossget.attach(loaded.tower, crossget.ToMe(tome["run"]["reducer"]["r"]["r"])):
            merged = F.normalize(loaded.tower(loaded.images.pixels), dim=-1)
    texts = loaded.texts["two"]
    expected = F.kl_div(
        (100 * merged @ texts.T).log_softmax(1), (100 * dense @ texts.T).log_softmax(1), log_target=True,
        reduction="none",
    ).sum(1)  # fmt: skip
    found = rows["tome", 69].divergence[1]
    assert found == pytest.approx(torch.cat([expected[1::2], expected[::2]]).numpy(), rel=2e-3, abs=2e-3)
    text = "\n".join(report.zero_shot(contents))
    assert "12 photographs" in text
    assert f"{rows['tome', 69].divergence.mean():.3f}" in "\n".join(evidence.zero_shot(contents))
    assert "6 photographs" in "\n".join(report.zero_shot([c for c in contents if c["run"]["half"] == "odd"]))
    contents[0]["run"]["data"] = {"folder": "others"}
    with pytest.raises(ValueError, match="differ in 'data'"):
        report.zero_shot_rows(contents)


@pytest.mark.slow
def test_rows_of_multiples_leave_them_and_keep_the_budget(files: Path) -> None:
    tower, images = clip.image_tower(NAME), torch.randn(1, 3, 64, 64)
    with crossget.attach(tower, fit(tower, images, ROWS["tome_aligned"], 80)) as attached:
        spent = crossget.count_flops(tower, images)
        first, second = attached.tokens["visual"]
    assert (first, second % 16) == (65, 0)
    assert 0.6 < spent.total / spent.dense.total <= 0.8


def test_speed_takes_the_schedules_of_zero_shot(files: Path, tmp_path: Path) -> None:
    files_only = {key: value for key, value in given(files).items() if key not in ("texts", "sets")}
    options = speed.Options(**files_only, budgets=(69, 80), images=2, rounds=2, results=tmp_path)
    contents = measured(speed.STUDY, options)
    first = contents[0]["result"]["rows"]
    assert [row["method"] for row in first] == ["dense", "tome", "crossget", "ward"]
    assert all(1 / 0.69 <= row["promised"] < 2 for row in first[1:])
    assert all(len(row["rounds"]) == 2 and row["seconds"] > 0 for row in first)
    text = "\n".join(report.speeds(contents))
    assert text.count("| Ward ") == 2
    assert f"{first[1]['speed']:.2f}x [" in text
    with pytest.raises(ValueError, match="dense"):
        speed.grid(replace(options, presets=("dense",)))
    for run in speed.grid(options):
        assert speed.grid(replace(options, **speed.select(run))) == [run]


def test_the_command_repeats_one_run(files: Path) -> None:
    options = zero_shot.Options(**given(files))
    runs = zero_shot.grid(options)
    assert len(runs) == len(set(runs)) == 2 * (1 + 4 * (len(ROWS) - 1))
    assert zero_shot.STUDY.command(options, runs[1]) == (
        "python -m experiments.run real-zero-shot --data photos --weights clip.safetensors "
        f"--model {NAME} --texts texts.safetensors --sets one two --presets tome --budgets 50 --halves odd"
    )
    fewer = precision.Options(**given(files))
    names = ["tome_none", "tome_vectors", "tome_similarities", "tome_none_32", "tome_none_16", "tome_none_8"]
    assert [run.slug for run in precision.grid(fewer)[:6]] == [f"precision/{name}" for name in names]
    for study, own in ((precision, fewer), (zero_shot, options)):
        for run in study.grid(own):  # type: ignore[attr-defined]
            assert study.grid(replace(own, **study.STUDY.select(run))) == [run]  # type: ignore[attr-defined]


def test_files_that_do_not_fit_are_named(files: Path) -> None:
    options = given(files)
    with pytest.raises(ValueError, match=r"no sets \['three'\].*'one'"):
        clip.Measuring(**{**options, "sets": ("three",)}).load()
    with pytest.raises(ValueError, match=r"shapes \[\(3, 16\), \(10, 16\)\].*--sets"):
        clip.Measuring(**{**options, "sets": ()}).load()
    with pytest.raises(ValueError, match="has a label 9, but real-small has 3 classes"):
        clip.Measuring(**{**options, "sets": ("other",)}).load()
    with pytest.raises(ValueError, match="no model 'nothing'"):
        clip.Measuring(**{**options, "model": "nothing"}).load()


def test_the_rows_of_the_removed_importance_are_read() -> None:
    """Its program is gone, its result files stay."""
    contents = read_results(clip.RESULTS)
    rows = report.text_rows(contents)
    assert list(rows) == [(name, target, 50) for name in report.TEXT_METHODS for target in report.TEXTS]
    loss = rows["crossget", "true", 50]["loss"]
    assert loss == pytest.approx(unpack(rows["crossget", "true", 50]["losses"]).mean(), rel=1e-3)
    assert f" {loss:.3f} |" in "\n".join(report.texts(contents))


@pytest.mark.slow
def test_saliency_from_photographs_to_a_picture(files: Path, tmp_path: Path) -> None:
    parts = {"backbone": files / "dinov2.safetensors", "decoder": files / "decoder.safetensors",
             "config": files / "dinov2.json"}  # fmt: skip
    options = saliency.Options(
        data=files / "photos", **parts, presets=("tome", "topk"), budgets=(69,), limit=3, results=tmp_path
    )
    contents = measured(saliency.STUDY, options)
    rows = report.saliency_rows(contents)
    assert all(0.6 < report.share_of(row) <= 0.69 and row["mae"] > 0 and row["n"] == 3 for row in rows.values())
    assert "3 photographs" in "\n".join(report.maps(contents))
    assert f"{rows['topk', 69]['mae']:.4f}" in "\n".join(evidence.maps(contents))
    picture.main(picture.Options(
        photographs=(files / "photos" / "00.png",), **parts, presets=("topk",), budget=69, out=tmp_path / "maps.png"
    ))  # fmt: skip
    with Image.open(tmp_path / "maps.png") as image:
        assert image.width > image.height > 100  # one row of three columns


def test_maps_are_compared_pixel_by_pixel() -> None:
    dense = torch.tensor([[[0.9, 0.8], [0.1, 0.2]], [[0.1, 0.1], [0.2, 0.2]]])
    maps = torch.tensor([[[0.9, 0.3], [0.6, 0.2]], [[0.1, 0.3], [0.2, 0.2]]])
    found = saliency.agreement(maps, dense)
    assert unpack(found["ious"]) == pytest.approx([1 / 3, 1], rel=1e-3)
    assert unpack(found["maes"]) == pytest.approx([0.25, 0.05], rel=1e-3)
    assert found["iou"] == pytest.approx(200 / 3, rel=1e-4)


@pytest.mark.parametrize("name", list(precision.METHODS))
def test_an_exact_comparison_is_the_method(name: str) -> None:
    """With all channels in float32, what stands in for a method merges as it does."""
    torch.manual_seed(0)
    tokens, keys = torch.randn(2, 21, 32), torch.randn(2, 2, 21, 16)
    protected = torch.zeros(2, 21, dtype=torch.bool)
    protected[:, 0] = True
    view = View(tokens, keys, keys, None, torch.rand(2, 21) + 1, protected, 1)
    facts = TowerFacts("a tower")
    coarse = replace(precision.METHODS[name][0], found=[]).resolved(facts)
    method: Any = ROWS[name].method
    method = (replace(method, key_stride=1) if name == "ward" else method).resolved(facts)
    expected, exact = method.reduce(view, 6), coarse.reduce(view, 6)
    assert expected is not None
    assert exact is not None
    torch.testing.assert_close(exact[0], expected[0])
    few = replace(coarse, channels=2, found=[])
    assert few.reduce(view, 6) is not None
    assert coarse.found == [1]
    assert few.found[0] < 1


def test_pairs_are_shared_whichever_token_leaves() -> None:
    one = (torch.tensor([[1, 2, 3]]), torch.tensor([[5, 6, 7]]))
    other = (torch.tensor([[5, 2, 3]]), torch.tensor([[1, 7, 6]]))
    assert precision.shared_pairs(one, other) == pytest.approx(1 / 3)
    assert precision.shared_pairs(one, one) == 1


@pytest.mark.slow
def test_precision_from_photographs_to_a_table(files: Path, tmp_path: Path) -> None:
    options = precision.Options(**given(files), presets=("tome",), budget=69, limit=4, results=tmp_path)
    contents = measured(precision.STUDY, options)
    rows = report.precision_rows(contents)
    assert list(rows)[:2] == [("tome", "none", None), ("tome", "vectors", None)]
    assert rows["tome", "none", None]["shared"] == 100
    assert rows["tome", "none", 8]["shared"] < 100
    assert "4 photographs" in "\n".join(report.precise(contents))


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_budgets_from_photographs_to_a_table(files: Path, tower: Any, tmp_path: Path) -> None:
    options = budgets.Options(
        data=files / "photos", weights=files / "clip.safetensors", backbone=files / "dinov2.safetensors",
        config=files / "dinov2.json", model=NAME, towers=(tower,), presets=("tome",), flops=(69,),
        latencies=(), fitted_on=2, measured_on=3, results=tmp_path,
    )  # fmt: skip
    contents = measured(budgets.STUDY, options)
    assert len(contents) == 3
    for content in contents:
        result = content["result"]
        assert result["predicted"] == pytest.approx(report.share_of(result))
        assert result["predicted"] <= 0.69
        assert len(unpack(result["distances"])) == 3
    assert "2 photographs, measured on 3 others" in "\n".join(report.budgets(contents))
    assert all(f"{c['result']['distance']:.4f}" in "\n".join(evidence.budgets(contents)) for c in contents)
    time = {**contents[0]["run"], "budget": "latency", "share": 60, "fitted_on": 8}
    kept = {**contents[0]["result"], "predicted": 0.6, "measured": 0.625, "spread": [0.5, 0.7]}
    of_time = [{**contents[0], "run": time, "result": result} for result in ({"refused": "no"}, kept)]
    shown = "\n".join(report.budgets([*of_time, *contents]))
    assert "2 photographs, measured on 3 others" in shown
    assert "62.5 [50, 70]" in shown
    assert "1 of 2 can be kept" in "\n".join(evidence.budgets([*contents, *of_time]))
    assert "differ by at most 2.5 points" in "\n".join(evidence.budgets([*contents, *of_time]))
    with pytest.raises(ValueError, match="needs --backbone"):
        budgets.load_fitting(replace(options, backbone=None), "dinov2")


@pytest.mark.slow
def test_training_from_photographs_to_a_table(files: Path, tmp_path: Path) -> None:
    shared = {key: value for key, value in given(files).items() if key != "data"}
    options = distill.Options(
        train=(files / "photos",), data=files / "photos", classes=files / "classes", **shared,
        presets=("dense", "tome_untrained", "tome", "crossget", "control"), r=(8,), images=8, batch=4, epochs=6,
        lr=1e-4, eval_batch=5, work=tmp_path / "work", results=tmp_path / "results",
    )  # fmt: skip
    contents = measured(distill.STUDY, options)
    rows = {key[0]: content["result"] for key, content in report.trained_rows(contents).items()}
    assert rows["dense"]["cosine"] == pytest.approx(1)
    assert rows["tome"]["cosine"] > rows["tome_untrained"]["cosine"]
    assert rows["tome"]["history"][-1]["loss"] < rows["tome"]["history"][0]["loss"]
    assert rows["control"]["history"][0]["loss"] < rows["tome"]["history"][0]["loss"]
    assert min(rows["crossget"]["cross_tokens"]) > 0
    assert rows["dense"]["centroids"]["n"] == 12
    (targets,) = (tmp_path / "work").glob("targets_*.safetensors")
    assert distill.stored(targets, lambda: pytest.fail("computed again")).shape[0] == 8
    assert "8 photographs to train on" in "\n".join(report.trained(contents))
    assert f"{rows['tome']['centroids']['top1']:.1f}" in "\n".join(evidence.trained(contents))


def distilled(preset: str, seed: int | None, divergences: list[float]) -> Json:
    """A result of distillation at r = 16, of two photographs."""
    run = {"task": "trained", "preset": preset, "r": 16, "seed": seed, "trained_on": 8, "measured_on": 2}
    sets = {"one": {"correct": "01", "divergences": pack(np.array(divergences))}}
    spent = {"gflops": {"dense": 2.0, "reduced": 1.0}}
    recipe = {"epochs": 1, "batch": 8, "precision": "bf16", "seed": seed}
    result = {"sets": sets, "cosine": 0.9, "recipe": recipe, **spent}
    return {"run": run, "result": result}


def test_trained_rows_are_means_over_seeds_and_compared_at_the_seeds_that_both_have() -> None:
    tome = [distilled("tome", seed, [1 + seed, 3 + seed]) for seed in (0, 2)]
    guided = [distilled("crossget", 0, [2, 6]), distilled("crossget", 1, [9, 9])]
    contents = [*tome, *guided, distilled("full_size", 0, [1, 3])]
    lines = "\n".join(evidence.trained(contents)).splitlines()
    cells = {row[1]: row[2:] for row in ([cell.strip() for cell in line.split("|")] for line in lines) if len(row) > 3}
    assert cells["ToMe, 2 seeds"][1:3] == ["3.000", ""]
    assert cells["ToMe, 2 seeds"][4] == ""  # not measured by centroids
    assert cells["CrossGET, 2 seeds"][1] == "6.500"
    assert cells["CrossGET, 2 seeds"][2].startswith("200 ")  # 4 of 2: the seed 0 alone is ToMe's, too
    assert "KL of parts in % of CrossGET's: ensemble: size 50 [" in lines[-1]  # 2 of 4


def test_rows_of_different_recipes_are_no_table() -> None:
    one, other = distilled("tome", 0, [1, 3]), distilled("crossget", 0, [2, 6])
    assert "in batches of 8, autocast to bf16." in "\n".join(evidence.trained([one, other]))
    other["result"]["recipe"]["precision"] = "no"
    with pytest.raises(ValueError, match=r"trained with precision .*bf16.*no"):
        report.trained_rows([one, other])


def test_photographs_to_train_on_are_spread_over_all_folders(files: Path, tmp_path: Path) -> None:
    found = distill.photographs((files / "photos", files / "classes"), 6)
    assert len(found) == 6
    assert {file.suffix for file in found} == {".png"}
    assert len({file.parent for file in found}) > 2
    with pytest.raises(ValueError, match="no image in"):
        distill.photographs((tmp_path,), 6)


def test_the_short_page_is_short() -> None:
    assert len(evidence.PAGE.file.read_text(encoding="utf-8").split()) <= 900
