"""The scripts of the state store on a real Valkey server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tasks.lengths import TENANTS_AT_MOST, bin_of, predicted, read_lengths
from tasks.scripts import (
    CLAIM,
    FINISH,
    FORWARD,
    HEARTBEAT,
    RECOVER,
    RELEASE,
    RENEW,
    TAKE,
    Claim,
    Ending,
    Forward,
    Verdict,
    claim_answer,
    claim_args,
    finish_args,
    forward_args,
    release_args,
    renew_args,
    take_answer,
)
from tasks.settings import Settings
from tasks.transport import PACKED, Reading
from taxiway.job import JobState
from taxiway.keys import (
    ARRIVALS,
    DEVICES,
    HEARTBEATS,
    LENGTHS,
    ROUTERS,
    WORK,
    claim_key,
    job_key,
    lengths_cell,
    priority_lists,
    reading_key,
    reply_channel,
    result_key,
    router_key,
    spent_key,
    taken_key,
    work_cell,
)
from tests.waiting import until

LEASE = 30.0
CELL = work_cell("cpu.batch", 1)
RECORD = {"state": "queued", "model": "echo:1", "cell": CELL, "work": "0.25"}


class Store:
    """A Valkey database and the scripts that run there."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._scripts: dict[str, Any] = {}

    def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script](keys=keys, args=args)

    def take(self, router: str, most: int = 10, prefix: str = "1.") -> list[tuple[str, bytes]]:
        answer = self.run(TAKE, [taken_key(router), *priority_lists(ARRIVALS)], [most, prefix])
        return take_answer(answer)[1]

    def forward(self, router: str, *forwards: Forward) -> list[int]:
        return list(self.run(FORWARD, [taken_key(router), WORK], forward_args(forwards)))

    def recover(self, router: str) -> int:
        return int(self.run(RECOVER, [ROUTERS, router_key(router), taken_key(router), ARRIVALS], [router]))

    def claim(self, worker: str, *jobs: str, lease: float = LEASE, deadline: float = 0.0) -> list[Claim]:
        args = claim_args(worker, lease, [(job, deadline) for job in jobs], "cpu:0")
        return claim_answer(self.run(CLAIM, [], args))[1]

    def finish(self, *endings: Ending, keep_result: int = 60) -> list[int]:
        return list(self.run(FINISH, [WORK, LENGTHS], finish_args(endings, keep_result=keep_result, keep_record=120)))

    def work(self) -> float:
        return float(self.client.hget(WORK, CELL) or 0)

    def record(self, job: str) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.client.hgetall(job_key(job)).items()}


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with redis.Redis.from_url(settings.state) as client:
        yield Store(client)


def placed(tag: str, job: str, message: bytes = b"m", **fields: str) -> Forward:
    return Forward(tag, "cpu.batch", message, job, RECORD | fields, keep=120)


def success(job: str, token: str = "", reply: str = "") -> Ending:
    return Ending(job, JobState.SUCCEEDED, b"answer of " + job.encode(), token, reply)


def test_arrivals_are_taken_in_order_and_the_higher_priority_first(store: Store) -> None:
    low, *_ = reversed(priority_lists(ARRIVALS))
    store.client.lpush(low, b"low")
    store.client.lpush(ARRIVALS, b"first", b"second")
    assert [message for _, message in store.take("r")] == [b"first", b"second", b"low"]


def test_no_more_than_asked_for_is_taken_and_each_has_a_tag_of_its_own(store: Store) -> None:
    store.client.lpush(ARRIVALS, *[b"%d" % n for n in range(5)])
    first, second = store.take("r", 2, "1."), store.take("r", 3, "2.")
    assert [message for _, message in first + second] == [b"0", b"1", b"2", b"3", b"4"]
    assert len({tag for tag, _ in first + second}) == 5
    assert store.client.hgetall(taken_key("r")) == {tag.encode(): message for tag, message in first + second}


def test_taking_from_empty_lists_answers_the_time_alone(store: Store) -> None:
    now, taken = take_answer(store.run(TAKE, [taken_key("r"), *priority_lists(ARRIVALS)], [10, "1."]))
    assert taken == []
    seconds, micros = store.client.time()
    assert now == pytest.approx(seconds + micros / 1e6, abs=5)


def test_a_forwarded_message_leaves_the_taken_hash_for_its_queue_with_its_record_and_work(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    [(tag, _)] = store.take("r")
    assert store.forward("r", placed(tag, "j", b"signed")) == [1]
    assert store.client.hlen(taken_key("r")) == 0
    assert store.client.lrange("cpu.batch", 0, -1) == [b"signed"]
    assert store.record("j") == RECORD
    assert 0 < store.client.ttl(job_key("j")) <= 120
    assert store.work() == 0.25


def test_a_second_message_of_a_job_is_dropped_and_settled(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m", b"copy")
    (first, _), (second, _) = store.take("r")
    assert store.forward("r", placed(first, "j"), placed(second, "j", b"copy", model="other")) == [1, 0]
    assert store.client.lrange("cpu.batch", 0, -1) == [b"m"]
    assert store.record("j")["model"] == "echo:1"
    assert store.client.hlen(taken_key("r")) == 0
    assert store.work() == 0.25


def test_a_message_without_a_job_is_settled_and_published_nowhere(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    [(tag, _)] = store.take("r")
    assert store.forward("r", Forward(tag)) == [0]
    assert store.client.keys() == []


def test_a_job_that_was_published_elsewhere_is_recorded_only(store: Store) -> None:
    assert store.forward("r", Forward("", job="j", fields=RECORD, keep=60)) == [1]
    assert (store.record("j"), store.work(), store.client.exists("cpu.batch")) == (RECORD, 0.25, 0)


def test_a_reading_is_kept_once_and_for_its_time_with_the_records(store: Store) -> None:
    reading = Reading("r.1", b"\x00\xff", keep=60)
    assert store.forward("r", reading.recorded(), Forward("", job="j", fields=RECORD, keep=90)) == [1, 1]
    assert store.forward("r", reading.recorded()) == [0]
    assert store.client.hgetall(reading_key("r.1")) == {PACKED.encode(): b"\x00\xff"}
    assert 0 < store.client.ttl(reading_key("r.1")) <= 60


def test_a_record_without_work_is_kept_all_the_same(store: Store) -> None:
    assert store.forward("r", Forward("", job="j", fields={"state": "held"}, keep=60)) == [1]
    assert store.record("j") == {"state": "held"}
    assert store.client.exists(WORK) == 0


def test_what_a_dead_router_took_is_put_back_before_what_waits(store: Store) -> None:
    store.client.sadd(ROUTERS, "r")
    store.client.lpush(ARRIVALS, b"taken")
    store.take("r")
    store.client.lpush(ARRIVALS, b"waits")
    assert store.recover("r") == 1
    assert [message for _, message in store.take("other")] == [b"taken", b"waits"]
    assert store.client.smembers(ROUTERS) == set()


def test_what_a_living_router_took_stays_its_own(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    store.take("r")
    store.client.set(router_key("r"), "", px=5000)
    assert store.recover("r") == 0
    assert store.client.hlen(taken_key("r")) == 1


def test_a_router_that_comes_back_cannot_forward_what_another_recovered(store: Store) -> None:
    store.client.lpush(ARRIVALS, b"m")
    [(tag, _)] = store.take("sleeper")
    assert store.recover("sleeper") == 1
    [(other, _)] = store.take("other", prefix="7.")
    assert store.forward("sleeper", placed(tag, "j", b"by sleeper")) == [0]
    assert store.forward("other", placed(other, "j", b"by other")) == [1]
    assert store.client.lrange("cpu.batch", 0, -1) == [b"by other"]


def test_the_first_claim_wins_and_is_written_into_the_record(store: Store) -> None:
    store.forward("r", placed("", "j"))
    [first], [second] = store.claim("a", "j"), store.claim("b", "j")
    assert (first.verdict, first.token) == (Verdict.RUN, "a#1")
    assert (second.verdict, second.token) == (Verdict.HELD, "")
    assert 0 < second.retry_in <= LEASE
    record = store.record("j")
    assert (record["state"], record["device"], record["attempts"]) == ("running", "cpu:0", "1")
    assert float(record["started"]) > 0


def test_several_jobs_are_claimed_at_once_each_with_its_verdict(store: Store) -> None:
    store.finish(success("done"))
    store.claim("other", "held")
    verdicts = [claim.verdict for claim in store.claim("a", "done", "held", "free")]
    assert verdicts == [Verdict.FINAL, Verdict.HELD, Verdict.RUN]


def test_a_job_past_its_deadline_is_late_and_not_claimed(store: Store) -> None:
    [claim] = store.claim("a", "j", deadline=1.0)
    assert claim.verdict is Verdict.LATE
    assert store.client.exists(claim_key("j"), job_key("j")) == 0


def test_a_deadline_to_come_is_not_late(store: Store) -> None:
    [claim] = store.claim("a", "j", deadline=store.client.time()[0] + 60)
    assert claim.verdict is Verdict.RUN


def test_a_job_that_somebody_runs_past_its_deadline_is_held_and_not_late(store: Store) -> None:
    store.claim("a", "j")
    [copy] = store.claim("b", "j", deadline=1.0)
    assert copy.verdict is Verdict.HELD


def test_a_job_whose_result_is_gone_already_is_still_final(store: Store) -> None:
    store.forward("r", placed("", "j"))
    [claim] = store.claim("a", "j")
    store.finish(success("j", claim.token))
    store.client.delete(result_key("j"))
    assert store.claim("b", "j")[0].verdict is Verdict.FINAL
    assert store.finish(Ending("j", JobState.CANCELLED, b"cancelled")) == [0]
    assert store.record("j")["state"] == "succeeded"
    assert store.work() == pytest.approx(0)


def test_a_lease_that_ran_out_lets_another_in_and_fences_the_first(store: Store) -> None:
    store.forward("r", placed("", "j"))
    [slow] = store.claim("a", "j", lease=0.05)
    assert until(lambda: store.client.exists(claim_key("j")) == 0)
    [quick] = store.claim("b", "j")
    assert (quick.verdict, quick.token) == (Verdict.RUN, "b#2")
    assert store.finish(success("j", slow.token)) == [0]
    assert store.finish(success("j", quick.token)) == [1]


def test_a_lease_is_renewed_by_its_holder_only(store: Store) -> None:
    [claim] = store.claim("a", "j", lease=5)
    [other] = store.claim("a", "k", lease=5)
    claims = [("j", claim.token), ("k", "somebody#1"), ("gone", "a#1")]
    assert store.run(RENEW, [], renew_args(60, claims)) == 1
    assert store.client.pttl(claim_key("j")) > 5000
    assert store.client.pttl(claim_key("k")) <= 5000
    assert other.token == "a#1"


def test_a_released_job_is_queued_and_free_for_anyone(store: Store) -> None:
    [claim] = store.claim("a", "j")
    store.run(RELEASE, [], release_args([("j", claim.token)]))
    assert store.record("j")["state"] == "queued"
    assert store.claim("b", "j")[0].token == "b#2"


def test_a_claim_is_not_released_by_another(store: Store) -> None:
    store.claim("a", "j")
    store.run(RELEASE, [], release_args([("j", "b#1")]))
    assert store.record("j")["state"] == "running"
    assert store.claim("b", "j")[0].verdict is Verdict.HELD


def test_a_result_is_written_once_with_its_state_and_the_work_is_balanced(store: Store) -> None:
    store.forward("r", placed("", "j"), placed("", "k"))
    [claim, _] = store.claim("a", "j", "k")
    assert store.finish(success("j", claim.token)) == [1]
    assert store.finish(success("j", claim.token), success("j")) == [0, 0]
    assert store.client.get(result_key("j")) == b"answer of j"
    assert 0 < store.client.ttl(result_key("j")) <= 60
    assert store.client.exists(claim_key("j")) == 0
    record = store.record("j")
    assert record["state"] == "succeeded"
    assert float(record["finished"]) >= float(record["started"])
    assert store.work() == pytest.approx(0.25)  # the other job's


def test_a_worker_without_the_claim_writes_nothing(store: Store) -> None:
    store.forward("r", placed("", "j"))
    store.claim("a", "j")
    assert store.finish(success("j", "b#1")) == [0]
    assert store.client.exists(result_key("j")) == 0
    assert store.work() == 0.25


def test_a_refusal_of_a_job_that_was_never_placed_is_final_and_adds_no_work(store: Store) -> None:
    assert store.finish(Ending("j", JobState.FAILED, b"no such model")) == [1]
    assert store.record("j")["state"] == "failed"
    assert store.client.exists(WORK) == 0
    assert store.forward("r", placed("", "j")) == [0]


def test_a_cancellation_needs_no_claim_and_fences_who_runs_it(store: Store) -> None:
    store.forward("r", placed("", "j"))
    [claim] = store.claim("a", "j")
    assert store.finish(Ending("j", JobState.CANCELLED, b"cancelled")) == [1]
    assert store.finish(success("j", claim.token)) == [0]
    assert store.client.get(result_key("j")) == b"cancelled"
    assert store.work() == pytest.approx(0)


def test_a_result_is_announced_on_its_own_channel_and_on_its_clients(store: Store) -> None:
    with store.client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(result_key("j"), reply_channel("client-1"), result_key("k"))
        assert until(lambda: len(store.client.pubsub_channels()) == 3)
        store.finish(success("j", reply="client-1"), success("k"))
        heard: list[tuple[bytes, bytes]] = []

        def listened() -> bool:
            message = listener.get_message(timeout=0.1)
            if message is not None:
                heard.append((message["channel"], message["data"]))
            return len(heard) == 3

        assert until(listened)
    assert sorted(heard) == sorted(
        [
            (result_key("j").encode(), b"answer of j"),
            (reply_channel("client-1").encode(), b"answer of j"),
            (result_key("k").encode(), b"answer of k"),
        ]
    )


def generated(job: str, *tokens: int) -> Ending:
    return Ending(job, JobState.SUCCEEDED, b"text", generated=tokens)


def answered(store: Store, tokens: int, *, times: int, tenant: str = "lab") -> dict[int, float]:
    """What is remembered after that many more answers of that length, ten to a job."""
    cell = lengths_cell("generate:1", tenant)
    for _ in range(times // 10):
        job = str(uuid.uuid4())
        store.forward("r", placed("", job, lengths=cell))
        store.finish(generated(job, *[tokens] * 10))
    return dict(read_lengths(store.client.hget(LENGTHS, cell)))


def test_the_lengths_of_answers_are_learned_and_earlier_ones_fade(store: Store) -> None:
    long = answered(store, 400, times=200)
    both = answered(store, 16, times=300)
    assert 400 <= predicted(long, 2000) <= 476
    assert both[bin_of(400)] < 0.06 * long[bin_of(400)]
    assert predicted(both, 400) == 16
    assert set(answered(store, 16, times=1000)) == {bin_of(16)}


def test_answers_of_one_tenant_say_nothing_of_anothers(store: Store) -> None:
    answered(store, 16, times=50)
    assert answered(store, 400, times=10, tenant="other") == {bin_of(400): 10.0}


def test_a_job_that_does_not_generate_or_was_never_placed_teaches_nothing(store: Store) -> None:
    store.forward("r", placed("", "j"), placed("", "k", lengths="generate:1|lab"))
    store.finish(generated("j", 5), generated("unknown", 5), Ending("k", JobState.FAILED, b"no"))
    assert store.client.exists(LENGTHS) == 0


def test_no_more_tenants_are_remembered_than_the_bound(store: Store) -> None:
    store.client.hset(LENGTHS, mapping={f"m:1|{n}": "{}" for n in range(TENANTS_AT_MOST)})
    answered(store, 16, times=10)
    assert store.client.hlen(LENGTHS) == TENANTS_AT_MOST
    assert answered(store, 16, times=10)[bin_of(16)] > 10
    assert store.client.hlen(LENGTHS) == TENANTS_AT_MOST


SPENT = spent_key("2026-01-31")


def costing(job: str, dollars: float) -> Forward:
    return placed("", job, tenant="lab", spent=SPENT, cost=repr(dollars))


def test_what_placed_jobs_cost_is_added_up_by_tenant_for_two_days(store: Store) -> None:
    store.forward("r", costing("j", 0.25), costing("k", 1.5e-05), placed("", "l", tenant="other"))
    store.forward("r", costing("j", 0.25))
    assert {name: float(dollars) for name, dollars in store.client.hgetall(SPENT).items()} == {b"lab": 0.250015}
    assert 86400 < store.client.ttl(SPENT) <= 2 * 86400


def test_a_job_that_never_started_costs_its_tenant_nothing(store: Store) -> None:
    store.forward("r", costing("j", 0.25), costing("k", 0.5))
    [claim] = store.claim("a", "j")
    store.finish(success("j", claim.token), Ending("k", JobState.CANCELLED, b"cancelled"))
    assert float(store.client.hget(SPENT, "lab") or 0) == 0.25
    store.forward("r", costing("l", 1.0))
    store.client.delete(SPENT)
    store.finish(Ending("l", JobState.EXPIRED, b"late"))
    assert store.client.exists(SPENT) == 0


def test_a_heartbeat_keeps_a_devices_facts_and_when_they_came_by_the_servers_clock(store: Store) -> None:
    now = float(store.run(HEARTBEAT, [DEVICES, HEARTBEATS], ["w", b"facts"]))
    assert store.client.hgetall(DEVICES) == {b"w": b"facts"}
    assert store.client.zscore(HEARTBEATS, "w") == pytest.approx(now, abs=0.001)


def test_a_device_that_says_goodbye_is_gone(store: Store) -> None:
    for facts in (b"facts", b""):
        store.run(HEARTBEAT, [DEVICES, HEARTBEATS], ["w", facts])
    assert store.client.exists(DEVICES, HEARTBEATS) == 0


def test_an_ending_has_a_final_state() -> None:
    with pytest.raises(AssertionError):
        Ending("j", JobState.RUNNING, b"")
