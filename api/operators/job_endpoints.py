"""The jobs: their states, results and placements; and the dead letters, which are jobs that were given up."""

from __future__ import annotations

import math
from typing import Annotated

from litestar import Response, get
from litestar.params import Parameter, QueryParameter

from api.described import ASKED, FIELDS, KEYED, RUN, answers, deletes, posts
from api.gate import AnyRequest, caller_of, claim, json_answer, needs, take_terms
from api.inference.protocol import InferAnswer
from api.jobs import StoredDeadLetters
from api.services import JsonResponse, jobs_of, router_of, services_of
from taxiway.contract.job import JobStatus
from taxiway.contract.request import TERMS
from taxiway.contract.tensors import OCTETS
from taxiway.contract.values import gone
from taxiway.errors import wrong_field
from taxiway.listing import USUAL, JobFilter, JobPage, list_jobs, states_of

LISTED_DEAD_LETTERS = 1000
"""Most dead letters in one list; the default is a tenth of it."""


_JOB = answers(JobStatus, *KEYED, 400, 404, 503)
_JOB_RESULT = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **answers(JobStatus, status=202)}
_DEAD = answers(FIELDS, *KEYED, *ASKED, 504)


@get("/v2/jobs/{job:str}", opt=needs("read"), responses=_JOB)
async def job_status(request: AnyRequest, job: str, wait: float = 0.0) -> Response[bytes]:
    """A job's state; with `wait`, as soon as it has ended or that many seconds have passed."""
    return json_answer(await jobs_of(request).status(job, wait=_seconds(wait)))


@get("/v2/jobs/{job:str}/result", opt=needs("read"), responses=_JOB_RESULT)
async def job_result(request: AnyRequest, job: str, wait: float = 0.0) -> Response[bytes]:
    """A job's answer: 200, or the job's own error; 202 until it has ended, 410 once the result has expired.

    With `Accept: application/octet-stream` the elements of numeric outputs follow the JSON.
    """
    found = await jobs_of(request).result(job, wait=_seconds(wait))
    if isinstance(found, JobStatus):
        return json_answer(found, status=202)
    binary = OCTETS in request.headers.get("accept", "")
    answer = await services_of(request).inference.answer(job, found, lambda spec: binary and spec.datatype != "BYTES")
    return Response(answer.body, headers=answer.headers)


@get("/v2/blobs/{ref:str}", opt=needs("read"), responses=answers(bytes, *KEYED, 404, 410, 503, media=OCTETS))
async def blob(request: AnyRequest, ref: str) -> Response[bytes]:
    """The raw bytes of a large value that a stored result refers to; 410 once the result has expired."""
    content = (await router_of(request).values.blobs([ref]))[ref]
    if content is None:
        raise gone(ref)
    return Response(bytes(content), media_type=OCTETS)


@get("/v2/jobs/{job:str}/placement", opt=needs("read"), responses=answers(FIELDS, *KEYED, 404, 503))
async def job_placement(request: AnyRequest, job: str) -> JsonResponse:
    """Why a job is where it is, and the recomputed candidate table."""
    return Response(await jobs_of(request).placement(job))


@deletes("/v2/jobs/{job:str}", opt=needs("submit"), responses=_JOB)
async def job_cancel(request: AnyRequest, job: str) -> Response[bytes]:
    """Cancel a job; one that has ended is left unchanged."""
    return json_answer(await jobs_of(request).cancel(job))


_States = Annotated[str, QueryParameter(name="state", description="Only jobs in these states, comma-separated.")]
_Model = Annotated[str, Parameter(description="Only jobs of this model: `name`, `name:version` or `name@alias`.")]
_Tenant = Annotated[str, Parameter(description="Only this tenant's jobs; with a key, only its own tenant is allowed.")]
_Limit = Annotated[int, Parameter(description="Jobs per page, at most 1,000.")]
_Cursor = Annotated[str, Parameter(description="The `next` of the previous page.")]


@get("/v2/jobs", opt=needs("read"), responses=answers(JobPage, *KEYED, 400, 503))
async def jobs(
    request: AnyRequest,
    states: _States = "",
    model: _Model = "",
    tenant: _Tenant = "",
    limit: _Limit = USUAL,
    cursor: _Cursor = "",
) -> Response[bytes]:
    """The fleet's jobs, latest first. While `next` is present more may follow, even after an empty page."""
    router = router_of(request)
    filters = {"tenant": tenant} if tenant else {}
    claim(caller_of(request.scope), filters)
    wanted = JobFilter(
        states=states_of(name for name in states.split(",") if name),
        model=router.rules.catalogue.resolve(model).id if "@" in model else model,
        tenant=filters.get("tenant", ""),
    )
    return json_answer(await list_jobs(router.values.calls, wanted, limit=limit, cursor=cursor))


@get("/v2/dead", responses=_DEAD)
async def dead_list(request: AnyRequest, most: int = LISTED_DEAD_LETTERS // 10) -> Response[bytes]:
    """Dead letters, latest first, up to `most`."""
    if not 0 < most <= LISTED_DEAD_LETTERS:
        raise wrong_field("most", f"1 to {LISTED_DEAD_LETTERS}", most)
    return json_answer({"letters": await StoredDeadLetters(router_of(request)).list(most)})


@get("/v2/dead/{dead_letter:str}", responses=_DEAD)
async def dead_show(request: AnyRequest, dead_letter: str) -> Response[bytes]:
    """One dead letter with its message."""
    return json_answer(await StoredDeadLetters(router_of(request)).show(dead_letter))


@posts("/v2/dead/{dead_letter:str}/replay", responses=_DEAD)
async def dead_replay(request: AnyRequest, dead_letter: str) -> Response[bytes]:
    """Run a dead letter's job again, under its own terms."""
    take_terms(request.scope, {}, dict.fromkeys(TERMS, "none, as the job keeps its own"))
    return json_answer({"id": dead_letter, "job": await StoredDeadLetters(router_of(request)).replay(dead_letter)})


@deletes("/v2/dead/{dead_letter:str}", responses=_DEAD)
async def dead_drop(request: AnyRequest, dead_letter: str) -> Response[bytes]:
    """Delete a dead letter."""
    await StoredDeadLetters(router_of(request)).drop(dead_letter)
    return json_answer({"id": dead_letter, "dropped": True})


def _seconds(wait: float) -> float:
    if not math.isfinite(wait) or wait < 0:
        raise wrong_field("wait", "seconds >= 0", wait)
    return wait
