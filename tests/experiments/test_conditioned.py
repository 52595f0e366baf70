"""Merging that knows the text: scores against loops, runs from end to end, and the page held to its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from experiments.conditioned import report, run
from experiments.conditioned.presets import PRESETS
from experiments.lib.files import read_results, unpack


@pytest.mark.parametrize(("target", "known"), [("own", [0, 1, 2, 3]), ("other", [2, 3, 0, 1])])
def test_every_pair_is_scored_while_the_merging_knows_its_text(target: Any, known: list[int]) -> None:
    """What is seen of the photographs here is the text looked for itself, so that scores tell which it was."""
    texts = torch.eye(4)
    seen: list[Tensor] = []

    def encode(against: Tensor) -> Tensor:
        return (seen[-1] @ against.T).expand(3, -1)

    cosines = run.score(encode, seen.append, texts, target)
    expected = [float(texts[looked_for] @ texts[own]) for own, looked_for in enumerate(known)]
    assert cosines.tolist() == [expected] * 3
    assert len(seen) == 4


def test_the_mean_of_all_texts_is_looked_for_once() -> None:
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(5, 8), dim=1)
    seen: list[Tensor] = []
    run.score(lambda against: against[:, :1].T, seen.append, texts, "all")
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], F.normalize(texts.mean(0), dim=0))


def test_what_cosines_say() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.5]])
    result = run.measure(cosines, torch.tensor([0, 1]), 10.0, both_ways=False)
    assert (result["text"]["right"], result["text"]["accuracy"], "photo" in result) == ("10", 50, False)
    losses = [-float((10 * row).log_softmax(0)[right]) for row, right in zip(cosines, (0, 1), strict=True)]
    assert unpack(result["text"]["losses"]) == pytest.approx(losses, rel=1e-3)
    square = run.measure(cosines[:, :2], torch.arange(2), 10.0, both_ways=True)
    assert (square["photo"]["right"], square["text"]["right"]) == ("11", "10")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small CLIP, random, and photographs with captions and classes."""
    from experiments.retrieval.models import load_clip
    from experiments.retrieval.run import save_weights

    folder = tmp_path_factory.mktemp("conditioned")
    torch.manual_seed(0)
    save_weights(load_clip("small"), folder / "dense.safetensors")
    entries = []
    for number in range(4):
        noise = (torch.rand(24, 24, 3, generator=torch.Generator().manual_seed(number)) * 255).byte().numpy()
        for split in ("train", "test"):
            place = folder / "classes" / split / f"thing_{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(place / f"{number}.png")
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / "photos" / f"{number}.png")
        entries.append({"filename": f"{number}.png", "split": "test", "sentences": [{"raw": f"caption {number}"}]})
    (folder / "captions.json").write_text(json.dumps({"images": entries}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["captions", "classes"])
def test_from_photographs_to_a_table(clip: Path, task: Any, tmp_path: Path) -> None:
    given = {"images": clip / "photos", "annotations": clip / "captions.json"}
    options: dict[str, Any] = {
        "task": task, "weights": clip / "dense.safetensors", "r": (4,), "results": tmp_path,
        **(given if task == "captions" else {"images": clip / "classes"}),
    }  # fmt: skip
    presets = ("dense", "tome", "crossget_own", "crossget_other", "ward_all")
    assert run.STUDY.run(run.Options(**options, presets=presets)) == 5
    assert run.STUDY.run(run.Options(**options, presets=presets)) == 0
    contents = read_results(tmp_path)
    rows = report.rows_of(contents, task)
    for name in presets[1:]:
        row = rows[name, 4]
        assert row["tokens"][0] - row["tokens"][1] == 4
        assert row["gflops"]["reduced"] < 0.6 * row["gflops"]["dense"]
    losses = {name: row["text"]["losses"] for (name, _), row in rows.items()}
    assert len(set(losses.values())) == 5, "texts and methods must change what is merged"
    text = report.generated(contents)
    assert PRESETS["crossget_own"].label in text
    assert "4 photographs" in text


def test_captions_need_annotations(clip: Path) -> None:
    options = run.Options("captions", clip / "photos", clip / "dense.safetensors", results=clip / "none")
    with pytest.raises(ValueError, match="--annotations"):
        run.STUDY.run(options)
