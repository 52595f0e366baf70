"""Models of transformers: classes with an adapter at their default sizes, and tiny models of every family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import transformers

from crossget.core.adapters import FAMILIES
from crossget.demo import isolated, tiny_transformers, transformers_models
from crossget.demo.transformers_models import Row
from crossget.integrations import transformers as adapters
from tests.support.commits import commit

PAGE = (Path(__file__).parents[2] / "experiments/models/transformers.md").read_text(encoding="utf-8")
SAMPLE = 20  # families


def sample(version: str, supported: list[tuple[str, str]]) -> list[str]:
    """Families that the page lists as supported, other ones for every commit.

    The tiny configurations are made for the page's version. With another one, a family counts if it is there and has an
    adapter.
    """
    there = tiny_transformers.families()
    known = {family for family, _ in supported if family in there}
    if transformers.__version__ != version:
        known &= set(FAMILIES)
    return random.Random(commit()).sample(sorted(known), min(SAMPLE, len(known)))


@pytest.mark.slow
def test_classes_with_an_adapter() -> None:
    rows = list(adapters.support_matrix())
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.supported == bool(row.towers)
        assert row.supported or row.reason.startswith(adapters.NO_DEFAULT)
    if transformers.__version__ == transformers_models.listed(PAGE)[0]:
        assert len([row for row in rows if row.supported]) == 55
        assert all(f"| `{row.name}` | {'; '.join(row.towers)} |" in PAGE for row in rows), "write the page again"


@pytest.mark.slow
def test_a_pattern() -> None:
    rows = list(adapters.support_matrix("LlavaFor*"))
    assert [row.name for row in rows] == ["LlavaForConditionalGeneration"]
    assert rows[0].towers[1].endswith("generates: cross token only")


@pytest.mark.slow
def test_no_family_of_the_page_is_lost() -> None:
    version, supported = transformers_models.listed(PAGE)
    families = sample(version, supported)
    rows = {(row.family, row.name): row for row in transformers_models.support_matrix(only=families)}
    expected = [key for key in supported if key[0] in families and key in rows]
    if transformers.__version__ != version:  # where a part of a family cannot be built or called, its other parts count
        expected = [key for key in expected if rows[key].called]
    assert {family for family, _ in expected} == set(families), "the page lists classes that are not examined"
    assert {key: rows[key].reason for key in expected if not rows[key].proved} == {}


@pytest.mark.slow
def test_a_model_that_takes_too_long_gives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "SECONDS", 0.0)
    (row,) = transformers_models.support_matrix("ViTModel", only=["vit"])
    assert row.reason == "it took longer than 0 s"
    assert not row.support().supported


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [
        Row("vit", "ViTModel", True, "forward(pixel_values): images", {"visual: blocks, prefix 1": ""}, {}, ""),
        Row("swin", "SwinModel", True, "forward(pixel_values): images", {}, {"encoder": "an image grid"}, ""),
        Row("new", "", cause="ModuleNotFoundError: No module named 'new'"),
        Row("mae", "MaeModel", True, "forward(pixel_values): images", {"visual: blocks": "r=0 is not exact"}, {}, ""),
    ]
    page = transformers_models.markdown(rows, [])
    assert transformers_models.listed(page) == (transformers.__version__, [("vit", "ViTModel")])
    assert "1 of 4 classes can be reduced, in 1 of 4 families." in page
    assert "| swin | `SwinModel` | forward(pixel_values): images | encoder: an image grid |" in page
    assert "| new |  |  | ModuleNotFoundError: No module named 'new' |" in page
    assert "visual: blocks: r=0 is not exact" in page
