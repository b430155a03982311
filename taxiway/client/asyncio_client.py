"""The client for asyncio: the one implementation, over any transport."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack

import msgspec

from taxiway.client import ClientTransport, DeadLetters, Receipt, open_transport
from taxiway.client.arrays import WITHIN, AsyncJobArray, submit_array, unwatched
from taxiway.contract.job import FINAL, JobState, JobStatus, Result, RunProgress
from taxiway.contract.request import MAX_NAME, Request, check_content, is_name, parse_request
from taxiway.contract.stream import EventStream
from taxiway.contract.tensors import array, plain
from taxiway.contract.values import bare
from taxiway.contract.wire import Durability, confirmations
from taxiway.errors import invalid, wrong_field
from taxiway.listing import USUAL, JobFilter, JobPage, states_of
from taxiway.running import end

T = TypeVar("T")

Infer = Callable[[Any], Coroutine[Any, Any, Result]]
"""Infers one input."""

Progress = Callable[[int], None]
"""Called with the number of results so far."""

CONNECT_TIMEOUT = 1.5
"""Seconds for which a call retries while the fleet does not answer. A call then fails within 2 s."""

CANCEL_WITHIN = 3.0
"""Seconds for which `cancel` waits for the job's end: a router reads the broker's messages in order."""

_CANCEL_POLL = 0.1
"""Seconds between two looks at a job that is being cancelled."""

REQUESTS_AT_ONCE = 256
"""Requests that a `map` keeps in progress."""


async def in_input_order(
    infer_one: Infer, inputs: Iterable[Any] | AsyncIterable[Any], window: int, progress: Progress
) -> AsyncGenerator[Result, None]:
    """Yield the result of each input, in order; the first failed request raises in its turn."""
    running: deque[asyncio.Task[Result]] = deque()
    count = 0
    try:
        async for one in _as_async(inputs):
            running.append(asyncio.create_task(infer_one(one)))
            if len(running) >= window:
                yield await running.popleft()
                progress(count := count + 1)
        while running:
            yield await running.popleft()
            progress(count := count + 1)
    finally:
        await end(running)


async def _as_async(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one


class Options(TypedDict, total=False):
    """Optional fields of a request, beyond model and inputs. None means not set."""

    parameters: Mapping[str, Any] | None
    """Passed to the model."""
    outputs: Sequence[str] | None
    """Names of the outputs to return."""
    # Service terms: see `Terms`
    deadline: float | None
    service: str | None
    priority: str | None
    budget: float | None
    tenant: str | None
    locality: str | None
    min_accuracy: float | None
    idempotency_key: str | None
    stream: bool | None
    webhook: str | None


_making = threading.Lock()
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


class PerProcess(Generic[T]):
    """A value that is made on first use, and again on first use in a forked child.

    The parent's value is never destroyed in the child, not even when that exits: this would shut down TLS connections
    of the parent's, and remove its sockets from the epoll instance that both share.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def get(self) -> T:
        """The value of this process."""
        process = os.getpid()
        if process not in self._made:
            with _making:
                self._renew(process)
        return self._made[process]

    def _renew(self, process: int) -> None:
        if process not in self._made:
            for inherited in self._made.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
            self._made[process] = self._make()


class AsyncJob:
    """A job in the fleet. `await job` is `await job.result()`."""

    def __init__(self, transports: PerProcess[ClientTransport], receipt: Receipt) -> None:
        self._transports = transports
        self._submitter = transports.get()
        self._receipt = receipt

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __await__(self) -> Generator[Any, None, Result]:
        return self.result().__await__()

    @property
    def _transport(self) -> ClientTransport:
        """The transport of this process; a fork leaves the receipt's future to the parent."""
        transport = self._transports.get()
        if transport is not self._submitter:
            self._submitter = transport
            self._receipt = dataclasses.replace(self._receipt, reply=None)
        return transport

    @property
    def id(self) -> str:
        """The job's id, the same at every interface."""
        return self._receipt.job

    async def result(self, timeout: float | None = None) -> Result:
        """Wait for the job's result. It may be called repeatedly.

        With `timeout` it waits up to that many seconds, outages included. Without, it waits as long as the fleet
        answers.

        Raises:
            JobError, RequestError: the error that the job ended with, in its own class.
            ResultTimeoutError: `timeout` passed; the job continues.
            BrokerUnavailableError: the fleet does not answer; the job continues, and its result can be requested again.
        """
        return await self._transport.result(self._receipt, timeout)

    def stream(self, timeout: float | None = None) -> EventStream:
        """Stream a generated answer, for a request with the option `stream`; other requests yield only the result.

        Yields pieces of text, then the complete result. `Restarted` between them means that generation restarted from
        the beginning; `Lost` counts characters that the reader missed because it was too slow or connected too late.
        A callable's job yields what it reports, as `progress` does.
        Raises as `result` does.
        """
        return self._transport.stream(self._receipt, timeout)

    async def progress(self, timeout: float | None = None) -> AsyncGenerator[RunProgress, None]:
        """What the job's callable reports, as it comes, until the job ends; nothing for other jobs.

        A reader that is slower than the reports misses some. Raises as `result` does.
        """
        async with contextlib.aclosing(self.stream(timeout)) as events:
            async for event in events:
                if isinstance(event, RunProgress):
                    yield event

    async def status(self) -> JobStatus:
        """The job's current state. Queue position and estimated end are known only at the HTTP API."""
        return await self._transport.status(self._receipt)

    async def placement(self) -> dict[str, Any]:
        """Why the job was placed where it is: `reason` and the figures behind the decision."""
        return await self._transport.placement(self._receipt)

    async def done(self) -> bool:
        """Whether the job has ended: succeeded, failed, cancelled or expired."""
        transport, receipt = self._transport, self._receipt
        if receipt.reply is not None and receipt.reply.answer is not None:
            return True
        return (await transport.status(receipt)).state in FINAL

    async def cancel(self) -> bool:
        """Request cancellation; returns whether the job was cancelled.

        It was not if it had already ended, or is still running after `CANCEL_WITHIN` seconds: then it may still end
        either way.
        """
        await self._transport.cancel(self._receipt)
        until = time.monotonic() + CANCEL_WITHIN
        while (state := (await self.status()).state) not in FINAL and time.monotonic() < until:
            await asyncio.sleep(_CANCEL_POLL)
        return state == JobState.CANCELLED


class AsyncClient:
    """A client for one event loop.

    It connects on first use, and again in a forked child.

    Args:
        url: `redis://`, `rediss://` or `unix://` (the broker, fastest), or `http(s)://` (a router).
        key: at a router, the caller's API key, which determines the tenant; it is sent as a header and never appears in
            an address or a log. At a broker, the producers' signing key in hexadecimal digits; it is never sent.
        connect_timeout: seconds for which a call retries while the fleet does not answer, before it raises
            `BrokerUnavailableError`.
        arrays: return tensors in results as numpy arrays (read-only, not copied) instead of nested lists.
        durability: when a submit to a broker returns: `written` by the broker, or also `replicated`, so that a majority
            of the primary and its `replicas` has it. At a router, `limits.durability` in its queues.yaml decides.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        arrays: bool = False,
        durability: Durability = "written",
        replicas: int = 1,
    ) -> None:
        show = array if arrays else plain
        confirmed_by = confirmations(durability, replicas)
        opening = partial(
            open_transport, url, connect_timeout=connect_timeout, show=show, key=key, confirmed_by=confirmed_by
        )
        self._transports = PerProcess(opening)
        self._transports.get()  # an invalid address raises here
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _transport(self) -> ClientTransport:
        if self._closed:
            raise RuntimeError("this client is closed")
        return self._transports.get()

    async def submit(self, model: str, inputs: Any, **options: Unpack[Options]) -> AsyncJob:
        """Submit a request. It is durable when this returns.

        Args:
            model: `sentiment`, `sentiment:2` or `sentiment@stable`.
            inputs: a plain value where the model has one input, a mapping by name, or a list of OIP tensors. Values are
                str, bytes, numbers, numpy arrays, and lists of these, whose first axis is the batch.
            options: see `Options`.

        Raises:
            RequestError: a term is invalid. At a broker, errors that only a router detects are raised by `result`.
            FleetUnavailable: the fleet did not accept it.
        """
        receipt = await self._transport.submit(_request(model, inputs, options))
        return AsyncJob(self._transports, receipt)

    async def infer(
        self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Result:
        """Submit and wait for the answer, at most `timeout` seconds. Raises as `submit` and `AsyncJob.result` do."""
        return await self._transport.infer(_request(model, inputs, options), timeout)

    async def stream(
        self, model: str, inputs: Any, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> EventStream:
        """Submit and stream the answer as it is generated: see `AsyncJob.stream`. The job needs no reader."""
        options["stream"] = True
        job = await self.submit(model, inputs, **options)
        async with contextlib.aclosing(job.stream(timeout)) as events:
            async for event in events:
                yield event

    def map(
        self,
        model: str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        window: int = REQUESTS_AT_ONCE,
        timeout: float | None = None,
        progress: Progress = unwatched,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Result, None]:
        """Yield the result of each of `inputs`, in order, with at most `window` requests in progress.

        The first failed request raises when its turn comes; requests in progress then are not awaited, and still run.
        `timeout` applies to each request. `progress` is called after each result with the number of results so far.
        """
        return in_input_order(self.inference_of(model, timeout, options), inputs, window, progress)

    async def array(
        self, model: str, inputs: Iterable[Any], *, within: str = WITHIN, **options: Unpack[Options]
    ) -> AsyncJobArray:
        """Submit a request for each of `inputs` as one array, which the fleet keeps. Needs the address of a router.

        Members are answered `within` a time such as `30m`, `24h` or `7d`, in turn with other work; `options` apply to
        all of them, but `deadline`, `idempotency_key` and `stream`. Raises as `submit`.
        """
        return await submit_array(self._transport, lambda one: _request(model, one, options), inputs, within)

    def inference_of(self, model: str, timeout: float | None, options: Options) -> Infer:
        """A function that infers one input; all inputs share the model, timeout and options.

        Raises:
            InvalidRequestError: a term is invalid, or an idempotency key is set: it would make all requests one job.
        """
        if options.get("idempotency_key") is not None:
            raise invalid("idempotency_key", "none for a map of many requests")
        transport, template = self._transport, _request(model, "", options)

        async def infer_one(inputs: Any) -> Result:
            if inputs is None:
                raise invalid("inputs", "a value", "nothing")
            request = msgspec.structs.replace(template, inputs=inputs)
            check_content(request)
            return await transport.infer(request, timeout)

        return infer_one

    @property
    def dead(self) -> DeadLetters:
        """The fleet's dead letters, for operators."""
        return DeadLetters(self._transport)

    def job(self, id: str) -> AsyncJob:
        """A handle for the job with this id, submitted by any client. Sends nothing.

        Raises:
            InvalidRequestError: no job can have this id.
        """
        if not is_name(id):
            raise wrong_field("id", f"text of 1 to {MAX_NAME} printable characters", id)
        return AsyncJob(self._transports, Receipt(id))

    async def what_if(self, model: str, inputs: Any, **options: Unpack[Options]) -> dict[str, Any]:
        """Where a request would run now, why, and which other candidates were considered. Submits nothing. HTTP only.

        A request that could not be placed does not raise: `error` holds its code and `reason` says why.

        Raises:
            InvalidRequestError: a term or an input is invalid, or the transport is not HTTP.
        """
        return await self._transport.what_if(_request(model, inputs, options))

    async def jobs(
        self, *, states: Collection[str] = (), model: str = "", tenant: str = "", limit: int = USUAL, cursor: str = ""
    ) -> JobPage:
        """A page of the fleet's jobs, most recently accepted first; its `next` is the `cursor` of the next page.

        `states` are names of job states, `model` is `name` or `name:version`; an omitted filter matches all jobs. Jobs
        that wait in arrivals are not listed. A page may hold fewer jobs than `limit`, even none, and still have a
        `next`.

        Raises:
            InvalidRequestError: a state, the limit or the cursor is invalid.
        """
        wanted = JobFilter(states=states_of(states), model=model, tenant=tenant)
        return await self._transport.jobs(wanted, limit, cursor)

    async def models(self) -> list[dict[str, Any]]:
        """What the fleet can run: names, versions, aliases, variants."""
        return await self._transport.models()

    async def fleet(self) -> dict[str, Any]:
        """The fleet's hardware classes and devices now. HTTP only, else `InvalidRequestError`."""
        return await self._transport.administer("GET", "/v2/fleet")

    async def drain(self) -> dict[str, Any]:
        """Hand the fleet's work to other fleets, as far as it may leave and they offer to run it in time.

        Returns the classes of those (`peers`). HTTP only, else `InvalidRequestError`.

        Raises:
            UnplaceableError: none of its classes is another fleet.
        """
        return await self._transport.administer("POST", "/v2/drain")

    async def resume(self) -> dict[str, Any]:
        """Serve again after `drain`. HTTP only, else `InvalidRequestError`."""
        return await self._transport.administer("DELETE", "/v2/drain")

    async def close(self) -> None:
        """Close all connections; jobs continue. Closing twice has no effect."""
        if not self._closed:
            self._closed = True
            await self._transports.get().close()


def _request(model: str, inputs: Any, options: Options) -> Request:
    given = {name: bare(value) for name, value in options.items() if value is not None}
    if isinstance(names := given.get("outputs"), (list, tuple)):
        given["outputs"] = [*map(bare, names)]
    return parse_request({"model": bare(model), "inputs": inputs, **given})
