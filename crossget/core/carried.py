"""How state gets from block to block: attributes of tensors, one extra argument, and values of a thread.

Between two blocks the host passes on one tensor, the tokens. Everything else that the next block needs is an attribute
of that tensor object (`Carried`). Nothing is stored on modules between blocks. So gradient checkpointing, threads,
copies of a model and interrupted forwards need no special treatment and no reset.

Some code replaces the tensors that a block gets or returns by other ones. This is why the attribute is found all the
same:

- **Hooks on a block** run inside the block's `__call__`. FSDP2's pre-forward hook casts the block's arguments and wraps
  them in a function of its own, DeepSpeed's hooks replace arguments and results, accelerate's move them to another
  device. The attribute is read from the tensor that `__call__` gets, and set on the tensor that `__call__` returns
  (block_class.py): before and after all hooks. Inside `__call__`, the `BlockCall` is a keyword argument, which these
  hooks leave unchanged.
- **Gradient checkpointing around blocks** (timm, open_clip, torch's `checkpoint_wrapper`) calls the block a second time
  with the tensor objects of the first call. They still have their attributes, and `TokenState` is immutable.
- **Gradient checkpointing inside the block's `__call__`** (transformers) runs the block's `forward` a second time with
  the arguments of the first call, including the `BlockCall`.
- **Re-entrant checkpointing** makes new tensors outside of `__call__`. Their attribute is lost, which is an error.
- **The first block's input** has no attribute yet. What the host's entry points have found (`EntryInfo`) is a value of
  the thread (`ThreadValue`). The first block also stores it on its input, for the recomputation of a checkpoint.

If a whole model is compiled, all this is traced. Dynamo calls a module's `forward` and not its `__call__`; `forward`
then does what `__call__` does otherwise.
"""

from __future__ import annotations

import threading
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from crossget.core.state import TokenState

T = TypeVar("T")
_CARRIED, _ENTRY_INFO = "_crossget_carried", "_crossget_entry_info"


class Carried(NamedTuple):
    """The state that a block sets on its output, for the next block.

    Attributes:
        state: of the tokens after the block.
        layer: number of the next block, from 0.
        is_full_grid: the tensor is the full grid [B, T0, C]; the tokens are its rows at `state.positions`.
        hidden_cross_token: [B, C] the cross token, detached, if the tensor does not include it; otherwise None.
    """

    state: TokenState
    layer: int
    is_full_grid: bool
    hidden_cross_token: Tensor | None


def set_carried(tokens: Tensor, carried: Any) -> None:
    """Set the state for the next block on a block's output."""
    setattr(tokens, _CARRIED, carried)


def get_carried(tokens: Tensor) -> Any:
    """The state that the previous block has set on these tokens; None if there is none."""
    return getattr(tokens, _CARRIED, None)


class ThreadValue(Generic[T]):
    """A value, or None, for each thread. A copy of the object has no values.

    During tracing the value is an attribute. Dynamo can trace that, but not threading.local and, in some hosts, not
    changes of a dict. One thread at a time traces a graph, and what is set while tracing is read within the same trace.
    """

    def __init__(self) -> None:
        self.values: dict[int, T] = {}
        self.traced: T | None = None

    def get(self) -> T | None:
        """The value of this thread."""
        return self.traced if torch.compiler.is_compiling() else self.values.get(threading.get_ident())

    def set(self, value: T | None) -> None:
        """Set the value of this thread; None removes it."""
        if torch.compiler.is_compiling():
            self.traced = value
        elif value is None:
            self.values.pop(threading.get_ident(), None)
        else:
            self.values[threading.get_ident()] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadValue, ()


class EntryInfo(NamedTuple):
    """What the host's entry points (hooks.py) have found for the first block of a forward.

    Attributes:
        text: a text tower's `TextEnds`, or a decoder's `FirstToken`; None: neither.
        outputs: `HostOutputs`; None: the tower's default.
    """

    text: Any = None
    outputs: Any = None


def recomputing() -> bool:
    """Whether a backward pass runs in this thread, so that a forward is the recomputation of a gradient checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def store_entry_info(tokens: Tensor, info: EntryInfo) -> None:
    """Store the info on the first block's input [B, T, C], for the recomputation of a gradient checkpoint."""
    if not torch.compiler.is_compiling():
        setattr(tokens, _ENTRY_INFO, info)


def stored_entry_info(tokens: Tensor) -> EntryInfo:
    """The info that was stored on these tokens in the forward that is recomputed now."""
    info: EntryInfo = getattr(tokens, _ENTRY_INFO, None) or EntryInfo()
    return info
