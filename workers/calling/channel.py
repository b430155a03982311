"""The channel between a worker and a callable's process, one value at a time, in turns; and the errors of a call.

Values are msgpack types and numpy arrays; nothing is pickled. Short messages are sent on a socket. Arrays of more than
`SHARED_FROM` bytes and messages of more than `INLINE` are written to shared memory: a memfd, which has no name in the
file system and is freed with the last of the two processes. Neither side can shrink it.

Its first page is a board, which needs no turn: the callable's side posts its latest report there, and the worker asks
there for a yield. To post costs no system call, and the worker reads when it looks; a report that it finds half written
is read at the next look.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import socket
import struct
import zlib
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
        self, put: Callable[[memoryview], int] | None = None, view: Callable[[int, int], memoryview] | None = None
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


class CallError(Exception):
    """A call failed; its process continues. `traceback` is the callable's, empty if there is none."""

    def __init__(self, text: str, traceback: str = "") -> None:
        super().__init__(text)
        self.traceback = traceback


class ProcessLostError(CallError):
    """A call failed and its process is gone: it crashed or exceeded a limit."""


class OutOfMemoryError(ProcessLostError):
    """A call failed and its process is gone: it ran out of memory, after `calls` successful calls."""

    def __init__(self, text: str, traceback: str = "", *, calls: int) -> None:
        super().__init__(text, traceback)
        self.calls = calls


class NotWantedError(Exception):
    """The call is no longer wanted: it was not started, or was terminated with its process."""


class CallYieldedError(NotWantedError):
    """The call yielded: its run goes on later from its checkpoint. Its process continues."""


INLINE = 32 * 2**10
"""Most bytes of a message on the socket: a sixth of Linux's default packet limit."""

SHARED_BYTES_KEPT = 2**20
"""Bytes of shared memory that stay allocated between calls."""

BOARD = 16 * 2**10
"""Bytes of the board."""

MOST_POSTED = BOARD - 64
"""Most bytes of a post."""

_POST = struct.Struct("<QII")  # its number, size and checksum
_POST_AT, _POSTED_AT = 8, 64  # where these are, and its bytes; the byte at 0 asks for a yield
_ALIGNED = 64  # bytes: a cache line, and more than any element
_INLINE_PACKET, _SHARED_PACKET = b"h", b"s"  # a packet's first byte


class ClosedError(Exception):
    """The other side has closed the channel."""


class Channel:
    """One end. `memory` is the memfd's descriptor. For one thread at a time."""

    def __init__(self, connection: socket.socket, memory: int) -> None:
        self._socket = connection
        self._memory = memory
        self._map = mmap.mmap(memory, SHARED_BYTES_KEPT)
        self._end = self._highest = 0
        self._codec = ArrayCodec(self._put, self.view)
        self._posts = 0

    def set_timeout(self, seconds: float | None) -> None:
        """How long `receive` waits before it raises `TimeoutError`; None waits indefinitely."""
        self._socket.settimeout(seconds)

    def send(self, value: Any) -> None:
        """Send a value.

        Raises:
            FormError: it cannot be encoded; nothing was sent.
            ClosedError: the other side has closed the channel.
        """
        self._end = BOARD
        message = self._codec.encode(value)
        if len(message) > INLINE:
            place = [self._put(message), len(message)]
            packet = _SHARED_PACKET + msgspec.msgpack.encode(place)
        else:
            packet = _INLINE_PACKET + message
        try:
            self._socket.sendall(packet)
        except OSError as error:
            raise ClosedError from error

    def receive(self) -> Any:
        """The next value.

        Raises:
            TimeoutError: none came in time; it may come later.
            FormError: it cannot be decoded.
            ClosedError: the other side has closed the channel.
        """
        try:
            packet = self._socket.recv(INLINE + 64)
        except TimeoutError:
            raise
        except OSError as error:
            raise ClosedError from error
        if not packet:
            raise ClosedError
        try:
            if packet[:1] == _INLINE_PACKET:
                return self._codec.decode(packet[1:])
            at, size = msgspec.msgpack.decode(packet[1:], type=tuple[int, int])
            return self._codec.decode(self.view(at, size))
        except (msgspec.MsgspecError, ValueError) as error:
            raise FormError(f"{type(error).__name__}: {error}") from error

    @property
    def yield_asked(self) -> bool:
        """Whether the worker asks the call to yield."""
        return self._map[0] != 0

    @yield_asked.setter
    def yield_asked(self, asked: bool) -> None:
        self._map[0] = asked

    def post(self, content: bytes) -> None:
        """Show the worker at most `MOST_POSTED` bytes, instead of what was posted before."""
        self._posts += 1
        self._map[_POSTED_AT : _POSTED_AT + len(content)] = content
        _POST.pack_into(self._map, _POST_AT, self._posts, len(content), zlib.crc32(content))

    def posted(self) -> bytes:
        """What was posted since the last call; empty if nothing was, or it is half written."""
        number, size, checksum = _POST.unpack_from(self._map, _POST_AT)
        if number == self._posts or size > MOST_POSTED:
            return b""
        content = self._map[_POSTED_AT : _POSTED_AT + size]
        if zlib.crc32(content) != checksum:
            return b""
        self._posts = number
        return content

    def lay(self, content: bytes | memoryview) -> int:
        """Put bytes into shared memory, where they stay until this side sends more of that size; returns the offset."""
        self._end = BOARD
        return self._put(content)

    def trim(self) -> None:
        """Free the pages beyond `SHARED_BYTES_KEPT` that the last messages used."""
        if self._highest > SHARED_BYTES_KEPT:
            self._cover(self._highest)
            self._map.madvise(mmap.MADV_REMOVE, SHARED_BYTES_KEPT, len(self._map) - SHARED_BYTES_KEPT)
        self._highest = 0

    def close(self) -> None:
        """Close the channel and free the memory; the other side notices."""
        self._socket.close()
        os.close(self._memory)

    def _put(self, content: bytes | memoryview) -> int:
        """Write to shared memory; returns the offset."""
        at = -(-self._end // _ALIGNED) * _ALIGNED
        self._end = at + len(content)
        self._cover(self._end)
        self._map[at : self._end] = content
        self._highest = max(self._highest, self._end)
        return at

    def view(self, at: int, size: int) -> memoryview:
        """A part of shared memory. Raises `ValueError` if it is out of range."""
        if at < 0 or size < 0 or at + size > os.fstat(self._memory).st_size:
            raise ValueError(f"expected a range of shared memory, got {size} bytes at {at}")
        self._cover(at + size)
        self._highest = max(self._highest, at + size)
        return memoryview(self._map)[at : at + size]

    def _cover(self, end: int) -> None:
        """Extend the mapping to `end`; either side may have grown the memory."""
        if end <= len(self._map):
            return
        size = os.fstat(self._memory).st_size
        if end > size:
            size = 1 << (end - 1).bit_length()
            os.ftruncate(self._memory, size)
        self._map = mmap.mmap(self._memory, size)


def shared_memory() -> int:
    """The descriptor of a new memfd of `SHARED_BYTES_KEPT` bytes, which can grow but not shrink."""
    memory = os.memfd_create("taxiway-call", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, SHARED_BYTES_KEPT)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return memory
