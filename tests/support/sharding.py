"""What the two processes of test_sharding.py run.

A spawned process imports this by name, which the tests' own modules, loaded by path, do not promise to have.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hf_models
import torch
from torch import Tensor, nn

import crossget

WORLD = 2


class Task(nn.Module):
    """Both towers, and a loss that depends on every cross token."""

    def __init__(self) -> None:
        import open_clip  # here, as processes without it start sooner

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
