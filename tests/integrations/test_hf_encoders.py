"""transformers' encoders: the contract for every family, and features against forwards written out and other hosts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hf_models
import open_clip
import pytest
import torch
import transformers
from hf_models import VERSION
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from written_out import followed, on_the_grid

import contract
import crossget
from contract import Case
from crossget.methods.importance import by_attention
from crossget.methods.reducers import Reducer, View

R = 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
WORDS = {
    **SIZES, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
DINO = {**IMAGES, **NO_DROPOUT, "mlp_ratio": 2, "layerscale_value": 0.5}
# Rotary positions are moved at random in training, unless these are None.
DINOV3 = {**IMAGES, "num_register_tokens": 2, "layerscale_value": 0.5} | dict.fromkeys(
    ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
)
STAGES = {"out_features": ["stage1", "stage3"]}


def configuration(family: str, options: dict[str, Any]) -> Any:
    """The configuration of a small model, by the beginning of its class's name."""
    if family in ("CLIP", "Siglip", "Siglip2"):
        joint = {"projection_dim": 16} if family == "CLIP" else {}
        sizes = {**SIZES, "patch_size": 4, "num_patches": 16} if family == "Siglip2" else IMAGES
        both = {"text_config": WORDS | joint | options, "vision_config": sizes | joint | options}
        return getattr(transformers, f"{family}Config")(**both, **joint)
    given = {"Dinov2": DINO, "Dinov2WithRegisters": {**DINO, "num_register_tokens": 2}, "DINOv3ViT": DINOV3}
    return getattr(transformers, f"{family}Config")(**{**given.get(family, {**IMAGES, **NO_DROPOUT}), **options})


def make(family: str, name: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    config = configuration(family, options)
    if "TextModel" in name:
        config = config.text_config
    elif "VisionModel" in name:
        config = config.vision_config
    model = hf_models.built(getattr(transformers, name), config, attention)
    kinds = {type(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert set(kinds.values()) == {attention}
    return model


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 32, 32),)


def words() -> tuple[Tensor, ...]:
    """Texts of 9 and 12 tokens, the last of which is the end, and padding behind."""
    ids = torch.randint(2, 59, (2, 12))
    ids[:, 0], ids[0, 8], ids[1, 11] = 1, 59, 59
    ids[0, 9:] = 0
    return ids, (ids != 0).long()


def both() -> tuple[Tensor, ...]:
    ids, mask = words()
    return ids, *images(), mask


def patches() -> tuple[Tensor, ...]:
    """Images of 4 x 5 and 3 x 4 patches, filled up to 24."""
    mask = (torch.arange(24) < torch.tensor([20, 12])[:, None]).int()
    return torch.randn(2, 24, 48) * mask[:, :, None], mask, torch.tensor([[4, 5], [3, 4]])


def both_with_patches() -> tuple[Tensor, ...]:
    ids, mask = words()
    return ids, *patches(), mask


FAMILIES: dict[str, dict[str, Callable[[], tuple[Tensor, ...]]]] = {
    "CLIP": {
        "CLIPModel": both, "CLIPVisionModel": images, "CLIPVisionModelWithProjection": images,
        "CLIPForImageClassification": images, "CLIPTextModel": words, "CLIPTextModelWithProjection": words,
    },
    "Siglip": {
        "SiglipModel": both, "SiglipVisionModel": images, "SiglipForImageClassification": images,
        "SiglipTextModel": words,
    },
    "Siglip2": {
        "Siglip2Model": both_with_patches, "Siglip2VisionModel": patches, "Siglip2ForImageClassification": patches,
        "Siglip2TextModel": words,
    },
    "ViT": {"ViTModel": images, "ViTForImageClassification": images, "ViTForMaskedImageModeling": images},
    "DeiT": {
        "DeiTModel": images, "DeiTForImageClassification": images,
        "DeiTForImageClassificationWithTeacher": images, "DeiTForMaskedImageModeling": images,
    },
    "Dinov2": {"Dinov2Model": images, "Dinov2ForImageClassification": images, "Dinov2Backbone": images},
    "Dinov2WithRegisters": {
        "Dinov2WithRegistersModel": images, "Dinov2WithRegistersForImageClassification": images,
        "Dinov2WithRegistersBackbone": images,
    },
    "DINOv3ViT": {"DINOv3ViTModel": images, "DINOv3ViTBackbone": images},
}  # fmt: skip


def since(name: str) -> pytest.MarkDecorator:
    there = hasattr(transformers, name)
    return pytest.mark.skipif(not there, reason=f"transformers {transformers.__version__} has no {name}")


def case(family: str, name: str, attention: str, inputs: Any) -> Any:
    backbone = name.endswith("Backbone")
    built = partial(make, family, name, attention, **(STAGES if backbone else {}))
    id = f"{name}-{attention}"
    # The hooks that newer versions record a backbone's hidden states with cannot be pickled, attached or not.
    flags = {"compiles": False, "fused": attention == "sdpa", "pickles": not backbone or VERSION < (5, 0)}
    return pytest.param(Case(id, built, inputs, R, **flags), id=id, marks=since(name))


CASES = [
    case(family, name, attention, inputs)
    for family, classes in FAMILIES.items()
    for name, inputs in classes.items()
    # The blocks are the same in all classes of a family, of which the first has all towers.
    for attention in (("sdpa", "eager") if name == next(iter(classes)) else ("sdpa",))
]


FIRST = [next(iter(classes)) for classes in FAMILIES.values()]


@pytest.mark.parametrize("probe", contract.OTHERS, ids=contract.name)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


@pytest.mark.parametrize("probe", contract.OF_BLOCKS, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(lambda id: id.rpartition("-")[0] in FIRST, CASES))
def test_contract_of_blocks(case: Case, probe: Callable[[Case], None]) -> None:
    probe(case)


@pytest.mark.parametrize("case", [param for param in CASES if "Text" not in str(param.id) and "sdpa" in str(param.id)])
def test_a_forward_shows_the_declared_tower(case: Case) -> None:
    contract.a_forward_shows_the_declared_tower(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_class_compiles(case: Case) -> None:
    if VERSION < (5, 0) and "Siglip2" in case.id and "Text" not in case.id:
        pytest.skip("this SigLIP2 resizes its positions image by image, which cannot be traced")
    contract.compiles_to_one_graph(dataclasses.replace(case, compiles=True))


# Younger than the oldest versions: kernels are looked up by name, and a mask may hide patches.
KERNELS = hasattr(transformers, "AttentionInterface")
MASKED = {
    name: "attention_mask" in inspect.signature(getattr(transformers, name).forward).parameters
    for name in ("ViTModel", "Dinov2Model")
}


def test_nothing_is_skipped_on_the_newest_transformers() -> None:
    skipped = [param.id for param in CASES if any(mark.args[0] for mark in param.marks)]
    assert VERSION < (5, 24) or (skipped == [] and KERNELS and all(MASKED.values()))


def chosen(*ids: str) -> list[Any]:
    return [param for param in CASES if param.id in ids]


def first(*attention: str) -> list[Any]:
    """The class with all towers of every family."""
    return chosen(*(f"{next(iter(classes))}-{kind}" for classes in FAMILIES.values() for kind in attention))


def trained(model: nn.Module, reducer: Any) -> crossget.Attachment:
    """Attached, with cross tokens that are not zero."""
    attached = crossget.attach(model, reducer)
    for parameter in attached.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attached


# Against forwards written out ---------------------------------------------------------------------------------------


def split(x: Tensor) -> Tensor:
    """[B, T, C] -> [B, H, T, D]."""
    return x.unflatten(2, (4, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def clip_block(block: Any, x: Any, position: Tensor, bias: Tensor, reduce: Any) -> Any:
    """CLIP and SigLIP."""
    h, attn = block.layer_norm1(x), block.self_attn
    q, k, v = (split(p(h)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    out, weights = attend(q, k, v, bias)
    x = reduce(x + attn.out_proj(out), q, k, weights)
    return x + block.mlp(block.layer_norm2(x))


def rotary_block(tables: Any, block: Any, x: Any, position: Tensor, bias: Tensor, reduce: Any) -> Any:
    """DINOv3: class token, registers and cross token are not rotated."""
    cosine, sine = (
        F.pad(table, (0, 0, 3, 1), value=still)[position][:, None]
        for table, still in zip(tables, (1.0, 0.0), strict=True)
    )

    def rotated(part: Tensor) -> Tensor:
        a, b = part.chunk(2, -1)
        return part * cosine + torch.cat([-b, a], -1) * sine

    h, attn = block.norm1(x), block.attention
    q, k, v = (split(p(h)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    out, weights = attend(rotated(q), rotated(k), v, bias)
    x = reduce(x + block.layer_scale1(attn.o_proj(out)), rotated(q), rotated(k), weights)
    return x + block.layer_scale2(block.mlp(block.norm2(x)))


# Two nearest neighbours tie: the default leaves which of them moves to the last bit, in which two ways to compute the
# same differ on some processors.
tied = partial(crossget.CrossGET, ties="stable")


def seen(tower: crossget.Tower, real: Tensor) -> Tensor:
    """[B, T0 + 1, T0 + 1] which key a query sees, the cross token being the last of both."""
    batch, length = real.shape
    inside = real[:, None, :].expand(-1, length, -1)
    inside = inside.tril() if tower.causal else inside
    column = torch.full((batch, length, 1), not tower.causal)
    row = torch.cat([real, torch.ones(batch, 1, dtype=torch.bool)], 1)
    return torch.cat([torch.cat([inside, column], 2), row[:, None]], 1)


def explicit(
    forward: Any, attached: crossget.Attachment, name: str, x: Tensor, real: Tensor | None = None,
    end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reduced tower with a cross token: `forward` computes a block, and calls `reduce` behind the attention."""
    tower, cross = attached.towers[name], attached.cross_tokens[name]
    reducer: Any = attached.reducers[name]
    batch, length, _ = x.shape
    known = torch.ones(batch, length, dtype=torch.bool) if real is None else real.bool()
    valid = torch.cat([known, torch.ones(batch, 1, dtype=torch.bool)], 1)
    mean = (x * known[:, :, None]).sum(1, keepdim=True) / known.sum(1)[:, None, None]
    x = torch.cat([x, x[:, :1] if tower.class_token else mean], 1)
    position = source = torch.arange(length + 1).expand(batch, -1)
    mask, sizes, ends = seen(tower, known), torch.ones(batch, length + 1), end

    def reduce(total: Tensor, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        nonlocal position, source, sizes, valid, ends
        protected = (position < tower.prefix) | (position == length)
        if end is not None:
            protected = protected | (position == end[:, None])
        guide = torch.full((batch,), total.shape[1] - 1) if ends is None else ends
        view = View(
            total, q, k, by_attention(weights, valid).mean(1), sizes, protected, int(protected[0].sum()), valid, guide
        )
        total, sizes, plan = reducer.reduce(view, reducer.r)
        position, valid = position.gather(1, plan.kept), valid.gather(1, plan.kept)
        source = followed(source, plan)
        ends = None if ends is None else plan.index.gather(1, ends[:, None])[:, 0]
        return total

    for layer, block in enumerate(tower.blocks):
        origin = x[:, -1] if ends is None else x[torch.arange(batch), ends]
        x = torch.cat([x[:, :-1], (origin + cross[layer])[:, None]], 1)
        shown = mask[torch.arange(batch)[:, None, None], position[:, :, None], position[:, None, :]]
        bias = sizes.log()[:, None, None, :] + torch.zeros_like(shown, dtype=x.dtype).masked_fill(~shown, -1e9)[:, None]
        x = forward(block, x, position, bias, reduce)
    return on_the_grid(x, source[:, :length], valid, tower.prefix, True)


def image_embeds(model: Any, inputs: tuple[Any, ...], attached: crossget.Attachment) -> Tensor:
    """As CLIPModel or SiglipModel gives them, the tower written out."""
    vision = model.vision_model
    padded = len(inputs) > 3
    x = vision.embeddings(inputs[1], inputs[3]) if padded else vision.embeddings(inputs[1])
    x = vision.pre_layrnorm(x) if hasattr(vision, "pre_layrnorm") else x
    x = explicit(clip_block, attached, "visual", x, inputs[2] if padded else None)
    x = vision.post_layernorm(x)
    if hasattr(model, "visual_projection"):
        return F.normalize(model.visual_projection(x[:, 0]), dim=-1)
    return F.normalize(vision.head(x, inputs[2]) if padded else vision.head(x), dim=-1)


def text_embeds(model: Any, ids: Tensor, mask: Tensor | None, end: Tensor, attached: crossget.Attachment) -> Tensor:
    text = model.text_model
    x = explicit(clip_block, attached, "text", text.embeddings(ids), mask, end)
    head = getattr(model, "text_projection", None) or text.head
    return F.normalize(head(text.final_layer_norm(x)[torch.arange(len(ids)), end]), dim=-1)


# With r = 1 the second block has as many tokens as the host's mask was made for: 12 and the cross token, less 1.
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("eos", [2, 40])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clip_equals_the_forward_written_out(attention: str, eos: int, padded: bool, r: int) -> None:
    make_clip = partial(make, "CLIP", "CLIPModel", attention, eos_token_id=eos)
    model, _ = contract.build(Case("", make_clip, both))
    ids, pixels, mask = both()
    ids[0, 8] = ids[1, 11] = eos if eos != 2 else 59
    end = torch.tensor([8, 11]) if eos == 40 else ids.argmax(1)
    assert eos != 40 or (ids.max(1).values > eos).all()
    inputs = (ids, pixels, mask if padded else None)
    with trained(model, {"visual": tied(r), "text": tied(r)}) as attached, torch.no_grad():
        out = model(*inputs)
        assert attached.tokens == {name: [n, n - r, n - 2 * r] for name, n in (("visual", 18), ("text", 13))}
    with torch.no_grad():
        images, texts = image_embeds(model, inputs, attached), text_embeds(model, *inputs[::2], end, attached)
    torch.testing.assert_close(out.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.text_embeds, texts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(
    "case", chosen("SiglipModel-sdpa", "SiglipModel-eager", "Siglip2Model-sdpa", "Siglip2Model-eager")
)
def test_siglip_equals_the_forward_written_out(case: Case, r: int) -> None:
    model, inputs = contract.build(case)
    ids, mask = inputs[0], inputs[-1]
    with trained(model, {"visual": tied(r), "text": tied(r)}) as attached, torch.no_grad():
        out = model(*inputs)
    with torch.no_grad():
        images = image_embeds(model, inputs, attached)
        texts = text_embeds(model, ids, mask, torch.tensor([11, 11]), attached)
    torch.testing.assert_close(out.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.text_embeds, texts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("case", chosen("DINOv3ViTModel-sdpa", "DINOv3ViTModel-eager"))
def test_dinov3_equals_the_forward_written_out(case: Case, r: int) -> None:
    model, (pixels,) = contract.build(case)
    with trained(model, tied(r)) as attached, torch.no_grad():
        out = model(pixels).last_hidden_state
    with torch.no_grad():
        block = partial(rotary_block, model.rope_embeddings(pixels))
        expected = model.norm(explicit(block, attached, "visual", model.embeddings(pixels)))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


# Against another host -----------------------------------------------------------------------------------------------


def copied(model: Any) -> open_clip.CLIP:
    """open_clip's CLIP with the weights of transformers'."""
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 2.0}
    other = open_clip.CLIP(16, vision, text, quick_gelu=True).eval()
    with torch.no_grad():
        visual = other.visual
        visual.class_embedding.copy_(model.vision_model.embeddings.class_embedding)
        visual.positional_embedding.copy_(model.vision_model.embeddings.position_embedding.weight)
        visual.conv1.weight.copy_(model.vision_model.embeddings.patch_embedding.weight)
        visual.proj.copy_(model.visual_projection.weight.T)
        other.token_embedding.weight.copy_(model.text_model.embeddings.token_embedding.weight)
        other.positional_embedding.copy_(model.text_model.embeddings.position_embedding.weight)
        other.text_projection.copy_(model.text_projection.weight.T)
        for ours, theirs in (
            (visual.ln_pre, model.vision_model.pre_layrnorm),
            (visual.ln_post, model.vision_model.post_layernorm),
            (other.ln_final, model.text_model.final_layer_norm),
        ):
            ours.load_state_dict(theirs.state_dict())
        pairs = zip(
            (*visual.transformer.resblocks, *other.transformer.resblocks),
            (*model.vision_model.encoder.layers, *model.text_model.encoder.layers),
            strict=True,
        )
        for block, layer in pairs:
            attn = layer.self_attn
            for kind, into in (("weight", block.attn.in_proj_weight), ("bias", block.attn.in_proj_bias)):
                into.copy_(torch.cat([getattr(p, kind) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]))
            for ours, theirs in (
                (block.attn.out_proj, attn.out_proj), (block.ln_1, layer.layer_norm1), (block.ln_2, layer.layer_norm2),
                (block.mlp.c_fc, layer.mlp.fc1), (block.mlp.c_proj, layer.mlp.fc2),
            ):  # fmt: skip
                ours.load_state_dict(theirs.state_dict())
    return other


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe])
def test_clip_equals_open_clips(method: Any, attention: str) -> None:
    make_clip = partial(make, "CLIP", "CLIPModel", attention, hidden_act="quick_gelu")
    model, (_, pixels, _) = contract.build(Case("", make_clip, both))
    ids = torch.randint(2, 59, (2, 16))
    ids[0, 9:], ids[1, 15] = 0, 59
    ids[0, 8] = 59
    other = copied(model)
    reducers = {"visual": method(3), "text": method(2)}
    with trained(model, reducers) as attached, crossget.attach(other, reducers) as attached_other, torch.no_grad():
        for name, cross in attached_other.cross_tokens.items():
            cross.copy_(attached.cross_tokens[name])
        out = model(ids, pixels)
        images, texts = other.encode_image(pixels, normalize=True), other.encode_text(ids, normalize=True)
        assert attached.tokens == attached_other.tokens
        assert all(torch.equal(source, attached_other.source[name]) for name, source in attached.source.items())
    torch.testing.assert_close(out.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.text_embeds, texts, rtol=0, atol=1e-5)


# Attention kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["cross_token", "attention"])
@pytest.mark.parametrize("case", first("sdpa"))
def test_eager_equals_sdpa(case: Case, importance: Any) -> None:
    model, inputs = contract.build(case)
    eager = case.make.func(*case.make.args[:2], "eager")
    eager.load_state_dict(model.state_dict())
    reducers = contract.everywhere(model, crossget.CrossGET(R, importance=importance, ties="stable"))
    with trained(model, reducers) as attached, crossget.attach(eager, reducers) as attached_again, torch.no_grad():
        for name, cross in attached_again.cross_tokens.items():
            cross.copy_(attached.cross_tokens[name])
        out, out_again = contract.run(model, inputs), contract.run(eager.eval(), inputs)
    for x, y in zip(out_again, out, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.fixture
def hidden_kernel() -> Iterator[list[int]]:
    """An attention implementation whose inside cannot be watched; the fixture counts its calls."""
    if not KERNELS:
        pytest.skip(f"transformers {transformers.__version__} chooses its attention when a model is made")
    interface, calls = transformers.AttentionInterface, [0]

    def attend_hidden(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls[0] += 1
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous(), None

    interface.register("hidden", attend_hidden)
    yield calls
    del interface._global_mapping["hidden"]


@pytest.mark.parametrize("case", first("sdpa"))
def test_another_kernel_makes_room_for_sdpa(case: Case, hidden_kernel: list[int]) -> None:
    model, inputs = contract.build(case)
    reducers = contract.everywhere(model, crossget.CrossGET(R))
    with crossget.attach(model, reducers):
        expected = contract.run(model, inputs)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    for config in configs:
        config._attn_implementation = "hidden"
    dense = contract.run(model, inputs)
    used = hidden_kernel[0]
    assert used > 0
    with crossget.attach(model, reducers):
        assert contract.all_equal(contract.run(model, inputs), expected)
    assert hidden_kernel[0] == used
    assert {config._attn_implementation for config in configs} == {"hidden"}
    assert contract.all_equal(contract.run(model, inputs), dense)
    assert hidden_kernel[0] == 2 * used


# Padding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random])
@pytest.mark.parametrize(
    "case", chosen("CLIPModel-sdpa", "CLIPModel-eager", "SiglipTextModel-sdpa", "Siglip2Model-sdpa")
)
def test_padding_joins_padding_only(case: Case, method: Any) -> None:
    model, inputs = contract.build(case)
    real = {"text": inputs[-1].bool()}
    if "Siglip2" in case.id:
        real["visual"] = inputs[2].bool()
    with crossget.attach(model, contract.everywhere(model, method(R))) as attached:
        contract.run(model, inputs)
        sources = attached.source
    for name, kept in real.items():
        for source, row in zip(sources[name], kept, strict=True):
            assert set(source[row].tolist()).isdisjoint(source[~row].tolist())


@pytest.mark.parametrize("case", chosen("Siglip2VisionModel-sdpa"))
def test_more_padding_changes_nothing_for_images(case: Case) -> None:
    model, (x, mask, shapes) = contract.build(case)
    with trained(model, crossget.CrossGET(0)), torch.no_grad():
        few, many = (model(F.pad(x, (0, 0, 0, more)), F.pad(mask, (0, more)), shapes).pooler_output for more in (0, 7))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


ALONE = [
    crossget.CrossGET(3, ties="stable"), crossget.CrossGET(20, ties="stable", importance="attention"),
    crossget.CrossGET(crossget.Ratio(0.3), ties="stable", norm_correction=True), crossget.ToMe(2), crossget.Ward(3),
    crossget.ToMe(crossget.RampedRatio(0.4)), crossget.Ward(crossget.Linear(5, 0), matching="ward", key_stride=1),
    crossget.TopK(2, importance="attention"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:r of ")  # some methods ask for more than short texts have
@pytest.mark.parametrize("method", ALONE, ids=repr)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_a_text_is_what_it_is_alone(method: Reducer, lengths: list[int], more: int, seed: int) -> None:
    """The lengths of the other texts of a batch, and padding beyond the longest, change nothing."""
    model = contract.build(chosen("CLIPTextModel-sdpa")[0].values[0])[0]
    # Before 5.0, CLIP's causal mask overflows in float64.
    model, atol = (model.double(), 1e-9) if hf_models.VERSION >= (5, 0) else (model, 1e-5)
    width = min(16, max(lengths) + more)
    ids = torch.randint(2, 59, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 59
    ids = ids.masked_fill(mask == 0, 0)
    with trained(model, method), torch.no_grad():
        together = model(ids, mask).pooler_output
        alone = [model(row[None, :n], seen[None, :n]) for row, seen, n in zip(ids, mask, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat([out.pooler_output for out in alone]), rtol=0, atol=atol)


@since("Siglip2Model")
@pytest.mark.parametrize("method", ALONE, ids=repr)
def test_an_image_is_what_it_is_alone(method: Reducer) -> None:
    model, (x, mask, shapes) = contract.build(chosen("Siglip2VisionModel-sdpa")[0].values[0])
    model, x = model.double(), x.double()
    with trained(model, method), torch.no_grad():
        together = model(x, mask, shapes).pooler_output
        counts = mask.sum(1).tolist()
        alone = [model(x[i, None, :n], mask[i, None, :n], shapes[i, None]) for i, n in enumerate(counts)]
    torch.testing.assert_close(together, torch.cat([out.pooler_output for out in alone]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MASKED)
def test_hidden_patches_join_hidden_patches_only(name: str) -> None:
    if not MASKED[name]:
        pytest.skip(f"{name} of transformers {transformers.__version__} takes no mask")
    model, (pixels,) = contract.build(chosen(f"{name}-sdpa")[0].values[0])
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = mask[1, 4:6] = 0
    with crossget.attach(model, crossget.CrossGET(R)) as attached, torch.no_grad():
        model(pixels, attention_mask=mask)
        for source, row in zip(attached.source["visual"], mask.bool(), strict=True):
            assert set(source[row].tolist()).isdisjoint(source[~row].tolist())


# What else is read of a tower ---------------------------------------------------------------------------------------

IN_FRONT = {
    "CLIPVisionModel": (1, True), "CLIPTextModel": (1, False), "SiglipVisionModel": (0, False),
    "SiglipTextModel": (1, False), "Siglip2VisionModel": (0, False), "ViTModel": (1, True), "DeiTModel": (2, True),
    "Dinov2Model": (1, True), "Dinov2WithRegistersModel": (3, True), "DINOv3ViTModel": (3, True),
}  # fmt: skip


@pytest.mark.parametrize("case", chosen(*(f"{name}-sdpa" for name in IN_FRONT)))
def test_the_tokens_in_front_stay(case: Case) -> None:
    model, inputs = contract.build(case)
    prefix, class_token = IN_FRONT[case.id.removesuffix("-sdpa")]
    with crossget.attach(model, crossget.CrossGET(4)) as attached:
        ((name, tower),) = attached.towers.items()
        contract.run(model, inputs)
        source = attached.source[name]
    assert (tower.prefix, tower.class_token) == (prefix, class_token)
    assert torch.equal(source[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert ((source[:, prefix:] >= prefix) | (source[:, prefix:] < 0)).all()


@pytest.mark.parametrize("case", chosen(*(f"{name}-sdpa" for name in IN_FRONT)))
def test_hidden_states_are_on_the_full_grid(case: Case) -> None:
    model, inputs = contract.build(case)
    with torch.no_grad():
        dense = model(*inputs, output_hidden_states=True)  # leaves hooks, or a forward, on the blocks of some versions
        before = contract.identity(model)
        with crossget.attach(model, crossget.CrossGET(R)) as attached:
            out = model(*inputs, output_hidden_states=True)
            (tokens,) = attached.tokens.values()
            assert tokens[-1] < tokens[0]
            plain = model(*inputs)
        assert contract.identity(model) == before
        again = model(*inputs, output_hidden_states=True)
    length = dense.hidden_states[0].shape[1]
    assert [x.shape[1] for x in out.hidden_states] == [length] * len(dense.hidden_states)
    assert torch.equal(out.last_hidden_state, plain.last_hidden_state)
    assert contract.all_equal(list(again.hidden_states), list(dense.hidden_states))


@pytest.mark.parametrize("case", [param for param in CASES if "Backbone" in param.id])
def test_backbones_read_the_full_grid(case: Case) -> None:
    backbone, (pixels,) = contract.build(case)
    model, _ = contract.build(chosen(case.id.replace("Backbone", "Model"))[0].values[0])
    model.load_state_dict(backbone.state_dict())
    reducer = crossget.CrossGET(R)
    with torch.no_grad(), crossget.attach(backbone, reducer) as attached, crossget.attach(model, reducer):
        first, last = backbone.forward_with_filtered_kwargs(pixels, output_hidden_states=True).feature_maps
        expected = model(pixels).last_hidden_state
        prefix, tokens = attached.towers["visual"].prefix, attached.tokens["visual"]
        assert inspect.signature(backbone.forward) == inspect.signature(type(backbone).forward.__get__(backbone))
        states = backbone(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(last.flatten(2).mT, expected[:, prefix:], rtol=0, atol=1e-6)
    assert [x.shape[1] for x in states] == [prefix + 16] * 4
    for image in first:  # patches that became one look the same
        assert len(image.flatten(1).unique(dim=1).T) == tokens[1] - prefix - 1


def test_alignment_loss() -> None:
    model, inputs = contract.build(chosen("CLIPModel-sdpa")[0].values[0])
    with trained(model, crossget.CrossGET(R)) as attached:
        model(*inputs)
        loss = attached.alignment_loss()
        loss.backward()
        assert 0 < loss < float("inf")
        assert all(cross.grad is not None and cross.grad.any() for cross in attached.parameters())
        assert model.visual_projection.weight.grad is None
        ways: dict[str, Any] = {name: tower.project for name, tower in attached.towers.items()}
    tokens, vision, text = torch.randn(5, 32), model.vision_model, model.text_model
    assert torch.equal(ways["visual"](tokens), model.visual_projection(vision.pre_layrnorm(tokens)))
    assert torch.equal(ways["text"](tokens), model.text_projection(text.final_layer_norm(tokens)))


def test_no_alignment_behind_an_attention_pool() -> None:
    model, inputs = contract.build(chosen("SiglipModel-sdpa")[0].values[0])
    with crossget.attach(model, crossget.CrossGET(R)) as attached:
        model(*inputs)
        with pytest.raises(RuntimeError, match="no projection .*: visual"):
            attached.alignment_loss()
        way: Any = attached.towers["text"].project
    tokens, text = torch.randn(5, 32), model.text_model
    assert torch.equal(way(tokens), text.head(text.final_layer_norm(tokens)))


# What is not supported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [crossget.Ward(8), crossget.ToMe(8), crossget.CrossGET(8), crossget.Random(8)])
def test_a_mask_of_ones_and_the_kernel_change_nothing(method: Any) -> None:
    config = transformers.CLIPTextConfig(**hf_models.TEXT)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    found, weights = [], None
    for kernel in ("sdpa", "eager"):
        model = hf_models.built(transformers.CLIPTextModel, config, kernel)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        for mask in (None, torch.ones_like(ids)):
            with torch.no_grad(), crossget.attach(model, {"text": method}) as attached:
                found.append((model(ids, attention_mask=mask).last_hidden_state, attached.tokens))
    for out, tokens in found[1:]:
        assert tokens == found[0][1]
        torch.testing.assert_close(out, found[0][0], rtol=0, atol=1e-5)
