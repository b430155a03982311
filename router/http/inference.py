"""Takes infer requests at the HTTP door: checks, places and forwards them, and waits for answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from router.admission import Admitted, Order, check_size, preview
from router.http.protocol import InferRequest, answer_of, request_of
from router.jobs import GRACE, Jobs
from router.service import Router
from tasks.catalogue import Model
from tasks.signature import bind
from taxiway.job import JobStatus, read_meta, read_result
from taxiway.keys import INFER
from taxiway.request import job_id
from taxiway.wire import request_body, task_envelope


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that was accepted and has no result yet."""

    job: str


class Inference:
    """The infer endpoint's work."""

    def __init__(self, router: Router, jobs: Jobs) -> None:
        self._router = router
        self._jobs = jobs
        self._limits = router.rules.topology.limits

    async def submit(self, reference: str, infer: InferRequest) -> Accepted:
        """Accept a request and return at once.

        Raises:
            TaxiwayError: the request is wrong, cannot be placed, or the broker does not accept it.
        """
        order, _model = self._order(reference, infer, reply="")
        await self._router.forward(await self._router.place(order))
        return Accepted(order.job)

    async def infer(self, reference: str, infer: InferRequest) -> bytes | Accepted:
        """Accept a request and wait for its answer, as JSON; the job where the answer takes longer than `limits.wait`.

        Raises:
            TaxiwayError: as `submit` raises it, or the error that the job ended with.
        """
        order, model = self._order(reference, infer, reply=self._router.name)
        admitted = await self._router.place(order)
        with self._router.results.expect(order.job) as future:
            fresh = await self._router.forward(admitted)
            meta = await (self._own(future, admitted) if fresh else self._earlier(order.job))
        if meta is None:
            return Accepted(order.job)
        return answer_of(model, order.job, read_result(read_meta(meta)), infer.id)

    def preview(self, reference: str, infer: InferRequest) -> dict[str, Any]:
        """Where a request would go now and why; nothing is accepted.

        Raises:
            TaxiwayError: the request is wrong. That it cannot be placed is part of the answer.
        """
        order, _ = self._order(reference, infer, reply="")
        model, table = preview(order, self._router.rules, self._router.fleet.outlook)
        answer: dict[str, Any] = {"model": model.id, **msgspec.to_builtins(table)}
        return answer

    def answer(self, job: str, meta: bytes) -> bytes:
        """The infer answer in a stored result, as JSON.

        Raises:
            TaxiwayError: the error that the job ended with.
        """
        result = read_result(read_meta(meta))
        return answer_of(self._router.rules.catalogue.resolve(result.model), job, result)

    def _order(self, reference: str, infer: InferRequest, *, reply: str) -> tuple[Order, Model]:
        model = self._router.rules.catalogue.resolve(reference)
        request = request_of(reference, infer)
        bind(model, request.inputs, request.parameters, request.outputs)
        body = request_body(request)
        check_size(len(body), self._limits.payload)
        job = job_id(request)
        envelope = task_envelope(INFER, job, body, header={}, origin=f"router@{self._router.name}")
        return Order(job, request, envelope, body, accepted=self._router.store.now(), reply=reply), model

    async def _own(self, future: asyncio.Future[bytes], admitted: Admitted) -> bytes | None:
        """The result of a job forwarded just now; past its deadline the job is ended here."""
        job, deadline_at = admitted.outgoing.job, admitted.ticket.deadline_at
        left = deadline_at + GRACE - self._router.store.now() if deadline_at else float("inf")
        try:
            return await asyncio.wait_for(future, min(left, self._limits.wait))
        except TimeoutError:
            if left > self._limits.wait:
                return await self._router.store.result(job)
        await self._jobs.expire(job)
        return await self._router.store.result(job)

    async def _earlier(self, job: str) -> bytes | None:
        """The result of a job that an earlier request with the same idempotency key began."""
        found = await self._jobs.result(job, wait=self._limits.wait)
        return None if isinstance(found, JobStatus) else found
