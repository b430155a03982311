"""What a client may do to a server's connections, by real sockets to a real server before a small application.

Slow clients are the proxy's: test_ingress.py.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from api.answers import HttpAnswer
from api.gate import Application, Receive, Send
from api.server import HEAD, HttpServer, open_tls
from tasks.queues.limits import Limits
from tests.certificates import self_signed
from tests.waiting import in_thread

GET = b"GET /a HTTP/1.1\r\nhost: test\r\n\r\n"
LAST = GET.replace(b"host", b"connection: close\r\nhost")
LARGE = 2**24
BODY = bytes(range(256)) * 2**13
LIMITS = Limits(connections=3)


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers with the number of bytes that it read; or at length."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(LARGE) if scope["path"] == "/large" else b"%d" % size})


async def refuser(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers before anything of a body is read."""
    await HttpAnswer(403, {"content-type": "text/plain"}, (b"no", b"body"))(scope, receive, send)


@contextlib.contextmanager
def served(
    limits: Limits = LIMITS, tls: ssl.SSLContext | None = None, application: Application = application
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

    stop = partial(loop.call_soon_threadsafe, stopping.set)
    with contextlib.closing(loop), in_thread(lambda: loop.run_until_complete(serve()), stop=stop):
        assert ready.wait(60)
        yield server


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


def test_a_client_that_falls_silent_after_its_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.server._IDLE_CONNECTION", 1)
    with served() as server, connected(server.port) as client:
        client.sendall(GET)
        assert read(client).count(b"HTTP/1.1 ") == 1


def test_a_whole_answer_has_its_length_and_to_head_no_body() -> None:
    with served(application=refuser) as server, connected(server.port) as client:
        client.sendall(GET.replace(b"GET", b"HEAD") + LAST)
        received = read(client)
    head, get, body = received.split(b"\r\n\r\n")
    for one in (head, get):
        assert one.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert b"content-type: text/plain\r\ncontent-length: 6" in one.lower()
    assert b"connection: close" not in head.lower()
    assert get.lower().endswith(b"\r\nconnection: close")
    assert body == b"nobody"


@pytest.mark.parametrize("kept", [b"", b"connection: keep-alive\r\n"])
@pytest.mark.parametrize("verb", [b"GET", b"HEAD"])
def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection_and_has_no_chunks(verb: bytes, kept: bytes) -> None:
    asked = GET.replace(b"GET /a HTTP/1.1", verb + b" /large HTTP/1.0").replace(b"\r\n\r\n", b"\r\n" + kept + b"\r\n")
    with served() as server, connected(server.port) as client:
        client.sendall(asked)
        head, _, body = read(client).partition(b"\r\n\r\n")
    head = head.lower()
    assert (b"transfer-encoding" in head, b"connection: close" in head) == (False, True)
    assert len(body) == (LARGE if verb == b"GET" else 0)


@pytest.mark.parametrize("part", [b"x: " + b"y" * 4 * HEAD, b"x: y\r\n" * HEAD], ids=["one header", "many headers"])
def test_a_head_without_measure_is_refused(port: int, part: bytes) -> None:
    with connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(part), 4096):
                connection.sendall((GET[:-2] if at == 0 else b"") + part[at : at + 4096])
        assert read(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "rest", [b"0\r\nx: " + b"y" * 4 * HEAD, b"1;" + b"x" * 4 * HEAD], ids=["trailers", "extension"]
)
def test_what_is_no_data_in_chunks_is_bounded(port: int, rest: bytes) -> None:
    with connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n" + rest)
        assert read(connection)[:13] in (b"HTTP/1.1 400 ", b"")  # it may be reset with what it did not read


@pytest.mark.cases("head")
def test_lengths_that_contradict_and_what_is_not_http_are_refused(port: int, head: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + head)
        received = read(connection)
    assert received[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")
    assert received.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("junk", [b"JUNK\x00\r\n\r\n", b"\x16\x03\r\n\r\n"])
def test_what_follows_a_good_request_in_its_packet_is_refused_after_the_good_answer(port: int, junk: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n\r\nab" + junk)
        good, bad = read(connection).split(b"HTTP/1.1 ")[1:]
    assert (good[:4], bad[:4]) == (b"200 ", b"400 ")


@pytest.mark.parametrize("head", [b"content-length: %d\r\n\r\n" % len(BODY), b"transfer-encoding: chunked\r\n\r\n"])
def test_a_request_that_is_answered_before_its_body_has_one_answer_and_its_body_is_dropped(head: bytes) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) if b"chunked" in head else BODY
    with served(application=refuser) as server, connected(server.port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + head + body + LAST)
        received = read(connection)
    assert received.count(b"HTTP/1.1 403 ") == received.count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize("application", [application, refuser], ids=["before", "after"])
def test_a_body_that_is_malformed_ends_its_connection_and_writes_no_error(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    with served(application=application) as server, connected(server.port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        answered = b""
        while application is refuser and not answered.endswith(b"nobody"):
            answered += connection.recv(65536)
        connection.sendall(b"zz\r\n")
        assert read(connection)[:13] == (b"" if application is refuser else b"HTTP/1.1 400 ")
    assert not caplog.records


def test_a_request_that_would_rather_speak_another_protocol_is_answered_with_its_body(port: int) -> None:
    wish = b"connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\nupgrade: h2c\r\n"
    with connected(port) as connection:
        connection.sendall(b"POST /a HTTP/1.1\r\nhost: test\r\n" + wish + b"content-length: 5\r\n\r\nhello")
        assert b"\r\n5\r\n" in connection.recv(65536)
        connection.sendall(LAST)
        assert read(connection).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_a_request_for_a_websocket_that_is_none_is_refused(port: int, method: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(method + b" /a HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        assert read(connection).startswith(b"HTTP/1.1 400 ")


def test_requests_of_one_connection_are_served_one_after_another_and_in_order() -> None:
    running, most = 0, 0

    async def slow(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        await HttpAnswer(200, {}, (scope["path"].encode(),))(scope, receive, send)

    paths = [b"/%d" % number for number in range(100)]
    with served(application=slow) as server, connected(server.port) as connection:
        requests = b"".join(GET.replace(b"/a", path) for path in paths)
        connection.sendall(requests + LAST)
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

    with served(application=late) as server, connected(server.port) as connection:
        connection.sendall(GET)
        head = connection.recv(65536)
        released.set()
        body = connection.recv(65536)
    assert head.endswith(b"\r\n\r\n")
    assert b"\r\nlocation: /there\r\n" in head
    assert b"at last" in body


def test_a_stopping_server_ends_a_connection_after_the_current_answer() -> None:
    with served() as server, connected(server.port) as connection:
        server.part()
        connection.sendall(GET * 1000)
        received = read(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in received.lower()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_stopping_server_finishes_an_answer_and_closes_idle_connections(tmp_path: Path, tls: bool) -> None:
    began, released = threading.Event(), threading.Event()

    async def late(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        began.set()
        assert await asyncio.to_thread(released.wait, 60)
        await HttpAnswer(200, {}, (b"at last",))(scope, receive, send)

    certificate, key = self_signed(tmp_path)
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(contextlib.ExitStack())
        server = ends.enter_context(served(LIMITS, open_tls(certificate, key) if tls else None, late))
        idle, busy = (stack.enter_context(connected(server.port)) for _ in range(2))
        if tls:
            trust = ssl.create_default_context(cafile=certificate)
            idle, busy = (trust.wrap_socket(one, server_hostname="localhost") for one in (idle, busy))
        busy.sendall(GET)
        assert began.wait(60)
        stopping = threading.Thread(target=ends.close)
        stopping.start()
        assert read(idle) == b""
        idle.close()
        released.set()
        assert read(busy).endswith(b"at last")
        busy.close()
        stopping.join()


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
@pytest.mark.parametrize(
    "request_",
    [GET, b"POST /a HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"],
    ids=["get", "chunked"],
)
def test_a_connection_that_sends_requests_without_end_takes_little_memory(
    server: HttpServer, request_: bytes, reads: bool
) -> None:
    """Of a parser that is not one request behind the other, some 70 MB."""
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
    assert grown < 10 * 2**20


def test_one_connection_too_many_is_refused() -> None:
    with served() as server, contextlib.ExitStack() as stack:
        for _ in range(LIMITS.connections):
            connection = stack.enter_context(connected(server.port))
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        with connected(server.port) as connection:
            connection.sendall(GET)
            assert read(connection).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_large_body_is_whole_and_what_follows_it_is_served(tmp_path: Path, tls: bool) -> None:
    certificate, key = self_signed(tmp_path)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(LIMITS, open_tls(certificate, key) if tls else None))
        connection = stack.enter_context(connected(server.port))
        if tls:
            trust = ssl.create_default_context(cafile=certificate)
            connection = stack.enter_context(trust.wrap_socket(connection, server_hostname="localhost"))
            assert connection.version() in ("TLSv1.2", "TLSv1.3")
        ask = b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n" % len(BODY)
        connection.sendall(ask + b"\r\n" + BODY + ask + b"connection: close\r\n\r\n")
        connection.sendall(BODY)
        received = read(connection)
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert received.count(b"%d" % len(BODY)) == 2
