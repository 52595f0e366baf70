"""The tokenizer and processor files of a LLaVA-1.5 for transformers, made from those of the original.

They have the form of the repositories llava-hf/llava-1.5-*-hf, which every version of transformers loads. What
transformers' own save_pretrained writes depends on the version that converts.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossget.checkpoints.llava_format import abbreviated
from crossget.core import files

IMAGE, PAD = "<image>", "<pad>"
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json", "chat_template.json",
)  # fmt: skip
_SETTINGS = FILES[2:4]

# The prompt of LLaVA-1.5 (its conversation "v1"): first the images, each on its own line, then the text.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions." -%}{%- set turns = messages -%}
{%- endif -%}
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ text(system) + ' ' }}
{%- for turn in turns -%}
{%- if turn['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + text(turn['content']) + '</s>' }}
{%- else -%}{{ 'USER: ' + text(turn['content']) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Vocabulary:
    """The two new tokens of the converted model.

    Attributes:
        image: id of <image>.
        pad: id of <pad>.
        tokenizer: of the `tokenizers` package, with both tokens; None if the folder has no tokenizer.
        settings: contents of the folder's configuration files beside the tokenizer, by name.
    """

    image: int
    pad: int
    tokenizer: Any
    settings: dict[str, dict[str, Any]]


def load_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Add <image> and <pad> to a folder's tokenizer.

    Args:
        folder: in the original's layout, with a tokenizer.json, a tokenizer.model, or neither.
        rows: the number of embeddings of the model; without a tokenizer, the new tokens follow them.

    Raises:
        RuntimeError: loading tokenizer.model needs packages that are not installed.
        ValueError: the tokenizer has more tokens than the model, or a file is damaged.
    """
    settings = {name: files.read_json(folder / name) for name in _SETTINGS if (folder / name).is_file()}
    with _naming(folder):
        tokenizer = _tokenizer(folder)
        if tokenizer is None:
            return Vocabulary(rows, rows + 1, None, settings)
        from tokenizers import AddedToken

        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (IMAGE, PAD)])
        ids = tokenizer.get_vocab(with_added_tokens=True)
    unknown = sorted(token for token, i in ids.items() if i >= rows and token not in (IMAGE, PAD))
    if unknown:
        raise ValueError(f"the tokenizer in {folder} has tokens beyond the {rows} of the model: {abbreviated(unknown)}")
    return Vocabulary(ids[IMAGE], ids[PAD], tokenizer, settings)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Inside, whatever a damaged tokenizer raises is a ValueError that names its file."""
    file = next((name for name in FILES[:2] if (folder / name).is_file()), "")
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizers package, which is written in Rust, is no Exception.
        is_damage = isinstance(error, Exception) or "Panic" in type(error).__name__
        if not is_damage or isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise ValueError(f"{folder / file} is not a tokenizer that can be loaded: {error}") from error


def write_processor(vocabulary: Vocabulary, source: Path, out: Path, vision: dict[str, Any], strategy: str) -> None:
    """Write the files that AutoProcessor loads.

    Args:
        vocabulary: from `load_vocabulary`, with a tokenizer.
        source: the folder that it was loaded from.
        out: the folder to write to.
        vision: configuration of the image tower.
        strategy: vision_feature_select_strategy of the model.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    size = vision["image_size"]
    contents: dict[str, dict[str, Any]] = {
        **_tokenizer_files(vocabulary, source),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": size, "width": size},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD,
            "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": vision["patch_size"],
            "vision_feature_select_strategy": strategy, "num_additional_image_tokens": 1,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }  # fmt: skip
    # Not by its own save(), whose errors on a full disk are of no particular type.
    (out / "tokenizer.json").write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", out / "tokenizer.model")
    for name, content in contents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def names(vocabulary: Vocabulary, source: Path) -> list[str]:
    """The files that `write_processor` writes; none without a tokenizer."""
    if vocabulary.tokenizer is None:
        return []
    copied = {"tokenizer.model": (source / "tokenizer.model").is_file()}
    copied["special_tokens_map.json"] = "special_tokens_map.json" in vocabulary.settings
    return [name for name in FILES if copied.get(name, True)]


def _tokenizer(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer.model").is_file():
        return None
    try:
        for package in ("sentencepiece", "google.protobuf"):
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{folder} has a tokenizer.model and no tokenizer.json; loading it needs two more packages: "
            "pip install sentencepiece protobuf"
        ) from error
    from transformers import LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as alone:  # a config.json beside it would change the result
        for name in (*FILES[1:4], "added_tokens.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(alone) / name)
        return LlamaTokenizerFast.from_pretrained(alone).backend_tokenizer


def _tokenizer_files(vocabulary: Vocabulary, source: Path) -> dict[str, dict[str, Any]]:
    """The two configuration files beside tokenizer.json, with the new tokens."""
    added = {
        str(i): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for i, token in sorted(vocabulary.tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    config = vocabulary.settings.get("tokenizer_config.json") or {
        "tokenizer_class": "LlamaTokenizer" if (source / "tokenizer.model").is_file() else "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    # Prompts of a batch are padded on the left, so that generation continues each of them.
    config = config | {"added_tokens_decoder": added, "pad_token": PAD, "padding_side": "left"}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "processor_class": "LlavaProcessor"}
    contents = {"tokenizer_config.json": config}
    special = vocabulary.settings.get("special_tokens_map.json")
    return {**contents, **({} if special is None else {"special_tokens_map.json": {**special, "pad_token": PAD}})}
