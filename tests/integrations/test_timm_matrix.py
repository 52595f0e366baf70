"""Every name of timm: either it is reduced, on the meta device and without weights, or the reason why not is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import crossget
from contract import identity
from crossget.integrations import timm as adapter
from crossget.integrations._support import markdown
from crossget.methods.schedules import planned_tokens

pytestmark = pytest.mark.slow
VERSION = "1.0.31"  # of the page in experiments/models
KNOWN = {*adapter.REASONS, adapter.NO_ATTENTION}


def shapes(model: nn.Module) -> object:
    size = model.pretrained_cfg["input_size"]
    with torch.device("meta"), torch.no_grad():
        out = model(torch.empty(2, *size))
    return tree_map_only(torch.Tensor, lambda x: tuple(x.shape), out)


@pytest.mark.parametrize("name", timm.list_models())
def test_name(name: str) -> None:
    (row,) = adapter.support_matrix(name)
    if not row.supported:
        assert row.reason in KNOWN
        assert row.towers == ()
        return
    if row.towers[0] in adapter.FOUND:  # nothing runs on the meta device: see test_found_in_a_forward
        assert row.towers == (adapter.found_in_forward(adapter.skeleton(name)),)
        return
    model = adapter.skeleton(name).eval()
    dense, before = shapes(model), identity(model)
    with crossget.attach(model, crossget.CrossGET(8)) as attached:
        assert shapes(model) == dense
        assert_planned(attached)
        attached.reducer = crossget.ToMe(crossget.Linear(400, 0))  # more than the matching may take
        assert shapes(model) == dense
        assert_planned(attached)
    assert identity(model) == before


def assert_planned(attached: crossget.Attachment) -> None:
    tower, reducer, tokens = attached.towers["visual"], attached.reducers["visual"], attached.tokens["visual"]
    reserved = tower.prefix + bool(reducer.cross_token)
    plan = planned_tokens(reducer.schedule, len(tower.blocks), tokens[0], reserved)
    assert tokens == plan[:-1]
    assert plan[-1] < plan[0]


@pytest.mark.parametrize(
    ("name", "blocks", "prefix"),
    [
        ("convit_tiny", {"visual": 2}, 1),
        ("crossvit_9_240", {"visual.0": 3, "visual.1": 3, "visual.2": 3}, 1),
        ("hiera_base_224", {"visual.0": 15, "visual.1": 2}, 0),
        ("levit_128s", {"visual.0": 2, "visual.1": 3, "visual.2": 4}, 0),
        ("levit_256d", {"visual.0": 4, "visual.1": 8, "visual.2": 6}, 0),
        ("mobilevit_xxs", {"visual.0": 2, "visual.1": 4, "visual.2": 3}, 0),
        ("pit_ti_224", {"visual.0": 2, "visual.1": 6, "visual.2": 4}, 1),
        ("pit_ti_distilled_224", {"visual.0": 2, "visual.1": 6, "visual.2": 4}, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.* has no adapter:UserWarning")
def test_found_in_a_forward(name: str, blocks: dict[str, int], prefix: int) -> None:
    """One name of each class without adapter, with real forwards. Noise is on all parameters: zeros prove nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    assert adapter.found_in_forward(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        with crossget.attach(model, crossget.CrossGET(2)) as attached:
            assert {name: len(tower.blocks) for name, tower in attached.towers.items()} == blocks
            assert {tower.prefix for tower in attached.towers.values()} == {prefix}
            model(torch.randn(2, *model.pretrained_cfg["input_size"]))
            for tower, tokens in attached.tokens.items():
                assert tokens == [tokens[0] - 2 * layer for layer in range(blocks[tower])]


def test_every_name_has_a_row_and_the_page_is_up_to_date() -> None:
    rows = list(adapter.support_matrix())
    assert [row.name for row in rows] == timm.list_models()
    assert all(row.towers for row in rows if row.supported)
    if timm.__version__ != VERSION:  # the page is about one version
        return
    found = sum(row.towers[0] in adapter.FOUND for row in rows if row.supported)
    assert (sum(row.supported for row in rows), found) == (375, 43)
    page = (Path(__file__).parents[2] / "experiments" / "models" / "timm.md").read_text()
    assert f"timm {VERSION}:" in page
    assert page.endswith(markdown(rows)), "write markdown(support_matrix()) to its end again"
