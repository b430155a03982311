"""A state store beside RabbitMQ that is killed, and comes back without its last writes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from tests.routing import depth_on_rabbitmq, empty_queues, eventually
from tests.working import CLASS, Tower, worker_process, worker_settings

pytestmark = pytest.mark.rabbitmq

SOON = 1.0  # seconds: by then a message is acknowledged for which nothing is waited for


class Forgetful:
    """A store whose log is on no disk: it is never flushed."""

    def __init__(self, server: EmbeddedValkey) -> None:
        self._server = server
        with redis.Redis.from_url(server.url) as client:
            client.config_set("appendfsync", "no")
        self._kept = self._log.stat().st_size

    def lose(self) -> None:
        """Kill the server, and start it again without what was not kept."""
        pid = self._server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self._server.pid is None)
        os.truncate(self._log, self._kept)
        self._server.start()

    @property
    def _log(self) -> Path:
        (log,) = self._server.data.glob("valkey/appendonlydir/*.incr.aof")
        return log


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as started:
        yield started


@pytest.fixture
def fleet(server: EmbeddedValkey, settings: Settings, tmp_path: Path, amqp_url: str) -> Settings:
    empty_queues(amqp_url, [CLASS])
    return worker_settings(replace(settings, broker=amqp_url, state=server.url), tmp_path)


def test_an_answer_that_is_lost_is_written_again(server: EmbeddedValkey, fleet: Settings) -> None:
    with Tower(fleet) as tower, worker_process(fleet):
        store = Forgetful(server)
        job = tower.order("echo", "hello")
        answer = tower.await_meta(job)
        time.sleep(SOON)
        store.lose()
        assert tower.await_meta(job) == answer


def test_a_job_runs_again_whose_answer_is_lost_with_its_worker(server: EmbeddedValkey, fleet: Settings) -> None:
    with Tower(fleet) as tower:
        with worker_process(fleet):
            store = Forgetful(server)
            job = tower.order("echo", "hello")
            tower.result(job)
            time.sleep(SOON)
        store.lose()
        with worker_process(fleet):
            assert tower.result(job).outputs == {"payload": "hello"}


def test_a_job_whose_cancelling_is_lost_runs(server: EmbeddedValkey, fleet: Settings) -> None:
    with Tower(fleet) as tower:
        store = Forgetful(server)
        job = tower.order("echo", "hello")
        tower.cancel(job)
        with worker_process(fleet):
            time.sleep(SOON)
            store.lose()
            assert tower.result(job).outputs == {"payload": "hello"}


def test_a_worker_that_stops_has_what_it_wrote_acknowledged(fleet: Settings) -> None:
    with Tower(fleet) as tower, worker_process(fleet) as worker:
        messages = [tower.message("echo", n) for n in range(500)]  # more than it may take ahead
        tower.queue(*messages)
        for message in messages:
            tower.result(message.headers["id"])
        worker.process.terminate()
        worker.process.wait(60)
        assert depth_on_rabbitmq(fleet.broker, CLASS) == 0
