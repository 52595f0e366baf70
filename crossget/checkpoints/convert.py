"""Convert the authors' LLaVA checkpoint to a folder that transformers and `crossget.load` read.

The keys are those of the repositories llava-hf/llava-1.5-*-hf, which every version of transformers loads. Weights are
copied in pieces: one memory-mapped input file and a few megabytes are in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from crossget.checkpoints import llava_format, processor
from crossget.checkpoints.hf_sizes import PRESETS, import_transformers
from crossget.checkpoints.llava_format import TOWER, VOCABULARY, LlavaFolder, Shape, StoredTensor
from crossget.core import files, saving
from crossget.core.attach import attach
from crossget.methods.reducers import CrossGET, Reducer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Prefixes of the original's keys -> those of transformers; the first that matches is taken, so the longest come first.
_RENAMED = {
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_INDEX, _MANIFEST = "model.safetensors.index.json", "crossget_manifest.json"
_VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_channels", "projection_dim", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_TOWER_FILES = ("model.safetensors", "pytorch_model.bin")
_VOCABULARY_MULTIPLE = 64  # the number of embeddings is a multiple of this, as in llava-hf's repositories
_PIECE = 2**20  # elements that are converted at a time


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the new folder.

    Attributes:
        name: its key in the new folder.
        source: the tensor that it is copied from.
        shape: its shape; rows that the source lacks are the mean of the source's rows.
        dtype: its dtype.
    """

    name: str
    source: StoredTensor
    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ImageTower:
    """The image tower of the new model.

    Attributes:
        vision: its configuration.
        folder: the folder that the configuration comes from; None if the original's config.json names a published CLIP.
        stored: its weights under the original's keys; empty if they are inside the original's folder.
    """

    vision: dict[str, Any]
    folder: Path | None
    stored: dict[str, StoredTensor]


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion writes, determined before any weight is read.

    Attributes:
        source: the folder to convert.
        tower: the image tower of the new model.
        vocabulary: the new tokens and the tokenizer.
        config: config.json of the new model.
        files: the tensors of each weight file.
        generation: generation_config.json of the new model.
        reducers: by tower; empty for a conversion without cross tokens.
        dtype: of everything that is written; None keeps the source's.
    """

    source: LlavaFolder
    tower: ImageTower
    vocabulary: processor.Vocabulary
    config: dict[str, Any]
    files: dict[str, list[OutputTensor]]
    generation: dict[str, Any]
    reducers: Mapping[str, Reducer]
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        """The size of all weights."""
        return sum(tensor.bytes for file in self.files.values() for tensor in file)

    @property
    def names(self) -> list[str]:
        """All files that are written."""
        return sorted(
            [
                *self.files, *([_INDEX] if len(self.files) > 1 else []), *([saving.FILE] if self.reducers else []),
                *(processor.names(self.vocabulary, self.source.folder)), "generation_config.json", "config.json",
            ]
        )  # fmt: skip


def convert(
    folder: Path,
    out: Path,
    *,
    r: Any = 13,
    vision_tower: str | None = None,
    max_shard_size: int | str = "4GB",
    dtype: torch.dtype | None = None,
    cross_tokens: bool = True,
    overwrite: bool = False,
) -> str:
    """Convert a folder in LLaVA's original layout.

    The vocabulary grows by <image> and <pad>, and then up to the next multiple of 64. The new rows of the embeddings
    and of the head are the mean of the old rows; transformers' own conversion samples them around that mean. The new
    embeddings are never used: image features replace those of <image>, and padding is masked. A new row of the head
    gives the mean of the old logits, which is below their maximum, so greedy decoding never picks a new token.

    Args:
        folder: LLaVA's folder; LoRA has to be merged.
        out: the new folder, for `LlavaForConditionalGeneration.from_pretrained` and `crossget.load`.
        r: of CrossGET in the image tower.
        vision_tower: a CLIP in transformers' layout (a folder or an id on the hub), for a folder without image tower.
            If the folder has the weights of a tower, they are used, with this configuration.
        max_shard_size: bytes per weight file, or a text such as "500MB"; a larger tensor gets a file of its own.
        dtype: of the new weights; None keeps the source's.
        cross_tokens: a folder without cross tokens is an error. False converts the dense model alone.
        overwrite: write into a folder that is not empty, and replace the files of an earlier conversion, which its
            crossget_manifest.json lists. Other files stay. The old files are there until the new ones are complete, so
            the disk has to hold both.

    Returns:
        A summary for the user, in a few lines.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the content is wrong (the message names what), `out` is not empty, or a file of another origin is in
            the way. `out` stays as it was then.
        RuntimeError: a package is missing.
    """
    _check_out(out, overwrite)
    plan = plan_conversion(folder, r, vision_tower, max_shard_size, dtype, cross_tokens)
    if out.resolve() in [source.resolve() for source in (folder, plan.tower.folder) if source is not None]:
        raise ValueError(f"{out} is one of the folders to read from: give another one for the result")
    written = _check_names(plan, out)
    with files.replacing_folder(out, drop=written) as part:
        _write(plan, part)
        _verify(plan, part)
    return _summary(plan, out)


def plan_conversion(
    folder: Path,
    r: Any = 13,
    vision_tower: str | None = None,
    max_shard_size: int | str = "4GB",
    dtype: torch.dtype | None = None,
    cross_tokens: bool = True,
) -> ConversionPlan:
    """Check everything and determine what `convert` writes; arguments and errors are those of `convert`."""
    source = llava_format.inspect_folder(folder)
    if cross_tokens:
        source.require_cross_tokens(" --no-cross-tokens converts it as one")
    tower = _image_tower(source, vision_tower)
    stored = {**source.stored, **tower.stored}
    rows = source.text["vocab_size"]
    vocabulary = processor.load_vocabulary(folder, rows)
    config = _config(source, tower.vision, vocabulary, dtype)
    generation = _generation(source, vocabulary)
    source.check_layer(tower.vision["num_hidden_layers"])
    model = _on_meta(config, source, len(stored))
    shapes = {name: tuple(value.shape) for name, value in llava_format.parameters(model).items()}
    expected = {name: (rows, *shape[1:]) if name in VOCABULARY else shape for name, shape in shapes.items()}
    sizes = {name: tensor.shape for name, tensor in stored.items()}
    llava_format.check_shapes(expected, sizes, str(folder), "what its config.json says", "written")
    reducers: Mapping[str, Reducer] = {}
    if cross_tokens:
        attached = attach(model, CrossGET(r=r))
        towers = {name: tuple(p.shape) for name, p in attached.cross_tokens.items()}
        llava_format.check_cross_tokens(source.cross, towers)
        reducers = attached.reducers
    # An image tower from another folder is written in the dtype of the language model.
    dtypes = dict.fromkeys(tower.stored, source.dtype)
    outputs = [
        OutputTensor(_new_name(name), tensor, shapes[name], dtype or dtypes.get(name, tensor.dtype))
        for name, tensor in stored.items()
    ]
    return ConversionPlan(
        source, tower, vocabulary, config, _shards(outputs, max_shard_size), generation, reducers, dtype
    )


# The image tower -----------------------------------------------------------------------------------------------------


def _image_tower(source: LlavaFolder, given: str | None) -> ImageTower:
    name = given or source.config.get("mm_vision_tower")
    published = str(name).rstrip("/").rpartition("/")[2]
    if source.has_tower and given is None and published in PRESETS and not Path(str(name)).is_dir():
        return ImageTower(_vision(PRESETS[published].config().vision_config), None, {})
    folder = _tower_folder(name, None if given else source.folder, weights=not source.has_tower)
    vision = _load_vision(folder, None if given else source.folder)
    if source.has_tower:
        return ImageTower(vision, folder, {})
    stored = llava_format.list_weights(folder)
    prefix = "vision_model."
    if any(key.startswith(prefix) for key in stored):  # a whole CLIP, or a tower saved before transformers 5
        stored = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    return ImageTower(vision, folder, {TOWER + key: tensor for key, tensor in stored.items()})


def _tower_folder(name: Any, source: Path | None, weights: bool) -> Path:
    """A local folder, or the hub's cache with the files in it.

    Args:
        name: the folder, or the id of the repository.
        source: the folder whose config.json has the name; None: the user gave it.
        weights: whether weights are needed.

    Raises:
        FileNotFoundError: there is neither.
    """
    name = str(name)
    if Path(name).is_dir():
        return Path(name)
    hub = _import_hub()
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        folder = Path(hub.hf_hub_download(name, "config.json")).parent
        for file in _TOWER_FILES if weights else ():
            with contextlib.suppress(EntryNotFoundError):
                hub.hf_hub_download(name, file)
                break
        else:
            if weights:
                raise EntryNotFoundError(f"no {' and no '.join(_TOWER_FILES)}")
        return folder
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError) as error:
        origin = "--vision-tower"
        if source is not None:
            why = "has no vision tower inside" if weights else "has one inside and does not say how it is built"
            origin = f"mm_vision_tower of {source / 'config.json'}; the folder {why}"
        raise FileNotFoundError(
            f"{name!r} ({origin}) is neither a local folder nor available from the hub or its cache: give "
            "--vision-tower FOLDER, a CLIP in transformers' layout such as openai/clip-vit-large-patch14-336"
        ) from error


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise RuntimeError('huggingface_hub is not installed: pip install "crossget[transformers]"') from error
    return huggingface_hub


def _load_vision(folder: Path, source: Path | None) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        origin = "" if source is None else f" (mm_vision_tower of {source / 'config.json'})"
        raise FileNotFoundError(
            f"the vision tower {folder} has no config.json{origin}: expected a CLIP in transformers' layout"
        )
    where = folder / "config.json"
    content = files.read_json(where)
    if content.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower {folder} has model_type {content.get('model_type')!r}: expected 'clip'")
    given = content.get("vision_config", content)
    if not isinstance(given, dict):
        raise ValueError(f"{where} has vision_config {given!r}: expected an object")
    llava_format.check_types(given, llava_format.VISION_TYPES, str(where))
    make = import_transformers().CLIPVisionConfig
    try:
        return _vision(make(**{name: given[name] for name in _VISION if given.get(name) is not None}))
    except Exception as error:  # each version of transformers has its own
        raise ValueError(f"{where}: transformers refuses it: {type(error).__name__}: {error}") from error


def _vision(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _VISION}


# The new model -------------------------------------------------------------------------------------------------------


def _config(
    source: LlavaFolder, vision: dict[str, Any], vocabulary: processor.Vocabulary, dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json under the names of the oldest supported transformers, which newer versions translate."""
    rows = max(source.text["vocab_size"], vocabulary.image + 1, vocabulary.pad + 1)
    kept = source.config.get("torch_dtype") or source.config.get("dtype") or source.dtype
    number = {"torch_dtype": str(dtype or kept).removeprefix("torch.")}
    grid = (vision["image_size"] // vision["patch_size"]) ** 2
    special = {"pad_token_id": vocabulary.pad, "tie_word_embeddings": False}
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **source.text, **special, **number}
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], **source.settings,
        "image_token_index": vocabulary.image,
        "image_seq_length": grid + (source.settings["vision_feature_select_strategy"] == "full"),
        **special, **number,
        "text_config": {**text, "vocab_size": -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE},
        "vision_config": {"model_type": "clip_vision_model", **vision, **number},
    }  # fmt: skip


def _on_meta(config: dict[str, Any], source: LlavaFolder, stored: int) -> nn.Module:
    """The model that the configuration describes, without memory.

    Raises:
        ValueError: the configuration has more blocks than tensors are stored, or transformers refuses it.
    """
    where = source.folder / "config.json"
    blocks = config["text_config"]["num_hidden_layers"] + config["vision_config"]["num_hidden_layers"]
    if blocks > stored:
        raise ValueError(f"{where}: {blocks} blocks of both towers together, but {stored} tensors are stored")
    transformers = import_transformers()
    copy = json.loads(json.dumps(config))  # transformers changes what it is given
    try:
        with torch.device("meta"):
            model: nn.Module = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(copy))
    except Exception as error:  # each version of transformers has its own
        raise ValueError(f"{where}: transformers cannot make this model: {type(error).__name__}: {error}") from error
    return model


def _new_name(key: str) -> str:
    old, new = next((old, new) for old, new in _RENAMED.items() if key.startswith(old))
    return new + key.removeprefix(old)


def _shards(tensors: Iterable[OutputTensor], limit: int | str) -> dict[str, list[OutputTensor]]:
    """The tensors of each file; in a file the widest dtypes come first, so that all tensors are aligned."""
    by_name = {tensor.name: tensor for tensor in tensors}
    try:
        split = _import_hub().split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
    except ValueError as error:
        raise ValueError(f"--max-shard-size: {error}") from error
    return {
        file: sorted((by_name[name] for name in names), key=lambda tensor: -tensor.dtype.itemsize)
        for file, names in split.filename_to_tensors.items()
    }


# Writing -------------------------------------------------------------------------------------------------------------


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: give another folder, or --overwrite to replace an earlier conversion")


def _check_names(plan: ConversionPlan, out: Path) -> set[str]:
    """The files of an earlier conversion in a folder.

    Raises:
        ValueError: a file that no conversion wrote is in the way, or the manifest is damaged.
    """
    listed = files.read_json(out / _MANIFEST).get("files") if (out / _MANIFEST).exists() else []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{out / _MANIFEST} has files {listed!r}: expected a list of names")
    # transformers would load a single file of weights in place of the new shards.
    strange = [n for n in sorted({*plan.names, "model.safetensors"} - set(listed)) if os.path.lexists(out / n)]
    if strange:
        raise ValueError(
            f"{out} has files that no conversion wrote there: {strange}: move them away, or give another folder"
        )
    return {*listed, _MANIFEST}


def _write(plan: ConversionPlan, out: Path) -> None:
    source = plan.source
    with tqdm(total=plan.bytes, desc="converting", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, shard in plan.files.items():
            _write_safetensors(out / name, shard, bar)
    if len(plan.files) > 1:
        index = {item.name: name for name, shard in plan.files.items() for item in shard}
        _write_json(out / _INDEX, {"metadata": {"total_size": plan.bytes}, "weight_map": index})
    if plan.reducers:
        cross = {tower: value.to(plan.dtype or value.dtype) for tower, value in source.cross_tokens().items()}
        saving.write(out, plan.reducers, cross)
    if plan.vocabulary.tokenizer is not None:
        strategy = source.settings["vision_feature_select_strategy"]
        processor.write_processor(plan.vocabulary, source.folder, out, plan.tower.vision, strategy)
    _write_json(out / "generation_config.json", plan.generation)
    _write_json(out / "config.json", plan.config)
    _write_json(out / _MANIFEST, {"files": [*plan.names, _MANIFEST]})


def _verify(plan: ConversionPlan, out: Path) -> None:
    """Read back what was written, before it takes the place of an earlier conversion.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if sorted(path.name for path in out.iterdir()) != sorted([*plan.names, _MANIFEST]):
        raise ValueError(f"{out} has {sorted(path.name for path in out.iterdir())}: expected {plan.names}")
    for name, shard in plan.files.items():
        found = {key: (item.shape, item.dtype) for key, item in llava_format.list_tensors(out / name).items()}
        if found != {item.name: (item.shape, item.dtype) for item in shard}:
            raise ValueError(f"{out / name} does not have the tensors that were written")


def _generation(source: LlavaFolder, vocabulary: processor.Vocabulary) -> dict[str, Any]:
    path = source.folder / "generation_config.json"
    given = files.read_json(path) if path.exists() else {}
    kept = {name: value for name, value in given.items() if not name.startswith("_") and name != "transformers_version"}
    special = {name: source.text[name] for name in ("bos_token_id", "eos_token_id")}
    return {**special, **kept, "pad_token_id": vocabulary.pad}


def _write_safetensors(path: Path, shard: list[OutputTensor], bar: Any) -> None:
    """Write a file in pieces; safetensors' own function needs all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in shard:
        start, end = end, end + item.bytes
        header[item.name] = {"dtype": llava_format.CODES[item.dtype], "shape": item.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for item, tensor in zip(shard, llava_format.load_tensors(item.source for item in shard), strict=True):
            for piece in _pieces(tensor, item):
                bar.update(file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data))


def _pieces(tensor: Tensor, output: OutputTensor) -> Iterator[Tensor]:
    """The rows of a tensor, a few at a time, then the rows that it lacks."""
    rows = output.shape[0]
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for piece in tensor.split(max(1, _PIECE * rows // torch.Size(output.shape).numel())):
        if rows > len(tensor):
            total += piece.sum(0, dtype=torch.float64)
        yield piece.to(output.dtype)
    if rows > len(tensor):
        mean = (total / len(tensor)).to(output.dtype)
        yield mean.expand(rows - len(tensor), *mean.shape)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _summary(plan: ConversionPlan, out: Path) -> str:
    source, text = plan.source, plan.source.text
    count = sum(torch.Size(item.shape).numel() for shard in plan.files.values() for item in shard)
    files = "1 file" if len(plan.files) == 1 else f"{len(plan.files)} files"
    lines = [
        f"{out}: LLaVA with {text['num_hidden_layers']} language and {plan.tower.vision['num_hidden_layers']} image "
        f"blocks, {count:,} parameters in {plan.config['torch_dtype']}, {files} of weights",
        f"vision tower: {plan.tower.folder if plan.tower.stored else 'inside the folder'}",
        f"vocabulary: {text['vocab_size']:,} tokens, then {processor.IMAGE} ({plan.vocabulary.image}) and "
        f"{processor.PAD} ({plan.vocabulary.pad}), filled up to {plan.config['text_config']['vocab_size']:,}",
    ]
    if plan.reducers:
        paths = sorted({str(one.path) for one in source.cross.values()})
        lines.append(f"cross tokens: {', '.join(paths)}; r = {plan.reducers['visual'].r}")
    else:
        lines.append("cross tokens: none, the dense model alone")
    if plan.vocabulary.tokenizer is None:
        lines.append(f"processor: left out, {source.folder} has no tokenizer.json and no tokenizer.model")
    elif source.config.get("image_aspect_ratio") == "pad":
        lines.append(
            "processor: crops images to a square, as llava-hf's does; the original pads them (image_aspect_ratio): pad "
            "images to a square before the processor to reproduce its numbers"
        )
    else:
        lines.append("processor: crops images to a square")
    return "\n".join(lines)
