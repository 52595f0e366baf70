"""Attached models are traced, exported, vectorised and deployed like any others, or say why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_models
import open_clip
import pytest
import timm
import torch
import transformers
from fvcore.nn import FlopCountAnalysis
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.export import Dim
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from unregistered_models import KINDS

import crossget
from contract import COMPILES
from crossget.methods.matching import Candidates
from crossget.methods.reducers import Reducer

ONNX = TorchVersion(torch.__version__) >= "2.14"


@dataclass(frozen=True)
class Host:
    """A small model that takes one tensor with a batch axis.

    Attributes:
        make: a function that makes it.
        inputs: a function of the batch size that makes its input.
        is_discovered: it has no adapter.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    is_discovered: bool = False


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def large_images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def texts(batch: int) -> Tensor:
    """Token ids [B, 16]. The highest id, 59, ends each text, at other places."""
    ids = torch.randint(3, 58, (batch, 16), generator=torch.Generator().manual_seed(batch))
    ends = torch.arange(batch) % 5 + 11
    return ids.scatter(1, ends[:, None], 59) * (torch.arange(16) <= ends[:, None])


class Part(nn.Module):
    """One method of a model, as a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


def small_clip() -> nn.Module:
    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    return open_clip.CLIP(24, vision, CLIPTextCfg(context_length=16, vocab_size=60, width=32, heads=4, layers=3))


def of_transformers(name: str, **settings: Any) -> nn.Module:
    """A small model by the name of its class without "Model", such as CLIPVision."""
    config = getattr(transformers, f"{name.removesuffix('WithProjection').removesuffix('Model')}Config")
    return hf_models.built(getattr(transformers, name), config(**settings))


def hf_text() -> nn.Module:
    text = {key: value for key, value in hf_models.TEXT.items() if key != "num_key_value_heads"}
    return of_transformers("CLIPTextModelWithProjection", **text | {"max_position_embeddings": 16, "eos_token_id": 59})


HOSTS = {
    "timm": Host(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3), images),
    "open_clip images": Host(lambda: Part(small_clip(), "encode_image"), images),
    "open_clip texts": Host(lambda: Part(small_clip(), "encode_text"), texts),
    "CLIPVision": Host(lambda: of_transformers("CLIPVisionModelWithProjection", **hf_models.VISION), images),
    "CLIPText": Host(hf_text, texts),
    "Dinov2": Host(lambda: of_transformers("Dinov2Model", **hf_models.VISION), images),
    "plain": Host(KINDS["eager, mean of patches"].make, large_images, True),
    "rotary": Host(KINDS["rotary [1, N, D]"].make, large_images, True),
    "torchvision": Host(lambda: VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5), images),
}

STABLE = [crossget.CrossGET(2, ties="stable"), crossget.ToMe(2, ties="stable"), crossget.Ward(2)]
METHODS = [crossget.CrossGET(2), crossget.ToMe(2), crossget.Ward(2), crossget.CrossGET(2, importance="attention")]


def made(host: Host) -> nn.Module:
    """The host's model, with parameters that are no zeros."""
    model = host.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def attached(host: Host, reducer: Reducer) -> nn.Module:
    """The host's model, attached."""
    model = made(host)
    inner = model.model if isinstance(model, Part) else model
    if isinstance(model, Part) and model.method == "encode_text":
        crossget.attach(inner, {"text": reducer})
    else:
        crossget.attach(inner, reducer, inputs=host.inputs(2) if host.is_discovered else None)
    return model


def tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def kept_quick(*quick: tuple[str, type[Reducer]], reducers: Sequence[Reducer] = METHODS) -> list[Any]:
    """All hosts with all reducers, as parameters of a test. Those that are not named are slow."""
    return [
        pytest.param(
            host,
            reducer,
            id=f"{name}-{reducer!r}",
            marks=[] if any(name == one and type(reducer) is kind for one, kind in quick) else pytest.mark.slow,
        )
        for name, host in HOSTS.items()
        for reducer in reducers
    ]


@pytest.mark.parametrize(("host", "reducer"), kept_quick(("plain", crossget.CrossGET), ("CLIPText", crossget.Ward)))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # torch.jit reads it
def test_a_trace_needs_no_inference_mode(host: Host, reducer: Reducer) -> None:
    model = attached(host, reducer)
    traced = torch.jit.trace(model, host.inputs(2), check_trace=False, strict=False)
    x = host.inputs(2).flip(0)
    torch.testing.assert_close(tensors(traced(x)), tensors(model(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reducer", [METHODS[0], METHODS[2]], ids=repr)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore_counts_an_attached_model(reducer: Reducer) -> None:
    model = attached(HOSTS["plain"], reducer)
    found = FlopCountAnalysis(model, HOSTS["plain"].inputs(1)).unsupported_ops_warnings(False)
    assert found.uncalled_modules_warnings(False).total() > 0


@pytest.mark.parametrize("reducer", METHODS, ids=repr)
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of operators without a batching rule
def test_vmap_equals_a_loop(name: str, reducer: Reducer) -> None:
    host = HOSTS[name]
    model = attached(host, reducer)
    x = torch.stack([host.inputs(2), host.inputs(3)[1:], host.inputs(4)[:2]])
    with torch.no_grad():
        loop = [torch.stack(parts) for parts in zip(*(tensors(model(part)) for part in x), strict=True)]
        torch.testing.assert_close(tensors(torch.vmap(model)(x)), loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("host", "reducer"), kept_quick())
def test_one_exported_program_serves_every_batch_size(host: Host, reducer: Reducer, strict: bool) -> None:
    check_export(host, reducer, strict)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_example_is_exported(strict: bool) -> None:
    check_export(HOSTS["plain"], crossget.ToMe(2), strict)


def check_export(host: Host, reducer: Reducer, strict: bool) -> None:
    if strict and not COMPILES:
        pytest.skip("torch 2.8 is the first whose Dynamo traces a block that is watched")
    model = attached(host, reducer)
    # Without a largest size: no comparison with a limit may be left in the program.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
        program = torch.export.export(model, (host.inputs(2),), dynamic_shapes=({0: Dim("b")},), strict=strict)
    exported = program.module()
    with torch.no_grad():
        for batch in (1, 3, 5):
            x = host.inputs(batch)
            torch.testing.assert_close(tensors(exported(x)), tensors(model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC] if hasattr(Dim, "AUTO") else [], ids=str)
def test_a_dynamic_batch_by_hint(dim: Any) -> None:
    model = attached(HOSTS["plain"], crossget.ToMe(2))
    x = HOSTS["plain"].inputs(3)
    exported = torch.export.export(
        model, (HOSTS["plain"].inputs(2),), dynamic_shapes=({0: dim},), strict=False
    ).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", METHODS[:3], ids=repr)
@pytest.mark.parametrize("name", HOSTS)
def test_script_is_refused_in_a_sentence(name: str, reducer: Reducer) -> None:
    model = attached(HOSTS[name], reducer)
    with pytest.raises(
        RuntimeError, match=r"block of an attached model, which cannot be compiled by torch.jit.script: "
    ):
        torch.jit.script(model)
    model(HOSTS[name].inputs(1))  # unharmed


@pytest.mark.parametrize("name", ["timm", "open_clip texts", "plain", "torchvision"])  # those that torch.fx can trace
@pytest.mark.filterwarnings("ignore:Was not able to add assertion:UserWarning")
def test_symbolic_tracing_is_refused_in_a_sentence(name: str) -> None:
    model = attached(HOSTS[name], crossget.CrossGET(2))
    for trace in (torch.fx.symbolic_trace, lambda model: create_feature_extractor(model, {"": "out"})):
        with pytest.raises(RuntimeError, match=r"block of an attached model, which cannot be traced by torch.fx: use "):
            trace(model)
    model(HOSTS[name].inputs(1))


def test_a_block_that_is_a_leaf_of_the_trace_is_reduced_when_it_runs() -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return type(m).__name__ == "Block" or super().is_leaf_module(m, name)

    model = attached(HOSTS["plain"], crossget.CrossGET(2))
    graph = torch.fx.GraphModule(model, Leaves().trace(model))
    x = HOSTS["plain"].inputs(2)
    torch.testing.assert_close(graph(x), model(x))


def test_a_detached_model_is_scripted_and_traced() -> None:
    model = made(HOSTS["torchvision"])
    crossget.attach(model, crossget.CrossGET(2)).detach()
    x = images(2)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


# Attention kernels --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(transformers.PreTrainedModel, "set_attn_implementation"), reason="it cannot be changed")
@pytest.mark.parametrize("name", ["CLIPVision", "CLIPText", "Dinov2"])
class TestKernels:
    """The attention kernel of a model of transformers is changed after it was attached."""

    @pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
    def test_recognised(self, name: str, first: str, then: str) -> None:
        model: Any = HOSTS[name].make()
        model.set_attn_implementation(first)
        x = HOSTS[name].inputs(2)
        with torch.no_grad(), crossget.attach(model, crossget.CrossGET(2, ties="stable")):
            expected = model(x)[0]
            model.set_attn_implementation(then)
            torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # of transformers
    @pytest.mark.parametrize(
        "kernel", [pytest.param("flex_attention", marks=pytest.mark.slow), "flash_attention_2", "flash_attention_3"]
    )
    def test_not_recognised(self, name: str, kernel: str) -> None:  # flex_attention makes a BlockMask of the mask
        model: Any = HOSTS[name].make()
        x = HOSTS[name].inputs(2)
        with torch.no_grad(), crossget.attach(model, crossget.CrossGET(2)):
            expected = model(x)[0]
            # As set_attn_implementation does, which refuses a kernel that is not installed.
            configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
            for config in configs:
                config._attn_implementation = kernel
            with pytest.raises(RuntimeError, match=f"The attention implementation is '{kernel}'"):
                model(x, attention_mask=(x != 0).long()) if name == "CLIPText" else model(x)
            for config in configs:
                config._attn_implementation = "sdpa"
            assert torch.equal(model(x)[0], expected)


# ONNX ---------------------------------------------------------------------------------------------------------------


class Sorted(nn.Module):
    """The order of equal values, as a matching gets it."""

    def __init__(self, ties: Any) -> None:
        super().__init__()
        self.ties = ties

    def forward(self, x: Tensor) -> Tensor:
        candidates = Candidates(x[:, :, None], torch.zeros_like(x, dtype=torch.bool), 0, ties=self.ties)
        return torch.stack([candidates.argsort(x), candidates.argsort(x, descending=True)])


def onnx_of(model: nn.Module, x: Tensor, folder: Path, dynamic: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """The model as onnxruntime runs it."""
    import onnxruntime

    path = folder / "model.onnx"
    shapes = ({0: Dim("b")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {given.name: x.numpy()})]


@pytest.mark.skipif(not ONNX, reason="older exporters of torch do not tell that they export to ONNX")
class TestOnnx:
    TIED = torch.randint(0, 4, (2, 40), generator=torch.Generator().manual_seed(0)).float()

    def test_stable_ties_are_exported(self, tmp_path: Path) -> None:
        model = Sorted("stable")
        (out,) = onnx_of(model, self.TIED, tmp_path)(self.TIED.flip(1))
        assert torch.equal(out, model(self.TIED.flip(1)))

    def test_ties_of_torch_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(torch.onnx.OnnxExporterError, match=r"ties='torch' cannot be exported.*ties='stable'"):
            onnx_of(Sorted("torch"), self.TIED, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.parametrize("reducer", METHODS[:2], ids=repr)
    def test_models_with_ties_of_torch_are_refused(self, reducer: Reducer, tmp_path: Path) -> None:
        with pytest.raises(torch.onnx.OnnxExporterError, match=r"ties='torch' cannot be exported.*ties='stable'"):
            onnx_of(attached(HOSTS["timm"], reducer), HOSTS["timm"].inputs(2), tmp_path)

    @pytest.mark.parametrize(("host", "reducer"), kept_quick(reducers=STABLE))
    def test_onnxruntime_computes_what_the_model_computes(self, host: Host, reducer: Reducer, tmp_path: Path) -> None:
        model = attached(host, reducer)
        run, x = onnx_of(model, host.inputs(2), tmp_path), host.inputs(4)[1:3]
        with torch.no_grad():
            torch.testing.assert_close(run(x), tensors(model(x)), rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["timm", "CLIPText"])
    def test_a_dynamic_batch(self, name: str, tmp_path: Path) -> None:
        host = HOSTS[name]
        model = attached(host, STABLE[0])
        run = onnx_of(model, host.inputs(2), tmp_path, dynamic=True)
        with torch.no_grad():
            for batch in (1, 3, 5):
                x = host.inputs(batch)
                torch.testing.assert_close(run(x), tensors(model(x)), rtol=1e-4, atol=1e-4)
