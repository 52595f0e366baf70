"""Training on two processes: cross tokens under DDP and FSDP2 get the gradients that one process gives them.

Beside them, in one process: hooks that put other tensors of the same tokens in the place of those that a block gets and
returns, as the hooks of FSDP2 and of DeepSpeed's ZeRO-3 do.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed.fsdp
from sharding import WORLD, Answers, Task, batch_of, checkpoint, gradients, train
from torch import Tensor, nn

# fully_shard is public from 2.6 on. It is slow: that its hooks may exchange tensors is shown below, in one process.
FSDP2 = [pytest.param("fsdp2", marks=pytest.mark.slow)] if hasattr(torch.distributed.fsdp, "fully_shard") else []


# Older open_clip leaves the kind of checkpointing to torch's default, the re-entrant one, which is refused.
CHECKPOINTING = [False, True] if "use_reentrant" in inspect.getsource(open_clip.transformer) else [False]


# The one that has most in it first; all others are slow.
CASES = [(Answers, True), (Task, False), *[(Task, True)] * CHECKPOINTING[-1]]


@pytest.mark.parametrize(
    ("host", "checkpointing"), [CASES[0], *[pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]]
)
@pytest.mark.parametrize("kind", ["ddp", *FSDP2])
def test_two_processes_are_one(host: type[nn.Module], kind: str, checkpointing: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, (host, kind, checkpointing, tmp_path), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    task = host()
    loss = task(*batch_of(host))
    loss.backward()
    expected = gradients(task)
    torch.testing.assert_close(found["loss"], loss.detach())
    assert set(found["gradients"]) >= set(expected)
    assert {"model.crossget.visual", "model.crossget.text"} <= set(expected)
    for name, gradient in expected.items():
        same(found["gradients"][name], gradient, name)
    for name in ("visual", "text"):
        assert bool((expected[f"model.crossget.{name}"].abs().sum(1) > 0).all()), "every block's cross token learns"


def same(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda message: f"{name}: {message}")


def exchange(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Hooks on every block that exchange the tensors that go in and come out."""

    def other(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(other, value))
        return value.view_as(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    for block in blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: (other(args), {name: other(value) for name, value in kwargs.items()}),
            with_kwargs=True, prepend=True,
        )  # fmt: skip
        block.register_forward_hook(lambda block, args, out: other(out))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("host", [Task, Answers])
def test_hooks_may_exchange_what_blocks_get_and_return(host: type[nn.Module], checkpointing: bool) -> None:
    if checkpointing and host is Task and not CHECKPOINTING[-1]:
        pytest.skip("this open_clip's checkpointing is re-entrant, which is refused")
    task: Any = host()
    expected_loss = task(*batch_of(host))
    expected_loss.backward()
    expected, tokens = gradients(task), task.attached.tokens
    task = host()
    exchange(task, [block for tower in task.attached.towers.values() for block in tower.blocks])
    if checkpointing:
        checkpoint(task)
    loss = task(*batch_of(host))
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-6)
    assert task.attached.tokens == tokens
    found = gradients(task)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        same(found[name], gradient, name)
