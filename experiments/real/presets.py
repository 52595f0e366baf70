"""The rows: which method, and how its tokens are shared out among the blocks; `crossget.fit_schedule` fits each."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

import crossget
from crossget import Aligned, Random, ToMe, TopK, Ward
from crossget.methods.reducers import Reducer
from experiments.ablation.presets import FULL, UNTRAINED

BUDGETS = (50, 69, 58, 80)
"""Multiply-adds, in % of the dense model's."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: how tables call it.
        method: what is attached, at r = 0; None: nothing.
        distribution: of `crossget.fit_schedule`: the method's own, which no image decides.
        multiple: the tokens left behind a block are a multiple of this number.
    """

    label: str
    method: Reducer | None
    distribution: Literal["constant", "ramped"] = "constant"
    multiple: int = 1


WARD = Ward(0)
READING = replace(WARD, importance="class_attention")

ROWS: dict[str, Row] = {
    "dense": Row("dense", None),
    "tome": Row("ToMe", ToMe(0)),
    "bipartite": Row("bipartite, keys of all heads", replace(UNTRAINED, matching="bipartite", ensemble="size")),
    "complete_graph": Row("+ complete graph", replace(UNTRAINED, ensemble="size")),
    "guided_ensemble": Row("+ guided ensemble", UNTRAINED),
    "crossget": Row("+ cross token, guided matching: CrossGET", FULL),
    "ward": Row("Ward", WARD, "ramped"),
    "ward_reading": Row("Ward by class attention", READING, "ramped"),
    "topk": Row("TopK, by the class token's query", TopK(0)),
    "random": Row("Random", Random(0)),
    "tome_skip": Row("ToMe, class token only", ToMe(0, class_token_only=True)),
    "topk_attention": Row("TopK, by class attention", TopK(0, importance="class_attention")),
    "tome_aligned": Row("ToMe, multiples of 16 tokens", ToMe(0), multiple=16),
    "ward_aligned": Row("Ward, multiples of 16 tokens", WARD, "ramped", multiple=16),
}


def fit(model: nn.Module, one: Tensor, row: Row, budget: int) -> Reducer:
    """Return the row's reducer at a budget.

    Args:
        model: not attached.
        one: [1, 3, H, W], which gives the shapes only.
        row: not the dense model.
        budget: multiply-adds, in % of the dense model's.
    """
    share = budget / 100
    while True:
        fitted = crossget.fit_schedule(model, one, flops=share, reducer=row.method, distribution=row.distribution)
        assert isinstance(fitted.reducer, Reducer)
        if row.multiple == 1:
            return fitted.reducer
        aligned = replace(fitted.reducer, r=Aligned(fitted.schedule, row.multiple))
        with crossget.attach(model, aligned):
            flops = crossget.count_flops(model, one)
        if flops.total <= budget / 100 * flops.dense.total:
            return aligned
        share -= 0.002  # steps to multiples keep more than the schedule that they follow
