"""How far a running job is: what its callable last reported (`taxiway.Run.report`), on its record and in its stream.

Celery's result backend has it as the state `PROGRESS` while the job runs, under the key of the result. What is read
there passes `result_in`.
"""

from __future__ import annotations

from typing import Any

import msgspec

_CELERY_STATE = b'{"status":"PROGRESS",'  # a result begins with its job


class RunProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run last reported."""

    fraction: float
    """Of the work, 0 to 1."""
    message: str = ""
    partial: Any = None
    """A first result."""
    left: float | None = None
    """Estimated seconds to the end, as of the report; None if nothing tells."""

    @property
    def text(self) -> str:
        """It in a line: `62 %: 1,240 steps`."""
        return f"{self.fraction:.0%}".replace("%", " %") + (f": {self.message}" if self.message else "")


class _CeleryState(msgspec.Struct):
    status: str
    result: RunProgress
    task_id: str
    traceback: None = None
    children: tuple[()] = ()


def read_progress(raw: bytes | str) -> RunProgress:
    """The report in a job's record or stream. Raises `msgspec.MsgspecError`."""
    return msgspec.json.decode(raw, type=RunProgress)


def celery_state(job: str, progress: RunProgress) -> bytes:
    """The job's state as Celery's `AsyncResult` reads it, with the report as `info`."""
    return msgspec.json.encode(_CeleryState("PROGRESS", progress, job))


def result_in(raw: bytes | None) -> bytes | None:
    """What was read under a result's key, if it is a result; None if it is a state, or nothing."""
    return None if raw is None or raw.startswith(_CELERY_STATE) else raw
