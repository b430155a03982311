from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

import taxiway
from local.doctor import servers
from tasks.heartbeat import GONE_AFTER
from tasks.settings import Settings
from taxiway.contract.keys import HEARTBEATS
from taxiway.errors import BrokerFullError
from tests.chaos.store import Store
from tests.routing import EchoDevice, eventually, router_process
from tests.working import worker_process

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """One whose log is on a small disk."""
    store = Store(tmp_path / "store", replicated=False)
    try:
        if not store.has_disks:
            pytest.skip("only root can make a small disk")
        store.start()
        yield store
    finally:
        store.stop()


def test_a_log_that_a_full_disk_truncated_is_rewritten_and_can_be_read(settings: Settings, store: Store) -> None:
    url = store.primary.url
    with redis.Redis.from_url(url) as client, router_process(replace(settings, broker=url)):
        rewrite(client)  # Valkey leaves holes in a log that it has rewritten
        store.fill()
        eventually(lambda: not writes(client))
        rewrites = log_of(client)["aof_rewrites"]
        store.empty()
        eventually(lambda: log_of(client)["aof_rewrites"] > rewrites)
        eventually(lambda: not log_of(client)["aof_rewrite_in_progress"])
        eventually(lambda: writes(client))
        client.set("the last", "word")
        store.kill()
        store.restart()
        assert client.get("the last") == b"word"


def test_every_interface_says_that_the_disk_is_full_and_nothing_ends_for_want_of_a_device(
    settings: Settings, store: Store
) -> None:
    url = store.primary.url
    own = replace(settings, broker=url)
    device = EchoDevice(own)
    with (
        redis.Redis.from_url(url) as client,
        router_process(own) as router,
        taxiway.Client(router.http) as http,
        taxiway.Client(url) as broker,
    ):
        device.beat()
        [worker] = client.zrange(HEARTBEATS, 0, -1)
        beat = client.zincrby(HEARTBEATS, 2 - GONE_AFTER, worker)  # it will be gone in two seconds
        store.fill()
        eventually(lambda: not writes(client))
        while client.time()[0] <= beat + GONE_AFTER + 1:
            for interface in (http, broker):
                with pytest.raises(BrokerFullError, match="cannot write to its disk") as raised:
                    interface.infer("echo", "no room", timeout=10)
                assert raised.value.details["resource"] == "disk"
        assert http.fleet()["refuses"]
        assert [one.found for one in servers({"TAXIWAY_BROKER": url}) if one.subject == "TAXIWAY_BROKER disk"] == [
            False
        ]
        store.empty()
        eventually(lambda: writes(client))
        device.beat()
        asked = [eventually(partial(accepted, interface)) for interface in (http, broker)]
        eventually(lambda: not http.fleet()["refuses"])
        assert [one.found for one in servers({"TAXIWAY_BROKER": url}) if one.subject == "TAXIWAY_BROKER disk"] == [True]
        with device:
            assert [job.result(timeout=60).outputs for job in asked] == [{"payload": "after"}] * 2


IMPATIENT = """
from celery.worker import heartbeat
from kombu.transport import redis
redis.DEFAULT_HEALTH_CHECK_INTERVAL = redis.Channel.health_check_interval = 1
heartbeat.Heart.start = lambda self: None  # if refused before the check is, it is sent again and again, silently
"""


def test_a_worker_outlives_a_full_disk(
    settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(IMPATIENT)  # its connection is checked each second, not each 25 s
    url, log = store.primary.url, tmp_path / "log"
    own = replace(settings, broker=url)
    with (
        redis.Redis.from_url(url) as client,
        router_process(own),
        taxiway.Client(url) as interface,
        log.open("wb") as written,
        monkeypatch.context() as patched,
    ):
        patched.setenv("PYTHONPATH", str(tmp_path))
        with worker_process(own, log=written) as worker:
            store.fill()
            eventually(lambda: "server:ResponseError" in log.read_text())  # the server refuses the check, too
            eventually(lambda: "Trying again in 1.00 second... (2/None)" in log.read_text())
            store.empty()
            eventually(lambda: writes(client))
            job = eventually(partial(accepted, interface))
            assert job.result(timeout=60).outputs == {"payload": "after"}
            assert worker.process.poll() is None


def accepted(interface: taxiway.Client) -> taxiway.Job | None:
    """A job that this interface takes, None where it still says that the disk is full."""
    with suppress(BrokerFullError):
        return interface.submit("echo", "after", deadline=60)
    return None


def rewrite(client: redis.Redis) -> None:
    before = log_of(client)["aof_rewrites"]
    client.bgrewriteaof()
    eventually(lambda: log_of(client)["aof_rewrites"] > before and not log_of(client)["aof_rewrite_in_progress"])


def log_of(client: redis.Redis) -> dict[str, Any]:
    return client.info("persistence")


def writes(client: redis.Redis) -> bool:
    """Whether the server takes a value, of more than a page: what is cut short is within it."""
    with suppress(redis.ResponseError):
        return bool(client.set("a value", b"x" * 10_000))
    return False
