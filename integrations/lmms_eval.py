"""lmms-eval's `--model llava_crossget`: what its entry point in pyproject.toml gives.

Every start of lmms-eval calls this. The model's class is only named here: lmms-eval imports it when it is asked for.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The ModelManifest of llava_crossget."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # A chat class alone, which --force_simple gets as well: lmms-eval's simple LlavaHf gives its prompts to the
    # tokenizer's chat template as plain strings, and those of llava-hf make nothing of that, not even a place for the
    # image.
    return ModelManifest(
        model_id="llava_crossget",
        chat_class_path="crossget.integrations.lmms_eval_llava.LlavaCrossget",
    )
