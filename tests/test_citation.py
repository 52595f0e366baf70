"""CITATION.cff names the version that is installed, and the paper."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import crossget

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_version_is_the_packages(citation: dict[str, Any]) -> None:
    assert citation["version"] == crossget.__version__


def test_preferred_citation_is_the_paper(citation: dict[str, Any]) -> None:
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("CrossGET: Cross-Guided Ensemble of Tokens")
    assert [author["family-names"] for author in paper["authors"]] == ["Shi", "Tao", "Rao", "Yang", "Yuan", "Wang"]
    assert paper["year"] == 2024
    assert "arXiv:2305.17455" in [identifier["value"] for identifier in paper["identifiers"]]
