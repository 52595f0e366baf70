"""What a program does of which several processes run, started by `accelerate launch` or `torchrun`."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def is_main() -> bool:
    """Return whether this is the process that evaluates and writes; also before training has set up anything.

    Not by Accelerate's PartialState: whoever asks it first sets up its device and its kind of processes for good.
    """
    return int(os.environ.get("RANK", "0")) == 0


def are_grouped() -> bool:
    """Return whether there is a group of processes: they train together, and it has not ended."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_everyone() -> None:
    """Wait until all processes are here."""
    if are_grouped():
        torch.distributed.barrier()


def ending_group(main: Callable[P, T]) -> Callable[P, T]:
    """Have a program's `main` end the group of processes, if one was made, as the last thing that it does.

    A process that exits before aborts now and then, with "terminate called without an active exception": one of the
    group's threads still drops its tensors, which takes the interpreter that is being taken down. After an exception
    the group is left as it is: ending it could wait for processes that do not answer, and the launcher stops them all.
    """

    @wraps(main)
    def ends(*args: P.args, **kwargs: P.kwargs) -> T:
        result = main(*args, **kwargs)
        if are_grouped():
            torch.distributed.destroy_process_group()
        return result

    return ends


class _Gather(torch.autograd.Function):
    """All processes' rows; the gradient of a process's rows is what all processes have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        torch.distributed.all_reduce(gradient)  # not reduce_scatter: gloo has none
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes [W * B, ..], with gradients: those of every process reach each row."""
    if not are_grouped():
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered
