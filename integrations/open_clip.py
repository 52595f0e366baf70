"""open_clip: both towers of CLIP, CustomTextCLIP and CoCa: native, timm's for images, Hugging Face's for texts.

Reduced are the image tower and the text tower. CoCa's multimodal decoder is not: it reads the text tower's tokens on
the full grid. Features, not captions, are what a reduced CoCa is for: a merged token may tell of words behind it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from crossget.core.adapters import Blocks, IntermediatesHook, SingleTokenOutput, TextInput, Tower, find_towers, register
from crossget.core.state import TokenState
from crossget.integrations import timm as timm_towers
from crossget.integrations._support import NumbersOnCPU, SupportRow, embed, is_of, project, support_row

_BERT = ("embeddings.word_embeddings", "encoder.layer", None)
# model_type of the Hugging Face encoders that HFTextEncoder knows -> where their embedding, blocks and last norm are.
_HF_PARTS: dict[str, tuple[str, str, str | None]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mt5": ("embed_tokens", "block", "final_layer_norm"),
    "m2m_100": ("embed_tokens", "layers", "layer_norm"),
}


@register(open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)
def clip(model: Any) -> list[Tower]:
    """The image tower and the text tower, without those that cannot be reduced (`absent` says why)."""
    return [tower for tower in (_visual(model.visual), _text(model)) if isinstance(tower, Tower)]


@register(VisionTransformer, TimmModel, TextTransformer, HFTextEncoder)
def part(model: Any) -> list[Tower]:
    """One tower on its own."""
    look = _visual if isinstance(model, (VisionTransformer, TimmModel)) else _text
    tower = look(model)
    return [tower] if isinstance(tower, Tower) else []


def absent(model: Any) -> dict[str, str]:
    """Why a tower is not among those of `model`, by name."""
    parts = {}
    if hasattr(model, "visual") or isinstance(model, (VisionTransformer, TimmModel)):
        parts["visual"] = _visual(getattr(model, "visual", model))
    if not isinstance(model, (VisionTransformer, TimmModel)):
        parts["text"] = _text(model)
    return {name: reason for name, reason in parts.items() if isinstance(reason, str)}


def explain(model: nn.Module) -> str:
    """Why a module of open_clip has no adapter."""
    if isinstance(model, ModifiedResNet):
        return str(_visual(model))
    return "it is neither a model of open_clip nor one of its towers"


# Images -------------------------------------------------------------------------------------------------------------


def _visual(visual: Any) -> Any:
    """The image tower, or in words why there is none."""
    if isinstance(visual, TimmModel):
        return _trunk(visual)
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} is convolutional: it has no sequence of tokens to reduce"
    pools = visual.attn_pool is not None
    return Tower(
        "visual",
        blocks=_blocks(visual.transformer),
        width=int(visual.class_embedding.shape[0]),
        prefix=1,
        class_token=True,
        project=None if pools else partial(project, visual.ln_pre, visual, "proj"),
        embed=None if pools else partial(embed, [visual.ln_post], visual, "proj"),
        intermediates=_intermediates(visual.transformer),
        single_token_outputs=[SingleTokenOutput(visual, _shows_class_token_alone)],
    )


def _shows_class_token_alone(visual: Any) -> bool:
    own = is_of("open_clip", visual)
    return own and visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens


def _trunk(visual: Any) -> Any:
    try:
        (tower,) = find_towers(visual.trunk)
    except TypeError:
        return f"timm's {type(visual.trunk).__name__}: {timm_towers.explain(visual.trunk)}"
    return dataclasses.replace(tower, project=_trunk_projection(visual), embed=_trunk_embedding(visual))


def _trunk_projection(visual: Any) -> Any:
    """What takes one token to the joint space; None behind an attention pool, which has no answer for one token."""
    norm = getattr(visual.trunk, "norm_pre", None)
    if isinstance(getattr(visual.head, "proj", None), nn.Linear):
        return partial(project, norm, visual.head, "proj")
    pools = getattr(visual.trunk, "attn_pool", None) is not None
    if not pools and isinstance(getattr(visual.trunk, "head", None), nn.Linear):
        return partial(project, norm, visual.trunk, "head")
    return None


def _trunk_embedding(visual: Any) -> Any:
    """What `TimmModel` does with the token that its trunk pools; None behind an attention pool."""
    trunk = visual.trunk
    if getattr(trunk, "attn_pool", None) is not None or hasattr(visual.head, "pool"):
        return None
    norms = [part for name in ("norm", "fc_norm", "head") if (part := getattr(trunk, name, None)) is not None]
    return partial(embed, norms, visual, "head")


# Texts --------------------------------------------------------------------------------------------------------------


def _text(model: Any) -> Any:
    """The text tower, or in words why there is none."""
    text = getattr(model, "text", model)  # CLIP has unpacked its text tower into itself
    if isinstance(text, HFTextEncoder):
        return _hf_text(text)
    pool = str(getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax"))
    eos = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    if getattr(text, "cls_emb", None) is not None:
        pool = "appended"
    return Tower(
        "text",
        blocks=_blocks(text.transformer),
        width=int(text.positional_embedding.shape[1]),
        prefix=0 if pool == "first" else 1,
        causal=text.attn_mask is not None,
        padding=pool == "appended" or getattr(text, "use_pad_mask", False),
        text=TextInput(text.token_embedding, partial(_end, pool, eos), pools_one=pool != "none"),
        project=partial(project, text.ln_final, text, "text_projection"),
        intermediates=_intermediates(text.transformer),
        single_token_outputs=[] if pool == "none" else _text_outputs(model, text),
    )


def _text_outputs(model: Any, text: Any) -> list[SingleTokenOutput]:
    """CLIP's own text tower is run by a method of CLIP's; of other towers the tokens may be part of the result."""
    if isinstance(text, TextTransformer):
        return [SingleTokenOutput(text, _shows_end_alone)]
    return [SingleTokenOutput(model, _encodes_end_alone, "encode_text")]


def _shows_end_alone(text: Any) -> bool:
    return is_of("open_clip", text) and not text.output_tokens


def _encodes_end_alone(model: Any) -> bool:
    return is_of("open_clip", model)


def _end(pool: str, eos: Any, ids: Tensor) -> tuple[Tensor | None, None]:
    """Position of the token that a native text tower pools. Padding shows in its attention's mask, if anywhere."""
    if pool == "none":
        return None, None
    if pool == "argmax":
        return ids.argmax(-1), None
    if pool == "eos":
        return ids.eq(eos).int().argmax(-1), None
    # "appended": CoCa pools a class embedding that it puts behind the text.
    position = {"first": 0, "last": ids.shape[1] - 1, "appended": ids.shape[1]}[pool]
    return torch.full_like(ids[:, 0], position), None


def _hf_text(text: Any) -> Any:
    config, kind = text.config, text.config.model_type
    if kind not in _HF_PARTS:
        return f"the Hugging Face text encoder {kind!r} is not known here; known are {', '.join(_HF_PARTS)}"
    if getattr(config, "is_decoder", False):
        return f"the Hugging Face text encoder {kind!r} is set up as a decoder (is_decoder=True)"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return (
            f"{type(text.transformer).__name__} computes {config.position_embedding_type!r} positions inside its "
            "attention from the current order of tokens, which changes when tokens merge"
        )
    if getattr(text.transformer, "layerdrop", 0) > 0:
        return (
            f"{type(text.transformer).__name__} skips layers at random in training (layerdrop="
            f"{text.transformer.layerdrop}), so its tokens' way cannot be planned; set text.transformer.layerdrop = 0"
        )
    encoder, names = text.transformer, _HF_PARTS[kind]
    embedding = encoder.get_submodule(names[0])
    norm = None if names[2] is None else encoder.get_submodule(names[2])
    pools_one = hasattr(text.pooler, "cls_token_position")
    read = partial(_first if pools_one else _all, config.pad_token_id)
    # A pooler of the encoder's own stands between its tokens and the projection: no way for a single token.
    own_pooler = getattr(encoder, "pooler", None) is not None
    return Tower(
        "text",
        blocks=Blocks(encoder, names[1]),
        width=int(embedding.weight.shape[1]),
        prefix=0 if pools_one else 1,
        padding=True,
        text=TextInput(embedding, read, pools_one),
        project=None if own_pooler else partial(project, norm, text, "proj"),
        masks=() if kind == "mt5" else ("attention_mask",),
        fit_arguments=_refit_mask if kind == "mt5" else None,
    )


def _first(pad: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(ids[:, 0]), ids != pad


def _all(pad: int, ids: Tensor) -> tuple[None, Tensor]:
    return None, ids != pad


def _refit_mask(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """T5 makes its position bias for as many tokens as it sees, and adds the padding mask to that.

    So with a cross token the mask must have one more column. What it says there is not used.
    """
    if name != "attention_mask" or value is None or not state.has_cross_token or int(value.shape[-1]) != state.length:
        return value
    rows = int(value.shape[-2]) == state.length
    return F.pad(value, (0, 1, 0, int(rows)))


# Both ---------------------------------------------------------------------------------------------------------------


def _blocks(transformer: Any) -> Blocks:
    if not getattr(transformer, "batch_first", True):
        raise ValueError(
            "cannot reduce an open_clip tower made with batch_first=False: its blocks pass [T, B, C]; make the model "
            "with batch_first=True"
        )
    return Blocks(transformer, "resblocks")


def _intermediates(transformer: nn.Module) -> list[IntermediatesHook]:
    return (
        [IntermediatesHook(transformer, "forward_intermediates")]
        if hasattr(transformer, "forward_intermediates")
        else []
    )


# What of open_clip is supported ---------------------------------------------------------------------------------------

# The encoders on Hugging Face's hub that open_clip's configurations name, so that the matrix needs no network.
_HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta-base": ("xlm-roberta", {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta-large": (
        "xlm-roberta",
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_size": 1024,
         "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
    ),
    "google/mt5-base": ("mt5", {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("mt5", {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": ("m2m_100", {"vocab_size": 256206, "encoder_layerdrop": 0.0}),
    "facebook/nllb-200-distilled-1.3B": (
        "m2m_100",
        {"vocab_size": 256206, "encoder_layerdrop": 0.0, "encoder_layers": 24, "encoder_ffn_dim": 8192},
    ),
}  # fmt: skip


def hub_config(name: str) -> Any:
    """The configuration of a Hugging Face encoder that open_clip uses.

    Raises:
        KeyError: none of open_clip's configurations names it.
    """
    from transformers import AutoConfig

    kind, sizes = _HUB[name]
    return AutoConfig.for_model(kind, **sizes)


def support_matrix(pattern: str | None = None) -> Iterator[SupportRow]:
    """One row for each of open_clip's configurations, built without weights, memory or network."""
    for name in fnmatch.filter(open_clip.list_models(), pattern or "*"):
        with torch.device("meta"), NumbersOnCPU():
            model = _build(name)
        reasons = "; ".join(f"{tower}: {reason}" for tower, reason in absent(model).items())
        yield dataclasses.replace(support_row(name, model, clip(model)), reason=reasons)


def _build(name: str) -> Any:
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["timm_model_pretrained"] = False
    text = config["text_cfg"]
    encoder = text.get("hf_model_name")
    if encoder is not None:
        config["text_cfg"] = {"layers": 1}  # in its place for a moment
    own = config.pop("custom_text", False) or encoder is not None
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if own else open_clip.CLIP
    model = kind(**config)
    if encoder is not None:
        model.text = _hf_encoder(encoder, config["embed_dim"], text)
    return model


def _hf_encoder(name: str, width: int, settings: dict[str, Any]) -> Any:
    """As open_clip's own when it has weights to load: no decoder, and no pooler of the encoder's own unless used."""
    pooler = settings.get("hf_pooler_type", "mean_pooler")
    proj = settings.get("hf_proj_type", "mlp")
    text: Any = HFTextEncoder(name, width, config=hub_config(name), pooler_type=pooler, proj_type=proj)
    if text.config.is_encoder_decoder:
        text.transformer = text.transformer.encoder
    elif pooler != "cls_pooler":
        text.transformer.pooler = None
    return text
