"""The client's HTTP connections, against a test server with scripted answers."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import pytest

from taxiway.client.http_link import SILENCE, DisconnectedError, HttpLink, HttpResponse
from taxiway.client.sync_client import Client
from taxiway.errors import BrokerUnavailableError, FleetUnavailable, InvalidRequestError, TaxiwayError
from tests.listening import accepting
from tests.waiting import Blocking, in_thread

T = TypeVar("T")
Answer = bytes | list[bytes] | None
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers each request with the next of `answers`, cut into pieces; the last one again and again. None: never."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(length))
                pieces = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if pieces is None:
                    continue
                for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if b"connection: close" in b"".join(pieces) if isinstance(pieces, list) else b"close" in pieces:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@contextmanager
def linked(
    server: Server, *, timeout: float = 10.0, account: str = "", path: str = "", silence: float = SILENCE
) -> Iterator[Any]:
    """A link to the server, which serves while the link is asked."""
    with asyncio.Runner() as runner:
        serving = accepting(server.serve)
        port = runner.run(serving.__aenter__())
        link = Blocking(runner, HttpLink(f"http://{account}127.0.0.1:{port}{path}", timeout, silence=silence))
        try:
            yield link
        finally:
            link.close()
            runner.run(serving.__aexit__(None, None, None))


def test_one_connection_serves_one_call_after_the_other() -> None:
    server = Server(OK)
    with linked(server) as link:
        assert [link.ask("GET", "/a").body for _ in range(3)] == [b"ok"] * 3
    assert server.connections == 1


def test_calls_at_the_same_time_have_a_connection_each() -> None:
    async def together(link: HttpLink) -> list[int]:
        answers = await asyncio.gather(*(link.ask("POST", "/a", [b"x" * size]) for size in (0, 10, 200_000)))
        return [answer.status for answer in answers]

    server = Server(OK)
    with linked(server) as link:
        assert link.runner.run(together(link.called)) == [200] * 3
    assert server.connections == 3
    assert sorted(len(request.partition(b"\r\n\r\n")[2]) for request in server.requests) == [0, 10, 200_000]


def test_a_sink_gets_the_pieces_of_a_good_answer_and_nothing_of_a_bad_one() -> None:
    received: list[bytes] = []
    chunked = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nbo\r\n", b"2\r\ndy\r\n0\r\n\r\n"]
    wrong = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nwrong"
    with linked(Server(chunked, wrong)) as link:
        good, bad = (link.ask("GET", "/a", sink=received.append) for _ in range(2))
    assert (b"".join(received), good.body, bad.body) == (b"body", b"", b"wrong")


def test_a_call_that_is_given_up_leaves_no_answer_to_the_next_one() -> None:
    server = Server(None, OK)
    with linked(server) as link:
        with pytest.raises(TimeoutError):
            link.runner.run(asyncio.wait_for(link.called.ask("GET", "/slow"), 0.2))
        assert link.ask("GET", "/a").body == b"ok"
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\nhalf", b"close: this is no HTTP\r\n\r\n"],
    ids=["cut short", "not HTTP"],
)
def test_an_answer_that_breaks_off_is_no_answer(answer: bytes) -> None:
    with linked(Server(answer), timeout=0.6) as link, pytest.raises(BrokerUnavailableError):
        link.ask("GET", "/a")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_redirection_is_followed(method: str) -> None:
    moved = b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /b\r\ncontent-length: 0\r\n\r\n"
    server = Server(moved, moved, OK)
    with linked(server) as link:
        body = [b"asked"] if method == "POST" else ()
        assert [link.ask(method, "/a", body).body for _ in range(2)] == [b"ok"] * 2
    assert server.requests[2].startswith(f"{method} /b HTTP/1.1\r\n".encode())
    assert server.requests[2].endswith(b"\r\n\r\nasked" if method == "POST" else b"\r\n\r\n")


def test_a_response_over_the_most_bytes_is_an_error_of_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taxiway.client.http_link.MOST_BODY", 1000)
    server = Server([b"HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n"] + [b" " * 500] * 18)
    with linked(server) as link, pytest.raises(FleetUnavailable, match="at most 1000 bytes"):
        link.ask("GET", "/a")


def test_a_response_that_comes_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dripping(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
            with suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.01)

    monkeypatch.setattr("taxiway.client.http_link.LONGEST_CALL", 1.0)
    with linked(Dripping(), timeout=0.6) as link, pytest.raises(BrokerUnavailableError):
        link.ask("GET", "/a")


def test_a_server_that_lives_may_take_longer_than_the_patience() -> None:
    class Slow(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/slow" in head:
                await asyncio.sleep(1.2)
            writer.write(OK)
            writer.close()

    with linked(Slow(OK), timeout=0.6) as link:
        assert link.ask("GET", "/slow").body == b"ok"


@pytest.mark.parametrize("size", [0, 20_000_000], ids=["which it took", "whose body is on its way"])
def test_a_connection_that_a_living_server_has_forgotten_is_given_up_and_its_call_made_again(size: int) -> None:
    class Forgetful(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            asked = [request for request in self.requests if b"/a" in request]
            if self.requests[-1] not in asked:
                writer.write(OK)
            elif len(asked) > 1:
                await reader.readexactly(size)
                writer.write(OK)

    with linked(Forgetful(), timeout=1.0, silence=0.3) as link:
        assert link.ask("POST" if size else "GET", "/a", [b"x" * size] if size else ()).body == b"ok"


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_what_must_happen_once_is_sent_once(method: str) -> None:
    class Leaving(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for answer in (OK, b""):
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(answer)
            writer.close()

    server = Leaving()
    with linked(server) as link:
        assert link.ask("GET", "/a").ok
        with pytest.raises(DisconnectedError):
            link.ask(method, "/a", once=True)
    assert len(server.requests) == 2


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(OK, OK, b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
    answers: list[object] = []
    with linked(server) as link:
        proxy = f"http://user:pass@{link.url.removeprefix('http://')}"
        for name, value in {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": "near.example"}.items():
            monkeypatch.setenv(name, value)
        for router in ("http://far.example/under", link.url, "https://far.example", "http://near.example"):
            other = Blocking(link.runner, HttpLink(router, 0.6))
            try:
                answers.append(other.ask("GET", "/a").body)
            except BrokerUnavailableError as error:
                answers.append(error.details.get("sent", False))
            finally:
                other.close()

    assert answers == [b"ok", b"ok", False, False]
    far, here, tunnel, *_ = (request.partition(b"\r\n")[0] for request in server.requests)
    assert far == b"GET http://far.example/under/a HTTP/1.1"
    assert here == b"GET /a HTTP/1.1"
    assert tunnel == b"CONNECT far.example:443 HTTP/1.1"
    assert b"proxy-authorization: basic" in server.requests[0].lower()
    assert not any(b"near.example" in request for request in server.requests)


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://me:secret@127.0.0.1:9")

    with pytest.raises(InvalidRequestError, match="HTTP_PROXY") as refused:
        HttpLink("http://far.example", 1.0)
    assert "secret" not in str(refused.value)


class Mute(asyncio.Protocol):
    """A connection of a server that answers only while `answering`; all connections are in `made`."""

    answering = False

    def __init__(self, made: "list[Mute]") -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._made.append(self)

    def data_received(self, data: bytes) -> None:
        if self.answering:
            self._transport.write(OK)

    def abort(self) -> None:
        self._transport.abort()


def test_one_probe_of_a_silent_server_serves_all_waiting_calls() -> None:
    made: list[Mute] = []

    def connection() -> Mute:
        return Mute(made)

    async def ask_together(link: HttpLink) -> list[HttpResponse | BaseException]:
        return await asyncio.gather(*(link.ask("GET", "/a") for _ in range(40)), return_exceptions=True)

    async def scenario() -> tuple[list[list[HttpResponse | BaseException]], int]:
        listening = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        link = HttpLink(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", 0.6)
        try:
            silent = [await ask_together(link) for _ in range(3)]
            connections, Mute.answering = len(made), True
            async with asyncio.timeout(60):
                while not all(isinstance(answer, HttpResponse) for answer in await ask_together(link)):
                    pass
            return silent, connections
        finally:
            Mute.answering = False
            await link.close()
            listening.close()
            for one in made:
                one.abort()
            await asyncio.sleep(0)

    silent, connections = asyncio.run(scenario())

    assert all(isinstance(error, BrokerUnavailableError) for errors in silent for error in errors)
    assert connections < 2 * 40  # the first forty have one each; then there are those that ask whether it lives


def test_the_addresss_own_path_name_and_password_go_along() -> None:
    server = Server(OK)
    with linked(server, account="me:p%40ss@", path="/under/") as link:
        link.ask("GET", "/a", headers={"accept": "x/y"})
    request = server.requests[0]
    assert request.startswith(b"GET /under/a HTTP/1.1\r\n")
    assert b"accept: x/y\r\n" in request
    assert b"authorization: Basic bWU6cEBzcw==\r\n" in request
    assert b"host: 127.0.0.1:" in request.lower()


def test_a_client_that_is_not_closed_ends_in_silence_with_its_process() -> None:
    code = "import sys, taxiway; print(taxiway.Client(sys.argv[1]).models())"
    with answering(b"200 OK", b'{"models":[]}') as url:
        command = [sys.executable, "-W", "error", "-c", code, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert (done.stdout, done.stderr) == ("[]\n", "")


DEEP = b"[" * 1_000_000


@pytest.mark.cases("status, body")
def test_an_answer_that_no_router_sends_raises_an_error_of_the_client_alone(status: bytes, body: bytes) -> None:
    def calls(client: Client) -> list[Callable[[], object]]:
        job = client.job("00000000-0000-4000-8000-000000000000")
        infer = partial(client.infer, "m", "x", timeout=5)
        return [partial(client.submit, "m", "x"), infer, job.status, partial(job.result, 5), client.models, client.jobs]

    with answering(status, body) as url, Client(url) as client:
        for call in calls(client):
            with pytest.raises(TaxiwayError):
                call()


@contextmanager
def answering(status: bytes, body: bytes) -> Iterator[str]:
    """The address of a server that answers every request alike."""
    answer = b"HTTP/1.1 %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(body), body)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        in_thread(serve, stop=lambda: listener.shutdown(socket.SHUT_RDWR)),
    ):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
