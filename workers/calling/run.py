"""A callable's run in its process, and the forms in which states travel."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from taxiway.run import Run
from workers.calling.arrays import RAW, ArrayCodec, FormError, array_from, raw_bytes, wide_integer
from workers.calling.channel import Channel

CHECKPOINT = "checkpoint"
"""Kind of a message in the course of a call: its form, whether it is portable, and where its bytes lie."""

_BYTES, _FILE, _ARRAY, _PACKED = "bytes", "file", "array", "packed"  # forms; that of an array has dtype and shape

_codec = ArrayCodec()


class YieldedError(BaseException):
    """Ends a call that yielded. No error, so that a callable's `except Exception` does not catch it."""


class ServedRun(Run):
    """A run for a worker at the other end of the channel."""

    def __init__(self, channel: Channel, restored: Any) -> None:
        super().__init__(restored)
        self._channel = channel

    @property
    def should_yield(self) -> bool:
        """Whether the callable should write a checkpoint now."""
        return self._channel.yield_asked

    def checkpoint(self, state: Any, *, portable: bool = True) -> bool:
        """Save a state; see `Run.checkpoint`."""
        form, content = packed(state)
        self._channel.send([CHECKPOINT, form, portable, self._channel.lay(content), len(content)])
        kept, yields = self._channel.receive()
        if kept and yields:
            raise YieldedError
        return bool(kept)

    def _post(self, report: bytes) -> None:
        self._channel.post(report)


def packed(state: Any) -> tuple[str, bytes | memoryview]:
    """A state's form and bytes. Raises `TypeError`."""
    if isinstance(state, (bytes, bytearray, memoryview)):
        return _BYTES, bytes(state)
    if isinstance(state, Path):
        return _FILE, state.read_bytes()
    if isinstance(state, np.ndarray) and state.dtype.kind in RAW:
        return f"{_ARRAY} {msgspec.json.encode([state.dtype.str, state.shape]).decode()}", raw_bytes(state)
    if not isinstance(state, (Mapping, np.ndarray)):
        raise TypeError(f"checkpoint: expected bytes, a numpy array, a mapping or a Path, got {type(state).__name__}")
    try:
        return _PACKED, _codec.encode(_with_wide_integers(state))
    except FormError as error:
        raise TypeError(f"checkpoint: {error}") from error


def _with_wide_integers(value: Any) -> Any:
    """The value, its integers of more than 64 bits as MessagePack can have them: numpy's generators have such."""
    if isinstance(value, Mapping):
        return {name: _with_wide_integers(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_wide_integers(one) for one in value]
    wide = isinstance(value, int) and not -(2**63) <= value < 2**64
    return wide_integer(value) if wide else value


def unpacked(form: str, content: bytes | memoryview) -> Any:
    """The state of this form and these bytes.

    Raises:
        FormError: they are not of this form.
    """
    kind, _, facts = form.partition(" ")
    if kind == _BYTES:
        return bytes(content)
    if kind == _FILE:
        with tempfile.NamedTemporaryFile(prefix="taxiway-checkpoint-", delete=False) as file:
            file.write(content)
        return Path(file.name)
    if kind == _PACKED:
        return _codec.decode(content)
    try:
        return array_from(*msgspec.json.decode(facts, type=tuple[str, list[int]]), content)
    except (ValueError, TypeError) as error:
        raise FormError(f"expected a state, got the form {form!r}: {error}") from error
