"""Runs work at a lower CPU priority than the rest of the process."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Value = TypeVar("Value")


class NicerThread:
    """A thread that computes at a lower CPU priority than the rest of the process: it runs one call after another.

    On Linux niceness belongs to a thread, and only a privileged process may lower it again: hence a separate thread. It
    is a daemon, because a worker that abandons a running batch must end; a `ThreadPoolExecutor` would wait for it.
    """

    def __init__(self, nice: int) -> None:
        self._nice = nice
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], Value]) -> Value:
        """The value of `call`, or what it raises. Only who has the device's turn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="taxiway-patient", daemon=True)
            self._thread.start()
        answer: Future[Value] = Future()
        self._calls.put((call, answer))
        return answer.result()

    def _run(self) -> None:
        if sys.platform == "linux":
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + self._nice)
        while True:
            call, answer = self._calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:  # the caller's to handle
                answer.set_exception(error)
