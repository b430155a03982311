"""Converts results to events, and reads every job's result from the state store after the run."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

import taxiway
from taxiway.contract.job import FINAL, JobState, Result, state_of
from taxiway.errors import ResultTimeoutError, TaxiwayError, UnknownJobError
from tests.chaos.history import Observed, Ran, Recorder, Stored

_CONCURRENT = 256  # jobs that are read concurrently


def observed(job: str, interface: str, end: Result | TaxiwayError) -> Observed:
    """The event of a producer that learned how its job ended."""
    return Observed(job=job, interface=interface, **_outcome_of(end))


async def read_store(url: str, jobs: Iterable[str], recorder: Recorder) -> None:
    """Record how each job ended, from the state store."""
    limit = asyncio.Semaphore(_CONCURRENT)
    async with taxiway.AsyncClient(url, connect_timeout=20) as client:

        async def read(job: str) -> None:
            async with limit:
                recorder.record(await _stored(client.job(job)))

        await asyncio.gather(*map(read, jobs))


def read_notes(path: Path, recorder: Recorder) -> None:
    """Record which jobs models ran to their end; number 0 is a worker's warm-up."""
    numbers = path.read_text().split() if path.exists() else []
    recorder.record(*(Ran(number=int(number)) for number in numbers if int(number)))


async def _stored(job: taxiway.AsyncJob) -> Stored:
    try:
        record = (await job.status()).record
    except UnknownJobError:  # a failover lost it
        return Stored(job=job.id, state="unknown", digest="")
    times = {name: getattr(record, name) for name in ("accepted", "started", "finished", "deadline_at")}
    if record.state not in FINAL:
        return Stored(job=job.id, state=record.state, digest="", **times)
    try:
        outcome = _outcome_of(await job.result(20.0))
    except ResultTimeoutError:
        outcome = {"state": "final without a result", "digest": ""}
    except TaxiwayError as error:
        outcome = _outcome_of(error)
    if outcome["state"] != record.state:
        outcome["state"] = f"{record.state} with the result of {outcome['state']}"
    return Stored(job=job.id, **outcome, **times)


def _outcome_of(end: Result | TaxiwayError) -> dict[str, Any]:
    if isinstance(end, TaxiwayError):
        return {"state": str(state_of(end)), "digest": end.code}
    outputs = {name: _single(value) for name, value in end.outputs.items()}
    whole = msgspec.json.encode([end.model, outputs, end.report])
    answer = outputs.get("number", outputs.get("payload"))
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return {"state": str(JobState.SUCCEEDED), "digest": digest, "answer": answer if isinstance(answer, int) else None}


def _single(value: Any) -> Any:
    """The only row of a one-row list: a job submitted over HTTP reads as a list of one at another interface."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
