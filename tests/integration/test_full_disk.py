from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from tasks.settings import Settings
from tests.chaos.store import Store
from tests.routing import eventually, router_process


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


def test_a_log_that_a_full_disk_cut_short_is_written_anew_and_can_be_read(settings: Settings, store: Store) -> None:
    url = store.primary.url
    with redis.Redis.from_url(url) as client, router_process(replace(settings, broker=url, state=url)):
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
