"""timm: a small random model for each kind of block, by the contract and against forwards written out by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import contract
import pytest
import timm
import timm.models
import torch
from contract import Case
from timm.models import vision_transformer as vt
from timm.models import vision_transformer_relpos as relpos
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.integrations import timm as adapter
from crossget.reducers import View

NEWEST = tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 31)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def too_old(name: str, needs: tuple[str, ...]) -> str:
    """What the installed timm does not have yet."""
    cls = getattr(timm.models, name, None) or getattr(vt, name, None)
    missing = set(needs) - set(inspect.signature(cls).parameters) if cls else {name}
    return f"timm {timm.__version__} has no {', '.join(sorted(missing))} ({name})" if missing else ""


def since(name: str, *needs: str) -> pytest.MarkDecorator:
    reason = too_old(name, needs)
    return pytest.mark.skipif(bool(reason), reason=reason)


def images(size: int = 32) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def build(name: str, wrap: Callable[[nn.Module], nn.Module] | None, options: dict[str, Any]) -> nn.Module:
    made = {"num_classes": 5, **SMALL, **options}
    model = getattr(timm.models, name)(**{key: value for key, value in made.items() if value is not None})
    return model if wrap is None else wrap(model)


def case(id: str, name: str, *needs: str, size: int = 32, fused: bool = True, compiles: bool = False,
         wrap: Callable[[nn.Module], nn.Module] | None = None, **options: Any) -> Any:  # fmt: skip
    made = Case(id, partial(build, name, wrap, options), partial(images, size), compiles=compiles, fused=fused)
    return pytest.param(made, id=id, marks=since(name, *needs))


def eager(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model



RELPOS = "VisionTransformerRelPos"
NAFLEX = {"pos_embed_grid_size": (4, 4)}
ROPE = {"use_rot_pos_emb": True, "qkv_fused": False}
GEMMA = {"img_size": 48, "size": 48, "head_dim": 16, "intermediate_size": 96, "position_embedding_size": 64}
DIFF_PARALLEL = getattr(vt, "DiffParallelScalingBlock", None)

CASES = [
    case("vit", "VisionTransformer", compiles=True),
    case("vit_avg", "VisionTransformer", class_token=False, global_pool="avg"),
    case("vit_map", "VisionTransformer", class_token=False, global_pool="map"),
    case("clip", "VisionTransformer", pre_norm=True, act_layer="quick_gelu", qk_norm=True),
    case("deit3", "VisionTransformer", init_values=0.1, no_embed_class=True),
    case("dinov2", "VisionTransformer", init_values=0.1, reg_tokens=2, dynamic_img_size=True),
    case("eager", "VisionTransformer", fused=False, wrap=eager),
    case("res_post", "VisionTransformer", init_values=0.1, block_fn=vt.ResPostBlock),
    case("parallel_scaling", "VisionTransformer", block_fn=vt.ParallelScalingBlock),
    case("parallel_things", "VisionTransformer", init_values=0.1, block_fn=vt.ParallelThingsBlock),
    # fused=False: values twice as wide as keys, and a bias with three axes, are not for the CPU's fused kernel.
    case("diff", "VisionTransformer", "attn_layer", attn_layer="diff", fused=False),
    case("diff_parallel", "VisionTransformer", "attn_layer", block_fn=DIFF_PARALLEL, fused=False),
    case("distilled", "VisionTransformerDistilled"),
    case("relpos", RELPOS, init_values=0.1),
    case("relpos_class", RELPOS, rel_pos_type="bias", class_token=True, global_pool="token", init_values=0.1),
    case("relpos_shared", RELPOS, shared_rel_pos=True, init_values=0.1),
    case("relpos_res_post", RELPOS, block_fn=relpos.ResPostRelPosBlock),
    case("relpos_eager", RELPOS, init_values=0.1, fused=False, wrap=eager),
    case("beit", "Beit", use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    case("beit_shared", "Beit", use_shared_rel_pos_bias=True, fused=False),
    case("cait", "Cait", init_values=0.1, fused=False, compiles=True),
    case("eva", "Eva", init_values=0.1),
    case("eva02", "Eva", **ROPE, swiglu_mlp=True, scale_mlp=True),
    case("eva02_eager", "Eva", **ROPE, swiglu_mlp=True, fused=False, wrap=eager),
    case("eva_post_norm", "Eva", use_post_norm=True),
    case("eva_registers", "Eva", use_rot_pos_emb=True, num_reg_tokens=2, class_token=False, dynamic_img_size=True),
    case("pe", "Eva", "attn_type", **ROPE, attn_type="rope", global_pool="map"),
    case("dinov3", "Eva", "rope_type", **ROPE, rope_type="dinov3", num_reg_tokens=2, global_pool="token", compiles=True),
    case("rope_mixed", "Eva", "rope_type", use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    case("mrope", "Eva", "rope_mrope_section", use_rot_pos_emb=True, rope_type="mrope", rope_mrope_section=(2, 3, 3), attn_type="rope"),
    case("grouped_query", "Eva", "num_kv_heads", **ROPE, attn_type="rope", num_kv_heads=1),
    case("naflex", "NaFlexVit", **NAFLEX, class_token=True, reg_tokens=2, global_pool="token"),
    case("naflex_map", "NaFlexVit", **NAFLEX, pos_embed="factorized"),
    case("naflex_rope", "NaFlexVit", **NAFLEX, rope_type="axial", global_pool="avg"),
    case("naflex_mixed", "NaFlexVit", **NAFLEX, rope_type="mixed", reg_tokens=1, global_pool="avg"),
    case("qwen3", "Qwen3VitEncoder", num_classes=None, pos_embed_grid_size=4),
    case("qwen3_classifier", "Qwen3VitClassifier", pos_embed_grid_size=4, encoder_pool="merge"),
    case("deepseek", "DeepseekVitEncoder", num_classes=None, out_features=20),
    case("deepseek_classifier", "DeepseekVitClassifier"),
    case("gemma4", "Gemma4VitEncoder", num_classes=None, **GEMMA),
    case("gemma4_classifier", "Gemma4VitClassifier", **GEMMA),
    case("features", "VisionTransformer", wrap=partial(FeatureGetterNet, out_indices=(0, 2))),
    pytest.param(Case("test_vit", partial(timm.create_model, "test_vit"), partial(images, 160), compiles=False), id="test_vit"),
]


# timm's own RMS norm says this under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("probe", contract.PROBES, ids=contract.name)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


def test_every_class_is_there_on_the_newest_timm() -> None:
    skipped = [param.id for param in CASES if any(mark.args[0] for mark in param.marks)]
    assert (skipped == []) == NEWEST
