"""Agreement of patch features: measured against loops, run from end to end, and the page held to its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from experiments.ablation.settings import vit_cifar
from experiments.dense import report, run
from experiments.lib.files import read_results, unpack


def test_agreement_is_what_loops_say() -> None:
    torch.manual_seed(0)
    dense = torch.randn(3, 5, 4)
    features = dense + 0.8 * torch.randn(3, 5, 4)
    found = run.agreement(features, dense)
    for image in range(3):
        cosines = [[float(F.cosine_similarity(a, b, 0)) for b in dense[image]] for a in features[image]]
        own = [row[i] for i, row in enumerate(cosines)]
        assert unpack(found["cosines"])[image] == pytest.approx(sum(own) / 5, rel=1e-3)
        nearest = [row.index(max(row)) == i for i, row in enumerate(cosines)]
        assert unpack(found["withins"])[image] == pytest.approx(sum(nearest) / 5, rel=1e-3)
    assert run.agreement(dense, dense)["within"] == 100


def test_from_images_to_a_table(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(vit_cifar().state_dict(), weights)
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        noise = (torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(label)) * 255).byte().numpy()
        Image.fromarray(noise).save(tmp_path / "data" / str(label) / "0.png")
    options: dict[str, Any] = {"setting": "cifar10", "data": tmp_path / "data", "weights": weights, "r": (0, 8)}
    results = tmp_path / "results"
    assert run.STUDY.run(run.Options(**options, methods=("tome", "crossget"), results=results)) == 4
    assert run.STUDY.run(run.Options(**options, methods=("tome", "crossget"), results=results)) == 0
    contents = read_results(results)
    exact = next(c["result"] for c in contents if (c["run"]["method"], c["run"]["r"]) == ("tome", 0))
    assert (exact["cosine"], exact["within"]) == (1, 100)
    text = report.generated(contents)
    assert "10 images" in text
    assert "1.000" in text
