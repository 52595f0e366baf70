"""Threads that share a model, each with a reducer of its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import crossget
from contract import COMPILES

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REDUCERS = [crossget.Ward(r) for r in (1, 4, 8)] + [crossget.ToMe(r) for r in (2, 6)] + [crossget.CrossGET(5)]


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes).eval()


def test_every_thread_has_its_own_reducer() -> None:
    model = vit()
    with torch.no_grad(), crossget.attach(model, crossget.Ward(3)) as attached:
        expected: dict[int, Tensor] = {}
        for number, reducer in enumerate(REDUCERS):
            with attached.with_reducer(reducer):
                expected[number] = model(IMAGES)
        plain, wrong, failed = model(IMAGES), list[str](), list[str]()
        barrier = threading.Barrier(12)

        def work(thread: int) -> None:
            try:
                barrier.wait()
                for turn in range(6):
                    number = (thread + turn) % len(REDUCERS)
                    with torch.no_grad(), attached.with_reducer(REDUCERS[number]):
                        out = model(IMAGES)
                        same = torch.allclose(out, expected[number], rtol=0, atol=1e-5)
                        tokens = attached.tokens["visual"]
                    if not same or tokens[0] - tokens[1] != REDUCERS[number].r:
                        wrong.append(f"{thread} {number} {tokens}")
            except Exception as error:  # a thread's exception is not the test's
                failed.append(repr(error))

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(12)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not failed
        assert not wrong
        assert attached.reducers["visual"].r == 3
        torch.testing.assert_close(model(IMAGES), plain)


def test_a_reducer_for_a_while_can_be_nested_and_set() -> None:
    model = vit()
    with torch.no_grad(), crossget.attach(model, crossget.Ward(3)) as attached:

        def removed() -> int:
            model(IMAGES)
            tokens = attached.tokens["visual"]
            return tokens[0] - tokens[1]

        with attached.with_reducer(crossget.Ward(4)):
            with attached.with_reducer(crossget.ToMe(5)):
                assert removed() == 5
                attached.reducer = crossget.ToMe(6)
                assert removed() == 6
            assert removed() == 4
        assert removed() == 3
        with pytest.raises(ValueError, match="2 layers"), attached.with_reducer(crossget.Ward((1, 2))):
            pass
        assert removed() == 3


@pytest.mark.skipif(not COMPILES, reason="this torch cannot compile an attached model")
@pytest.mark.slow
def test_a_compiled_model_follows_the_reducer() -> None:
    model = vit()
    with torch.no_grad(), crossget.attach(model, crossget.Ward(3)) as attached:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for r in (3, 5):
            with attached.with_reducer(crossget.Ward(r)):
                torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
