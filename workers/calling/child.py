"""A worker's side of a callable's process: starts it, calls it, watches it, and ends it with all that it started."""

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

import numpy as np

from tasks.models.code import Code
from taxiway.errors import TaxiwayError, error_from
from workers.calling import CallError, NotWantedError, OutOfMemoryError, ProcessLostError
from workers.calling.callee import ANSWERED, REFUSED, STARVED
from workers.calling.channel import Channel, ClosedError, FormError, shared_memory
from workers.calling.keeper import own_keeper

LOOK = 0.02
"""Seconds between two looks at whether a call is wanted, late, or holds too much."""

LOOK_AROUND = 0.5
"""Seconds between two looks at all that the callable started: each reads the whole of /proc."""

GRACE = 0.2
"""Seconds that a process has to end between SIGTERM and SIGKILL; the device waits for them."""

_PRIVATE = ("TAXIWAY_BROKER", "TAXIWAY_STATE", "TAXIWAY_SECRET", "TAXIWAY_PRODUCER_SECRET")
"""Variables that no callable needs: passwords and keys."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PGRP, _RSS = 2, 21  # fields of /proc/<pid>/stat behind the name: proc(5) counts them from 3


class Child:
    """A process that has imported one callable. Calls come from one thread at a time; any may `end` it between them.

    Args:
        code: the function that is called.
        memory: most bytes in memory of the process and all that it starts; 0 for no limit.

    `calls` counts those that were answered.
    """

    def __init__(self, code: Code, *, memory: int = 0) -> None:
        self._memory = memory
        self._ending = threading.Lock()
        self.calls = 0
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        shared = shared_memory()
        self._channel: Channel | None = Channel(ours, shared)
        self._channel.set_timeout(LOOK)
        with its:
            try:
                self._process = _start(its.fileno(), shared)
            except OSError:
                self._channel.close()
                raise
        self.pid = self._process.pid
        own_keeper().keep(self.pid)
        with suppress(ClosedError):  # `await_ready` says so
            self._channel.send(code.reference)

    @property
    def alive(self) -> bool:
        """Whether it was not ended. Any thread may ask."""
        return self._channel is not None

    def await_ready(self) -> None:
        """Wait until the callable is imported.

        Raises:
            CallError: it cannot be; the process is gone then.
        """
        try:
            self._answer(lambda: None)
        except CallError:
            self.end()
            raise

    def call(self, inputs: Mapping[str, np.ndarray], look: Callable[[], None]) -> Mapping[str, np.ndarray]:
        """What the callable gives for these arguments, an array for each of its names.

        Args:
            inputs: an array for each argument; the callable gets the element of one without axes.
            look: called some fifty times a second while the call runs. What it raises ends the call and the process,
                and is raised: `NotWantedError`, or a `ProcessLostError` that says which limit was passed.

        Raises:
            CallError: the call failed; `alive` says whether the process goes on.
            TaxiwayError: the callable raised one.
        """
        look()
        channel = self._open()
        try:
            channel.send(inputs)
        except FormError as error:
            raise CallError(f"its inputs cannot be sent to the callable: {error}") from error
        except ClosedError as error:
            raise self._lost() from error
        answer = self._answer(look)
        self.calls += 1
        channel.trim()
        return answer

    def memory(self) -> int:
        """Bytes that the process has in memory, without what it started; 0 once it was ended. Any thread may ask."""
        if not self.alive:
            return 0
        with suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE
        return 0

    def end(self) -> int:
        """End the process and all that it started, within `GRACE`; its exit status, as subprocess has it."""
        with self._ending:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
                _signal_group(self.pid, signal.SIGTERM)
                end = time.monotonic() + GRACE
                while not _has_ended(self.pid) and time.monotonic() < end:
                    time.sleep(0.001)
                _signal_group(self.pid, signal.SIGKILL)  # before it is reaped: until then the group's number is its own
                self._process.wait()
                _reap(self.pid)
                own_keeper().let_go(self.pid)
            return self._process.wait()

    def _answer(self, look: Callable[[], None]) -> Mapping[str, np.ndarray]:
        channel, look_around = self._open(), time.monotonic() + LOOK_AROUND
        while True:
            try:
                return self._read(channel.receive())
            except TimeoutError:
                around = time.monotonic() >= look_around
                look_around += LOOK_AROUND if around else 0.0
                self._watch(look, around=around)
            except ClosedError as error:
                raise self._lost() from error
            except FormError as error:
                self.end()
                raise ProcessLostError(f"its answer cannot be read: {error}") from error

    def _read(self, answer: Any) -> Mapping[str, np.ndarray]:
        match answer:
            case [str(kind), dict(outputs)] if kind == ANSWERED:
                return outputs
            case [str(kind), str(name), str(text), dict(details)] if kind == REFUSED:
                raise _theirs(name, text, details)
            case [str(kind), str(text), str(traceback)] if kind == STARVED:
                self.end()  # what it kept of earlier calls goes with it
                raise OutOfMemoryError(text, traceback, calls=self.calls)
            case [_, str(text), str(traceback)]:
                raise CallError(text, traceback)
        self.end()
        raise ProcessLostError("its answer cannot be read: not one of the forms that answers have")

    def _watch(self, look: Callable[[], None], *, around: bool) -> None:
        try:
            look()
            held = group_memory(self.pid) if around else self.memory()
            if 0 < self._memory < held:
                text = f"it held {_mebibytes(held)} of memory, over its limit of {_mebibytes(self._memory)}"
                raise OutOfMemoryError(text, calls=self.calls)
        except (NotWantedError, ProcessLostError):
            self.end()
            raise

    def _lost(self) -> ProcessLostError:
        """Why the process is gone, which ended by itself."""
        status = _status(self.pid, self._process)
        self.end()
        return ProcessLostError(f"its process {_how_it_ended(status)} during the call")

    def _open(self) -> Channel:
        if self._channel is None:
            raise ProcessLostError("its process is gone")
        return self._channel


def _start(connection: int, shared: int) -> subprocess.Popen[bytes]:
    """The process, which gets both descriptors."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "workers.calling.callee", str(connection), str(shared)],
        stdin=subprocess.DEVNULL,
        stdout=2,  # a worker's own stdout says when it is ready
        env=_environment(),
        pass_fds=(connection, shared),
        start_new_session=True,
    )


def group_memory(group: int) -> int:
    """Bytes that a process group has in memory; pages that processes share count for each."""
    return sum(_memory_in_group(entry.path, group) for entry in os.scandir("/proc") if entry.name.isdigit())


def _memory_in_group(path: str, group: int) -> int:
    with suppress(OSError, ValueError, IndexError):  # it ended meanwhile
        fields = Path(path, "stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[_RSS]) * _PAGE if int(fields[_PGRP]) == group else 0
    return 0


def _environment() -> dict[str, str]:
    """The worker's own, without its secrets, and so that its packages are found where the worker has them from."""
    kept = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    return kept | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}


def _theirs(name: str, text: str, details: dict[str, Any]) -> TaxiwayError:
    return error_from(name, text, {key: value for key, value in details.items() if isinstance(key, str)})


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _status(pid: int, process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that closed its end: it has ended, or is about to. It is not reaped."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        time.sleep(0.001)
    return 0


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name
    hint = ", as Linux does where a machine is out of memory" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _signal_group(group: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, which)


def _reap(group: int) -> None:
    """Take the exit status of what the callable left to this process, which is the first of its container then."""
    end = time.monotonic() + GRACE
    with suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
