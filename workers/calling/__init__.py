"""Runs Python callables in child processes, which can be killed during a call.

`child` is the worker's side, `callee` runs in the child process, `channel` connects the two, and `keeper` kills the
children of a worker that was killed. Nothing here depends on jobs, models or Celery.
"""

from __future__ import annotations


class CallError(Exception):
    """A call failed; its process continues. `traceback` is the callable's, empty if there is none."""

    def __init__(self, text: str, traceback: str = "") -> None:
        super().__init__(text)
        self.traceback = traceback


class ProcessLostError(CallError):
    """A call failed and its process is gone: it crashed or exceeded a limit."""


class OutOfMemoryError(ProcessLostError):
    """A call failed and its process is gone: it ran out of memory, after `calls` successful calls."""

    def __init__(self, text: str, traceback: str = "", *, calls: int) -> None:
        super().__init__(text, traceback)
        self.calls = calls


class NotWantedError(Exception):
    """The call is no longer wanted: it was not started, or was terminated with its process."""
