"""lmms-eval's chat models of transformers with fewer image features behind the connector."""

from __future__ import annotations

import inspect
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from loguru import logger  # lmms-eval's
from torch import nn

import crossget
from crossget.integrations.lmms_eval_llava import raising
from crossget.methods.reducers import Reducer


# lmms-eval has no annotations that a type checker may read (no py.typed).
class ConnectorCrossget(lmms):  # type: ignore[misc]
    """`--model crossget`: another chat model of lmms-eval, attached. An instance is one of that model's class.

    Args:
        model: name of the chat model, such as qwen2_5_vl, or llava_hf for LLaVA-1.5 and LLaVA-OneVision.
        method: a method of crossget, such as Ward.
        keep: features of an image that stay: a number, or a share as a decimal number.
        more: the arguments of that model.

    Raises:
        ValueError: the model or the method is unknown, or the model cannot be attached.
        TypeError: `keep` is no number.
    """

    is_simple = False  # a chat class; lmms-eval refuses a class that does not agree with its manifest

    def __new__(cls, model: str, method: str = "Ward", keep: float = 0.25, **more: Any) -> Any:
        kind = getattr(crossget, method, None) if isinstance(method, str) else None
        if not inspect.isclass(kind) or not issubclass(kind, Reducer) or inspect.isabstract(kind):
            raise ValueError(f"method={method}: expected a method of crossget, such as Ward or ToMe")
        reducer = kind(crossget.Keep(keep))
        chosen = get_model(model)
        if chosen is cls or getattr(chosen, "is_simple", True):
            raise ValueError(f"model={model}: expected a chat model of lmms-eval, such as qwen2_5_vl or llava_hf")
        lm = chosen(**more)
        host = getattr(lm, "model", None)
        if not isinstance(host, nn.Module):
            raise ValueError(f"model={model}: it runs no model of transformers in this process")
        lm.attached = crossget.attach(host, {"connector": reducer})
        lm.generate_until = raising("crossget", host, lm.generate_until)
        logger.info(f"crossget: {lm.attached}")
        return lm
