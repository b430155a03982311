"""Dead letters: an operator lists them, inspects one, replays its job or drops it.

A dead letter is identified by a digest of its stored form, so letters of every release have a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from broker.port import Arrival, DeadLetter, Holder
from router.service.arrivals import Router
from taxiway.contract.job import read_meta, read_result
from taxiway.contract.wire import Envelope, decode_envelope
from taxiway.errors import InvalidRequestError, UnknownLetterError, quoted

_PAGE = 200  # dead letters read at once
_NAME = 12  # hexadecimal digits


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter without its message: why, when (by the writer's clock) and by which process it was written.

    `history` lists the workers that ended while holding its job. `bytes` is the message's size.
    """

    id: str
    at: float
    reason: str
    by: str
    job: str
    history: tuple[Holder, ...]
    bytes: int


class Opened(Summary, frozen=True, kw_only=True):
    """A dead letter with its message: headers, and body as text. `flaw` says why a message cannot be read."""

    headers: Mapping[str, Any]
    body: str
    flaw: str


class DeadLetters:
    """The dead letters in a router's store."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._store = router.store

    async def list(self, most: int) -> list[Summary]:
        """The latest `most` dead letters, latest first."""
        found: list[Summary] = []
        async for raw in self._letters():
            if len(found) == most:
                break
            found.append(Summary(**_summary_fields(raw, _read(raw))))
        return found

    async def show(self, name: str) -> Opened:
        """One dead letter with its message. Raises `UnknownLetterError`."""
        raw = await self._find(name)
        letter = _read(raw)
        envelope, flaw = _open(letter)
        headers, body = ({}, letter.message) if envelope is None else (envelope.headers, envelope.payload())
        text = body.decode(errors="replace")
        return Opened(**_summary_fields(raw, letter), headers=headers, body=text, flaw=flaw)

    async def replay(self, name: str) -> str:
        """Submit the message's job again as if it arrived now, and clear its dead-lettered end; returns the job.

        Raises:
            UnknownLetterError: no such dead letter.
            InvalidRequestError: it is not a request, or its job did not end dead: a readable answer is kept.
            TaxiwayError: why the fleet refuses it now; the dead letter is kept.
        """
        raw = await self._find(name)
        letter = _read(raw)
        envelope, flaw = _open(letter)
        await self._router.fleet.read()
        arrival = Arrival("", letter.message, envelope, flaw)
        decision = await self._router.decide(arrival, self._store.now(), self._router.fleet.working)
        if decision.ending is not None:
            read_result(read_meta(decision.ending.meta))  # raises what is wrong
        if decision.admitted is None:
            raise InvalidRequestError(f"the message is not a request: {decision.letter or 'it cancels a job'}")
        job = decision.admitted.outgoing.job
        if not await self._store.revive(job):
            raise InvalidRequestError(f"job {quoted(job)} was not dead-lettered: it is not run again", job=job)
        await self._router.forward(decision.admitted)
        await self._store.drop_letter(raw)
        return job

    async def drop(self, name: str) -> None:
        """Delete a dead letter. Raises `UnknownLetterError`."""
        await self._store.drop_letter(await self._find(name))

    async def _find(self, name: str) -> bytes:
        async for raw in self._letters():
            if _name(raw) == name:
                return raw
        raise UnknownLetterError(f"no dead letter {quoted(name)}", letter=name)

    async def _letters(self) -> AsyncIterator[bytes]:
        """Dead letters as stored, latest first. One may be missed while others are dropped; none is returned twice."""
        seen: set[str] = set()
        start = 0
        while page := await self._store.letters(start, _PAGE):
            for raw in page:
                if (name := _name(raw)) not in seen:
                    seen.add(name)
                    yield raw
            start += _PAGE


def _name(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=_NAME // 2).hexdigest()


def _read(raw: bytes) -> DeadLetter:
    return msgspec.json.decode(raw, type=DeadLetter)


def _summary_fields(raw: bytes, letter: DeadLetter) -> dict[str, Any]:
    """The fields of `Summary`; dead letters of older releases do not name their job."""
    fields = {name: getattr(letter, name) for name in ("at", "reason", "by", "history")}
    envelope, _ = _open(letter) if not letter.job else (None, "")
    named = envelope.headers.get("id") if envelope is not None else letter.job
    return {**fields, "id": _name(raw), "job": str(named or ""), "bytes": len(letter.message)}


def _open(letter: DeadLetter) -> tuple[Envelope | None, str]:
    try:
        return decode_envelope(letter.message), ""
    except InvalidRequestError as error:
        return None, error.message
