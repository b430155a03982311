"""The outboxes of webhook endpoints on a real Valkey server: bounds, order, and one router an endpoint."""

import msgspec
import pytest

from broker.valkey.jobs import Ending
from broker.valkey.webhooks import (
    DeadEvent,
    Taken,
    announce_call,
    change_call,
    decode_dead,
    decode_event,
    replay_call,
    settle_answer,
    settle_call,
    take_answer,
    take_call,
)
from tasks.webhooks import HOOKS, Notified, WebhookEvent
from taxiway.contract.job import JobState
from taxiway.contract.keys import WEBHOOKS, WEBHOOKS_DUE, webhook_dead_key, webhook_outbox_key
from tests.narrowing import as_bytes
from tests.routing import eventually
from tests.scripting import RECORD, Store, recorded

NOTIFIED = Notified({"completed": ["e"], "failed": ["e", "f"]}, 3, 2)


@pytest.fixture
def store(scripts: Store) -> Store:
    return scripts


def end(
    store: Store, *jobs: str, notified: bytes = msgspec.json.encode(NOTIFIED), state: JobState = JobState.SUCCEEDED
) -> None:
    for job in jobs:
        store.forward(recorded(job, RECORD | {HOOKS: notified.decode()}))
        assert store.finish(Ending(job, state, b"{}")) == [1]


def take(store: Store, router: str = "a", lease: float = 30.0) -> list[Taken]:
    return take_answer(store.run(take_call(router, lease, 10)))[1]


def settle(store: Store, taken: Taken, outcome: str, pause: float = 30.0) -> WebhookEvent | None:
    call = settle_call(taken.endpoint, taken.token, outcome, pause=pause, fault="no", most_dead=2)  # type: ignore[arg-type]
    return settle_answer(store.run(call))


def waiting(store: Store, endpoint: str = "e") -> list[str]:
    found = store.client.lrange(webhook_outbox_key(endpoint), 0, -1)
    return [decode_event(as_bytes(raw)).name for raw in found]


def dead(store: Store, endpoint: str = "e") -> list[DeadEvent]:
    return [decode_dead(as_bytes(raw)) for raw in store.client.lrange(webhook_dead_key(endpoint), 0, -1)]


def test_a_jobs_end_is_written_to_the_outboxes_of_its_endpoints(store: Store) -> None:
    end(store, "good")
    end(store, "bad", state=JobState.FAILED)
    end(store, "gone", state=JobState.CANCELLED)
    assert (waiting(store), waiting(store, "f")) == (["good", "bad"], ["bad"])


@pytest.mark.parametrize("notified", [b"not JSON", b"{}", b'{"endpoints": {}}'])
def test_a_job_ends_whatever_its_record_says_of_webhooks(store: Store, notified: bytes) -> None:
    end(store, "j", notified=notified)
    assert store.record("j")["state"] == "succeeded"
    assert store.client.exists(WEBHOOKS_DUE) == 0


def test_a_full_outbox_rejects_new_events_and_keeps_the_latest_rejected(store: Store) -> None:
    end(store, *"abcdef")
    assert waiting(store) == ["a", "b", "c"]
    assert [(one.event.name, one.fault) for one in dead(store)] == [(job, "the outbox is full") for job in "fe"]


def test_an_endpoint_is_one_routers_until_its_lease_is_over_and_then_fenced(store: Store) -> None:
    end(store, "a", "b")
    [first] = take(store, "first", lease=0.05)
    assert decode_event(first.event).name == "a"
    second: list[Taken] = eventually(lambda: take(store, "second"))
    assert take(store, "third") == []
    assert settle(store, first, "delivered") is None  # it was too slow
    assert waiting(store) == ["a", "b"]
    following = settle(store, second[0], "delivered")
    assert following is not None and following.name == "b"
    assert settle(store, second[0], "delivered") is None
    assert (waiting(store), store.client.exists(WEBHOOKS_DUE)) == ([], 0)


def test_attempts_are_counted_and_what_is_given_up_can_be_sent_again_under_its_id(store: Store) -> None:
    end(store, "a", "b")
    for attempts in range(2):
        [taken] = take(store)
        assert taken.attempts == attempts
        assert settle(store, taken, "retry", pause=0.0) is None
    [taken] = take(store)
    following = settle(store, taken, "dead")
    assert following is not None and following.name == "b"
    [letter] = dead(store)
    assert (letter.event.name, letter.attempts, letter.fault) == ("a", 3, "no")

    assert store.run(replay_call("e", 3, ["other"])) == 0
    assert store.run(replay_call("e", 1, [])) == 0  # there is no room
    assert store.run(replay_call("e", 3, [letter.event.id])) == 1
    assert (waiting(store), dead(store)) == (["b", "a"], [])
    again = decode_event(as_bytes(store.client.lindex(webhook_outbox_key("e"), 1)))
    assert (again.id, again.at, again.begun > letter.event.at) == (letter.event.id, letter.event.at, True)


def test_what_is_announced_twice_is_delivered_once(store: Store) -> None:
    for _ in range(2):
        store.run(announce_call(NOTIFIED, "id", "batch", "failed", "batch_1"))
    assert (waiting(store), waiting(store, "f")) == (["batch_1"], ["batch_1"])


def test_an_endpoint_changes_only_from_what_it_was_and_takes_all_that_waits_with_it(store: Store) -> None:
    end(store, "a", "b", "c", "d")
    assert store.run(change_call("e", b"", b"one")) == 1
    assert store.run(change_call("e", b"", b"two")) == 0
    assert store.run(change_call("e", b"one", b"two")) == 1
    assert store.client.hget(WEBHOOKS, "e") == b"two"
    [taken] = take(store)
    assert store.run(change_call("e", b"two", b"")) == 1
    assert settle(store, taken, "retry") is None
    assert (waiting(store), dead(store), store.client.keys("taxiway:webhook*")) == ([], [], [])
