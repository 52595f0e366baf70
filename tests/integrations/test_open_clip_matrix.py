"""Every configuration of open_clip, built and run on the meta device: shapes and plans, without weights and network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import hf_model
from torch import nn

import contract
import crossget
from crossget.integrations import open_clip as adapter
from crossget.integrations._support import markdown
from crossget.methods.schedules import planned_tokens

pytestmark = pytest.mark.slow

R = {"visual": 5, "text": 2}


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(hf_model.AutoConfig, "from_pretrained", adapter.hub_config)
    # transformers looks whether a mask hides anything, to leave it away: on the meta device nobody can look.
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False)
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", pretrained_hf=False).eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    context = min(77, getattr(model, "context_length", None) or model.text.context_length or 77)
    return {
        "visual": torch.empty(2, 3, height, width, device="meta"),
        "text": torch.zeros(2, context, dtype=torch.long, device="meta"),
    }


def encode(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Size]:
    with torch.no_grad():
        return [model.encode_image(given["visual"]).shape, model.encode_text(given["text"]).shape]


@pytest.mark.parametrize("name", open_clip.list_models())
def test_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, monkeypatch)
    given, before = inputs(model), contract.identity(model)
    shapes = encode(model, given)
    towers = {tower.name for tower in crossget.find_towers(model)}
    assert towers == {"visual", "text"} - adapter.absent(model).keys()
    with crossget.attach(model, {tower: crossget.CrossGET(r=R[tower]) for tower in towers}) as attached:
        assert encode(model, given) == shapes
        assert attached.tokens.keys() == towers
        for tower, tokens in attached.tokens.items():
            about, reducer = attached.towers[tower], attached.reducers[tower]
            plan = planned_tokens(reducer.schedule, len(about.blocks), tokens[0], about.n_reserved(True))
            assert tokens == plan[:-1]
            assert plan[-1] < plan[0]
            source = attached.source[tower]
            assert tuple(source.shape) == (2, tokens[0] - 1)
    assert contract.identity(model) == before


def test_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in adapter.support_matrix()}
    assert list(rows) == open_clip.list_models()
    assert all(row.supported for row in rows.values())
    pictured = [row for row in rows.values() if any(tower.startswith("visual:") for tower in row.towers)]
    assert all(row.reason.startswith("visual: ") for row in rows.values() if row not in pictured)
    assert all(any(tower.startswith("text:") for tower in row.towers) for row in rows.values())
    if len(rows) == 144:  # open_clip 3.3
        assert len(pictured) == 116
        page = (Path(__file__).parents[2] / "experiments" / "models" / "open_clip.md").read_text()
        assert page.endswith(markdown(rows.values())), "write markdown(support_matrix()) to its end again"
    made: nn.Module = build("mt5-base-ViT-B-32", monkeypatch)
    assert rows["mt5-base-ViT-B-32"].towers == tuple(map(str, crossget.find_towers(made)))
