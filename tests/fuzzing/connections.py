"""What clients do to a router's connections that no HTTP client does: requests without end, junk, half bodies, wishes.

Each script is one connection. It must have an answer for each request that it sent, in order, and at most a refusal of
what is behind them. Meanwhile the router's memory and the time for which it keeps others waiting are bounded.
"""

import contextlib
import random
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import h11
import psutil

MEMORY = 96 * 2**20
"""Bytes by which the router may grow: what the connections below and `limits.bodies` of the fuzzed router come to."""

BUSY = 0.25
"""Seconds of processor time that the router may spend, on all its clients, before it answers another one."""

TIMEOUT = 20.0
"""Seconds in which a connection is answered."""

QUIET = 5.0
"""Seconds without an answer after which no more are expected: a router waits for the rest of a body."""

BODIES = 60
LARGE = 15 * 2**20
CLIENTS = 8

LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
_LAST = LIVE.replace(b"host:", b"connection: close\r\nhost:")
_HEAD = b"POST /v2/health/live HTTP/1.1\r\nhost: localhost\r\n"
_WISH = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"

_GOOD = {
    LIVE: 200,
    _HEAD + b"content-length: 5\r\n\r\nhello": 405,
    _HEAD + _WISH + b"content-length: 5\r\n\r\nhello": 405,
    LIVE.replace(b"host:", _WISH + b"host:"): 200,
    _HEAD + _CHUNKED + b"3;x=y\r\nabc\r\n0\r\nx: y\r\n\r\n": 405,
    LIVE.replace(b"/v2", b"/" + b"v" * 8000 + b"/v2"): 401,
}
"""Requests, and what is answered to them without a key."""

_BAD = (
    b"JUNK\x00\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/1.1\r\nx y: z\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n",
    _HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    _HEAD + b"content-length: 3\r\n" + _CHUNKED + b"0\r\n\r\n",
    _HEAD + b"x: " + b"y" * 2**17,
    _HEAD + b"content-length: 5000000\r\n\r\n" + bytes(2**16),
    _HEAD + _CHUNKED + b"zz\r\n",
    _HEAD + _CHUNKED + b"1;" + b"x" * 2**20,
    _HEAD + _CHUNKED + b"0\r\n" + b"x: y\r\n" * 2**16,
)
"""What ends a connection, with a refusal or with the answer to a request whose body did not come."""


@dataclass(frozen=True, slots=True)
class Target:
    """The router, and a key that it knows."""

    port: int
    pid: int
    secret: str


def _statuses(received: bytes) -> list[int]:
    """The statuses of the whole answers in what a router said. Raises `h11.RemoteProtocolError`."""
    statuses, parser = list[int](), h11.Connection(h11.CLIENT)
    parser.receive_data(received)
    parser.receive_data(b"")
    while parser.trailing_data != (b"", True):
        parser.send(h11.Request(method="GET", target="/", headers=[("host", "localhost")]))
        parser.send(h11.EndOfMessage())
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return statuses
            status = event.status_code if isinstance(event, h11.Response) else 0
            statuses += [status] if status else []
        if parser.their_state is not h11.DONE:
            break
        parser.start_next_cycle()
    return statuses


def harm(target: Target, *, seconds: float, seed: int) -> list[str]:
    """Harm the router's connections for some seconds; what it did wrong."""
    chance, process = random.Random(seed), psutil.Process(target.pid)
    for _ in range(3):
        _flood(target, reads=True, seconds=0.3)  # what is made once is there
    before, problems, ends = process.memory_info().rss, list[str](), time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        while time.monotonic() < ends and not problems:
            tasks = [pool.submit(_script, target, chance.getrandbits(64)) for _ in range(CLIENTS - 2)]
            tasks += [pool.submit(_flood, target, reads=reads, seconds=0.5) for reads in (True, False)]
            for _ in _until_done(tasks):
                problems += _looked_at(target, process, before)
            problems += [problem for task in tasks for problem in task.result()]
    problems += _half_bodies(target, process, before)
    return problems


def _until_done(tasks: Sequence[Future[list[str]]]) -> Iterator[None]:
    """Again and again, while a task runs."""
    while wait(tasks, timeout=0.02).not_done:
        yield


def _looked_at(target: Target, process: psutil.Process, before: int) -> list[str]:
    """What is wrong with the router now: its memory, or how long another client waits."""
    spent = sum(process.cpu_times()[:2])
    with socket.create_connection(("127.0.0.1", target.port), timeout=TIMEOUT) as connection:
        connection.sendall(LIVE)
        connection.recv(12)
    spent, grown = sum(process.cpu_times()[:2]) - spent, process.memory_info().rss - before
    problems = [f"the router worked for {spent:.2f} s before it answered another client"] if spent > BUSY else []
    return problems + ([f"the router grew by {grown >> 20} MiB"] if grown > MEMORY else [])


def _script(target: Target, seed: int) -> list[str]:
    """One connection: good requests, perhaps something bad, cut anywhere; what was wrong with the answers."""
    chance = random.Random(seed)
    good, bad = chance.choices(list(_GOOD), k=chance.randrange(8)), chance.choice([b"", *_BAD])
    content, wanted = b"".join(good) + (bad or _LAST), [_GOOD[request] for request in good]
    received = b""
    try:
        received = _said(target, content, chance)
        statuses = _statuses(received)
    except h11.RemoteProtocolError as error:
        return [f"script {seed}: no HTTP came back: {error}: {received[-200:]!r}"]
    begun = len(good) + max(1, bad.count(b"\r\n\r\n"))  # each end of a head in it may be refused
    whole = all(request.startswith(b"GET") for request in good)
    if len(statuses) > begun or (whole and statuses[: len(good)] != wanted):
        return [f"script {seed}: expected {wanted} and at most one refusal, got {statuses}"]
    if statuses[: len(wanted)] != wanted[: len(statuses)]:
        return [f"script {seed}: expected a beginning of {wanted}, got {statuses}"]
    return []


def _said(target: Target, content: bytes, chance: random.Random) -> bytes:
    """What comes back for `content`, sent in pieces, until the router closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", target.port), timeout=TIMEOUT) as connection:
        with contextlib.suppress(ConnectionError):
            while content:
                size = chance.choice([1, 7, 100, 2**16, len(content)])
                connection.sendall(content[:size])
                content = content[size:]
        connection.settimeout(TIMEOUT)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := connection.recv(2**16):
                received += piece
                connection.settimeout(QUIET)
    return received


def _flood(target: Target, *, reads: bool, seconds: float) -> list[str]:
    """One connection that asks without end."""
    with contextlib.suppress(ConnectionError):
        ask_without_end(target.port, reads=reads, seconds=seconds)
    return []


def ask_without_end(port: int, *, reads: bool, seconds: float) -> int:
    """Bytes of requests that one connection could send within some seconds."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setblocking(False)
        sent, ends, requests = 0, time.monotonic() + seconds, LIVE * 1000
        while time.monotonic() < ends:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(requests[sent % len(requests) :])
            with contextlib.suppress(BlockingIOError):
                while reads and connection.recv(2**16):
                    pass
            time.sleep(0.001)  # so that the router has a core
    return sent


def _half_bodies(target: Target, process: psutil.Process, before: int) -> list[str]:
    """Large bodies under one key that never end: what they make the router do wrong."""
    key = b"authorization: Bearer " + target.secret.encode()
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: localhost\r\n" + key
    with contextlib.ExitStack() as stack:
        for _ in range(BODIES):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", target.port), timeout=TIMEOUT))
            with contextlib.suppress(ConnectionError):
                connection.sendall(head + b"\r\ncontent-length: %d\r\n\r\n" % LARGE + bytes(LARGE - 1))
        return _looked_at(target, process, before)
