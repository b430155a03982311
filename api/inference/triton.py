"""Triton Inference Server's endpoints beyond the Open Inference Protocol: repository, configuration, statistics.

Sources: triton-inference-server/server, docs/protocol: extension_model_repository.md, extension_model_configuration.md,
extension_statistics.md. Fields that this fleet has no equivalent for are left out.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from litestar import Response, get

from api.described import of_model, posts
from api.gate import AnyRequest, json_answer, needs
from api.inference import described
from api.inference.metadata import unready
from api.routing.router import HttpRouter
from api.services import router_of
from tasks.heartbeat import Ran
from tasks.models.catalogue import Catalogue, reference_of
from tasks.models.model import Model
from tasks.models.tensor_spec import TensorSpec
from taxiway.errors import UNREADABLE, InvalidRequestError, cut, unreadable

_TYPES = {"BYTES": "TYPE_STRING"}
_SECOND = 1e9  # nanoseconds


class IndexRequest(msgspec.Struct, frozen=True):
    """An index request: with `ready`, only the models that could run now."""

    ready: bool = False


class IndexedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """One version of a model; `reason` says why it could not run now, or is not what its file says."""

    name: str
    version: str
    state: str
    reason: str = ""


class ControlRequest(msgspec.Struct, frozen=True):
    """A request to load or unload a model. Models here have no dependents, and are described by their folder alone."""

    parameters: dict[str, Any] = {}


Body = TypeVar("Body")


@posts("/v2/repository/index", opt=needs(), responses=described.INDEX)
async def repository_index(request: AnyRequest) -> Response[bytes]:
    """Every version of every model, and whether a live device has it or could load it."""
    read = await _read(request, IndexRequest)
    router = router_of(request)
    catalogue = router.rules.catalogue
    found = [_indexed(router, model.name, model) for model in _models(router)]
    found += [_indexed(router, name, m) for name in catalogue.served_others() for m in catalogue.versions(name)]
    found += [_disabled(catalogue, reference, why) for reference, why in sorted(catalogue.disabled.items())]
    return json_answer([one for one in found if one.state == "READY" or not read.ready])


@posts("/v2/repository/models/{model:str}/load", responses=described.REPOSITORY)
async def repository_load(request: AnyRequest, model: str) -> Response[bytes]:
    """Read the models folder, accept requests for a model, and load it on each class that can run it.

    503 with the reason if its file is wrong, or if no device has loaded it within 50 s.
    """
    await _check_control(request)
    return json_answer(await router_of(request).repository.load(model))


@posts("/v2/repository/models/{model:str}/unload", responses=described.REPOSITORY)
async def repository_unload(request: AnyRequest, model: str) -> Response[bytes]:
    """Accept no more requests for a model; workers unload it once the accepted ones have run."""
    await _check_control(request)
    return json_answer(await router_of(request).repository.unload(model))


@get(of_model("/config"), opt=needs(), responses=described.MODEL)
async def model_config(request: AnyRequest, model: str, version: str | None = None) -> Response[bytes]:
    """A model's configuration in Triton's form: name, platform, most rows per request, inputs and outputs."""
    return json_answer(config_of(_resolved(request, model, version)))


@get("/v2/models/stats", opt=needs(), responses=described.INFO)
async def all_stats(request: AnyRequest) -> Response[bytes]:
    """The statistics of every model, as `/v2/models/{model}/stats` gives for one."""
    return _stats(router_of(request), _models(router_of(request)))


@get("/v2/models/{model:str}/stats", opt=needs(), responses=described.MODEL)
async def model_stats(request: AnyRequest, model: str) -> Response[bytes]:
    """What the fleet's workers did for each version of a model since this router started: jobs and nanoseconds.

    `queue` is from acceptance to the start of the job, `compute_infer` the batches that it ran in.
    """
    router = router_of(request)
    return _stats(router, router.rules.catalogue.named_by(model))


@get("/v2/models/{model:str}/versions/{version:str}/stats", opt=needs(), responses=described.MODEL)
async def version_stats(request: AnyRequest, model: str, version: str) -> Response[bytes]:
    """The same for one version."""
    return _stats(router_of(request), [_resolved(request, model, version)])


ENDPOINTS = (repository_index, repository_load, repository_unload, model_config, all_stats, model_stats, version_stats)


async def _read(request: AnyRequest, kind: type[Body]) -> Body:
    """The body as a `kind`, of which it may have none."""
    body = await request.body()
    try:
        return msgspec.json.decode(body, type=kind) if body.strip() else kind()
    except UNREADABLE as error:
        raise unreadable(error) from error


async def _check_control(request: AnyRequest) -> None:
    """Refuse a request that brings a configuration or files along."""
    for name in (await _read(request, ControlRequest)).parameters:
        if name != "unload_dependents":
            message = f"parameters.{cut(name)}: expected none, as the models folder describes the model"
            raise InvalidRequestError(message, field="parameters")


def config_of(model: Model) -> dict[str, Any]:
    """The part of Triton's model configuration that applies here; `dims` exclude the batch axis."""
    return {
        "name": model.name,
        "platform": f"taxiway_{model.pipeline}",
        "backend": "taxiway",
        "max_batch_size": model.max_rows,
        "version_policy": {"specific": {"versions": [model.version]}},
        "input": [_tensor(spec) | ({"optional": True} if spec.optional else {}) for spec in model.inputs],
        "output": [_tensor(spec) for spec in model.outputs],
    }


def stats_of(model: Model, ran: Ran) -> dict[str, Any]:
    """Triton's statistics of a model."""
    answered = ran.answered
    computed = _duration(answered, ran.run)
    none = _duration(0, 0.0)
    return {
        "name": model.name,
        "version": str(model.version),
        "last_inference": round(ran.last * 1000),
        "inference_count": ran.rows,
        "execution_count": round(ran.batches),
        "inference_stats": {
            "success": _duration(answered, ran.total),
            "fail": _duration(ran.failed, ran.lost),
            "queue": _duration(answered, ran.queue),
            "compute_input": none,
            "compute_infer": computed,
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * _SECOND)}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [length for axis, length in enumerate(spec.shape) if axis != spec.batch_axis]
    return {"name": spec.name, "data_type": _TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"), "dims": dims or [1]}


def _indexed(router: HttpRouter, name: str, model: Model) -> IndexedModel:
    """A model under one of its names: why it could not run, or why it is not what its file says."""
    reason = unready(model, router.rules.topology, router.fleet.snapshot, router.rules.unloaded)
    outdated = router.rules.catalogue.outdated
    old = outdated.get(model.id) or outdated.get(name)
    why = reason or (f"served in its last valid version, because its file is wrong: {old}" if old else "")
    return IndexedModel(name, str(model.version), "UNAVAILABLE" if reason else "READY", why)


def _disabled(catalogue: Catalogue, reference: str, why: str) -> IndexedModel:
    """A model whose files are invalid."""
    name = catalogue.bare(reference)
    return IndexedModel(name, reference[len(name) + 1 :], "UNAVAILABLE", why)


def _models(router: HttpRouter) -> list[Model]:
    catalogue = router.rules.catalogue
    return [m for name in sorted({m.name for m in catalogue.models.values()}) for m in catalogue.versions(name)]


def _stats(router: HttpRouter, models: list[Model]) -> Response[bytes]:
    ran = router.outcomes.models
    return json_answer({"model_stats": [stats_of(model, ran.get(model.id, Ran())) for model in models]})


def _resolved(request: AnyRequest, model: str, version: str | None) -> Model:
    return router_of(request).rules.catalogue.resolve(reference_of(model, version))
