"""Waiting for the background thread, where `gevent.monkey` may have replaced threads and locks by those of greenlets.

The event loop then still runs on a thread of the operating system: in a greenlet it would be the running loop of all
greenlets. gevent's locks lose wake-ups between such threads, so a greenlet waits for its hub's watcher instead.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Queue
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class EndedCalls(Protocol[T]):
    """What has ended on the loop, for the one caller that waits."""

    def put(self, item: T) -> None:
        """Add an item, from any thread."""

    def get(self) -> T:
        """Wait for the next item."""


def _monkey() -> Any:
    """The module `gevent.monkey` if it has replaced threads by greenlets, else None."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey if monkey is not None and monkey.is_module_patched("threading") else None


def in_greenlets() -> bool:
    """Whether callers are greenlets."""
    return _monkey() is not None


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop for a thread of its own."""
    if (monkey := _monkey()) is None:
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(monkey.get_original("selectors", "DefaultSelector")())


def start_thread(target: Callable[[], None]) -> None:
    """Run `target` on a daemon thread of the operating system."""
    if (monkey := _monkey()) is None:
        threading.Thread(target=target, name="taxiway-client", daemon=True).start()
    else:
        monkey.get_original("_thread", "start_new_thread")(target, ())


def new_queue() -> EndedCalls[Any]:
    """An empty queue."""
    return Queue() if _monkey() is None else _HubQueue(_monkey())


def result_of(future: Future[T]) -> T:
    """Wait for the future's result."""
    if in_greenlets():
        queue = new_queue()
        future.add_done_callback(queue.put)
        queue.get()
    return future.result()


class _HubQueue(Generic[T]):
    """A queue from threads of the operating system to a greenlet."""

    def __init__(self, monkey: Any) -> None:
        self._items: deque[T] = deque()
        self._lock = monkey.get_original("_thread", "allocate_lock")()
        self._watcher: Any = None

    def put(self, item: T) -> None:
        """Add an item, from any thread."""
        with self._lock:
            self._items.append(item)
            if self._watcher is not None:
                self._watcher.send()

    def get(self) -> T:
        """Wait for the next item, while other greenlets run."""
        gevent = sys.modules["gevent"]
        came = gevent.event.Event()
        with self._lock:
            self._watcher = gevent.get_hub().loop.async_()
            self._watcher.start(came.set)
        try:
            while not self._items:
                came.wait()
                came.clear()
            return self._items.popleft()
        finally:
            with self._lock:
                self._watcher.close()
                self._watcher = None
