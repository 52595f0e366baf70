"""The training loop on a toy: what is seen, accumulated, saved and gone on with."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")

import crossget
from crossget.core.training import parameter_groups
from experiments.lib import training
from experiments.lib.data import BadData, Draw, Skipping
from experiments.lib.training import Recipe, fit

timm = pytest.importorskip("timm")


class Numbers:
    """Samples that are nothing but what was drawn."""

    def __init__(self, size: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draw: Draw) -> Tensor:
        epoch, index = draw
        if index in self.bad:
            raise BadData(f"photo{index}.jpg is truncated")
        return torch.tensor([float(index), float(epoch)])


class Line(nn.Module):
    """Fits a line, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: list[list[float]] = []
        self.dies_at: int | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if len(self.seen) == self.dies_at:
            raise KeyboardInterrupt
        self.seen.append(x[:, 0].tolist())
        loss = ((x @ self.weight - x.sum(1) / 10) ** 2).mean()
        return {"loss": loss, "twice": 2 * loss}


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"x": torch.stack(samples) / 20}


def run(task: Line, data: Any = None, folder: Path | None = None, **recipe: Any) -> training.Fitted:
    settings: dict[str, Any] = {"epochs": 3, "batch": 4, "lr": 0.1, **recipe}
    groups = {"weights": list(task.parameters())}
    return fit(task, groups, Numbers() if data is None else data, collate, Recipe(**settings), folder)


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    task = Line()
    fitted = run(task, Numbers(22))
    epochs = [list(itertools.chain(*task.seen[i : i + 5])) for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)  # 22 samples make 5 batches of 4
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(fitted.history) == 3
    assert len(fitted.steps) == 15
    assert fitted.history[0]["loss"] == pytest.approx(sum(fitted.steps[:5]) / 5)
    assert fitted.history[2]["twice"] == pytest.approx(2 * fitted.history[2]["loss"])
    assert fitted.steps[-1] < fitted.steps[0]
    torch.testing.assert_close(fitted.state["weight"], task.weight.detach())


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    one, same, other = Line(), Line(), Line()
    assert run(one).steps == run(same).steps
    assert one.seen == same.seen
    run(other, seed=1)
    assert one.seen != other.seen


def test_accumulated_batches_are_one_large_batch() -> None:
    small, large = Line(), Line()
    run(small, batch=2, accumulate=2, optimizer="sgd", lr=0.01)
    run(large, batch=4, optimizer="sgd", lr=0.01)
    torch.testing.assert_close(small.weight, large.weight)
    assert list(itertools.chain(*small.seen)) == list(itertools.chain(*large.seen))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("save_every", "dies_at"), [(2, 8), (2, 7), (0, 8), (3, 3)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, save_every: int, dies_at: int, optimizer: Any
) -> None:
    whole = Line()
    expected = run(whole, save_every=save_every, optimizer=optimizer, schedule="cosine")
    task = Line()
    task.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        run(task, None, tmp_path, save_every=save_every, optimizer=optimizer, schedule="cosine")
    rest = Line()
    fitted = run(rest, None, tmp_path, save_every=save_every, optimizer=optimizer, schedule="cosine")
    assert 0 < len(rest.seen) < len(whole.seen)
    assert rest.seen == whole.seen[-len(rest.seen) :]
    torch.testing.assert_close(rest.weight, whole.weight, rtol=0, atol=0)
    assert fitted.steps == expected.steps[-len(fitted.steps) :]
    assert [epoch["loss"] for epoch in fitted.history] == pytest.approx([epoch["loss"] for epoch in expected.history])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    task = Line()
    run(task, None, tmp_path)
    again = Line()
    fitted = run(again, None, tmp_path)
    assert not again.seen
    torch.testing.assert_close(again.weight, task.weight)
    assert len(fitted.history) == 3


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_going_on_runs_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Line()
    task.dies_at = 8
    with pytest.raises(KeyboardInterrupt):
        run(task, None, tmp_path / "good", save_every=2)
    (checkpoint,) = (tmp_path / "good" / "checkpoints").iterdir()
    names = [path.name for path in checkpoint.iterdir()]
    assert not [name for name in names if name.startswith("custom_checkpoint")]
    pickles = [name for name in names if name.endswith((".pkl", ".bin"))]
    assert len(pickles) >= 2
    for name in (*pickles, "custom_checkpoint_0.pkl"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        torch.save(Evil(), tmp_path / name / "checkpoints" / checkpoint.name / name)
        with contextlib.suppress(Exception):  # versions of accelerate differ in what they say
            run(Line(), None, tmp_path / name, save_every=2)
    assert "code ran" not in capsys.readouterr().out
    rest = Line()
    run(rest, None, tmp_path / "good", save_every=2)
    assert len(rest.seen) == 15 - 8


@pytest.mark.parametrize(
    "change",
    [
        {"step": "6"},
        {"epoch": -1},
        {"batch": True},
        {"sums": [1]},
        {"history": {}},
        {"history": [{"loss": "1"}]},
        {"x": 1},
    ],
    ids=str,
)
def test_progress_that_is_none_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    good = {"epoch": 1, "batch": 1, "step": 6, "history": [{"loss": 0.5}], "sums": {"loss": 1}}
    file = tmp_path / "progress.json"
    file.write_text(json.dumps(good))
    assert training.Progress.read(file) == training.Progress(**good)
    file.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=f"{file} is not the progress of a run"):
        training.Progress.read(file)


def test_a_checkpoint_that_was_being_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "part-12").mkdir(parents=True)
    task = Line()
    run(task, None, tmp_path)
    assert len(task.seen) == 15
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-15"]


def test_bad_samples_stop_the_run_or_are_skipped_if_asked() -> None:
    data = Numbers(bad=(3,))
    with pytest.raises(BadData, match=r"photo3\.jpg is truncated"):
        run(Line(), data)
    task = Line()
    with pytest.warns(UserWarning, match=r"skipped: photo3\.jpg is truncated"):
        run(task, Skipping(data), epochs=1)
    assert pytest.approx(3 / 20) not in list(itertools.chain(*task.seen))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(BadData, match="no sample"):
        run(Line(), Skipping(Numbers(4, bad=(0, 1, 2, 3))))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x 16 .* 20 "):
        run(Line(), batch=16, accumulate=2)
    with pytest.raises(ValueError, match="accumulate=0"):
        Recipe(epochs=1, batch=1, lr=1, accumulate=0)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    task = Line()
    with torch.no_grad():
        task.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="in step 0"):
        run(task)


def test_parameters_outside_the_task_are_refused() -> None:
    with pytest.raises(ValueError, match="register_parameters"):
        fit(Line(), {"cross_tokens": [nn.Parameter(torch.zeros(1))]}, Numbers(), collate, Recipe(1, 4, 0.1))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine_by_epoch"}, [1, 1, 0.8536, 0.8536, 0.5, 0.5, 0.1464, 0.1464]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
        ({"schedule": "constant", "warmup": 2.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine_by_epoch", "warmup": 1.0, "warmup_lr": 1e-3}, [0.1, 0.1, 1, 1, 0.8536, 0.8536]),
        ({"schedule": "cosine", "warmup": 1.0}, [0.5, 1, 1, 0.9330, 0.75, 0.5, 0.25, 0.0670]),
    ],
)
def test_learning_rates(recipe: dict[str, Any], expected: list[float]) -> None:
    made = Recipe(epochs=4, batch=1, lr=0.01, **recipe)
    assert [made.factor(step, 2) for step in range(len(expected))] == pytest.approx(expected, abs=1e-4)


def test_learning_rates_by_name() -> None:
    task = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    recipe = Recipe(1, 1, 0.1, lr_factors={"a": 0.5, "": 2.0}, weight_decay=0.3)
    optimizer = training.build_optimizer(task, {"all": list(task.parameters())}, recipe)
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.05, 2), (0.2, 2)]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}


class Classify(nn.Module):
    """A small ViT of timm, reduced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
        )
        self.attached = crossget.attach(self.model, crossget.CrossGET(r=2))
        self.attached.register_parameters(self.model)
        self.kinds: list[torch.dtype] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pixels = (x[:, 0, None, None, None] + torch.arange(768.0).view(3, 16, 16)).sin()
        logits = self.model(pixels)
        self.kinds.append(self.model.blocks[0].attn.qkv(torch.zeros(1, 16)).dtype)
        return {"loss": nn.functional.cross_entropy(logits.float(), (x[:, 0] * 20).long() % 5)}


@pytest.fixture
def own_precision() -> Any:
    """Accelerate keeps one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"checkpointing": True}, {"workers": 1}, {"clip": 1e-3}])
def test_options_of_the_recipe(change: dict[str, Any], own_precision: None) -> None:
    plain, task = Classify(), Classify()
    results = []
    for one, options in ((plain, {}), (task, change)):
        recipe = Recipe(epochs=1, batch=4, lr=1e-3, **options)
        if options.get("precision"):
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(True)
        groups = parameter_groups(one.model, one.attached)
        results.append(fit(one, groups, Numbers(), collate, recipe))
    expected, found = results
    assert float(found.state["model.crossget.visual.0"].abs().sum()) > 0
    if "precision" in change:
        assert set(task.kinds) == {torch.bfloat16}
        assert found.steps == pytest.approx(expected.steps, rel=0.05)
    elif "clip" in change:
        # Adam's steps do not depend on the size of a gradient, unless it is clipped differently in each step.
        assert found.steps != expected.steps
    else:
        assert found.steps == pytest.approx(expected.steps, rel=1e-5)


def test_checkpointing_needs_a_model_that_can() -> None:
    with pytest.raises(ValueError, match="no part of Line"):
        run(Line(), checkpointing=True)


def test_tensorboard_reads_the_logs(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    task = Line()
    groups = {"weights": list(task.parameters())}
    fitted = fit(task, groups, Numbers(), collate, Recipe(1, 4, 0.1), tmp_path, trackers=["tensorboard"], name="toy")
    events = loading.EventAccumulator(str(tmp_path / "toy")).Reload()
    assert {"loss", "twice", "lr"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(fitted.steps)
