"""open_clip's towers: the contract on a small model of each kind, then what is particular to texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import crossget
from crossget.registry import Tower
from crossget.state import TokenState
from tests import contract

NEW = hasattr(TextTransformer, "forward_intermediates")  # eos pooling, pad masks and custom blocks came together with it
WIDTH, VOCABULARY, CONTEXT, IMAGE = 32, 60, 16, 32
END, PAD = VOCABULARY - 1, 0


def vision(**settings: Any) -> CLIPVisionCfg:
    return CLIPVisionCfg(**{"image_size": IMAGE, "layers": 3, "width": WIDTH, "head_width": 16, "patch_size": 8, **settings})


def words(**settings: Any) -> CLIPTextCfg:
    sizes = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 3}
    return CLIPTextCfg(**{**sizes, **settings})


def clip(v: dict[str, Any] | None = None, t: dict[str, Any] | None = None) -> nn.Module:
    return open_clip.CLIP(24, vision(**(v or {})), words(**(t or {})))


def custom(v: dict[str, Any] | None = None, t: dict[str, Any] | None = None) -> nn.Module:
    return open_clip.CustomTextCLIP(24, vision(**(v or {})), words(**(t or {})))


def coca() -> nn.Module:
    v = vision(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5, output_tokens=True)
    t = words(embed_cls=True, output_tokens=True)
    m = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 2}
    return open_clip.CoCa(WIDTH, open_clip.coca_model.MultimodalCfg(**m), t, v)


def trunk(name: str, pool: str, proj: str, image: int = 160) -> nn.Module:
    return custom({"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image})


def eva() -> nn.Module:
    """As EVA-CLIP: rotary positions, class token, the trunk's own head as projection."""
    model = custom({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "", "image_size": 160})
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model.visual.trunk = timm.models.eva.Eva(**sizes, num_classes=24, global_pool="token", use_rot_pos_emb=True)  # type: ignore[union-attr]
    return model


def without_checkpointing(make: Callable[[], nn.Module]) -> nn.Module:
    """For the contract: open_clip hands too many arguments to its custom blocks when it checkpoints them."""
    model = make()
    model.set_grad_checkpointing = None
    return model


def pad_masked() -> nn.Module:
    model = custom()
    sizes: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 3}
    model.text = TextTransformer(**sizes, output_dim=24, no_causal_mask=True, use_pad_mask=True, pool_type="argmax")
    return model


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "pad_token_id": PAD}
ROBERTA = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "type_vocab_size": 1}
HF_CONFIGS = {
    "roberta": partial(transformers.RobertaConfig, **ROBERTA),
    "xlm-roberta": partial(transformers.XLMRobertaConfig, **ROBERTA),
    "bert": partial(transformers.BertConfig, **ROBERTA),
    "mt5": partial(
        transformers.MT5Config, vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=3, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, pad_token_id=PAD,
    ),
    "m2m_100": partial(
        transformers.M2M100Config, vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_layerdrop=0.0, max_position_embeddings=40, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
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


def case(name: str, make: Callable[[], nn.Module], size: int = IMAGE, **settings: Any) -> contract.Case:
    return contract.Case(name, make, partial(both, size), compiles=False, **settings)


CASES = [
    case("clip", clip),
    case("clip_avg", partial(clip, {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1})),
    case("clip_attentional_pool", partial(clip, {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3})),
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
    case("mt5", partial(hugging_face, "mt5", "mean_pooler"), fused=False),
    case("nllb", partial(hugging_face, "m2m_100", "cls_pooler", "linear")),
]
if NEW:
    CASES += [
        case("eos", partial(custom, None, {"pool_type": "eos", "eos_id": END, "proj_type": "none", "width": 24})),
        case("pad_masked", pad_masked),
        case("custom_blocks", partial(without_checkpointing, partial(clip, {"qk_norm": True}, {"scale_heads": True, "qk_norm": True}))),
    ]  # fmt: skip


@pytest.mark.parametrize("probe", contract.PROBES, ids=contract.name)
@pytest.mark.parametrize("case", CASES, ids=contract.name)
def test_contract(case: contract.Case, probe: Callable[[contract.Case], None]) -> None:
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
    valid: Tensor, bias: Tensor,
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
        seen = valid[:, None, :].expand(-1, position.shape[1], -1)
        if tower.causal:
            seen = seen & (position[:, None, :] <= position[:, :, None])
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in host.attention(block, x))
        logits = q @ k.transpose(-1, -2) * host.scale + sizes.log()[:, None, None, :]
        logits = logits + bias[:, position[:, :, None], position[:, None, :]].transpose(0, 1)
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        x = host.residual(block, x, (weights @ v).transpose(1, 2).flatten(2))
        guide = torch.full((batch,), x.shape[1] - 1) if end is None and cross is not None else end
        known = valid if tower.padding else None
        view = crossget.reducers.View(x, q, k, None, sizes, protected, n_protected, known, guide)
        reduced = reducer.reduce(view, reducer.schedule.removed(layer, len(tower.blocks), x.shape[1]))
        if reduced is not None:
            x, new_sizes, plan = reduced
            assert new_sizes is not None
            sizes, source = new_sizes, plan.index.gather(1, source)
            position, valid, protected = (part.gather(1, plan.kept) for part in (position, valid, protected))
            end = None if end is None else plan.index.gather(1, end[:, None])[:, 0]
        x = host.rest(block, x)
    return take(x, source[:, :length])


def no_padding(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def real(ids: Tensor) -> Tensor:
    return ids != PAD


def coca_padding(ids: Tensor) -> Tensor:
    """The mask of CoCa's released weights is one token off, and the class embedding is behind the text."""
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
if NEW:
    TEXTS["pad_masked"] = (pad_masked, Native(), real)
MASKED = [name for name, (_, _, padding) in TEXTS.items() if padding is not no_padding]


def prepared(name: str) -> nn.Module:
    return contract.build(case(name, TEXTS[name][0]))[0]


def encode(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode_text(ids)


@contextlib.contextmanager
def randomised(model: nn.Module, reducer: crossget.Reducer) -> Iterator[crossget.Attachment]:
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
    reducer = crossget.CrossGET(r=r, cross_token=cross_token)
    if not cross_token and not crossget.find_towers(model)[-1].has_end:
        reducer = crossget.CrossGET(r=r, cross_token=False, importance="attention", guided_matching=False, ensemble="size")
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
        end = None if tower.text is None else tower.text.read(ids)[0]
        cross = attached.cross_tokens.get("text")
        start = seen["start"]
        with torch.no_grad():
            expected = explicit(
                host, tower, attached.reducers["text"], cross, start, end, padding(ids), position_bias(tower, start.shape[1])
            )  # fmt: skip
    out = seen["end"][0] if isinstance(seen["end"], tuple) else seen["end"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
