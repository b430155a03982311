"""Valkey's own sentinels, watching servers with one password."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from local.embedded import find_binary, free_port
from tests.waiting import until

SERVICE = "fleet"
_PATIENCE = 90.0  # seconds until a sentinel sees the replicas, on a busy machine


@contextmanager
def sentinel(folder: Path, primary: int, password: str, *, replicas: int, down_after: float) -> Iterator[int]:
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
            assert until(lambda: _sees(client) == replicas, timeout=_PATIENCE), "a sentinel does not see the replicas"
        yield port
    finally:
        process.terminate()
        process.wait()


def _sees(client: redis.Redis) -> int:
    with suppress(redis.RedisError):
        return len(client.execute_command("SENTINEL", "REPLICAS", SERVICE))
    return 0


def primary_by(sentinel: int) -> int:
    """The port of the primary that a sentinel on a port names."""
    with redis.Redis(port=sentinel, socket_timeout=5) as client:
        return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
