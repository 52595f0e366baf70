"""Parity with the reference implementation, on outputs that it gave (golden/) on a CPU.

Weights and inputs are not stored: each follows from its name and a seed by the rules in golden_inputs.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from golden_inputs import GOLDEN, array, weight
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

import crossget
from crossget.methods.importance import by_attention, by_guide
from crossget.methods.matching import Ties
from crossget.methods.reducers import Host, View
from experiments.retrieval.models import Clip
from experiments.retrieval.task import RetrievalTask

KINDS = json.loads((GOLDEN / "matching.json").read_text())
MATCHING = {name: case for cases in KINDS.values() for name, case in cases.items()}
MERGED = np.load(GOLDEN / "matching.npz")
CLIP = json.loads((GOLDEN / "clip.json").read_text())
OUTPUTS = np.load(GOLDEN / "clip.npz")
REDUCED = [name for name in CLIP["cases"] if name != "dense"]


# One reduction ------------------------------------------------------------------------------------------------------


def view_of(case: dict[str, Any]) -> View:
    batch, tokens, seed = case["n"], case["t"], case["seed"]
    keys, x = (array(name, (batch, tokens, case["c"]), seed) for name in ("keys", "tokens"))
    protected = torch.zeros(batch, tokens, dtype=torch.bool)
    protected[:, [0, -1]] = True
    if "h" in case:
        attention = array("logits", (batch, case["h"], tokens, tokens), seed).softmax(-1).mean(1)
        return View(x, keys[:, None], keys[:, None], by_attention(attention), None, protected, 2)
    queries = array("queries", (batch, tokens, case["c"]), seed)
    guide = torch.tensor(case["eot"]) if case["text"] else torch.full((batch,), tokens - 1)
    protected[torch.arange(batch), guide] = True
    n_protected, sizes = 3 if case["text"] else 2, torch.tensor(case["size"])
    return View(x, queries[:, None], keys[:, None], None, sizes, protected, n_protected, guide=guide)


def reducer_of(case: dict[str, Any], ties: Ties = "torch") -> crossget.CrossGET:
    importance = "attention" if "h" in case else "cross_token"
    return crossget.CrossGET(case["r"], ties=ties).resolved(Host("golden", importance=importance))


def importance_of(view: View) -> Tensor:
    if view.received is not None:
        return view.received
    assert view.guide is not None
    query = view.queries[:, 0].gather(1, view.guide[:, None, None].expand(-1, 1, view.queries.shape[-1]))
    return by_guide(view.keys[:, 0], view.keys[:, 0].norm(dim=-1).reciprocal(), query)


@pytest.mark.parametrize("name", MATCHING)
def test_reduction(name: str) -> None:
    case = MATCHING[name]
    view, reducer = view_of(case), reducer_of(case)
    reduced = reducer.reduce(view, case["r"])
    assert reduced is not None
    tokens, sizes, plan = reduced
    assert plan.source.tolist() == case["source"]
    assert plan.destination is not None
    assert plan.destination.tolist() == case["destination"]
    importance = importance_of(view)
    pair = torch.stack([importance.gather(1, plan.source), importance.gather(1, plan.destination)], -1)
    torch.testing.assert_close(pair.softmax(-1), torch.tensor(case["weight"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens, torch.from_numpy(MERGED[name]), rtol=0, atol=1e-5)
    torch.testing.assert_close(sizes, torch.tensor(case["out_size"]), rtol=0, atol=0)
    if case.get("eot_out") is not None:
        assert view.guide is not None
        assert plan.index.gather(1, view.guide[:, None])[:, 0].tolist() == case["eot_out"]


@pytest.mark.parametrize("name", [name for name, case in MATCHING.items() if case["t"] <= 16])
def test_stable_ties(name: str) -> None:
    """So few tokens the default sort orders stably, so that both rules for ties agree."""
    case = MATCHING[name]
    reduced = reducer_of(case, "stable").reduce(view_of(case), case["r"])
    assert reduced is not None
    assert reduced[2].destination is not None
    assert reduced[2].source.tolist() == case["source"]
    assert reduced[2].destination.tolist() == case["destination"]


def test_the_ties_matter() -> None:
    """Many tokens tell the two rules apart: what the test above compares is not the same for any order of ties."""
    case = MATCHING["vision_vitb16"]
    reduced = reducer_of(case, "stable").reduce(view_of(case), case["r"])
    assert reduced is not None
    assert reduced[2].source.tolist() != case["source"]
    assert reduced[0].shape == MERGED["vision_vitb16"].shape


# A whole CLIP -------------------------------------------------------------------------------------------------------


def build() -> nn.Module:
    c = CLIP["config"]
    vision = CLIPVisionCfg(
        layers=c["vision_layers"], width=c["vision_width"], head_width=64, patch_size=c["patch_size"],
        image_size=c["image_size"],
    )  # fmt: skip
    text = CLIPTextCfg(
        context_length=c["context_length"], vocab_size=c["vocab_size"], width=c["text_width"],
        heads=c["text_width"] // 64, layers=c["text_layers"],
    )  # fmt: skip
    return open_clip.CLIP(c["embed_dim"], vision, text, quick_gelu=True)


def weights() -> dict[str, Tensor]:
    return {name: weight(name, tuple(shape), CLIP["seed"]) for name, shape in CLIP["state_dict_shapes"].items()}


def inputs() -> tuple[Tensor, Tensor]:
    size = CLIP["config"]["image_size"]
    return array("images", (CLIP["batch"], 3, size, size), CLIP["seed"]), torch.tensor(CLIP["text"])


def load(model: nn.Module, folder: Path, case: dict[str, Any]) -> crossget.Attachment:
    torch.save({"model": weights()}, folder / "reference.pth")
    reducers = {"visual": crossget.CrossGET(case["rv"]), "text": crossget.CrossGET(case["rl"])}
    return crossget.load_reference(model, folder / "reference.pth", reducers)


def golden(name: str) -> Tensor:
    return torch.from_numpy(OUTPUTS[name])


def test_dense_features() -> None:
    model: Any = build().eval()
    model.load_state_dict({name: value for name, value in weights().items() if "cross_" not in name})
    images, texts = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), golden("dense.image"), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(texts), golden("dense.text"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REDUCED)
def test_features(name: str, tmp_path: Path) -> None:
    model: Any = build().eval()
    attached = load(model, tmp_path, CLIP["cases"][name])
    images, texts = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), golden(f"{name}.image"), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(texts), golden(f"{name}.text"), rtol=0, atol=1e-5)
    case, c = CLIP["cases"][name], CLIP["config"]
    patches = (c["image_size"] // c["patch_size"]) ** 2
    assert attached.tokens == {
        "visual": [patches + 2 - case["rv"] * i for i in range(c["vision_layers"])],
        "text": [c["context_length"] + 1 - case["rl"] * i for i in range(c["text_layers"])],
    }


@pytest.mark.parametrize("name", REDUCED)
def test_training(name: str, tmp_path: Path) -> None:
    """Through the training program's own code; every image is its own id, so the soft targets are the diagonal."""
    case = CLIP["cases"][name]
    model: Any = build()
    attached = load(model, tmp_path, case)
    attached.register_parameters(model)
    clip = Clip(model, model.encode_image, model.encode_text, lambda texts: torch.empty(0), 0, (), ())
    images, texts = inputs()
    losses = RetrievalTask(clip, attached).train()(images, texts, torch.arange(len(images)))
    assert float(losses["contrastive"].detach()) == pytest.approx(case["loss_contrastive"], rel=1e-5)
    assert float(losses["alignment"].detach()) == pytest.approx(case["loss_alignment"], rel=1e-5)
    losses["loss"].backward()
    for tower, parameter in attached.cross_tokens.items():
        expected = golden(f"{name}.grad.{tower}_cross").squeeze(0)
        torch.testing.assert_close(parameter.grad, expected, rtol=5e-5, atol=2e-6 * float(expected.abs().max()))
    found = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    assert found["visual.conv1.weight"] == pytest.approx(float(golden(f"{name}.grad.conv1_norm")), rel=5e-5)
    assert {key: found[key] for key in case["gradient_norms"]} == pytest.approx(case["gradient_norms"], rel=5e-5)
