"""A set of Valkey servers with one password, each of which all others use by its cable, and sentinels that watch it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from local.embedded import EmbeddedValkey, find_binary, free_port
from tests.cable import Cable
from tests.waiting import until

SERVICE = "fleet"
_TIMEOUT = 90.0  # seconds for a failover, or for all to follow, on a busy machine


class Server:
    """A Valkey server, which all others reach through its cable."""

    def __init__(self, folder: Path, password: str, confirm: int) -> None:
        folder.mkdir(parents=True)
        (folder / "valkey.password").write_text(password)
        self._confirm = confirm
        self._valkey = EmbeddedValkey(folder, timeout=_TIMEOUT)
        self.start()
        self.cable = Cable("127.0.0.1", urlsplit(self._valkey.url).port or 0)
        self.set_up()

    def start(self) -> None:
        """Start it, from its log if it has one."""
        self._valkey.start()

    def set_up(self) -> None:
        """What a server of the set has in its configuration file."""
        with self.client() as client:
            client.config_set("masterauth", urlsplit(self._valkey.url).password)
            client.config_set("repl-diskless-sync-delay", 0)
            client.config_set("replica-announce-ip", "127.0.0.1")
            client.config_set("replica-announce-port", self.cable.port)
            client.config_set("min-replicas-max-lag", 3)
            client.config_set("min-replicas-to-write", self._confirm)

    def client(self) -> redis.Redis:
        """A client that needs no cable."""
        return redis.Redis.from_url(self._valkey.url, socket_timeout=5)

    def replication(self) -> dict[str, Any]:
        """What it says of its replication; nothing if it does not answer."""
        with suppress(redis.RedisError, OSError), self.client() as client:
            return dict(client.info("replication"))
        return {}

    def signal(self, number: signal.Signals) -> None:
        """Signal its process."""
        if (pid := self._valkey.pid) is not None:
            os.kill(pid, number)

    def kill(self) -> None:
        """`kill -9`."""
        self.signal(signal.SIGKILL)
        until(lambda: self._valkey.pid is None, timeout=_TIMEOUT)

    def stop(self) -> None:
        """Stop it for good."""
        self.signal(signal.SIGCONT)
        self._valkey.stop()
        self.cable.close()


class ServerSet:
    """A primary, its replicas, and three sentinels, which take a server for gone after `down_after` seconds of silence.

    A primary takes writes while `confirm` replicas follow it.
    """

    def __init__(
        self, folder: Path, stack: ExitStack, *, replicas: int, down_after: float = 3.0, confirm: int = 0
    ) -> None:
        self.password, self._replicas = secrets.token_hex(16), replicas
        self.servers: list[Server] = []
        for number in range(replicas + 1):
            self.servers.append(Server(folder / f"server-{number}", self.password, confirm))
            stack.callback(self.servers[-1].stop)
        first = self.servers[0].cable.port
        for replica in self.servers[1:]:
            with replica.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", first)
        watches = partial(_sentinel, folder, first, self.password, replicas=replicas, down_after=down_after)
        self._sentinels = [stack.enter_context(watches()) for _ in range(3)]
        self.await_whole()

    @property
    def url(self) -> str:
        """The address of the sentinels, for routers, workers and producers."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinels)
        return f"redis+sentinel://:{self.password}@{hosts}/0?service={SERVICE}"

    def primary(self) -> Server:
        """The server that the sentinels name."""
        return next(server for server in self.servers if server.cable.port == self._named())

    def await_failover(self, before: Server) -> None:
        """Wait until the sentinels name another."""
        assert until(lambda: self._named() != before.cable.port, timeout=_TIMEOUT), "no failover"

    def await_whole(self) -> None:
        """Wait until all servers follow the one that the sentinels name."""
        self.await_followers(self._replicas)

    def await_followers(self, count: int) -> None:
        """Wait until so many servers follow the one that the sentinels name."""
        assert until(lambda: self._followers() >= count, timeout=_TIMEOUT), "the replicas do not follow"

    def _followers(self) -> int:
        said = self.primary().replication()
        slaves = [said.get(f"slave{number}", {}) for number in range(self._replicas)]
        return sum(slave.get("state") == "online" for slave in slaves) if said.get("role") == "master" else 0

    def _named(self) -> int:
        """The port of the primary that a sentinel names."""
        with redis.Redis(port=self._sentinels[0], socket_timeout=5) as client:
            return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


@contextmanager
def _sentinel(folder: Path, primary: int, password: str, *, replicas: int, down_after: float) -> Iterator[int]:
    """A sentinel's process, its files in `folder`; its port, once it sees all replicas of the primary on that port.

    `down_after`: seconds of silence after which it takes a server for gone.
    """
    port = free_port()
    file = folder / f"sentinel-{port}.conf"
    file.write_text(f"""\
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {SERVICE} 127.0.0.1 {primary} 2
sentinel auth-pass {SERVICE} {password}
sentinel down-after-milliseconds {SERVICE} {int(down_after * 1000)}
sentinel failover-timeout {SERVICE} 6000
sentinel parallel-syncs {SERVICE} {replicas}
""")
    with file.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([find_binary(), file, "--sentinel"], stdout=log, stderr=log)
    try:
        with redis.Redis(port=port) as client:
            assert until(lambda: _sees(client) == replicas, timeout=_TIMEOUT), "a sentinel does not see the replicas"
        yield port
    finally:
        process.terminate()
        process.wait()


def _sees(client: redis.Redis) -> int:
    with suppress(redis.RedisError):
        return len(client.execute_command("SENTINEL", "REPLICAS", SERVICE))
    return 0
