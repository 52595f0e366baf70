"""timm: a small random model for each kind of block, by the contract and against forwards written out by hand."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import timm.models
import torch
from timm.models import vision_transformer as vt
from timm.models import vision_transformer_relpos as relpos
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional as F

import contract
import crossget
from contract import Case
from crossget.integrations import timm as adapter
from crossget.integrations._support import markdown
from crossget.methods.importance import by_attention
from crossget.methods.reducers import View

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
    parallel = options.get("block_fn") in PARALLEL
    make = partial(build, name, wrap, options)
    made = Case(id, make, partial(images, size), compiles=compiles, fused=fused, parallel=parallel)
    return pytest.param(made, id=id, marks=since(name, *needs))


def eager(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


RELPOS = "VisionTransformerRelPos"
NAFLEX = {"pos_embed_grid_size": (4, 4)}
SCALED = {"init_values": 0.1}
ROPE = {"use_rot_pos_emb": True, "qkv_fused": False}
MIXED = {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope"}
GEMMA = {"img_size": 48, "size": 48, "head_dim": 16, "intermediate_size": 96, "position_embedding_size": 64}
DIFF_PARALLEL = getattr(vt, "DiffParallelScalingBlock", None)
PARALLEL = [vt.ParallelScalingBlock, *filter(None, [DIFF_PARALLEL])]

CASES = [
    case("vit", "VisionTransformer", compiles=True),
    case("vit_avg", "VisionTransformer", class_token=False, global_pool="avg"),
    case("vit_map", "VisionTransformer", class_token=False, global_pool="map"),
    case("clip", "VisionTransformer", pre_norm=True, act_layer="quick_gelu", qk_norm=True),
    case("deit3", "VisionTransformer", **SCALED, no_embed_class=True),
    case("dinov2", "VisionTransformer", **SCALED, reg_tokens=2, dynamic_img_size=True),
    case("eager", "VisionTransformer", fused=False, wrap=eager),
    case("res_post", "VisionTransformer", **SCALED, block_fn=vt.ResPostBlock),
    case("parallel_scaling", "VisionTransformer", block_fn=vt.ParallelScalingBlock),
    case("parallel_things", "VisionTransformer", **SCALED, block_fn=vt.ParallelThingsBlock),
    # fused=False: values twice as wide as keys, and a bias with three axes, are not for the CPU's fused kernel.
    case("diff", "VisionTransformer", "attn_layer", attn_layer="diff", fused=False),
    case("diff_parallel", "VisionTransformer", "attn_layer", block_fn=DIFF_PARALLEL, fused=False),
    case("distilled", "VisionTransformerDistilled"),
    case("relpos", RELPOS, **SCALED),
    case("relpos_class", RELPOS, rel_pos_type="bias", class_token=True, global_pool="token", **SCALED),
    case("relpos_shared", RELPOS, shared_rel_pos=True, **SCALED),
    case("relpos_res_post", RELPOS, block_fn=relpos.ResPostRelPosBlock),
    case("relpos_eager", RELPOS, **SCALED, fused=False, wrap=eager),
    case("beit", "Beit", use_rel_pos_bias=True, use_abs_pos_emb=False, **SCALED),
    case("beit_shared", "Beit", use_shared_rel_pos_bias=True, fused=False),
    case("cait", "Cait", **SCALED, fused=False),
    case("eva", "Eva", **SCALED),
    case("eva02", "Eva", **ROPE, swiglu_mlp=True, scale_mlp=True, **SCALED),
    case("eva02_eager", "Eva", **ROPE, swiglu_mlp=True, fused=False, wrap=eager),
    case("eva_post_norm", "Eva", use_post_norm=True),
    case("eva_registers", "Eva", use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=2, class_token=False),
    case("pe", "Eva", "attn_type", **ROPE, attn_type="rope", global_pool="map"),
    case("dinov3", "Eva", "rope_type", **ROPE, **SCALED, rope_type="dinov3", num_reg_tokens=2),
    case("rope_mixed", "Eva", "rope_type", **MIXED, **SCALED),
    case(
        "mrope", "Eva", "rope_mrope_section", **ROPE, rope_type="mrope", rope_mrope_section=(2, 3, 3), attn_type="rope"
    ),
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
    pytest.param(
        Case("test_vit", partial(timm.create_model, "test_vit"), partial(images, 160), 2, False), id="test_vit"
    ),
]


# timm's own RMS norm says this under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("probe", contract.OTHERS, ids=contract.name)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


# These have the blocks of a case in front of them.
SAME_BLOCKS = (
    "vit_avg", "vit_map", "distilled", "features", "test_vit", "relpos_class", "relpos_shared", "eva_registers",
    "naflex_map", "qwen3_classifier", "deepseek_classifier", "gemma4_classifier",
)  # fmt: skip


@pytest.mark.parametrize("probe", contract.OF_BLOCKS, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(lambda id: id not in SAME_BLOCKS, CASES))
def test_contract_of_blocks(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


@pytest.mark.parametrize("case", CASES)
def test_a_forward_shows_the_declared_tower(case: Case) -> None:
    contract.a_forward_shows_the_declared_tower(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_compiles(case: Case) -> None:
    contract.compiles_to_one_graph(dataclasses.replace(case, compiles=True))


def test_every_class_is_there_on_the_newest_timm() -> None:
    skipped = [param.id for param in CASES if any(mark.args[0] for mark in param.marks)]
    assert (skipped == []) == NEWEST


# Against forwards written out ---------------------------------------------------------------------------------------

Reduce = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def split(qkv: Tensor, heads: int) -> Tensor:
    """[B, T, 3 * C] -> queries, keys and values [B, H, T, D]."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def behind(block: Any, x: Tensor) -> Tensor:
    """The MLP's half of a block with layer scale."""
    return x + block.ls2(block.mlp(block.norm2(x)))


def plain(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    q, k, v = split(block.attn.qkv(block.norm1(x)), 3)
    out, weights = attend(q, k, v, bias)
    return behind(block, reduce(x + block.ls1(block.attn.proj(out)), q, k, weights))


def parallel(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    """One residual for attention and MLP."""
    wide, *qkv = block.in_proj(block.in_norm(x)).split(block.in_split, -1)
    q, k, v = split(torch.cat(qkv, -1), 3)
    out, weights = attend(block.q_norm(q), block.k_norm(k), v, bias)
    mlp = block.mlp_out_proj(block.mlp_act(wide + block.mlp_bias if block.mlp_bias is not None else wide))
    return reduce(x + block.attn_out_proj(out) + mlp, q, k, weights)


def relative(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    """Relative positions: a bias [H, T0, T0] over the grid. The cross token has the class token's, or the first's."""
    of_beit = hasattr(block.attn, "relative_position_bias_table")
    table = (block.attn._get_rel_pos_bias() if of_beit else block.attn.rel_pos.get_bias())[0]
    column = table[:, :, :1] if host["class_token"] else torch.zeros_like(table[:, :, :1])
    table = torch.cat([table, column], 2)
    table = torch.cat([table, table[:, :1]], 1)
    if not host["class_token"]:
        table[:, -1, -1] = 0
    bias = bias + table[:, position[:, :, None], position[:, None, :]].transpose(0, 1)
    if not of_beit:
        return plain(block, x, position, bias, reduce, host)
    biases = torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    q, k, v = split(F.linear(block.norm1(x), block.attn.qkv.weight, biases), 3)
    out, weights = attend(q, k, v, bias)
    x = reduce(x + block.gamma_1 * block.attn.proj(out), q, k, weights)
    return x + block.gamma_2 * block.mlp(block.norm2(x))


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Every pair of channels of [B, H, T, D] turned by the angle whose sines and cosines are [.., T, 2 * D]."""
    sine, cosine = table.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        return x * cosine + torch.cat([-b, a], -1) * sine
    a, b = x[..., ::2], x[..., 1::2]
    return x * cosine + torch.stack([-b, a], -1).flatten(-2) * sine


def rotary(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    """Rotary positions, one table [H or 1, N, 2 * D] over the grid; prefix and cross token are not turned."""
    table = host["rope"] if host["rope"].dim() == 3 else host["rope"][None]
    still = torch.arange(table.shape[2]).ge(table.shape[2] // 2).float().expand_as(table[:, :1])
    table = torch.cat([still.expand(-1, host["prefix"], -1), table, still], 1)[:, position].transpose(0, 1)
    h, attn = block.norm1(x), block.attn
    if attn.qkv is None:
        q, k, v = (p(h).unflatten(2, (3, -1)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        q, k, v = split(attn.qkv(h), 3)
    half = getattr(attn, "rotate_half", False)
    q, k = rotated(q, table, half), rotated(k, table, half)
    out, weights = attend(q, k, v, bias)
    x = reduce(x + block.gamma_1 * attn.proj(attn.norm(out)), q, k, weights)
    return x + block.gamma_2 * block.mlp(block.norm2(x))


def talking(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    """CaiT: the heads mix before and after the softmax."""
    q, k, v = split(block.attn.qkv(block.norm1(x)), 3)
    logits = block.attn.proj_l((q * block.attn.scale @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = (logits + bias).softmax(-1)
    mixed = block.attn.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    out = block.attn.proj((mixed @ v).transpose(1, 2).flatten(2))
    x = reduce(x + block.gamma_1 * out, q, k, weights)
    return x + block.gamma_2 * block.mlp(block.norm2(x))


def gemma(block: Any, x: Tensor, position: Tensor, bias: Tensor, reduce: Reduce, host: dict[str, Any]) -> Tensor:
    """Rotary positions in two halves, for rows and columns; four norms; logits are not scaled."""
    rows = position[:, :, None].expand(-1, -1, 16)
    cosine = F.pad(host["rope_cos"], (0, 0, 0, 1), value=1.0).gather(1, rows)[:, None]
    sine = F.pad(host["rope_sin"], (0, 0, 0, 1)).gather(1, rows)[:, None]
    h, attn = block.norm1(x), block.attn
    q, k, v = (p(h).unflatten(2, (3, 16)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = (part.transpose(1, 2) for part in (attn.q_norm(q), attn.k_norm(k), attn.v_norm(v)))
    halves = [torch.cat([s, c], -1) for s, c in zip(sine.chunk(2, -1), cosine.chunk(2, -1), strict=True)]
    q, k = (
        torch.cat([rotated(p, t, True) for p, t in zip(part.chunk(2, -1), halves, strict=True)], -1) for part in (q, k)
    )
    out, weights = attend(q * 4, k, v, bias)
    x = reduce(x + block.norm2(attn.o_proj(out)), q, k, weights)
    return x + block.norm4(block.mlp(block.norm3(x)))


def explicit(
    forward: Any, tower: crossget.Tower, reducer: Any, cross: Tensor | None, x: Tensor, hosts: list[dict[str, Any]]
) -> Tensor:
    """The reduced tower: `forward` computes a block, and hands what is behind the attention to `reduce`."""
    batch, length, _ = x.shape
    if cross is not None:
        origin = x[:, :1] if tower.class_token else x[:, tower.prefix :].mean(1, keepdim=True)
        x = torch.cat([x, origin], 1)
    position = source = torch.arange(x.shape[1]).expand(batch, -1)
    sizes = torch.ones(x.shape[:2])

    def reduce(total: Tensor, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        nonlocal position, source, sizes
        protected = (position < tower.prefix) | (position >= length)
        guide = torch.full((batch,), total.shape[1] - 1) if cross is not None else None
        view = View(total, q, k, by_attention(weights).mean(1), sizes, protected, int(protected[0].sum()), None, guide)
        reduced = reducer.reduce(view, reducer.r)
        assert reduced is not None
        total, sizes, plan = reduced
        position, source = position.gather(1, plan.kept), plan.index.gather(1, source)
        return total

    for layer, block in enumerate(tower.blocks):
        if cross is not None:
            x = torch.cat([x[:, :-1], x[:, -1:] + cross[layer]], 1)
        host = hosts[layer] | {"prefix": tower.prefix, "class_token": tower.class_token}
        x = forward(block, x, position, sizes.log()[:, None, None, :], reduce, host)
    return x.gather(1, source[:, :length, None].expand(-1, -1, x.shape[2]))


WRITTEN = {
    "vit": plain, "vit_avg": plain, "deit3": plain, "dinov2": plain, "parallel_scaling": parallel,
    "relpos": relative, "relpos_class": relative, "beit": relative, "eva02": rotary, "dinov3": rotary,
    "rope_mixed": rotary, "cait": talking, "naflex_map": plain, "gemma4": gemma,
}  # fmt: skip


def chosen(*ids: str) -> list[Any]:
    return [param for param in CASES if param.id in ids]


@pytest.mark.parametrize("cross_token", [True, False])
@pytest.mark.parametrize("case", chosen(*WRITTEN))
def test_equals_the_forward_written_out(case: Case, cross_token: bool) -> None:
    model, inputs = contract.build(case)
    importance = "cross_token" if cross_token else "attention"
    reducer = crossget.CrossGET(3, cross_token=cross_token, importance=importance, ties="stable")
    with crossget.attach(model, reducer) as attached, torch.no_grad():
        tower, cross = attached.towers["visual"], attached.cross_tokens.get("visual")
        if cross is not None:
            nn.init.normal_(cross, std=0.3)
        hosts: list[dict[str, Any]] = []
        start, end = [], []

        def note(block: nn.Module, args: Any, kwargs: Any) -> None:
            names = list(inspect.signature(type(block).__mro__[1].forward).parameters)[1:]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            start.append(arguments.pop("x"))
            hosts.append(arguments)

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
        hooks.append(tower.blocks[-1].register_forward_hook(lambda _, __, out: end.append(out)))
        contract.run(model, inputs)
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        expected = explicit(WRITTEN[case.id], tower, attached.reducers["visual"], cross, start[0], hosts)
    assert (end[0] - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def dropping(case: Case) -> Case:
    """The case with half of the patches dropped in training, other ones in every image."""
    name, wrap, options = case.make.args  # type: ignore[attr-defined]
    return dataclasses.replace(case, make=partial(build, name, wrap, {**options, "patch_drop_rate": 0.5}))


@pytest.mark.parametrize(
    ("case", "drops", "layout"),
    [
        pytest.param(*chosen(id)[0].values, drops, layout, id=f"{id}-{layout}", marks=chosen(id)[0].marks)
        for id, drops, layout in [
            ("eva02", False, "ND"), ("eva02", True, "B1ND"), ("rope_mixed", False, "HND"), ("rope_mixed", True, "BHND"),
            ("naflex_mixed", True, "BHND"), ("gemma4", False, "BND"),
        ]
    ],
)  # fmt: skip
def test_rotary_rows_follow_their_tokens(case: Case, drops: bool, layout: str) -> None:
    """An attention gets the row of a token of each group, and for the cross token one that does not rotate it."""
    model, inputs = contract.build(dropping(case) if drops else case)
    model.train(drops)
    hosts: list[dict[str, Tensor]] = []
    inside: list[dict[str, Tensor]] = []

    def note(seen: list[dict[str, Tensor]], module: nn.Module, args: Any, kwargs: Any) -> None:
        cls = type(module).__mro__[1] if seen is hosts else type(module)  # a block's class is replaced
        arguments = dict(zip(list(inspect.signature(cls.forward).parameters)[1:], args, strict=False)) | kwargs
        seen.append({name: value for name, value in arguments.items() if name.startswith("rope")})

    with crossget.attach(model, crossget.ToMe(3, cross_token=True)) as attached, attached.recording(), torch.no_grad():
        tower = attached.towers["visual"]
        for block in tower.blocks:
            block.register_forward_pre_hook(partial(note, hosts), with_kwargs=True)
            block.attn.register_forward_pre_hook(partial(note, inside), with_kwargs=True)
        contract.run(model, inputs)
        sources = [record.source for record in attached.records["visual"]]
    for source, host, got in zip(sources, hosts[1:], inside[1:], strict=False):  # of the blocks behind a merge
        assert got.keys() == host.keys() != set()
        for name, table in host.items():
            assert table.dim() == len(layout) or (layout, table.dim()) == ("B1ND", 3)  # [B, N, D] in older versions
            rows = table if "B" in layout else table.expand(2, *table.shape)  # [B, .., N, D]
            sine, cosine = got[name][..., -1, :].chunk(2, -1) if name == "rope" else (got[name][..., -1, :],) * 2
            assert name == "rope_cos" or (sine == 0).all()
            assert name == "rope_sin" or (cosine == 1).all()
            for image, new in itertools.product(range(2), range(tower.prefix, int(source.max()) + 1)):
                group = (source[image] == new).nonzero()[:, 0] - tower.prefix
                own = got[name][image][..., new - tower.prefix, :]
                assert any(torch.equal(own, rows[image][..., old, :].expand_as(own)) for old in group)


@pytest.mark.parametrize("case", chosen("dinov2", "eva02", "rope_mixed", "naflex_rope", "naflex_mixed"))
def test_patches_dropped_in_training(case: Case) -> None:
    """The rotary tables then differ from image to image."""
    model, inputs = contract.build(dropping(case))
    model.train()
    with crossget.attach(model, crossget.CrossGET(2)) as attached:
        contract.leaves(model(*inputs))[0].square().mean().backward()
        first = attached.towers["visual"].prefix + 8 + 1
        assert attached.tokens["visual"] == [first, first - 2, first - 4]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in attached.parameters())


# The other attention kernel, the tokens in front, the intermediates ---------------------------------------------


@pytest.mark.parametrize("importance", ["cross_token", "attention"])
@pytest.mark.parametrize("case", [param for param in CASES if "eager" not in param.id and param.id != "cait"])
def test_without_the_fused_kernel(case: Case, importance: Any) -> None:
    model, inputs = contract.build(case)
    with crossget.attach(model, crossget.CrossGET(case.r, importance=importance, ties="stable")) as attached:
        fused, source = contract.run(model, inputs), attached.source["visual"]
        again = contract.run(eager(model), inputs)
        assert torch.equal(attached.source["visual"], source)
    for x, y in zip(again, fused, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


IN_FRONT = {
    "vit": (1, True), "vit_avg": (0, False), "dinov2": (3, True), "distilled": (2, True), "relpos": (0, False),
    "relpos_class": (1, True), "beit": (1, True), "cait": (0, False), "eva02": (1, True), "eva_registers": (2, False),
    "dinov3": (3, True), "naflex": (3, True), "naflex_map": (0, False), "naflex_mixed": (1, False),
    "qwen3_classifier": (0, False), "deepseek": (0, False), "gemma4": (0, False), "features": (1, True),
}  # fmt: skip


@pytest.mark.parametrize("case", chosen(*IN_FRONT))
def test_the_tokens_in_front_stay(case: Case) -> None:
    model, inputs = contract.build(case)
    prefix, class_token = IN_FRONT[case.id]
    with crossget.attach(model, crossget.CrossGET(4)) as attached:
        tower = attached.towers["visual"]
        contract.run(model, inputs)
        source = attached.source["visual"]
    assert (tower.prefix, tower.class_token) == (prefix, class_token)
    assert torch.equal(source[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (source[:, prefix:] >= prefix).all()


@since("VisionTransformer", "scale_attn_norm")
def test_gated_attention() -> None:
    class Gated(vt.Attention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, gated=True)

    make = partial(build, "VisionTransformer", None, {"attn_layer": Gated})
    contract.reaches_planned_tokens(Case("gated", make, images))


def test_layers_between_show_the_full_grid() -> None:
    case = chosen("vit")[0].values[0]
    model, inputs = contract.build(case)
    dense = model.get_intermediate_layers(*inputs, n=3)
    with crossget.attach(model, crossget.ToMe(4)) as attached, torch.no_grad():
        layers = model.get_intermediate_layers(*inputs, n=3)
        maps = model.forward_intermediates(*inputs, intermediates_only=True)
        source = attached.source["visual"]
        features = model.forward_features(*inputs)
        alone = model.forward_intermediates(*inputs, indices=[0], stop_early=True, intermediates_only=True)
    assert [x.shape for x in layers] == [x.shape for x in dense] == [(2, 16, 48)] * 3
    assert [x.shape for x in maps] == [(2, 48, 4, 4)] * 3
    torch.testing.assert_close(model.norm(layers[2]), features[:, 1:])
    assert torch.equal(alone[0], maps[0])
    for image in range(2):  # tokens that became one look the same
        for one, other in zip(*torch.where(source[image, 1:, None] == source[image, None, 1:]), strict=True):
            assert torch.equal(layers[2][image, one], layers[2][image, other])


# Padded batches -----------------------------------------------------------------------------------------------------

PADDED = {
    "token": {"class_token": True, "reg_tokens": 1, "global_pool": "token"},
    "map": {},
    "avg": {"global_pool": "avg", "reg_tokens": 1, "use_key_only_attn_mask": True},
    "axial": {"global_pool": "avg", "rope_type": "axial"},
    "mixed": {"global_pool": "avg", "rope_type": "mixed", "reg_tokens": 1},
    "eager": {"global_pool": "avg"},
    "gemma": {**GEMMA, "global_pool": "avg", "num_classes": None},
}
naflex = since("Gemma4VitEncoder")


def flexible(kind: str) -> nn.Module:
    options = {**PADDED[kind], "img_size": None}
    options.pop("size", None)
    name, options = ("Gemma4VitEncoder", options) if kind == "gemma" else ("NaFlexVit", NAFLEX | options)
    return contract.build(Case(kind, partial(build, name, eager if kind == "eager" else None, options), images))[0]


def batch(total: int) -> dict[str, Tensor]:
    """Images of 4 x 4 and 3 x 3 patches in sequences of `total`."""
    torch.manual_seed(2)
    patches, coord = torch.zeros(2, total, 192), torch.zeros(2, total, 2, dtype=torch.long)
    valid = torch.zeros(2, total, dtype=torch.bool)
    for image, side in enumerate((4, 3)):
        count = side * side
        patches[image, :count] = torch.randn(count, 192)
        coord[image, :count] = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        valid[image, :count] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@naflex
@pytest.mark.parametrize("kind", PADDED)
def test_padding_does_not_change_what_the_cross_token_sees(kind: str) -> None:
    model = flexible(kind)
    with crossget.attach(model, crossget.CrossGET(0)) as attached:
        nn.init.normal_(attached.cross_tokens["visual"], std=0.3)
        few, many = (contract.run(model, (batch(total),))[0] for total in (16, 30))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


@naflex
@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random])
@pytest.mark.parametrize("kind", PADDED)
def test_padding_joins_padding_only(kind: str, method: Any) -> None:
    model, inputs = flexible(kind), batch(24)
    with crossget.attach(model, method(4)) as attached:
        contract.run(model, (inputs,))
        prefix, source = attached.towers["visual"].prefix, attached.source["visual"]
        assert attached.tokens["visual"][-1] == attached.tokens["visual"][0] - 8
    for image in range(2):
        real = source[image, prefix:][inputs["patch_valid"][image]]
        filler = source[image, prefix:][~inputs["patch_valid"][image]]
        assert set(real.tolist()).isdisjoint(filler.tolist())


@naflex
@pytest.mark.parametrize(
    "method",
    [crossget.CrossGET(2, ties="stable"), crossget.ToMe(crossget.Ratio(0.3)), crossget.Ward(3)],
    ids=repr,
)
@pytest.mark.parametrize("kind", PADDED)
def test_an_image_is_what_it_is_alone(kind: str, method: Any) -> None:
    model = flexible(kind).double()
    inputs = batch(24)
    inputs["patches"] = inputs["patches"].double()
    with crossget.attach(model, method) as attached:
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.3)
        together = contract.run(model, (inputs,))[0]
        for image, count in enumerate((16, 9)):
            own = {name: value[image, None, :count] for name, value in inputs.items()}
            torch.testing.assert_close(together[image, None], contract.run(model, (own,))[0], rtol=0, atol=1e-9)


# What is not supported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224"])
def test_says_why_not(name: str) -> None:
    with pytest.raises(TypeError, match=r"cannot reduce timm.models.*compare no tokens.*crossget.register"):
        crossget.attach(adapter.skeleton(name), crossget.CrossGET(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("botnet26t_256", "full image grid"),
        ("coat_tiny", "full image grid"),
        ("swin_tiny_patch4_window7_224", "windows"),
        ("samvit_base_patch16", r"grid \[B, H, W, C\]"),
        ("xcit_nano_12_p16_224", "over channels"),
        ("pvt_v2_b0", "pyramid"),
        ("levit_conv_128s", "image grid"),
        ("tnt_s_patch16_224", "two sequences"),
    ],
)
def test_explains_in_the_table_of_all_names(name: str, words: str) -> None:
    model = adapter.skeleton(name)
    assert re.search(words, adapter.explain(model))
    assert not adapter.found_in_forward(model)


def test_says_why_not_of_what_it_does_not_know() -> None:
    class Tomorrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = vt.Attention(8)

    Tomorrow.__module__ = "timm.models.tomorrow"
    assert adapter.explain(Tomorrow()) == adapter.UNKNOWN
    with pytest.raises(TypeError, match="no inputs are known"):
        crossget.find_towers(Tomorrow())
    unsupported = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(TypeError, match="compare no tokens"):
        crossget.find_towers(unsupported)


def test_support_matrix() -> None:
    rows = {row.name: row for row in adapter.support_matrix("test_*")}
    assert rows["test_vit"].towers == ("visual: 6 blocks (Block), prefix 1, class token",)
    assert rows["test_vit"].architecture == "VisionTransformer"
    assert not rows["test_resnet"].supported
    assert rows["test_resnet"].reason == adapter.NO_ATTENTION
    page = markdown(rows.values())
    assert f"{sum(row.supported for row in rows.values())} of {len(rows)} names" in page
    assert "`test_vit`" in page
    assert adapter.NO_ATTENTION in page


def test_gradients_through_checkpoints_where_a_block_removes_nothing() -> None:
    """What a block leaves must not be seen by its own recomputation."""
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=64).train()
        model.set_grad_checkpointing(checkpoints)
        images = torch.randn(2, 3, 64, 64, requires_grad=True)
        with crossget.attach(model, crossget.ToMe(r=(4, 0, 4, 0))):
            shown = model.forward_intermediates(images, intermediates_only=True)
            sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in shown).backward()
        assert images.grad is not None
        gradients.append(images.grad)
    assert torch.equal(*gradients)
