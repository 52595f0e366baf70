"""What Ray Data reads and writes here: pictures in folders, Parquet files and shards; embeddings in Parquet files.

Ray and pyarrow are imported when a function is called.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crossget.core.files import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Names in the folder of the output. Readers of Parquet skip what begins with an underscore.
SHARDS, CHECKPOINT, SETTINGS, REPORT = "shards", "_checkpoint", "_settings.json", "_report.json"
PATH, BYTES, IMAGE, ERROR = "path", "bytes", "image", "error"
_PARTS = "_parts"
_SAMPLED_FILES = 8  # Parquet files or shards that the sample is taken from
_TAR_ROWS = 64  # rows of a shard that are handed on at a time


@dataclass(frozen=True)
class Source:
    """Pictures to read.

    Attributes:
        kind: "images" is a folder of files, "webdataset" of tar files.
        where: a folder or a file: an absolute path, or a URI that pyarrow knows.
        files: what there is to read, sorted.
        id_column: a column whose values tell the rows apart.
        image_column: of the files' bytes.
    """

    kind: Literal["images", "parquet", "webdataset"]
    where: str
    files: tuple[str, ...] = field(repr=False)
    id_column: str
    image_column: str

    @classmethod
    def find(cls, where: str | os.PathLike[str], id_column: str | None = None, image_column: str = IMAGE) -> Source:
        """Look for pictures.

        Args:
            where: a folder, or one Parquet or tar file.
            id_column: of Parquet files.
            image_column: of Parquet files.

        Raises:
            ValueError: there are none, or files of several kinds; a column is missing, or the ids are not unique.
        """
        where = absolute(where)
        system, path = _filesystem(where)
        kinds: dict[str, list[str]] = {}
        for file in _files(system, path):
            if kind := _kind(file):
                kinds.setdefault(kind, []).append(file)
        if not kinds:
            raise ValueError(f"{where}: nothing to embed; looked for .parquet, .tar, {', '.join(IMAGES)}")
        if len(kinds) > 1:
            raise ValueError(
                f"{where} has files of several kinds, {', '.join(sorted(kinds))}: give a folder of one kind"
            )
        ((kind, files),) = kinds.items()
        if kind != "parquet":
            if id_column is not None:
                raise ValueError(f"an id column is of Parquet files, and {where} has {kind}: their paths are the ids")
            return cls(kind, where, tuple(files), PATH, BYTES)  # type: ignore[arg-type]
        if id_column is None:
            raise ValueError(f"{where} has Parquet files: name the column whose values tell their rows apart")
        source = cls("parquet", where, tuple(files), id_column, image_column)
        source._check_columns(system)
        return source

    def _check_columns(self, system: Any) -> None:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        for file in self.files:
            try:
                names = pq.read_schema(file, filesystem=system).names
            except ValueError as error:  # pyarrow's errors are ValueErrors, and not all of them name the file
                raise ValueError(f"{file} is not a Parquet file, or is truncated: {error}") from error
            missing = [name for name in (self.id_column, self.image_column) if name not in names]
            if missing:
                raise ValueError(f"{file} has no column {missing[0]!r}, only {', '.join(names)}")
        ids = pq.read_table(list(self.files), columns=[self.id_column], filesystem=system)[self.id_column]
        if ids.null_count or pc.count_distinct(ids).as_py() < len(ids):
            raise ValueError(f"the column {self.id_column!r} has nulls or a value twice: it cannot tell the rows apart")

    def sample(self, count: int) -> pa.Table:
        """Up to `count` rows, id and image, of files that lie evenly among all."""
        import pyarrow as pa

        system, _ = _filesystem(self.where)
        most = count if self.kind == "images" else min(count, _SAMPLED_FILES)
        chosen = [self.files[i * len(self.files) // most] for i in range(min(most, len(self.files)))]
        if len(chosen) < most:
            chosen = list(self.files)
        share = -(-count // len(chosen))
        return pa.concat_tables([self._first_rows(system, file, share) for file in chosen]).slice(0, count)

    def _first_rows(self, system: Any, file: str, count: int) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.kind == "parquet":
            columns = [self.id_column, self.image_column]
            with pq.ParquetFile(file, filesystem=system) as opened:
                schema = pa.schema([opened.schema_arrow.field(name) for name in columns])
                first = next(opened.iter_batches(count, columns=columns), None)
                return pa.Table.from_batches([] if first is None else [first.select(columns)], schema)
        with system.open_input_stream(file) as stream:
            if self.kind == "images":
                return _table([(file, stream.readall())])
            return next(tar_rows(stream, file, count))

    def read(self) -> Any:
        """A dataset of Ray Data with two columns, id and image."""
        import ray.data

        if self.kind == "parquet":
            rows = ray.data.read_parquet(self.where, partitioning=None)
            return rows.select_columns([self.id_column, self.image_column])
        if self.kind == "images":
            suffixes = [suffix[1:] for suffix in IMAGES]
            return ray.data.read_binary_files(self.where, include_paths=True, file_extensions=suffixes)
        return ray.data.read_datasource(_tar_files(self.where))


def tar_rows(stream: Any, shard: str, count: int = _TAR_ROWS) -> Iterator[pa.Table]:
    """The images in a shard of WebDataset: at least one table, each of at most `count` rows.

    A shard that breaks off, or is no tar file, ends with a row without bytes.
    """
    rows: list[tuple[str, bytes | None]] = []
    seen = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if not member.isfile() or not member.name.lower().endswith(IMAGES):
                    continue
                path = f"{shard}/{member.name}" + (f" at {member.offset}" if member.name in seen else "")
                seen.add(member.name)
                opened = archive.extractfile(member)
                rows.append((path, opened.read() if opened else None))
                if len(rows) == count:
                    yield _table(rows)
                    rows = []
    except tarfile.TarError as error:
        rows.append((f"{shard}: {error}", None))
    yield _table(rows)


def _table(rows: list[tuple[str, bytes | None]]) -> pa.Table:
    import pyarrow as pa

    return pa.table({
        PATH: pa.array([path for path, _ in rows], pa.string()),
        BYTES: pa.array([content for _, content in rows], pa.binary()),
    })  # fmt: skip


def _tar_files(where: str) -> Any:
    """Ray's source of a dataset: its own one for WebDataset makes blocks of pandas, which its checkpoints refuse."""
    from ray.data.datasource import FileBasedDatasource

    class TarFiles(FileBasedDatasource):  # type: ignore[misc, unused-ignore]
        def _read_stream(self, stream: Any, path: str) -> Iterator[pa.Table]:
            yield from tar_rows(stream, path)

    return TarFiles(where, file_extensions=["tar"])


def absolute(where: str | os.PathLike[str]) -> str:
    """A path that other processes understand: absolute, or a URI as it is."""
    text = os.fspath(where)
    return text if "://" in text else Path(text).absolute().as_posix()


def _filesystem(where: str) -> tuple[Any, str]:
    """pyarrow's file system of an absolute path or a URI, and the path in it."""
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(where)
    except ValueError as error:
        raise ValueError(f"{where} is neither a path nor a URI that pyarrow knows: {error}") from error
    return system, path


def _files(system: Any, path: str) -> list[str]:
    """The files that Ray would read there, sorted.

    Raises:
        ValueError: there is no such file or folder.
    """
    from pyarrow import fs

    found = system.get_file_info(path)
    if found.type == fs.FileType.NotFound:
        raise ValueError(f"there is no file or folder {path}")
    if found.is_file:
        return [path]
    inside = [info.path for info in system.get_file_info(fs.FileSelector(path, recursive=True)) if info.is_file]
    return sorted(file for file in inside if not posixpath.relpath(file, path).startswith((".", "_")))


def _kind(file: str) -> str | None:
    suffix = posixpath.splitext(file)[1].lower()
    return {".parquet": "parquet", ".tar": "webdataset"}.get(suffix, "images" if suffix in IMAGES else None)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def shards(where: str, rows: int) -> Any:
    """Where Ray writes: each file of Parquet appears under its name when it is complete.

    It grows in `_PARTS`, where the files that a killed run leaves behind have the names by which Ray finds them. In the
    end `written` is the number of rows.
    """
    import pyarrow.parquet as pq
    from ray.data.datasource import BlockBasedFileDatasink

    class Shards(BlockBasedFileDatasink):  # type: ignore[misc, unused-ignore]
        written = 0

        @contextlib.contextmanager
        def open_output_stream(self, path: str) -> Iterator[Any]:
            folder, name = posixpath.split(path)
            part = posixpath.join(folder, _PARTS, name)
            self.filesystem.create_dir(posixpath.dirname(part), recursive=True)
            with self.filesystem.open_output_stream(part) as file:
                yield file
            self.filesystem.move(part, path)

        def write_block_to_file(self, block: Any, file: Any) -> None:
            pq.write_table(block.to_arrow(), file)

        def on_write_complete(self, write_result: Any) -> None:
            super().on_write_complete(write_result)
            self.written = int(write_result.num_rows)

    return Shards(where, min_rows_per_file=rows, file_format="parquet")


class Output:
    """The folder that is written: the embeddings, what made them, and how far Ray has come.

    Args:
        where: an absolute path, or a URI that pyarrow knows.
    """

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self.system, self.path = _filesystem(self.where)

    def claim(self, settings: Mapping[str, str]) -> None:
        """Check that the folder is new, or of a run with the same settings, and note these in it.

        Raises:
            ValueError: something else is there.
        """
        from pyarrow import fs

        found = self.system.get_file_info(self.path)
        if found.type == fs.FileType.NotFound:
            self.system.create_dir(self.path, recursive=True)
        elif found.type != fs.FileType.Directory:
            raise ValueError(f"{self.where} is a file: give a new folder")
        before = self.read(SETTINGS)
        if before is None:
            if any(not info.path.endswith(".part") for info in self.system.get_file_info(fs.FileSelector(self.path))):
                raise ValueError(f"{self.where} has files, and crossget did not write them: give a new folder")
            self.write(SETTINGS, settings)
            return
        other = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
        if other:
            told = "; ".join(f"{name} was {before.get(name)}, and is {settings.get(name)}" for name in other)
            raise ValueError(f"{self.where} has embeddings with other settings: {told}. Give a new folder")

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON file of that name; None if there is none."""
        from pyarrow import fs

        path = posixpath.join(self.path, name)
        if self.system.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with self.system.open_input_stream(path) as file:
            content: dict[str, Any] = parse_json(file.readall(), f"{self.where}/{name}")
        return content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        part = posixpath.join(self.path, f"_{name}.part")
        with self.system.open_output_stream(part) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
        self.system.move(part, posixpath.join(self.path, name))

    def tidy(self) -> None:
        """Remove the folder of unfinished files, which a complete run has emptied."""
        from pyarrow import fs

        parts = posixpath.join(self.path, SHARDS, _PARTS)
        if self.system.get_file_info(parts).type != fs.FileType.NotFound:
            self.system.delete_dir(parts)

    def count(self) -> tuple[int, int]:
        """How many rows are written, and how many of them have no embedding."""
        import pyarrow.dataset as ds
        from pyarrow import fs

        shards = posixpath.join(self.path, SHARDS)
        if self.system.get_file_info(shards).type == fs.FileType.NotFound:
            return 0, 0
        rows = ds.dataset(shards, filesystem=self.system, format="parquet")
        if not rows.files:
            return 0, 0
        return rows.count_rows(), rows.count_rows(filter=ds.field(ERROR).is_valid())
