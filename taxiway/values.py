"""How values that JSON lacks cross the wire: bytes as Celery's own JSON writes them, arrays as OIP tensors.

Sources: kombu's JSON serializer (`{"__type__": "base64", "__value__": …}`), so that a producer with nothing but
Celery sends and reads the same form; and the Open Inference Protocol v2 (`name, shape, datatype, data`). A tensor's
`data` may also be bytes: the elements in row-major order, little-endian, as in OIP's binary extension.
"""

from __future__ import annotations

import base64
import binascii
import sys
from typing import TYPE_CHECKING, Any

from taxiway.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
"""OIP datatype to numpy's name, without BYTES."""

_OIP = {name: datatype for datatype, name in DATATYPES.items()}


def to_wire(value: Any) -> Any:
    """`value` in plain JSON values: bytes and arrays become their tagged forms.

    Raises:
        InvalidRequestError: a value that has no form on the wire.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"__type__": "base64", "__value__": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        return {str(key): to_wire(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_wire(below) for below in value]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _tensor(value)
    raise InvalidRequestError(
        f"inputs: expected JSON values, bytes or numpy arrays, got {type(value).__name__}", field="inputs"
    )


def from_wire(value: Any) -> Any:
    """The inverse of `to_wire`, except that tensors stay mappings (`to_array` reads one).

    Raises:
        InvalidRequestError: a tagged value that does not decode.
    """
    if isinstance(value, list):
        return [from_wire(below) for below in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__type__", "__value__"}:
        return _untag(value["__type__"], value["__value__"])
    return {key: from_wire(below) for key, below in value.items()}


def is_tensor(value: Any) -> bool:
    """Whether `value` is an OIP tensor: a mapping with `shape`, `datatype` and `data`."""
    return isinstance(value, dict) and {"shape", "datatype", "data"} <= value.keys()


def to_array(tensor: dict[str, Any], field: str) -> np.ndarray:
    """The numpy array of an OIP tensor of any datatype but BYTES; bytes in `data` are not copied.

    Raises:
        InvalidRequestError: unknown datatype, or data that does not fill the shape; names `field`.
    """
    import numpy as np

    datatype, shape, data = tensor["datatype"], tensor["shape"], tensor["data"]
    if datatype not in DATATYPES:
        raise InvalidRequestError(f"{field}: expected a datatype of {sorted(DATATYPES)}, got {datatype!r}", field=field)
    try:
        dtype = np.dtype(DATATYPES[datatype]).newbyteorder("<")
        flat = np.frombuffer(data, dtype) if isinstance(data, bytes) else np.asarray(data, dtype).reshape(-1)
        return flat.reshape([int(n) for n in shape])
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequestError(
            f"{field}: expected {datatype} data of shape {shape}: {error}", field=field
        ) from error


def _tensor(array: np.ndarray) -> dict[str, Any]:
    datatype = _OIP.get(array.dtype.name)
    if datatype is None:
        raise InvalidRequestError(
            f"inputs: expected an array of {sorted(_OIP)}, got dtype {array.dtype.name}", field="inputs"
        )
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {"shape": list(array.shape), "datatype": datatype, "data": to_wire(little.tobytes())}


def _untag(tag: Any, value: Any) -> Any:
    if not isinstance(value, str) or tag not in ("base64", "bytes"):
        raise InvalidRequestError(f"inputs: expected a value tagged base64 or bytes, got tag {tag!r}", field="inputs")
    if tag == "bytes":
        return value.encode()
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"inputs: expected base64: {error}", field="inputs") from error
