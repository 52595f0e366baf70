"""The counts of published models: the committed results, the page they are on, and counting them again."""

from __future__ import annotations

import dataclasses
import json

import hf_models
import pytest

from experiments.flops import run
from experiments.flops.run import CONNECTOR_RUNS, RUNS, STUDY, Options, execute, table


def committed() -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(run.RESULTS.glob("*.json"))]


def test_every_run_has_its_result() -> None:
    assert {file.stem for file in run.RESULTS.glob("*.json")} == {one.slug for one in (*RUNS, *CONNECTOR_RUNS)}


# One share of each model, as the dense model is counted with every one.
COUNTED_AGAIN = [*RUNS, *(one for one in CONNECTOR_RUNS if one.keep == 0.25)]


@pytest.mark.slow
@pytest.mark.skipif(hf_models.VERSION < (5, 0), reason="transformers runs no language model on meta before 5.0")
@pytest.mark.parametrize("one", COUNTED_AGAIN, ids=lambda one: one.slug)
def test_counting_again_gives_the_same(one: run.Run) -> None:
    if isinstance(one, run.ConnectorRun) and hf_models.VERSION < (5, 19):
        pytest.skip("connectors are reduced from transformers 5.19 on")
    found = json.loads((run.RESULTS / f"{one.slug}.json").read_text())
    assert execute(one) == {"run": found["run"], "result": found["result"]}
    assert found["run"] == dataclasses.asdict(one)


def test_nothing_is_counted_twice_and_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert STUDY.run(Options()) == 0
    assert capsys.readouterr().out.strip() == table(committed())
