"""The door at redis://: requests go straight into the arrivals, results come from Celery's result keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from taxiway.client.door import Receipt
from taxiway.client.piece_reader import PieceReader
from taxiway.client.replies import Replies
from taxiway.client.tensors import Show
from taxiway.client.valkey_link import ValkeyLink
from taxiway.contract.blobs import Blobs, Buffer, may_refer, references, resolved
from taxiway.contract.durability import Durability
from taxiway.contract.job import (
    FINAL,
    JobRecord,
    JobState,
    JobStatus,
    Result,
    ResultMeta,
    check_accepted,
    failure_of,
    read_answer,
    read_meta,
    read_result,
    record_from,
    state_of,
    unknown,
)
from taxiway.contract.keys import MODELS, blob_key, job_key, reply_channel, result_key, submission_id
from taxiway.contract.listing import JobFilter, JobPage, list_jobs
from taxiway.contract.request import Request, job_id, new_id
from taxiway.contract.signing import read_key
from taxiway.contract.streaming import Progress, Told, follow
from taxiway.contract.tracing import Carried, submitting
from taxiway.contract.wire import cancel_message, infer_message
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, TaxiwayError
from taxiway.valkey.aio import settle

_Arrival = tuple[bytes, Mapping[str, Buffer]]
"""A message for the arrivals, and the blobs that it refers to."""

_PAUSE = 0.1
"""Seconds between two attempts to read a large value while the server is away."""


def open_url(url: str, patience: float, show: Show, key: str | None, durability: Durability) -> ValkeyDoor:
    """The door at `url`; `key` signs what is written there.

    Raises:
        InvalidRequestError: the key is not written as hexadecimal digits, or too short.
    """
    try:
        signing = None if key is None else read_key(key)
    except ValueError as error:
        raise InvalidRequestError(f"key: at a broker, the producers' signing key: {error}", field="key") from None
    return ValkeyDoor(ValkeyLink(url, patience, durability), show, signing)


class ValkeyDoor:
    """Writes arrivals with one pipelined LPUSH, and hears all results on one subscription."""

    def __init__(self, link: ValkeyLink, show: Show, key: bytes | None) -> None:
        self._link = link
        self._show = show
        self._key = key
        self._name = uuid.uuid4().hex
        self._origin = f"taxiway{os.getpid()}@{socket.gethostname()}"
        self._replies = Replies(link, reply_channel(self._name), reconnected=self._submit_again)
        self._unagreed: WeakKeyDictionary[asyncio.Future[bytes], _Arrival] = WeakKeyDictionary()

    async def submit(self, request: Request) -> Receipt:
        """Accept the request durably. With an idempotency key the job may be another client's, and is treated so."""
        job, submission = job_id(request), new_id()
        keyed = request.idempotency_key is not None
        reply = self._replies.expect(submission_id(submission) if keyed else job)
        with submitting(request.model, job) as trace:
            message, blobs = self._message(job, request, trace, submission if keyed else "")
            if keyed:
                self._unagreed[reply] = message, blobs
                reply.add_done_callback(self._forget)
            await self._link.push(message, blobs)
        return Receipt(job, None if keyed else reply, submitted=True, agreed=reply if keyed else None)

    def _submit_again(self) -> None:
        """Push again what no router has agreed to: a failover may have lost it, and a key makes one job of both copies.

        The job may exist by then, from a submission that the failover spared: who waits for this one would never know.
        """
        for message, blobs in list(self._unagreed.values()):
            self._link.post(message, blobs, _leave)

    def _forget(self, reply: asyncio.Future[bytes]) -> None:
        self._unagreed.pop(reply, None)

    async def infer(self, request: Request, timeout: float | None) -> Result:
        """Submit and wait for the answer, both at once."""
        if request.idempotency_key is not None:
            return await self.result(await self.submit(request), timeout)
        until = _end(timeout)
        job = job_id(request)
        reply = self._replies.expect(job)
        with submitting(request.model, job) as trace:
            message, blobs = self._message(job, request, trace)
            self._link.post(message, blobs, partial(_fail, reply))
        return await self._read(await self._replies.own(reply, timeout), until)

    async def result(self, receipt: Receipt, timeout: float | None) -> Result:
        """The job's answer, decoded anew at each call."""
        until = _end(timeout)
        if receipt.reply is not None:
            raw = await self._replies.wait(receipt.reply, timeout)
        else:
            left = await self._agreed(receipt, timeout)
            raw = await self._replies.watch(receipt.job, left, submitted=receipt.submitted)
        return await self._read(raw, until)

    async def _agreed(self, receipt: Receipt, timeout: float | None) -> float | None:
        """Wait until a router has taken a request under an idempotency key; what is left of the time.

        Raises:
            RequestError: it refused the request: the key was first used for another one, for instance.
        """
        if receipt.agreed is None:
            return timeout
        began = asyncio.get_running_loop().time()
        check_accepted(await self._replies.wait(receipt.agreed, timeout))
        return timeout and max(0.0, timeout - (asyncio.get_running_loop().time() - began))

    def _message(
        self, job: str, request: Request, trace: Carried, submission: str = ""
    ) -> tuple[bytes, Mapping[str, Buffer]]:
        """The arrival, and the blobs that it refers to."""
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
        return message, blobs.kept

    async def _read(self, raw: bytes, until: float) -> Result:
        result = read_answer(raw)
        outputs = await self._whole(result.outputs, until) if may_refer(raw) else result.outputs
        return msgspec.structs.replace(result, outputs={name: self._show(value) for name, value in outputs.items()})

    async def stream(self, receipt: Receipt, timeout: float | None) -> Told:
        """What is told of the answer as it comes, and the answer at last."""
        timeout = await self._agreed(receipt, timeout)
        async with (
            contextlib.aclosing(PieceReader(self._link, receipt.job)) as reader,
            contextlib.aclosing(follow(reader.read, self.result(receipt, timeout), Progress())) as told,
        ):
            async for event in told:
                yield event

    async def status(self, receipt: Receipt) -> JobStatus:
        """The job's record, and its error; one that was submitted here and that no router has placed is accepted."""
        record = await self._record(receipt)
        if record.state not in FINAL or record.state == JobState.SUCCEEDED:
            return JobStatus(record=record)
        raw = await self._link.call("GET", result_key(receipt.job))
        return JobStatus(record=record, error=None if raw is None else failure_of(read_meta(raw)))

    async def placement(self, receipt: Receipt) -> dict[str, Any]:
        """What the job's record says of its placement; the HTTP door adds the table that it was chosen from."""
        record = await self._record(receipt)
        names = ("state", "hardware_class", "variant", "device", "level", "reason")
        return {"id": record.id, **{name: getattr(record, name) for name in names}}

    async def what_if(self, request: Request) -> dict[str, Any]:
        """A broker places nothing. Raises `InvalidRequestError`."""
        raise _needs_http("what_if")

    async def cancel(self, receipt: Receipt) -> None:
        """Ask a router to end the job before it runs."""
        if not receipt.submitted or receipt.agreed is not None:
            await self._record(receipt)
        await self._link.push(cancel_message(receipt.job, origin=self._origin, key=self._key))

    async def jobs(self, wanted: JobFilter, limit: int, cursor: str) -> JobPage:
        """A page of the jobs that pass `wanted`, the latest first; an account of producers may not ask that."""
        return await list_jobs(self._ask, wanted, limit=limit, cursor=cursor)

    async def models(self) -> list[dict[str, Any]]:
        """What the routers last said that the fleet can run.

        Raises:
            FleetUnavailable: none said so in the last ten minutes.
        """
        raw = await self._link.call("GET", MODELS)
        if raw is None:
            raise FleetUnavailable("no router has said lately what the fleet can run", retry_after=1.0)
        told: list[dict[str, Any]] = msgspec.json.decode(raw)
        return told

    async def fleet(self) -> dict[str, Any]:
        """A broker's keys are no fleet to show. Raises `InvalidRequestError`."""
        raise _needs_http("fleet")

    async def administer(self, verb: str, path: str) -> dict[str, Any]:
        """A broker answers no operator. Raises `InvalidRequestError`."""
        raise _needs_http(f"{verb} {path}")

    async def close(self) -> None:
        """Disconnect; futures of jobs not answered yet are cancelled."""
        await self._replies.close()
        await self._link.close()

    async def _whole(self, outputs: dict[str, Any], until: float) -> dict[str, Any]:
        """The outputs with the blobs that they refer to in their places; an outage is waited for `until` its time."""
        refs = [reference.ref for reference in references(outputs)]
        clock = asyncio.get_running_loop().time
        while True:
            try:
                contents = await asyncio.gather(*(self._link.call("GET", blob_key(ref)) for ref in refs))
            except BrokerUnavailableError:
                if clock() >= until:
                    raise
                await asyncio.sleep(_PAUSE)
            else:
                break
        whole: dict[str, Any] = resolved(outputs, dict(zip(refs, contents, strict=True)))
        return whole

    async def _ask(self, commands: Sequence[Sequence[str | int]]) -> list[Any]:
        return await asyncio.gather(*(self._link.call(*command) for command in commands))

    async def _record(self, receipt: Receipt) -> JobRecord:
        """The job's record, or what its result tells where that is gone.

        Raises:
            UnknownJobError: there is neither, and the job was not submitted by this client.
            RequestError: it is not the job that this client asked for under its idempotency key.
        """
        job = receipt.job
        if receipt.agreed is not None and receipt.agreed.done():
            check_accepted(receipt.agreed.result())
        flat = [text.decode() for text in await self._link.call("HGETALL", job_key(job))]
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if fields:
            return record_from(job, fields)
        raw = await self._link.call("GET", result_key(job))
        if raw is not None:
            return JobRecord(id=job, state=_ended(read_meta(raw)))
        if not receipt.submitted and not self._replies.expects(job):
            raise unknown(job)
        return record_from(job, {})


def _end(timeout: float | None) -> float:
    """When a wait ends by the loop's clock; at once, as far as outages go, where no time is given."""
    return asyncio.get_running_loop().time() + (timeout or 0.0)


def _leave(_pushed: Any) -> None:
    """A push that fails is repeated after the next reconnection."""


def _fail(reply: asyncio.Future[bytes], pushed: Any) -> None:
    """End the wait for an answer to what could not be pushed."""
    if isinstance(pushed, Exception):
        settle(reply, pushed)


def _ended(meta: ResultMeta) -> JobState:
    """The final state that a stored result tells of, for a job whose record is gone."""
    try:
        read_result(meta)
    except TaxiwayError as error:
        return state_of(error)
    return JobState.SUCCEEDED


def _needs_http(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{what}: expected a client of the HTTP door (http://…), got one of the broker", field="url"
    )
