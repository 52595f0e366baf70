"""Tiny pictures in files of all kinds, and a tiny model that embeds them; Ray's processes import both by name."""

from __future__ import annotations

import io
import os
import signal
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from plain_host import Block
from torch import Tensor, nn

import crossget
from crossget.integrations import ray_data

SIZE, WIDTH, PATIENCE = 32, 32, 120.0
BROKEN = b"no picture"


class Net(nn.Module):
    """A tower of a class token and 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block(WIDTH) for _ in range(2)])
        for parameter in self.parameters():  # large weights, with which what is merged tells
            nn.init.normal_(parameter, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:].mean(1)


def net(reducer: Any) -> Net:
    """A model with the same random weights each time, attached."""
    torch.manual_seed(0)
    model = Net().eval()

    @crossget.register(Net)
    def adapter(model: Net) -> list[crossget.Tower]:
        return [crossget.Tower("visual", blocks=list(model.blocks), width=WIDTH, prefix=1, class_token=True)]

    try:
        crossget.attach(model, reducer)
    finally:
        crossget.unregister(Net)
    return model


def jpeg(number: int) -> bytes:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((SIZE, SIZE)).save(file, "JPEG")
    return file.getvalue()


@dataclass(frozen=True)
class Prepare:
    """Decodes a picture, and notes that it was asked to by Ray.

    Attributes:
        log: gets a byte for each call in another process than `driver`.
        shards: None, or the folder of the output: when 100 calls are noted and two files are committed there, the
            process `driver` is killed.
        driver: the process that calls `embed`.
    """

    log: Path
    shards: Path | None = None
    driver: int = field(default_factory=os.getpid)

    def __call__(self, content: bytes) -> Tensor:
        if os.getpid() == self.driver:
            return pixels(content)
        with self.log.open("ab") as log:
            log.write(b".")
        if self.shards is not None and self.log.stat().st_size > 100:
            wait_for(lambda: len(committed(self.shards)) > 1)
            os.kill(self.driver, signal.SIGKILL)
            time.sleep(PATIENCE)  # until Ray ends this process as well
        return pixels(content)


def pixels(content: bytes) -> Tensor:
    """A picture as [3, H, W] in -1 to 1."""
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(image.copy()).permute(2, 0, 1) / 127.5 - 1


def committed(out: Any) -> list[Path]:
    """The files that say which rows are written."""
    return [file for file in Path(out).glob("_checkpoint/*.parquet") if "pending" not in file.name]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@dataclass(frozen=True)
class Killing:
    """Calls the model when two processes do so; then one of them is killed, once.

    Attributes:
        folder: gets a file for each process.
        driver: the process that calls `embed`, which does so as well.
    """

    folder: Path
    driver: int = field(default_factory=os.getpid)

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        if os.getpid() != self.driver:
            (self.folder / str(os.getpid())).touch()
            wait_for(lambda: len(list(self.folder.iterdir())) > 1)
            try:
                (self.folder.parent / "once").rename(self.folder.parent / "done")
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return ray_data.call(model, images)


def failing(model: nn.Module, images: Tensor) -> Tensor:
    """A model that fails on more than one picture, which is what is tried out before."""
    if len(images) > 1:
        raise RuntimeError("out of luck")
    return ray_data.call(model, images)


def write_folder(folder: Path, contents: list[bytes]) -> None:
    for number, content in enumerate(contents):
        file = folder / str(number % 3) / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def write_shard(file: Path, contents: list[bytes], first: int = 0) -> None:
    """A shard of WebDataset; each picture has a text beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for number, content in enumerate(contents, first):
            for suffix, data in ((".jpg", content), (".txt", b"a picture")):
                member = tarfile.TarInfo(f"{number:04}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(file: Path, contents: list[bytes], first: int = 0, *, struct: bool = False) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": None} for content in contents] if struct else contents
    ids = list(range(first, first + len(contents)))
    parquet.write_table(pa.table({"number": ids, "photo": images, "more": ["x"] * len(ids)}), file)


if __name__ == "__main__":  # a run that is killed
    source, out, log = (Path(argument) for argument in sys.argv[1:])
    encoder = ray_data.Encoder(net(crossget.Ward(2)), Prepare(log, out))
    ray_data.embed(source, out, encoder, ray_data.Options(actors=1, batch=8, shard_rows=10, sample=0))
