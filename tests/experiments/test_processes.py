"""Programs of several processes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.lib import processes


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # a machine need not find its own name in the network
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    if processes.are_grouped():
        torch.distributed.destroy_process_group()


@processes.ending_group
def program(divisor: int) -> int:
    processes.wait_for_everyone()
    return 6 // divisor


@pytest.mark.usefixtures("group")
def test_a_program_ends_the_group_of_its_processes() -> None:
    assert processes.are_grouped()
    assert program(2) == 3
    assert not processes.are_grouped()


@pytest.mark.usefixtures("group")
def test_a_program_that_fails_does_not_wait_for_the_others() -> None:
    with pytest.raises(ZeroDivisionError):
        program(0)
    assert processes.are_grouped()


@pytest.mark.parametrize("name", ["llava.train", "retrieval.pretrain"])
def test_a_program_that_trains_and_is_no_study_ends_its_group(name: str) -> None:
    main = importlib.import_module(f"experiments.{name}").main
    assert main.__code__ is program.__code__, "it is not what ending_group makes of a main"


def test_without_a_group_there_is_nothing_to_end() -> None:
    assert program(divisor=3) == 2
