"""Noticing that an optimiser updates the weights of a tower and not its cross tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_FORWARDS = 256
_VALUES = 64


class UntrainedWarning(UserWarning):
    """Says that a model is trained, and that its cross tokens are not: no optimiser has them."""


class _Note:
    """What a tensor was at one time. Fused optimisers change values and not the version, so both are kept."""

    def __init__(self, tensor: Tensor, n_values: int | None = None) -> None:
        self.tensor, self.n_values, self.version = weakref.ref(tensor), n_values, tensor._version
        self.values = self._values(tensor).clone()

    def _values(self, tensor: Tensor) -> Tensor:
        return tensor.detach().flatten()[: self.n_values]

    def changed(self, tensor: Tensor) -> bool:
        """Whether the tensor was changed since, in place."""
        if tensor._version != self.version:
            return True
        values = self._values(tensor)
        return values.device != self.values.device or not torch.equal(values.to(self.values.dtype), self.values)


class Updates:
    """Compares a tower's weights and cross tokens between two training forwards.

    The cross tokens are left out if they have a gradient and some weight was changed in place since the last training
    forward, but not they. An optimiser that has them changes them in the step in which it changes the weights. Loading
    a state dict changes weights, too, and calls `restart`.

    Two weights of the tower are compared, its first trainable one and its last. The comparison ends at its first
    result, or after 256 training forwards: values on an accelerator are waited for. A copy of the object has seen
    nothing.
    """

    def __init__(self) -> None:
        self._notes: list[_Note] = []  # of the weights, then of the cross tokens
        self._forwards = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Updates, ()

    def restart(self) -> None:
        """Compare from the next training forward on only."""
        self._notes = []

    def leave_out(self, blocks: Iterable[nn.Module], cross_tokens: Tensor) -> bool:
        """Whether the cross tokens were left out since the last call. It is made in every training forward.

        Args:
            blocks: of the tower.
            cross_tokens: the tower's cross tokens, or those of its first block.
        """
        notes, self._notes = self._notes, []
        if self._forwards == _FORWARDS or not cross_tokens.requires_grad or cross_tokens.is_meta:
            return False
        self._forwards += 1
        found = [tensor for note in notes if (tensor := note.tensor()) is not None]
        if len(found) == len(notes) > 0 and found[-1] is cross_tokens:
            *changed, cross_changed = (note.changed(tensor) for note, tensor in zip(notes, found, strict=True))
            gradient = cross_tokens.grad
            if any(changed) and (cross_changed or (gradient is not None and bool(gradient.any()))):
                self._forwards = _FORWARDS
                return not cross_changed
        weights = [p for block in blocks for p in block.parameters() if p.requires_grad and p is not cross_tokens]
        if weights:
            self._notes = [_Note(weights[0], _VALUES), _Note(weights[-1], _VALUES), _Note(cross_tokens)]
        return False
