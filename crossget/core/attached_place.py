"""A reducer at a place that is no list of blocks: behind the connector, or at the merge units of a packed tower."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from crossget.core.carried import ThreadValue
from crossget.methods.reducers import Reducer

RecordT = TypeVar("RecordT")


class AttachedPlace(Generic[RecordT]):
    """The reducer of a place and the record of its last forward, for each thread.

    Args:
        reducer: the method.
        record: makes the record of a forward that did nothing.

    Attributes:
        recording: forwards that begin now are recorded.

    Raises:
        ValueError: the reducer cannot work there.
    """

    def __init__(self, reducer: Reducer, record: Callable[[], RecordT]) -> None:
        self.recording = False
        self._new_record, self._latest = record, record()
        self._records: ThreadValue[RecordT] = ThreadValue()
        self._own: ThreadValue[Reducer] = ThreadValue()
        self._reducer = self.resolve(reducer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": self._new_record()}

    def resolve(self, reducer: Reducer) -> Reducer:
        """The method with all fields resolved.

        Raises:
            ValueError: it cannot work there.
        """
        raise NotImplementedError

    @property
    def reducer(self) -> Reducer:
        """The method, with all fields resolved."""
        return self._own.get() or self._reducer

    def set_reducer(self, reducer: Reducer) -> None:
        """Set the method; see `resolve` for what is raised."""
        resolved = self.resolve(reducer)
        if self._own.get() is None:
            self._reducer = resolved
        else:
            self._own.set(resolved)

    @contextlib.contextmanager
    def own_reducer(self) -> Iterator[None]:
        """Context in which `set_reducer` is for this thread only."""
        before = self._own.get()
        self._own.set(self.reducer)
        try:
            yield
        finally:
            self._own.set(before)

    @property
    def last_record(self) -> RecordT:
        """The record of this thread's last forward; of the last one of any thread, if this one has run none."""
        return self._records.get() or self._latest

    @last_record.setter
    def last_record(self, record: RecordT) -> None:
        self._latest = record
        self._records.set(record)
