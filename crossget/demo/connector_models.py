"""Which models of images and text of transformers can be reduced behind the connector: a tiny random model of each.

    python -m crossget.demo.connector_models experiments/models/connectors.md

writes the page again. Only systems with the start method "forkserver" can do it: Linux and macOS.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import crossget
from crossget.core.attach import find_connector
from crossget.demo import connector_checks, tiny_inputs, tiny_transformers
from crossget.demo.connector_checks import Example, Failed
from crossget.demo.isolated import examined, text_of
from crossget.demo.transformers_models import table
from crossget.integrations._support import SupportRow

_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_TEXT_AXES = {"text_config": _AXES}
_TILES = {"image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]]}
_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
_TEXT_WINDOW = {"text_config": _WINDOW}
# Values of configurations that no rule for names knows, by family: such that the parts fit together, and windows are
# shorter than prompts.
VALUES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "aya_vision": _TEXT_WINDOW,
    "chameleon": {
        "vq_config": {"num_embeddings": 8},
        "vocabulary_map": {"<image>": 90, **{f"IMGIMG{chr(ord('A') + n)}Z": 70 + n for n in range(8)}},
    },
    "cohere2_vision": _TEXT_WINDOW,
    "cohere_compass": {
        "text_config": {
            **_WINDOW,
            "rope_parameters": {
                kind: {**_AXES["rope_parameters"], "mrope_interleaved": True}
                for kind in ("sliding_attention", "full_attention")
            },
        }
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {
        "vq_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
        "vocabulary_map": {
            "<image>": 90,
            "<|extra_200|>": 91,
            **{f"<|visual token {n:06d}|>": 70 + n for n in range(8)},
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [3, 3, 2]}}},
    "exaone4_5": _TEXT_WINDOW,
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0", "hidden_size": 1024}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, **_WINDOW}},
    "gemma4": {
        "text_config": {
            **_WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 100,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
    },
    "gemma3": {"mm_tokens_per_image": 16, **_TEXT_WINDOW},
    "glm46v": _TEXT_AXES,
    "glm4v": _TEXT_AXES,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        }
    },
    "glm_ocr": _TEXT_AXES,
    "granite4_vision": {
        **_TILES,
        "deepstack_layer_map": [[1, 0], [2, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 2, 2],
        "vision_config": {"model_type": "siglip_vision_model"},
        "vision_feature_select_strategy": "full",
        "image_seq_length": 16,
    },
    "hunyuan_vl": {
        "text_config": {"head_dim": 16, "rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [2, 2, 2, 2]}}
    },
    "hy_v4_vl": {"text_config": {"indexer_types": ["full"] * 4}},
    "kimi_k25": {"text_config": {"head_dim": 8, "n_group": 1, "topk_group": 1}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": {"image_token_id": 95},
    "minicpmv4_6": {"image_token_id": 95},
    "minicpmv4_7": {"image_token_id": 95},
    "muse_glimmer": {"out_hidden_size": 256, "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
    "nemotron_h_omni": {"image_token_id": 95, "text_config": {"n_groups": 2}},
    "paddleocr_vl": _TEXT_AXES,
    "qwen2_5_omni_thinker": {**_TEXT_AXES, "vision_start_token_id": 97},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 97},
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {"text_config": {"sliding_window": 24}},
    "paligemma": {"attn_implementation": "eager"},  # with SDPA the dense model reads padded prompts in another way
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 64,
                "depth": 2,
                "num_heads": 4,
                "img_size": [64, 64],
                "patch_size": 8,
                "global_pool": "",
                "use_post_transformer_norm": False,
            },
        }
    },
    "qwen2_vl": _TEXT_AXES,
    "qwen2_5_vl": _TEXT_AXES,
}


@dataclass(frozen=True)
class Row:
    """One class of models of images and text.

    Attributes:
        family: its model_type.
        name: of the class.
        called: the way in which its image features were made; empty if none was found.
        oracle: with which it agrees; empty if it was not checked.
        cause: why it cannot be reduced, or was not checked; empty if it can be.
    """

    family: str
    name: str
    called: str = ""
    oracle: str = ""
    cause: str = "it was not built"

    @property
    def done(self) -> bool:
        """Whether it can be reduced."""
        return bool(self.oracle)

    def support(self) -> SupportRow:
        """As a row of `crossget models`."""
        place = (f"connector: {self.called}",) if self.done else ()
        return SupportRow(self.family, self.name, self.done, place, "" if self.done else _line(self.cause))


def families() -> dict[str, str]:
    """The class of every family of models of images and text, by its model_type. No class comes twice."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    first = {name: family for family, name in reversed(NAMES.items())}
    return {family: name for name, family in first.items()}


def support_matrix(only: Sequence[str] = ("*",)) -> Iterator[Row]:
    """One row for each family, as the models are done.

    Args:
        only: patterns, one of which matches the family or its class.

    Raises:
        RuntimeError: the system has no start method "forkserver".
    """
    rows = [
        Row(family, name)
        for family, name in families().items()
        if any(fnmatch.fnmatch(family, pattern) or fnmatch.fnmatch(name, pattern) for pattern in only)
    ]
    return examined(rows, examine, __name__)


def example(family: str) -> Example:
    """A tiny model of a family with prompts.

    Raises:
        Failed: it cannot be built or called; the message says why.
        TypeError: its connector cannot be reduced.
    """
    try:
        model = build(family)
    except Exception as error:
        raise Failed(f"it was not built: {text_of(error)}") from error
    errors = []
    for way in tiny_inputs.ways_to_encode(find_connector(model).parts):
        try:
            return Example(model, way)
        except Exception as error:  # noqa: PERF203
            errors.append(f"{way.layout}: {text_of(error)}")
    raise Failed(f"get_image_features was not called: {'; '.join(errors[:2]) or 'unknown arguments'}")


def build(family: str) -> nn.Module:
    """A tiny model of a family."""
    import transformers

    model = tiny_transformers.build(getattr(transformers, families()[family]), values=VALUES.get(family))
    connector_checks.redraw(model)
    return model


def examine(row: Row) -> Iterator[Row]:
    """Check the class of a row; yields a better one."""
    try:
        prompts = example(row.family)
        row = dataclasses.replace(row, called=prompts.layout, cause="it was not checked")
        yield row
        yield dataclasses.replace(row, oracle=connector_checks.check(prompts), cause="")
    except (Failed, TypeError) as error:
        yield dataclasses.replace(row, cause=str(error))


# ---------------------------------------------------------------------------------------------------------------------
# The page


_PAGE = """\
# Image features behind the connector

`crossget.attach(model, {{"connector": crossget.Ward(crossget.Keep(0.4))}})` reduces the image features of a language
model. Here is one class for each family of transformers' models of images and text. The models are tiny and random. The
prompts are two rows, one with one image and one with two, padded on the left. A class is supported if

- with `Keep(1.0)`, the logits and the loss of `forward`, and the tokens and logits of `generate`, are the dense
  model's, bit for bit,
- with `Keep(0.4)`, those of `forward` with labels and of {new} greedy steps of `generate` with a cache agree with an
  oracle to {close:g} of the largest logit, while positions that are wrong by {wrong} change it by more than {power:g}.

The oracle is the plain model without hooks: "masked columns" is the full prompt, whose placeholders that leave are
hidden by the attention mask. Where a hidden column still counts, in a sliding window, a convolution or a recurrence, it
is each row of the shorter prompt alone: as embeddings, or as ids and features "cut by hand".

This page is generated, without weights or network, on two cores in a few minutes:

```sh
python -m crossget.demo.connector_models experiments/models/connectors.md
```

Versions: transformers {transformers}, torch {torch}, crossget {crossget}.
"""


def markdown(rows: Sequence[Row]) -> str:
    """The page."""
    rows = sorted(rows, key=lambda row: row.family)
    head = _PAGE.format(
        transformers=importlib.metadata.version("transformers"), torch=torch.__version__, crossget=crossget.__version__,
        new=connector_checks.NEW, close=connector_checks.CLOSE, power=connector_checks.POWER,
        wrong=connector_checks.WRONG,
    )  # fmt: skip
    works, others = [row for row in rows if row.done], [row for row in rows if not row.done]
    yes = table(["family", "class", "images", "oracle"], [[r.family, f"`{r.name}`", r.called, r.oracle] for r in works])
    no = table(["family", "class", "reason"], [[r.family, f"`{r.name}`", _line(r.cause)] for r in others])
    parts = [head, f"{len(works)} of {len(rows)} families can be reduced.", "## Supported", yes, "## Not supported", no]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _line(cause: str) -> str:
    line = " ".join(cause.split())
    return line if len(line) < 240 else line[:240] + " ..."


def listed(page: str) -> tuple[str, list[str]]:
    """The version of transformers that a page is about, and the families that it lists as supported."""
    version = re.search("^Versions: transformers ([^,]+),", page, re.MULTILINE)
    if version is None:
        raise ValueError("the page names no version of transformers: write it again")
    supported = page.partition("## Supported")[2].partition("## Not supported")[0]
    return version[1], re.findall(r"^\| ([\w.-]+) \| `\w+` \|", supported, re.MULTILINE)


def main(path: Path) -> None:
    """Write the page."""
    from tqdm import tqdm

    rows = list(tqdm(support_matrix(), desc="transformers", unit=" models"))
    new = path.with_suffix(".new")
    new.write_text(markdown(rows), encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
