"""Every class of transformers that has an adapter, by the default values of its configuration, on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from crossget.core.adapters import FAMILIES
from crossget.integrations import transformers as matrix
from crossget.integrations._support import markdown

pytestmark = pytest.mark.slow
VERSION = "5.24.0"  # of the page in experiments/models


def test_every_row_is_supported_or_has_a_known_reason() -> None:
    rows = list(matrix.support_matrix())
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.supported == bool(row.towers)
        assert row.supported or row.reason in matrix.REASONS or row.reason.startswith(matrix.NO_DEFAULT)


def test_a_pattern() -> None:
    rows = list(matrix.support_matrix("LlavaFor*"))
    assert [row.name for row in rows] == ["LlavaForConditionalGeneration"]
    assert rows[0].towers[1].endswith("generates: cross token only")


@pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the page is about transformers {VERSION}")
def test_the_page_is_up_to_date() -> None:
    rows = list(matrix.support_matrix())
    architectures = {row.architecture for row in rows if row.supported}
    assert len(architectures) == 55
    assert all(matrix._home(family) is not None for family in FAMILIES)
    page = (Path(__file__).parents[2] / "experiments" / "models" / "transformers.md").read_text()
    assert f"transformers {VERSION}:" in page
    assert page.endswith(markdown(rows)), "write markdown(support_matrix()) to its end again"
