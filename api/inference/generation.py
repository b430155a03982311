"""Text that models generate, whole or as events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from litestar import Response, get
from litestar.response import Stream

from api.described import EVENTS, of_model, posts
from api.gate import AnyRequest, json_answer, needs, take_terms
from api.inference import described
from api.inference.infer import Accepted
from api.inference.streaming import STREAM_HEADERS, GenerateRequest, Streaming, read_generate
from api.services import jobs_of, most_elements, services_of
from tasks.large_bodies import beside
from tasks.models.catalogue import reference_of


@posts(
    of_model("/generate"),
    operation_class=described.GENERATE_BODY,
    opt=needs("submit"),
    responses=described.GENERATE,
)
async def generate(request: AnyRequest, model: str, version: str | None = None) -> Response[bytes]:
    """Generate text: 200 with the whole text, or 202 with the job's location."""
    answer = await _streaming(request).generate(reference_of(model, version), await _read_generate(request))
    if isinstance(answer, Accepted):
        return json_answer(answer.content, {"location": answer.location}, status=202)
    return json_answer(answer)


@posts(
    of_model("/generate_stream"),
    operation_class=described.GENERATE_BODY,
    opt=needs("submit"),
    responses=described.GENERATE_STREAM,
)
async def generate_stream(request: AnyRequest, model: str, version: str | None = None) -> Stream:
    """Generate text and stream it as server-sent events; `Location` has the job's own stream."""
    streaming = _streaming(request)
    job = await streaming.submit(reference_of(model, version), await _read_generate(request))
    return _stream(await streaming.events(job, None), job)


@get("/v2/jobs/{job:str}/stream", opt=needs("read"), responses=described.JOB_STREAM)
async def job_stream(request: AnyRequest, job: str) -> Stream:
    """A generated answer as it is produced, after the event that `Last-Event-ID` names."""
    return _stream(await _streaming(request).events(job, request.headers.get("last-event-id")), job)


def _streaming(request: AnyRequest) -> Streaming:
    return Streaming(jobs_of(request), services_of(request).inference)


async def _read_generate(request: AnyRequest) -> GenerateRequest:
    content = await request.body()
    body = await beside(len(content), read_generate, content, most_elements(request))
    take_terms(request.scope, body.parameters)
    return body


def _stream(events: AsyncIterator[bytes], job: str) -> Stream:
    headers = {"location": f"/v2/jobs/{job}/stream", **STREAM_HEADERS}
    return Stream(events, media_type=EVENTS, headers=headers)


ENDPOINTS = (generate, generate_stream, job_stream)
