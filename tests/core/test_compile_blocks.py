"""Blocks that are compiled one by one share their graphs: nothing inside a block depends on its layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
import torch._dynamo
from plain_host import TOKENS, Plain, registered
from torch import Tensor

import crossget
from contract import COMPILES
from crossget.methods.reducers import Reducer

plain = pytest.fixture(autouse=True)(registered)


@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
@pytest.mark.parametrize(
    "reducer",
    [
        crossget.ToMe(2),
        *(pytest.param(method(2), marks=pytest.mark.slow) for method in (crossget.CrossGET, crossget.Ward)),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
def test_a_stack_has_one_graph(reducer: Reducer) -> None:
    """The first block runs eagerly until another one is compiled, and then runs the graph of that one."""
    torch.manual_seed(0)
    model = Plain(depth=6).eval()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad(), crossget.attach(model, reducer) as attached:
        expected = model(TOKENS)
        tokens = attached.tokens
        torch._dynamo.reset()
        for block in model.stages:
            block.compile(backend=backend, dynamic=True, fullgraph=True)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert attached.tokens == tokens
        assert len(graphs) == 1
        model(TOKENS)
        before = len(graphs)
        model(torch.cat([TOKENS, TOKENS[:1] + 1]))  # another batch size
        attached.reducer = dataclasses.replace(reducer, r=3)
        model(torch.cat([TOKENS, TOKENS], 1))  # another r, and another image size
        first, second = attached.tokens["visual"][:2]
        assert (first - second, first > 39) == (3, True)
        assert len(graphs) == before == 1


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
def test_the_towers_of_libraries_have_one_graph_each() -> None:
    """timm's image tower and both towers of transformers' CLIP, each at two batch sizes."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    ends = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
    config = CLIPConfig(
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        text_config={**shape, **ends, "vocab_size": 99, "max_position_embeddings": 24},
        projection_dim=16,
    )
    clip = CLIPModel(config).eval()
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=5, embed_dim=48, num_heads=3
    ).eval()
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 97, (3, 24))
    ids[:, -2] = 98
    hosts = [
        (vit, crossget.CrossGET(2), lambda n: vit(images[:n]), 1),
        (
            clip, {"visual": crossget.Ward(2), "text": crossget.ToMe(2)},
            lambda n: clip(input_ids=ids[:n], pixel_values=images[:n]).logits_per_image, 2,
        ),
    ]  # fmt: skip
    for model, reducer, call, number in hosts:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        with torch.no_grad(), crossget.attach(model, reducer) as attached:
            expected = [call(2), call(3)]
            for tower in attached.towers.values():
                for block in tower.blocks:
                    block.compile(backend=backend, dynamic=True)
            torch.testing.assert_close(call(2), expected[0], rtol=1e-4, atol=1e-5)
            assert len(graphs) == number
            before = len(graphs)
            torch.testing.assert_close(call(3), expected[1], rtol=1e-4, atol=1e-5)
            assert len(graphs) == before


@pytest.mark.parametrize(
    "reducer", [crossget.ToMe(6), crossget.CrossGET(6)], ids=lambda reducer: type(reducer).__name__
)
@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
def test_a_block_from_which_half_is_removed_has_the_same_graph(reducer: Reducer) -> None:
    """More is asked for than the last blocks can give."""
    model, graphs = Plain(depth=4).eval(), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad(), crossget.attach(model, reducer) as attached:
        expected, tokens = model(TOKENS), attached.tokens
        after = tokens["visual"][-1]
        assert tokens["visual"][-2] - after < 6
        for block in model.stages:
            block.compile(backend=backend, dynamic=True, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at inputs of a graph
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "reducer",
    [
        crossget.ToMe(4),
        *(pytest.param(method(4), marks=pytest.mark.slow) for method in (crossget.CrossGET, crossget.Ward)),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
def test_blocks_are_trained_by_one_graph(reducer: Reducer, checkpointing: bool) -> None:
    """Gradients are those of eager blocks. A checkpoint recomputes the first block eagerly, as it ran at first."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3)
    model.set_grad_checkpointing(checkpointing)
    images, graphs = torch.randn(3, 3, 32, 32), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with crossget.attach(model.train(), reducer) as attached:
        attached.register_parameters(model)

        def gradients(batch: int) -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            model(images[:batch]).square().sum().backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        expected = [gradients(2), gradients(3)]
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend=backend, dynamic=True)
        with torch.no_grad():
            model.eval()(images)  # its graph has no gradients
        model.train()
        graphs.clear()
        # Ward's last block computes its class token alone, and has its own.
        number = 2 if isinstance(reducer, crossget.Ward) else 1
        for batch, found in zip((2, 2, 3), (expected[0], *expected), strict=True):
            torch.testing.assert_close(gradients(batch), found, rtol=1e-4, atol=1e-5)
            assert len(graphs) == number


CHECKPOINTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at inputs of a graph
@pytest.mark.parametrize("alone", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize(
    "reducer", [crossget.ToMe(2), crossget.CrossGET(2)], ids=lambda reducer: type(reducer).__name__
)
@pytest.mark.skipif(not COMPILES, reason="torch 2.8 is the first that traces a block which is watched")
@pytest.mark.skipif(not hasattr(torch._dynamo.config, CHECKPOINTS), reason="this torch has no checkpoints in a graph")
def test_a_graph_may_have_gradient_checkpoints(reducer: Reducer, alone: bool) -> None:
    """Newer layers of transformers have theirs inside of their forward; the whole of timm's model has all of them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    model: Any = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    images = torch.randn(2, 3, 32, 32)

    def gradients(called: Any) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        called(images)[1].square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with torch._dynamo.config.patch({CHECKPOINTS: True}), crossget.attach(model, reducer) as attached:
        attached.register_parameters(model)
        expected, called, (tower,) = gradients(model), model, attached.towers.values()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if alone:
            for block in tower.blocks:
                block.compile(backend="aot_eager", dynamic=True)
        else:
            called = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(gradients(called), expected, rtol=1e-4, atol=1e-5)
        found = torch._dynamo.utils.counters
        assert found["stats"]["unique_graphs"] == 1
        assert not found["graph_break"]
