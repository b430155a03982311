"""The fleet that runs from a data directory: its lock, its description in `fleet.json`, and its stop."""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import msgspec

from local.embedded import locked, within
from local.supervisor import Exit

SECOND_STOP = 20.0
"""Seconds within which a fleet ends after the second request to stop."""

STARTING = 60.0
"""Seconds within which a fleet that is still starting ends when asked."""

LOCK = "supervisor.lock"

FLEET = "fleet.json"

_LOCK_WAIT = 0.5  # seconds; reading the supervisor's pid holds the lock for less


class RunningWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process of a running fleet."""

    hardware_class: str
    device: str
    emulated: bool
    worker: str
    pid: int


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a running fleet, as its supervisor sees it; `pid` is None while it waits to be restarted.

    `restarts` counts its restarts after failures, and `last_exit` says how it failed last.
    """

    name: str
    pid: int | None
    ready: bool
    log: str
    restarts: int = 0
    last_exit: Exit | None = None


class LocalFleet(msgspec.Struct, frozen=True, kw_only=True):
    """A running fleet: its addresses (passwords included) and processes."""

    broker: str
    """For any client library: an embedded server's port on loopback."""
    socket: str | None = None
    """Its Unix socket, which the fleet uses because it is faster."""
    celery_broker: str = ""
    """The broker for plain Celery on this machine, in kombu's form (`redis+socket://…`)."""
    http: str
    flower: str | None
    pid: int
    """The supervisor's."""
    router_pid: int
    """A restart changes it, and a worker's pid."""
    data: str
    workers: tuple[RunningWorker, ...]
    timeout: float
    """Seconds within which the fleet ends when asked to stop."""
    left_out: Mapping[str, str] = {}
    """Why a class has no worker."""
    scaled: frozenset[str] = frozenset()
    """Classes whose workers start when there is work."""
    processes: tuple[ProcessState, ...] = ()


class AlreadyRunningError(Exception):
    """Another supervisor runs a fleet from this data directory."""

    def __init__(self, data: Path, pid: int | None) -> None:
        super().__init__(f"{data}: a fleet already runs from this directory (process {pid})")


def failing(fleet: LocalFleet) -> dict[str, str]:
    """How each process failed that did, and what it does now."""
    return {process.name: _failure(process) for process in fleet.processes if process.last_exit is not None}


def _failure(process: ProcessState) -> str:
    state = "ready" if process.ready else "starting" if process.pid else "waits to be restarted"
    assert process.last_exit is not None
    at = datetime.fromtimestamp(process.last_exit.at).strftime("%H:%M:%S")
    times = f"failed {process.restarts} times, last" if process.restarts > 1 else "failed"
    why = ": ".join(filter(None, (process.last_exit.why, process.last_exit.last_line)))
    return f"{state}; {times} at {at}: {why}"


def data_directory(given: Path | None, environment: Mapping[str, str]) -> Path:
    """Where a fleet keeps its data: as given, else `TAXIWAY_DATA`, else `.taxiway` in the current folder."""
    return (given or Path(environment.get("TAXIWAY_DATA") or ".taxiway")).absolute()


@contextmanager
def supervising(data: Path) -> Iterator[None]:
    """Hold the exclusive lock to run a fleet from `data`, with this process's id; removes `fleet.json` at the end.

    Raises:
        AlreadyRunningError: another process holds it.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data / LOCK).open("a+") as lock:
        if not within(_LOCK_WAIT, lambda: locked(lock, fcntl.LOCK_EX), every=0.05):
            raise AlreadyRunningError(data, supervisor_pid(data))
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            _forget(data)


def supervisor_pid(data: Path) -> int | None:
    """The pid of the supervisor that runs a fleet from `data`; None if there is none."""
    path = data / LOCK
    if not path.exists():
        return None
    with path.open() as lock:
        return None if locked(lock, fcntl.LOCK_SH) else int(lock.read() or 0) or None


def write_fleet(data: Path, fleet: LocalFleet) -> None:
    """Replace `fleet.json`, which only its owner can read, in one step."""
    made = data / f"{FLEET}.new"
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(fleet), indent=2))
    made.replace(data / FLEET)


def read_fleet(data: Path) -> LocalFleet | None:
    """The fleet that runs from `data`; None if none is ready."""
    if supervisor_pid(data) is None or not (data / FLEET).exists():
        return None
    return msgspec.json.decode((data / FLEET).read_bytes(), type=LocalFleet)


def stop_fleet(data: Path) -> bool:
    """Stop the fleet that runs from `data` and wait for its end; returns whether there was one.

    An interrupt, or another call, stops it at once: its workers return the jobs that they run. A supervisor that does
    not end within its fleet's `timeout` is killed, and its children with it.
    """
    supervisor, fleet = _supervisor(data), read_fleet(data)
    if supervisor is None:
        _forget(data)
        return False
    try:
        with suppress(ProcessLookupError):  # it has just ended by itself
            signal.pidfd_send_signal(supervisor, signal.SIGTERM)
            if not _stopped(supervisor, STARTING if fleet is None else fleet.timeout):
                signal.pidfd_send_signal(supervisor, signal.SIGKILL)
                _ended(supervisor, SECOND_STOP)
    finally:
        os.close(supervisor)
        _forget(data)
    return True


def _forget(data: Path) -> None:
    with suppress(OSError):  # none, or a read-only disk
        (data / FLEET).unlink()


def _supervisor(data: Path) -> int | None:
    """A pidfd of the supervisor's process, which stays valid when its pid is reused."""
    pid = supervisor_pid(data)
    try:
        return None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _stopped(supervisor: int, timeout: float) -> bool:
    """Whether it ends in time; an interrupt of this process stops it at once."""
    try:
        return _ended(supervisor, timeout)
    except KeyboardInterrupt:
        signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        return _ended(supervisor, SECOND_STOP)


def _ended(process: int, timeout: float) -> bool:
    """Whether the process of a pidfd ends within `timeout` seconds."""
    return bool(select.select([process], [], [], timeout)[0])
