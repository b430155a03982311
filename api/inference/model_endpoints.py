"""The models: which there are, whether each is ready, runs of them, and their answers as they are generated."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.response import Stream

from api.described import EVENTS, of_model, posts
from api.gate import AnyRequest, json_answer, needs, take_terms
from api.inference import described
from api.inference.metadata import model_metadata, unready
from api.inference.protocol import InferRequest, read_infer
from api.inference.streaming import STREAM_HEADERS, Streaming
from api.services import JsonResponse, jobs_of, most_elements, router_of, services_of
from router.service.model_list import model_list
from tasks.large_bodies import beside
from tasks.models.catalogue import reference_of
from taxiway.contract.tensors import HEADER
from taxiway.errors import ModelUnavailableError


@get("/v2/models", opt=needs(), responses=described.INFO)
async def models(request: AnyRequest) -> JsonResponse:
    """Every model with its versions, aliases and variants, and why one is disabled."""
    router = router_of(request)
    rules = router.rules
    return Response({"models": model_list(rules.catalogue, router.fleet.working.fleet)})


class IndexedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """One version of a model; `reason` says why it could not run now."""

    name: str
    version: str
    state: str
    reason: str = ""


@posts("/v2/repository/index", opt=needs(), responses=described.INDEX)
async def repository_index(request: AnyRequest) -> Response[bytes]:
    """Every version of every model, for Triton's clients, and whether a live device has it or could load it."""
    router = router_of(request)
    catalogue, found = router.rules.catalogue, list[IndexedModel]()
    for name in sorted({model.name for model in catalogue.models.values()} | catalogue.others.keys()):
        for model in catalogue.versions(name):
            reason = unready(model, router.rules.topology, router.fleet.snapshot)
            found.append(IndexedModel(name, str(model.version), "UNAVAILABLE" if reason else "READY", reason))
    return json_answer(found)


@get(of_model(""), opt=needs(), responses=described.MODEL)
async def metadata(request: AnyRequest, model: str, version: str | None = None) -> JsonResponse:
    """A model's inputs, outputs and parameters."""
    catalogue = router_of(request).rules.catalogue
    return Response(model_metadata(catalogue, catalogue.resolve(reference_of(model, version))))


@get(of_model("/ready"), opt=needs(), responses=described.MODEL_READY)
async def model_ready(request: AnyRequest, model: str, version: str | None = None) -> JsonResponse:
    """Whether a live device has or can load the model; 503 with the reason if none can, or the model is disabled."""
    router = router_of(request)
    try:
        found = router.rules.catalogue.resolve(reference_of(model, version))
        reason = unready(found, router.rules.topology, router.fleet.snapshot)
    except ModelUnavailableError as error:
        reason = str(error.details["reason"])
    content = {"name": model, "ready": not reason}
    return Response(content | ({"reason": reason} if reason else {}), status_code=503 if reason else 200)


@posts(
    of_model("/infer"),
    operation_class=described.INFER_BODY,
    opt=needs("submit"),
    responses=described.INFER,
)
async def infer(model: str, version: str | None = None) -> Response[bytes]:
    """Run the model: 200 with its outputs; 202 with the job's location, at once with `Prefer: respond-async`."""
    raise NotImplementedError  # only described here: `api.inference.infer.Front` serves it


@posts(
    of_model("/placement"),
    operation_class=described.INFER_BODY,
    opt=needs("submit"),
    responses=described.PLACEMENT,
)
async def model_placement(request: AnyRequest, model: str, version: str | None = None) -> JsonResponse:
    """Where the present fleet would run an infer request, and why; nothing is accepted."""
    infer = await _read(request)
    preview = services_of(request).inference.preview
    return Response(await preview(reference_of(model, version), infer, len(await request.body())))


@get("/v2/jobs/{job:str}/stream", opt=needs("read"), responses=described.JOB_STREAM)
async def job_stream(request: AnyRequest, job: str) -> Stream:
    """A generated answer as it is produced, after the event that `Last-Event-ID` names."""
    streaming = Streaming(jobs_of(request), services_of(request).inference)
    events = await streaming.events(job, request.headers.get("last-event-id"))
    return Stream(events, media_type=EVENTS, headers=STREAM_HEADERS)


async def _read(request: AnyRequest) -> InferRequest:
    body = await request.body()
    infer = await beside(len(body), read_infer, body, request.headers.get(HEADER), most_elements(request))
    take_terms(request.scope, infer.parameters)
    return infer


ENDPOINTS = (models, repository_index, metadata, model_ready, infer, model_placement, job_stream)
