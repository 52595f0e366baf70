"""open_clip: the image and text towers of CLIP, CustomTextCLIP and CoCa.

Image towers are open_clip's own or timm's; text towers are open_clip's own or Hugging Face's. CoCa's multimodal decoder
is not reduced. It gets the text tower's tokens on the full grid, one per word. A merged token may contain later words,
which a decoder must not see. So use a reduced text tower of CoCa for features, and not for captions.
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

from crossget.core.adapters import Blocks, SingleTokenOutput, TextInput, Tower, adapted_towers, read, register
from crossget.core.state import TokenState
from crossget.integrations import timm as timm_towers
from crossget.integrations._support import NumbersOnCPU, SupportRow, embed, is_of, project, support_row

_BERT = ("embeddings.word_embeddings", "encoder.layer", None)
# model_type of Hugging Face encoders in HFTextEncoder -> paths to their embedding, blocks and last norm.
_HF_PARTS: dict[str, tuple[str, str, str | None]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mt5": ("embed_tokens", "block", "final_layer_norm"),
    "m2m_100": ("embed_tokens", "layers", "layer_norm"),
}


@register(open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa)
def clip(model: Any) -> list[Tower]:
    """The image tower and the text tower, without one that cannot be reduced (`absent` gives the reason)."""
    return [tower for tower in (_visual(model.visual), _text(model)) if isinstance(tower, Tower)]


@register(TimmModel, TextTransformer, HFTextEncoder)
def part(model: Any) -> list[Tower]:
    """A single tower, outside of a CLIP."""
    find = _visual if isinstance(model, TimmModel) else _text
    tower = find(model)
    return [tower] if isinstance(tower, Tower) else []


def absent(model: Any) -> dict[str, str]:
    """Why a tower is not among those of `model`, by name."""
    parts = {}
    if hasattr(model, "visual") or isinstance(model, (VisionTransformer, TimmModel)):
        parts["visual"] = _visual(getattr(model, "visual", model))
    if not isinstance(model, (VisionTransformer, TimmModel)):
        parts["text"] = _text(model)
    return {name: reason for name, reason in parts.items() if isinstance(reason, str)}


def impossible(model: nn.Module) -> str:
    """Why no tower can be found in a module of open_clip; empty if a forward may show one."""
    return str(_visual(model)) if isinstance(model, ModifiedResNet) else ""


# Images -------------------------------------------------------------------------------------------------------------


def _visual(visual: Any) -> Any:
    """The image tower, or a string with the reason why there is none."""
    if isinstance(visual, TimmModel):
        return _trunk(visual)
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} is convolutional: it has no sequence of tokens to reduce"
    return VISION.of(visual)


def _projection(apply: Any, norm: str, visual: Any) -> Any:
    """How a token gets into the joint space; None with an attention pool, which needs all tokens."""
    return partial(apply, [(visual, norm), (visual, "proj")]) if visual.attn_pool is None else None


def _outputs(visual: Any) -> list[SingleTokenOutput]:
    return [SingleTokenOutput(visual, _returns_class_token_only)]


def _returns_class_token_only(visual: Any) -> bool:
    """Whether the result of the image tower depends on the class token only."""
    own = is_of("open_clip", visual)
    return own and visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens


VISION = Tower(
    "visual",
    read(lambda visual: _blocks(visual.transformer)),
    width=read(lambda visual: int(visual.class_embedding.shape[0])),
    prefix=1,
    class_token=True,
    project=read(partial(_projection, project, "ln_pre")),
    embed=read(partial(_projection, embed, "ln_post")),
    single_token_outputs=read(_outputs),
)
register(VisionTransformer, towers=[VISION])


def _trunk(visual: Any) -> Any:
    """The image tower of a timm model, or a string with the reason why there is none."""
    try:
        (tower,) = adapted_towers(visual.trunk)
    except TypeError:
        return f"timm's {type(visual.trunk).__name__}: {timm_towers.explain(visual.trunk)}"
    return dataclasses.replace(tower, project=_trunk_projection(visual), embed=_trunk_embedding(visual))


def _trunk_projection(visual: Any) -> Any:
    """The projection of one token into the joint space; None with an attention pool, which needs all tokens."""
    norm = [(visual.trunk, "norm_pre")] if hasattr(visual.trunk, "norm_pre") else []
    if isinstance(getattr(visual.head, "proj", None), nn.Linear):
        return partial(project, [*norm, (visual, "head.proj")])
    pools = getattr(visual.trunk, "attn_pool", None) is not None
    if not pools and isinstance(getattr(visual.trunk, "head", None), nn.Linear):
        return partial(project, [*norm, (visual.trunk, "head")])
    return None


def _trunk_embedding(visual: Any) -> Any:
    """What `TimmModel` applies to the pooled token; None with an attention pool, which needs all tokens."""
    trunk = visual.trunk
    if getattr(trunk, "attn_pool", None) is not None or hasattr(visual.head, "pool"):
        return None
    norms = [(trunk, name) for name in ("norm", "fc_norm", "head") if hasattr(trunk, name)]
    return partial(embed, [*norms, (visual, "head")])


# Texts --------------------------------------------------------------------------------------------------------------


def _text(model: Any) -> Any:
    """The text tower, or a string with the reason why there is none."""
    text = getattr(model, "text", model)  # the modules of CLIP's own text tower are attributes of CLIP itself
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
        text=TextInput(text.token_embedding, partial(_end, pool, eos), single_token=pool != "none"),
        project=partial(project, [(text, "ln_final"), (text, "text_projection")]),
        single_token_outputs=[] if pool == "none" else _text_outputs(model, text),
    )


def _text_outputs(model: Any, text: Any) -> list[SingleTokenOutput]:
    """The methods whose result depends on the end-of-text token only. CLIP runs its own text tower in `encode_text`."""
    if isinstance(text, TextTransformer):
        return [SingleTokenOutput(text, _returns_end_only)]
    return [SingleTokenOutput(model, _encode_text_uses_end_only, "encode_text")]


def _returns_end_only(text: Any) -> bool:
    """Whether the result of the text tower depends on the end-of-text token only."""
    return is_of("open_clip", text) and not text.output_tokens


def _encode_text_uses_end_only(model: Any) -> bool:
    """Whether `encode_text` is open_clip's own, whose result depends on the end-of-text token only."""
    return is_of("open_clip", model)


def _end(pool: str, eos: Any, ids: Tensor) -> tuple[Tensor | None, None]:
    """Position of the token that open_clip's own text towers pool. Padding is found in the attention's mask, if any."""
    if pool == "none":
        return None, None
    if pool == "argmax":
        return ids.argmax(-1), None
    if pool == "eos":
        return ids.eq(eos).int().argmax(-1), None
    # "appended": CoCa pools a class embedding that it appends to the text.
    position = {"first": 0, "last": ids.shape[1] - 1, "appended": ids.shape[1]}[pool]
    return torch.full_like(ids[:, 0], position), None


def _hf_text(text: Any) -> Any:
    """The text tower of a Hugging Face encoder, or a string with the reason why there is none."""
    config, kind = text.config, text.config.model_type
    if kind not in _HF_PARTS:
        return f"the Hugging Face text encoder {kind!r} is not known; known are {', '.join(_HF_PARTS)}"
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
            f"{text.transformer.layerdrop}), so the number of its tokens is not known in advance; "
            "set text.transformer.layerdrop = 0"
        )
    encoder, names = text.transformer, _HF_PARTS[kind]
    embedding = encoder.get_submodule(names[0])
    norm = [] if names[2] is None else [(encoder, names[2])]
    single_token = hasattr(text.pooler, "cls_token_position")
    locate = partial(_first if single_token else _all, config.pad_token_id)
    # The encoder's own pooler comes before the projection, so single tokens cannot be projected.
    own_pooler = getattr(encoder, "pooler", None) is not None
    return Tower(
        "text",
        blocks=Blocks(names[1], encoder),
        width=int(embedding.weight.shape[1]),
        prefix=0 if single_token else 1,
        padding=True,
        text=TextInput(embedding, locate, single_token),
        project=None if own_pooler else partial(project, [*norm, (text, "proj")]),
        masks=() if kind == "mt5" else ("attention_mask",),
        fit_arguments=_widen_mask if kind == "mt5" else None,
    )


def _first(pad: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`TextInput.locate` of a tower that pools the first token."""
    return torch.zeros_like(ids[:, 0]), ids != pad


def _all(pad: int, ids: Tensor) -> tuple[None, Tensor]:
    """`TextInput.locate` of a tower that pools the mean of all tokens."""
    return None, ids != pad


def _widen_mask(block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """The padding mask of T5, with one more column for the cross token.

    T5 makes a position bias for all tokens that it gets, and adds the mask to it. The values in the new column are not
    used, see `crossget.core.masks.fit_mask`.
    """
    if name != "attention_mask" or value is None or not state.has_cross_token or int(value.shape[-1]) != state.length:
        return value
    rows = int(value.shape[-2]) == state.length
    return F.pad(value, (0, 1, 0, int(rows)))


# Both ---------------------------------------------------------------------------------------------------------------


def _blocks(transformer: Any) -> Blocks:
    """The blocks of one of open_clip's own towers.

    Raises:
        ValueError: its sequences are [T, B, C].
    """
    if not getattr(transformer, "batch_first", True):
        raise ValueError(
            "cannot reduce an open_clip tower made with batch_first=False: its blocks pass [T, B, C]; make the model "
            "with batch_first=True"
        )
    return Blocks("resblocks", transformer)


# Support matrix -------------------------------------------------------------------------------------------------------

# The configurations of the Hugging Face encoders that open_clip uses, so that the matrix needs no network.
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
        config["text_cfg"] = {"layers": 1}  # a placeholder, replaced below
    own = config.pop("custom_text", False) or encoder is not None
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if own else open_clip.CLIP
    model = kind(**config)
    if encoder is not None:
        model.text = _hf_encoder(encoder, config["embed_dim"], text)
    return model


def _hf_encoder(name: str, width: int, settings: dict[str, Any]) -> Any:
    """The encoder as open_clip builds it with pretrained weights: without decoder, and without an unused pooler."""
    pooler = settings.get("hf_pooler_type", "mean_pooler")
    proj = settings.get("hf_proj_type", "mlp")
    text: Any = HFTextEncoder(name, width, config=hub_config(name), pooler_type=pooler, proj_type=proj)
    if text.config.is_encoder_decoder:
        text.transformer = text.transformer.encoder
    elif pooler != "cls_pooler":
        text.transformer.pooler = None
    return text
