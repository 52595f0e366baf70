"""Ray Data: embeddings of many images by a reduced model, on one machine or on a cluster.

`embed` reads a folder of images, Parquet files or WebDataset shards and writes Parquet. `Embedder` is the actor class
of its `map_batches`, for pipelines of your own. Ray and pyarrow are imported when a function is called:
`pip install "crossget[ray]"`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import posixpath
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.attach import find_attachment
from crossget.core.files import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGES = ("ray", "pyarrow", "pandas")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Names in the folder of the output. Readers of Parquet skip what begins with an underscore.
SHARDS, PARTS, CHECKPOINT, SETTINGS, REPORT = "shards", "_parts", "_checkpoint", "_settings.json", "_report.json"
PATH, BYTES, IMAGE, EMBEDDING, ERROR = "path", "bytes", "image", "embedding", "error"
_PIXELS, _SHAPE, _DENSE = "pixels", "shape", "dense"
_SAMPLED_FILES = 8  # Parquet files or shards that the sample is taken from
_TAR_ROWS = 64  # rows of a shard that are handed on at a time
_SPARE_CPUS = 2  # beside the actors: what is read and written, and Ray's filter of a run that goes on


def call(model: nn.Module, images: Tensor) -> Tensor:
    """What the model returns for images [B, 3, H, W]."""
    features: Tensor = model(images)
    return features


@dataclass(frozen=True)
class Encoder:
    """A model that embeds pictures. It is sent to other processes, so all parts of it can be pickled.

    Attributes:
        model: in evaluation mode. If it is attached, its copies are.
        prepare: turns the bytes of a picture's file into the model's input [3, H, W]; raises for what is no picture.
        features: (model, images [B, 3, H, W]) -> embeddings [B, C].
        title: names the model in messages and in the output.
    """

    model: nn.Module
    prepare: Callable[[bytes], Tensor]
    features: Callable[[nn.Module, Tensor], Tensor] = call
    title: str = ""

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, C] in float32, on the CPU, of images [B, 3, H, W]; they are cast and moved to the model's."""
        like = next(self.model.parameters())
        return self.features(self.model, images.to(like.device, like.dtype)).float().cpu()

    def identity(self) -> dict[str, str]:
        """What tells this encoder from another one: names, reducers, and a digest of weights and cross tokens."""
        attached = find_attachment(self.model)
        reducers = {} if attached is None else attached.reducers
        digest = hashlib.sha256()
        tensors = {**self.model.state_dict(), **({} if attached is None else attached.cross_tokens)}
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {
            "model": self.title or type(self.model).__name__,
            "method": ", ".join(f"{tower}: {reducer}" for tower, reducer in reducers.items()) or "dense",
            "weights": digest.hexdigest(),
        }


def prepare_batch(batch: pa.Table, image: str, prepare: Callable[[bytes], Tensor]) -> pa.Table:
    """Decode the pictures of a batch; a function for `map_batches` with `batch_format="pyarrow"`.

    Args:
        batch: with a column of files, each as bytes or as a struct whose field "bytes" has them.
        image: the name of that column.
        prepare: as in `Encoder`.

    Returns:
        The other columns, and three for `Embedder`: pixels (float32, as bytes) and their shape, or null, and the error.
    """
    import pyarrow as pa

    pixels, shapes, errors = [], [], []
    for file in batch[image].to_pylist():
        try:
            content = file["bytes"] if isinstance(file, Mapping) else file
            if content is None:
                raise ValueError("there are no bytes")
            tensor = prepare(content).to(torch.float32).contiguous()
        except Exception as error:  # damaged bytes raise whatever the code that they reach happens to raise
            pixels.append(None)
            shapes.append(None)
            errors.append(" ".join(str(error).split()) or type(error).__name__)
        else:
            pixels.append(tensor.numpy().tobytes())
            shapes.append(list(tensor.shape))
            errors.append(None)
    made = {
        _PIXELS: pa.array(pixels, pa.binary()),
        _SHAPE: pa.array(shapes, pa.list_(pa.int32())),
        ERROR: pa.array(errors, pa.string()),
    }
    return _with_columns(batch.drop_columns([image]), made)


class Embedder:
    """The actor class: what `prepare_batch` returns -> the same rows with a column of embeddings, null after an error.

    Args:
        encoder: an `Encoder`, or Ray's reference to one.
        device: where the model runs.
        with_dense: also embed without the reducers, into a column "dense".
    """

    def __init__(self, encoder: Any, device: str = "cpu", with_dense: bool = False) -> None:
        if not isinstance(encoder, Encoder):
            import ray

            encoder = ray.get(encoder)
        self.encoder: Encoder = encoder
        self.encoder.model.to(device).eval()
        self.with_dense = with_dense

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        rows = list(zip(batch[_PIXELS].to_pylist(), batch[_SHAPE].to_pylist(), strict=True))
        read = [torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape) for data, shape in rows if shape]
        images = torch.stack(read) if read else None

        def column() -> pa.Array:
            found = iter([] if images is None else self.encoder.embed(images).numpy())
            return pa.array([None if data is None else next(found) for data, _ in rows], pa.list_(pa.float32()))

        made = {EMBEDDING: column()}
        if self.with_dense:
            attached = find_attachment(self.encoder.model)
            with contextlib.nullcontext() if attached is None else attached.paused():
                made[_DENSE] = column()
        return _with_columns(batch.drop_columns([_PIXELS, _SHAPE]), made)


def _with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Input


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
        where = _absolute(where)
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
            names = pq.read_schema(file, filesystem=system).names
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
            return ray.data.read_parquet(self.where, columns=[self.id_column, self.image_column], partitioning=None)
        if self.kind == "images":
            suffixes = [suffix[1:] for suffix in IMAGES]
            return ray.data.read_binary_files(self.where, include_paths=True, file_extensions=suffixes)
        return ray.data.read_datasource(_tar_files(self.where))


def tar_rows(stream: Any, shard: str, count: int = _TAR_ROWS) -> Iterator[pa.Table]:
    """The images in a shard of WebDataset: at least one table, each of at most `count` rows.

    A shard that breaks off, or is no tar file, ends with a row without bytes.
    """
    rows: list[tuple[str, bytes | None]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(IMAGES):
                    opened = archive.extractfile(member)
                    rows.append((f"{shard}/{member.name}", opened.read() if opened else None))
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


def _absolute(where: str | os.PathLike[str]) -> str:
    text = os.fspath(where)
    return text if "://" in text else os.path.abspath(text)


def _filesystem(where: str) -> tuple[Any, str]:
    """pyarrow's file system of an absolute path or a URI, and the path in it."""
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(where)
    except ValueError as error:  # pyarrow's errors are ValueErrors
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


def _shards(where: str, rows: int) -> Any:
    """Where Ray writes: each file of Parquet appears under its name when it is complete.

    It grows in `PARTS`, where the files that a killed run leaves behind have the names by which Ray finds them.
    """
    import pyarrow.parquet as pq
    from ray.data.datasource import BlockBasedFileDatasink

    class Shards(BlockBasedFileDatasink):  # type: ignore[misc, unused-ignore]
        @contextlib.contextmanager
        def open_output_stream(self, path: str) -> Iterator[Any]:
            folder, name = posixpath.split(path)
            part = posixpath.join(folder, PARTS, name)
            self.filesystem.create_dir(posixpath.dirname(part), recursive=True)
            with self.filesystem.open_output_stream(part) as file:
                yield file
            self.filesystem.move(part, path)

        def write_block_to_file(self, block: Any, file: Any) -> None:
            pq.write_table(block.to_arrow(), file)

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
        elif not found.type == fs.FileType.Directory:
            raise ValueError(f"{self.where} is a file: give a new folder")
        before = self.read(SETTINGS)
        if before is None:
            if self.system.get_file_info(fs.FileSelector(self.path)):
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


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        id_column: of Parquet files: the column whose values tell the rows apart.
        image_column: of Parquet files.
        actors: processes that hold a model; None is one for each GPU of the cluster, or one for each CPU but one.
        batch: pictures of a forward.
        device: "cpu", or "cuda": each actor gets a GPU.
        shard_rows: rows that a file of the output has at least, but for the last ones.
        sample: pictures whose dense and reduced embeddings are compared; 0 leaves that out.
        address: of a Ray cluster, such as "auto" on one of its machines; None uses the Ray of this process, or starts
            one here.
    """

    id_column: str | None = None
    image_column: str = IMAGE
    actors: int | None = None
    batch: int = 32
    device: Literal["cpu", "cuda"] = "cpu"
    shard_rows: int = 4096
    sample: int = 256
    address: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("actors", 1), ("batch", 1), ("shard_rows", 1), ("sample", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: expected {least} or more")


@dataclass(frozen=True)
class Agreement:
    """Dense and reduced embeddings of the same pictures.

    Attributes:
        pictures: their number.
        cosine: mean cosine similarity of the two embeddings of a picture.
        least: the smallest one.
        neighbours: share of pictures whose nearest other picture, by cosine, is the same one with both.
    """

    pictures: int
    cosine: float
    least: float
    neighbours: float

    @classmethod
    def of(cls, dense: Tensor, reduced: Tensor) -> Agreement:
        """Compare embeddings [N, C] of N pictures, two or more."""
        similar = F.cosine_similarity(dense, reduced)
        nearest = []
        for embeddings in (dense, reduced):
            unit = F.normalize(embeddings, dim=1)
            nearest.append((unit @ unit.T).fill_diagonal_(-2).argmax(1))
        same = (nearest[0] == nearest[1]).float().mean()
        return cls(len(dense), float(similar.mean()), float(similar.min()), float(same))


@dataclass(frozen=True)
class Report:
    """What a run has done.

    Attributes:
        rows: of the output in all.
        failed: of these, rows with an error and without embedding.
        added: rows that this run wrote.
        seconds: duration of reading, embedding and writing these, with the start of the actors.
        agreement: None where it is not measured.
    """

    rows: int
    failed: int
    added: int
    seconds: float
    agreement: Agreement | None

    def __str__(self) -> str:
        lines = [f"{self.rows:,} pictures, of which {self.failed:,} could not be read: their rows have an error"]
        if self.added < self.rows:
            lines.append(f"{self.rows - self.added:,} of them were there before this run")
        if self.added:
            lines.append(f"{self.added / self.seconds:.1f} images/s, with the start of the actors")
        if (one := self.agreement) is not None:
            lines.append(
                f"dense and reduced embeddings of {one.pictures} pictures: cosine {one.cosine:.4f} on average, "
                f"{one.least:.4f} at least; the same nearest neighbour for {one.neighbours:.0%}"
            )
        return "\n".join(lines)


def require_ray() -> None:
    """Check that Ray Data can be imported.

    Raises:
        RuntimeError: it cannot.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f'embedding with Ray Data needs {", ".join(missing)}: pip install "crossget[ray]"')


def embed(
    images: str | os.PathLike[str], out: str | os.PathLike[str], encoder: Encoder, options: Options | None = None
) -> Report:
    """Embed many pictures into a folder of Parquet files.

    The columns are an id, "embedding" (float32, not normalised) and "error". The id is the path, in a shard of
    WebDataset with the member's name behind it; of Parquet files it is the column that the options name. A picture that
    cannot be read has an error and no embedding. A run that was stopped goes on when it is started again, and embeds
    nothing twice that is in a complete file; a run that was complete embeds only what is new.

    Args:
        images: a folder of images, of Parquet files or of shards of WebDataset (tar), or one such file.
        out: a new folder, or that of a run with the same settings. On a cluster, both are on storage that all of its
            machines share.
        encoder: the model.
        options: how to run.

    Raises:
        ValueError: the input, the output or the options are wrong. Nothing has been started.
        RuntimeError: Ray is not installed or the cluster too small; or the run stopped, and can be started again.
    """
    options = options or Options()
    require_ray()
    source = Source.find(images, options.id_column, options.image_column)
    output = Output(_absolute(out))
    sample = source.sample(max(options.sample, 1))
    _try_out(encoder, prepare_batch(sample, source.image_column, encoder.prepare), source.where)
    output.claim({**encoder.identity(), "images": source.where, "id": source.id_column, "image": source.image_column})
    import ray

    with _cluster(options) as actors:
        try:
            return _run(source, output, encoder, options, actors, sample)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"the run stopped, and goes on when it is started again: {reason}") from error


def _try_out(encoder: Encoder, batch: pa.Table, where: str) -> None:
    """Embed one picture here, before anything is started.

    Raises:
        ValueError: no picture of the sample can be read, or the model does not return one vector for it.
    """
    if not len(batch):
        raise ValueError(f"{where}: nothing to embed, its files have no images")
    read = [row for row, error in enumerate(batch[ERROR].to_pylist()) if error is None]
    if not read:
        raise ValueError(f"{where}: none of {len(batch)} pictures can be read; the first one: {batch[ERROR][0]}")
    shape = batch[_SHAPE][read[0]].as_py()
    made = encoder.embed(
        torch.frombuffer(bytearray(batch[_PIXELS][read[0]].as_py()), dtype=torch.float32).reshape(1, *shape)
    )
    if made.ndim != 2 or len(made) != 1:
        raise ValueError(f"the encoder returns {tuple(made.shape)} for one picture: expected [1, C]")


@contextlib.contextmanager
def _cluster(options: Options) -> Iterator[int]:
    """Connect to Ray, or start it; yields the number of actors.

    Raises:
        RuntimeError: the cluster has too few CPUs or GPUs.
    """
    import ray

    started = not ray.is_initialized()
    if started and options.address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is embedded here is nobody else's business
        cpus = max(os.cpu_count() or 1, (options.actors or 1) + _SPARE_CPUS)
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="WARNING")
    elif started:
        ray.init(options.address, logging_level="WARNING")
    try:
        yield _actors(options, ray.cluster_resources())
    finally:
        if started:
            ray.shutdown()


def _actors(options: Options, resources: Mapping[str, float]) -> int:
    """How many actors there are.

    Raises:
        RuntimeError: the cluster has too few CPUs or GPUs.
    """
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    most = min(gpus, cpus - _SPARE_CPUS) if options.device == "cuda" else cpus - _SPARE_CPUS
    actors = most if options.actors is None else options.actors
    if not 1 <= actors <= most:
        raise RuntimeError(
            f"Ray has {cpus} CPUs and {gpus} GPUs, and {max(actors, 1)} actors on {options.device} need one "
            f"{'GPU and one CPU' if options.device == 'cuda' else 'CPU'} each, and {_SPARE_CPUS} more CPUs"
        )
    return actors


def _run(source: Source, output: Output, encoder: Encoder, options: Options, actors: int, sample: pa.Table) -> Report:
    import ray
    from ray.data.checkpoint import CheckpointConfig

    reference = ray.put(encoder)
    before = output.count()[0]
    dataset = _embedded(source.read(), source, encoder, reference, options, actors)
    dataset.context.checkpoint_config = CheckpointConfig(
        source.id_column, posixpath.join(output.where, CHECKPOINT), delete_checkpoint_on_success=False
    )
    start = time.perf_counter()
    dataset.write_datasink(_shards(posixpath.join(output.where, SHARDS), options.shard_rows))
    seconds = time.perf_counter() - start
    rows, failed = output.count()
    last = output.read(REPORT)
    if rows == before and last is not None:
        agreement = last["agreement"] and Agreement(**last["agreement"])
    else:
        compared = _embedded(ray.data.from_arrow(sample), source, encoder, reference, options, 1, with_dense=True)
        agreement = _agreement(compared.take_all()) if options.sample and find_attachment(encoder.model) else None
    report = Report(rows, failed, rows - before, seconds, agreement)
    output.write(REPORT, asdict(report))
    return report


def _embedded(
    dataset: Any,
    source: Source,
    encoder: Encoder,
    reference: Any,
    options: Options,
    actors: int,
    with_dense: bool = False,
) -> Any:
    """The dataset behind both steps: pictures are decoded by tasks, and embedded by actors."""
    from ray.data import ActorPoolStrategy

    decoded = dataset.map_batches(
        prepare_batch, fn_kwargs={"image": source.image_column, "prepare": encoder.prepare},
        batch_format="pyarrow", batch_size=options.batch,
    )  # fmt: skip
    return decoded.map_batches(
        Embedder, fn_constructor_kwargs={"encoder": reference, "device": options.device, "with_dense": with_dense},
        batch_format="pyarrow", batch_size=options.batch, compute=ActorPoolStrategy(size=actors),
        num_cpus=1, num_gpus=1 if options.device == "cuda" else 0,
    )  # fmt: skip


def _agreement(rows: list[dict[str, Any]]) -> Agreement | None:
    read = [row for row in rows if row[EMBEDDING] is not None]
    if len(read) < 2:
        return None
    dense, reduced = (torch.tensor([list(row[name]) for row in read]) for name in (_DENSE, EMBEDDING))
    return Agreement.of(dense, reduced)
