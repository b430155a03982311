"""Real sentinels watch a real primary and its replica: who connects finds the primary, also after a failover."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from local.embedded import EmbeddedValkey
from tasks.settings import Settings, settings_from
from taxiway import BrokerUnavailableError, Client
from taxiway.client.sync_client import Job
from taxiway.connection import AsyncConnection, ConnectionPool
from tests.routing import router_process
from tests.sentinels import SERVICE, primary_by, sentinel
from tests.waiting import until as patiently
from tests.working import QUEUES, worker_process, worker_settings

pytestmark = pytest.mark.slow


def until(condition: Callable[[], bool], *, timeout: float) -> None:
    """Return once it is so."""
    assert patiently(condition, timeout=timeout)


@dataclass
class Watched:
    """A primary and a replica, and the sentinels' address of them."""

    url: str
    servers: list[EmbeddedValkey]
    settings: Settings

    def primary(self) -> int:
        """The port that the sentinels name."""
        return primary_by(int(self.url.rpartition("@")[2].split(",")[0].rpartition(":")[2]))

    def fail_over(self) -> None:
        """Kill the primary, and start it again once the other has its place."""
        (first,) = (server for server in self.servers if urlsplit(server.url).port == self.primary())
        port = self.primary()
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        first.stop()
        until(lambda: self.primary() != port, timeout=90)
        first.start()
        _let_follow(first)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    password = secrets.token_hex(32)
    with ExitStack() as stack:
        servers = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "valkey.password").write_text(password)
            servers.append(stack.enter_context(EmbeddedValkey(tmp_path / name)))
        first = urlsplit(servers[0].url)
        for server in servers:
            _let_follow(server)
        with redis.Redis.from_url(servers[1].url) as replica:
            replica.execute_command("REPLICAOF", first.hostname, first.port)
            until(lambda: replica.info("replication")["master_link_status"] == "up", timeout=30)
        assert first.port is not None
        terms = (tmp_path, first.port, password)
        ports = [stack.enter_context(sentinel(*terms, replicas=1, down_after=3)) for _ in range(3)]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        url = f"redis+sentinel://:{password}@{hosts}/0?service={SERVICE}"
        (tmp_path / "fleet").mkdir()
        base = settings_from({"TAXIWAY_BROKER": url, "TAXIWAY_SECRET": secrets.token_hex(32)})
        queues = QUEUES.replace("{lease: 1}", "{lease: 1, durability: replicated}")
        yield Watched(url, servers, worker_settings(base, tmp_path / "fleet", queues))


def _let_follow(server: EmbeddedValkey) -> None:
    """Let a server copy another one, whose password is the same."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("masterauth", urlsplit(server.url).password)
        client.config_set("repl-diskless-sync-delay", 0)


def test_both_connections_find_the_primary_and_follow_it(watched: Watched) -> None:
    connections = ConnectionPool(watched.url)

    async def ask() -> bytes:
        connection = AsyncConnection(watched.url)
        await connection.call("SET", "who", "x")
        answer: bytes = (await connection.call("CONFIG", "GET", "port"))[1]
        connection.close()
        return answer

    assert int(asyncio.run(ask())) == int(connections.call("CONFIG", "GET", "port")[1]) == watched.primary()
    watched.fail_over()

    def writes() -> bool:
        try:
            return bool(connections.call("SET", "who", "y"))
        except OSError:
            return False

    until(writes, timeout=60)
    assert int(asyncio.run(ask())) == int(connections.call("CONFIG", "GET", "port")[1]) == watched.primary()
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
        thread = threading.Thread(target=submit, args=(client,))
        thread.start()
        until(lambda: len(accepted) > 50, timeout=60)
        watched.fail_over()
        before = len(accepted)
        until(lambda: len(accepted) > before + 50, timeout=60)
        over.set()
        thread.join()
        for number, job in enumerate(accepted):
            assert job.result(timeout=60).outputs == {"payload": str(number)}
        assert http.infer("echo", "after", timeout=60).outputs == {"payload": "after"}
        assert client.infer("echo", "after", timeout=60).outputs == {"payload": "after"}
