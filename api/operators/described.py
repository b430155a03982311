"""What the OpenAPI document says of operators' endpoints; no logic."""

from __future__ import annotations

from litestar import MediaType

from api.described import ASKED, EVENTS, FIELDS, KEYED, RUN, ServerSentEvent, answers
from api.inference.protocol import InferAnswer
from api.operators.view import FleetTimeline, FleetView
from taxiway.contract.job import JobFailure, JobRecord
from taxiway.contract.tensors import OCTETS
from taxiway.listing import JobPage


class JobAnswer(JobRecord, frozen=True, kw_only=True):
    """A job's record; the number of jobs before it and the seconds until it may be done, if known; its error."""

    position: int | None
    eta: float | None
    error: JobFailure | None


INFO = answers(FIELDS, *KEYED)
HEALTH = answers(FIELDS, 500)
READINESS = {**HEALTH, **answers(FIELDS, status=503)}
FLEET = answers(FleetView, *KEYED, 503)
FLEET_TIMELINE = answers(FleetTimeline, *KEYED, 503)
FLEET_STREAM = answers(ServerSentEvent, *KEYED, 503, media=EVENTS)
FLEET_CHANGE = answers(FIELDS, *KEYED, 503)
DRAIN = answers(FIELDS, *KEYED, 422, 503)
SCALING = answers(FIELDS, *KEYED, 400, 404, 503)
METRICS = answers(str, *KEYED, 503, media=MediaType.TEXT)
JOB = answers(JobAnswer, *KEYED, 400, 404, 503)
JOBS = answers(JobPage, *KEYED, 400, 503)
JOB_PLACEMENT = answers(FIELDS, *KEYED, 404, 503)
JOB_RESULT = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **answers(JobAnswer, status=202)}
DEAD = answers(FIELDS, *KEYED, *ASKED, 504)
BLOB = answers(bytes, *KEYED, 404, 410, 503, media=OCTETS)
"""What each endpoint answers, by status."""
