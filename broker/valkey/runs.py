"""Runs of Python callables: what they report, and their checkpoints, under the token of their job's claim."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from broker.valkey import Call, packed
from taxiway.contract.keys import job_key, result_key, stream_key
from taxiway.contract.progress import RunProgress, celery_state
from taxiway.contract.stream import KEEP

MOST_REPORTS = 16
"""Approximate number of reports that a stream keeps: a reader wants the latest."""


@dataclass(frozen=True, slots=True)
class RunUpdate:
    """What is new of a run."""

    token: str
    ran: float
    """Seconds for which the job ran, in all its runs."""
    progress: RunProgress | None
    """None if there is no new report."""
    celery: bool
    """The job's producer may look for its state in Celery's result backend."""
    row: int = 0

    def joined(self, after: RunUpdate) -> RunUpdate:
        """This update and the one `after` it as one."""
        return replace(after, progress=after.progress or self.progress)


@dataclass(frozen=True, slots=True)
class EarlierRuns:
    """What is kept of a job's earlier runs."""

    ran: float = 0.0
    """Their seconds."""
    yields: int = 0
    """How many of them yielded."""
    yielded: str = ""
    """Why one did last; empty if none did."""
    checkpoints: tuple[bytes, ...] = ()
    """The facts of their last ones, latest first."""


EARLIER = ("ran", "yields", "yielded", "checkpoint", "checkpoint_before")
"""The fields of a job's record that `earlier_runs` reads."""


def earlier_runs(values: list[bytes | None]) -> EarlierRuns:
    """The earlier runs, from the values of `EARLIER`."""
    ran, yields, yielded, *checkpoints = values
    return EarlierRuns(float(ran or 0), int(yields or 0), (yielded or b"").decode(), tuple(filter(None, checkpoints)))


def report_call(job: str, update: RunUpdate) -> Call:
    """Records what a run reports; answers 1 if the claim is still ours."""
    progress = update.progress
    run = {
        "token": update.token,
        "ran": update.ran,
        "progress": "" if progress is None else msgspec.json.encode(progress).decode(),
        "state": "" if progress is None or not update.celery else celery_state(job, progress).decode(),
    }
    keys = [job_key(job), stream_key(job), result_key(job)]
    return Call("runs/report", keys, [KEEP, MOST_REPORTS, packed(run)])


def checkpoint_call(job: str, token: str, key: str, facts: bytes, ran: float) -> Call:
    """Makes the bytes under `key` the job's last checkpoint; answers 1 if the claim is still ours."""
    run = {"token": token, "ran": ran, "checkpoint": facts.decode()}
    return Call("runs/checkpoint", [job_key(job), key], [packed(run)])
