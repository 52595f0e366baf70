"""The program that times operators, run whole on small ones: what it measures, not how fast it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from experiments.lib.files import read_results
from experiments.speed.operators import STUDY, Options, Run, pairs, table

SMALL = Run(batch=2, tokens=40, width=96, dtype="float32", rounds=2)


@pytest.mark.parametrize(
    "choice",
    ["rank", "norms: of the keys", "sources", "rows", "sizes: a mask instead of wider heads", "product of keys: all"],
)
def test_both_sides_compute_the_same(choice: str) -> None:
    (found,) = (pair for name, pair in pairs(SMALL).items() if name.startswith(choice))
    one, other = (side() for side in found)
    assert isinstance(one, Tensor)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.6", reason="FlexAttention runs on CPUs from torch 2.6 on")
def test_so_does_flex_attention() -> None:
    torch._dynamo.reset()
    # On 40 tokens with heads of 8 channels torch 2.14's kernel for CPUs gives wrong numbers.
    run = replace(SMALL, tokens=64, width=192)
    with torch.no_grad():
        one, other = (side() for side in pairs(run, flex=True)["sizes: a mask instead of FlexAttention"])
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_every_choice_is_timed(tmp_path: Path) -> None:
    options = Options(batch=2, tokens=40, width=96, rounds=2, flex=False, results=tmp_path)
    assert STUDY.run(options) == 2
    assert STUDY.run(options) == 0
    contents = read_results(tmp_path)
    for content in contents:
        assert [row["choice"] for row in content["result"]["rows"]] == list(pairs(SMALL))
        assert content["result"]["operators"] > 50
        assert content["command"].endswith("speed-operators --batch 2 --tokens 40 --width 96 --dtype "
                                           f"{content['run']['dtype']} --rounds 2 --no-flex")  # fmt: skip
    assert len(table(contents).splitlines()) == 2 + 2 * len(pairs(SMALL))
