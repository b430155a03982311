"""`python -m workers.calling.callee SOCKET MEMORY LIFE`: imports a callable and serves calls until the worker exits.

A run's state travels in one of four forms. Whatever the callable raises or returns becomes a readable answer. Its
stdout goes to stderr, the worker's log, because a worker announces on stdout that it is ready.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import inspect
import io
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tasks.models.files import Code
from taxiway.errors import TaxiwayError
from taxiway.run import Run
from workers.calling.channel import (
    RAW,
    ArrayCodec,
    Channel,
    ClosedError,
    FormError,
    array_from,
    raw_bytes,
    wide_integer,
)
from workers.decide.faults import text_of

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


TEXT = 4096
"""Most bytes of an error's text."""

TRACEBACK = 64 * 2**10
"""Most bytes of a traceback; the end is kept, where the error is."""

RAISED, REFUSED, STARVED, ANSWERED, YIELDED = "raised", "refused", "starved", "answered", "yielded"
"""Kinds of answers: the callable raised; it raised a taxiway error; it ran out of memory; it returned; it yielded."""

TAKES_RUN = "takes_run"
"""In the answer to the import: whether the callable has a parameter annotated `Run`."""

Call = Callable[..., Mapping[str, Any]]


def main(connection: int, memory: int, life: int) -> None:
    """Serve calls."""
    _end_with_worker(life)
    _prepare_process()
    with socket.socket(fileno=connection) as end, contextlib.suppress(ClosedError):
        channel = Channel(end, memory)
        call = _imported(channel)
        own = os.getpid()
        while call is not None:
            answer = _answer(call, channel, *channel.receive())
            if os.getpid() != own:
                os._exit(os.EX_OK)  # a process that the callable forked and that returned from the call, too
            _reply(channel, answer)


def _imported(channel: Channel) -> Call | None:
    """Import the callable that the worker names and report it; None if the import failed."""
    code = Code(channel.receive())
    try:
        call: Call = code.load()
    except BaseException as error:  # a module may raise anything, even SystemExit
        channel.send(_failure(error))
        return None
    channel.send([ANSWERED, {TAKES_RUN: run_parameter(call) is not None}])
    return call


def run_parameter(call: Call) -> str | None:
    """The name of the parameter that is annotated `Run`; None without one."""
    with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
        for name, parameter in inspect.signature(call).parameters.items():
            if parameter.annotation in (Run, "Run", "taxiway.Run"):
                return name
    return None


def _answer(call: Call, channel: Channel, inputs: Mapping[str, np.ndarray], restored: Any) -> list[Any]:
    """`restored` is the form and the bytes of a checkpoint; None without one."""
    state = None
    try:
        arguments: dict[str, Any] = {name: array[()] for name, array in inputs.items()}
        if (run := run_parameter(call)) is not None:
            state = unpacked(restored[0], restored[1].data) if restored is not None else None
            arguments[run] = ServedRun(channel, state)
        given = call(**arguments)
        return [ANSWERED, {name: _as_array(value) for name, value in given.items()}]
    except YieldedError:
        return [YIELDED, {}]
    except BaseException as error:  # SystemExit and the like end the call, not the process
        return _failure(error)
    finally:
        if isinstance(state, Path):
            state.unlink(missing_ok=True)


def _as_array(value: Any) -> np.ndarray:
    """The value as an array; a ragged list becomes one element."""
    try:
        return np.asarray(value)
    except ValueError:
        array = np.empty((), object)
        array[()] = value
        return array


def _failure(error: BaseException) -> list[Any]:
    text = _cut(text_of(error), TEXT)
    if isinstance(error, TaxiwayError):
        return [REFUSED, type(error).__name__, text, error.details]
    kind = STARVED if isinstance(error, MemoryError) else RAISED
    return [kind, _cut(f"{type(error).__name__}: {text}", TEXT), _trace(error)]


def _reply(channel: Channel, answer: list[Any]) -> None:
    try:
        channel.send(answer)
    except FormError as error:
        channel.send([RAISED, _cut(f"its answer cannot be sent: {error}", TEXT), ""])
    except MemoryError as error:
        channel.send(_failure(error))


def _trace(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as second:
        return f"no traceback: {type(second).__name__}"
    return _clean(text)[-TRACEBACK:]


def _cut(text: str, most: int) -> str:
    return _clean(text).encode()[:most].decode(errors="ignore")


def _clean(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def _end_with_worker(life: int) -> None:
    """Have Linux kill this process's group when the worker, which alone has the pipe's other end, is gone: fcntl(2).

    That holds after `kill -9` too, and whatever the callable does meanwhile.
    """
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([life], [], [], 0)[0]:  # it is gone already
        os.killpg(0, signal.SIGKILL)


def _prepare_process() -> None:
    """Prepare the process: readable output, a traceback on a crash, and first choice of the out-of-memory killer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
