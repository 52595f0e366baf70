"""The studies by name: the module with the `STUDY` that measures, and the one with the `PAGE` that reports."""

from importlib import import_module
from typing import Any

from experiments.lib.study import Page, Study

# Modules are named, not imported: each needs other packages.
STUDIES = {
    "ablation": "experiments.ablation.run",
    "ablation-trained": "experiments.ablation.train",
    "budgets": "experiments.budgets.run",
    "coop": "experiments.coop.run",
    "dense": "experiments.dense.run",
    "flops": "experiments.flops.run",
    "real-budgets": "experiments.real.budgets",
    "real-precision": "experiments.real.precision",
    "real-saliency": "experiments.real.saliency",
    "real-speed": "experiments.real.speed",
    "real-trained": "experiments.real.distill",
    "real-zero-shot": "experiments.real.zero_shot",
    "retrieval": "experiments.retrieval.run",
    "speed-connector": "experiments.speed.connector",
    "speed-costs": "experiments.speed.costs",
    "speed-discovery": "experiments.speed.discovery",
    "speed-embed": "experiments.speed.embed",
    "speed-llava": "experiments.speed.llava",
    "speed-operators": "experiments.speed.operators",
    "speed-serving": "experiments.speed.serving",
    "speed-towers": "experiments.speed.towers",
    "speed-versions": "experiments.speed.versions",
    "training-free": "experiments.training_free.run",
}
PAGES = {
    "ablation": "experiments.ablation.report",
    "ablation-trained": "experiments.ablation.report_trained",
    "budgets": "experiments.budgets.report",
    "coop": "experiments.coop.report",
    "dense": "experiments.dense.report",
    "evidence": "experiments.real.evidence",
    "flops": "experiments.flops.report",
    "real": "experiments.real.report",
    "retrieval": "experiments.retrieval.report",
    "speed": "experiments.speed.report",
    "training-free": "experiments.training_free.report",
}


def load_study(name: str) -> Study[Any, Any]:
    """Return a study by its name."""
    study: Study[Any, Any] = import_module(STUDIES[name]).STUDY
    return study


def load_page(name: str) -> Page:
    """Return a page by the name of its study."""
    page: Page = import_module(PAGES[name]).PAGE
    return page
