"""What a request under an idempotency key asks for, as one digest: the same at every door, whatever form it came in.

The digest covers the model, the inputs, parameters and outputs, and the terms that say by what the answer may be given
(`locality`, `min_accuracy`). How soon, how urgently and for how much may differ from one try to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from tasks.models.catalogue import Model, TensorSpec
from tasks.models.signature import bind_parameters, by_name
from taxiway.contract.job import accepted_meta, failure_meta
from taxiway.contract.request import Request
from taxiway.contract.values import from_wire, is_reference, is_tensor, numbers, raw_bytes, to_array
from taxiway.errors import IdempotencyConflictError, TaxiwayError

SHOWN = 12
"""Hexadecimal digits of a digest in an error's text."""

FIRST = "@first@"
"""Stands for the first use's digest in the refusal that the state store completes."""

_BYTES = 16  # of a digest
_encode = msgspec.json.Encoder(order="deterministic", enc_hook=repr).encode


class KeyUse(msgspec.Struct, frozen=True, array_like=True):
    """A use of an idempotency key, as `forwarding.FORWARD` takes it.

    `submission` is the task id under which the submitter is notified whether the job matches its request, empty if it
    does not wait for that: with the stored result `same`, or with `other`, in which `FIRST` stands for a digest.
    """

    digest: str
    submission: str = ""
    same: str = ""  # Lua's MessagePack knows text alone
    other: str = ""
    keep: int = 0


def key_use(model: Model, request: Request, submission: str, keep: int) -> KeyUse:
    """The use of its key that a request makes; what its submitter is told stays for `keep` seconds."""
    digest = digest_of(model, request)
    if not submission:
        return KeyUse(digest)
    refused = conflict(request, FIRST, digest)
    told = accepted_meta(submission).decode(), failure_meta(submission, refused).decode()
    return KeyUse(digest, submission, *told, keep)


def conflict(request: Request, first: str, digest: str) -> IdempotencyConflictError:
    """The refusal of a request whose key was first used for another one."""
    first, digest = first[:SHOWN], digest[:SHOWN]
    message = (
        f"idempotency_key: expected the request that {request.idempotency_key!r} was first used for (digest {first}), "
        f"got another one (digest {digest}): use a new key"
    )
    return IdempotencyConflictError(message, field="idempotency_key", first=first, got=digest)


def digest_of(model: Model, request: Request) -> str:
    """Hexadecimal digits that are the same for requests that ask the same of a model."""
    outputs = sorted(request.outputs or (spec.name for spec in model.outputs))
    asked = [model.id, _inputs(model, request.inputs), _parameters(model, request.parameters), outputs]
    return hashlib.blake2b(_encode([*asked, request.locality, request.min_accuracy]), digest_size=_BYTES).hexdigest()


def _parameters(model: Model, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return bind_parameters(model, from_wire(parameters, "parameters"))
    except TaxiwayError:  # the job will be refused: any text that is the same each time does
        return parameters


def _inputs(model: Model, inputs: Any) -> Any:
    try:
        named = by_name(model, from_wire(inputs))
        return {spec.name: _column(spec, named[spec.name]) for spec in model.inputs if spec.name in named}
    except (TaxiwayError, LookupError, TypeError, ValueError, AttributeError):  # the same
        return inputs


def _column(spec: TensorSpec, value: Any) -> list[Any]:
    """An input's datatype, shape with the batch axis, and content; bytes by their SHA-256, as references have it."""
    if spec.datatype == "BYTES":
        elements = value["data"] if is_tensor(value) else value
        elements = elements if isinstance(elements, list) else [elements]
        return [spec.datatype, [len(elements)], [_element(element) for element in elements]]
    if is_tensor(value) and "ref" in value:
        return [value["datatype"], _batched(spec, value["shape"]), value["digest"]]
    array = to_array(value, spec.name) if is_tensor(value) else numbers(value, spec.datatype, spec.name)
    return [_datatype(spec, value), _batched(spec, list(array.shape)), _sha256(raw_bytes(np.asarray(array)))]


def _datatype(spec: TensorSpec, value: Any) -> str:
    return str(value["datatype"]) if is_tensor(value) else spec.datatype


def _batched(spec: TensorSpec, shape: list[int]) -> list[int]:
    axis = spec.batch_axis
    return list(shape) if axis is None or len(shape) >= len(spec.shape) else [*shape[:axis], 1, *shape[axis:]]


def _element(element: Any) -> Any:
    if is_reference(element):
        return element["digest"]
    if isinstance(element, str):
        return _sha256(element.encode())
    return _sha256(element) if isinstance(element, (bytes, memoryview)) else [element]


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
