"""What a client may do to the HTTP door's connections, by real sockets to a real server before a small application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from api.connection import HEAD, SLOWEST, WHOLE
from api.gate import Application, Receive, Send, answer, is_loopback
from api.server import HttpServer, open_tls
from tasks.document import Size
from tasks.topology import Limits
from tests.certificates import self_signed
from tests.waiting import until

GET = b"GET /a HTTP/1.1\r\nhost: test\r\n\r\n"
LARGE = 2**24
BODY = bytes(range(256)) * 2**13
PATIENT = Limits(head=30, body=30, connections=3, payload=Size(2**22))
LIMITS = Limits(head=0.3, body=0.6, connections=3, payload=Size(2**21))
STEADY = Limits(head=30, body=1.5, connections=3, payload=Size(2**23))


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers with what it read; a path tells it to answer at once, or at length."""
    body = b""
    while scope["path"] != "/early":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000 if scope["path"] == "/long" else 0):
        await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
    await send({"type": "http.response.body", "body": bytes(LARGE) if scope["path"] == "/large" else b"%d" % len(body)})


async def reader(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers with the body itself, read straight into its place."""
    begin = (await receive())["body"]
    body = await scope["extensions"][WHOLE](begin, int(dict(scope["headers"])[b"content-length"]))
    await answer(send, 200, {}, b"left" if body is None else body)


async def refuser(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers before anything of a body is read."""
    await answer(send, 403, {"content-type": "text/plain"}, b"no", b"body")


@contextlib.contextmanager
def served(
    limits: Limits = LIMITS, tls: ssl.SSLContext | ssl.SSLContext | None = None, application: Application = application
) -> Iterator[HttpServer]:
    """A server on a thread of its own."""
    loop, ready = uvloop.new_event_loop(), threading.Event()
    server = HttpServer(application, "127.0.0.1", 0, limits, tls)
    stopping = asyncio.Event()

    async def serve() -> None:
        await server.start()
        ready.set()
        await stopping.wait()
        await server.stop(stopping, lambda: None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(60)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with served() as server:
        yield server


@pytest.fixture
def port(server: HttpServer) -> int:
    return server.port


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        yield connection


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_client_that_sends_nothing_is_let_go_without_an_answer_that_it_could_take_for_its_next(port: int) -> None:
    with connected(port) as connection:
        assert read(connection) == b""
    with connected(port) as connection:
        connection.sendall(GET)
        assert read(connection).count(b"HTTP/1.1 ") == 1


def test_a_client_that_falls_silent_after_its_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.connection.SILENT", 0.2)
    with served(PATIENT) as server, connected(server.port) as client:
        client.sendall(GET)
        assert read(client).count(b"HTTP/1.1 ") == 1


def test_a_whole_answer_has_its_length_and_to_head_no_body() -> None:
    with served(PATIENT, application=refuser) as server, connected(server.port) as client:
        client.sendall(GET.replace(b"GET", b"HEAD") + GET.replace(b"host", b"connection: close\r\nhost"))
        received = read(client)
    head, get, body = received.split(b"\r\n\r\n")
    for one in (head, get):
        assert one.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert b"content-type: text/plain\r\ncontent-length: 6" in one
    assert b"connection: close" not in head
    assert get.endswith(b"\r\nconnection: close")
    assert body == b"nobody"


@pytest.mark.parametrize("kept", [b"", b"connection: keep-alive\r\n"])
@pytest.mark.parametrize("verb", [b"GET", b"HEAD"])
def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection_and_has_no_chunks(verb: bytes, kept: bytes) -> None:
    asked = GET.replace(b"GET /a HTTP/1.1", verb + b" /large HTTP/1.0").replace(b"\r\n\r\n", b"\r\n" + kept + b"\r\n")
    with served(PATIENT) as server, connected(server.port) as client:
        client.sendall(asked)
        head, _, body = read(client).partition(b"\r\n\r\n")
    assert (b"transfer-encoding" in head, b"connection: close" in head) == (False, True)
    assert len(body) == (LARGE if verb == b"GET" else 0)


@pytest.mark.parametrize(
    ("drop", "answer"), [(b"x: y\r\n", b"HTTP/1.1 408 "), (b"\r\n", b"")], ids=["headers", "breaks"]
)
def test_a_client_that_drips_its_head_is_let_go(port: int, drop: bytes, answer: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(GET[:-2] if answer else b"")
        connection.settimeout(0.05)
        heard = None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while heard is None:
                connection.sendall(drop)
                with contextlib.suppress(TimeoutError):
                    heard = connection.recv(65536)
        assert (heard or b"").startswith(answer)


@pytest.mark.parametrize(
    "head", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n1\r\n"], ids=["declared", "chunked"]
)
def test_a_client_that_never_ends_its_body_is_let_go(port: int, head: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + head + b"x")
        assert read(connection).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_is_slow_and_steady_may_go_on() -> None:
    half = 3 * SLOWEST
    with served(STEADY) as server, connected(server.port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % (2 * half))
        connection.sendall(bytes(half))
        connection.settimeout(1.5 * STEADY.body)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        connection.sendall(bytes(half))
        assert b"\r\n%d\r\n" % (2 * half) in connection.recv(65536)


def test_a_client_that_reads_slowly_and_steadily_receives_everything() -> None:
    idle, other = socket.socketpair()
    idle.settimeout(STEADY.body / 3)
    with served(STEADY) as server, connected(server.port) as connection, idle, other:
        connection.sendall(GET.replace(b"/a", b"/large").replace(b"host", b"connection: close\r\nhost"))
        answer = 0
        while piece := connection.recv(2**22):
            answer += len(piece)
            with pytest.raises(TimeoutError):
                idle.recv(1)
    assert answer > LARGE


def test_a_client_that_does_not_read_is_let_go(server: HttpServer) -> None:
    with connected(server.port) as connection:
        connection.sendall(GET.replace(b"/a", b"/long"))
        connection.recv(1)
        assert until(lambda: server.connections == 0)
        assert len(read(connection)) < 1000 * 2**16


def test_a_body_that_goes_on_after_its_answer_is_cut_off(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(bytes(1000))


@pytest.mark.parametrize("part", [b"x: " + b"y" * 4 * HEAD, b"x: y\r\n" * HEAD], ids=["one header", "many headers"])
def test_a_head_without_measure_is_refused(port: int, part: bytes) -> None:
    with connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(part), 4096):
                connection.sendall((GET[:-2] if at == 0 else b"") + part[at : at + 4096])
        assert read(connection).startswith(b"HTTP/1.1 431 ")


def test_trailers_without_measure_are_refused(port: int) -> None:
    with connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ")
            for _ in range(8 * 2**20 // 4096):
                connection.sendall(b"y" * 4096)
        assert read(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: -3\r\n\r\nabc",
        b"content-length: 99999999999999999999999\r\n\r\nabc",
        b"transfer-encoding: gzip\r\n\r\nabc",
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"x y: z\r\n\r\n",
    ],
)
def test_lengths_that_contradict_and_what_is_not_http_are_refused(port: int, head: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + head)
        received = read(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.endswith(b'{"error":"expected a request of HTTP/1.1","code":"request_error","details":{}}')


@pytest.mark.parametrize(
    ("junk", "status"), [(b"JUNK\x00\r\n\r\n", b"400 "), (b"\x16\x03\r\n\r\n", b"400 "), (b"cdef", b"408 ")]
)
def test_what_follows_a_good_request_in_its_packet_is_refused_after_the_good_answer(
    port: int, junk: bytes, status: bytes
) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n\r\nab" + junk)
        received = read(connection)
    good, bad = received.split(b"HTTP/1.1 ")[1:]
    assert good.startswith(b"200 ")
    assert good.endswith(b"1\r\n2\r\n0\r\n\r\n")
    assert bad.startswith(status)


@pytest.mark.parametrize("head", [b"content-length: 100000", b"transfer-encoding: chunked"])
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "sending"])
def test_a_request_that_is_answered_before_its_body_has_one_answer_and_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch, head: bytes, silent: bool
) -> None:
    monkeypatch.setattr("api.connection.LINGER", 0.3)
    with served(application=refuser) as server, connected(server.port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + head + b"\r\n\r\n1\r\nx")
        received = connection.recv(65536)
        with contextlib.suppress(ConnectionError):
            for _ in range(0 if silent else 20):
                connection.sendall(b"x" * 1000)
        received += read(connection)
        assert until(lambda: server.connections == 0)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 403 ")
    assert b"\r\nconnection: close\r\n" in received
    assert received.endswith(b"nobody")


def test_an_answer_before_a_body_reaches_a_client_that_reads_only_after_it_sent_all() -> None:
    with served(PATIENT, application=refuser) as server, connected(server.port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % PATIENT.payload)
        connection.sendall(bytes(PATIENT.payload))
        assert read(connection).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_request_that_would_rather_speak_another_protocol_is_answered_with_its_body(
    port: int, protocol: bytes
) -> None:
    wish = b"connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\nupgrade: " + protocol + b"\r\n"
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + wish + b"content-length: 5\r\n\r\nhello")
        assert b"\r\n5\r\n" in connection.recv(65536)
        connection.sendall(GET.replace(b"host", b"connection: close\r\nhost"))
        assert read(connection).count(b"HTTP/1.1 200 ") == 1


def test_requests_of_one_connection_are_served_one_after_another_and_in_order() -> None:
    running, most = 0, 0

    async def slow(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        await answer(send, 200, {}, scope["path"].encode())

    paths = [b"/%d" % number for number in range(100)]
    with served(PATIENT, application=slow) as server, connected(server.port) as connection:
        requests = b"".join(GET.replace(b"/a", path) for path in paths)
        connection.sendall(requests + GET.replace(b"host", b"connection: close\r\nhost"))
        received = read(connection)
    answers = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [one.partition(b"\r\n\r\n")[2] for one in answers] == [*paths, b"/a"]
    assert most == 1


def test_the_head_of_an_answer_does_not_wait_for_its_body() -> None:
    released = threading.Event()

    async def late(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"location", b"/there")]})
        assert await asyncio.to_thread(released.wait, 60)
        await send({"type": "http.response.body", "body": b"at last"})

    with served(PATIENT, application=late) as server, connected(server.port) as connection:
        connection.sendall(GET)
        head = connection.recv(65536)
        released.set()
        body = connection.recv(65536)
    assert head.endswith(b"\r\n\r\n")
    assert b"\r\nlocation: /there\r\n" in head
    assert b"at last" in body


def test_a_stopping_server_ends_a_connection_after_the_current_answer() -> None:
    with served(PATIENT) as server, connected(server.port) as connection:
        server.part()
        connection.sendall(GET * 1000)
        received = read(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
@pytest.mark.parametrize(
    "request_",
    [GET, b"POST /a HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"],
    ids=["get", "chunked"],
)
def test_a_connection_that_sends_requests_without_end_takes_little_memory(
    server: HttpServer, request_: bytes, reads: bool
) -> None:
    """uvicorn alone takes 4.5 kB for each: some 70 MB for these."""
    requests, process = request_ * 500, psutil.Process()
    sent, before, grown = 0, process.memory_info().rss, 0
    with connected(server.port) as connection:
        connection.setblocking(False)
        quiet = time.monotonic() + 2
        while sent < 2**19 and time.monotonic() < quiet:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(requests[sent % len(requests) :])
                quiet = time.monotonic() + 2
            with contextlib.suppress(BlockingIOError):
                quiet = time.monotonic() + 2 if reads and connection.recv(2**16) else quiet
            grown = max(grown, process.memory_info().rss - before)
    assert sent >= 2**17
    assert grown < 4 * 2**20


def test_requests_in_one_piece_are_answered_one_after_the_other(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET + GET + GET.replace(b"host", b"connection: close\r\nhost"))
        assert read(connection).count(b"HTTP/1.1 200 ") == 3


def test_one_connection_too_many_is_refused_with_retry_after() -> None:
    with served() as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(server.port)) for _ in range(LIMITS.connections)]
        for connection in held:
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        with connected(server.port) as connection:
            received = read(connection)
        held[0].close()
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in received


def test_a_tls_handshake_that_is_not_made_is_given_up(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    with served(tls=open_tls(certificate, key)) as server:
        with connected(server.port) as connection:
            assert read(connection) == b""
        trust = ssl.create_default_context(cafile=certificate)
        with connected(server.port) as plain, trust.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert connection.version() in ("TLSv1.2", "TLSv1.3")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_body_that_is_read_straight_into_its_place_is_whole_and_what_follows_it_is_served(
    tmp_path: Path, tls: bool
) -> None:
    certificate, key = self_signed(tmp_path)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(PATIENT, open_tls(certificate, key) if tls else None, reader))
        connection = stack.enter_context(connected(server.port))
        if tls:
            trust = ssl.create_default_context(cafile=certificate)
            connection = stack.enter_context(trust.wrap_socket(connection, server_hostname="localhost"))
        ask = b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n" % len(BODY)
        connection.sendall(ask + b"\r\n" + BODY + ask + b"connection: close\r\n\r\n")
        connection.sendall(BODY)
        received = read(connection)
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert received.count(BODY) == 2


def test_a_sender_that_leaves_within_its_body_is_not_waited_for() -> None:
    with served(PATIENT, application=reader) as server:
        with connected(server.port) as connection:
            connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\nx" % len(BODY))
            assert until(lambda: server.connections == 1)
        assert until(lambda: server.connections == 0)


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org")],
)
def test_only_the_loopback_is_this_machine_alone(host: str, here: bool) -> None:
    assert is_loopback(host) is here
