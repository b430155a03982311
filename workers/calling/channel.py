"""The channel between a worker and a callable's process, one value at a time, in turns; and the errors of a call.

Values are msgpack types and numpy arrays; nothing is pickled. Short messages are sent on a socket. Arrays of more than
`SHARED_FROM` bytes and messages of more than `INLINE` are written to shared memory: a memfd, which has no name in the
file system and is freed with the last of the two processes. Neither side can shrink it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import socket
from typing import Any

import msgspec
import numpy as np


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


INLINE = 32 * 2**10
"""Most bytes of a message on the socket: a sixth of Linux's default packet limit."""

SHARED_FROM = 4 * 2**10
"""Most bytes of an array inside a message."""

SHARED_BYTES_KEPT = 2**20
"""Bytes of shared memory that stay allocated between calls."""

_ALIGNED = 64  # bytes: a cache line, and more than any element
_RAW = "biufcSMm"  # kinds of dtype (numpy's letters) that are sent as raw bytes
_ONE_BY_ONE = "OU"  # and those sent as a list of values: text is validated, and shorter
_ARRAY, _OBJECTS = 1, 2  # codes of msgpack's extensions
_INLINE_PACKET, _SHARED_PACKET = b"h", b"s"  # a packet's first byte


class ClosedError(Exception):
    """The other side has closed the channel."""


class FormError(Exception):
    """A value cannot be sent, or a message cannot be read; the text gives the reason."""


class Channel:
    """One end. `memory` is the memfd's descriptor. For one thread at a time."""

    def __init__(self, connection: socket.socket, memory: int) -> None:
        self._socket = connection
        self._memory = memory
        self._map = mmap.mmap(memory, SHARED_BYTES_KEPT)
        self._end = self._highest = 0
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self._read_extension)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._extension)

    def set_timeout(self, seconds: float | None) -> None:
        """How long `receive` waits before it raises `TimeoutError`; None waits indefinitely."""
        self._socket.settimeout(seconds)

    def send(self, value: Any) -> None:
        """Send a value.

        Raises:
            FormError: it cannot be encoded; nothing was sent.
            ClosedError: the other side has closed the channel.
        """
        self._end = 0
        try:
            message = self._encoder.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise FormError(f"{type(error).__name__}: {error}") from error
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
                return self._decoder.decode(packet[1:])
            at, size = msgspec.msgpack.decode(packet[1:], type=tuple[int, int])
            return self._decoder.decode(self._view(at, size))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FormError(f"{type(error).__name__}: {error}") from error

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

    def _extension(self, value: Any) -> Any:
        """Encode what msgspec cannot encode itself."""
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a value of type {type(value).__name__} cannot be sent")
        if value.dtype.kind in _ONE_BY_ONE:
            return msgspec.msgpack.Ext(_OBJECTS, self._nested([value.shape, list(value.flat)]))
        if value.dtype.kind not in _RAW:
            raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
        at, content = -1, b""
        if value.nbytes > SHARED_FROM:
            at = self._put(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        else:
            content = value.tobytes()
        return msgspec.msgpack.Ext(_ARRAY, self._nested([value.dtype.str, value.shape, at, content]))

    def _nested(self, value: Any) -> bytes:
        return msgspec.msgpack.encode(value, enc_hook=self._extension)

    def _read_extension(self, code: int, data: memoryview) -> Any:
        if code == _OBJECTS:
            shape, elements = self._decoder.decode(data)
            return _objects(elements).reshape(shape)
        if code != _ARRAY:
            raise ValueError(f"expected an array, got extension {code}")
        name, shape, at, content = msgspec.msgpack.decode(data, type=tuple[str, list[int], int, bytes])
        dtype = np.dtype(name)
        if dtype.kind not in _RAW:
            raise ValueError(f"expected an array of plain elements, got {name}")
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return np.zeros(shape, dtype)
        source = content if at < 0 else self._view(at, size)
        return np.frombuffer(source, dtype, math.prod(shape)).copy().reshape(shape)

    def _put(self, content: bytes | memoryview) -> int:
        """Write to shared memory; returns the offset."""
        at = -(-self._end // _ALIGNED) * _ALIGNED
        self._end = at + len(content)
        self._cover(self._end)
        self._map[at : self._end] = content
        self._highest = max(self._highest, self._end)
        return at

    def _view(self, at: int, size: int) -> memoryview:
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


def _objects(elements: list[Any]) -> np.ndarray:
    """A flat object array of the values themselves, even if they are lists or arrays."""
    array = np.empty(len(elements), object)
    for index, element in enumerate(elements):
        array[index] = element
    return array
