"""Infer requests over HTTP: checked, placed, forwarded, and answered.

`Front` serves the infer endpoint directly below the server; everything else goes to the application. Litestar's
handling of a request (routing, a request object, arguments, a response object) took a third of what an infer request
costs a router, by cProfile over 4,000 of them. Litestar only describes this endpoint.

The trace context of a request is kept while it is served: `traceparent` is passed on with the job, and the answer
carries the job's.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from api.access import Scope
from api.answers import JSON, HttpAnswer
from api.bodies import read_body
from api.errors import UNFORESEEN, unforeseen
from api.gate import Application, Receive, Send, allow, caller_of, name_in, refuse, take_terms
from api.inference.protocol import InferRequest, WantsBinary, answer_of, read_infer, request_of, wants_binary
from api.jobs import Jobs
from api.routing.explanation import preview
from api.routing.router import HttpRouter
from broker.valkey.jobs import Ending
from router.decide.placement import Placement
from router.service.admission import Order, Place, check_size, digest_at
from tasks.models.catalogue import reference_of
from tasks.models.signature import bind, check_stream, conflict
from tasks.ticket import job_id
from taxiway.client.valkey_results import Reply
from taxiway.contract.job import JobState, JobStatus, Result, failure_meta, read_answer
from taxiway.contract.keys import INFER
from taxiway.contract.limits import LARGE, Buffer
from taxiway.contract.request import Request
from taxiway.contract.sealed import read_opened, sealed_in
from taxiway.contract.tensors import HEADER, Framed
from taxiway.contract.values import Blobs, may_refer, references, resolved
from taxiway.contract.wire import TRACEPARENT, TRACESTATE, Envelope, request_body, task_envelope
from taxiway.errors import BrokerUnavailableError, OverloadedError, SealedError, TaxiwayError
from taxiway.running import beside

_TRACEPARENT, _HEADER = TRACEPARENT.encode(), HEADER.encode()

_TRACESTATE_BYTES = 512  # bytes of `tracestate` that every system passes on (W3C Trace Context, 3.3.1.5)

_carried: ContextVar[dict[str, str] | None] = ContextVar("carried", default=None)


def _traced(scope: Mapping[str, Any], send: Send) -> Send:
    """Keep the trace context of a request that is served from here on; what sends its answer with it."""
    headers = dict(scope["headers"])
    if _TRACEPARENT in headers:
        context = {name: headers.get(name.encode(), b"") for name in (TRACEPARENT, TRACESTATE)}
        fit = {name: value.decode("latin-1") for name, value in context.items() if 0 < len(value) <= _TRACESTATE_BYTES}
        if TRACEPARENT in fit:
            _carried.set(fit)
            return partial(_send_with_trace, send, fit)
    return send


def carry(headers: dict[str, Any]) -> None:
    """Copy the present request's trace context into a message's headers."""
    context = _carried.get()
    if context is not None:
        headers.update(context)


def continue_trace(traceparent: str) -> None:
    """Have what the present task asks for continue a trace context, if it is one."""
    if 0 < len(traceparent) <= _TRACESTATE_BYTES:
        _carried.set({TRACEPARENT: traceparent})


async def _send_with_trace(send: Send, context: Mapping[str, str], message: Mapping[str, Any]) -> None:
    if message["type"] == "http.response.start":
        traceparent = (_TRACEPARENT, context[TRACEPARENT].encode("latin-1"))
        message = {**message, "headers": [*message["headers"], traceparent]}
    await send(message)


_encode = msgspec.json.Encoder().encode
_wait_in = re.compile(r"(?:^|[,\s])wait=(\d{1,9})(?:$|[,;\s])").search

_WITHDRAWN_WITHIN = 0.1
"""Extra seconds beyond `ACCEPT` that a caller waits while a request that was not accepted is cancelled."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that was accepted. `placement` is None if an earlier request made it.

    `wait` gives its stored result, or None if that takes longer than so many seconds.
    """

    job: str
    placement: Placement | None
    wait: Callable[[float], Awaitable[bytes | None]]


class Inference:
    """Implements the infer endpoint."""

    def __init__(self, router: HttpRouter) -> None:
        self.router = router
        self._jobs = Jobs(router)
        self._limits = router.rules.topology.limits

    async def answer_to(self, reference: str, body: Buffer, scope: Mapping[str, Any]) -> HttpAnswer:
        """The answer to an infer request: 200 with the outputs, or 202 with the job's location.

        `scope` is the request's, of ASGI.

        Raises:
            TaxiwayError: as `infer` raises it, or because the caller lacks permission.
        """
        size, headers = len(body), dict(scope["headers"])
        header_length = headers[_HEADER].decode("latin-1") if _HEADER in headers else None
        prefer = headers.get(b"prefer", b"").decode("latin-1")
        infer = await beside(size, read_infer, body, header_length, self._limits.elements)
        take_terms(scope, infer.parameters)
        if "respond-async" in prefer:
            got: Framed | Accepted = await self.accept(await self._converted(reference, infer, size), size)
        else:
            wait = _wait_in(prefer)  # in seconds (RFC 7240, 4.3)
            got = await self.infer(reference, infer, size, float(wait[1]) if wait else math.inf)
        if isinstance(got, Framed):
            return HttpAnswer(200, got.headers, got.pieces)
        location = f"/v2/jobs/{got.job}"
        content = {"id": got.job, "state": "queued", "location": location}
        return HttpAnswer(202, {**JSON, "location": location}, (_encode(content),))

    async def accept(self, request: Request, size: int = 0, *, awaited: bool = False, notify: bool = True) -> Accepted:
        """Accept a request, whose body had `size` bytes, and return at once.

        The result of one that is `awaited` is announced to this router. `notify` is whether webhook endpoints are
        notified of its end.

        Raises:
            TaxiwayError: the request is invalid, cannot be placed, or the state store does not accept it.
        """
        order, blobs = await self._prepared(request, size, reply=self.router.name if awaited else "", notify=notify)
        job, admitted = order.job, await self._placed(order, blobs)
        looked_for = partial(self._earlier, job)
        if admitted is None:
            return Accepted(job, None, looked_for)
        wait = partial(self._own, self.router.results.expect(job), job) if awaited else looked_for
        fresh = await self._forward(order, admitted)
        return Accepted(job, admitted.placement, wait) if fresh else Accepted(job, None, looked_for)

    async def infer(
        self, reference: str, infer: InferRequest, size: int = 0, longest: float = math.inf
    ) -> Framed | Accepted:
        """Accept a request and wait for its answer; the job if that takes longer than `limits.wait` or `longest`.

        Raises:
            TaxiwayError: as `accept` raises it, or the error that the job ended with.
        """
        model = self.router.rules.catalogue.resolve(reference)
        request = await self._converted(reference, infer, size)
        accepted = await self.accept(request, size, awaited=True)
        meta = await accepted.wait(min(longest, self._limits.wait))
        if meta is None:
            return accepted
        result, size = await self._read(meta)
        return await beside(size, answer_of, model, accepted.job, result, wants_binary(infer), infer.id)

    async def preview(self, reference: str, infer: InferRequest, size: int) -> dict[str, Any]:
        """Where a request would be placed now, and why; nothing is accepted.

        Raises:
            TaxiwayError: the request is invalid. A failed placement is part of the answer.
        """
        request = await self._converted(reference, infer, size)
        order, _ = await self._prepared(request, size, reply="")
        model, table = preview(order, self.router.rules, self.router.fleet.working)
        answer: dict[str, Any] = {"model": model.id, **msgspec.to_builtins(table)}
        return answer

    async def answer(self, job: str, meta: bytes, wants: WantsBinary) -> Framed:
        """The infer answer for a stored result.

        Raises:
            TaxiwayError: the error that the job ended with.
        """
        result, size = await self._read(meta)
        return await beside(size, answer_of, self.router.rules.model_of(result.model), job, result, wants)

    async def _converted(self, reference: str, infer: InferRequest, size: int) -> Request:
        """A request in our form."""
        return await beside(size, request_of, reference, infer, self._limits.elements)

    async def _prepared(
        self, request: Request, size: int, *, reply: str, notify: bool = True
    ) -> tuple[Order, Mapping[str, Buffer]]:
        """A request as an order, before admission, and the blobs taken out of its message."""
        job = job_id(request, self.router.rules.secret[0])
        envelope, body, blobs = await beside(size, self._checked, request, job)
        carry(envelope.headers)
        order = Order(
            job,
            request,
            envelope,
            body,
            accepted=self.router.store.clock.stored_now(),
            reply=reply,
            blobs={ref: len(content) for ref, content in blobs.items()},
            notify=notify,
        )
        return order, blobs

    def _checked(self, request: Request, job: str) -> tuple[Envelope, bytes, Mapping[str, Buffer]]:
        """The message of a request that fits its model, its body, and the blobs taken out of it."""
        model = self.router.rules.catalogue.resolve(request.model)
        if sealed_in(request.inputs) is None:
            bound = bind(model, request.inputs, request.parameters, request.outputs)
            check_stream(model, bound, request.stream)
        texts = LARGE if self.router.rules.classify is None else math.inf  # a classifier reads a message's texts
        blobs = Blobs(self._limits.inline, texts)
        body = request_body(request, blobs)
        check_size(len(body) + sum(map(len, blobs.contents.values())), self._limits.payload)
        envelope = task_envelope(INFER, job, body, header={}, origin=f"router@{self.router.name}")
        return envelope, body, blobs.contents

    async def _placed(self, order: Order, blobs: Mapping[str, Buffer]) -> Place | None:
        """The placed request, with its blobs in the store; None if it cannot be placed, but was accepted before."""
        try:
            admitted = await self.router.place(order)
        except TaxiwayError:
            if await self._is_copy(order):
                return None
            raise
        if (answered := _carried.get()) is not None:
            answered[TRACEPARENT] = str(admitted.outgoing.envelope.headers[TRACEPARENT])
        if blobs and "blobs" in admitted.outgoing.fields:
            await self.router.values.keep(blobs)
        return admitted

    async def _forward(self, order: Order, admitted: Place) -> bool:
        """Forward a request; whether it is a new job. Blobs of a duplicate are dropped.

        Raises:
            IdempotencyConflictError: the earlier job is of another request.
            OverloadedError: its tenant has as many unfinished jobs as it may.
        """
        try:
            fresh = await self.router.forward(admitted)
        except OverloadedError:  # nothing was recorded
            if order.blobs:
                await self.router.store.jobs.drop_blobs(order.job, order.blobs)
            raise
        except Exception as error:  # an unexpected error leaves just as unclear whether it was published
            # with a key it will be sent again, and may already have been accepted
            if order.request.idempotency_key is None:
                await self._withdraw(order, error)
            raise
        if order.blobs and not fresh:
            await self.router.store.jobs.drop_blobs(order.job, order.blobs)
        if not fresh and admitted.outgoing.use is not None:
            first = await self.router.jobs.first_digest(order.job)
            if first and first != admitted.outgoing.use.digest:
                raise conflict(order.request, first, admitted.outgoing.use.digest)
        return fresh

    async def _is_copy(self, order: Order) -> bool:
        """Whether the request's idempotency key has a job already, of an equal request."""
        if order.request.idempotency_key is None:
            return False
        [known] = await self.router.store.jobs.accepted_before([(order.job, digest_at(order, self.router.rules))])
        return known

    async def _withdraw(self, order: Order, error: Exception) -> None:
        """End a request that was not accepted, if it was recorded or published without confirmation; drop its blobs."""
        job, store = order.job, self.router.store
        reported = error if isinstance(error, TaxiwayError) else TaxiwayError(UNFORESEEN)
        with suppress(BrokerUnavailableError, TimeoutError):  # otherwise it ends at its deadline
            async with asyncio.timeout(_WITHDRAWN_WITHIN):
                if not await self.router.jobs.without_record([job]):
                    await store.jobs.finish([Ending(job, JobState.FAILED, failure_meta(job, reported))])
                await store.jobs.drop_blobs(job, order.blobs)

    async def ended(self, accepted: Accepted) -> bytes | None:
        """The stored result of a job, however long it takes: its deadline bounds that; None if the router stops."""
        while (meta := await accepted.wait(math.inf)) is None:
            if self.router.results.hurried.is_set():
                return None
        return meta

    async def result(self, meta: bytes) -> Result:
        """The stored result, with the blobs that it refers to in place, and opened if it is sealed.

        Raises:
            TaxiwayError: the error that the job ended with, or it is sealed and cannot be opened here.
        """
        return (await self._read(meta))[0]

    async def stored(self, meta: bytes) -> Result:
        """The same for another fleet: what is sealed stays sealed."""
        return (await self._resolved(await beside(len(meta), read_answer, meta), meta))[0]

    async def _read(self, meta: bytes) -> tuple[Result, int]:
        """The opened result, and the approximate size of its outputs in bytes."""
        try:
            result = await beside(len(meta), read_opened, meta, self.router.rules.seal_keys)
        except SealedError as error:
            self.router.refused[error.code,] += 1
            raise
        return await self._resolved(result, meta)

    async def _resolved(self, result: Result, meta: bytes) -> tuple[Result, int]:
        found = [reference.ref for reference in references(result.outputs)] if may_refer(meta) else []
        if not found:
            return result, len(meta)
        contents = await self.router.values.blobs(found)
        size = sum(len(content) for content in contents.values() if content is not None)
        resolve = partial(resolved, result.outputs, contents)
        return msgspec.structs.replace(result, outputs=await beside(size, resolve)), len(meta) + size

    async def _own(self, expected: Reply, job: str, wait: float) -> bytes | None:
        """The result of a job just forwarded."""
        try:
            return await self.router.results.within(wait, expected)
        except TimeoutError:
            return (await self.router.jobs.results([job]))[0]

    async def _earlier(self, job: str, wait: float) -> bytes | None:
        """The result of a job that an earlier request with the same idempotency key created."""
        found = await self._jobs.result(job, wait=wait)
        return None if isinstance(found, JobStatus) else found


_INFER = re.compile(r"/+v2/+models/+([^/]+)(?:/+versions/+([^/]+))?/+infer/*")  # as Litestar reads slashes
_SUBMIT: Scope = "submit"


class Front:
    """ASGI middleware that serves infer requests, and traces all; `limit` bounds a body, in bytes."""

    def __init__(self, behind: Application, inference: Inference, limit: int) -> None:
        self._behind = behind
        self._inference = inference
        self._limit = limit

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        send = _traced(scope, send)
        match = _INFER.fullmatch(scope["path"]) if scope["method"] == "POST" else None
        if match is None:
            await self._behind(scope, receive, send)
            return
        try:
            allow(caller_of(scope), (_SUBMIT,))
            body = await read_body(scope, receive, self._limit)
            if body is None:
                return
            got = await self._inference.answer_to(reference_of(name_in(match[1]), match[2]), body, scope)
        except TaxiwayError as error:
            await refuse(scope, send, error)
        except Exception as error:  # unexpected: logged by `unforeseen`
            await refuse(scope, send, unforeseen(scope["method"], scope["path"], error))
        else:
            await got(scope, receive, send)
