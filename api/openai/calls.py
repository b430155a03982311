"""Runs calls as requests of this fleet, each as one wait or one stream. A client that disconnects cancels its job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from api.described import EVENTS
from api.gate import AnyRequest, Receive
from api.inference.infer import Accepted
from api.inference.streaming import STREAM_HEADERS, Streaming, kept_alive
from api.openai.answers import AnswerHead, MessagePart, StreamProgress, Writer
from api.openai_errors import JOB
from api.services import jobs_of, services_of
from tasks.models.model import Model
from taxiway.contract.job import Result
from taxiway.contract.request import Request
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, JobCancelledError, TaxiwayError
from taxiway.running import first_of

Value = TypeVar("Value")

EVENT_HEADERS: Mapping[str, str] = {"content-type": f"{EVENTS}; charset=utf-8", **STREAM_HEADERS}
"""Headers of every stream that a call is answered with."""

_SAFE = dict.fromkeys((*range(32), 127), "?")
_HEADER_LENGTH = 256  # characters of a header


class ClientGoneError(Exception):
    """The client closed its connection."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """An ASGI application that sends a stream whose first event is known."""

    path: str
    headers: Mapping[str, str]
    first: bytes
    events: AsyncGenerator[bytes, None]
    writer: Writer
    cancel: Callable[[], Awaitable[None]]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            event = self.first
            while event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                event = await self._next()
        finally:
            await self.events.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _next(self) -> bytes:
        """The next event, which may be an error; empty after the last one."""
        try:
            return await anext(self.events, b"")
        except ClientGoneError:
            await self.cancel()
            return b""
        except TaxiwayError as error:
            return self.writer.failed(error, self.path)


async def _ignore(result: Result) -> None:
    """The default `ended`: does nothing."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How a job is answered: `writer` writes the events, and `ended` is awaited before the last ones.

    A job that `stays` continues when its client disconnects.
    """

    writer: Writer
    ended: Callable[[Result], Awaitable[None]] = _ignore
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A call as a request; `size` is the size of its body in bytes."""

    request: Request
    model: Model
    size: int
    tier: str

    def head(self, job: str) -> AnswerHead:
        """The beginning of the answer of its job."""
        return AnswerHead(job, self.tier, int(time.time()))


class Calls:
    """Runs the calls that were `asked` for by an HTTP request."""

    def __init__(self, asked: AnyRequest) -> None:
        self._inference = services_of(asked).inference
        self._router = self._inference.router
        self._streaming = Streaming(jobs_of(asked), self._inference)
        self._receive, self._path = asked.receive, asked.scope["path"]

    async def run(self, read: Read) -> tuple[str, Result]:
        """Run a call; returns its job and its result.

        Raises:
            TaxiwayError: the request was refused, or the job's error.
        """
        accepted = await self._inference.accept(read.request, read.size, awaited=True)
        try:
            meta = await first_of(self._inference.ended(accepted), _gone(self._receive))
            if meta is None:
                await self._cancel(read.request, accepted.job)
                raise _stops()
            return accepted.job, await self._inference.result(meta)
        except ClientGoneError:
            await self._cancel(read.request, accepted.job)
            raise JobCancelledError("the client closed its connection") from None
        except TaxiwayError as error:
            error.details.setdefault(JOB, accepted.job)
            raise

    async def stream(self, read: Read, begin: Callable[[str], Awaitable[Begun]]) -> Streamed:
        """The answer to a call as it is generated, once its first event is there: a part, or a keep-alive.

        `begin` decides how an accepted job is answered, by its id.

        Raises:
            TaxiwayError: the request was refused, or the job ended with an error before it had an answer.
        """
        accepted, begun = await self.begin(read, begin)
        return await self._streamed(accepted.job, begun, headers_of_placement(accepted), read.request)

    async def follow(self, job: str, begun: Begun) -> Streamed:
        """The answer of a job accepted earlier, from its beginning; the job continues when the client disconnects.

        Raises:
            TaxiwayError: the job ended with an error before it had an answer.
        """
        return await self._streamed(job, begun, {}, None)

    async def _streamed(self, job: str, begun: Begun, headers: Mapping[str, str], request: Request | None) -> Streamed:
        async def cancel() -> None:
            if request is not None and not begun.stays:
                await self._cancel(request, job)

        async def ends() -> None:
            await first_of(self._router.results.hurried.wait(), _gone(self._receive))
            await cancel()
            raise _stops()

        written = _events_of(self._streaming.followed(job, StreamProgress()), begun.writer, begun.ended)
        events = kept_alive(written, ends())
        try:
            first = await anext(events)
        except ClientGoneError:
            await cancel()
            raise JobCancelledError("the client closed its connection") from None
        except TaxiwayError as error:
            error.details.setdefault(JOB, job)
            raise
        return Streamed(self._path, {**EVENT_HEADERS, **headers}, first, events, begun.writer, cancel)

    async def begin(self, read: Read, begin: Callable[[str], Awaitable[Value]]) -> tuple[Accepted, Value]:
        """Accept a call and call `begin` with its job; returns both outcomes. The job is cancelled if `begin` fails.

        Raises:
            TaxiwayError: the request was refused, or what `begin` raises.
        """
        accepted = await self._inference.accept(read.request, read.size)
        try:
            return accepted, await begin(accepted.job)
        except TaxiwayError:
            await self._cancel(read.request, accepted.job)
            raise

    async def _cancel(self, request: Request, job: str) -> None:
        """Cancel a job whose client has disconnected, unless an idempotency key lets it request the result again."""
        if request.idempotency_key is None:
            with contextlib.suppress(BrokerUnavailableError):  # then it runs, or expires
                await self._router.store.jobs.cancel([job])


def headers_of_result(job: str, result: Result) -> dict[str, str]:
    """The headers of a whole answer."""
    report = result.report
    headers = _headers(job, report.hardware_class, report.variant, report.reason)
    return {**headers, "x-taxiway-device": report.device, "x-taxiway-cost": f"{report.cost:.9f}"}


def headers_of_placement(accepted: Accepted) -> dict[str, str]:
    """The headers of a stream, which begins before its job has run: where the job was placed first, if known."""
    placement = accepted.placement
    if placement is None or placement.held:
        return {"x-request-id": accepted.job}
    candidate = placement.candidate
    return _headers(accepted.job, candidate.hardware_class, candidate.variant_name, placement.reason)


def _headers(job: str, hardware_class: str, variant: str, reason: str) -> dict[str, str]:
    named = {"class": hardware_class, "variant": variant, "reason": reason}
    printable = {name: text[:_HEADER_LENGTH].encode("ascii", "replace").decode() for name, text in named.items()}
    return {"x-request-id": job, **{f"x-taxiway-{name}": text.translate(_SAFE) for name, text in printable.items()}}


def _stops() -> FleetUnavailable:
    """The error for a call that this router cannot answer because it stops."""
    return BrokerUnavailableError("the router is stopping: send the request again", retry_after=1.0)


async def _gone(receive: Receive) -> NoReturn:
    """Wait until the client closes its connection.

    Raises:
        ClientGoneError: it did.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError


async def _events_of(
    following: AsyncGenerator[MessagePart | Result, None], writer: Writer, ended: Callable[[Result], Awaitable[None]]
) -> AsyncGenerator[bytes, None]:
    """The events of an answer; `ended` is awaited before those that end it. Raises the job's error."""
    if begin := writer.begin():
        yield begin
    async with contextlib.aclosing(following) as parts:
        async for part in parts:
            if isinstance(part, Result):
                await ended(part)
                yield writer.ending(part)
            elif event := writer.part(part):
                yield event
