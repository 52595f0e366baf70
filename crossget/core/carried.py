"""What is carried from block to block, and by whom: attributes of tensors, one extra argument, and values of a thread.

Between two blocks the host passes on one tensor, the tokens. Everything else that the next block needs goes along as an
attribute of that very tensor (`Passed`). Nothing is kept on modules between blocks, so gradient checkpointing, threads,
copies of a model and interrupted forwards need no care and no reset.

Who puts other tensors in place of those that a block gets or returns, and why the attribute is found all the same:

- **Hooks on a block** run inside the block's `__call__`. FSDP2's pre-forward hook casts the block's arguments and wraps
  them in a function of its own, DeepSpeed's hooks exchange arguments and results, accelerate's move them to another
  device. The attribute is looked up on the tensor that `__call__` gets, and set on the tensor that `__call__` returns
  (block_class.py), so on either side of all hooks. Between the two, inside the hooks, the block's `BlockRun` travels as
  a keyword argument of the call, which hooks leave alone.
- **Gradient checkpointing that wraps blocks from outside** (timm, open_clip, torch's `checkpoint_wrapper`) calls the
  block a second time with the tensors of the first call. Their attributes are still there, and `TokenState` is frozen.
- **Gradient checkpointing inside the block's `__call__`** (transformers) runs the block's `forward` a second time with
  the arguments of the first call, the `BlockRun` among them.
- **Re-entrant checkpointing** makes new tensors outside of `__call__`. Their attribute is lost, which is an error.
- **The first block's input** has no attribute yet. What the host's entry points found out for it (where texts end, what
  is looked at) is a value of the thread, and is put onto the tensor when the first block takes it, for the
  recomputation of a checkpoint.

A whole model that is compiled is traced through all of this. Dynamo calls a module's `forward` and not its `__call__`;
`forward` then does what `__call__` would have done.
"""

from __future__ import annotations

import threading
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from crossget.core.state import TokenState

T = TypeVar("T")
_PASSED, _NOTED = "_crossget_passed", "_crossget_noted"


class Passed(NamedTuple):
    """What a block leaves on its output for the next one.

    Attributes:
        state: of the tokens behind the block.
        layer: of the next block, counted from 0.
        on_grid: the tensor shows the host's grid; the block's tokens are its rows at `state.positions`.
        cross_token: [B, C] the cross token without its graph, where the tensor does not show it; else None.
    """

    state: TokenState
    layer: int
    on_grid: bool
    cross_token: Tensor | None


def pass_on(tokens: Tensor, passed: Any) -> None:
    """Leave something on a block's output, for the next block."""
    setattr(tokens, _PASSED, passed)


def passed_with(tokens: Tensor) -> Any:
    """What the block in front left on these tokens; None if nothing."""
    return getattr(tokens, _PASSED, None)


class ThreadValue(Generic[T]):
    """A value, or None, for each thread; copies start with none.

    While a graph is traced the value is an attribute: Dynamo follows that, but neither threading.local nor, in every
    host, changes of a dict. A graph is traced by one thread at a time, and what is set while tracing is used up then.
    """

    def __init__(self) -> None:
        self.values: dict[int, T] = {}
        self.traced: T | None = None

    def get(self) -> T | None:
        """The value of this thread."""
        return self.traced if torch.compiler.is_compiling() else self.values.get(threading.get_ident())

    def set(self, value: T | None) -> None:
        """Another value for this thread; None forgets it."""
        if torch.compiler.is_compiling():
            self.traced = value
        elif value is None:
            self.values.pop(threading.get_ident(), None)
        else:
            self.values[threading.get_ident()] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadValue, ()


class Notes(NamedTuple):
    """What the host's entry points found out for the first block of a forward.

    Attributes:
        input: where texts end, or where the first token is; None: nothing.
        shown: what the host sees of the blocks; None: as the tower says.
    """

    input: Any = None
    shown: Any = None


def recomputing() -> bool:
    """Whether a backward pass runs, so that a forward is the recomputation of a gradient checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def leave_notes(tokens: Tensor, notes: Notes) -> None:
    """Leave the notes of a forward on its first block's input [B, T, C], for the recomputation of a checkpoint."""
    if not torch.compiler.is_compiling():
        setattr(tokens, _NOTED, notes)


def left_notes(tokens: Tensor) -> Notes:
    """The notes of the forward that the recomputed one was."""
    notes: Notes = getattr(tokens, _NOTED, None) or Notes()
    return notes
