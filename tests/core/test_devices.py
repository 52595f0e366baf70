"""Blocks of one tower on several devices, and weights that come and go. The meta device stands for a second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import crossget

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REDUCERS = [crossget.CrossGET(8), crossget.ToMe(8), crossget.Ward(8)]


def small() -> Any:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IMAGE)
    return out


def move_to_meta(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    moved = [value.to("meta") if isinstance(value, Tensor) else value for value in args]
    return tuple(moved), kwargs


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_the_state_follows_tokens_to_another_device(reducer: Any) -> None:
    model = small().eval()
    model.norm.to("meta")
    model.head.to("meta")
    for block in model.blocks[2:]:
        block.to("meta")
        block.register_forward_pre_hook(move_to_meta, with_kwargs=True)
    with crossget.attach(model, reducer) as attached:
        assert logits(model).shape == (2, 5)
        first = 65 + int(reducer.cross_token)
        assert attached.tokens["visual"] == [first, first - 8, first - 16, first - 24]
        assert attached.source["visual"].is_meta


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_weights_that_are_loaded_for_the_time_of_a_block(reducer: Any, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small().eval()
    with crossget.attach(model, reducer):
        expected = logits(model)
        if where == "memory":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        torch.testing.assert_close(logits(model), expected)  # not bit for bit: Ward's last block computes all tokens
    with crossget.attach(model, reducer) as attached:  # the order of from_pretrained(device_map=...)
        torch.testing.assert_close(logits(model), expected)
        assert not any(vectors.is_meta for vectors in attached.parameters())
