"""A store that is full or bounded refuses clearly and loses nothing; what ended leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway import Client
from taxiway.contract.keys import ACCEPTED, ARRIVALS, DEADLINES, SESSIONS, job_key, priority_lists
from taxiway.errors import BrokerFullError, UnknownModelError
from tests.producing import infer_body
from tests.routing import EchoDevice, eventually, router_process
from tests.working import QUEUES, empty_fleet, worker_process, worker_settings

pytestmark = pytest.mark.slow

BRIEF = "limits: {lease: 1, keep_result: 1, keep_record: 1, keep_explanation: 1}"


DEADLINE = 10
"""Seconds of a job that a busy machine still answers in time, and after which little of it may be left."""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Settings]:
    """A fleet whose server is its own: its memory is to be bounded."""
    with EmbeddedValkey(tmp_path) as server:
        yield empty_fleet(server.url)


def test_a_full_broker_refuses_submits_and_finishes_what_it_accepted(own: Settings) -> None:
    with (
        redis.Redis.from_url(own.broker) as state,
        router_process(own) as router,
        Client(own.broker) as broker,
        httpx.Client(base_url=router.http, trust_env=False) as http,
    ):
        with EchoDevice(own, answering=False):
            jobs = [broker.submit("echo", f"{n}", deadline=600) for n in range(20)]
            eventually(lambda: all(state.exists(job_key(job.id)) for job in jobs))
            state.config_set("maxmemory", state.info("memory")["used_memory"] // 2)
            with pytest.raises(BrokerFullError, match="memory is full"):
                broker.submit("echo", "one more", deadline=600)
            refused = eventually(lambda: _refused(http))
            assert refused.json()["code"] == "broker_full"
            assert int(refused.headers["retry-after"]) >= 1
            eventually(lambda: http.get("/v2/fleet").json()["memory"] > 1)
        with EchoDevice(own):
            assert [job.result(60).outputs["payload"] for job in jobs] == [f"{n}" for n in range(20)]
            state.config_set("maxmemory", 0)
            assert broker.infer("echo", "again", deadline=30).outputs == {"payload": "again"}


def test_a_router_keeps_its_life_while_the_broker_is_full_and_has_nothing_to_do_afterwards(own: Settings) -> None:
    with redis.Redis.from_url(own.broker) as state, router_process(own):
        before = eventually(lambda: state.zrange(SESSIONS, 0, -1))
        state.config_set("maxmemory", state.info("memory")["used_memory"] // 2)
        refused = state.info("errorstats")
        eventually(lambda: _counted(state, "errorstat_OOM") >= _count(refused, "errorstat_OOM") + 6)
        assert state.zrange(SESSIONS, 0, -1) == before
        state.config_set("maxmemory", 0)
        eventually(lambda: state.info("clients")["blocked_clients"] == len(priority_lists(ARRIVALS)))
        state.config_resetstat()
        began = state.time()[0]
        signs = state.zscore(SESSIONS, before[0])
        eventually(lambda: state.zscore(SESSIONS, before[0]) >= signs + 1)
        calls = {name.removeprefix("cmdstat_"): answer["calls"] for name, answer in state.info("commandstats").items()}
        assert "lmove" not in calls
        assert calls["evalsha"] < 20 * (state.time()[0] - began + 1)
        assert state.zrange(SESSIONS, 0, -1) == before


def _counted(state: redis.Redis, kind: str) -> int:
    return _count(state.info("errorstats"), kind)


def _count(answer: dict[str, Any], kind: str) -> int:
    return int(answer.get(kind, {"count": 0})["count"])


def test_what_a_full_broker_does_not_let_through_is_put_back_and_taken_once_there_is_room(own: Settings) -> None:
    with redis.Redis.from_url(own.broker) as state, Client(own.broker) as broker:
        jobs = [broker.submit("echo", f"{n}", deadline=600) for n in range(5)]
        state.config_set("maxmemory", state.info("memory")["used_memory"] // 2)
        with EchoDevice(own), router_process(own):
            eventually(lambda: _counted(state, "errorstat_OOM") > 2)
            state.config_set("maxmemory", 0)
            assert [job.result(60).outputs["payload"] for job in jobs] == [f"{n}" for n in range(5)]
            assert state.zcard(SESSIONS) <= 2


def _refused(http: httpx.Client) -> httpx.Response | None:
    answer = http.post("/v2/models/echo/infer", json=infer_body("a"), headers={"prefer": "respond-async"})
    return answer if answer.status_code == 503 else None


def test_nothing_is_left_of_thousands_of_jobs_once_their_time_is_over(settings: Settings, tmp_path: Path) -> None:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("limits: {lease: 1}", BRIEF))
    large = b"x" * 20_000  # beside its message
    with (
        redis.Redis.from_url(fleet.broker) as state,
        router_process(fleet),
        worker_process(fleet),
        Client(fleet.broker) as client,
    ):
        client.infer("echo", large, deadline=DEADLINE, timeout=60)
        base = set(eventually(lambda: _settled(state), within=DEADLINE + 60))
        inputs = [large if n % 100 == 0 else n for n in range(1500)]
        sizes = [int(state.dbsize()) for _ in client.map("echo", inputs, deadline=DEADLINE, timeout=60)]
        assert len(sizes) == 1500
        assert max(sizes) > len(base) + 50
        eventually(lambda: _settled(state) == sorted(base), within=DEADLINE + 60)


def test_what_came_beside_a_message_that_became_no_job_is_dropped(settings: Settings) -> None:
    large = b"x" * 20_000
    with (
        redis.Redis.from_url(settings.broker) as state,
        router_process(settings) as router,
        EchoDevice(settings, answering=False),
        Client(settings.broker) as broker,
        Client(router.http) as http,
    ):
        eventually(lambda: http.fleet()["devices"])
        first = broker.submit("echo", large, deadline=600, idempotency_key="one")
        eventually(lambda: state.exists(job_key(first.id)))
        own = state.keys("taxiway:blob:*")
        assert len(own) == 1
        assert {client.submit("echo", large, deadline=600, idempotency_key="one").id for client in (broker, http)} == {
            first.id
        }
        refused = broker.submit("no-such-model", large)
        with pytest.raises(UnknownModelError):
            refused.result(60)
        eventually(lambda: state.keys("taxiway:blob:*") == own)


def _settled(state: redis.Redis) -> list[bytes]:
    """The keys, once none of a job is left; without an idle worker's room, which it renews, and what is bounded."""
    lasting = (b"taxiway:room:", b"taxiway:history", b"taxiway:timeline")
    keys = sorted(key for key in state.scan_iter() if not key.startswith(lasting))
    passing = ("taxiway:job:", "celery-task-meta-", "taxiway:blob:", "taxiway:snapshot:", ACCEPTED, DEADLINES)
    return [] if any(key.decode().startswith(passing) for key in keys) else keys
