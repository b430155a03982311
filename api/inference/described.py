"""What the OpenAPI document says of the Open Inference Protocol's endpoints; no logic."""

from __future__ import annotations

import msgspec

from api.described import ASKED, EVENTS, FIELDS, KEYED, RUN, TERMS, ServerSentEvent, answers, takes
from api.inference.protocol import InferAnswer, InferRequest
from taxiway.contract.job import JobState
from taxiway.contract.tensors import HEADER


class JobLocation(msgspec.Struct, frozen=True):
    """Where an accepted job can be queried."""

    id: str
    state: JobState
    location: str


INFER_BODY = takes(
    InferRequest,
    {
        HEADER: "Number of JSON bytes in the body; the raw tensors that it describes follow.",
        "Prefer": "With `respond-async` the job's location is returned at once; with `wait=s`, after s seconds.",
        **TERMS,
    },
)
"""What endpoints take."""

PLACED = answers(JobLocation, status=202)
INFO = answers(FIELDS, *KEYED)
INFER = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **PLACED}
PLACEMENT = answers(FIELDS, *KEYED, *ASKED)
JOB_STREAM = answers(ServerSentEvent, *KEYED, 400, 404, 410, 503, media=EVENTS)
INDEX = answers(list[FIELDS], *KEYED)
MODEL = answers(FIELDS, *KEYED, 404, 503)
MODEL_READY = {**MODEL, **answers(FIELDS, status=503)}
"""What each endpoint answers, by status."""
