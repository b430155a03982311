"""Reads an infer request's body in short calls, however large its JSON.

A call that decodes JSON holds the interpreter lock throughout. Numeric tensor data is therefore left as text at first,
and then read in pieces; everything else is limited to what one call decodes in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import numpy as np

from router.http.protocol import InferRequest, InputTensor, field_of
from taxiway.contract import binary
from taxiway.contract.amounts import AT_ONCE, ELEMENTS, LARGE, check_json, elements_of
from taxiway.contract.blobs import Buffer
from taxiway.contract.quoting import cut, quoted
from taxiway.contract.values import DATATYPES, numbers, raw_bytes
from taxiway.errors import InvalidRequestError, wrong_field

T = TypeVar("T")

PIECE = 2**14
"""Bytes of numbers decoded per call: 2 ms; 50 ms if every number is as slow to parse as possible."""

_NULL, _EMPTY = msgspec.Raw(b"null"), msgspec.Raw(b"{}")
_NO_LISTS = b"[] \t\r\n"
_BUT_LISTS = bytes(set(range(256)) - set(b"[],"))


class _LargeTensor(msgspec.Struct, frozen=True):
    """An input of which only name and datatype are decoded."""

    name: str
    shape: msgspec.Raw
    datatype: str
    data: msgspec.Raw = _NULL
    parameters: msgspec.Raw = _EMPTY

    @property
    def has_numbers(self) -> bool:
        """Whether its data can be read in pieces: numbers, possibly in lists."""
        data = bytes(self.data)
        return self.datatype in DATATYPES and data != b"null" and b'"' not in data and b"{" not in data


class _LargeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An infer request whose inputs are decoded in part, and the rest not at all."""

    inputs: list[_LargeTensor]
    id: msgspec.Raw = _NULL
    parameters: msgspec.Raw = _EMPTY
    outputs: msgspec.Raw = msgspec.Raw(b"[]")


_decode = msgspec.json.Decoder(InferRequest).decode
_decode_large = msgspec.json.Decoder(_LargeRequest).decode
_encode = msgspec.json.Encoder().encode
_decode_list = msgspec.json.Decoder(list[Any]).decode


def read_infer(body: Buffer, header_length: str | None = None, most: int = ELEMENTS) -> InferRequest:
    """The infer request in `body`; `header_length` is the header that says where its binary part begins.

    Raises:
        InvalidRequestError: names the wrong field.
        RequestTooLargeError: more than `most` values in its JSON, or more than a fifth of that outside numeric tensors.
    """
    text, rest = binary.split(body, header_length)
    infer = _read_json(text, _decode) if len(text) <= LARGE else _read_large(text, most)
    sizes = [_binary_size(tensor) for tensor in infer.inputs]
    if not rest and all(size is None for size in sizes):
        return infer
    pairs = zip(infer.inputs, binary.pieces(sizes, rest), strict=True)
    inputs = [tensor if piece is None else msgspec.structs.replace(tensor, data=piece) for tensor, piece in pairs]
    return msgspec.structs.replace(infer, inputs=inputs)


def _binary_size(tensor: InputTensor) -> object:
    """The number of bytes after the JSON that belong to the tensor; None if its data is in the JSON."""
    size = tensor.parameters.get(binary.SIZE)
    if (size is None) == (tensor.data is None):
        field = field_of(tensor)
        raise InvalidRequestError(f"{field}: expected either data or the parameter {binary.SIZE}", field=field)
    return size


def _read_json(text: Buffer, decode: Callable[[Buffer], T]) -> T:
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.rstrip("`").lstrip(".") or "body"
        raise InvalidRequestError(f"{cut(field)}: {cut(what[0].lower() + what[1:])}", field=field) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"body: expected JSON: {cut(str(error))}", field="body") from error


def _read_large(text: Buffer, most: int) -> InferRequest:
    check_json(text, most)
    large = _read_json(text, _decode_large)
    inputs = [msgspec.structs.replace(one, data=_NULL) if one.has_numbers else one for one in large.inputs]
    rest = _encode(msgspec.structs.replace(large, inputs=inputs))
    check_json(rest, most // AT_ONCE)
    infer = _read_json(rest, _decode)
    pairs = zip(infer.inputs, large.inputs, strict=True)
    tensors = [_with_numbers(tensor, bytes(one.data)) if one.has_numbers else tensor for tensor, one in pairs]
    return msgspec.structs.replace(infer, inputs=tensors)


def _with_numbers(tensor: InputTensor, text: bytes) -> InputTensor:
    """The tensor with the numbers in its JSON data: raw, row-major and little-endian.

    Raises:
        InvalidRequestError: lists of unequal lengths, or not numbers of its datatype.
    """
    field = field_of(tensor)
    lists = text.translate(None, _BUT_LISTS)
    if lists.count(b"[") > 1 and lists != _lists(tensor.shape, field, len(text)):
        raise wrong_field(field, f"one list, or lists in lists by the shape {quoted(tensor.shape)}", "others")
    pieces = [numbers(_decode_piece(piece, field), tensor.datatype, field) for piece in _pieces(text)]
    array = np.concatenate(pieces) if pieces else np.empty(0, DATATYPES[tensor.datatype])
    return msgspec.structs.replace(tensor, data=raw_bytes(array))


def _pieces(text: bytes) -> Iterator[bytes]:
    """The numbers in nested lists, as flat lists of limited length."""
    flat = text.translate(None, _NO_LISTS)
    if not flat.strip(b","):  # lists of no elements
        return
    start = 0
    while start < len(flat):
        end = flat.find(b",", start + PIECE)
        end = len(flat) if end < 0 else end
        yield b"[%s]" % flat[start:end]
        start = end + 1


def _decode_piece(piece: bytes, field: str) -> list[Any]:
    try:
        return _decode_list(piece)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{field}: expected numbers: {cut(str(error))}", field=field) from error


def _lists(shape: list[int], field: str, most: int) -> bytes:
    """The brackets and commas of nested lists with this shape."""
    elements_of(shape, field, most)
    lists = b""
    for length in reversed(shape):
        lists = b"[%s]" % b",".join([lists] * length)
    return lists
