"""Saving, loading, and the reference's CLIP files. The values they give are tested in test_reference_clip.py."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    {
        "visual": crossget.ToMe(crossget.Aligned((3, 2, 1), 4)),
        "text": crossget.Ward(crossget.Aligned(crossget.Ratio(0.2), 2)),
    },
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


def edit(folder: Path, text: str | None = None, **changes: Any) -> None:
    """Of the settings in the file; `text` replaces all of them."""
    path = folder / "crossget.safetensors"
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["crossget"])
    save_file(load_file(path), path, {"crossget": json.dumps({**config, **changes}) if text is None else text})


def retoken(value: Tensor) -> Callable[[Path], None]:
    """Of the image tower."""

    def change(folder: Path) -> None:
        path = folder / "crossget.safetensors"
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        save_file({**load_file(path), "visual": value}, path, metadata)

    return change


def visual(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, towers={"visual": {"method": "CrossGET", "r": 3, **fields}})


def cut(folder: Path) -> None:
    path = folder / "crossget.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def fifo(folder: Path) -> None:
    (folder / "crossget.safetensors").unlink()
    os.mkfifo(folder / "crossget.safetensors")


# What is wrong -> the change, the error, and a part of its message. All but the first name the file.
WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no file": (
        lambda folder: (folder / "crossget.safetensors").unlink(),
        FileNotFoundError,
        "has no crossget.safetensors",
    ),
    "a FIFO": (fifo, FileNotFoundError, "has no crossget.safetensors"),
    "truncated": (cut, ValueError, "truncated"),
    "no settings": (
        lambda folder: save_file({"visual": torch.ones(LAYERS, WIDTH)}, folder / "crossget.safetensors"),
        ValueError,
        "has no metadata 'crossget'",
    ),
    "no JSON": (lambda folder: edit(folder, "{"), ValueError, "is not JSON"),
    "a list": (lambda folder: edit(folder, "[1]"), ValueError, "contains a list"),
    "deep JSON": (lambda folder: edit(folder, "[" * 100_000), ValueError, "is not JSON"),
    "another version": (lambda folder: edit(folder, version=2), ValueError, "has version 2: this crossget reads 1"),
    "towers in a list": (lambda folder: edit(folder, towers=["visual"]), ValueError, "towers is ['visual']"),
    "an unknown method": (visual(method="Magic"), ValueError, "method 'Magic' is not known"),
    "a method of another type": (visual(method=["ToMe"]), ValueError, "method ['ToMe'] is not known"),
    "another tower": (
        lambda folder: edit(folder, towers={"sound": {"method": "ToMe", "r": 3}}),
        ValueError,
        "names the towers ['sound']",
    ),
    "a tower less": (visual(), ValueError, "this attachment needs"),
    "text for a truth value": (visual(guided_matching="false"), ValueError, "guided_matching of CrossGET is 'false'"),
    "a number for a truth value": (visual(cross_token=1), ValueError, "cross_token of CrossGET is 1: expected bool"),
    "an unknown field": (visual(magic=1), ValueError, "CrossGET has no fields ['magic']"),
    "an unknown choice": (visual(ties="best"), ValueError, "'best'"),
    "a choice of an older version": (
        visual(importance="text"),
        ValueError,
        "importance of CrossGET is 'text': expected 'cross_token', 'attention', 'class_token'",
    ),
    "no r": (lambda folder: edit(folder, towers={"visual": {"method": "ToMe"}}), ValueError, "ToMe has no r"),
    "a fraction for r": (visual(r=2.5), ValueError, "r is 2.5"),
    "a negative r": (visual(r=-1), ValueError, "cannot be negative"),
    "an unknown schedule": (visual(r={"schedule": "Magic"}), ValueError, "r is {'schedule': 'Magic'}"),
    "a schedule of text": (visual(r={"schedule": "Linear", "start": "3"}), ValueError, "start of Linear is '3'"),
    "a schedule without its numbers": (visual(r={"schedule": "Ratio"}), ValueError, "share"),
    "another shape": (retoken(torch.ones(1, WIDTH)), ValueError, "this attachment needs"),
    "NaN": (retoken(torch.full((LAYERS, WIDTH), torch.nan)), ValueError, "visual is not finite"),
    "integers": (retoken(torch.ones(LAYERS, WIDTH, dtype=torch.int32)), ValueError, "not floating-point"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, wrong: str) -> None:
    break_it, error, message = WRONG[wrong]
    with crossget.attach(clip(), crossget.CrossGET(3)) as attached:
        attached.save(tmp_path)
    break_it(tmp_path)
    model = clip()
    with pytest.raises(error, match=re.escape(message)) as refused:
        crossget.load(model, tmp_path)
    assert str(tmp_path) in str(refused.value)
    with pytest.raises(ValueError, match="is not attached"):
        crossget.attachment(model)


def test_an_attached_model_is_refused_and_stays_attached(tmp_path: Path) -> None:
    model = clip()
    attached = crossget.attach(model, crossget.CrossGET(3))
    attached.save(tmp_path)
    with pytest.raises(ValueError, match="already attached"):
        crossget.load(model, tmp_path)
    assert crossget.attachment(model) is attached


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_stops_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with crossget.attach(clip(), crossget.CrossGET(3)) as attached:
        attached.save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        attached.reducer = {"visual": crossget.CrossGET(1), "text": crossget.CrossGET(1)}

        def stop(*_: Any) -> None:
            raise error

        monkeypatch.setattr("crossget.core.files.os.fsync", stop)
        with pytest.raises(type(error)):
            attached.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_neither_folder_nor_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match="folder.*id of a hub repository"):
        crossget.load(clip(), "/no/such/folder")


def test_the_file_in_place_of_its_folder(tmp_path: Path) -> None:
    with crossget.attach(clip(), crossget.CrossGET(3)) as attached:
        attached.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder: give the folder"):
        crossget.load(clip(), tmp_path / "crossget.safetensors")


def test_a_schedule_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    class Odd:
        def removed(self, layer: int, depth: int, tokens: int) -> int:
            return layer % 2

    with (
        crossget.attach(clip(), crossget.CrossGET(Odd())) as attached,
        pytest.raises(TypeError, match="only Aligned, Constant, Keep, Linear"),
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


def test_reference_into_registered_parameters(tmp_path: Path) -> None:
    model = clip()
    attached = crossget.attach(model, crossget.CrossGET(2))
    attached.register_parameters(model)
    assert crossget.load_reference(model, reference_file(tmp_path / "checkpoint_best.pth")) is attached
    state = model.state_dict()
    assert torch.equal(2 * state["crossget.visual"], state["crossget.text"])
    assert (state["crossget.visual"] != 0).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.proj": None}, r"missing: \['visual.proj'\]"),
        ({"transformer.cross_text": None}, r"missing: \['transformer.cross_text'\]"),
        ({"visual.proj": torch.full((64, 16), torch.nan)}, "visual.proj is not finite"),
        ({"visual.proj": torch.ones(64, 16).to_sparse()}, "visual.proj is sparse"),
        ({"visual.proj": torch.ones(64, 16, device="meta")}, "visual.proj is on the meta device"),
        ({"visual.proj": torch.ones(64, 16, dtype=torch.int8)}, "visual.proj is torch.int8, not floating-point"),
        ({"transformer.cross_text": torch.full((1, LAYERS, WIDTH), torch.inf)}, "cross_text is not finite"),
        ({"visual.proj": 3}, r"entries that are not tensors: \['visual.proj'\]"),
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


def test_a_model_without_numbers_is_refused(tmp_path: Path) -> None:
    path = reference_file(tmp_path / "checkpoint_best.pth")
    with pytest.raises(ValueError, match=r"weights on the meta device.*before the model is offloaded"):
        crossget.load_reference(clip().to("meta"), path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x80", b"PK\x03\x04", b"\x80\x02]q\x00.", b"root:x:0:0\n"])
def test_bytes_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a torch file"):
        crossget.load_reference(clip(), path)


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
