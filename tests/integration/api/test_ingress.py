"""What slow clients may do to a server behind docker's and the chart's nginx: nothing that the server notices."""

import asyncio
import contextlib
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from api.answers import HttpAnswer, json_whole
from api.gate import Receive, Send
from api.inference.streaming import STREAM_HEADERS
from api.server import HttpServer
from tasks.queues.limits import Limits
from tasks.settings import TREE
from taxiway.contract.peers import PATH
from tests.integration.api.test_connection import GET, connected, read, served
from tests.routing import HTTP
from tests.waiting import until

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIGURATION = TREE / "charts" / "taxiway" / "files" / "ingress.conf"
WITHIN = {"client_header_timeout 10s": "1s", "client_body_timeout 30s": "1s", "send_timeout 30s": "2s"}
LARGE = 2**24
IDLE = 10_000
ROWS = b"[%s]" % b",".join(b"%d" % n for n in range(5000))

pytestmark = pytest.mark.skipif(NGINX is None and "CI" not in os.environ, reason="needs nginx")


class Behind:
    """An application that counts its requests: those begun, those ended, and those whose clients left."""

    def __init__(self) -> None:
        self.begun = self.ended = self.left = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "bytes": (await receive())["bytes"]})
            return
        self.begun += 1
        while (message := await receive()).get("more_body"):
            pass
        if scope["path"] == "/wait":
            while message["type"] != "http.disconnect":
                message = await receive()
            self.left += 1
        elif scope["path"] == "/events":
            headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: first\n\n", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left += 1
        elif scope["path"] == "/json":
            await json_whole(ROWS)(scope, receive, send)
        else:
            await HttpAnswer(200, {}, (bytes(LARGE) if scope["path"] == "/large" else b"good",))(scope, receive, send)
        self.ended += 1


@pytest.fixture(scope="module")
def behind() -> Behind:
    return Behind()


@pytest.fixture(scope="module")
def server(behind: Behind) -> Iterator[HttpServer]:
    with served(Limits(), application=behind) as server:
        yield server


@pytest.fixture(scope="module")
def port(server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where nginx listens, with shorter times than it ships with."""
    assert NGINX is not None
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    text = CONFIGURATION.read_text().replace("router:8080", f"127.0.0.1:{server.port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace("/tmp/", f"{folder}/")
    for setting, seconds in WITHIN.items():
        assert setting in text
        text = text.replace(setting, f"{setting.split()[0]} {seconds}")
    (folder / "nginx.conf").write_text(text)
    owner = "user root; " if os.geteuid() == 0 else ""  # the worker's user cannot enter the folder otherwise
    command = [NGINX, "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", f"{owner}daemon off;"]
    process = subprocess.Popen(command)
    try:
        assert until(lambda: is_served(port))
        yield port
    finally:
        process.terminate()
        process.wait()


def is_served(port: int) -> bool:
    with contextlib.suppress(OSError), connected(port) as connection:
        connection.sendall(GET)
        return connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    return False


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_an_answer_is_compressed_for_those_who_accept_it(port: int, coding: str) -> None:
    answer = HTTP.get(f"http://127.0.0.1:{port}/json", headers={"accept-encoding": coding})
    assert (answer.headers.get("content-encoding"), answer.content) == ("gzip" if coding == "gzip" else None, ROWS)


def test_the_websocket_of_another_fleet_passes(port: int) -> None:
    async def echoed() -> Any:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}{PATH}") as socket:
            await socket.send_bytes(b"hello")
            return (await socket.receive(timeout=60)).data

    assert asyncio.run(echoed()) == b"hello"


POST = b"POST /a HTTP/1.1\r\nhost: test\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n64\r\nx"
BEGUN = {
    "nothing": b"",
    "half a head": GET[:-2],
    "a byte of 100": POST + b"content-length: 100\r\n\r\nx",
    "half a chunk": POST + CHUNKED,
}


@pytest.mark.parametrize("begin", BEGUN.values(), ids=BEGUN)
def test_a_client_that_never_ends_its_request_is_let_go_and_never_reaches_the_server(
    behind: Behind, port: int, begin: bytes
) -> None:
    before = behind.begun
    with connected(port) as connection:
        connection.sendall(begin)
        assert read(connection)[:13] in (b"", b"HTTP/1.1 408 ")
    assert behind.begun == before


def test_a_client_that_drips_its_head_is_let_go(behind: Behind, port: int) -> None:
    before = behind.begun
    with connected(port) as connection, pytest.raises(ConnectionError):
        connection.sendall(GET[:-2])
        while True:
            connection.sendall(b"x: y\r\n")
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100), ConnectionError
                raise ConnectionError
    assert behind.begun == before


def test_a_server_is_done_with_an_answer_that_its_client_does_not_read(behind: Behind, port: int) -> None:
    before = behind.ended
    with connected(port) as connection:
        connection.sendall(GET.replace(b"/a", b"/large"))
        assert until(lambda: behind.ended > before)
        assert until(lambda: closed(port, connection), timeout=30)


def closed(port: int, connection: socket.socket) -> bool:
    """Whether nginx closed the connection, which the client has not read to its end."""
    mine = connection.getsockname()[1]
    found = [
        one for one in psutil.net_connections("tcp4") if one.raddr and one.raddr.port == mine and one.laddr.port == port
    ]
    return all(one.status in ("CLOSE", "FIN_WAIT1", "LAST_ACK") for one in found)


@pytest.mark.parametrize("path", [b"/wait", b"/events"])
def test_a_client_that_leaves_is_noticed_by_the_server(behind: Behind, port: int, path: bytes) -> None:
    before, begun = behind.left, behind.begun
    with connected(port) as connection:
        connection.sendall(GET.replace(b"/a", path))
        assert until(lambda: behind.begun > begun)
    assert until(lambda: behind.left > before)


def test_an_event_is_passed_on_at_once(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET.replace(b"/a", b"/events"))
        received = b""
        while b"data: first\n\n" not in received:
            received += connection.recv(65536)


def test_ten_thousand_idle_connections_take_none_of_the_server_and_keep_nobody_waiting(
    server: HttpServer, port: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = psutil.Process()
    try:
        with contextlib.ExitStack() as stack:
            before = process.memory_info().rss
            for _ in range(IDLE):
                stack.enter_context(connected(port))
            assert is_served(port)
            assert server.connections < 100
            assert process.memory_info().rss - before < 2**26  # of this process, which has the clients, too
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
