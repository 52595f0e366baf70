"""Training on two processes: cross tokens under DDP and FSDP2 get the gradients that one process gives them.

Beside them, in one process: hooks that put other tensors of the same tokens in the place of those that a block gets and
returns, as the hooks of FSDP2 and of DeepSpeed's ZeRO-3 do.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor, nn

import crossget

open_clip = pytest.importorskip("open_clip")

WORLD = 2


class Task(nn.Module):
    """Both towers, and a loss that depends on every cross token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
        self.model: Any = open_clip.CLIP(16, vision, text)
        self.model.logit_scale = nn.Parameter(torch.ones(1))  # FSDP2 shards no scalars
        both = {"visual": crossget.CrossGET(r=2), "text": crossget.CrossGET(r=1)}
        self.attached = crossget.attach(self.model, both)
        self.attached.register_parameters(self.model)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        image, text = self.model.encode_image(pixels), self.model.encode_text(ids)
        return self.model.logit_scale[0] * (image * text).sum(1).mean() + self.attached.alignment_loss()


class Answers(nn.Module):
    """A LLaVA with both of its losses in one forward."""

    def __init__(self) -> None:
        super().__init__()
        hf_models = pytest.importorskip("hf_models")
        torch.manual_seed(0)
        self.model: Any = hf_models.llava().train()
        for name, parameter in self.model.named_parameters():  # some of the tower's are not used, which DDP minds
            parameter.requires_grad_("vision_tower" not in name)
        self.attached = crossget.attach(self.model, crossget.CrossGET(r=2))
        self.attached.register_parameters(self.model)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, pixel_values=pixels, labels=ids).loss
        total: Tensor = loss + self.attached.alignment_loss()
        return total


def checkpoint(task: Any) -> None:
    if isinstance(task, Task):
        task.model.set_grad_checkpointing()
        return
    kind = "activation" if hasattr(task.model, "activation_checkpointing_enable") else "gradient"
    getattr(task.model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})


def batch_of(task: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Four pairs."""
    if task is Task:
        return batch()
    hf_models = pytest.importorskip("hf_models")
    return hf_models.images(4), hf_models.prompts("^#ab", "^#cd", "^#ae", "^#fb")[0]


def batch() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (4, 8), generator=chance)
    ids[:, -1] = 49
    return torch.randn(4, 3, 32, 32, generator=chance), ids


def gradients(task: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in task.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            found[name.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    return found


def train(rank: int, host: type[nn.Module], kind: str, checkpointing: bool, folder: Path) -> None:
    """One of the processes: a forward and a backward of its half of the batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    task: Any = host()
    if checkpointing:
        checkpoint(task)
    if kind == "ddp":
        task = nn.parallel.DistributedDataParallel(task)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for tower in task.attached.towers.values():
            for block in tower.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(task, mesh=mesh)
        assert hasattr(task.model.crossget.visual, "full_tensor"), "cross tokens are sharded like the rest"
    pixels, ids = batch_of(host)
    half = slice(2 * rank, 2 * rank + 2)
    loss = task(pixels[half], ids[half])
    loss.backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    found = gradients(task)
    if rank == 0:
        torch.save({"loss": loss / WORLD, "gradients": found}, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# fully_shard is public from 2.6 on.
KINDS = ["ddp", "fsdp2"] if hasattr(torch.distributed.fsdp, "fully_shard") else ["ddp"]


# Older open_clip leaves the kind of checkpointing to torch's default, the re-entrant one, which is refused.
CHECKPOINTING = [False, True] if "use_reentrant" in inspect.getsource(open_clip.transformer) else [False]


# The one that has most in it first; all others are slow.
CASES = [(Answers, True), (Task, False), *[(Task, True)] * CHECKPOINTING[-1]]


@pytest.mark.parametrize(
    ("host", "checkpointing"), [CASES[0], *[pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]]
)
@pytest.mark.parametrize("kind", KINDS)
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
