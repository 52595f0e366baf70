"""The entry point that adds `--model llava_crossget` to lmms-eval, see pyproject.toml.

lmms-eval calls it at every start. So this file does not import the model's class; lmms-eval does if it is used.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of llava_crossget."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # Only a chat class, which is used with --force_simple as well. lmms-eval's simple LlavaHf passes prompts as plain
    # strings to the tokenizer's chat template, and from these the templates of llava-hf make no image placeholder.
    return ModelManifest(
        model_id="llava_crossget",
        chat_class_path="crossget.integrations.lmms_eval_llava.LlavaCrossget",
    )
