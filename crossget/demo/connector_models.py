"""Which models of images and text of transformers can be reduced behind the connector: a tiny random model of each.

    python -m crossget.demo.connector_models experiments/models/connectors.md

writes the page again. Only systems with the start method "forkserver" can do it: Linux and macOS.
"""

from __future__ import annotations

from typing import Any

_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_TEXT_AXES = {"text_config": _AXES}
_TILES = {"image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]]}
_WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
_TEXT_WINDOW = {"text_config": _WINDOW}
# Values of configurations that no rule for names knows, by family: such that the parts fit together, and windows are
# shorter than prompts.
VALUES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"64": 16}},
    "aya_vision": _TEXT_WINDOW,
    "cohere2_vision": _TEXT_WINDOW,
    "cohere_compass": {
        "text_config": {**_WINDOW, "rope_parameters": {kind: {**_AXES["rope_parameters"], "mrope_interleaved": True} for kind in ("sliding_attention", "full_attention")}}
    },
    "exaone4_5": _TEXT_WINDOW,
    "gemma3": {"mm_tokens_per_image": 16, **_TEXT_WINDOW},
    "glm46v": _TEXT_AXES,
    "glm4v": _TEXT_AXES,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}},
    "glm_ocr": _TEXT_AXES,
    "granite4_vision": {
        **_TILES, "deepstack_layer_map": [[1, 0], [2, 1]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1, 2, 2],
        "vision_feature_select_strategy": "full", "image_seq_length": 16,
    },
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "qwen2_vl": _TEXT_AXES,
    "qwen2_5_vl": _TEXT_AXES,
}
