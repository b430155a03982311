"""Waits for what tests start: conditions with a deadline, and processes that are gone."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

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


class Blocking:
    """An object whose coroutines run to their end where they are called, in the loop of `runner`."""

    def __init__(self, runner: asyncio.Runner, called: Any) -> None:
        self.runner, self.called = runner, called

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.called, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *arguments, **options: self.runner.run(found(*arguments, **options))
