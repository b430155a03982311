"""Waiting for the background thread, where `gevent.monkey` may have replaced threads and locks by those of greenlets.

The event loop then still runs on a thread of the operating system: in a greenlet it would be the running loop of all
greenlets. gevent's locks lose wake-ups between such threads, so a greenlet waits for its hub's watcher instead.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


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


def result_of(future: Future[T]) -> T:
    """Wait for the future's result."""
    if (monkey := _monkey()) is not None:
        _wait(future, monkey)
    return future.result()


def _wait(future: Future[Any], monkey: Any) -> None:
    """Wait in a greenlet, while others run, for what ends on a thread of the operating system."""
    gevent, lock = sys.modules["gevent"], monkey.get_original("_thread", "allocate_lock")()
    came, watcher = gevent.event.Event(), gevent.get_hub().loop.async_()
    watcher.start(came.set)
    waiting = [watcher]

    def wake(_: Future[Any]) -> None:
        with lock:
            for one in waiting:
                one.send()

    future.add_done_callback(wake)
    try:
        came.wait()
    finally:
        with lock:
            waiting.clear()
            watcher.close()
