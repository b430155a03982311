"""What clients can make a router hold, at a router as it ships."""

import contextlib
import json
import re
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from tests.builders import recorded
from tests.integration.api.test_connection import read
from tests.keyring import keys_in, secret_of
from tests.producing import infer_body
from tests.routing import RouterProcess, echo_fleet
from tests.waiting import until
from tests.working import empty_fleet

pytestmark = pytest.mark.slow

MIB = 2**20
QUEUES = recorded("fleets/bodies.yaml")


@pytest.fixture(scope="module")
def router(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router before one device, whose tenants may hold four bodies each, and all of them six."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "queues.yaml").write_text(QUEUES)
    keys = keys_in(folder / "keys", lab=("submit",), shop=("submit",), wide=("submit",))
    settings = replace(empty_fleet(valkey_url, lasting=True), queues=folder / "queues.yaml")
    with echo_fleet(settings, keys) as fleet:
        yield fleet.router


@pytest.fixture
def port(router: RouterProcess) -> int:
    return int(router.http.rpartition(":")[2])


@pytest.fixture
def grown(router: RouterProcess) -> Callable[[], int]:
    """Bytes by which the router's memory has grown since the test began."""
    process = psutil.Process(router.process.pid)
    before = process.memory_info().rss
    return lambda: process.memory_info().rss - before


def begun(
    port: int, tenant: str, *, length: int | None = None, sent: bytes = b"", path: str = "/v2/models/echo/infer"
) -> socket.socket:
    """A connection on which a request of the tenant began."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {secret_of(tenant)}\r\n"
    framed = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(f"{head}{framed}\r\n\r\n".encode() + sent)
    return connection


def pushed(connection: socket.socket, piece: bytes, count: int) -> None:
    """Send a piece so many times, unless the other side will not have it."""
    with contextlib.suppress(OSError):
        for _ in range(count):
            connection.sendall(piece)


def status_of(port: int, tenant: str, body: bytes) -> int:
    with begun(port, tenant, length=len(body), sent=body) as connection:
        return int(connection.recv(65536).split()[1])


def is_answered(port: int, tenant: str) -> bool:
    return status_of(port, tenant, json.dumps(infer_body("a")).encode()) == 200


def test_unfinished_bodies_of_one_key_take_no_more_than_its_limit_and_others_are_served(
    port: int, grown: Callable[[], int]
) -> None:
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(begun(port, "lab", length=4 * MIB, sent=b"x")) for _ in range(30)]
        refused = [connection for connection in many[4:] if b"429" in connection.recv(12)]
        for connection in many[:4]:
            pushed(connection, bytes(MIB - 1), 4)
        assert len(refused) == 26
        assert all(re.search(rb"\r\nretry-after: 1\r\n.*rate_limited", read(c), re.DOTALL) for c in refused)
        assert is_answered(port, "shop")
        assert status_of(port, "lab", b"{") == 429
        assert grown() < 40 * MIB
    assert until(lambda: is_answered(port, "lab"))


def test_bodies_of_no_declared_length_count_as_they_come(port: int, grown: Callable[[], int]) -> None:
    with contextlib.ExitStack() as stack:
        path = "/v2/models/echo/placement"
        many = [stack.enter_context(begun(port, "lab", path=path)) for _ in range(8)]
        for _ in range(3):
            for connection in many:
                pushed(connection, b"%x\r\n%s\r\n" % (MIB, bytes(MIB)), 1)
        assert until(lambda: bool(select.select(many, [], [], 0)[0]))  # a refusal came, though no body is whole
        assert grown() < 40 * MIB
        for connection in many:
            pushed(connection, b"0\r\n\r\n", 1)
        answers = {connection.recv(12)[9:] for connection in many}
        assert answers == {b"400", b"429"}
    assert until(lambda: is_answered(port, "lab"))


def test_bodies_of_all_keys_take_no_more_than_the_routers_limit(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for tenant, count in [("wide", 3), ("shop", 3)]:
            for _ in range(count):
                stack.enter_context(begun(port, tenant, length=4 * MIB, sent=b"x"))
        with begun(port, "lab", length=MIB) as connection:
            answer = read(connection)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert answer.count(b"HTTP/1.1 ") == 1
    assert until(lambda: is_answered(port, "lab"))
