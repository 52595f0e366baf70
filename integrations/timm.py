"""timm: every architecture whose blocks pass one sequence [B, T, C] from the first to the last.

All of them have these blocks in the attribute `blocks`. They differ in the number of tokens before the patches, in
whether the first of them is a class token, and in how the blocks get their rotary tables.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm.models
import torch
from timm.models import _features
from timm.models.mobilevit import MobileVitBlock
from torch import Tensor, nn

from crossget.core.adapters import Blocks, SingleTokenOutput, Tower, adapted_towers, read, register
from crossget.core.state import TokenState
from crossget.integrations._support import NumbersOnCPU, SupportRow, is_of, remaining_rows, support_row


def _present(*names: str) -> tuple[type[nn.Module], ...]:
    """The classes of these names in the installed timm. Some exist only in newer versions."""
    found = (getattr(timm.models, name, None) or getattr(_features, name, None) for name in names)
    return tuple(cls for cls in found if cls is not None)


_VIT = _present(
    "VisionTransformer", "VisionTransformerRelPos", "NaFlexVit", "Eva", "Beit",
    "Qwen3VitEncoder", "DeepseekVitEncoder", "Gemma4VitEncoder",
)  # fmt: skip
_CAIT = _present("Cait")
_WRAPPERS = _present("Qwen3VitClassifier", "DeepseekVitClassifier", "Gemma4VitClassifier", "FeatureGetterNet")


@register(*_WRAPPERS)
def wrapped(model: Any) -> list[Tower]:
    """A classifier with an encoder, or the wrapper of a model with `features_only=True`."""
    return adapted_towers(getattr(model, "encoder", None) or model.model)


def _has_class_token(model: Any) -> bool:
    return getattr(getattr(model, "embeds", model), "cls_token", None) is not None


def _takes_mask(model: Any) -> bool:
    return not inspect.signature(model.forward_features).parameters.keys().isdisjoint({"attn_mask", "patch_valid"})


def _single_token_outputs(model: Any) -> list[SingleTokenOutput]:
    return [SingleTokenOutput(model, _pools_class_token)] if _has_class_token(model) else []


def _pools_class_token(model: Any) -> bool:
    """Whether the head uses the class token only. That of a distilled model uses a second token."""
    pooled = getattr(model, "global_pool", None) == "token" and getattr(model, "attn_pool", None) is None
    return pooled and not hasattr(model, "head_dist") and is_of("timm", model)


# Rotary tables ------------------------------------------------------------------------------------------------------


def rotary_rows(mixed: bool, block: nn.Module, name: str, value: Any, state: TokenState) -> Any:
    """The rows of a rotary table for the remaining tokens, with a row for the cross token that does not rotate it.

    Args:
        mixed: a table with three axes is [H, N, D], with one part per head; otherwise it is [B, N, D].
        block: the block whose argument this is.
        name: name of the argument. "rope" is the concatenation of sines and cosines, [.., N, 2 * D].
        value: the table: [N, D], [H, N, D], [B, N, D] or [B, 1 or H, N, D].
        state: of the tokens, of which T remain.

    Returns:
        The rows for T tokens, in the same layout; other arguments unchanged.
    """
    if value is None or name not in ("rope", "rope_sin", "rope_cos"):
        return value
    by_image = value.dim() == 3 and not mixed
    table = value[:, None] if by_image else value[(None,) * (4 - value.dim())]
    table = remaining_rows(table, _no_rotation(name, table[:, :, :1]), state)
    return table.squeeze(1) if by_image else table


def _no_rotation(name: str, like: Tensor) -> Tensor:
    """Rows with the shape of `like`, with sine 0 and cosine 1."""
    if name == "rope":
        sine, cosine = like.chunk(2, -1)
        return torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], -1)
    return torch.zeros_like(like) if name == "rope_sin" else torch.ones_like(like)


def _rotary_rows(model: Any) -> Any:
    mixed = getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False)
    return partial(rotary_rows, bool(mixed))


# Class token, distillation token and registers, if any, are the first tokens.
VIT = Tower(
    "visual",
    Blocks("blocks"),
    width=read("embed_dim"),
    prefix=read("num_prefix_tokens"),
    class_token=read(_has_class_token),
    padding=read(_takes_mask),
    single_token_outputs=read(_single_token_outputs),
    fit_arguments=read(_rotary_rows),
)
register(*_VIT, towers=[VIT])
# CaiT adds its class token after these blocks, for blocks in which only it attends.
register(*_CAIT, towers=[replace(VIT, prefix=0, class_token=False, single_token_outputs=())])


# Models without adapter ---------------------------------------------------------------------------------------------

NO_ATTENTION = "its blocks compare no tokens: it is a convolutional, MLP, recurrent or state space network"
UNKNOWN = "its class is not known, and its blocks have an attention of their own"
# The reasons, with the modules of timm that define the models. If a module has models with and without attention, the
# reason is for those with attention.
REASONS = {
    "convolutions inside or between its blocks need the full image grid": (
        "byobnet coat cpubone csatv2 efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra fastvit "
        "iformer lowformer maxxvit metaformer mobilenetv3 mobilenetv5 nextvit shvit swiftformer visformer"
    ),
    "its attention runs inside windows of the image grid": (
        "davit gcvit nest swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit"
    ),
    "the number of tokens changes between its blocks, or that of the keys (a pyramid)": "mvitv2 pvt_v2 twins volo",
    "its blocks pass an image grid and attend in it with convolutions": "levit",
    "its blocks pass an image grid [B, H, W, C] and attend in windows of it": "hieradet_sam2 vision_transformer_sam",
    "it attends over channels: there is no T x T attention between tokens": "edgenext xcit",
    "it has two sequences of tokens that exchange information": "tnt",
}
_GATES = r"SplitAttn|SelectiveKernelAttn|AttentionPool\w*|RotAttentionPool\w*"
_ATTENTION = re.compile(rf"(?!(?:{_GATES})$)\w*(?:Attn|Attention|MHSA|GPSA|SHSA|SHMA|LiteMLA|XCA|Lambda)")


# What a forward shows in models without adapter: the classes of models, or of their parts, and their towers.
FOUND = {
    "found in a forward, one tower per stage": (
        *_present("CrossVit", "Hiera", "Levit", "PoolingVisionTransformer"), MobileVitBlock,
    ),
    "found in a forward, the blocks behind those that weight tokens by distances on the full grid": _present("ConVit"),
}  # fmt: skip


def found_in_forward(model: nn.Module) -> str:
    """The towers that a forward shows in a model without adapter; empty if it shows none."""
    if getattr(model, "use_conv", False):  # LeViT with convolutions in place of linear layers
        return ""
    parts = {type(part).__mro__ for part in model.modules()}
    return next((towers for towers, classes in FOUND.items() if any({*mro} & {*classes} for mro in parts)), "")


def impossible(model: nn.Module) -> str:
    """Why no tower can be found in a model of timm; empty if a forward may show one."""
    return "" if any(_ATTENTION.match(type(module).__name__) for module in model.modules()) else NO_ATTENTION


def explain(model: nn.Module) -> str:
    """Why a model of timm has no adapter, for the table of all names."""
    if impossible(model):
        return NO_ATTENTION
    home = type(model).__module__.rpartition(".")[2]
    return next((reason for reason, homes in REASONS.items() if home in homes.split()), UNKNOWN)


def support_matrix(pattern: str | None = None) -> Iterator[SupportRow]:
    """One row for each name of `timm.list_models(pattern)`."""
    for name in timm.list_models(pattern or ""):
        model = skeleton(name)
        known = isinstance(model, (*_VIT, *_CAIT, *_WRAPPERS))
        found = "" if known else found_in_forward(model)
        if found:
            yield SupportRow(name, type(model).__name__, True, (found,))
        else:
            yield support_row(name, model, adapted_towers(model) if known else [], explain(model))


def skeleton(name: str) -> nn.Module:
    """The model of this name on the meta device, without weights."""
    with torch.device("meta"), NumbersOnCPU():
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model
