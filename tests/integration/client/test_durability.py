"""`durability: replicated`: a submit returns once the broker's replica has it, and says so where it has not."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import redis

from local.doctor import Finding, servers
from local.embedded import EmbeddedValkey
from tasks.settings import TREE, Settings, settings_from
from taxiway import Client
from taxiway.contract.keys import ARRIVALS, job_key
from taxiway.errors import BrokerUnavailableError, InvalidRequestError
from tests.producing import infer_body
from tests.routing import echo_fleet, eventually
from tests.waiting import BUSY


@dataclass
class Pair:
    """A broker and its replica."""

    settings: Settings
    broker: redis.Redis
    replica: redis.Redis

    def part(self) -> None:
        """Let the replica go its own way."""
        self.replica.execute_command("REPLICAOF", "NO", "ONE")
        eventually(lambda: self.broker.info("replication")["connected_slaves"] == 0)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with EmbeddedValkey(tmp_path / "broker") as first, EmbeddedValkey(tmp_path / "replica") as second:
        settings = settings_from({"TAXIWAY_BROKER": first.url, "TAXIWAY_SECRET": "ab" * 32})
        with redis.Redis.from_url(first.url) as broker, redis.Redis.from_url(second.url) as replica:
            broker.config_set("repl-diskless-sync-delay", 0)
            address = urlsplit(first.url)
            replica.config_set("masterauth", address.password)
            replica.execute_command("REPLICAOF", address.hostname, address.port)
            eventually(lambda: replica.info("replication")["master_link_status"] == "up")
            yield Pair(settings, broker, replica)


def test_what_a_broker_client_submitted_is_at_the_replica(pair: Pair) -> None:
    with Client(pair.settings.broker, durability="replicated") as client:
        for count in range(1, 21):
            client.submit("echo", "a")
            assert pair.replica.llen(ARRIVALS) == count
        pair.part()
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="0 of 1 replicas confirmed"):
            client.submit("echo", "alone")
        assert time.monotonic() - began < 2 + BUSY


def test_a_majority_is_waited_for_and_the_doctor_says_what_the_server_lacks_for_it(pair: Pair, tmp_path: Path) -> None:
    text = (TREE / "queues.yaml").read_text() + "\nlimits: {durability: replicated, replicas: 3}\n"
    (tmp_path / "queues.yaml").write_text(text)
    variables = {"TAXIWAY_BROKER": pair.settings.broker, "TAXIWAY_QUEUES": str(tmp_path / "queues.yaml")}

    def said() -> Finding:
        return next(one for one in servers(variables) if one.subject == "TAXIWAY_BROKER replicas")

    client = Client(pair.settings.broker, durability="replicated", replicas=3)
    with client, pytest.raises(BrokerUnavailableError, match="1 of 2 replicas confirmed"):
        client.submit("echo", "a")
    assert (said().found, said().value) == (False, "1 of 3 replicas connected, min-replicas-to-write 0")
    (tmp_path / "queues.yaml").write_text(text.replace("replicas: 3", "replicas: 1"))
    assert not said().found
    pair.broker.config_set("min-replicas-to-write", 1)
    assert said().found


def test_what_the_http_api_took_is_at_the_replica(pair: Pair, tmp_path: Path) -> None:
    text = (TREE / "queues.yaml").read_text() + "\nlimits: {durability: replicated}\n"
    (tmp_path / "queues.yaml").write_text(text)
    fleet = dataclasses.replace(pair.settings, queues=tmp_path / "queues.yaml")
    with echo_fleet(fleet, answering=False) as echo:

        def ask() -> httpx.Response:
            headers = {"prefer": "respond-async"}
            return echo.http.post("/v2/models/echo/infer", json=infer_body("a"), headers=headers)

        for _ in range(20):
            assert pair.replica.exists(job_key(ask().json()["id"]))
        pair.part()
        refused = ask()
        assert (refused.status_code, refused.json()["code"]) == (503, "broker_unavailable")


def test_a_router_says_itself_how_durable_its_jobs_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"limits\.durability"):
        Client("http://127.0.0.1:1", durability="replicated")
