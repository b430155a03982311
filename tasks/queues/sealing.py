"""Seals the inputs of requests whose label is sealed, and opens them in the worker that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from tasks.models.model import Model
from tasks.models.sizes import facts_of
from tasks.settings import SettingsError
from tasks.topology import Topology
from taxiway.contract.request import Request
from taxiway.contract.sealed import Sealed, row_of
from taxiway.contract.values import references, to_wire
from taxiway.contract.wire import request_body
from taxiway.errors import SealedError, invalid

if TYPE_CHECKING:
    from taxiway.sealing import SealKeys

_parts = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw]).decode


def open_seal_keys(private: Sequence[bytes], topology: Topology) -> SealKeys | None:
    """What seals and opens; None where no label is sealed, and there are no keys.

    Raises:
        SettingsError: a key is none.
    """
    if not private and not topology.locality.sealed:
        return None
    from taxiway.sealing import SealKeys  # others start 60 ms sooner without cryptography

    try:
        return SealKeys(private)
    except ValueError as error:
        raise SettingsError("TAXIWAY_SEAL_KEYS", "keys of 64 hexadecimal digits", str(error)) from error


def sealed_message(
    job: str,
    request: Request,
    body: bytes,
    model: Model,
    seal_keys: SealKeys,
    keys: Mapping[str, bytes],
    locality: str | None,
) -> bytes:
    """The body of a job's message with inputs and parameters sealed with these keys, by label.

    `locality` is what the model and the content say, which cannot be read again.

    Raises:
        InvalidRequestError: values are stored beside the message, and not sealed.
    """
    content = request.inputs, request.parameters
    if next(references(content), None) is not None:
        expected = f"values within their message, as label {', '.join(keys)} is sealed"
        raise invalid("inputs", expected, "references to values beside it: send them over HTTP")
    plain = [to_wire(request.inputs), to_wire(request.parameters, "parameters")]
    facts = facts_of(model, request)
    sealed = seal_keys.seal_inputs(plain, tuple(keys.values()), job, model.name, facts, locality)
    outer = request_body(msgspec.structs.replace(request, inputs=sealed.value, parameters={}))
    args, kwargs, _ = _parts(outer)
    return msgspec.json.encode([args, kwargs, _parts(body)[2]])


def opened_request(request: Request, sealed: Sealed, seal_keys: SealKeys | None, *, job: str, model: str) -> Request:
    """The request of a job of a model (`name:version`), whose inputs came sealed.

    Raises:
        SealedError: they were altered, or sealed for another job, or the worker has no key.
    """
    if seal_keys is None:
        raise SealedError(f"sealed with key {', '.join(sealed.keys)}, and TAXIWAY_SEAL_KEYS has none", keys=sealed.keys)
    jobs = [job] if request.idempotency_key is None else [job, row_of(request.idempotency_key)]
    inputs, parameters = seal_keys.open_inputs(sealed, jobs=jobs, model=model.partition(":")[0])
    return msgspec.structs.replace(request, inputs=inputs, parameters=parameters)


def labels_of_sealed(sealed: Sealed, topology: Topology) -> Iterator[str | None]:
    """The localities that sealed inputs bring with them: what was found before they were sealed, and of each key.

    Raises:
        SealedError: a key is that of no label here.
    """
    yield sealed.locality
    for name, label in zip(sealed.keys, topology.locality.labels_of_keys(sealed.keys), strict=True):
        if not label:
            raise SealedError(f"inputs: sealed with key {name}, which no label of this fleet has", keys=sealed.keys)
        yield label
