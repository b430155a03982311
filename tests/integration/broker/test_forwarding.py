"""What carries arrivals to class queues, on a real Valkey server."""

import asyncio
import math
from contextlib import suppress

import msgspec
import pytest

from broker.port import Arrival, ForwardOutcome, StoredSnapshot
from broker.valkey.jobs import Ending
from broker.valkey.queues import TAKES, ValkeyTransport
from tasks.settings import Settings
from taxiway.contract.job import JobState
from taxiway.contract.keys import (
    ARRIVALS,
    LEVELS,
    SESSIONS,
    WORK,
    in_flight_key,
    job_key,
    open_key,
    priority_lists,
    reply_channel,
    session_key,
    snapshot_key,
)
from taxiway.errors import BrokerUnavailableError
from tests.routing import eventually
from tests.scripting import RECORD, Store, carrying, placed, recorded
from tests.stored import scores


@pytest.fixture(autouse=True)
def sessions(store: Store) -> None:
    for session in ("r", "other", "sleeper"):
        store.live(session, born=True)


def die(store: Store, session: str) -> None:
    store.client.delete(session_key(session))


def test_arrivals_are_taken_in_order_and_the_higher_priority_first(store: Store) -> None:
    nothing = store.exchange(session="r", most=10)
    assert (nothing.lives, nothing.taken) == (True, [])
    low, *_ = reversed(priority_lists(ARRIVALS))
    store.client.lpush(low, b"low")
    store.client.lpush(ARRIVALS, b"first", b"second")
    assert store.take("r") == [b"first", b"second", b"low"]


def test_no_more_is_taken_than_so_many_messages_and_bytes(store: Store) -> None:
    store.client.lpush(ARRIVALS, *[b"%d" % n for n in range(5)])
    assert store.take("r", 2) == [b"0", b"1"]
    assert store.client.lrange(in_flight_key("r", TAKES), 0, -1) == [b"1", b"0"]
    assert store.client.llen(ARRIVALS) == 3
    assert len(store.take("r", most_bytes=2)) == 2


def test_under_a_session_that_ended_nothing_is_taken(store: Store) -> None:
    assert store.live("r")
    store.client.lpush(ARRIVALS, b"m")
    die(store, "r")
    assert store.take("r") == []
    assert store.client.llen(ARRIVALS) == 1
    assert not store.live("r")
    assert not store.client.exists(session_key("r"))


def test_a_forwarded_message_leaves_the_taken_list_for_its_queue_with_its_record_and_work(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    store.take("r")
    assert store.forward(placed("j", b"signed"), session="r") == [True]
    assert not store.client.exists(in_flight_key("r", TAKES))
    assert store.client.lrange("cpu.batch", 0, -1) == [b"signed"]
    assert store.record("j") == RECORD | {"turn": "0"}
    assert 0 < store.client.ttl(job_key("j")) <= 120
    assert store.work() == 0.25


def test_jobs_that_are_alike_are_forwarded_in_order_and_each_counts(store: Store) -> None:
    first = placed("j0", b"0", arrived="rows|cpu.batch|echo:1", rows="3")
    alike = [
        msgspec.structs.replace(first, job=f"j{n}", envelope=carrying(b"%d" % n), reply=f"c{n % 2}") for n in range(5)
    ]
    assert store.forward(*alike, placed("k", b"k")) == [True] * 6
    assert store.client.lrange("cpu.batch", 0, -1) == [b"k", b"4", b"3", b"2", b"1", b"0"]
    assert store.work() == 1.5
    assert store.client.hget(WORK, "rows|cpu.batch|echo:1") == b"15"
    assert [store.record(f"j{n}")["reply"] for n in range(3)] == ["c0", "c1", "c0"]
    assert [store.record(job)["turn"] for job in ("j0", "j1", "j4", "k")] == ["0", "1", "4", "5"]


def test_among_alike_jobs_those_with_a_record_are_dropped_and_each_keeps_its_own_client(store: Store) -> None:
    first = placed("j", b"0")
    store.forward(msgspec.structs.replace(first, job="known", fields=RECORD | {"model": "other"}))
    others = [("j", "c", b"copy"), ("known", "c", b"late"), ("k", "c", b"1"), ("l", "", b"2")]
    alike = [
        msgspec.structs.replace(first, job=job, reply=client, envelope=carrying(raw)) for job, client, raw in others
    ]
    assert store.forward(msgspec.structs.replace(first, reply="c"), *alike) == [True, False, False, True, True]
    assert store.client.lrange("cpu.batch", 0, 1) == [b"2", b"1"]
    records = [store.record(job) for job in "jkl"]
    assert [record.pop("turn") for record in records] == ["1", "2", "3"]
    assert records == [RECORD | {"reply": "c"}] * 2 + [RECORD]
    assert store.record("known")["model"] == "other"
    assert all(0 < store.client.ttl(job_key(job)) <= 120 for job in "jkl")


def test_what_forwards_takes_the_next_arrivals_in_the_place_of_those_before(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    store.take("r")
    store.client.lpush(ARRIVALS, b"next", b"last")
    answer = store.exchange(placed("j"), session="r", most=10)
    assert (answer.done, answer.taken) == ([ForwardOutcome.NEW], [b"next", b"last"])
    assert store.client.lrange(in_flight_key("r", TAKES), 0, -1) == [b"last", b"next"]


def test_a_second_message_of_a_job_is_dropped_and_settled(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m", b"copy")
    store.take("r")
    assert store.forward(placed("j"), placed("j", b"copy", model="other"), session="r") == [True, False]
    assert store.client.lrange("cpu.batch", 0, -1) == [b"m"]
    assert store.record("j")["model"] == "echo:1"
    assert not store.client.exists(in_flight_key("r", TAKES))
    assert store.work() == 0.25


def test_what_is_only_settled_is_published_nowhere(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    store.take("r")
    assert store.forward(session="r") == []
    assert not store.client.exists(ARRIVALS, in_flight_key("r", TAKES), "cpu.batch", WORK)


def test_a_job_that_was_published_elsewhere_is_recorded_only(store: Store) -> None:
    assert store.forward(recorded("j")) == [True]
    assert (store.record("j"), store.work(), store.client.exists("cpu.batch")) == (RECORD | {"turn": "0"}, 0.25, 0)


def test_a_record_outlives_its_jobs_deadline_and_expires(store: Store) -> None:
    now = store.client.time()[0]
    for job, deadline in (("near", now + 600), ("past", now - 600), ("never", 1e300), ("none", 0)):
        assert store.forward(placed(job, deadline_at=repr(float(deadline)))) == [True]
    lasts = {job: store.client.ttl(job_key(job)) for job in ("near", "past", "never", "none")}
    assert lasts["near"] == pytest.approx(720, abs=5)
    assert lasts["past"] == lasts["none"] == pytest.approx(120, abs=5)
    assert lasts["never"] == pytest.approx(315_360_000, abs=5)


def test_a_snapshot_is_kept_once_and_for_its_time_with_the_records(store: Store) -> None:
    snapshot = StoredSnapshot("r.1", b"\x00\xff", keep=60)
    assert store.exchange(recorded("j"), snapshots=[snapshot]).done == [ForwardOutcome.NEW]
    assert store.exchange(snapshots=[StoredSnapshot("r.1", b"later", keep=90)]).done == []
    assert store.client.get(snapshot_key("r.1")) == b"\x00\xff"
    assert 0 < store.client.ttl(snapshot_key("r.1")) <= 60


def test_jobs_beyond_their_tenants_depth_leave_nothing_and_copies_of_the_others_are_none_of_them(store: Store) -> None:
    first = placed("j", b"j", open=open_key("lab"), max_depth="2")
    alike = [msgspec.structs.replace(first, job=job) for job in "jklk"]
    new, copy, over = ForwardOutcome.NEW, ForwardOutcome.COPY, ForwardOutcome.OVER
    assert store.exchange(*alike).done == [new, new, over, copy]
    assert (store.work(), store.client.llen("cpu.batch"), store.record("l")) == (0.5, 2, {})
    assert store.exchange(alike[2], alike[0]).done == [over, copy]
    store.finish(Ending("k", JobState.DEAD, b"dead"))
    assert store.exchange(alike[2], placed("m", b"m", open=open_key("lab"), max_depth="2")).done == [new, over]
    assert set(store.client.zrange(open_key("lab"), 0, -1)) == {b"taxiway:job:j", b"taxiway:job:l"}


def test_a_job_counts_for_its_tenant_for_as_long_as_its_record_lasts(store: Store) -> None:
    now, job = store.client.time()[0], job_key("j").encode()
    store.client.zadd(open_key("lab"), {job_key("lost"): now - 1.0})
    queued = placed("j", open=open_key("lab"), max_depth="1")
    held = {**queued.fields, "state": "held", "holding": "q", "deadline_at": "0.0", "accepted": "1.0"}
    assert store.forward(recorded("j", held)) == [True]
    assert scores(store.client, open_key("lab")) == {job: math.inf}
    assert store.forward(queued, held=True) == [True]
    assert scores(store.client, open_key("lab")) == {job: pytest.approx(now + 120, abs=5)}


def test_what_a_router_took_is_put_back_in_order_before_what_waits_once_it_is_dead(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"first", b"second")
    store.take("r")
    store.client.lpush(ARRIVALS, b"waits")
    assert store.recover("r") == 0
    die(store, "r")
    assert store.recover("r") == 2
    assert store.take("other") == [b"first", b"second", b"waits"]


def test_a_dead_router_is_looked_after_for_its_time(store: Store) -> None:
    die(store, "r")
    store.client.config_resetstat()
    store.recover("r")
    assert "cmdstat_lmove" not in store.client.info("commandstats")
    assert store.client.zscore(SESSIONS, "r") is not None
    store.client.lpush(in_flight_key("r", "0"), b"moved there late")
    assert store.recover("r") == 1
    store.recover("r", remembered=-1.0)
    assert store.client.zscore(SESSIONS, "r") is None


def test_of_ended_lives_so_many_are_remembered_and_one_that_took_something_is_never_forgotten(store: Store) -> None:
    store.client.zadd(SESSIONS, {f"ended {n}": n + 1e9 for n in range(10)})
    store.client.lpush(in_flight_key("ended 9", "0"), b"taken")
    forgotten = [n for n in range(10) if (store.recover(f"ended {n}", remembered=1e12, most=6), not left(store, n))[1]]
    assert forgotten == [0, 1, 2, 3, 4, 5, 6]  # with three that live, six are left
    assert store.client.lrange(ARRIVALS, 0, -1) == [b"taken"]


def left(store: Store, n: int) -> bool:
    return store.client.zscore(SESSIONS, f"ended {n}") is not None


def test_a_router_that_comes_back_cannot_forward_what_another_recovered(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    store.take("sleeper")
    die(store, "sleeper")
    assert store.recover("sleeper") == 1
    store.take("other")
    assert store.forward(placed("j", b"by sleeper"), session="sleeper") == [False]
    assert store.forward(placed("j", b"by other"), session="other") == [True]
    assert store.client.lrange("cpu.batch", 0, -1) == [b"by other"]


def test_the_client_of_a_job_that_ended_before_it_arrived_is_notified(store: Store) -> None:
    store.finish(Ending("j", JobState.CANCELLED, b"cancelled"))
    with store.client.pubsub(ignore_subscribe_messages=True) as received:
        received.subscribe(reply_channel("me"))
        assert store.forward(msgspec.structs.replace(placed("j"), reply="me")) == [False]
        message = eventually(lambda: received.get_message(timeout=0.1))
    assert message["data"] == b"cancelled"


async def opened(settings: Settings) -> ValkeyTransport:
    url = settings.broker
    transport = ValkeyTransport(url, name="router", keep_record=60)
    await transport.take()
    return transport


@pytest.mark.parametrize("waited", [False, True])
async def test_a_session_is_forgotten_as_it_ends_unless_a_move_for_it_may_still_come(
    settings: Settings, store: Store, waited: bool
) -> None:
    transport = await opened(settings)
    if waited:
        waiting = asyncio.create_task(transport.wait(10))
        await asyncio.to_thread(eventually, lambda: store.client.info("clients")["blocked_clients"] == LEVELS)
        waiting.cancel()
    await transport.retire()
    await transport.close()
    assert (b"router.1" in list(scores(store.client, SESSIONS))) is waited


@pytest.mark.parametrize("ended", [False, True])
async def test_what_a_router_could_not_answer_or_took_before_its_session_ended_is_taken_again(
    settings: Settings, store: Store, ended: bool
) -> None:
    transport = await opened(settings)
    store.client.lpush(ARRIVALS, b"{}")
    await transport.wait(10)
    first = await transport.take()
    if ended:
        die(store, "router.1")
        await transport.tidy()  # finds that the session ended
        assert not await transport.take()  # and begins another
    else:
        transport.abandon()
    again = await transport.take()
    await transport.close()
    assert [len(first), len(again)] == [1, 1]
    assert store.client.llen(ARRIVALS) == 1


async def patiently_taken(transport: ValkeyTransport) -> list[Arrival]:
    """What a router takes that tries again after each failure, as `router.service.arrivals` does."""
    for _ in range(20):
        transport.abandon()
        with suppress(BrokerUnavailableError):
            return await transport.take()
    raise AssertionError("the broker is away")


async def test_a_router_whose_connections_break_as_it_waits_begins_another_session(
    settings: Settings, store: Store
) -> None:
    transport = await opened(settings)
    waiting = asyncio.create_task(transport.wait(10))
    await asyncio.to_thread(eventually, lambda: store.client.info("clients")["blocked_clients"] == LEVELS)
    store.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(BrokerUnavailableError):
        await waiting
    store.client.lpush(ARRIVALS, b"{}")
    found = await patiently_taken(transport)
    await transport.close()
    arrivals, sessions = len(found), list(scores(store.client, SESSIONS))
    assert arrivals == 1
    assert b"router.1" in sessions  # a move on a broken connection may still come
