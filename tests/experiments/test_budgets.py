"""The experiment on budgets: small runs of it, and the page that its results make."""

from pathlib import Path

import pytest
import torch

from experiments.ablation.settings import Images
from experiments.budgets.run import RESULTS, STUDY, Options, grid, split
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
    runs = grid(options)
    assert [run.slug for run in runs] == [
        "imagenet/crossget_flops_50", "imagenet/tome_flops_50", "imagenet/crossget_latency_80",
        "imagenet/crossget_latency_60",
    ]  # fmt: skip
    assert STUDY.command(options, runs[1]) == (
        "python -m experiments.run budgets --setting imagenet --data photos --weights w.safetensors --methods tome "
        "--shares 0.5 --latencies"
    )
    with pytest.raises(ValueError, match="unknown methods"):
        grid(Options("imagenet", Path("a"), methods=("pitome",)))


def test_a_fitted_schedule_keeps_its_budget_and_is_no_worse() -> None:
    for result in read_results(RESULTS):
        if result["run"]["budget"] == "flops":
            fitted, even = (result["result"][name] for name in ("measured", "constant"))
            worse = paired_bootstrap(
                *(unpack(entry["accuracy"]["divergences"]) for entry in (fitted, even)), resamples=1000
            )
            assert worse.low <= 0
            assert max(fitted["fit"]["measured"], even["fit"]["measured"]) <= result["run"]["share"]
