"""Waits for what tests start: conditions with a deadline, processes that are gone, and threads."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, Self

import psutil

from local.embedded import within

BUSY = 10.0
"""Seconds that a busy machine may add to what the product does within a stated time."""


def until(condition: Callable[[], bool], *, timeout: float = 60.0, every: float = 0.02) -> bool:
    """Whether the condition came true within `timeout` seconds; it is looked at `every` so many seconds."""
    return within(timeout, condition, every=every)


def gone(pid: int) -> bool:
    """Whether no process of that id runs; one that only waits to be reaped is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def in_thread(run: Callable[..., object], *given: object, stop: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Run it in a thread of its own, which the block's end waits for; `stop` is called then, and ends it."""
    thread = Thread(target=run, args=given)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join()


class Watcher:
    """Runs `watch` in a thread of its own from the block's begin to its end, at which `over` is set."""

    def __init__(self) -> None:
        self.over = Event()
        self._thread = Thread(target=self.watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join()

    def watch(self) -> None:
        """What runs until `over`."""
        raise NotImplementedError


class Blocking:
    """An object whose coroutines run to their end where they are called, in the loop of `runner`."""

    def __init__(self, runner: asyncio.Runner, called: Any) -> None:
        self.runner, self.called = runner, called

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.called, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *arguments, **options: self.runner.run(found(*arguments, **options))
