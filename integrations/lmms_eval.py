"""The entry point that adds `--model llava_crossget` and `--model crossget` to lmms-eval, see pyproject.toml.

lmms-eval calls it at every start. So this file does not import the models' classes; lmms-eval does if one is used.
"""

from __future__ import annotations

from typing import Any


def manifest() -> list[Any]:
    """The `ModelManifest` of each model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # Only a chat class, which is used with --force_simple as well. lmms-eval's simple LlavaHf passes prompts as plain
    # strings to the tokenizer's chat template, and from these the templates of llava-hf make no image placeholder.
    classes = {"llava_crossget": "lmms_eval_llava.LlavaCrossget", "crossget": "lmms_eval_connector.ConnectorCrossget"}
    return [
        ModelManifest(model_id=name, chat_class_path=f"crossget.integrations.{path}") for name, path in classes.items()
    ]
