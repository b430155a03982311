"""What the doctor says of a server of the user's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from tasks.embedded import find_binary
from tasks.local.doctor import servers
from tests.guarded import free_port


@pytest.fixture
def open_server() -> Iterator[str]:
    """A Valkey that lets anybody in."""
    port = free_port()
    command = [find_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url, retry=Retry(ConstantBackoff(0.05), 100)) as client:
            client.ping()
        yield url
        process.terminate()


def test_a_server_that_lets_anybody_in_is_named_and_one_with_a_password_is_not(
    open_server: str, valkey_url: str
) -> None:
    said = [{one.subject: one for one in servers({"TAXIWAY_BROKER": url})} for url in (open_server, valkey_url)]
    assert all(one["TAXIWAY_BROKER"].found for one in said)
    assert not said[0]["TAXIWAY_BROKER guard"].found
    assert "TAXIWAY_BROKER guard" not in said[1]
