"""Operations on accepted jobs and on dead letters.

Callers read a job's state, its result and the reason for its placement, or cancel it. Operators list dead letters,
inspect one, replay its job or drop it. A dead letter is identified by a digest of its stored form, so letters of every
release have a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.routing.explanation import Explanation, explain_record, unpack_snapshot
from api.routing.router import HttpRouter
from broker.port import Arrival, DeadLetter
from router.decide.basis import read_basis
from router.decide.placement import seed_of
from router.decide.snapshot import FleetSnapshot
from router.service.admission import Place
from router.service.decision import GiveUp, end_of
from taxiway.contract.job import (
    FINAL,
    JobRecord,
    JobState,
    JobStatus,
    decode_moves,
    decode_parts,
    ended_as,
    expired,
    failure_of,
    read_meta,
    read_result,
    record_from,
    report_of,
    status_of,
    unknown,
)
from taxiway.contract.wire import Envelope, decode_envelope
from taxiway.errors import InvalidRequestError, ModelUnavailableError, UnknownLetterError, UnknownModelError, quoted

OVERRUN = 0.1
"""Assumed remainder of a run that takes longer than expected, as a share of its duration so far."""

_LEAST_LEFT = 0.001  # seconds: an unfinished job never has 0 s left

_NEVER_PLACED = "the job was not placed: its result says why"
_OTHER_RELEASE = "another release of the router placed the job: only the reason is known"
_GONE = "the snapshot behind the decision expired after {kept} s (limits.keep_explanation): only the reason is known"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A job's record and stored result, read atomically."""

    fields: dict[str, str]
    record: JobRecord
    meta: bytes | None

    @property
    def final(self) -> bool:
        return self.meta is not None or self.record.state in FINAL


class Jobs:
    """The jobs in a router's store, or only those of one tenant: other tenants' jobs are unknown then."""

    def __init__(self, router: HttpRouter, tenant: str | None = None) -> None:
        self._router = router
        self._tenant = tenant
        self._store = router.store

    async def status(self, job: str, *, wait: float) -> JobStatus:
        """The job's state; with `wait`, as soon as it is final or that many seconds have passed.

        Position counts the unfinished jobs of its class that come before it, running ones included; for a held job,
        those of its holding queue that are due before it. The time left is an estimate from the work ahead of its level
        and the live devices of its class.

        Raises:
            UnknownJobError: no router has placed a job with that id.
        """
        return await self._status(await self._observe(job, wait))

    async def result(self, job: str, *, wait: float) -> bytes | JobStatus:
        """The stored result, or the job's state while there is none.

        Raises:
            UnknownJobError: no router has placed a job with that id.
            ResultExpiredError: the job ended, and its result has expired.
        """
        seen = await self._observe(job, wait)
        if seen.meta is not None:
            return seen.meta
        if seen.final:
            raise expired(job)
        return await self._status(seen)

    async def cancel(self, job: str) -> JobStatus:
        """End the job before it runs; a job that has ended is left unchanged.

        Raises:
            UnknownJobError: no router has placed a job with that id.
        """
        seen = await self._observe(job, 0.0)
        if not seen.final:
            await self._store.jobs.cancel([job])
        return await self._status(await self._observe(job, 0.0))

    async def placement(self, job: str) -> dict[str, Any]:
        """Why the job is where it is: the reason, and the recomputed candidate table.

        `note` says why there is no table, or how it differs from the decision. `first_token` is when a streamed answer
        began, while its stream is kept. `parts` are the runs of a generation that were cut, and `yielded` says why the
        job yielded last. `report` says how an answered job ran.

        Raises:
            UnknownJobError: no router has placed a job with that id.
        """
        seen = await self._observe(job, 0.0)
        names = ("id", "state", "model", "hardware_class", "variant", "device", "level", "reason")
        table, note = await self._table(seen)
        moves = decode_moves(seen.fields.get("moves", "[]"))
        parts = decode_parts(seen.fields.get("parts", "[]"))
        return {
            **{name: getattr(seen.record, name) for name in names},
            "led_to": seen.fields.get("led"),
            "note": note,
            "first_token": await self._router.values.first_piece(job),
            "moves": msgspec.to_builtins(moves),
            "report": None if seen.meta is None else msgspec.to_builtins(report_of(seen.meta)),
            "parts": msgspec.to_builtins(parts),
            "yielded": seen.fields.get("yielded"),
            "considered": [] if table is None else msgspec.to_builtins(table.considered),
            "refused": [] if table is None else msgspec.to_builtins(table.refused),
        }

    async def _table(self, seen: _Snapshot) -> tuple[Explanation | None, str | None]:
        """The recomputed table of a job's placement, if possible, and the note on it."""
        rules, record = self._router.rules, seen.record
        basis = read_basis(seen.fields.get("basis", ""))
        if basis is None:
            return None, _NEVER_PLACED if not record.hardware_class else _OTHER_RELEASE
        packed = await self._router.jobs.snapshot(basis.snapshot)
        if packed is None:
            return None, _GONE.format(kept=rules.topology.limits.keep_explanation)
        fleet = unpack_snapshot(packed)
        if fleet is None:
            return None, _OTHER_RELEASE
        try:
            model = rules.catalogue.resolve(record.model)
        except (UnknownModelError, ModelUnavailableError):
            return None, f"{record.model} is no longer in the catalogue: only the reason is known"
        table = explain_record(model, basis, rules.topology, fleet, rules.book, seed=seed_of(record.id))
        return table, None if seen.fields.get("moves") else _difference(record, table)

    async def _observe(self, job: str, wait: float) -> _Snapshot:
        seen = await self._read(job)
        if not seen.final and wait > 0:
            await self._router.results.wait(job, min(wait, self._router.rules.topology.limits.wait))
            seen = await self._read(job)
        return seen

    async def _read(self, job: str) -> _Snapshot:
        fields, meta = await self._router.jobs.record_and_result(job)
        hidden = self._tenant is not None and fields.get("tenant") != self._tenant
        if hidden or (not fields and meta is None):
            raise unknown(job)
        record = record_from(job, fields)
        if meta is not None and record.state not in FINAL:
            record = msgspec.structs.replace(record, state=ended_as(read_meta(meta)))
        return _Snapshot(fields, record, meta)

    async def _status(self, seen: _Snapshot) -> JobStatus:
        record = seen.record
        if seen.meta is not None:
            return status_of(record, error=failure_of(read_meta(seen.meta)))
        if record.state == JobState.HELD:
            return status_of(record, position=await self._router.jobs.before(record.id, seen.fields["holding"]))
        if seen.final or not record.hardware_class:
            return status_of(record)
        work = float(seen.fields.get("work", "0"))
        if record.state == JobState.RUNNING:
            eta = None if record.progress is None else record.progress.left
            if eta is None:
                eta = time_left(work, self._store.clock.now() - record.started)
            return status_of(record, position=0, eta=eta)
        eta = time_to_end(self._router.fleet.snapshot, record, work)
        jobs, turns = await self._router.jobs.placed_at(record.hardware_class, record.level)
        turn = int(seen.fields.get("turn", turns - 1))
        return status_of(record, position=jobs_before(jobs, turns - 1 - turn), eta=eta)


def jobs_before(jobs: Sequence[float], later: int) -> int:
    """The number of jobs before one: all at the levels above its own, and those of its own not placed `later`.

    `jobs` are the unfinished jobs of its class by level; the last level is its own and includes it.
    """
    *before, own = jobs
    return round(sum(before) + max(own - 1 - later, 0))


def time_left(work: float, ran: float) -> float:
    """Seconds until a job that was to take `work` seconds and has run for `ran` may be done; always above 0."""
    return max(work - ran, OVERRUN * ran, _LEAST_LEFT)


def time_to_end(fleet: FleetSnapshot, record: JobRecord, work: float) -> float | None:
    """Seconds until a waiting job of `work` seconds may be done; None if no device serves its class.

    The class's work up to its level includes the job's own. If all devices are busy, one has to finish first.
    """
    devices = fleet.of_class(record.hardware_class)
    if not devices:
        return None
    first_free = min(OVERRUN * device.batch_age for device in devices)
    ahead = sum(fleet.work.get(record.hardware_class, ())[: record.level + 1])
    return max(ahead / len(devices), first_free + work, _LEAST_LEFT)


def _difference(record: JobRecord, table: Explanation) -> str | None:
    """How the recomputed choice differs from the recorded one; None if it does not."""
    if (table.hardware_class or "", table.variant or "") == (record.hardware_class, record.variant):
        return None
    now = f"{table.hardware_class}/{table.variant}: {table.reason}" if table.hardware_class else table.reason
    was = f"placed on {record.hardware_class}/{record.variant}" if record.hardware_class else "held"
    return f"it was {was}; with the present catalogue, profiles and queues.yaml the same snapshot gives: {now}"


_PAGE = 200  # dead letters read at once
_NAME = 12  # hexadecimal digits


class StoredDeadLetters:
    """The dead letters in a router's store."""

    def __init__(self, router: HttpRouter) -> None:
        self._router = router
        self._store = router.store

    async def list(self, most: int) -> list[dict[str, Any]]:
        """The latest `most` dead letters, latest first: why, when, by which process, and of which job.

        `history` lists the workers that ended while holding it, and `bytes` is the size of its message.
        """
        found: list[dict[str, Any]] = []
        async for raw in self._letters():
            if len(found) == most:
                break
            found.append(_summary(raw, _read(raw)))
        return found

    async def show(self, name: str) -> dict[str, Any]:
        """One dead letter with the headers and the text of its message, whose `flaw` says why it cannot be read.

        Raises `UnknownLetterError`.
        """
        raw = await self._find(name)
        dead_letter = _read(raw)
        envelope, flaw = _open(dead_letter)
        headers, body = ({}, dead_letter.message) if envelope is None else (envelope.headers, envelope.payload())
        text = body.decode(errors="replace")
        return {**_summary(raw, dead_letter), "headers": headers, "body": text, "flaw": flaw}

    async def replay(self, name: str) -> str:
        """Submit the message's job again as if it arrived now, and clear its dead-lettered end; returns the job.

        Raises:
            UnknownLetterError: no such dead letter.
            InvalidRequestError: it is not a request, or its job did not end dead: a readable answer is kept.
            TaxiwayError: why the fleet refuses it now; the dead letter is kept.
        """
        raw = await self._find(name)
        dead_letter = _read(raw)
        envelope, flaw = _open(dead_letter)
        await self._router.fleet.read()
        arrival = Arrival("", dead_letter.message, envelope, flaw)
        decision = await self._router.intake.decide(arrival, self._store.clock.now(), self._router.fleet.working)
        if (end := end_of(decision)) is not None:
            read_result(read_meta(end.ending.meta))  # raises what is wrong
        if not isinstance(decision, Place):
            why = decision.reason if isinstance(decision, GiveUp) else "it cancels a job"
            raise InvalidRequestError(f"the message is not a request: {why}")
        job = decision.outgoing.job
        if not await self._router.operators.revive(job):
            raise InvalidRequestError(
                f"job {quoted(job)} was not dead-lettered, but ended otherwise: send it again as a new request", job=job
            )
        await self._router.forward(decision)
        await self._router.operators.drop_dead_letter(raw)
        return job

    async def drop(self, name: str) -> None:
        """Delete a dead letter. Raises `UnknownLetterError`."""
        await self._router.operators.drop_dead_letter(await self._find(name))

    async def _find(self, name: str) -> bytes:
        async for raw in self._letters():
            if _name(raw) == name:
                return raw
        raise UnknownLetterError(f"no dead letter {quoted(name)}", dead_letter=name)

    async def _letters(self) -> AsyncIterator[bytes]:
        """Dead letters as stored, latest first. One may be missed while others are dropped; none is returned twice."""
        seen: set[str] = set()
        start = 0
        while page := await self._router.operators.dead_letters(start, _PAGE):
            for raw in page:
                if (name := _name(raw)) not in seen:
                    seen.add(name)
                    yield raw
            start += _PAGE


def _name(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=_NAME // 2).hexdigest()


def _read(raw: bytes) -> DeadLetter:
    return msgspec.json.decode(raw, type=DeadLetter)


def _summary(raw: bytes, dead_letter: DeadLetter) -> dict[str, Any]:
    """A dead letter without its message; those of older releases do not name their job."""
    fields = {name: getattr(dead_letter, name) for name in ("at", "reason", "by", "history")}
    envelope, _ = _open(dead_letter) if not dead_letter.job else (None, "")
    named = envelope.headers.get("id") if envelope is not None else dead_letter.job
    return {**fields, "id": _name(raw), "job": str(named or ""), "bytes": len(dead_letter.message)}


def _open(dead_letter: DeadLetter) -> tuple[Envelope | None, str]:
    try:
        return decode_envelope(dead_letter.message), ""
    except InvalidRequestError as error:
        return None, error.message
