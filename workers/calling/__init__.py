"""Runs Python callables in processes of their own, which can be ended while a call runs.

`child` is the worker's side, `callee` what runs in the process, `channel` what passes between the two, and `keeper`
ends the processes of a worker that was killed. Nothing here knows of jobs, models or Celery.
"""

from __future__ import annotations


class CallError(Exception):
    """A call failed, and its process goes on. `traceback` is the callable's own, empty where it has none."""

    def __init__(self, text: str, traceback: str = "") -> None:
        super().__init__(text)
        self.traceback = traceback


class ProcessLostError(CallError):
    """A call failed, and its process is gone: it crashed, or went over a limit."""


class OutOfMemoryError(ProcessLostError):
    """A call failed, and its process is gone, for want of memory. `calls` before it were answered by that process."""

    def __init__(self, text: str, traceback: str = "", *, calls: int) -> None:
        super().__init__(text, traceback)
        self.calls = calls


class NotWantedError(Exception):
    """The call is no longer wanted: it was not started, or was terminated together with its process."""
