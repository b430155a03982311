"""MessagePack with numpy arrays. Nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

SHARED_FROM = 4 * 2**10
"""Most bytes of an array inside a message, where larger ones have a place beside it."""

RAW = "biufcSMm"
"""Kinds of dtype (numpy's letters) that are sent as raw bytes."""

_ONE_BY_ONE = "OU"  # those sent as a list of values: text is validated, and shorter
_ARRAY, _OBJECTS, _INTEGER = 1, 2, 3  # codes of msgpack's extensions


class FormError(Exception):
    """A value cannot be encoded, or a message cannot be read; the text gives the reason."""


class ArrayCodec:
    """Encodes and decodes values.

    Args:
        put: writes the bytes of a large array beside the message and returns their offset; without it arrays are
            inside.
        view: the bytes at an offset, of so many bytes.
    """

    def __init__(
        self,
        put: Callable[[memoryview], int] | None = None,
        view: Callable[[int, int], memoryview] | None = None,
    ) -> None:
        self._put, self._view = put, view
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self._read_extension)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._extension)

    def encode(self, value: Any) -> bytes:
        """The value as bytes. Raises `FormError`."""
        try:
            return self._encoder.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise FormError(f"{type(error).__name__}: {error}") from error

    def decode(self, content: bytes | memoryview) -> Any:
        """The value in these bytes. Raises `FormError`."""
        try:
            return self._decoder.decode(content)
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FormError(f"{type(error).__name__}: {error}") from error

    def _extension(self, value: Any) -> Any:
        """Encode what msgspec cannot encode itself."""
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a value of type {type(value).__name__} cannot be sent")
        if value.dtype.kind in _ONE_BY_ONE:
            return msgspec.msgpack.Ext(_OBJECTS, self._nested([value.shape, list(value.flat)]))
        if value.dtype.kind not in RAW:
            raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
        at, content = -1, b""
        if self._put is not None and value.nbytes > SHARED_FROM:
            at = self._put(raw_bytes(value))
        else:
            content = value.tobytes()
        return msgspec.msgpack.Ext(_ARRAY, self._nested([value.dtype.str, value.shape, at, content]))

    def _nested(self, value: Any) -> bytes:
        return msgspec.msgpack.encode(value, enc_hook=self._extension)

    def _read_extension(self, code: int, data: memoryview) -> Any:
        if code == _OBJECTS:
            shape, elements = self._decoder.decode(data)
            return _objects(elements).reshape(shape)
        if code == _INTEGER:
            return int.from_bytes(data, "little", signed=True)
        if code != _ARRAY:
            raise ValueError(f"expected an array, got extension {code}")
        name, shape, at, content = msgspec.msgpack.decode(data, type=tuple[str, list[int], int, bytes])
        if at < 0:
            return array_from(name, shape, content)
        if self._view is None:
            raise ValueError("expected an array with its elements")
        return array_from(name, shape, self._view(at, math.prod(shape) * np.dtype(name).itemsize))


def wide_integer(value: int) -> msgspec.msgpack.Ext:
    """An integer of more than 64 bits, which decodes as such."""
    return msgspec.msgpack.Ext(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's elements, in C order; not copied if they are in this order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def array_from(name: str, shape: list[int], content: bytes | memoryview) -> np.ndarray:
    """A new array of a dtype (by its `str`) and shape, from its elements in C order.

    Raises:
        ValueError: these are not so many elements, or no plain ones.
        TypeError: there is no such dtype.
    """
    dtype, count = np.dtype(name), math.prod(shape)
    if dtype.kind not in RAW:
        raise ValueError(f"expected an array of plain elements, got {name}")
    if count * dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype, count).copy().reshape(shape)


def _objects(elements: list[Any]) -> np.ndarray:
    """A flat object array of the values themselves, even if they are lists or arrays."""
    array = np.empty(len(elements), object)
    for index, element in enumerate(elements):
        array[index] = element
    return array
