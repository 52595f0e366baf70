"""From the authors' LLaVA to a folder that transformers and `crossget.load` read.

Keys are those of the repositories llava-hf/llava-1.5-*-hf, which every version of transformers knows. Weights go from
file to file in pieces: in memory at a time are at most the one file that is being read, mapped, and a few megabytes.
"""

from __future__ import annotations

import contextlib
import json
import re
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
from crossget.checkpoints.llava_format import TOWER, VOCABULARY, Original, Shape, Stored
from crossget.core import saving
from crossget.core.attachment import attach
from crossget.methods.reducers import CrossGET, Reducer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Longest first: which keys of the original are called what.
_NAMES = {
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_INDEX, _PART = "model.safetensors.index.json", ".part"
# What an earlier conversion may have left; of these, transformers would read some that this one does not write.
_OURS = ("model*.safetensors*", "config.json", "generation_config.json", *saving.FILES, *processor.FILES)
_VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_channels", "projection_dim", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_TOWER_FILES = ("model.safetensors", "pytorch_model.bin")
_ROUND = 64  # embeddings come in multiples of this, as llava-hf's do
_PIECE = 2**20  # elements that are converted at a time


@dataclass(frozen=True)
class Written:
    """A tensor of the new folder.

    Attributes:
        name: its key there.
        source: where it comes from.
        shape: of it; rows that the source does not have are the mean of those that it has.
        dtype: of it.
    """

    name: str
    source: Stored
    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """How much room it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ImageTower:
    """The image tower.

    Attributes:
        vision: its configuration.
        home: the folder that says so; None if the original's config.json names a published one.
        stored: its weights under the original's keys, if they are not inside the original's folder.
    """

    vision: dict[str, Any]
    home: Path | None
    stored: dict[str, Stored]


@dataclass(frozen=True)
class ConversionPlan:
    """All that is known before a weight is read.

    Attributes:
        found: the folder to be converted.
        tower: the new model's.
        vocabulary: tokens of the new model.
        config: config.json of the new model.
        files: the tensors of each file of weights.
        reducers: by tower; empty for a conversion without cross tokens.
        dtype: of all that is written; None if it stays as it is.
    """

    found: Original
    tower: ImageTower
    vocabulary: processor.Vocabulary
    config: dict[str, Any]
    files: dict[str, list[Written]]
    reducers: Mapping[str, Reducer]
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        """The size of all weights."""
        return sum(one.bytes for shard in self.files.values() for one in shard)


def convert(
    folder: Path,
    out: Path,
    *,
    r: Any = 13,
    vision_tower: str | None = None,
    max_shard_size: int = 4 * 10**9,
    dtype: torch.dtype | None = None,
    cross_tokens: bool = True,
    overwrite: bool = False,
) -> str:
    """Convert a folder in LLaVA's original layout.

    The vocabulary grows by <image> and <pad>, and up to the next multiple of 64. The new rows of the embeddings and of
    the head are the mean of the old ones, around which transformers' own conversion draws them. Nobody reads the first
    ones (features stand at <image>, and padding is masked). Those of the head give the mean of the other tokens'
    logits, which is less than the largest: greedy decoding never picks a new token.

    Args:
        folder: LoRA merged beforehand.
        out: where the new folder goes; `LlavaForConditionalGeneration.from_pretrained` and `crossget.load` read it.
        r: for the image tower, what CrossGET takes.
        vision_tower: a CLIP in transformers' layout (a folder, or an id on the hub) for a folder without image tower.
            Weights that are inside come first; it says how they are to be used then.
        max_shard_size: bytes in one file of weights, unless a single tensor is larger.
        dtype: of the new weights; as they are if None.
        cross_tokens: a folder without is an error. False leaves them out: the dense model alone is converted.
        overwrite: write into a folder that is not empty, over what an earlier conversion left there.

    Returns:
        What was done, for people, in a few lines.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: something is wrong with what is there (it is named), or `out` is not empty. Nothing is written then.
        RuntimeError: a package is missing.
    """
    _check_out(out, overwrite)
    made = plan(folder, r, vision_tower, max_shard_size, dtype, cross_tokens)
    if out.resolve() in [home.resolve() for home in (folder, made.tower.home) if home is not None]:
        raise ValueError(f"{out} is a folder that is read from: give another one for the result")
    _clear(out)
    _write(made, out)
    return _summary(made, out)


def plan(
    folder: Path,
    r: Any = 13,
    vision_tower: str | None = None,
    max_shard_size: int = 4 * 10**9,
    dtype: torch.dtype | None = None,
    cross_tokens: bool = True,
) -> ConversionPlan:
    """Check everything, and say what `convert` would write. Arguments and errors are the same."""
    found = llava_format.read_folder(folder)
    if cross_tokens:
        found.require_cross_tokens(" --no-cross-tokens converts it as one")
    tower = _tower(found, vision_tower)
    stored = {**found.stored, **tower.stored}
    rows = found.text["vocab_size"]
    vocabulary = processor.read_vocabulary(folder, rows)
    config = _config(found, tower.vision, vocabulary, dtype)
    model = _on_meta(config)
    shapes = {name: tuple(value.shape) for name, value in llava_format.parameters(model).items()}
    expected = {name: (rows, *shape[1:]) if name in VOCABULARY else shape for name, shape in shapes.items()}
    sizes = {name: one.shape for name, one in stored.items()}
    llava_format.check_shapes(expected, sizes, str(folder), "what its config.json says", "written")
    reducers: Mapping[str, Reducer] = {}
    if cross_tokens:
        attached = attach(model, CrossGET(r=r))
        llava_format.check_cross(found.cross, {name: tuple(p.shape) for name, p in attached.cross_tokens.items()})
        reducers = attached.reducers
    # A tower from elsewhere is in whatever kind of number it was published in: it goes with the language model.
    like = dict.fromkeys(tower.stored, found.dtype)
    tensors = [
        Written(_new_name(name), one, shapes[name], dtype or like.get(name, one.dtype)) for name, one in stored.items()
    ]
    return ConversionPlan(found, tower, vocabulary, config, _files(tensors, max_shard_size), reducers, dtype)


def size_of(text: str) -> int:
    """Bytes: what "4GB", "500MB" or "2GiB" says.

    Raises:
        ValueError: it says nothing of the kind.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r}: expected a size such as 4GB or 500MB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** ("KMGT".index(match[2].upper()) + 1))


# The image tower -----------------------------------------------------------------------------------------------------


def _tower(found: Original, given: str | None) -> ImageTower:
    name = given or found.config.get("mm_vision_tower")
    known = str(name).rstrip("/").rpartition("/")[2]
    if found.has_tower and given is None and known in PRESETS and not Path(str(name)).is_dir():
        return ImageTower(_vision(PRESETS[known].config().vision_config), None, {})
    home = _tower_folder(name, given is not None, weights=not found.has_tower)
    vision = _read_vision(home)
    if found.has_tower:
        return ImageTower(vision, home, {})
    stored = llava_format.weights(home)
    prefix = "vision_model."
    if any(key.startswith(prefix) for key in stored):  # a whole CLIP, or a tower saved before transformers 5
        stored = {key.removeprefix(prefix): one for key, one in stored.items() if key.startswith(prefix)}
    return ImageTower(vision, home, {TOWER + key: one for key, one in stored.items()})


def _tower_folder(name: Any, given: bool, weights: bool) -> Path:
    name = str(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        home = Path(hf_hub_download(name, "config.json")).parent
        for file in _TOWER_FILES if weights else ():
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, file)
                break
        else:
            if weights:
                raise EntryNotFoundError(f"no {' and no '.join(_TOWER_FILES)}")
        return home
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError) as error:
        what = "--vision-tower"
        if not given:
            why = "has no vision tower inside" if weights else "has one inside and does not say how it is built"
            what = f"config.json's mm_vision_tower; the folder {why}"
        raise FileNotFoundError(
            f"{name!r} ({what}) is neither a folder here nor can it be had from the hub or its cache: give "
            "--vision-tower FOLDER, a CLIP in transformers' layout such as openai/clip-vit-large-patch14-336"
        ) from error


def _read_vision(home: Path) -> dict[str, Any]:
    if not (home / "config.json").is_file():
        raise FileNotFoundError(f"the vision tower {home} has no config.json: expected a CLIP in transformers' layout")
    content = json.loads((home / "config.json").read_text())
    if content.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower {home} has model_type {content.get('model_type')!r}: expected 'clip'")
    given = content.get("vision_config", content)
    config = import_transformers().CLIPVisionConfig(**{name: given[name] for name in _VISION if name in given})
    return _vision(config)


def _vision(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _VISION}


# The new model -------------------------------------------------------------------------------------------------------


def _config(
    found: Original, vision: dict[str, Any], vocabulary: processor.Vocabulary, dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json, by hand and in the oldest version's terms, which the newer ones translate."""
    rows = max(found.text["vocab_size"], vocabulary.image + 1, vocabulary.pad + 1)
    kept = found.config.get("torch_dtype") or found.config.get("dtype") or found.dtype
    number = {"torch_dtype": str(dtype or kept).removeprefix("torch.")}
    grid = (vision["image_size"] // vision["patch_size"]) ** 2
    special = {"pad_token_id": vocabulary.pad, "tie_word_embeddings": False}
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **found.text, **special, **number}
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], **found.settings,
        "image_token_index": vocabulary.image,
        "image_seq_length": grid + (found.settings["vision_feature_select_strategy"] == "full"),
        **special, **number,
        "text_config": {**text, "vocab_size": -(-rows // _ROUND) * _ROUND},
        "vision_config": {"model_type": "clip_vision_model", **vision, **number},
    }  # fmt: skip


def _on_meta(config: dict[str, Any]) -> nn.Module:
    transformers = import_transformers()
    copy = json.loads(json.dumps(config))  # transformers changes what it is given
    with torch.device("meta"):
        model: nn.Module = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(copy))
    return model


def _new_name(key: str) -> str:
    old, new = next((old, new) for old, new in _NAMES.items() if key.startswith(old))
    return new + key.removeprefix(old)


def _files(tensors: Iterable[Written], limit: int) -> dict[str, list[Written]]:
    """Files of at most so many bytes; in each the widest numbers first, so that all are aligned."""
    shards: list[list[Written]] = [[]]
    size = 0
    for one in tensors:
        if shards[-1] and size + one.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.bytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return {
        name: sorted(shard, key=lambda written: -written.dtype.itemsize)
        for name, shard in zip(names, shards, strict=True)
    }


# Writing -------------------------------------------------------------------------------------------------------------


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty: give another folder, or --overwrite to replace an earlier conversion")


def _clear(out: Path) -> None:
    """Remove what an earlier conversion may have left."""
    for pattern in _OURS:
        for path in out.glob(pattern):
            path.unlink()


def _write(made: ConversionPlan, out: Path) -> None:
    found = made.found
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=made.bytes, desc="converting", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, shard in made.files.items():
            _write_safetensors(out / (name + _PART), shard, bar)
    if len(made.files) > 1:
        index = {one.name: name for name, shard in made.files.items() for one in shard}
        _write_json(out / _INDEX, {"metadata": {"total_size": made.bytes}, "weight_map": index})
    if made.reducers:
        cross = {tower: value.to(made.dtype or value.dtype) for tower, value in found.cross_tokens().items()}
        saving.write(out, made.reducers, cross)
    if made.vocabulary.tokenizer is not None:
        strategy = found.settings["vision_feature_select_strategy"]
        processor.write_processor(made.vocabulary, found.folder, out, made.tower.vision, strategy)
    _write_json(out / "generation_config.json", _generation(made))
    _write_json(out / "config.json", made.config)
    for name in made.files:  # at the end: what was interrupted cannot be loaded
        (out / (name + _PART)).rename(out / name)


def _generation(made: ConversionPlan) -> dict[str, Any]:
    path = made.found.folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    kept = {name: value for name, value in given.items() if not name.startswith("_") and name != "transformers_version"}
    special = {name: made.found.text[name] for name in ("bos_token_id", "eos_token_id")}
    return {**special, **kept, "pad_token_id": made.vocabulary.pad}


def _write_safetensors(path: Path, shard: list[Written], bar: Any) -> None:
    """Write a file piece by piece. safetensors' own function wants all its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in shard:
        start, end = end, end + one.bytes
        header[one.name] = {"dtype": llava_format.CODES[one.dtype], "shape": one.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for one, tensor in zip(shard, llava_format.tensors(one.source for one in shard), strict=True):
            for piece in _pieces(tensor, one):
                bar.update(file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data))


def _pieces(tensor: Tensor, written: Written) -> Iterator[Tensor]:
    """A tensor's rows, a few at a time; then those that it lacks."""
    rows = written.shape[0]
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for piece in tensor.split(max(1, _PIECE * rows // torch.Size(written.shape).numel())):
        if rows > len(tensor):
            total += piece.sum(0, dtype=torch.float64)
        yield piece.to(written.dtype)
    if rows > len(tensor):
        mean = (total / len(tensor)).to(written.dtype)
        yield mean.expand(rows - len(tensor), *mean.shape)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _summary(made: ConversionPlan, out: Path) -> str:
    found, text = made.found, made.found.text
    count = sum(torch.Size(one.shape).numel() for shard in made.files.values() for one in shard)
    files = "1 file" if len(made.files) == 1 else f"{len(made.files)} files"
    lines = [
        f"{out}: LLaVA with {text['num_hidden_layers']} language and {made.tower.vision['num_hidden_layers']} image "
        f"blocks, {count:,} parameters in {made.config['torch_dtype']}, {files} of weights",
        f"vision tower: {made.tower.home if made.tower.stored else 'inside the folder'}",
        f"vocabulary: {text['vocab_size']:,} tokens, then {processor.IMAGE} ({made.vocabulary.image}) and "
        f"{processor.PAD} ({made.vocabulary.pad}), filled up to {made.config['text_config']['vocab_size']:,}",
    ]
    if made.reducers:
        paths = sorted({str(one.path) for one in found.cross.values()})
        lines.append(f"cross tokens: {', '.join(paths)}; r = {made.reducers['visual'].r}")
    else:
        lines.append("cross tokens: none, the dense model alone")
    if made.vocabulary.tokenizer is None:
        lines.append(f"processor: left out, {found.folder} has no tokenizer.json and no tokenizer.model")
    elif found.config.get("image_aspect_ratio") == "pad":
        lines.append(
            "processor: crops images to a square, as llava-hf's does; the original pads them (image_aspect_ratio), so "
            "for its numbers pad yours before"
        )
    else:
        lines.append("processor: crops images to a square")
    return "\n".join(lines)
