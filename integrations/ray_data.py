"""Ray Data: embeddings of many images by a reduced model, on one machine or on a cluster.

`embed` reads a folder of images, Parquet files or WebDataset shards and writes Parquet. `prepare_batch` and `Embedder`
are its two steps, for pipelines of your own. Ray and pyarrow are imported when a function is called:
`pip install "crossget[ray]"`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.attach import find_attachment
from crossget.integrations.ray_files import CHECKPOINT, ERROR, IMAGE, REPORT, SHARDS, Output, Source, absolute, shards

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGES = ("ray", "pyarrow", "pandas")
EMBEDDING, DENSE = "embedding", "dense"
_PIXELS, _SHAPE = "pixels", "shape"
_SPARE_CPUS = 2  # beside the actors: for what is read and written, and for Ray's filter of a run that goes on
_TRIED = 16  # pictures at least that are read before anything is started


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

    rows = [_prepared(file, prepare) for file in batch[image].to_pylist()]
    made = {
        _PIXELS: pa.array([pixels for pixels, _, _ in rows], pa.binary()),
        _SHAPE: pa.array([shape for _, shape, _ in rows], pa.list_(pa.int32())),
        ERROR: pa.array([error for _, _, error in rows], pa.string()),
    }
    return _with_columns(batch.drop_columns([image]), made)


def _prepared(file: Any, prepare: Callable[[bytes], Tensor]) -> tuple[bytes | None, list[int] | None, str | None]:
    """Pixels, their shape, and no error; or the error alone."""
    try:
        content = file["bytes"] if isinstance(file, Mapping) else file
        if content is None:
            raise ValueError("it has no bytes")
        tensor = prepare(content).to(torch.float32).contiguous()
        return tensor.numpy().tobytes(), list(tensor.shape), None
    except Exception as error:  # damaged bytes raise whatever the code that they reach happens to raise
        return None, None, " ".join(str(error).split()) or type(error).__name__


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

        def vectors() -> list[Any]:
            """A vector for each row; None after an error, and in the place of one that is not finite."""
            found: Iterator[Any] = iter([] if images is None else self.encoder.embed(images))
            made = [None if data is None else next(found) for data, _ in rows]
            return [None if vector is None or not vector.isfinite().all() else vector.numpy() for vector in made]

        made = {EMBEDDING: vectors()}
        if self.with_dense:
            attached = find_attachment(self.encoder.model)
            with contextlib.nullcontext() if attached is None else attached.paused():
                made[DENSE] = vectors()
        errors = [
            error or (None if vector is not None else "its embedding is not finite")
            for error, vector in zip(batch[ERROR].to_pylist(), made[EMBEDDING], strict=True)
        ]
        columns = {name: pa.array(values, pa.list_(pa.float32())) for name, values in made.items()}
        return _with_columns(
            batch.drop_columns([_PIXELS, _SHAPE, ERROR]), {**columns, ERROR: pa.array(errors, pa.string())}
        )


def _with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        id_column: of Parquet files: the column whose values tell the rows apart.
        image_column: of Parquet files.
        actors: processes that hold a model; None is one for each GPU, or one for each CPU but two.
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
    output = Output(absolute(out))
    if f"{output.where}/".startswith(f"{source.where}/"):
        raise ValueError(f"{out} is in {images}, where it would be read as well: give a folder elsewhere")
    sample = prepare_batch(source.sample(max(options.sample, _TRIED)), source.image_column, encoder.prepare)
    _try_out(encoder, sample, source.where)
    output.claim({**encoder.identity(), "images": source.where, "id": source.id_column, "image": source.image_column})
    import ray

    with _cluster(options) as actors:
        try:
            return _run(source, output, encoder, options, actors, sample)
        except ray.exceptions.RayError as error:
            # The text is the other process's traceback, in which the first error is the one that led to the others.
            first = re.search(r"^[\w.]*(Error|Exception)\b.*", str(error), re.M)
            reason = first[0] if first else str(error).strip().partition("\n")[0]
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
    """Connect to Ray, or start it here; yields the number of actors.

    Raises:
        RuntimeError: the cluster has too few CPUs or GPUs.
    """
    import ray

    started = options.address is not None or not ray.is_initialized()
    if options.address is not None:
        ray.init(options.address, logging_level="WARNING")
    elif started:
        own = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count()
        cpus = max(os.cpu_count() or 1, (options.actors or own or 1) + _SPARE_CPUS)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is embedded here is nobody else's business
        ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="WARNING")
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
    dataset = _embedded(source.read(), source, encoder, reference, options, actors)
    dataset.context.checkpoint_config = CheckpointConfig(
        source.id_column, posixpath.join(output.where, CHECKPOINT), delete_checkpoint_on_success=False
    )
    start = time.perf_counter()
    sink = shards(posixpath.join(output.where, SHARDS), options.shard_rows)
    dataset.write_datasink(sink)
    seconds = time.perf_counter() - start
    output.tidy()
    rows, failed = output.count()
    last = output.read(REPORT)
    if sink.written == 0 and last is not None:
        agreement = last["agreement"] and Agreement(**last["agreement"])
    else:
        agreement = _agreement(encoder, reference, sample, options) if options.sample else None
    report = Report(rows, failed, sink.written, seconds, agreement)
    output.write(REPORT, asdict(report))
    return report


def _embedded(dataset: Any, source: Source, encoder: Encoder, reference: Any, options: Options, actors: int) -> Any:
    """The dataset behind both steps: pictures are decoded by tasks, and embedded by actors."""
    from ray.data import ActorPoolStrategy

    decoded = dataset.map_batches(
        prepare_batch, fn_kwargs={"image": source.image_column, "prepare": encoder.prepare},
        batch_format="pyarrow", batch_size=options.batch,
    )  # fmt: skip
    return decoded.map_batches(
        Embedder, fn_constructor_kwargs={"encoder": reference, "device": options.device},
        batch_format="pyarrow", batch_size=options.batch, compute=ActorPoolStrategy(size=actors),
        num_cpus=1, num_gpus=_gpus(options),
    )  # fmt: skip


def _gpus(options: Options) -> int:
    return 1 if options.device == "cuda" else 0


def _agreement(encoder: Encoder, reference: Any, sample: pa.Table, options: Options) -> Agreement | None:
    """Dense and reduced embeddings of prepared pictures: computed here, or on a GPU of the cluster."""
    if find_attachment(encoder.model) is None:
        return None
    if options.device == "cuda":
        import ray

        made = ray.get(ray.remote(num_gpus=1)(_both).remote(reference, sample, options))
    else:
        made = _both(encoder, sample, options)
    dense, reduced = made
    return Agreement.of(dense, reduced) if len(dense) > 1 else None


def _both(encoder: Encoder, sample: pa.Table, options: Options) -> tuple[Tensor, Tensor]:
    """Dense and reduced embeddings [N, C] of the pictures of a sample that can be read."""
    import pyarrow as pa

    embedder = Embedder(encoder, options.device, with_dense=True)
    read = sample.filter(sample[ERROR].is_null())
    parts = [embedder(read.slice(start, options.batch)) for start in range(0, len(read), options.batch)]
    table = pa.concat_tables(parts).select([DENSE, EMBEDDING]).drop_null()
    return torch.tensor(table[DENSE].to_pylist()), torch.tensor(table[EMBEDDING].to_pylist())
