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
- **A host that makes a new tensor between two blocks** (a clone, a sum, a move to another device), and **re-entrant
  checkpointing**, which recomputes blocks from detached tensors: the attribute is lost, and `HandedOver` finds the
  state again.
- **The first block's input** has no attribute yet. What the host's entry points have found (`EntryInfo`) is a value of
  the thread (`ThreadValue`). The first block also stores it on its input, for the recomputation of a checkpoint.

If a whole model is compiled, all this is traced. Dynamo calls a module's `forward` and not its `__call__`; `forward`
then does what `__call__` does otherwise.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from crossget.core.state import TokenState

T = TypeVar("T")
_CARRIED, _ENTRY_INFO = "_crossget_carried", "_crossget_entry_info"


@dataclass(frozen=True)
class Carried:
    """The state that a block sets on its output, for the next block.

    Attributes:
        state: of the tokens after the block.
        layer: number of the next block, from 0.
        is_full_grid: the tensor is the full grid [B, T0, C]; the tokens are its rows at `state.positions`.
        hidden_cross_token: [B, C] the cross token, detached, if the tensor does not include it; otherwise None.
        n_returned: number of values that the block returns as a tuple; 0: it returns a tensor.
    """

    state: TokenState
    layer: int
    is_full_grid: bool
    hidden_cross_token: Tensor | None
    n_returned: int = 0


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


@dataclass(frozen=True)
class EntryInfo:
    """What the host's entry points (hooks.py) have found for the first block of a forward.

    Attributes:
        text: a text tower's `TextEnds`, or a decoder's `FirstToken`; None: neither.
        outputs: `HostOutputs`; None: the tower's default.
        uncompiled: see `Call`. A checkpoint recomputes the block as it ran, though compiled code exists by then.
    """

    text: Any = None
    outputs: Any = None
    uncompiled: bool = False


def recomputing() -> bool:
    """Whether a backward pass runs in this thread, so that a forward is the recomputation of a gradient checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def store_entry_info(tokens: Tensor, info: EntryInfo) -> None:
    """Store the info on the first block's input [B, T, C], for the recomputation of a gradient checkpoint."""
    if not torch.compiler.is_compiling():
        setattr(tokens, _ENTRY_INFO, info)


def stored_entry_info(tokens: Tensor) -> EntryInfo | None:
    """The info that was stored on these tokens in the forward that is recomputed now; None: there is none."""
    info: EntryInfo | None = getattr(tokens, _ENTRY_INFO, None)
    return info


class HandedOver:
    """What the blocks of a tower have handed over, for tensors that have lost their attributes.

    In a forward, a block whose input has no state takes up the state that the previous block has left in this thread
    and that no block has taken up yet. If there are two, such as those of two interleaved batches, it is not known
    which one is meant.

    In a backward pass, which recomputes blocks from detached tensors, the state is that of the tensor at the same
    address: the checkpoint keeps this tensor, so that its memory is not used again. Nowhere else is an address used.

    A copy of the object is empty.
    """

    def __init__(self) -> None:
        # By thread, then by number of the next block. A second entry shows that the first one is not the only one.
        self._open: dict[int, dict[int, deque[tuple[torch.Size, Carried]]]] = {}
        self._by_address: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return HandedOver, ()

    def add(self, tokens: Tensor, carried: Carried) -> None:
        """Note what a block leaves on its output."""
        of_thread = self._open.setdefault(threading.get_ident(), {})
        of_thread.setdefault(carried.layer, deque(maxlen=2)).append((tokens.shape, carried))
        self.note_address(tokens, carried)

    def note_address(self, tokens: Tensor, value: Carried | EntryInfo) -> None:
        """Note what belongs to a tensor, for as long as the value lives."""
        address = _address(tokens, type(value))
        if address is not None:
            self._by_address[address] = value

    def take(self, carried: Carried) -> None:
        """A block has taken up what the previous one left."""
        of_thread = self._open.get(threading.get_ident(), {})
        left = [entry for entry in of_thread.pop(carried.layer, ()) if entry[1] is not carried]
        if left:
            of_thread[carried.layer] = deque(left, maxlen=2)

    def candidates(self, tokens: Tensor, is_next: Callable[[int], bool]) -> list[Carried]:
        """What may belong to tokens without a state.

        Args:
            tokens: the block's input.
            is_next: a function of a block's number: whether it is the block that is called.
        """
        if recomputing():
            found = self.at_address(tokens, Carried)
            if found is not None and is_next(found.layer):
                return [found]
        return [
            carried
            for layer, entries in self._open.get(threading.get_ident(), {}).items()
            if is_next(layer)
            for shape, carried in entries
            if shape == tokens.shape
        ]

    def at_address(self, tokens: Tensor, kind: type) -> Any:
        """The value of this type that was noted for the tensor at the same address; None: there is none."""
        address = _address(tokens, kind)
        return None if address is None else self._by_address.get(address)

    def forget(self) -> None:
        """Forget what is open in this thread."""
        self._open.pop(threading.get_ident(), None)


def _address(tokens: Tensor, kind: type) -> tuple[Any, ...] | None:
    """Where the memory of a tensor is; None: it has none of its own (meta tensors, subclasses, inside functorch)."""
    if type(tokens) is not Tensor or tokens.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tokens):
        return None
    return kind, tokens.device, tokens.data_ptr(), tokens.shape
