"""Adapters: where the towers of a host's models are.

One file per host, and in transformers one per family of models (hf_*), loaded when a model of it is first met.
"""

if __name__ == "integrations":
    raise ModuleNotFoundError("import crossget.integrations, not integrations")
