"""The scripts of the state store on a real Valkey server."""

import uuid
from collections.abc import Callable

import msgspec
import pytest

from broker.port import Outgoing
from broker.valkey.forwarding import RefusedJob, list_refused_call
from broker.valkey.jobs import REFUSED_TOKEN, Ending, Verdict
from broker.valkey.processes import heartbeat_call
from tasks.models.profiles import bin_of, predicted, read_lengths
from taxiway.contract.job import JobState
from taxiway.contract.keys import (
    ACCEPTED,
    DEVICES,
    HEARTBEATS,
    LENGTHS,
    UNACKED,
    WORK,
    job_key,
    lengths_cell,
    reply_channel,
    result_key,
    spent_key,
)
from tests.narrowing import as_bytes
from tests.routing import eventually
from tests.scripting import LEASE, Store, is_held, placed
from tests.waiting import until


def success(job: str, token: str = "", reply: str = "") -> Ending:
    return Ending(job, JobState.SUCCEEDED, b"answer of " + job.encode(), token, reply)


def started(store: Store, job: str) -> list[str]:
    """What the record has of the job's run."""
    record = store.record(job)
    return [record[name] for name in ("state", "device", "attempts", "started")]


def test_the_first_claim_wins(store: Store) -> None:
    store.forward(placed("j"))
    [first], [second] = store.claim("a", "j"), store.claim("b", "j")
    assert (first.verdict, first.token) == (Verdict.RUN, "a#1")
    assert (second.verdict, second.token) == (Verdict.HELD, "")
    assert 0 < second.retry_in <= LEASE
    assert store.record("j")["state"] == "queued"


def test_a_start_is_recorded_by_the_worker_that_holds_the_job(store: Store) -> None:
    store.forward(placed("j"))
    [claim] = store.claim("a", "j")
    jobs = [("j", claim.token, 1732.5), ("j", "b#1", 1733.5)]
    assert store.start(*jobs) == [1, 0]
    assert started(store, "j") == ["running", "cpu:0", "1", "1732.5"]


def lost(store: Store, *, alone: bool) -> int:
    """How many workers the job was blamed for when it was claimed by one that then ended, `alone` with it or not."""
    [claim] = store.claim("w", "j", lease=0.05)
    store.alone(("j", claim.token), alone=alone)
    assert until(lambda: not is_held(store.client, "j"))
    return claim.blamed


def test_a_job_is_blamed_for_its_first_lost_worker_and_then_for_those_that_handled_nothing_beside_it(
    store: Store,
) -> None:
    assert [lost(store, alone=alone) for alone in (False, False, True, False)] == [0, 1, 1, 2]
    [last] = store.claim("b", "j")
    store.alone(("j", last.token), alone=True)
    store.release(("j", last.token))
    assert store.claim("c", "j")[0].blamed == 2


def test_a_start_that_was_not_recorded_is_recorded_with_the_end(store: Store) -> None:
    store.forward(placed("j"))
    [claim] = store.claim("a", "j")
    ended = Ending("j", JobState.SUCCEEDED, b"answer", claim.token, started="1732.5", device="cpu:0")
    assert store.finish(ended) == [1]
    assert started(store, "j") == ["succeeded", "cpu:0", "1", "1732.5"]


def test_a_result_that_is_written_acknowledges_its_message(store: Store) -> None:
    store.client.hset(UNACKED[0], mapping={"1": "m", "2": "m"})
    store.client.zadd(UNACKED[1], {"1": 1.0, "2": 1.0})
    [claim] = store.claim("a", "j")
    endings = success("j", claim.token), success("k", "b#1")
    done, fenced = (msgspec.structs.replace(one, tag=tag) for one, tag in zip(endings, "12", strict=True))
    assert store.finish(done, fenced) == [1, 0]
    assert (store.client.hkeys(UNACKED[0]), store.client.zrange(UNACKED[1], 0, -1)) == ([b"2"], [b"2"])


def test_several_jobs_are_claimed_at_once_each_with_its_verdict(store: Store) -> None:
    store.finish(success("done"))
    store.claim("other", "held")
    verdicts = [claim.verdict for claim in store.claim("a", "done", "held", "free")]
    assert verdicts == [Verdict.FINAL, Verdict.HELD, Verdict.RUN]


def test_a_job_past_its_deadline_is_late_unless_it_runs(store: Store) -> None:
    assert store.claim("a", "j", deadline=1.0)[0].verdict is Verdict.LATE
    assert store.client.exists(job_key("j")) == 0
    assert store.claim("a", "j", deadline=store.client.time()[0] + 60)[0].verdict is Verdict.RUN
    assert store.claim("b", "j", deadline=1.0)[0].verdict is Verdict.HELD


def test_a_job_whose_result_is_gone_already_is_still_final(store: Store) -> None:
    store.forward(placed("j"))
    [claim] = store.claim("a", "j")
    store.finish(success("j", claim.token))
    store.client.delete(result_key("j"))
    assert store.claim("b", "j")[0].verdict is Verdict.FINAL
    assert store.finish(Ending("j", JobState.CANCELLED, b"cancelled")) == [0]
    assert store.record("j")["state"] == "succeeded"
    assert store.work() == pytest.approx(0)


def test_a_lease_that_ran_out_lets_another_in_and_fences_the_first(store: Store) -> None:
    store.forward(placed("j"))
    [slow] = store.claim("a", "j", lease=0.05)
    assert until(lambda: not is_held(store.client, "j"))
    [quick] = store.claim("b", "j")
    assert (quick.verdict, quick.token) == (Verdict.RUN, "b#2")
    assert store.finish(success("j", slow.token)) == [0]
    assert store.finish(success("j", quick.token)) == [1]


def test_a_lease_is_renewed_by_its_holder_only(store: Store) -> None:
    [claim] = store.claim("a", "j", lease=5)
    [other] = store.claim("a", "k", lease=5)
    claims = [("j", claim.token), ("k", "somebody#1"), ("gone", "a#1")]
    assert store.renew(60, *claims) == [1, 0, 0]
    now = store.client.time()[0]
    assert float(store.record("j")["held_until"]) > now + 10
    assert float(store.record("k")["held_until"]) < now + 10
    assert other.token == "a#1"


def test_a_job_that_is_released_after_a_failed_run_is_queued_and_the_run_counts(store: Store) -> None:
    store.forward(placed("j"))
    for attempts, counts in ((1, True), (1, False), (2, True)):
        [claim] = store.claim("a", "j")
        store.start(("j", claim.token, 1.0))
        store.release(("j", claim.token), counts=counts)
        assert (store.record("j")["state"], store.record("j")["attempts"]) == ("queued", str(attempts))
    assert store.claim("b", "j")[0].blamed == 0  # none of them is suspected to have ended a worker


def test_a_claim_is_released_by_its_holder_alone_and_one_that_was_never_accepted_gets_no_state(store: Store) -> None:
    [claim] = store.claim("a", "j")
    store.release(("j", "b#1"))
    assert store.claim("b", "j")[0].verdict is Verdict.HELD
    store.release(("j", claim.token))
    assert "state" not in store.record("j")
    assert store.claim("b", "j")[0].token == "b#2"


def test_a_result_is_written_once_with_its_state_and_the_work_is_balanced(store: Store) -> None:
    store.forward(placed("j"), placed("k"))
    [claim, _] = store.claim("a", "j", "k")
    assert store.finish(success("j", claim.token)) == [1]
    assert store.finish(success("j", claim.token), success("j")) == [0, 0]
    assert store.client.get(result_key("j")) == b"answer of j"
    assert 0 < store.client.ttl(result_key("j")) <= 60
    record = store.record("j")
    assert record["state"] == "succeeded"
    assert float(record["finished"]) > 0
    assert store.work() == pytest.approx(0.25)  # the other job's


def test_a_refusal_of_a_job_that_was_never_placed_is_final_and_adds_no_work(store: Store) -> None:
    assert store.finish(Ending("j", JobState.FAILED, b"no such model")) == [1]
    assert store.record("j")["state"] == "failed"
    assert store.client.exists(WORK) == 0
    assert store.forward(placed("j")) == [0]


@pytest.mark.cases("recorded, told, verdict")
def test_a_claim_goes_by_the_deadline_in_its_jobs_record(
    store: Store, recorded: float, told: float, verdict: str
) -> None:
    now = float(store.client.time()[0])
    due, asked = (now + seconds if seconds else 0.0 for seconds in (recorded, told))
    store.forward(placed("j", deadline_at=repr(due)))
    [claim] = store.claim("a", "j", deadline=asked)
    assert claim.verdict is Verdict[verdict]
    assert verdict != "RUN" or claim.deadline_at == pytest.approx(due)


def test_a_cancellation_needs_no_claim_and_fences_the_worker(store: Store) -> None:
    store.forward(placed("j"))
    [claim] = store.claim("a", "j")
    assert store.finish(Ending("j", JobState.CANCELLED, b"cancelled")) == [1]
    assert store.finish(success("j", claim.token)) == [0]
    assert store.client.get(result_key("j")) == b"cancelled"
    assert store.work() == pytest.approx(0)


def received(store: Store, finish: Callable[[], object], *channels: str, count: int = 1) -> list[tuple[str, bytes]]:
    """What is announced on channels as jobs are finished, in the channels' order."""
    messages: list[tuple[str, bytes]] = []
    with store.client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(*channels)
        eventually(lambda: all(count for _, count in store.client.pubsub_numsub(*channels)))
        finish()
        while len(messages) < count:
            message = eventually(lambda: listener.get_message(timeout=0.1))
            messages.append((message["channel"].decode(), message["data"]))
    return sorted(messages)


def test_a_result_is_announced_on_its_own_channel_and_on_its_clients(store: Store) -> None:
    channels = (result_key("j"), result_key("k"), reply_channel("client-1"))

    def finish() -> None:
        store.finish(success("j", reply="client-1"), success("k"))

    answers = (b"answer of j", b"answer of k", b"answer of j")
    assert received(store, finish, *channels, count=3) == sorted(zip(channels, answers, strict=True))


def test_an_end_that_names_no_client_is_announced_to_the_one_on_record(store: Store) -> None:
    """Who cancels a job does not know its client: a router may be recording it just now."""
    store.forward(msgspec.structs.replace(placed("j"), reply="client-1"))
    channel = reply_channel("client-1")

    def finish() -> None:
        store.finish(Ending("j", JobState.CANCELLED, b"cancelled"))

    assert received(store, finish, channel) == [(channel, b"cancelled")]


def generated(job: str, *tokens: int) -> Ending:
    return Ending(job, JobState.SUCCEEDED, b"text", generated=tokens)


def answered(store: Store, tokens: int, *, times: int, tenant: str = "lab") -> dict[int, float]:
    """What is remembered after that many more answers of that length, ten to a job."""
    cell = lengths_cell("generate:1", tenant)
    for _ in range(times // 10):
        job = str(uuid.uuid4())
        store.forward(placed(job, lengths=cell))
        store.finish(generated(job, *[tokens] * 10))
    return dict(read_lengths(as_bytes(store.client.hget(LENGTHS, cell))))


def test_the_lengths_of_a_tenants_answers_are_learned_and_earlier_ones_fade(store: Store) -> None:
    long = answered(store, 400, times=200)
    both = answered(store, 16, times=300)
    assert 400 <= predicted(long, 2000) <= 476
    assert both[bin_of(400)] < 0.06 * long[bin_of(400)]
    assert predicted(both, 400) == 16
    assert set(answered(store, 16, times=1000)) == {bin_of(16)}
    assert answered(store, 400, times=10, tenant="other") == {bin_of(400): 10.0}


def test_a_job_that_does_not_generate_or_was_never_placed_teaches_nothing(store: Store) -> None:
    store.forward(placed("j"), placed("k", lengths="generate:1|lab"))
    store.finish(generated("j", 5), generated("unknown", 5), Ending("k", JobState.FAILED, b"no"))
    assert store.client.exists(LENGTHS) == 0


def test_no_more_tenants_are_remembered_than_the_bound(store: Store) -> None:
    store.client.hset(LENGTHS, mapping={f"m:1|{n}": "{}" for n in range(512)})
    answered(store, 16, times=10)
    assert store.client.hlen(LENGTHS) == 512
    assert answered(store, 16, times=10)[bin_of(16)] > 10
    assert store.client.hlen(LENGTHS) == 512


SPENT = spent_key("2026-01-31")


def costing(job: str, dollars: float) -> Outgoing:
    return placed(job, tenant="lab", spent=SPENT, cost=repr(dollars))


def test_what_placed_jobs_cost_is_added_up_by_tenant_for_two_days(store: Store) -> None:
    store.forward(costing("j", 0.25), costing("k", 1.5e-05), placed("l", tenant="other"))
    store.forward(costing("j", 0.25))
    assert {name: float(dollars) for name, dollars in store.client.hgetall(SPENT).items()} == {b"lab": 0.250015}
    assert 86400 < store.client.ttl(SPENT) <= 2 * 86400


def test_a_job_that_runs_again_may_cost_as_much_again_until_its_next_bill(store: Store) -> None:
    def spent() -> float:
        return float(store.client.hget(SPENT, "lab") or 0)

    store.forward(costing("j", 4.0))
    [first] = store.claim("a", "j")
    store.start(("j", first.token, 1732.5), device="endpoint:0")
    store.bill("j", "1", 0.5)
    assert spent() == 0.5
    store.release(("j", first.token), counts=True)
    [second] = store.claim("b", "j")
    store.start(("j", second.token, 1733.5), device="endpoint:1")
    assert spent() == 4.5
    for _ in range(2):
        store.bill("j", "2", 1.0)
        assert spent() == 1.5


def test_a_job_that_never_started_costs_its_tenant_nothing(store: Store) -> None:
    store.forward(costing("j", 0.25), costing("k", 0.5))
    [claim] = store.claim("a", "j")
    store.start(("j", claim.token, 1732.5))
    store.finish(success("j", claim.token), Ending("k", JobState.CANCELLED, b"cancelled"))
    assert float(store.client.hget(SPENT, "lab") or 0) == 0.25
    store.forward(costing("l", 1.0))
    store.client.delete(SPENT)
    store.finish(Ending("l", JobState.EXPIRED, b"late"))
    assert store.client.exists(SPENT) == 0


def test_a_heartbeat_keeps_a_devices_facts_and_when_they_came_until_it_says_goodbye(store: Store) -> None:
    now = float(store.run(heartbeat_call("w", b"facts")))
    assert store.client.hgetall(DEVICES) == {b"w": b"facts"}
    assert store.client.zscore(HEARTBEATS, "w") == pytest.approx(now, abs=0.001)
    store.run(heartbeat_call("w", b""))
    assert store.client.exists(DEVICES, HEARTBEATS) == 0


def test_a_refused_job_is_listed_once_though_the_router_that_refused_it_died_before(store: Store) -> None:
    listing = list_refused_call({"j": RefusedJob("5.5", {"model": "none"})}, keep_record=120)
    assert store.finish(Ending("j", JobState.FAILED, b"refused", REFUSED_TOKEN)) == [1]
    assert store.finish(Ending("j", JobState.FAILED, b"refused", REFUSED_TOKEN)) == [0]  # another router, from the copy

    for _ in range(2):
        store.run(listing)

    assert store.client.zrange(ACCEPTED, 0, -1, withscores=True) == [(msgspec.msgpack.encode([job_key("j")]), 5.5)]
    assert store.record("j") | {"accepted": "5.5", "model": "none", "state": "failed"} == store.record("j")
    assert 0 < store.client.ttl(job_key("j")) <= 120


def test_a_refusal_of_a_copy_leaves_an_accepted_job_as_it_is(store: Store) -> None:
    store.forward(placed("j", accepted="1.0"))
    store.finish(success("j"))
    before = store.record("j")

    store.run(list_refused_call({"j": RefusedJob("5.5", {}), "gone": RefusedJob("5.5", {})}, keep_record=120))

    assert store.record("j") == before
    assert not store.client.exists(job_key("gone"))


def test_a_claim_on_a_job_without_a_record_expires(store: Store) -> None:
    [claim] = store.claim("a", "unknown")
    store.release(("unknown", claim.token))
    assert 0 < store.client.ttl(job_key("unknown")) <= 86_400
    store.forward(placed("j"))
    store.claim("a", "j")
    assert 0 < store.client.ttl(job_key("j")) <= 120
