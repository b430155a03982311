"""The models: which there are, whether each is ready, runs of them, and their answers as they are generated."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Response, get
from litestar.response import Stream

from api.described import ASKED, EVENTS, FIELDS, KEYED, RUN, TERMS, ServerSentEvent, answers, of_model, posts, takes
from api.gate import AnyRequest, json_answer, needs, take_terms
from api.inference.protocol import InferAnswer, InferRequest, read_infer
from api.inference.streaming import STREAM_HEADERS, Streaming
from api.services import JsonResponse, jobs_of, router_of, services_of
from router.decide.classify import Constraints, classify
from router.decide.snapshot import FleetSnapshot
from router.service.model_list import model_list
from tasks.models.catalogue import Catalogue, reference_of
from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
from tasks.topology import Topology
from taxiway.contract.job import JobState
from taxiway.contract.tensors import HEADER
from taxiway.contract.values import BATCH_AXIS
from taxiway.errors import ModelUnavailableError
from taxiway.running import beside


class JobLocation(msgspec.Struct, frozen=True):
    """Where an accepted job can be queried."""

    id: str
    state: JobState
    location: str


_HEADERS = {
    HEADER: "Number of JSON bytes in the body; the raw tensors that it describes follow.",
    "Prefer": "With `respond-async` the job's location is returned at once; with `wait=s`, after s seconds.",
}
_INFER_BODY = takes(InferRequest, {**_HEADERS, **TERMS})
_INFER = {**answers(InferAnswer, *KEYED, *ASKED, *RUN), **answers(JobLocation, status=202)}
_STREAM = answers(ServerSentEvent, *KEYED, 400, 404, 410, 503, media=EVENTS)
_READY = answers(FIELDS, *KEYED, 404, 503) | answers(FIELDS, status=503)


@get("/v2/models", opt=needs(), responses=answers(FIELDS, *KEYED))
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


@posts("/v2/repository/index", opt=needs(), responses=answers(list[FIELDS], *KEYED))
async def repository_index(request: AnyRequest) -> Response[bytes]:
    """Every version of every model, for Triton's clients, and whether a live device has it or could load it."""
    router = router_of(request)
    catalogue, found = router.rules.catalogue, list[IndexedModel]()
    for name in sorted({model.name for model in catalogue.models.values()} | catalogue.others.keys()):
        for model in catalogue.versions(name):
            reason = unready(model, router.rules.topology, router.fleet.snapshot)
            found.append(IndexedModel(name, str(model.version), "UNAVAILABLE" if reason else "READY", reason))
    return json_answer(found)


@get(of_model(""), opt=needs(), responses=answers(FIELDS, *KEYED, 404, 503))
async def metadata(request: AnyRequest, model: str, version: str | None = None) -> JsonResponse:
    """A model's inputs, outputs and parameters."""
    catalogue = router_of(request).rules.catalogue
    return Response(model_metadata(catalogue, catalogue.resolve(reference_of(model, version))))


@get(of_model("/ready"), opt=needs(), responses=_READY)
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


@posts(of_model("/infer"), operation_class=_INFER_BODY, opt=needs("submit"), responses=_INFER)
async def infer(model: str, version: str | None = None) -> Response[bytes]:
    """Run the model: 200 with its outputs; 202 with the job's location, at once with `Prefer: respond-async`."""
    raise NotImplementedError  # only described here: `api.inference.infer.Front` serves it


@posts(
    of_model("/placement"), operation_class=_INFER_BODY, opt=needs("submit"), responses=answers(FIELDS, *KEYED, *ASKED)
)
async def model_placement(request: AnyRequest, model: str, version: str | None = None) -> JsonResponse:
    """Where the present fleet would run an infer request, and why; nothing is accepted."""
    infer = await _read(request)
    preview = services_of(request).inference.preview
    return Response(await preview(reference_of(model, version), infer, len(await request.body())))


@get("/v2/jobs/{job:str}/stream", opt=needs("read"), responses=_STREAM)
async def job_stream(request: AnyRequest, job: str) -> Stream:
    """A generated answer as it is produced, after the event that `Last-Event-ID` names."""
    streaming = Streaming(jobs_of(request), services_of(request).inference)
    events = await streaming.events(job, request.headers.get("last-event-id"))
    return Stream(events, media_type=EVENTS, headers=STREAM_HEADERS)


async def _read(request: AnyRequest) -> InferRequest:
    body, most = await request.body(), router_of(request).rules.topology.limits.elements
    infer = await beside(len(body), read_infer, body, request.headers.get(HEADER), most)
    take_terms(request.scope, infer.parameters)
    return infer


def model_metadata(catalogue: Catalogue, model: Model) -> dict[str, Any]:
    """The protocol's model metadata, plus the parameters that the model takes."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in catalogue.versions(model.name)],
        "platform": f"taxiway_{model.pipeline}",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
        "parameters": {name: msgspec.to_builtins(spec) for name, spec in model.parameters.items()},
        "summary": model.summary,
        "licence": model.licence,
    }


def unready(model: Model, topology: Topology, fleet: FleetSnapshot) -> str:
    """Why no live device has or can load the model; empty if one does."""
    if fleet.stale:
        return "the fleet snapshot is stale"
    candidates, refusals = classify(model, Constraints(), topology, fleet)
    if any(candidate.devices for candidate in candidates):
        return ""
    absent = [(one.hardware_class, one.variant_name, one.absent) for one in candidates]
    refused = [(one.hardware_class, one.variant, one.reason) for one in refusals if not one.ever]
    return "; ".join(f"{name}/{variant}: {why}" for name, variant, why in absent + refused) or "no device can run it"


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    tensor = {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
    axis = {BATCH_AXIS: spec.batch_axis} if spec.batch_axis != 0 else {}
    return tensor | axis | ({"optional": True} if spec.optional else {})
