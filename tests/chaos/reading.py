"""What an end of a job comes to in the history, and the ends that the state store has once all is calm."""

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

_AT_ONCE = 256  # jobs that are read at a time


def observed(job: str, door: str, end: Result | TaxiwayError) -> Observed:
    """What a producer was told."""
    return Observed(job=job, door=door, **_told(end))


async def read_store(url: str, jobs: Iterable[str], recorder: Recorder) -> None:
    """Write down how each job ended, as the state store has it now."""
    turn = asyncio.Semaphore(_AT_ONCE)
    async with taxiway.AsyncClient(url, connect_timeout=20) as client:

        async def read(job: str) -> None:
            async with turn:
                recorder.note(await _stored(client.job(job)))

        await asyncio.gather(*map(read, jobs))


def read_notes(path: Path, recorder: Recorder) -> None:
    """Write down what ran to its end; number 0 is what workers warm up with."""
    numbers = path.read_text().split() if path.exists() else []
    recorder.note(*(Ran(number=int(number)) for number in numbers if int(number)))


async def _stored(job: taxiway.AsyncJob) -> Stored:
    try:
        record = (await job.status()).record
    except UnknownJobError:  # a failover lost it
        return Stored(job=job.id, state="unknown", digest="")
    times = {name: getattr(record, name) for name in ("accepted", "started", "finished", "deadline_at")}
    if record.state not in FINAL:
        return Stored(job=job.id, state=record.state, digest="", **times)
    try:
        told = _told(await job.result(20.0))
    except ResultTimeoutError:
        told = {"state": "final without a result", "digest": ""}
    except TaxiwayError as error:
        told = _told(error)
    if told["state"] != record.state:
        told["state"] = f"{record.state} with the result of {told['state']}"
    return Stored(job=job.id, **told, **times)


def _told(end: Result | TaxiwayError) -> dict[str, Any]:
    if isinstance(end, TaxiwayError):
        return {"state": str(state_of(end)), "digest": end.code}
    outputs = {name: _single(value) for name, value in end.outputs.items()}
    whole = msgspec.json.encode([end.model, outputs, end.report])
    answer = outputs.get("number", outputs.get("payload"))
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return {"state": str(JobState.SUCCEEDED), "digest": digest, "answer": answer if isinstance(answer, int) else None}


def _single(value: Any) -> Any:
    """A request's only row as it is: who reads a job that came by HTTP at another door gets a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
