"""Saving, loading, and the reference's CLIP files. The values they give are tested in test_reference_clip.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crossget

open_clip_model = pytest.importorskip("open_clip.model")
LAYERS, WIDTH = 3, 64


def clip(quick_gelu: bool = True) -> nn.Module:
    torch.manual_seed(0)
    vision = open_clip_model.CLIPVisionCfg(layers=LAYERS, width=WIDTH, head_width=32, patch_size=8, image_size=32)
    text = open_clip_model.CLIPTextCfg(context_length=12, vocab_size=50, width=WIDTH, heads=2, layers=LAYERS)
    model: nn.Module = open_clip_model.CLIP(16, vision, text, quick_gelu=quick_gelu)
    return model.eval()


def run(model: Any) -> list[Tensor]:
    ids = torch.tensor([[48, 5, 6, 49, 0, 0, 0, 0, 0, 0, 0, 0], [48, 7, 8, 9, 3, 4, 49, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        return [model.encode_image(torch.ones(2, 3, 32, 32)), model.encode_text(ids)]


def reference_file(path: Path, **changes: Any) -> Path:
    state = clip().state_dict()
    cross = torch.randn(1, LAYERS, WIDTH)
    content = {**state, "visual.transformer.cross_image": cross, "transformer.cross_text": 2 * cross, **changes}
    torch.save({"model": {k: v for k, v in content.items() if v is not None}, "epoch": 3}, path)
    return path


REDUCERS: list[Any] = [
    crossget.CrossGET(3),
    {"visual": crossget.CrossGET((3, 2, 1)), "text": crossget.CrossGET(crossget.Linear(2, 0), ties="stable")},
    {"visual": crossget.ToMe(crossget.Ratio(0.2))},
    {"visual": crossget.TopK(2), "text": crossget.Random(1, seed=5)},
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_round_trip(tmp_path: Path, reducer: Any) -> None:
    model = clip()
    attached = crossget.attach(model, reducer)
    for parameter in attached.parameters():
        nn.init.normal_(parameter)
    expected = run(model)
    attached.save(tmp_path / "new" / "folder")
    other = clip()
    loaded = crossget.load(other, tmp_path / "new" / "folder")
    assert loaded.reducers == attached.reducers
    assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))
    size = sum(file.stat().st_size for file in (tmp_path / "new" / "folder").iterdir())
    assert size < 100_000


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda d: (d / "crossget_config.json").unlink(), FileNotFoundError, "has no crossget_config.json"),
        (lambda d: edit(d, version=2), ValueError, "has version 2: this crossget reads 1"),
        (lambda d: edit(d, towers={"visual": {"method": "Magic", "r": 3}}), ValueError, "method 'Magic' is not known"),
        (lambda d: edit(d, towers={"sound": {"method": "ToMe", "r": 3}}), ValueError, r"names the towers \['sound'\]"),
        (lambda d: edit(d, towers={"visual": {"method": "CrossGET", "r": 3}}), ValueError, r"this attachment needs"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, break_it: Any, error: type[Exception], message: str) -> None:
    with crossget.attach(clip(), crossget.CrossGET(3)) as attached:
        attached.save(tmp_path)
    break_it(tmp_path)
    model = clip()
    with pytest.raises(error, match=message):
        crossget.load(model, tmp_path)
    with pytest.raises(ValueError, match="is not attached"):
        crossget.attachment(model)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "crossget_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_neither_folder_nor_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match="folder.*id of a hub repository"):
        crossget.load(clip(), "/no/such/folder")


def test_a_schedule_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    class Odd:
        def removed(self, layer: int, depth: int, tokens: int) -> int:
            return layer % 2

    with (
        crossget.attach(clip(), crossget.CrossGET(Odd())) as attached,
        pytest.raises(TypeError, match="only Constant, Linear"),
    ):
        attached.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


# The reference's files ------------------------------------------------------------------------------------------------


def test_reference_attaches_with_its_own_r(tmp_path: Path) -> None:
    model = clip()
    attached = crossget.load_reference(model, reference_file(tmp_path / "checkpoint_best.pth"))
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": 16, "text": 0}
    assert torch.equal(2 * attached.cross_tokens["visual"], attached.cross_tokens["text"])
    run(model)


def test_reference_keeps_the_reducers_of_an_attached_model(tmp_path: Path) -> None:
    path = reference_file(tmp_path / "checkpoint_best.pth")
    model = clip()
    attached = crossget.attach(model, {"visual": crossget.CrossGET(2), "text": crossget.CrossGET(1)})
    assert crossget.load_reference(model, path) is attached
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": 2, "text": 1}
    with pytest.raises(ValueError, match="`reducer` would be ignored"):
        crossget.load_reference(model, path, crossget.CrossGET(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.proj": None}, r"missing: \['visual.proj'\]"),
        ({"transformer.cross_text": None}, r"missing: \['transformer.cross_text'\]"),
        ({"surplus": torch.ones(1)}, r"unexpected: \['surplus'\]"),
        ({"visual.proj": torch.ones(2, 2)}, r"visual.proj: \[2, 2\], expected \[64, 16\]"),
        (
            {"transformer.cross_text": torch.ones(1, 2, WIDTH)},
            r"cross_text .*\(1, 2, 64\).*\(1, 3, 64\)",
        ),
    ],
)
def test_reference_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = reference_file(tmp_path / "checkpoint_best.pth", **changes)
    model = clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        crossget.load_reference(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="is not attached"):
        crossget.attachment(model)


def test_openai_s_integers_are_no_surplus(tmp_path: Path) -> None:
    extras = {name: torch.tensor(3) for name in ("input_resolution", "context_length", "vocab_size")}
    crossget.load_reference(clip(), reference_file(tmp_path / "checkpoint_best.pth", **extras))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r'expected \{"model": state_dict\} or Dassl.* found \[\'weights\'\]'):
        crossget.load_reference(clip(), tmp_path / "other.pth")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"x": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        crossget.load_reference(clip(), tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


def test_another_activation_is_said(tmp_path: Path) -> None:
    path = reference_file(tmp_path / "checkpoint_best.pth")
    with pytest.warns(UserWarning, match="QuickGELU.* uses GELU"):
        crossget.load_reference(clip(quick_gelu=False), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crossget.load_reference(clip(), path)
