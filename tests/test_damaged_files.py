"""Every file that can be read, damaged in many ways: a documented error that names it, and nothing half changed."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import crossget
from crossget import cli
from crossget.demo.backbones import make
from crossget.demo.compare import load_photograph

pytest.importorskip("open_clip")
pytest.importorskip("timm")

from original_llava import write_original
from test_convert import dense
from test_saving import clip, reference_file

pytestmark = pytest.mark.slow

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "false", "..", "\ud800",
    [], [1], ["x"], {}, {"x": 1},
)  # fmt: skip


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut off, put in, left out, doubled, or replaced by zeros."""
    at, size = dice.randrange(len(content) + 1), dice.choice([1, 4, 64, 4096])
    kind = dice.randrange(8)
    if kind <= 2:  # most of them near the beginning or the end, where the formats have their tables
        changed = bytearray(content)
        for _ in range(dice.choice([1, 3, 20])):
            near = dice.choice([len(changed), min(len(changed), 300)])
            place = dice.randrange(near) if near else 0
            changed[dice.choice([place, -place])] ^= dice.choice([1, 0x80, dice.randrange(1, 256)])
        return bytes(changed)
    return [
        content[:at],
        content[:at] + content[at + size :],
        content[:at] + dice.randbytes(size) + content[at:],
        content[:at] + bytes(len(content[at : at + size])) + content[at + size :],
        content + content,
    ][kind - 3]


def edited(content: bytes, dice: random.Random) -> bytes:
    """A JSON file with one value replaced or removed."""
    whole = json.loads(content)
    holder, keys = whole, list(whole)
    while True:
        key = dice.choice(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or dice.random() < 0.3:
            break
        holder, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    if isinstance(holder, dict) and dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = dice.choice(VALUES)
    return json.dumps(whole).encode()


def variants(path: Path, count: int) -> Iterator[None]:
    """Damage a file in `count` ways, one after the other; in the end it is whole again."""
    good, dice = path.read_bytes(), random.Random(f"{path.name} {count}")
    try:
        for i in range(count):
            structured = path.suffix == ".json" and i % 2
            path.write_bytes((edited if structured else damaged)(good, dice))
            yield
    finally:
        path.write_bytes(good)


@contextlib.contextmanager
def documented(folder: Path, refused: list[str]) -> Iterator[None]:
    """Errors are of a documented type, and name a file in the folder."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError) or str(folder) not in str(error):
            raise
        refused.append(str(error))


def attack(model: nn.Module, load: Callable[[], Any], path: Path, count: int) -> list[str]:
    """Load damaged files into a model; it stays what it was where that is refused."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused: list[str] = []
    for _ in variants(path, count):
        told = len(refused)
        with documented(path.parent, refused):
            load().detach()
        if len(refused) > told:
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), (name, refused[-1])
            with pytest.raises(ValueError, match="is not attached"):
                crossget.attachment(model)
        else:
            model.load_state_dict(before)
    return refused


def test_saved_attachments(tmp_path: Path) -> None:
    model = clip()
    with crossget.attach(
        model, {"visual": crossget.CrossGET(crossget.Linear(2, 0)), "text": crossget.CrossGET(1)}
    ) as it:
        it.save(tmp_path)
    refused = attack(model, lambda: crossget.load(model, tmp_path), tmp_path / "crossget.safetensors", 600)
    assert len(refused) > 300


@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_of_a_clip(old: bool, tmp_path: Path) -> None:
    path, model = reference_file(tmp_path / "checkpoint_best.pth"), clip()
    if old:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    refused = attack(model, lambda: crossget.load_reference(model, path), path, 150)
    assert len(refused) > 50


LLAVA = ("config.json", "pytorch_model.bin.index.json", "cross_tokens.bin", "pytorch_model-00002-of-00003.bin")
TOKENIZER = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("name", LLAVA)
def test_checkpoints_of_a_llava(name: str, tmp_path: Path) -> None:
    folder, model = write_original(tmp_path / "original"), dense()
    refused = attack(model, lambda: crossget.load_reference(model, folder), folder / name, 40)
    assert len(refused) > 10


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_folders_to_convert(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = write_original(tmp_path / "original", tokenizer=True, kind=kind), tmp_path / "out"
    assert cli.main(["convert", str(folder), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    names = LLAVA if kind == "bin" else ("model.safetensors.index.json", "model-00002-of-00003.safetensors")
    names += TOKENIZER if kind == "bin" else ()
    paths = [folder / name for name in names if (folder / name).exists()]  # transformers 5 writes fewer files
    paths += [tmp_path / "clip" / "config.json", out / "crossget_manifest.json"]
    codes: list[int] = []
    for path in paths:
        for _ in variants(path, 30):
            capfd.readouterr()
            codes.append(cli.main(["convert", str(folder), str(out), "--overwrite"]))
            told = capfd.readouterr()
            assert "Traceback" not in told.err
            if codes[-1] == 2:
                assert str(tmp_path) in told.err, told.err
                assert told.out == ""
                changed = {item.name: item.read_bytes() for item in out.iterdir()}
                assert changed.keys() == before.keys()
                assert all(changed[n] == content for n, content in before.items() if n != "crossget_manifest.json")
            else:
                assert codes[-1] == 0
                shutil.rmtree(out)
                out.mkdir()
                for name, content in before.items():
                    (out / name).write_bytes(content)
    assert set(codes) == {0, 2}
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_to_show(suffix: str, tmp_path: Path) -> None:
    weights, path = make("test_vit", pretrained="none").model.state_dict(), tmp_path / f"w.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    refused: list[str] = []
    for _ in variants(path, 60):
        with documented(tmp_path, refused):
            make("test_vit", checkpoint=path)
    assert len(refused) > 20


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.gif", "a.bmp"])
def test_photographs(name: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / name, **({} if name in ("a.gif", "a.bmp") else {"exif": exif}))
    refused: list[str] = []
    for _ in variants(tmp_path / name, 150):
        with documented(tmp_path, refused):
            assert load_photograph(tmp_path / name).image.mode == "RGB"
    assert len(refused) > 10
