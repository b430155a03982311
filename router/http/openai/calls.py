"""Runs calls as requests of this fleet: one wait, or one stream. A client that leaves cancels its job."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from router.http.gate import Receive, answer
from router.http.inference import Inference, Running
from router.http.openai.answers import Writer, events_of, headers_of_placement
from router.http.openai.errors import JOB
from router.http.progress import Answers
from router.http.streaming import MEDIA_TYPE, Streaming, kept_alive
from router.jobs import Jobs
from router.service.admission import Admitted
from router.service.arrivals import Router
from taxiway.contract.job import Result
from taxiway.contract.request import Request
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, JobCancelledError, TaxiwayError

Value = TypeVar("Value")

STREAM_HEADERS: Mapping[str, str] = {"content-type": f"{MEDIA_TYPE}; charset=utf-8", "cache-control": "no-store"}
"""Headers of every stream."""


class ClientGoneError(Exception):
    """The client closed its connection."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """An ASGI application that sends a stream which has begun."""

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


async def _as_is(result: Result) -> None:
    """An answer that is only sent."""


async def _nothing() -> None:
    """A job that nothing is done about."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How a job is answered: what writes the events, and what is awaited before the last ones.

    One that `stays` goes on when its client leaves.
    """

    writer: Writer
    ended: Callable[[Result], Awaitable[None]] = _as_is
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """An ASGI application that sends a whole answer."""

    headers: Mapping[str, str]
    body: bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        await answer(send, 200, {"content-type": "application/json", **self.headers}, self.body)


class Calls:
    """Runs the calls of one router for a caller who sees `jobs`."""

    def __init__(self, router: Router, jobs: Jobs, inference: Inference) -> None:
        self._router = router
        self._inference = inference
        self._streaming = Streaming(router, jobs, inference)

    async def run(self, request: Request, size: int, receive: Receive) -> tuple[str, Result]:
        """The job of a request whose body had `size` bytes, and its result.

        Raises:
            TaxiwayError: the request was refused, or the job's error.
        """
        with contextlib.closing(await self._inference.run(request, size)) as running:
            try:
                meta = await _unless(self._waited(request, running), _gone(receive))
                return running.job, await self._inference.result(meta)
            except ClientGoneError:
                await self._cancel(request, running.job)
                raise JobCancelledError("the client closed its connection") from None
            except TaxiwayError as error:
                error.details.setdefault(JOB, running.job)
                raise

    async def stream(
        self,
        request: Request,
        size: int,
        receive: Receive,
        *,
        path: str,
        begin: Callable[[Admitted], Awaitable[Begun]],
    ) -> Streamed:
        """The answer to a request as it is generated, once it has begun or has waited for a while.

        `begin` says how a job that was accepted is answered.

        Raises:
            TaxiwayError: the request was refused, or the job ended with an error before it had an answer.
        """
        admitted, begun = await self.begin(request, size, begin)
        job = admitted.ticket.job

        async def cancel() -> None:
            if not begun.stays:
                await self._cancel(request, job)

        return await self._streamed(job, begun, receive, path, headers_of_placement(admitted), cancel)

    async def follow(self, job: str, begun: Begun, receive: Receive, *, path: str) -> Streamed:
        """The answer of a job that was accepted before, from its beginning; it goes on when the client leaves.

        Raises:
            TaxiwayError: the job ended with an error before it had an answer.
        """
        return await self._streamed(job, begun, receive, path, {}, _nothing)

    async def _streamed(
        self,
        job: str,
        begun: Begun,
        receive: Receive,
        path: str,
        headers: Mapping[str, str],
        cancel: Callable[[], Awaitable[None]],
    ) -> Streamed:
        async def ends() -> None:
            await _unless(self._router.results.hurried.wait(), _gone(receive))
            await cancel()
            raise _stops()

        written = events_of(self._streaming.followed(job, Answers()), begun.writer, begun.ended)
        events = kept_alive(written, ends())
        try:
            first = await anext(events)
        except ClientGoneError:
            await cancel()
            raise JobCancelledError("the client closed its connection") from None
        except TaxiwayError as error:
            error.details.setdefault(JOB, job)
            raise
        return Streamed(path, {**STREAM_HEADERS, **headers}, first, events, begun.writer, cancel)

    async def begin(
        self, request: Request, size: int, begin: Callable[[Admitted], Awaitable[Value]]
    ) -> tuple[Admitted, Value]:
        """A request that was accepted, and what `begin` makes of it; where that fails, its job is cancelled.

        Raises:
            TaxiwayError: the request was refused, or what `begin` raises.
        """
        admitted = await self._inference.accept(request, size)
        try:
            return admitted, await begin(admitted)
        except TaxiwayError:
            await self._cancel(request, admitted.ticket.job)
            raise

    async def _waited(self, request: Request, running: Running) -> bytes:
        """The stored result, however long it takes: the job's deadline bounds the wait."""
        meta = await awaited(self._router, running)
        if meta is None:
            await self._cancel(request, running.job)
            raise _stops()
        return meta

    async def _cancel(self, request: Request, job: str) -> None:
        """Cancel a job whose client has left, unless an idempotency key lets it ask for the result again."""
        if request.idempotency_key is None:
            with contextlib.suppress(BrokerUnavailableError):  # then it runs, or expires
                await self._router.store.cancel([job])


def _stops() -> FleetUnavailable:
    """The error for a call that this router leaves without an answer, because it stops."""
    return BrokerUnavailableError("the router stops: ask again", retry_after=1.0)


async def awaited(router: Router, running: Running) -> bytes | None:
    """The stored result of a job, however long it takes; None if the router stops before."""
    while (meta := await running.wait(math.inf)) is None:
        if router.results.hurried.is_set():
            return None
    return meta


async def _gone(receive: Receive) -> None:
    """Wait until the client closes its connection.

    Raises:
        ClientGoneError: it did.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError


async def _unless(work: Awaitable[Value], other: Coroutine[Any, Any, None]) -> Value:
    """The value of `work`, unless `other` raises before it is there."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watching.result()
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
