"""The experiment on budgets: small runs of it, and the page that its results make."""

from pathlib import Path

import pytest
import torch

from experiments.ablation.settings import Images
from experiments.budgets import report
from experiments.budgets.run import Options, command_of, queue, split
from experiments.lib import tables
from experiments.lib.files import read_results, unpack
from experiments.lib.statistics import paired_bootstrap


def test_images_to_fit_on_are_not_measured_on() -> None:
    images = Images(torch.arange(20.0).view(20, 1), torch.arange(20), {})
    seen, others = split(images, 5)
    assert seen.flatten().tolist() == [0, 4, 8, 12, 16]
    assert sorted([*seen.flatten().tolist(), *others.pixels.flatten().tolist()]) == list(range(20))
    assert torch.equal(others.pixels.flatten().long(), others.labels)


def test_the_queue_and_its_commands() -> None:
    options = Options("imagenet", Path("a/photos"), weights=Path("b/w.safetensors"), shares=(0.5,))
    runs = queue(options)
    assert [run.slug for run in runs] == [
        "imagenet/crossget_flops_50", "imagenet/tome_flops_50", "imagenet/crossget_latency_80",
        "imagenet/crossget_latency_60",
    ]  # fmt: skip
    assert command_of(options)(runs[1]) == (
        "python -m experiments.budgets.run --setting imagenet --data photos --weights w.safetensors --batch 50 "
        "--methods tome --fitted-on 32 --shares 0.5 --latencies"
    )
    with pytest.raises(ValueError, match="unknown methods"):
        queue(Options("imagenet", Path("a"), methods=("pitome",)))


def test_the_page_is_what_the_results_make_and_fitted_is_no_worse() -> None:
    results = read_results(report.HERE / "results")
    page = report.PAGE.read_text(encoding="utf-8")
    assert page.split(tables.BEGIN)[1].split(tables.END)[0].strip() == report.generated(results)
    for result in results:
        if result["run"]["budget"] == "flops":
            fitted, even = (result["result"][name] for name in ("measured", "constant"))
            worse = paired_bootstrap(
                *(unpack(entry["accuracy"]["divergences"]) for entry in (fitted, even)), resamples=1000
            )
            assert worse.low <= 0
            assert max(fitted["fit"]["measured"], even["fit"]["measured"]) <= result["run"]["share"]
