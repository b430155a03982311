"""Sends answers as they are generated, as server-sent events.

Source: HTML's "Server-sent events" for the form; the Open Inference Protocol's `generate_stream` for text_output. An
event's id is the reader's position: a client that reconnects with it as `Last-Event-ID` gets the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from functools import partial
from typing import Any

import msgspec

from api.inference.infer import Inference
from api.inference.protocol import answer_of
from api.jobs import Jobs
from taxiway.contract.job import JobStatus, Result
from taxiway.contract.limits import LARGE
from taxiway.contract.stream import EVENT_KINDS, Event, Following, Part, Progress, StreamEntry, follow, read_progress_at
from taxiway.errors import BrokerUnavailableError, TaxiwayError, wrong_field
from taxiway.running import beside, end

STREAM_HEADERS: Mapping[str, str] = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Headers of every stream; the second one makes nginx pass on each event at once."""

_QUIET = 10.0  # seconds without an event after which a comment keeps the connection alive
_RETRY_PAUSE = 0.25  # seconds between retries while the store is unavailable

_KINDS = {kind: name for name, kind in EVENT_KINDS.items()}
_encode = msgspec.json.Encoder().encode


class Streaming:
    """Implements the streaming endpoints."""

    def __init__(self, jobs: Jobs, inference: Inference) -> None:
        self._router = inference.router
        self._jobs = jobs
        self._inference = inference

    async def events(self, job: str, last: str | None) -> AsyncIterator[bytes]:
        """The events of a job's answer after the event `last`; the last one is the answer or the job's error.

        Raises:
            UnknownJobError, ResultExpiredError: as `Jobs.result` raises them.
            InvalidRequestError: `last` is not an event id.
        """
        found = await self._jobs.result(job, wait=0.0)
        model = found.model if isinstance(found, JobStatus) else ""
        return kept_alive(self._events_of(job, model, _progress(last)), self._router.results.hurried.wait())

    def followed(self, job: str, progress: Following[Part]) -> AsyncGenerator[Part | Result, None]:
        """What a job's stream tells after `progress`, and then its result. Raises the job's error."""
        return follow(partial(self._pieces, job), self._result(job), progress)

    async def _events_of(self, job: str, model: str, progress: Progress) -> AsyncGenerator[bytes, None]:
        name, _, version = model.partition(":")
        named = {"id": job, "model_name": name, "model_version": version}
        try:
            async with contextlib.aclosing(self.followed(job, progress)) as events:
                async for event in events:
                    yield (
                        _event("result", await self._answered(job, event))
                        if isinstance(event, Result)
                        else _encoded(event, named, progress)
                    )
        except TaxiwayError as error:
            content = {"error": error.message, "code": error.code, "details": error.details}
            yield _event("error", _encode(content))

    async def _answered(self, job: str, result: Result) -> bytes:
        """The infer answer in JSON."""
        served = self._router.rules.model_of(result.model)
        return (await beside(LARGE + 1, answer_of, served, job, result, lambda _: False)).body

    async def _pieces(self, job: str, after: str) -> list[tuple[str, StreamEntry]]:
        try:
            return await self._router.values.pieces(job, after)
        except BrokerUnavailableError:
            await asyncio.sleep(_RETRY_PAUSE)
            return []

    async def _result(self, job: str) -> Result:
        """A job's result; waits for it, even while the store is unavailable."""
        while True:
            try:
                found = await self._jobs.result(job, wait=_QUIET)
            except BrokerUnavailableError:
                await asyncio.sleep(_RETRY_PAUSE)
            else:
                if not isinstance(found, JobStatus):
                    return await self._inference.result(found)


def _progress(last: str | None) -> Progress:
    if not last:
        return Progress()
    try:
        return read_progress_at(last)
    except ValueError as error:
        raise wrong_field("last-event-id", "the id of an event of this stream", last) from error


def _encoded(event: Event, named: Mapping[str, str], position: Progress) -> bytes:
    if isinstance(event, str):
        return _event("", _encode({**named, "text_output": event}), position)
    return _event(_KINDS[type(event)], _encode(event), position)


def _event(kind: str, content: bytes, position: Progress | None = None) -> bytes:
    head = (f"event: {kind}\n" if kind else "") + (f"id: {position}\n" if position is not None else "")
    return head.encode() + b"data: " + content + b"\n\n"


async def kept_alive(
    events: AsyncGenerator[bytes, None], ends: Coroutine[Any, Any, Any]
) -> AsyncGenerator[bytes, None]:
    """The events, plus a comment whenever none came for a while, until `ends` returns. Raises what `ends` raises."""
    ending = asyncio.ensure_future(ends)
    coming = asyncio.ensure_future(anext(events, b""))
    try:
        while not ending.done():
            await asyncio.wait((coming, ending), timeout=_QUIET, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                yield b": still here\n\n"
            elif event := coming.result():
                coming = asyncio.ensure_future(anext(events, b""))
                yield event
            else:
                return
        ending.result()
    finally:
        await end((coming, ending))
        await events.aclose()
