"""The transport at redis://: writes requests to the arrivals queue and reads results from Celery's result keys.

Commands are pipelined on one connection, and retried during outages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from taxiway.backoff import Backoff
from taxiway.client import Receipt
from taxiway.client.valkey_results import Replies, Reply, read_pieces
from taxiway.connection import AsyncConnection, settle
from taxiway.contract.job import (
    FINAL,
    JobRecord,
    JobState,
    JobStatus,
    Result,
    ended_as,
    failure_of,
    read_accepted,
    read_meta,
    record_from,
    result_in,
    status_of,
    unknown,
)
from taxiway.contract.keys import ARRIVALS, MODELS, blob_key, job_key, reply_channel, result_key, submission_id
from taxiway.contract.limits import Buffer
from taxiway.contract.request import Request, new_id
from taxiway.contract.sealed import read_opened
from taxiway.contract.stream import EventStream, Progress, follow
from taxiway.contract.tensors import Show
from taxiway.contract.values import BLOB_KEPT, Blobs, may_refer, references, resolved
from taxiway.contract.wire import (
    Carried,
    cancel_message,
    check_confirmed,
    confirming,
    infer_message,
    read_key,
    refusal,
    submitting,
)
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, ResultTimeoutError, invalid
from taxiway.listing import JobFilter, JobPage, list_jobs
from taxiway.running import check_loop
from taxiway.valkey import Command, ServerError, stored

_Arrival = tuple[bytes, Mapping[str, Buffer]]
"""A message for the arrivals queue, and the blobs that it references."""

_CONFIRMED_WITHIN = 10.0
"""Seconds for which a submit under an idempotency key waits for a router."""

_RETRY_PAUSE = 0.1
"""Seconds between attempts to read a large value during an outage."""

_MOST_MESSAGES = 512
"""Arrivals per LPUSH: small enough not to delay the server's other clients (about 0.3 ms)."""

_BACKOFF = Backoff(0.02, 0.5)  # before reconnecting

_REPLICAS_WITHIN = 0.8
"""Fraction of a call's `connect_timeout` within which a replica must confirm."""

_NO_BLOBS: Mapping[str, Buffer] = {}

Settle = Callable[[Any], None]
"""Called with a command's answer or its error."""

_Waiting = tuple[Any, Settle]


class ValkeyLink:
    """Commands to one server. Commands issued while a pipeline is in flight are sent together in the next one."""

    def __init__(self, url: str, connect_timeout: float, confirmed_by: int = 0) -> None:
        try:
            self._connection = AsyncConnection(url, answer=None, connect_timeout=connect_timeout)
        except ValueError:  # its text may quote part of a password
            wanted = "redis://NAME:PASSWORD@HOST:PORT/DATABASE, with / and # in a password as %2F and %23"
            raise invalid("url", wanted) from None
        self._url = url
        self.connect_timeout = connect_timeout
        self._confirmed_by = confirmed_by  # replicas
        self._confirming = confirming(confirmed_by, connect_timeout * _REPLICAS_WITHIN)
        self._arrivals: list[_Waiting] = []
        self._commands: list[_Waiting] = []
        self._flushing: asyncio.Task[None] | None = None

    async def call(self, *command: str | bytes | int) -> Any:
        """The server's answer to one command.

        Raises:
            BrokerUnavailableError: the server does not answer, or refuses.
        """
        return await self._queued(self._commands, command)

    async def calls(self, *commands: Command) -> list[Any]:
        """The answers to commands that are sent together. Raises as `call` does."""
        return await asyncio.gather(*(self.call(*command) for command in commands))

    async def push(self, message: bytes, blobs: Mapping[str, Buffer] = _NO_BLOBS) -> None:
        """Push a message to the arrivals queue, after the blobs that it references.

        They are as durable as the server's append-only log when this returns. A push without an answer is repeated: a
        router drops the second copy of a job. Raises as `call` does.
        """
        await self._queued(self._arrivals, (message, blobs))

    def post(self, message: bytes, blobs: Mapping[str, Buffer], settle: Settle) -> None:
        """Push without waiting; `settle` is called with the outcome."""
        self._start()
        self._arrivals.append(((message, blobs), settle))

    def connection(self) -> AsyncConnection:
        """A new connection for the caller's own use."""
        return AsyncConnection(self._url, answer=None, connect_timeout=self.connect_timeout)

    async def close(self) -> None:
        """Disconnect after all pending commands have been answered or refused."""
        if self._flushing is not None:
            await self._flushing
        self._connection.close()

    async def _queued(self, queue: list[_Waiting], item: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._start()
        queue.append((item, partial(settle, answer)))
        return await answer

    def _start(self) -> None:
        check_loop(self._flushing)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        while self._arrivals or self._commands:
            messages, commands = self._take(self._arrivals), self._take(self._commands)
            pipeline = [command for command, _ in commands]
            if messages:
                blobs = chain.from_iterable(blobs.items() for (_, blobs), _ in messages)
                pipeline += chain.from_iterable(stored(blob_key(ref), content, BLOB_KEPT) for ref, content in blobs)
                pipeline.append(("LPUSH", ARRIVALS, *(message for (message, _), _ in messages)))
                pipeline += self._confirming
            try:
                answers = await self._with_retries(pipeline)
            except (ServerError, OSError) as error:
                later = [*self._take(self._arrivals), *self._take(self._commands)]
                for _, settle in (*commands, *messages, *later):
                    settle(refusal("state store", error))
            else:
                for (_, settle), answer in zip(commands, answers, strict=False):
                    settle(refusal("state store", answer) if isinstance(answer, Exception) else answer)
                pushed = self._pushed(answers[len(commands) :]) if messages else None
                for _, settle in messages:
                    settle(pushed)

    def _pushed(self, answers: Sequence[Any]) -> FleetUnavailable | None:
        """Why messages were not accepted; None if they were."""
        written = answers[: len(answers) - len(self._confirming)]
        refused = next((answer for answer in written if isinstance(answer, Exception)), None)
        if refused is not None:
            return refusal("state store", refused)
        try:
            check_confirmed(answers[len(written) :], self._confirmed_by)
        except FleetUnavailable as error:
            return error
        return None

    @staticmethod
    def _take(queue: list[_Waiting]) -> list[_Waiting]:
        taken = queue[:_MOST_MESSAGES]
        del queue[:_MOST_MESSAGES]
        return taken

    async def _with_retries(self, pipeline: Sequence[Sequence[Any]]) -> list[Any]:
        clock = asyncio.get_running_loop().time
        until, failures = clock() + self.connect_timeout, 0
        while True:
            try:
                async with asyncio.timeout_at(until):
                    return await self._connection.ask(pipeline)
            except OSError as error:
                failures += 1
                pause = _BACKOFF.pause(failures)
                if clock() + pause >= until:
                    raise ConnectionError(str(error) or f"no answer within {self.connect_timeout:g} s") from error
            await asyncio.sleep(pause)


class ValkeyClientTransport:
    """Writes arrivals with pipelined LPUSH, and receives all results on one subscription. `key` signs the arrivals.

    Raises:
        InvalidRequestError: the key is not hexadecimal, or too short.
    """

    def __init__(self, url: str, connect_timeout: float, show: Show, key: str | None, confirmed_by: int) -> None:
        try:
            self._key = None if key is None else read_key(key)
        except ValueError as error:
            message = f"key: at a broker, the producers' signing key: {error}"
            raise InvalidRequestError(message, field="key") from None
        self._link = link = ValkeyLink(url, connect_timeout, confirmed_by)
        self._show = show
        self._name = uuid.uuid4().hex
        self._origin = f"taxiway{os.getpid()}@{socket.gethostname()}"
        self._replies = Replies(link.connection(), link.calls, reply_channel(self._name), again=self._submit_again)
        self._unconfirmed: WeakKeyDictionary[Reply, _Arrival] = WeakKeyDictionary()

    async def submit(self, request: Request) -> Receipt:
        """Accept the request durably. With an idempotency key, the job may have been submitted by another client."""
        if request.idempotency_key is not None:
            return Receipt(await self._submit_keyed(request, _CONFIRMED_WITHIN), submitted=True)
        job = new_id()
        reply = self._replies.expect(job)
        with submitting(request.model, job) as trace:
            await self._link.push(*self._message(job, request, trace))
        return Receipt(job, reply, submitted=True)

    async def _submit_keyed(self, request: Request, within: float) -> str:
        """The job under the request's idempotency key: only routers can compute its id, so one has to answer.

        Raises:
            RequestError: the router refused the request; for instance, the key was first used for another one.
            FleetUnavailable: no router answered; submitting it again under the key makes no second job.
        """
        submission = new_id()
        confirmed = self._replies.expect(submission_id(submission))
        with submitting(request.model) as trace:
            arrival = self._unconfirmed[confirmed] = self._message(new_id(), request, trace, submission)
            await self._link.push(*arrival)
        try:
            return read_accepted(await self._replies.wait(confirmed, within))
        except ResultTimeoutError as error:
            why = f"no router accepted the request within {within:g} s: submit it again under its key"
            raise FleetUnavailable(why, retry_after=1.0) from error

    def _submit_again(self) -> None:
        """Repeat keyed submissions that no router has acknowledged: a failover may have lost them.

        The idempotency key makes one job of both copies. The job may exist from an earlier submission that survived the
        failover: then only a second push makes a router acknowledge this one.
        """
        for reply, arrival in list(self._unconfirmed.items()):
            if reply.answer is None:
                self._link.post(*arrival, lambda _: None)  # a failed one is repeated after the next reconnection

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer, both at once."""
        until = _until(timeout)
        if request.idempotency_key is not None:
            job = await self._submit_keyed(request, _CONFIRMED_WITHIN if timeout is None else timeout)
            left = None if timeout is None else max(0.0, until - asyncio.get_running_loop().time())
            return await self.result(Receipt(job, submitted=True), left)
        job = new_id()
        reply = self._replies.expect(job)
        with submitting(request.model, job) as trace:
            message, blobs = self._message(job, request, trace)
            self._link.post(message, blobs, partial(_fail_unpushed, reply))
        return await self._read(await self._replies.wait(reply, timeout), until)

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer, decoded at each call."""
        until = _until(timeout)
        if receipt.reply is not None:
            raw = await self._replies.wait(receipt.reply, timeout)
        else:
            raw = await self._replies.watch(receipt.job, timeout, submitted=receipt.submitted)
        return await self._read(raw, until)

    def _message(
        self, job: str, request: Request, trace: Carried, submission: str = ""
    ) -> tuple[bytes, Mapping[str, Buffer]]:
        """The arrival message, and the blobs that it references."""
        blobs = Blobs()
        message = infer_message(
            job,
            request,
            reply=self._name,
            origin=self._origin,
            blobs=blobs,
            trace=trace,
            key=self._key,
            submission=submission,
        )
        return message, blobs.contents

    async def _read(self, raw: bytes, until: float) -> Result:
        result = read_opened(raw)
        outputs = await self._with_blobs(result.outputs, until) if may_refer(raw) else result.outputs
        return msgspec.structs.replace(result, outputs={name: self._show(value) for name, value in outputs.items()})

    async def stream(self, receipt: Receipt, timeout: float | None) -> EventStream:
        """The events of the answer as it is generated, then the result."""
        with contextlib.closing(self._link.connection()) as connection:
            read = partial(read_pieces, connection, receipt.job)
            async with contextlib.aclosing(follow(read, self.result(receipt, timeout), Progress())) as events:
                async for event in events:
                    yield event

    async def status(self, receipt: Receipt) -> JobStatus:
        """The job's record and error. A job submitted here that no router has recorded yet is reported as accepted."""
        record = await self._record(receipt)
        if record.state not in FINAL or record.state == JobState.SUCCEEDED:
            return status_of(record)
        raw = await self._link.call("GET", result_key(receipt.job))
        return status_of(record, error=None if raw is None else failure_of(read_meta(raw)))

    async def placement(self, receipt: Receipt) -> dict[str, Any]:
        """The placement in the job's record; the HTTP API adds the table of candidates."""
        record = await self._record(receipt)
        names = ("state", "hardware_class", "variant", "device", "level", "reason")
        return {"id": record.id, **{name: getattr(record, name) for name in names}}

    async def what_if(self, request: Request) -> dict[str, Any]:
        """Not supported at a broker. Raises `InvalidRequestError`."""
        raise _needs_http("what_if")

    async def cancel(self, receipt: Receipt) -> None:
        """Send a cancellation to the routers."""
        if not receipt.submitted:
            await self._record(receipt)
        await self._link.push(cancel_message(receipt.job, origin=self._origin, key=self._key))

    async def jobs(self, wanted: JobFilter, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that match `wanted`, most recent first. A producer's broker account may not list jobs."""
        return await list_jobs(self._link.calls, wanted, limit=limit, cursor=cursor)

    async def models(self) -> list[dict[str, Any]]:
        """The models that the routers last published.

        Raises:
            FleetUnavailable: no router published them in the last ten minutes.
        """
        raw = await self._link.call("GET", MODELS)
        if raw is None:
            raise FleetUnavailable("no router has published its models recently", retry_after=1.0)
        events: list[dict[str, Any]] = msgspec.json.decode(raw)
        return events

    async def administer(self, verb: str, path: str) -> dict[str, Any]:
        """Not supported at a broker. Raises `InvalidRequestError`."""
        raise _needs_http(f"{verb} {path}")

    async def close(self) -> None:
        """Disconnect; waits for jobs end with an error."""
        await self._replies.close()
        await self._link.close()

    async def _with_blobs(self, outputs: dict[str, Any], until: float) -> dict[str, Any]:
        """The outputs with referenced blobs loaded; an outage is waited out until the time `until`."""
        refs = [reference.ref for reference in references(outputs)]
        clock = asyncio.get_running_loop().time
        while True:
            try:
                contents = await asyncio.gather(*(self._link.call("GET", blob_key(ref)) for ref in refs))
            except BrokerUnavailableError:
                if clock() >= until:
                    raise
                await asyncio.sleep(_RETRY_PAUSE)
            else:
                break
        whole: dict[str, Any] = resolved(outputs, dict(zip(refs, contents, strict=True)))
        return whole

    async def _record(self, receipt: Receipt) -> JobRecord:
        """The job's record; once it has expired, a record rebuilt from the result.

        Raises:
            UnknownJobError: neither exists, and this client did not submit the job.
        """
        job = receipt.job
        flat = [text.decode() for text in await self._link.call("HGETALL", job_key(job))]
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if fields:
            return record_from(job, fields)
        raw = result_in(await self._link.call("GET", result_key(job)))
        if raw is not None:
            return JobRecord(id=job, state=ended_as(read_meta(raw)))
        if not receipt.submitted and not self._replies.expects(job):
            raise unknown(job)
        return record_from(job, {})


def _until(timeout: float | None) -> float:
    """The time on the loop's clock until which outages are waited out; without a timeout, now."""
    return asyncio.get_running_loop().time() + (timeout or 0.0)


def _fail_unpushed(reply: Reply, pushed: Any) -> None:
    """Fail the wait for the reply to a message that could not be pushed."""
    if isinstance(pushed, Exception):
        reply.settle(pushed)


def _needs_http(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{what}: not available at a broker (redis://…): connect to a router (http://…)", field="url"
    )
