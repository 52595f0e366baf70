"""Tokens that lose their state between two blocks: clones, moves, re-entrant gradient checkpointing."""

from __future__ import annotations

import copy
import gc
import threading
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import crossget

REDUCERS = [crossget.CrossGET((4, 0, 4, 0)), crossget.ToMe(4), crossget.Ward(4, class_token_only=False)]


class Cloning(timm.models.VisionTransformer):
    """A host that makes a new tensor of what each block returns, with or without gradient checkpointing."""

    clones, reentrant = True, None

    def forward_features(self, x: Tensor, **rest: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = x.clone() if self.clones else x
        out: Tensor = self.norm(x)
        return out


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = Cloning(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5).eval()
    vars(model).update(changes)
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_clones_between_blocks_change_nothing(reducer: Any) -> None:
    plain = small(clones=False)
    with torch.no_grad(), crossget.attach(plain, reducer) as attached:
        expected, tokens = plain(images()), attached.tokens
    model = small()
    with torch.no_grad(), crossget.attach(model, reducer) as attached:
        for _ in range(2):
            assert torch.equal(model(images()), expected)
            assert attached.tokens == tokens


@pytest.mark.parametrize("clones", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_gradients_with_checkpoints_are_those_without(reducer: Any, reentrant: bool, clones: bool) -> None:
    def gradients(model: Any) -> list[Tensor]:
        with crossget.attach(model, reducer) as attached:
            for vectors in attached.parameters():
                torch.nn.init.normal_(vectors, generator=torch.Generator().manual_seed(1))
            x = images().requires_grad_()
            (model(x) * torch.linspace(-1, 1, 5)).sum().backward()
            own = [vectors.grad for vectors in attached.parameters()]
        return [value for value in [x.grad, *own, *(p.grad for p in model.parameters())] if value is not None]

    expected = gradients(small(clones=False))
    found = gradients(small(clones=clones, reentrant=reentrant))
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_each_thread_finds_its_own_state() -> None:
    model = small()
    with crossget.attach(model, crossget.CrossGET(4)) as attached, torch.no_grad():
        expected = [model(images(seed)) for seed in range(4)]
        found: list[Any] = [None] * 4
        counts: list[Any] = [None] * 4

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    found[number] = model(images(number)[: 1 + number % 2])
                    counts[number] = attached.source["visual"].shape[0]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other[: 1 + number % 2], rtol=0, atol=1e-5)
    assert counts == [1, 2, 1, 2]  # what a forward leaves is the thread's


def test_interleaved_batches_are_an_error_and_the_next_forward_works() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(4)):
        expected = model(images())
        first, second = (model.blocks[0](model._pos_embed(model.patch_embed(images(seed)))) for seed in range(2))
        with pytest.raises(RuntimeError, match=r"block 1 of tower 'visual' got tokens \[2, 65, 32\].*several forwards"):
            model.blocks[1](first.clone())
        assert torch.equal(model(images()), expected)
        # With the tensors that the blocks returned, the batches are told apart.
        both = [model.blocks[0](model._pos_embed(model.patch_embed(images(seed)))) for seed in (0, 1)]
        for block in model.blocks[1:]:
            both = [block(tokens) for tokens in both]
        assert torch.equal(model.forward_head(model.norm(both[0])), expected)
    del first, second


def test_an_interrupted_forward_does_not_meet_the_next_one() -> None:
    model = small()

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(4)):
        expected = model(images())
        hook = model.blocks[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(images(1))
        hook.remove()
        assert torch.equal(model(images()), expected)


def test_forwards_that_stop_early_keep_no_memory() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(4)) as attached:
        handed_over = attached._towers["visual"].handed_over
        for seed in range(5):
            model.blocks[0](model._pos_embed(model.patch_embed(images(seed))))
        gc.collect()
        assert sum(len(entries) for entries in handed_over._open[threading.get_ident()].values()) == 2
        assert not copy.deepcopy(handed_over)._open


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x.to("meta"), partial(torch.add, 0.5)])
def test_tokens_that_the_host_changes_between_blocks(change: Any) -> None:
    model = small().to("meta") if change(torch.ones(1)).is_meta else small()
    for block in model.blocks[2:]:
        if change(torch.ones(1)).dtype == torch.float64:
            block.double()
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(4)) as attached:
        x = torch.randn(2, 65, 32, device=model.pos_embed.device)
        for number, block in enumerate(model.blocks):
            x = block(change(x) if number == 2 else x)
        assert x.shape == (2, 65, 32)
        assert attached.tokens["visual"] == [66, 62, 58, 54]


def test_tokens_of_another_shape_are_an_error() -> None:
    model = small()
    with torch.no_grad(), crossget.attach(model, crossget.ToMe(4)):
        x = model.blocks[0](model._pos_embed(model.patch_embed(images())))
        with pytest.raises(RuntimeError, match=r"block 1 of tower 'visual' got tokens \[2, 64, 32\]"):
            model.blocks[1](x[:, 1:])


def test_one_block_several_times_in_a_row() -> None:
    model = small(clones=False)
    model.blocks = torch.nn.ModuleList([model.blocks[0]] * 4)
    with torch.no_grad(), crossget.attach(model, crossget.CrossGET(4)) as attached:
        first = model(images())
        assert attached.tokens["visual"] == [66, 62, 58, 54]
        assert torch.equal(model(images()), first)
