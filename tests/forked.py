"""Starts `python -m MODULE` by forking a process that has made the imports, which take most of a start.

A server for each kind of process imports it once and forks for each start. It starts no thread and imports no PyTorch,
JAX or ONNX Runtime. What is forked has its own arguments, environment, output, signals and random numbers, and ends as
any program does; it differs from a new process in /proc/PID/cmdline only. Where what an interpreter or a library reads
as it starts differs from the variables of the tests (`_EARLY`), a new process is started.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import msgspec

from tasks.settings import TREE

IMPORTS = {
    "router": ["api.__main__", "pydantic", "pydantic.v1", "numpy.ma"],
    "workers": [
        *("workers.celery_adapter.consumer", "workers.celery_adapter.pool", "workers.celery_adapter.strategy"),
        *("workers.calling.child", "workers.device", "workers.runtimes.echo", "workers.runtimes.python"),
        *("celery.apps.worker", "celery.backends.redis", "celery.events.receiver", "celery.app.control"),
        *("kombu.matcher", "kombu.transport.redis", "billiard.pool", "encodings.idna", "tasks.celery_app"),
    ],
}
"""What each kind of process imports before it has read its settings, or soon after."""

_FLAGS = {"router": [], "workers": ["-W", "ignore"]}
"""Options of the interpreter."""

_EARLY = ("PYTHON", "LD_", "MALLOC_", "OMP_", "OPENBLAS_", "OTEL_")
"""First characters of the variables that are read before `main`."""


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


_OURS = _early(os.environ)  # before any test has set some, with which the servers must not begin

_MOST = 2**20
"""Bytes of a request at most: arguments and environment."""


class Start(msgspec.Struct):
    """What to start."""

    module: str
    arguments: list[str]
    environment: dict[str, str]


class Forked:
    """A forked process, as `subprocess.Popen` has it. `exited` gives its number, then its exit status."""

    def __init__(self, exited: socket.socket, stdout: IO[bytes]) -> None:
        self._exited = exited
        self.stdout = stdout
        self.pid = int(exited.recv(16))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it ends; raises `subprocess.TimeoutExpired`."""
        status = self._await(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._exited], [], [], timeout)[0]:
            self.returncode = int(self._exited.recv(16))
            self._exited.close()
        return self.returncode


Process = subprocess.Popen[bytes] | Forked


def start(kind: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Any = None) -> Process:
    """`python -m MODULE` in the tree with standard output in a pipe, and errors in `log` as with `subprocess`.

    Args:
        kind: of `IMPORTS`.
        environment: all variables of the process.
    """
    if _early(environment) != _OURS:
        command = [sys.executable, *_FLAGS[kind], "-m", module, *arguments]
        return subprocess.Popen(command, cwd=TREE, env=environment, stdout=subprocess.PIPE, stderr=log)
    reading, writing = os.pipe()
    exited, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nowhere = os.open(os.devnull, os.O_WRONLY) if log == subprocess.DEVNULL else None
    errors = 2 if log is None else nowhere if nowhere is not None else log if isinstance(log, int) else log.fileno()
    request = msgspec.json.encode(Start(module, list(arguments), dict(environment)))
    socket.send_fds(_server(kind), [request], [writing, errors, its.fileno()])
    its.close()
    for descriptor in (writing, *([] if nowhere is None else [nowhere])):
        os.close(descriptor)
    return Forked(exited, os.fdopen(reading, "rb"))


@contextmanager
def running(
    kind: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Any = None
) -> Iterator[tuple[Process, Any]]:
    """As `start`, and what it says when it is ready; killed at the end if the test did not stop it."""
    process = start(kind, module, arguments, environment, log)
    assert process.stdout is not None
    try:
        yield process, msgspec.json.decode(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@cache
def _server(kind: str) -> socket.socket:
    """The connection to the server of this kind, started for this process."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, *_FLAGS[kind], "-m", "tests.forked", kind, str(its.fileno())]
    others = {name: value for name, value in os.environ.items() if not name.startswith(_EARLY)}
    environment = {**others, **_OURS, "OMP_NUM_THREADS": "1"}  # NumPy's library of algebra would start threads
    with its:
        server = subprocess.Popen(
            command, cwd=TREE, env=environment, pass_fds=[its.fileno()], stdout=subprocess.DEVNULL, stderr=2
        )

    def stop() -> None:
        ours.close()
        server.wait()

    atexit.register(stop)
    return ours


def serve(requests: socket.socket) -> Start | None:
    """Fork for each request: what to start returns in the child, and None here once no request can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are not waited for
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, _MOST, 3)
        if not request or os.fork() == 0:
            requests.close()
            return _forked(msgspec.json.decode(request, type=Start), *descriptors) if request else None
        for descriptor in descriptors:
            os.close(descriptor)


def _forked(wanted: Start, output: int, errors: int, exited: int) -> Start:
    """What to start, in a child of this process, which watches it and tells how it ends.

    The child does not outlive the tests.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.dup2(output, 1)
        os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    if child == 0:
        os.close(exited)
        return wanted
    with socket.socket(fileno=exited) as stated:
        stated.send(b"%d" % child)
        if exited in select.select([exited, os.pidfd_open(child)], [], [])[0]:
            os.kill(child, signal.SIGKILL)  # who asked for it was killed
        with suppress(OSError):
            stated.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def main(kind: str, connection: int) -> None:
    """Serve; in a child, become what was asked for."""
    for name in IMPORTS[kind]:
        importlib.import_module(name)
    sys.modules.pop("api.__main__", None)  # it is run, not imported
    gc.freeze()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread runs"
    wanted = serve(socket.socket(fileno=connection))
    if wanted is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(wanted.environment)
    sys.argv[1:] = wanted.arguments
    runpy.run_module(wanted.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
