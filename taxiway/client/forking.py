"""What a forked child must have of its own: connections, and the event loop that runs them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_making = threading.Lock()
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


class PerProcess(Generic[T]):
    """A value that is made on first use, and again on first use in a forked child.

    The parent's value is never destroyed in the child, not even when that exits: this would shut down TLS connections
    of the parent's, and remove its sockets from the epoll instance that both share.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """The value of this process."""
        process = os.getpid()
        if process not in self._made:
            with _making:
                self._renew(process)
        return self._made[process]

    def _renew(self, process: int) -> None:
        if process not in self._made:
            for inherited in self._made.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
            self._made[process] = self._make()
