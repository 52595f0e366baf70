"""open_clip's towers: the contract on a small model of each kind, then what is particular to texts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip import coca_model
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from written_out import followed, on_the_grid

import contract
import crossget
from crossget.core.adapters import Tower
from crossget.methods.reducers import Reducer, View

# What the installed open_clip has, of 2.26 to 3.3.
FIELDS = CLIPTextCfg.__dataclass_fields__
PAD_MASKS = hasattr(TextTransformer, "_build_additive_mask")
WIDTH, VOCABULARY, CONTEXT, IMAGE = 32, 60, 16, 32
END, PAD = VOCABULARY - 1, 0
PIXELS: dict[str, Any] = {"image_size": IMAGE, "layers": 3, "width": WIDTH, "head_width": 16, "patch_size": 8}
WORDS: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 3}


def vision(**settings: Any) -> CLIPVisionCfg:
    return CLIPVisionCfg(**{**PIXELS, **settings})


def words(**settings: Any) -> CLIPTextCfg:
    return CLIPTextCfg(**{**WORDS, **settings})


def clip(v: dict[str, Any] | None = None, t: dict[str, Any] | None = None) -> nn.Module:
    return open_clip.CLIP(24, vision(**(v or {})), words(**(t or {})))


def custom(v: dict[str, Any] | None = None, t: dict[str, Any] | None = None) -> nn.Module:
    return open_clip.CustomTextCLIP(24, vision(**(v or {})), words(**(t or {})))


def coca() -> nn.Module:
    v = vision(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5, output_tokens=True)
    t = words(embed_cls=True, output_tokens=True)
    model = open_clip.CoCa(WIDTH, coca_model.MultimodalCfg(**{**WORDS, "layers": 2}), t, v)
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # which open_clip leaves as the memory was
    return model


def trunk(name: str, pool: str, proj: str, image: int = 160) -> nn.Module:
    return custom({"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image})


def eva() -> nn.Module:
    """As EVA-CLIP: rotary positions, class token, the trunk's own head as projection."""
    model: Any = custom({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "", "image_size": 160})
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model.visual.trunk = timm.models.eva.Eva(**sizes, num_classes=24, global_pool="token", use_rot_pos_emb=True)
    return model


def without_checkpointing(make: Callable[[], nn.Module]) -> nn.Module:
    """For the contract: open_clip hands too many arguments to its custom blocks when it checkpoints them."""
    model = make()
    model.set_grad_checkpointing = None
    return model


def pad_masked() -> nn.Module:
    model = custom()
    model.text = TextTransformer(**WORDS, output_dim=24, no_causal_mask=True, use_pad_mask=True, pool_type="argmax")
    return model


ROBERTA = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 40, "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
HF_CONFIGS = {
    "roberta": partial(transformers.RobertaConfig, **ROBERTA),
    "xlm-roberta": partial(transformers.XLMRobertaConfig, **ROBERTA),
    "bert": partial(transformers.BertConfig, **ROBERTA),
    "mt5": partial(
        transformers.MT5Config, vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=3, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, pad_token_id=PAD,
        dropout_rate=0.0,
    ),
    "m2m_100": partial(
        transformers.M2M100Config, vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_layerdrop=0.0, max_position_embeddings=40, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    ),
}  # fmt: skip


def hugging_face(kind: str, pooler: str, proj: str = "mlp", attention: str | None = None) -> nn.Module:
    """CustomTextCLIP with an encoder of transformers, as open_clip makes it when it has weights to load."""
    model = without_checkpointing(partial(custom, {"layers": 2}))  # see test_hugging_face_checkpointing
    config = HF_CONFIGS[kind]()
    if attention is not None:
        config._attn_implementation = attention
    text = HFTextEncoder("", 24, config=config, pooler_type=pooler, proj_type=proj)
    if hasattr(text.transformer, "decoder"):
        text.transformer = text.transformer.encoder
    elif pooler != "cls_pooler":
        text.transformer.pooler = None
    model.text = text
    return model


def images(size: int = IMAGE) -> Tensor:
    return torch.randn(2, 3, size, size)


def texts() -> Tensor:
    """Two texts of 13 and 9 tokens, the last of each being the end of text, then padding."""
    ids = torch.randint(3, END, (2, CONTEXT))
    for row, length in enumerate((13, 9)):
        ids[row, length - 1] = END
        ids[row, length:] = PAD
    return ids


def both(size: int = IMAGE) -> tuple[Tensor, ...]:
    return images(size), texts()


def case(
    name: str, make: Callable[[], nn.Module], size: int = IMAGE, fused: bool = True, hands_on: bool = False
) -> contract.Case:
    """All are compiled by a slow test; in the default run timm's ViT and LLaVA are."""
    return contract.Case(name, make, partial(both, size), compiles=False, fused=fused, hands_on=hands_on)


AVERAGE = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1}
ATTENTIONAL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3}
CASES = [
    case("clip", clip),
    case("clip_avg", partial(clip, AVERAGE)),
    case("clip_attentional_pool", partial(clip, ATTENTIONAL)),
    case("first_causal", partial(custom, None, {"pool_type": "first"})),
    case("last_bidirectional", partial(custom, None, {"pool_type": "last", "no_causal_mask": True, "proj_bias": True})),
    case("argmax_bidirectional", partial(clip, None, {"no_causal_mask": True})),
    case("coca", coca),
    case("timm_average", partial(trunk, "test_vit", "avg", "linear"), 160),
    case("timm_map", partial(trunk, "test_vit3", "map", "none"), 160),
    case("eva", eva),
    case("roberta_mean", partial(hugging_face, "roberta", "mean_pooler")),
    case("xlm_roberta_eager", partial(hugging_face, "xlm-roberta", "mean_pooler", attention="eager"), fused=False),
    case("roberta_first", partial(hugging_face, "roberta", "cls_last_hidden_state_pooler", "linear")),
    case("bert_pooler", partial(hugging_face, "bert", "cls_pooler")),
    case("mt5", partial(hugging_face, "mt5", "mean_pooler"), fused=False, hands_on=True),
    case("nllb", partial(hugging_face, "m2m_100", "cls_pooler", "linear")),
]
if "eos_id" in FIELDS:
    CASES += [case("eos", partial(custom, None, {"pool_type": "eos", "eos_id": END, "proj_type": "none", "width": 24}))]
if PAD_MASKS:
    CASES += [case("pad_masked", pad_masked)]
if "qk_norm" in FIELDS:
    custom_blocks = partial(clip, {"qk_norm": True}, {"qk_norm": True, "scale_heads": True})
    CASES += [case("custom_blocks", partial(without_checkpointing, custom_blocks))]


@pytest.mark.parametrize("probe", contract.OTHERS, ids=contract.name)
@pytest.mark.parametrize("case", CASES, ids=contract.name)
def test_contract(case: contract.Case, probe: Callable[[contract.Case], None]) -> None:
    probe(case)


# These have the blocks, and the masks, of other cases.
SAME_BLOCKS = ("clip_attentional_pool", "first_causal", "timm_map", "roberta_first", "eos")


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")  # open_clip once did not say use_reentrant
@pytest.mark.parametrize("probe", contract.OF_BLOCKS, ids=contract.name)
@pytest.mark.parametrize("case", contract.slow_unless(lambda id: id not in SAME_BLOCKS, CASES))
def test_contract_of_blocks(case: contract.Case, probe: Callable[[contract.Case], None]) -> None:
    probe(case)


# Causal masks, padding and position biases ------------------------------------------------------------------------


class Native:
    """A block of open_clip in three steps, as its authors wrote it."""

    scale = 16**-0.5

    def attention(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.attn.out_proj(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp(block.ln_2(x))


class Roberta(Native):
    def attention(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = block.attention.self
        return inner.query(x), inner.key(x), inner.value(x)

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.attention.output.dense(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        x = block.attention.output.LayerNorm(x)
        return block.output(block.intermediate(x), x)


class T5(Native):
    scale = 1.0

    def attention(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner, x = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
        return inner.q(x), inner.k(x), inner.v(x)

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.layer[0].SelfAttention.o(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        return block.layer[1](x)


class M2M(Native):
    def attention(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner, x = block.self_attn, block.self_attn_layer_norm(x)
        return inner.q_proj(x), inner.k_proj(x), inner.v_proj(x)

    def residual(self, block: Any, x: Tensor, out: Tensor) -> Tensor:
        return x + block.self_attn.out_proj(out)

    def rest(self, block: Any, x: Tensor) -> Tensor:
        return x + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))


def take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def explicit(
    host: Native, tower: Tower, reducer: crossget.CrossGET, cross: Tensor | None, x: Tensor, end: Tensor | None,
    valid: Tensor, bias: Tensor, masked_from: int,
) -> Tensor:  # fmt: skip
    """The reduced tower, written out: every mask is made anew from the tokens' positions in the text.

    Args:
        host: how the blocks compute.
        tower, reducer: what is reduced and how.
        cross: [L, C] or None.
        x: [B, T, C] what the first block gets.
        end: [B] the token that is pooled.
        valid: [B, T] false for padding that the model masks.
        bias: [H, T, T] of positions.
        masked_from: the first position from which on padding is hidden.
    """
    batch, length, _ = x.shape
    position = torch.arange(length).expand(batch, length)
    if cross is not None:
        real = valid[:, :, None].float()
        x = torch.cat([x, (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)], 1)
        position = torch.arange(length + 1).expand(batch, length + 1)
        valid = F.pad(valid, (0, 1), value=True)
        bias = F.pad(torch.cat([bias, bias[:, :1]], 1), (0, 1))
    source = position
    protected = (position < tower.prefix) | (position >= length)
    if end is not None:
        protected = protected | (position == end[:, None])
    n_protected = tower.prefix + (cross is not None) + (end is not None)
    sizes = torch.ones(position.shape)
    for layer, block in enumerate(tower.blocks):
        if cross is not None:
            origin = x[:, -1] if end is None else x[torch.arange(batch), end]
            x = torch.cat([x[:, :-1], (origin + cross[layer])[:, None]], 1)
        seen = valid[:, None, :] | (position[:, :, None] < masked_from)
        if tower.causal:
            seen = seen & (position[:, None, :] <= position[:, :, None])
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in host.attention(block, x))
        logits = q @ k.transpose(-1, -2) * host.scale + sizes.log()[:, None, None, :]
        logits = logits + bias[:, position[:, :, None], position[:, None, :]].transpose(0, 1)
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        x = host.residual(block, x, (weights @ v).transpose(1, 2).flatten(2))
        guide = torch.full((batch,), x.shape[1] - 1) if end is None and cross is not None else end
        known = valid if tower.padding else None
        view = View(x, q, k, None, sizes, protected, n_protected, known, guide)
        reduced = reducer.reduce(view, reducer.schedule.removed(layer, len(tower.blocks), x.shape[1]))
        if reduced is not None:
            x, new_sizes, plan = reduced
            assert new_sizes is not None
            sizes, source = new_sizes, followed(source, plan)
            position, valid, protected = (part.gather(1, plan.kept) for part in (position, valid, protected))
            end = None if end is None else plan.index.gather(1, end[:, None])[:, 0]
        x = host.rest(block, x)
    return on_the_grid(x, source[:, :length], valid if tower.padding else None, tower.prefix, cross is not None)


def no_padding(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def real(ids: Tensor) -> Tensor:
    return ids != PAD


def coca_padding(ids: Tensor) -> Tensor:
    """The mask of CoCa's released weights is one token off, and the class embedding is behind the text.

    Until open_clip 3 padding is hidden from the class embedding only.
    """
    return F.pad(ids != PAD, (1, 0), value=True)


TEXTS: dict[str, tuple[Callable[[], nn.Module], Native, Callable[[Tensor], Tensor]]] = {
    "causal": (clip, Native(), no_padding),
    "bidirectional": (partial(custom, None, {"pool_type": "last", "no_causal_mask": True}), Native(), no_padding),
    "coca": (coca, Native(), coca_padding),
    "roberta_mean": (partial(hugging_face, "roberta", "mean_pooler"), Roberta(), real),
    "roberta_first": (partial(hugging_face, "roberta", "cls_last_hidden_state_pooler"), Roberta(), real),
    "roberta_eager": (partial(hugging_face, "roberta", "mean_pooler", attention="eager"), Roberta(), real),
    "mt5": (partial(hugging_face, "mt5", "mean_pooler"), T5(), real),
    "mt5_eager": (partial(hugging_face, "mt5", "mean_pooler", attention="eager"), T5(), real),
    "nllb_mean": (partial(hugging_face, "m2m_100", "mean_pooler"), M2M(), real),
    "nllb_first": (partial(hugging_face, "m2m_100", "cls_pooler", "linear"), M2M(), real),
}
if PAD_MASKS:
    TEXTS["pad_masked"] = (pad_masked, Native(), real)
MASKED = [name for name, (_, _, padding) in TEXTS.items() if padding is not no_padding]


def prepared(name: str) -> nn.Module:
    return contract.build(case(name, TEXTS[name][0]))[0]


def encode(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode_text(ids)


@contextlib.contextmanager
def randomised(model: nn.Module, reducer: Reducer) -> Iterator[crossget.Attachment]:
    """Attached to the text tower, with cross tokens that are not zero."""
    with crossget.attach(model, {"text": reducer}) as attached:
        for parameter in attached.parameters():
            nn.init.normal_(parameter, std=0.3)
        yield attached


def position_bias(tower: Tower, length: int) -> Tensor:
    first = tower.blocks[0]
    if not hasattr(first, "layer"):
        return torch.zeros(2, length, length)
    with torch.no_grad():
        return first.layer[0].SelfAttention.compute_bias(length, length)[0]


@pytest.mark.parametrize("cross_token", [True, False])
@pytest.mark.parametrize("r", [0, 2, (1, 3, 2)])
@pytest.mark.parametrize("name", TEXTS)
def test_equals_the_tower_written_out(name: str, r: Any, cross_token: bool) -> None:
    model, (_, host, padding) = prepared(name), TEXTS[name]
    reducer = crossget.CrossGET(r=r, cross_token=cross_token, ties="stable")
    if not cross_token and not crossget.find_towers(model)[-1].has_end:  # nothing guides
        reducer = dataclasses.replace(reducer, guided_matching=False, ensemble="size")
    ids, seen = texts(), {}
    with randomised(model, reducer) as attached:
        tower = attached.towers["text"]
        hooks = [
            tower.blocks[0].register_forward_pre_hook(lambda _, args, __: seen.update(start=args[0]), with_kwargs=True),
            tower.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(end=out)),
        ]
        encode(model, ids)
        for hook in hooks:
            hook.remove()
        end = None if tower.text is None else tower.text.locate(ids)[0]
        cross = attached.cross_tokens.get("text")
        start = seen["start"]
        masked_from = CONTEXT if name == "coca" and not PAD_MASKS else 0
        bias = position_bias(tower, start.shape[1])
        with torch.no_grad():
            reducer = attached.reducers["text"]
            expected = explicit(host, tower, reducer, cross, start, end, padding(ids), bias, masked_from)
    out = seen["end"][0] if isinstance(seen["end"], tuple) else seen["end"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [crossget.CrossGET, crossget.ToMe, crossget.Random])
@pytest.mark.parametrize("name", MASKED)
def test_padding_only_ever_joins_padding(name: str, method: Callable[..., Reducer]) -> None:
    model, ids = prepared(name), texts()
    with randomised(model, method(r=4)) as attached:
        encode(model, ids)
        source = attached.source["text"]
    padding = TEXTS[name][2](ids)
    assert not padding.all()
    for row, seen in zip(source, padding, strict=True):
        assert not set(row[seen].tolist()) & set(row[~seen].tolist())
        assert len(set(row[seen].tolist())) < int(seen.sum())


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_does_not_depend_on_its_neighbours(name: str) -> None:
    model, ids = prepared(name), torch.cat([texts(), texts().flip(0)])
    with randomised(model, crossget.CrossGET(r=2)):
        together = encode(model, ids)
        alone = torch.cat([encode(model, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MASKED if name != "coca"])
def test_more_padding_changes_nothing(name: str) -> None:
    """As in the dense model."""
    model, ids = prepared(name), texts()
    torch.testing.assert_close(encode(model, ids), encode(model, ids[:, :13]), rtol=0, atol=1e-5)
    with randomised(model, crossget.CrossGET(r=0, cross_token=True)) as attached:
        torch.testing.assert_close(encode(model, ids), encode(model, ids[:, :13]), rtol=0, atol=1e-5)
        assert attached.tokens["text"] == [14] * len(attached.towers["text"].blocks)


@pytest.mark.parametrize(
    "method",
    [crossget.CrossGET(3, ties="stable"), crossget.ToMe(crossget.Ratio(0.3)), crossget.Ward(2)],
    ids=repr,
)
@pytest.mark.parametrize("name", [name for name in MASKED if name != "coca"])
def test_a_text_is_what_it_is_alone(name: str, method: Reducer) -> None:
    """The lengths of the other texts of a batch change nothing."""
    model, ids = prepared(name).double(), texts()
    lengths = (ids != PAD).sum(1).tolist()
    with randomised(model, method):
        together = encode(model, ids)
        alone = torch.cat([encode(model, row[None, :n]) for row, n in zip(ids, lengths, strict=True)])
    # The softmax of T5 is in float32 in older versions.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 if name.startswith("mt5") else 1e-9)


@pytest.mark.parametrize("name", ["causal", "coca"])
def test_a_causal_tower_does_not_see_its_cross_token(name: str) -> None:
    model, ids = prepared(name), texts()
    dense = encode(model, ids)
    with randomised(model, crossget.CrossGET(r=0)):
        torch.testing.assert_close(encode(model, ids), dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bidirectional", "roberta_mean", "nllb_first", "mt5"])
def test_a_bidirectional_tower_does(name: str) -> None:
    model, ids = prepared(name), texts()
    dense = encode(model, ids)
    with randomised(model, crossget.CrossGET(r=0)):
        assert (encode(model, ids) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["roberta_mean", "mt5", "nllb_first"])
def test_texts_without_padding(name: str) -> None:
    """Hosts leave the mask away then."""
    model, ids = prepared(name), torch.randint(3, END, (2, CONTEXT))
    with randomised(model, crossget.CrossGET(r=2)) as attached:
        whole = encode(model, ids)
        torch.testing.assert_close(torch.cat([encode(model, row[None]) for row in ids]), whole, rtol=0, atol=1e-5)
        assert attached.tokens["text"] == [17, 15, 13]


def test_a_text_of_padding_alone_stays_finite() -> None:
    model, ids = prepared("roberta_mean"), texts()
    ids[1, 1:] = PAD
    with randomised(model, crossget.CrossGET(r=4)):
        assert encode(model, ids).isfinite().all()


@pytest.mark.parametrize("kind", ["roberta", "mt5", "m2m_100"])
def test_hugging_face_checkpointing(kind: str) -> None:
    model: Any
    model, inputs = contract.build(case(kind, partial(hugging_face, kind, "mean_pooler")))
    model.train()  # transformers checkpoints in training only
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    with randomised(model, crossget.CrossGET(r=2)) as attached:
        results = []
        for enabled in (False, True):
            if enabled:
                model.text.transformer._set_gradient_checkpointing(True, again)
            model.zero_grad()
            (cross,) = attached.parameters()
            cross.grad = None
            model.encode_text(inputs[1]).square().mean().backward()
            results.append([p.grad for p in (*model.text.parameters(), cross) if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 10
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# Alignment ----------------------------------------------------------------------------------------------------------


def test_projections_are_the_models_own() -> None:
    model: Any = clip()
    image, text = crossget.find_towers(model)
    tokens = torch.randn(4, WIDTH)
    assert image.project is not None
    assert text.project is not None
    torch.testing.assert_close(image.project(tokens), model.visual.ln_pre(tokens) @ model.visual.proj, rtol=0, atol=0)
    torch.testing.assert_close(text.project(tokens), model.ln_final(tokens) @ model.text_projection, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=contract.name)
def test_alignment_loss(case: contract.Case) -> None:
    """It teaches the cross tokens and nothing else; where single tokens have no projection, it says so."""
    model, inputs = contract.build(case)
    with crossget.attach(model, crossget.CrossGET(r=1)) as attached:
        model(*inputs)
        blind = [name for name, tower in attached.towers.items() if tower.project is None]
        if blind:
            with pytest.raises(RuntimeError, match=f"no projection .*: {blind[0]}"):
                attached.alignment_loss()
            return
        attached.alignment_loss().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in attached.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_which_cases_have_no_alignment() -> None:
    blind = {case.id for case in CASES if any(tower.project is None for tower in crossget.find_towers(case.make()))}
    assert blind == {"clip_attentional_pool", "coca", "timm_map", "bert_pooler"}


# Refusals -----------------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    return clip({"layers": (1, 1, 1, 1), "width": 16, "head_width": 32})


def test_a_convolutional_image_tower_is_not_there() -> None:
    model = resnet()
    assert [tower.name for tower in crossget.find_towers(model)] == ["text"]
    with pytest.raises(ValueError, match=r"\['visual'\].*\['text'\]; 'visual': ModifiedResNet"):
        crossget.attach(model, {"visual": crossget.CrossGET(r=2)})
    with pytest.raises(ValueError, match=r"one reducer.*'visual'.*ModifiedResNet.*'text'"):
        crossget.attach(model, crossget.CrossGET(r=2))
    with crossget.attach(model, {"text": crossget.CrossGET(r=2)}) as attached:
        encode(model, texts())
        assert attached.tokens == {"text": [17, 15, 13]}


def test_a_trunk_that_timms_adapter_refuses_is_not_there() -> None:
    model = trunk("test_convnext", "avg", "linear")
    with pytest.raises(ValueError, match="'visual': timm's ConvNeXt: .*convolutional"):
        crossget.attach(model, {"visual": crossget.CrossGET(r=2)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not known; known are bert, roberta"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions inside its attention"),
    ],
)
def test_hugging_face_encoders_that_cannot_be_reduced(change: dict[str, Any], reason: str) -> None:
    model: Any = hugging_face("roberta", "mean_pooler")
    model.text.config.__dict__.update(change)
    if "model_type" in change:
        model.text.config = type("Config", (), {"model_type": "gpt2"})()
    assert [tower.name for tower in crossget.find_towers(model)] == ["visual"]
    with pytest.raises(ValueError, match=f"'text': .*{reason}"):
        crossget.attach(model, {"text": crossget.CrossGET(r=2)})


def test_layer_drop_is_refused() -> None:
    model: Any = hugging_face("m2m_100", "cls_pooler", "linear")
    model.text.transformer.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"layerdrop=0\.1.*set text\.transformer\.layerdrop = 0"):
        crossget.attach(model, {"text": crossget.CrossGET(r=2)})
    with pytest.raises(RuntimeError, match=r"found no tower.*text: .*layerdrop"):
        crossget.attach(model.text, crossget.CrossGET(r=2))


def test_tokens_first_is_refused() -> None:
    model: Any = clip()
    model.transformer.batch_first = False
    with pytest.raises(ValueError, match="batch_first=False"):
        crossget.attach(model, crossget.CrossGET(r=2))


def test_torchscript_is_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="TorchScript .*load it without"):
        crossget.attach(scripted, crossget.CrossGET(r=2))


def test_a_resnet_alone_says_why() -> None:
    model: Any = resnet()
    with pytest.raises(TypeError, match="ModifiedResNet is convolutional"):
        crossget.attach(model.visual, crossget.CrossGET(r=2))


# Use ----------------------------------------------------------------------------------------------------------------


def test_one_reducer_reduces_images_and_gives_texts_a_cross_token() -> None:
    model, inputs = contract.build(CASES[0])
    dense = encode(model, inputs[1])
    with crossget.attach(model, crossget.CrossGET(r=3)) as attached:
        contract.run(model, inputs)
        assert attached.tokens == {"visual": [18, 15, 12], "text": [17, 17, 17]}
        torch.testing.assert_close(encode(model, inputs[1]), dense, rtol=0, atol=1e-6)


def test_towers_on_their_own() -> None:
    model: Any = coca()
    for tower, inputs in ((model.visual, images()), (model.text, texts())):
        with crossget.attach(tower, crossget.CrossGET(r=2)) as attached, torch.no_grad():
            tower(inputs)
            ((_, tokens),) = attached.tokens.items()
            assert tokens[-1] < tokens[0]


def test_token_ids_that_bypass_the_embedding() -> None:
    """Learned prompts (CoOp): embeddings go straight to the blocks, and the ids only say where texts end."""
    model: Any = prepared("causal")
    ids = texts()

    def prompted() -> Tensor:
        x = model.token_embedding.weight[ids] + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection

    with randomised(model, crossget.CrossGET(r=2)) as attached, torch.no_grad():
        expected = encode(model, ids)
        with pytest.raises(RuntimeError, match="saw no token ids before.*set_text_ids"):
            prompted()
        attached.set_text_ids(ids)
        torch.testing.assert_close(prompted(), expected, rtol=0, atol=1e-6)


def test_cocas_decoder_is_left_alone() -> None:
    """With r = 0 in the text tower it reads the same text features as before."""
    model: Any
    model, inputs = contract.build(case("coca", coca))
    with torch.no_grad():
        dense = model(*inputs)
    with crossget.attach(model, {"text": crossget.CrossGET(r=0)}) as attached, torch.no_grad():
        reduced = model(*inputs)
        assert attached.tokens["text"] == [18, 18, 18]
        assert not any("_crossget_seat" in block.__dict__ for block in model.text_decoder.modules())
    torch.testing.assert_close(reduced["logits"], dense["logits"], rtol=0, atol=1e-5)


def test_patches_may_drop_out_in_training() -> None:
    model: Any = clip({"patch_dropout": 0.5}).train()
    with crossget.attach(model, {"visual": crossget.CrossGET(r=2)}) as attached:
        model.encode_image(images())
        assert attached.tokens == {"visual": [10, 8, 6]}


def test_bfloat16_weights() -> None:
    """As open_clip makes them: norms stay in float32."""
    model: Any = open_clip.CLIP(24, vision(), words(), cast_dtype=torch.bfloat16)
    open_clip.model.convert_weights_to_lp(model, dtype=torch.bfloat16)
    both_towers = {"visual": crossget.CrossGET(r=2), "text": crossget.CrossGET(r=2)}
    with crossget.attach(model, both_towers) as attached:
        assert model.encode_image(images().bfloat16()).dtype == model.encode_text(texts()).dtype == torch.bfloat16
        assert attached.tokens == {"visual": [18, 16, 14], "text": [17, 15, 13]}
        attached.alignment_loss().backward()
        assert all(parameter.grad is not None for parameter in attached.parameters())


@pytest.mark.skipif(not coca_model._has_transformers, reason="open_clip cannot generate with this transformers")
def test_coca_captions_reduced_images() -> None:
    model: Any
    model, inputs = contract.build(case("coca", coca))
    ids = {"sot_token_id": 1, "eos_token_id": END, "pad_token_id": PAD}
    with crossget.attach(model, crossget.CrossGET(r=3)) as attached:
        assert model.generate(inputs[0], generation_type="top_k", seq_len=8, min_seq_len=2, **ids).shape == (2, 8)
        assert attached.tokens["visual"] == [18, 15, 12]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=contract.name)
def test_compiles(case: contract.Case) -> None:
    contract.compiles_to_one_graph(dataclasses.replace(case, compiles=True))
