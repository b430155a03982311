"""A Valkey under TLS, with an account for each kind of process: each can do its work, and nothing else."""

import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry

import taxiway
from tasks.settings import TREE, Settings
from taxiway.contract.keys import ARRIVALS, INFER, result_key
from taxiway.errors import BrokerUnavailableError
from tests.command_line import program
from tests.guarded import Guarded, guarded_valkey
from tests.producing import stop_listening
from tests.routing import router_process
from tests.working import CLASS, QUEUES, worker_process, worker_settings
from workers.celery_adapter.consumer import EXIT_REFUSED

FORGED = "return redis.call('LPUSH', 'taxiway.arrivals', 'forged')"


@pytest.fixture(scope="module")
def fleet(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A router and a worker, each by its account."""
    folder, url = tmp_path_factory.mktemp("fleet"), guarded.url("router")
    base = Settings(url, (secrets.token_bytes(32),), TREE / "queues.yaml", TREE / "models", folder)
    base = worker_settings(base, folder, f"{QUEUES}\ntenants: {{lab: {{max_depth: 100}}}}")
    own = replace(base, broker=guarded.url("worker"))
    with worker_process(own, log=subprocess.DEVNULL), router_process(base):
        yield base


@pytest.mark.usefixtures("fleet")
def test_a_producer_submits_and_receives_small_and_large_answers(guarded: Guarded) -> None:
    with taxiway.Client(guarded.url("producer")) as client:
        for text in ("hello", "large" * 10_000):
            job = client.submit("echo", text, tenant="lab")
            assert job.result(timeout=60).outputs == {"payload": text}
            assert job.status().record.device == "cpu:0"
        client.submit("echo", "unwanted").cancel()


@pytest.mark.usefixtures("fleet")
def test_plain_celery_produces_with_the_same_account(guarded: Guarded) -> None:
    url = guarded.url("producer")
    with Celery("lab", broker=url, backend=url, set_as_current=False) as app:
        sent = app.send_task(INFER, kwargs={"model": "echo", "inputs": "hello"}, queue=ARRIVALS)
        assert sent.get(timeout=60)["outputs"] == {"payload": "hello"}
        stop_listening(app)


@pytest.mark.usefixtures("fleet")
def test_flower_sees_events_and_asks_workers(guarded: Guarded) -> None:
    received: list[str] = []

    def hear(event: dict[str, str]) -> None:
        received.append(event["type"])
        receiver.should_stop = True

    with Celery("looks", broker=guarded.url("flower"), set_as_current=False) as app, app.connection() as connection:
        assert app.control.inspect(timeout=60, limit=1).ping()
        receiver = app.events.Receiver(connection, handlers={"*": hear})
        receiver.capture(timeout=60)
        channel: Any = connection.default_channel
        assert channel.client.llen(CLASS) == 0
    assert received


def test_no_account_was_refused_anything_while_it_did_its_work(guarded: Guarded, fleet: Settings) -> None:
    """Comes after the tests above: the server keeps a log of what it refused."""
    with guarded.client("test") as server:
        assert server.execute_command("ACL", "LOG") == []


def test_a_script_can_do_no_more_than_the_account_that_runs_it(guarded: Guarded) -> None:
    with guarded.client("worker") as client, pytest.raises(redis.ResponseError, match="permission"):
        client.eval(FORGED, 0)


def test_a_worker_whose_account_lacks_its_class_exits_and_says_what_was_refused(
    fleet: Settings, tmp_path: Path
) -> None:
    with guarded_valkey(tmp_path, ["gpu.realtime"]) as server:  # as if the class had been added later
        own = replace(fleet, broker=server.url("worker"))
        done = program("workers", "--class", CLASS, settings=own)
    assert done.returncode == EXIT_REFUSED
    assert "the account at the state store lacks a right" in done.stderr
    assert f"LLEN {CLASS}" in done.stderr


def test_access_needs_an_account_a_certificate_and_tls(guarded: Guarded) -> None:
    pairs = (("cert", "pem"), ("key", "key"))
    ours = {"ssl_ca_certs": str(guarded.folder / "ca.pem")}
    proven = ours | {f"ssl_{kind}file": str(guarded.folder / f"client.{end}") for kind, end in pairs}
    secured = {"ssl": True, **proven}
    tries: list[dict[str, Any]] = [{}, {"ssl": True, **ours}, secured, {**secured, "password": "guess"}]
    for options in tries:
        with (
            redis.Redis("localhost", guarded.port, retry=Retry(NoBackoff(), 0), **options) as client,
            pytest.raises(redis.RedisError),
        ):
            client.get(result_key("j"))


def test_a_server_that_no_authority_of_ours_signed_is_not_spoken_to(guarded: Guarded) -> None:
    url = guarded.url("producer").replace("ca.pem", "client.pem")
    with pytest.raises(BrokerUnavailableError), taxiway.Client(url, connect_timeout=1) as client:
        client.submit("echo", "a")
    with guarded.client("test") as server:
        assert server.llen(ARRIVALS) == 0
