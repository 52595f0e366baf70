"""The demo, end to end on small models: what it says is what the parts measure, and it never hides what it lacks."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_clip import registered

import crossget
from crossget.demo import compare as demo
from crossget.demo.compare import (
    CROSSGET,
    SHIPPED,
    TOME,
    WARD,
    CompareOptions,
    Comparison,
    load_photograph,
    load_photographs,
    run,
)

TINY_CLIP = "tiny-clip"
R, TEXT_R = 10, 20
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with registered(TINY_CLIP, CONFIG, tmp_path_factory.mktemp("configs")):
        yield


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory, tiny_clip: None) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    save_file(open_clip.create_model(TINY_CLIP).state_dict(), path)
    return path


def quick(**options: object) -> CompareOptions:
    defaults: dict[str, object] = {"model": TINY_CLIP, "r": R, "rounds": 0, "batch": 2, "out": None, "json": None}
    return CompareOptions(**{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def untrained() -> Comparison:
    """A vision transformer whose weights cannot be had; measured, too."""
    return run(quick(model="test_vit", rounds=1, r=(2,) * 6), lambda line: None)


@pytest.fixture(scope="module")
def trained(clip_file: Path) -> Comparison:
    """A CLIP with weights of its own; its images are reduced."""
    return run(quick(checkpoint=clip_file), pytest.fail)


@pytest.fixture(scope="module")
def pairs(clip_file: Path) -> Comparison:
    """The same, its texts reduced as well."""
    return run(quick(checkpoint=clip_file, text_r=TEXT_R), pytest.fail)


def seen_inputs(found: Comparison) -> tuple[torch.Tensor, ...]:
    """Of one forward, of the kind whose multiply-adds the demo shows."""
    image = torch.rand(1, 3, 64, 64)
    return (image, found.backbone.tokenize(["a cat"])) if found.pairs else (image,)


def printed(found: Comparison) -> str:
    """The words on the picture."""
    figure = found.picture()
    return "\n".join([*(text.get_text() for text in figure.texts), *(axes.get_title() for axes in figure.axes)])


class TestWeights:
    @pytest.mark.slow
    def test_random_weights_are_marked_everywhere(self, untrained: Comparison) -> None:
        assert "timm test_vit (random weights)" in untrained.table()
        assert "note: random weights" in untrained.table()
        assert "--checkpoint FILE" in untrained.table()
        assert "crossget demo: timm test_vit (random weights)" in printed(untrained)
        assert json.loads(untrained.to_json())["backbone"]["random_weights"] is True

    @pytest.mark.slow
    def test_random_weights_have_no_similarity(self, untrained: Comparison, trained: Comparison) -> None:
        assert all(row.captions == [] and row.cosine == {} for row in untrained.rows)
        assert "cosine" not in untrained.table() + printed(untrained)
        assert "cosine" in trained.table()
        assert "cosine" in "".join(axes.get_title(loc="left") for axes in trained.picture().axes)
        assert "cosine" not in "".join(axes.get_title(loc="left") for axes in untrained.picture().axes)

    def test_a_checkpoint_is_no_random_weights(self, trained: Comparison) -> None:
        assert "random" not in trained.table().lower()
        assert "random" not in printed(trained).lower()
        assert "Weights: clip.safetensors" in printed(trained)
        assert json.loads(trained.to_json())["backbone"]["random_weights"] is False

    @pytest.mark.slow
    def test_no_network_is_told_in_one_line_and_files_are_written(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        images.mkdir()
        for i, name in enumerate(["a_red-kite.PNG", "b.jpg"]):
            Image.effect_noise((90 + i, 70), 80).convert("RGB").save(images / name)
        (images / "notes.txt").write_text("not an image")
        told: list[str] = []
        options = quick(model="test_vit", images=images, json=tmp_path / "d.json", out=tmp_path / "d.png")
        found = run(options, told.append)
        (line,) = told
        assert re.fullmatch(r"weights 'r160_in1k' are not in the cache, and HF_HUB_OFFLINE is set: .*", line)
        assert json.loads((tmp_path / "d.json").read_text()) == json.loads(found.to_json())
        assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
        assert [p.name for p in found.photographs] == ["a_red-kite", "b"]
        assert found.photographs[0].caption == "a photo of a red kite"
        assert "2 photographs" in found.table()


class TestNumbers:
    def test_the_costs_are_those_the_parts_count(self, trained: Comparison) -> None:
        dense, ward, tome, cross = trained.rows
        model, image = trained.backbone.model, torch.rand(1, 3, 64, 64)
        with crossget.attach(model, {"visual": crossget.CrossGET(R)}) as attached:
            report = crossget.count_flops(model, image)
            assert cross.parameters == sum(p.numel() for p in attached.parameters()) == 4 * 64
        assert dense.gflops == report.dense.total / 1e9
        assert cross.gflops == report.total / 1e9
        assert tome.gflops < cross.gflops < dense.gflops
        assert tome.parameters == ward.parameters == dense.parameters == 0

    def test_the_tokens_are_those_the_blocks_see(self, trained: Comparison) -> None:
        dense, ward, tome, cross = trained.rows
        assert dense.tokens == {"visual": [65] * 4}
        assert ward.tokens["visual"][0] == 65
        assert tome.tokens == {"visual": [65, 55, 45, 35]}
        assert cross.tokens == {"visual": [66, 56, 46, 36]}

    @pytest.mark.parametrize(
        ("found", "tower", "r"),
        [("trained", "visual", R), pytest.param("pairs", "text", TEXT_R, marks=pytest.mark.slow)],
    )
    def test_ward_spends_what_tome_style_does(
        self, found: str, tower: str, r: int, request: pytest.FixtureRequest
    ) -> None:
        seen: Comparison = request.getfixturevalue(found)
        _, ward, tome, _ = seen.rows
        model, inputs = seen.backbone.model, seen_inputs(seen)
        with crossget.attach(model, {tower: crossget.ToMe(r)}):
            most = crossget.count_flops(model, inputs).total
        chosen = [a - b for a, b in pairwise(ward.tokens[tower])]
        less = [[*chosen[:i], chosen[i] - 1, *chosen[i + 1 :]] for i in range(len(chosen)) if chosen[i]]
        assert less
        # One token more in any block would cost more than ToMe-style's.
        for removed, dearer in ((chosen, False), *((removed, True) for removed in less)):
            with crossget.attach(model, {tower: crossget.Ward((*removed, 0))}):
                assert (crossget.count_flops(model, inputs).total > most) == dearer
        assert ward.gflops <= tome.gflops

    def test_ward_takes_less_from_the_first_blocks(self, trained: Comparison) -> None:
        _, ward, tome, _ = trained.rows
        first, *later = (1 - b / a for a, b in pairwise(ward.tokens["visual"]))
        assert 0 < first < min(later)
        assert ward.tokens["visual"][1] > tome.tokens["visual"][1]

    @pytest.mark.slow
    def test_where_ward_cannot_cost_as_little_it_says_so(self) -> None:
        found = run(quick(model="test_vit", pretrained="none", r=101), lambda line: None)
        _, ward, tome, _ = found.rows
        assert ward.tokens == tome.tokens == {"visual": [101, 51, 26, 14, 8, 5]}
        assert "note: Ward is not fitted to ToMe-style's FLOPs in the visual tower" in found.table()
        assert "the nearest possible" in found.table()

    def test_the_cosines_are_those_of_the_features(self, trained: Comparison) -> None:
        model: Any = trained.backbone.model
        images = torch.stack([trained.backbone.preprocess(p.image) for p in load_photographs(None)])
        with torch.no_grad():
            dense = model.encode_image(images)
            with crossget.attach(model, {"visual": crossget.ToMe(R)}):
                reduced = model.encode_image(images)
        expected = torch.nn.functional.cosine_similarity(dense, reduced).mean()
        assert trained.rows[0].cosine["image"] == 1.0
        assert trained.rows[2].cosine["image"] == pytest.approx(float(expected), abs=1e-6)
        assert not torch.equal(dense, reduced)

    @pytest.mark.slow
    def test_the_text_is_reduced_when_asked(self, trained: Comparison, pairs: Comparison) -> None:
        dense, ward, tome, cross = pairs.rows
        assert dense.tokens["text"] == [77] * 3
        assert ward.tokens["text"][0] == 77
        assert tome.tokens["text"] == [77, 57, 37]
        assert cross.tokens["text"] == [78, 58, 38]
        assert dense.gflops > trained.rows[0].gflops  # an image with its caption
        assert dense.cosine["text"] == 1.0
        assert "CrossGET, text" in pairs.table()
        assert set(cross.cosine) == {"image", "text"}
        assert "GFLOPs per image-caption pair" in "".join(axes.get_title(loc="left") for axes in pairs.picture().axes)

    def test_zero_shot_is_a_distribution_over_captions_and_distractors(self, trained: Comparison) -> None:
        for row in trained.rows:
            probabilities = torch.tensor(row.captions)
            assert probabilities.shape == (4, 4 + len(demo.DISTRACTORS))
            torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
        assert "a photo of a cup of coffee" in trained.table()

    @pytest.mark.slow
    def test_speed_is_a_ratio_to_dense(self, untrained: Comparison) -> None:
        dense, *reduced = untrained.rows
        assert dense.speed == 1.0
        for row in reduced:
            assert row.speed is not None
            assert row.speed > 0
            assert row.peak_memory is not None
            assert row.peak_memory > 0
        assert json.loads(untrained.to_json())["methods"][1]["speed"] == reduced[0].speed

    def test_what_was_not_measured_is_not_made_up(self, trained: Comparison) -> None:
        assert [row.speed for row in trained.rows] == [None] * 4
        assert "x  " not in trained.table().splitlines()[5]

    def test_the_rounds_follow_the_time_that_a_call_takes(self) -> None:
        model, inputs = torch.nn.Linear(4, 4), (torch.rand(2, 4),)
        assert demo._rounds_in_time(model, inputs, turns=3) == 20
        assert demo._rounds_in_time(model, inputs, turns=10**9) == 3

    @pytest.mark.slow
    def test_json_says_where_and_how(self, untrained: Comparison) -> None:
        content = json.loads(untrained.to_json())
        assert content["environment"]["torch"] == torch.__version__
        assert content["options"]["r"] == [2] * 6
        assert [method["name"] for method in content["methods"]] == ["dense", WARD, TOME, CROSSGET]
        assert content["photographs"][0]["credit"] == "Stefan van der Walt, CC0"

    @pytest.mark.slow
    def test_the_model_is_given_back_as_it_was(self, untrained: Comparison) -> None:
        with pytest.raises(ValueError, match="is not attached"):
            crossget.attachment(untrained.backbone.model)
        assert not untrained.backbone.model._forward_hooks


class TestPicture:
    def test_merge_maps_show_the_middle_and_the_end(self, trained: Comparison) -> None:
        for row in trained.rows[1:]:
            left = {depth: [len(image.unique()) for image in source] for depth, source in row.sources.items()}
            cross = int(row.name == CROSSGET)
            last = 0 if row.name == WARD else R  # nothing is merged where one token alone is read
            middle, end = (row.tokens["visual"][i] - cross for i in (2, 3))
            assert left == {2: [middle] * 4, 4: [end - last] * 4}
        rows = trained._panels()
        assert [len(row) for row in rows] == [7] * 4
        assert "ToMe-style, after block 2:\n44 tokens for 64 patches" in rows[0][2].caption

    def test_the_last_map_is_that_of_the_whole_schedule(self, trained: Comparison) -> None:
        images = torch.stack([trained.backbone.preprocess(p.image) for p in load_photographs(None)])
        with crossget.attach(trained.backbone.model, {"visual": crossget.CrossGET(R)}) as attached, torch.no_grad():
            trained.backbone.image_features(images)
            assert torch.equal(attached.source["visual"], trained.rows[3].sources[4])

    def test_the_panels_show_what_the_model_saw(self, trained: Comparison) -> None:
        assert trained.pixels.shape == (4, 64, 64, 3)
        with Image.open(demo._shipped_folder() / "chelsea.png") as cat:
            middle = cat.convert("RGB").crop((75, 0, 375, 300)).resize((1, 1), Image.Resampling.BOX)
            colour = torch.tensor(middle.getpixel((0, 0))) / 255
        # The preprocessing's normalisation is undone, and nothing else.
        assert (trained.pixels[0].mean((0, 1)) - colour).abs().max() < 0.02

    @pytest.mark.slow
    def test_tokens_that_are_no_grid_are_not_drawn(self, monkeypatch: pytest.MonkeyPatch, clip_file: Path) -> None:
        def no_grid(*_: int) -> None:
            raise ValueError("these tokens are no grid")

        monkeypatch.setattr(demo.figures, "patch_grid", no_grid)
        found = run(quick(checkpoint=clip_file))
        assert "note: no picture of merged patches: these tokens are no grid" in found.table()
        assert len(found.picture().axes) == 4

    def test_the_photographers_are_credited(self, trained: Comparison) -> None:
        for _, _, credit in SHIPPED:
            assert credit in printed(trained)


class TestRefusals:
    def test_a_text_tower_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="--text-r is for a text tower.*crossget models.*or leave it out"):
            run(quick(model="test_vit", text_r=2))

    def test_a_backbone_without_tokens(self) -> None:
        with pytest.raises(TypeError, match="cannot reduce timm"):
            run(quick(model="test_resnet"))

    def test_another_number_of_layers(self) -> None:
        with pytest.raises(ValueError, match="2 layers.*6 blocks"):
            run(quick(model="test_vit", r=(1, 2)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch": 0}, "--batch 0: expected 1 or more"),
            ({"rounds": -1}, "--rounds -1: expected 0 or more"),
            ({"images": Path("nowhere")}, "--images nowhere: no such file or folder"),
            ({"checkpoint": Path("nowhere")}, "--checkpoint nowhere: no such file or folder"),
            ({"out": Path("nowhere/d.png")}, "--out nowhere/d.png: there is no folder nowhere"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused_before_any_work(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            CompareOptions(**options)  # type: ignore[arg-type]

    def test_without_matplotlib_nothing_is_begun(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setattr(demo, "make", lambda *_, **__: pytest.fail("work was begun"))
        with pytest.raises(RuntimeError, match=r'matplotlib.*"crossget\[demo\]"'):
            run(quick(out=tmp_path / "d.png"))

    @pytest.mark.slow
    def test_without_a_picture_matplotlib_is_not_needed(self, monkeypatch: pytest.MonkeyPatch, clip_file: Path) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert len(run(quick(checkpoint=clip_file)).rows) == 4


class TestPhotographs:
    def test_ship_with_scikit_image_which_is_not_imported(self) -> None:
        imported = "skimage" in sys.modules
        photographs = load_photographs(None)
        assert [p.name for p in photographs] == [Path(name).stem for name, _, _ in SHIPPED]
        assert all(min(p.image.size) >= 300 for p in photographs)
        assert all(p.credit for p in photographs)
        assert ("skimage" in sys.modules) == imported

    def test_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r'"crossget\[demo\]".*--images'):
            load_photographs(None)

    def test_say_when_the_package_has_them_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "SHIPPED", (("gone.png", "", ""),))
        with pytest.raises(RuntimeError, match=r"gone\.png.*of your own"):
            load_photographs(None)

    def test_a_folder_without_images(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no image in it; looked for \.jpg"):
            load_photographs(tmp_path)

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        with pytest.raises(ValueError, match="expected a folder of images"):
            load_photographs(tmp_path / "a.png")

    def test_a_file_that_only_looks_like_an_image(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("no")
        with pytest.raises(ValueError, match=r"a\.png .*Pillow"):
            load_photographs(tmp_path)

    @pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "I"])
    def test_brightness_is_kept(self, mode: str, tmp_path: Path) -> None:
        """Also where a pixel has 16 bits."""
        grey = np.linspace(0, 255, 64).reshape(8, 8)
        if mode.startswith("I"):
            image = Image.fromarray((grey * 257).astype(np.uint16 if mode == "I;16" else np.int32))
        else:
            image = Image.fromarray(grey.astype(np.uint8)).convert(mode)
        assert image.mode == mode
        image.save(tmp_path / ("a.tif" if mode == "I" else "a.png"))
        (found,) = load_photographs(tmp_path)
        assert np.abs(np.asarray(found.image)[..., 0] - grey).max() <= 1

    @pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_images_are_turned_as_their_camera_says(self, mode: str, suffix: str, tmp_path: Path) -> None:
        if mode == "I;16" and suffix == "jpg":
            mode = "CMYK"
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by a quarter
        pixels = np.zeros((16, 32), np.uint8)
        pixels[:, :16] = 255
        image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels)
        (image if mode == "I;16" else image.convert(mode)).save(tmp_path / f"a.{suffix}", exif=exif)
        (found,) = load_photographs(tmp_path)
        assert found.image.size == (16, 32)
        upper, lower = np.asarray(found.image)[:12], np.asarray(found.image)[20:]
        assert upper.min() > 200
        assert lower.max() < 50

    def test_numbers_that_are_no_brightness(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a\.tif .*pixels go from 0\.5 to 0\.5: expected 8 or 16 bits"):
            load_photographs(tmp_path)

    def test_a_decompression_bomb(self, tmp_path: Path) -> None:
        Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png .*400000000 pixels"):
            load_photographs(tmp_path)

    def test_a_fifo_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png is not a regular file"):
            load_photographs(tmp_path)
        with pytest.raises(ValueError, match="no image .*: expected a file"):
            load_photograph(tmp_path / "a.png")


def test_image_features_are_what_the_classifier_reads() -> None:
    from crossget.demo.backbones import make

    backbone = make("test_vit", pretrained="none")
    images = backbone.random_inputs(2, text=False)[0]
    with torch.no_grad():
        features = backbone.image_features(images)
        torch.testing.assert_close(backbone.model.get_classifier()(features), backbone.model(images))


def test_options_name_every_field_in_the_docstring() -> None:
    documented = CompareOptions.__doc__ or ""
    assert all(field.name in documented for field in dataclasses.fields(CompareOptions))
