"""The worker's side of a callable's process: starts it, calls it, watches it, and kills it with its descendants."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from tasks.models.files import Code
from taxiway.errors import error_from
from workers.calling.callee import ANSWERED, CHECKPOINT, REFUSED, STARVED, TAKES_RUN, YIELDED
from workers.calling.channel import (
    CallError,
    CallYieldedError,
    Channel,
    ClosedError,
    FormError,
    NotWantedError,
    OutOfMemoryError,
    ProcessLostError,
    shared_memory,
)

CHECK_EVERY = 0.02
"""Seconds between two checks of whether a call is still wanted, in time and within its memory."""

LOOK_AROUND = 0.5
"""Seconds between two checks of the callable's descendants: each reads all of /proc."""

KILL_AFTER = 0.2
"""Seconds between SIGTERM and SIGKILL, during which the device waits."""

_PRIVATE = ("TAXIWAY_BROKER", "TAXIWAY_AMQP", "TAXIWAY_SECRET", "TAXIWAY_PRODUCER_SECRET", "TAXIWAY_SEAL_KEYS")
"""Variables with passwords and keys, which no callable needs."""


class FollowedRun:
    """A run that is not followed: it starts from nothing, and nothing is kept of it. Those of jobs override this."""

    restored: tuple[str, np.ndarray] | None = None
    """The form and bytes of the state that the run goes on from."""

    @property
    def yield_asked(self) -> bool:
        """Whether the run is to yield."""
        return False

    def look(self, report: bytes) -> None:
        """Take note of the latest report, in JSON; empty if there is no new one. Called at each look at the call."""

    def keep(self, form: str, content: memoryview, *, portable: bool) -> bool:
        """Keep a checkpoint, whose bytes are gone afterwards; whether that was done."""
        return True


UNFOLLOWED = FollowedRun()
"""The run of a call that no job asked for."""


class Child:
    """A process with one imported callable. One thread at a time may call it; any thread may `end` it between calls.

    Args:
        code: the function to call.
        memory: most bytes in memory of the process and its descendants; 0 for no limit.

    `calls` counts the successful calls. `takes_run` says, once it is ready, whether the callable has a `Run`.
    """

    def __init__(self, code: Code, *, memory: int = 0) -> None:
        self._memory = memory
        self._ending = threading.Lock()
        self.calls = 0
        self.takes_run = False
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        shared = shared_memory()
        self._channel: Channel | None = Channel(ours, shared)
        self._channel.set_timeout(CHECK_EVERY)
        watched, self._life = os.pipe()
        with its:
            try:
                self._process = _start(its.fileno(), shared, watched)
            except OSError:
                self._channel.close()
                os.close(self._life)
                raise
            finally:
                os.close(watched)
        self.pid = self._process.pid
        with suppress(ClosedError):  # `await_ready` raises it
            self._channel.send(code.reference)

    @property
    def alive(self) -> bool:
        """Whether it was not ended. Thread-safe."""
        return self._channel is not None

    def await_ready(self) -> None:
        """Wait until the callable is imported.

        Raises:
            CallError: the import failed; the process is gone.
        """
        try:
            self.takes_run = bool(self._answer(lambda: None, UNFOLLOWED)[TAKES_RUN])
        except CallError:
            self.end()
            raise

    def call(
        self, inputs: Mapping[str, np.ndarray], check: Callable[[], None], run: FollowedRun = UNFOLLOWED
    ) -> Mapping[str, np.ndarray]:
        """Call the callable; returns an array for each output name.

        Args:
            inputs: an array for each argument; the callable gets the element of a 0-dimensional one.
            check: called about fifty times a second during the call. If it raises, the process is ended and the error
                raised: `NotWantedError`, or a `ProcessLostError` that names the exceeded limit.
            run: the call's run, for a callable that has a `Run`.

        Raises:
            CallYieldedError: the call yielded.
            CallError: the call failed; `alive` tells whether the process continues.
            TaxiwayError: the callable raised it.
        """
        check()
        channel = self._open()
        channel.posted()  # of an earlier call
        channel.yield_asked = run.yield_asked
        try:
            channel.send([inputs, run.restored])
        except FormError as error:
            raise CallError(f"its inputs cannot be sent to the callable: {error}") from error
        except ClosedError as error:
            raise self._lost() from error
        answer = self._answer(check, run)
        self.calls += 1
        channel.trim()
        return answer

    def memory(self) -> int:
        """Bytes of the process in memory, without descendants; 0 after `end`. Thread-safe."""
        if not self.alive:
            return 0
        return _memory(self.pid)

    def end(self) -> None:
        """Kill the process and its descendants within `KILL_AFTER`."""
        with self._ending:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
                _signal_group(self.pid, signal.SIGTERM)
                _await_exit(self.pid)
                _signal_group(
                    self.pid, signal.SIGKILL
                )  # before it is reaped: until then the group's id cannot be reused
                self._process.wait()
                _reap(self.pid)
                os.close(self._life)

    def _answer(self, check: Callable[[], None], run: FollowedRun) -> Mapping[str, np.ndarray]:
        channel, look_around = self._open(), time.monotonic() + LOOK_AROUND
        while True:
            try:
                match channel.receive():
                    case [str(kind), str(form), bool(portable), int(at), int(size)] if kind == CHECKPOINT:
                        self._look(channel, run)
                        kept = run.keep(form, channel.view(at, size), portable=portable)
                        channel.send([kept, channel.yield_asked])
                    case answer:
                        return self._read(answer)
            except TimeoutError:
                self._look(channel, run)
            except ClosedError as error:
                raise self._lost() from error
            except (FormError, ValueError) as error:
                self.end()
                raise ProcessLostError(f"its answer cannot be read: {error}") from error
            whole_group = time.monotonic() >= look_around
            look_around += LOOK_AROUND if whole_group else 0.0
            self._watch(check, whole_group=whole_group)

    def _look(self, channel: Channel, run: FollowedRun) -> None:
        """Take over the latest report, and pass on whether the run is to yield."""
        try:
            run.look(channel.posted())
        except msgspec.MsgspecError as error:
            self.end()
            raise ProcessLostError(f"its report cannot be read: {error}") from error
        channel.yield_asked = run.yield_asked

    def _read(self, answer: Any) -> Mapping[str, np.ndarray]:
        match answer:
            case [str(kind), dict(outputs)] if kind == ANSWERED:
                return outputs
            case [str(kind), dict()] if kind == YIELDED:
                raise CallYieldedError
            case [str(kind), str(name), str(text), dict(details)] if kind == REFUSED:
                raise error_from(name, text, {key: value for key, value in details.items() if isinstance(key, str)})
            case [str(kind), str(text), str(traceback)] if kind == STARVED:
                self.end()  # which also frees what it kept of earlier calls
                raise OutOfMemoryError(text, traceback, calls=self.calls)
            case [_, str(text), str(traceback)]:
                raise CallError(text, traceback)
        self.end()
        raise ProcessLostError("its answer cannot be read: unknown kind of answer")

    def _watch(self, check: Callable[[], None], *, whole_group: bool) -> None:
        try:
            check()
            held = group_memory(self.pid) if whole_group else self.memory()
            if 0 < self._memory < held:
                text = f"it used {_mebibytes(held)} of memory, over its limit of {_mebibytes(self._memory)}"
                raise OutOfMemoryError(text, calls=self.calls)
        except (NotWantedError, ProcessLostError):
            self.end()
            raise

    def _lost(self) -> ProcessLostError:
        """The error for a process that exited by itself."""
        how = _how_it_ended(_await_exit(self.pid))
        self.end()
        return ProcessLostError(f"its process {how} during the call")

    def _open(self) -> Channel:
        if self._channel is None:
            raise ProcessLostError("its process is gone")
        return self._channel


def _start(*descriptors: int) -> subprocess.Popen[bytes]:
    """Start the process with its end of the connection, the shared memory, and the pipe that ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "workers.calling.callee", *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        stdout=2,  # a worker announces on stdout that it is ready
        env=_environment(),
        pass_fds=descriptors,
        start_new_session=True,
    )


def group_memory(group: int) -> int:
    """Bytes of a process group in memory; shared pages count for each process."""
    return sum(_memory(pid) for pid in psutil.pids() if _group_of(pid) == group)


def _group_of(pid: int) -> int:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return 0


def _memory(pid: int) -> int:
    with suppress(psutil.Error):  # it has exited
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _environment() -> dict[str, str]:
    """The worker's environment without its secrets, with the worker's import path."""
    kept = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    return kept | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}


def _await_exit(pid: int) -> os.waitid_result | None:
    """How a process ends within `KILL_AFTER`; None if it does not. It is not reaped."""
    end = time.monotonic() + KILL_AFTER
    while (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None and time.monotonic() < end:
        time.sleep(0.001)
    return ended


def _how_it_ended(ended: os.waitid_result | None) -> str:
    if ended is None or ended.si_code == os.CLD_EXITED:
        return f"ended with exit status {0 if ended is None else ended.si_status}"
    name = signal.Signals(ended.si_status).name
    hint = ", which Linux does when memory is exhausted" if ended.si_status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _signal_group(group: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, which)


def _reap(group: int) -> None:
    """Reap descendants that the callable left to this process, which is then the container's init."""
    end = time.monotonic() + KILL_AFTER
    with suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
