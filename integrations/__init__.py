"""Adapters: functions that find the towers (lists of transformer blocks) in the models of a library, the host.

There is one file per host and, for transformers, one per family of models (hf_*). A file is imported when one of its
models is first used.
"""

if __name__ == "integrations":
    raise ModuleNotFoundError("import crossget.integrations, not integrations")
