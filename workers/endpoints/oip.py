"""The Open Inference Protocol v2 over HTTP, as Triton, MLServer, KServe and OpenVINO have it.

Tensors are binary for a server that announces the extension, as Triton does, else JSON.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md and extension_binary_data.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from tasks.models.discovered import MOST_MODELS, Announced, fits, tensor
from tasks.models.model import Model
from tasks.models.tensor_spec import Datatype, TensorSpec
from taxiway.contract.tensors import HEADER, SIZE, Framed, bytes_elements, bytes_part, pieces, split
from taxiway.contract.values import raw_bytes, to_array
from taxiway.errors import ExecutionError, InvalidRequestError, TaxiwayError, invalid, wrong_field
from workers.endpoints.protocol import AskItem, Discovery, EngineRequest, ServedModel, WholeReader, decoded, malformed
from workers.pipelines.tensors import TensorPipeline, plain_row, read_output
from workers.port import Row

HEALTH, ABOUT = "/v2/health/ready", "/v2"
"""What a server answers with 200 once it serves, and where it announces its extensions."""

BINARY = "binary_tensor_data"
"""The extension for tensors after the JSON."""


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class _Answer(msgspec.Struct, frozen=True):
    outputs: list[_Tensor]


class _About(msgspec.Struct, frozen=True):
    extensions: list[str] = []


class _Indexed(msgspec.Struct, frozen=True):
    name: str
    state: str = ""


class _Described(msgspec.Struct, frozen=True):
    name: str
    datatype: Datatype
    shape: list[int]


class _Metadata(msgspec.Struct, frozen=True):
    inputs: list[_Described] = []
    outputs: list[_Described] = []


_about = msgspec.json.Decoder(_About).decode
_index = msgspec.json.Decoder(list[_Indexed]).decode
_metadata = msgspec.json.Decoder(_Metadata).decode
_answer = msgspec.json.Decoder(_Answer).decode


def prepare(served: ServedModel, row: Row, parameters: Mapping[str, Any]) -> AskItem:
    """See `protocol.EndpointProtocol`."""
    model, binary = served.model, BINARY in served.extensions
    item = TensorPipeline(model).prepare(row, parameters)
    encode = _encoded if binary else _plain
    tensors = [encode(spec, item.arrays[spec.name]) for spec in model.inputs if spec.name in item.arrays]
    given = {key: value for key, value in parameters.items() if value is not None}
    asked = {"parameters": {"binary_data": True}} if binary else {}
    body = {
        "inputs": [described for described, _ in tensors],
        "outputs": [{"name": spec.called, **asked} for spec in model.outputs],
        **({"parameters": given} if given else {}),
    }
    framed = Framed(msgspec.json.encode(body), [part for _, part in tensors if binary])

    def read(answered: Mapping[str, str]) -> WholeReader:
        return WholeReader(lambda raw: _parse(model, raw, answered.get(HEADER)))

    path = f"/v2/models/{quote(served.called, safe='')}/infer"
    return AskItem(item.arrays, item.size, parameters, ask=EngineRequest(path, framed.body, read, framed.headers))


def extensions(body: bytes) -> Collection[str]:
    """See `protocol.EndpointProtocol`."""
    return frozenset(decoded(_about, body).extensions)


def announced(body: bytes) -> Sequence[str] | None:
    """Nothing: readiness lists no models."""
    return None


def discover() -> Discovery:
    """See `protocol.EndpointProtocol`. A model without a batch axis in each tensor is left out."""
    index = decoded(_index, (yield "POST", "/v2/repository/index", b"{}"))
    found: dict[str, Announced] = {}
    for one in index[:MOST_MODELS]:
        if one.state in ("", "READY") and one.name not in found:
            described = decoded(_metadata, (yield "GET", f"/v2/models/{quote(one.name, safe='')}", b""))
            announced = Announced("tensors", _specs(described.inputs), _specs(described.outputs))
            if fits(announced):
                found[one.name] = announced
    return found


def _specs(tensors: Sequence[_Described]) -> tuple[TensorSpec, ...]:
    return tuple(tensor(one.name, one.datatype, one.shape) for one in tensors)


def _encoded(spec: TensorSpec, row: np.ndarray) -> tuple[dict[str, Any], bytes | memoryview]:
    """A tensor's description and its binary data, with the row on its batch axis."""
    array = _batched(spec, row)
    if spec.datatype == "BYTES":
        part: bytes | memoryview = bytes_part([_as_bytes(spec, element) for element in array.reshape(-1)])
    else:
        part = raw_bytes(array)
    shape, size = list(array.shape), len(part)
    return {"name": spec.called, "shape": shape, "datatype": spec.datatype, "parameters": {SIZE: size}}, part


def _plain(spec: TensorSpec, row: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """A tensor with its elements in JSON, with the row on its batch axis."""
    array = _batched(spec, row)
    elements = array.reshape(-1).tolist()
    if spec.datatype == "BYTES":
        elements = [_as_text(spec, element) for element in elements]
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        raise wrong_field(f"inputs.{spec.name}", "finite numbers, as the endpoint reads JSON alone", "others")
    return {"name": spec.called, "shape": list(array.shape), "datatype": spec.datatype, "data": elements}, b""


def _batched(spec: TensorSpec, row: np.ndarray) -> np.ndarray:
    return row if spec.batch_axis is None else np.expand_dims(row, spec.batch_axis)


def _as_text(spec: TensorSpec, element: Any) -> str:
    try:
        return _as_bytes(spec, element).decode()
    except UnicodeDecodeError as error:
        raise wrong_field(f"inputs.{spec.name}", "text, as the endpoint reads JSON alone", element) from error


def _as_bytes(spec: TensorSpec, element: Any) -> bytes:
    if isinstance(element, str):
        return element.encode()
    if isinstance(element, bytes):
        return element
    field = f"inputs.{spec.name}"
    raise invalid(field, "text or bytes", type(element).__name__)


def _parse(model: Model, raw: bytes, header_length: str | None) -> Row:
    """The outputs of a request of one row."""
    try:
        text, rest = split(raw, header_length)
        outputs = _answer(bytes(text)).outputs
        parts = pieces([output.parameters.get(SIZE) for output in outputs], rest)
        arrays = {output.name: _decoded(output, part) for output, part in zip(outputs, parts, strict=True)}
        return plain_row({spec.name: read_output(spec, arrays.get(spec.called), 1) for spec in model.outputs})
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidRequestError, ExecutionError) as error:
        raise malformed(error.message if isinstance(error, TaxiwayError) else str(error)) from error


def _decoded(output: _Tensor, part: memoryview | None) -> np.ndarray:
    data = output.data if part is None else part
    if output.datatype != "BYTES":
        return to_array({"datatype": output.datatype, "shape": output.shape, "data": data}, output.name)
    if any(length < 0 for length in output.shape):
        raise malformed(f"{output.name}: shape {output.shape}")
    count = int(np.prod(output.shape))
    elements = data if part is None else [_text(one) for one in bytes_elements(part, count, output.name)]
    if not isinstance(elements, list) or len(elements) != count:
        raise malformed(f"{output.name}: expected {count} elements")
    array = np.empty(count, object)
    array[:] = elements
    return array.reshape(output.shape)


def _text(element: bytes) -> str | bytes:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return element
