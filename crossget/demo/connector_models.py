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
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "aya_vision": _TEXT_WINDOW,
    "chameleon": {
        "vq_config": {"num_embeddings": 8},
        "vocabulary_map": {"<image>": 90, **{f"IMGIMG{chr(ord('A') + n)}Z": 70 + n for n in range(8)}},
    },
    "cohere2_vision": _TEXT_WINDOW,
    "cohere_compass": {
        "text_config": {**_WINDOW, "rope_parameters": {kind: {**_AXES["rope_parameters"], "mrope_interleaved": True} for kind in ("sliding_attention", "full_attention")}}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "emu3": {
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
        "vocabulary_map": {
            "<image>": 90, "<|extra_200|>": 91, **{f"<|visual token {n:06d}|>": 70 + n for n in range(8)}
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [3, 3, 2]}}},
    "exaone4_5": _TEXT_WINDOW,
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0"}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, **_WINDOW}},
    "gemma4": {
        "text_config": {**_WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "num_kv_shared_layers": 0, "global_head_dim": 16},
        "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "patch_size": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
        "audio_config": None,
    },
    "gemma3": {"mm_tokens_per_image": 16, **_TEXT_WINDOW},
    "glm46v": _TEXT_AXES,
    "glm4v": _TEXT_AXES,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}},
    "glm_ocr": _TEXT_AXES,
    "granite4_vision": {
        **_TILES, "deepstack_layer_map": [[1, 0], [2, 1]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1, 2, 2],
        "vision_config": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full", "image_seq_length": 16,
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {**_AXES["rope_parameters"], "mrope_section": [2, 2, 2, 2]}}},
    "hy_v4_vl": {"text_config": {"indexer_types": ["full"] * 4}},
    "kimi_k25": {"text_config": {"head_dim": 8}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": {"image_token_id": 95},
    "minicpmv4_6": {"image_token_id": 95},
    "minicpmv4_7": {"image_token_id": 95},
    "nemotron_h_omni": {"image_token_id": 95},
    "paddleocr_vl": _TEXT_AXES,
    "qwen2_5_omni_thinker": {**_TEXT_AXES, "vision_start_token_id": 97},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 97},
    "step3p7": {"text_config": {"sliding_window": 24}},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [56, 56], "global_pool": "", "use_post_transformer_norm": False}}},
    "qwen2_vl": _TEXT_AXES,
    "qwen2_5_vl": _TEXT_AXES,
}
