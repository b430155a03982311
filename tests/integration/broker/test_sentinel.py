"""Real sentinels watch a real primary and its replica: who connects finds the primary, also after a failover."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.settings import Settings, settings_from
from taxiway import BrokerUnavailableError, Client
from taxiway.client.sync_client import Job
from taxiway.connection import AsyncConnection, ConnectionPool
from tests.routing import router_process
from tests.sentinels import SERVICE, ServerSet
from tests.waiting import in_thread, until
from tests.working import QUEUES, worker_process, worker_settings

pytestmark = pytest.mark.slow


@dataclass
class Watched:
    """A primary and a replica, and a fleet that is to use them."""

    servers: ServerSet
    settings: Settings

    @property
    def url(self) -> str:
        """The sentinels' address of them."""
        return self.servers.url

    def fail_over(self) -> None:
        """Kill the primary, and start it again once the other has its place."""
        first = self.servers.primary()
        first.kill()
        self.servers.await_failover(first)
        first.start()
        first.set_up()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with ExitStack() as stack:
        servers = ServerSet(tmp_path, stack, replicas=1)
        (tmp_path / "fleet").mkdir()
        base = settings_from({"TAXIWAY_BROKER": servers.url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        queues = QUEUES.replace("{lease: 1}", "{lease: 1, durability: replicated}")
        yield Watched(servers, worker_settings(base, tmp_path / "fleet", queues))


def test_both_connections_find_the_primary_and_follow_it(watched: Watched) -> None:
    connections = ConnectionPool(watched.url)

    async def ask() -> bytes:
        connection = AsyncConnection(watched.url)
        await connection.call("SET", "who", "x")
        answer: list[bytes] = await connection.call("ROLE")
        connection.close()
        return answer[0]

    def writes() -> bool:
        try:
            return bool(connections.call("SET", "who", "y"))
        except OSError:
            return False

    for _ in range(2):
        assert until(writes, timeout=60)
        assert asyncio.run(ask()) == connections.call("ROLE")[0] == b"master"
        watched.fail_over()
    connections.close()


def test_a_sentinel_that_is_away_is_passed_over(watched: Watched) -> None:
    account, hosts = watched.url.split("@")
    connections = ConnectionPool(f"{account}@127.0.0.1:1,{hosts}")
    assert connections.call("PING") == b"PONG"
    connections.close()
    unknown = watched.url.replace(f"service={SERVICE}", "service=other")
    with pytest.raises(ConnectionError, match="knows no service 'other'"):
        ConnectionPool(unknown).call("PING")
    with pytest.raises(ConnectionError, match="knows no service 'other'"):
        asyncio.run(AsyncConnection(unknown).call("PING"))


def test_a_failover_under_a_running_fleet_loses_no_accepted_job(watched: Watched) -> None:
    accepted: list[Job] = []
    over = threading.Event()

    def submit(client: Client) -> None:
        while not over.wait(0.02):
            try:
                accepted.append(client.submit("echo", str(len(accepted))))
            except BrokerUnavailableError:
                continue

    with (
        router_process(watched.settings) as router,
        worker_process(watched.settings),
        Client(watched.url, durability="replicated") as client,
        Client(router.http) as http,
    ):
        assert client.infer("echo", "before", timeout=60).outputs == {"payload": "before"}
        with in_thread(submit, client, stop=over.set):
            assert until(lambda: len(accepted) > 50, timeout=60)
            watched.fail_over()
            before = len(accepted)
            assert until(lambda: len(accepted) > before + 50, timeout=60)
        for number, job in enumerate(accepted):
            assert job.result(timeout=60).outputs == {"payload": str(number)}
        assert http.infer("echo", "after", timeout=60).outputs == {"payload": "after"}
        assert client.infer("echo", "after", timeout=60).outputs == {"payload": "after"}
