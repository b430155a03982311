"""The state store: a Valkey server, optionally with a replica, and the small disks for their logs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import redis

from local.embedded import EmbeddedValkey, kept_secret
from tests.cable import Cable

DISK = "768m"
"""The size of a server's disk."""

REPLICATION_DELAY = 0.1
"""Seconds of delay between primary and replica, each way: writes of that time are lost with the primary."""

IN_SYNC = 5.0
"""Seconds within which a replica must confirm its primary's writes; otherwise there is no failover to it."""

_TIMEOUT = 60.0  # seconds until a replica has all data

_MARK = "chaos:mark"


class Store:
    """A primary and its replica, which change roles at a failover. For one thread."""

    def __init__(self, folder: Path, *, replicated: bool) -> None:
        self._servers = [_server(folder / name) for name in (("a", "b") if replicated else ("a",))]
        self._disks = [path for path in (server.data / "valkey" for server in self._servers) if _mount(path)]
        self._link: Cable | None = None

    @property
    def primary(self) -> EmbeddedValkey:
        """The server that takes writes."""
        return self._servers[0]

    @property
    def port(self) -> int:
        """The primary's port."""
        port = urlsplit(self.primary.url).port
        assert port is not None
        return port

    @property
    def has_disks(self) -> bool:
        """Whether the logs are on small disks, which only root can mount."""
        return bool(self._disks)

    def start(self) -> None:
        """Start the servers; returns when the replica has the primary's data."""
        self.primary.start()
        for replica in self._servers[1:]:
            replica.start()
            self._follow(replica)
        if not self.in_sync(_TIMEOUT):
            raise RuntimeError("the replica did not get in sync")

    def in_sync(self, timeout: float) -> bool:
        """Whether the replica is in sync within `timeout` seconds."""
        end = time.monotonic() + timeout
        while not all(map(_linked, self._servers[1:])):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """`kill -9` of the primary."""
        _kill(self.primary)

    def restart(self) -> None:
        """Restart the primary from its log."""
        self.primary.start()

    def fail_over(self) -> float | None:
        """Kill the primary and promote its replica; writes that had not reached the replica are lost.

        Returns the age in seconds of the last write that the replica certainly has: later ones may be lost. Returns
        None and changes nothing if the replica is too far behind.
        """
        old, new = self._servers
        assert self._link is not None
        marked = time.monotonic()
        with _client(old) as client:
            client.set(_MARK, marked)
            if not client.wait(1, int(IN_SYNC * 1000)):
                return None
        self._link.pull()
        _kill(old)
        with _client(new) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        self._servers = [new, old]
        return time.monotonic() - marked

    def rejoin(self) -> None:
        """Start the killed server as a replica of the other."""
        replica = self._servers[1]
        replica.start()
        self._follow(replica)

    def fill(self) -> None:
        """Fill the primary's disk."""
        with _ballast(self.primary).open("wb") as file:
            step = 2**20
            while step:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), step)
                    file.seek(step, os.SEEK_CUR)
                except OSError:
                    step //= 4

    def empty(self) -> None:
        """Free the disks again."""
        for server in self._servers:
            _ballast(server).unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop the servers and unmount the disks."""
        for server in self._servers:
            if server.pid is not None:
                os.kill(server.pid, signal.SIGCONT)
            server.stop()
        if self._link is not None:
            self._link.close()
        for disk in self._disks:
            subprocess.run(["umount", disk], check=False)

    def _follow(self, replica: EmbeddedValkey) -> None:
        """Make it a replica of the primary, through a slow cable."""
        if self._link is not None:
            self._link.close()
        self._link = Cable("127.0.0.1", self.port)
        self._link.delay = REPLICATION_DELAY
        with _client(self.primary) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        with _client(replica) as client:
            client.config_set("masterauth", urlsplit(replica.url).password)
            client.execute_command("REPLICAOF", "127.0.0.1", self._link.port)


def _server(folder: Path) -> EmbeddedValkey:
    """A server in the folder. Both share a password, as in a real failover setup."""
    folder.mkdir(parents=True)
    secret = kept_secret(folder.parent / "password")
    (folder / "valkey.password").write_text(secret)
    return EmbeddedValkey(folder, timeout=30)


def _mount(folder: Path) -> bool:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        return os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    return False


def _ballast(server: EmbeddedValkey) -> Path:
    return server.data / "valkey" / "ballast"


def _kill(server: EmbeddedValkey) -> None:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while server.pid is not None:
        time.sleep(0.005)


def _client(server: EmbeddedValkey) -> redis.Redis:
    return redis.Redis.from_url(server.url, socket_timeout=20)


def _linked(server: EmbeddedValkey) -> bool:
    with _client(server) as client:
        return bool(client.info("replication").get("master_link_status") == "up")
