"""Messages that prefer one worker of a class: only where that delays nothing, and none is lost."""

from collections.abc import Callable

import msgspec
import pytest

from broker.port import Affinity, Outgoing
from broker.valkey.class_queue import ClassQueue
from broker.valkey.forwarding import HANDOVER
from broker.valkey.jobs import Verdict
from tasks.queues.limits import Limits
from taxiway.contract.keys import UNACKED, affinity_key, capacity_key, job_key, priority_list
from tests.integration.broker.test_class_queue import ORDER, QUEUE, Waiter
from tests.scripting import Store, placed
from tests.waiting import until

LIMITS = Limits(lease=30)
BEFORE = "before"
"""The job that had the prefix, on the worker a."""


@pytest.fixture
def store(store: Store) -> Store:
    store.client.hset(job_key(BEFORE), mapping={"state": "succeeded", "holder": "a@host#3 1700000000.25"})
    return store


@pytest.fixture
def workers(class_queue: Callable[..., ClassQueue]) -> dict[str, ClassQueue]:
    return {name: class_queue(f"{name}@host", LIMITS, affinity=name != "plain") for name in ("a", "b", "plain")}


def leading(job: str, *, most: int = 9, after: str = BEFORE) -> Outgoing:
    """A job that is to run where the one before ran."""
    affinity = Affinity(after, ("a@host", "b@host", "plain@host"), most, LIMITS.lease)
    return msgspec.structs.replace(placed(job, order(job)), affinity=affinity)


def order(job: str) -> bytes:
    return ORDER.replace(b"lost", job.encode())


def waits(store: Store) -> int:
    """How many messages wait for the class."""
    return sum(store.client.llen(priority_list(QUEUE, level)) for level in range(4))


def taken(queue: ClassQueue, capacity: int = 9) -> list[str]:
    return [one.job for one in queue.take(QUEUE, capacity).messages]


def test_a_message_goes_to_the_worker_that_had_its_prefix_and_wakes_it_alone(
    store: Store, workers: dict[str, ClassQueue]
) -> None:
    for queue in workers.values():
        queue.take(QUEUE, 4)
    other, own = Waiter(workers["b"], store.client), Waiter(workers["a"], store.client)
    assert store.forward(leading("j")) == [True]
    assert own.messages() == [order("j")]
    [claimed] = own.fetches[0].messages
    assert claimed.claim is not None
    assert claimed.claim.verdict is Verdict.RUN
    assert store.record("j")["led"] == "a@host"
    workers["b"].wake()
    assert other.messages() == []
    assert (waits(store), store.client.hlen(UNACKED[0])) == (0, 1)
    workers["a"].put_back([claimed.tag])
    assert waits(store) == 1  # as any other message that a worker gives back


def test_what_was_led_here_is_taken_before_what_waits_for_the_class(
    store: Store, workers: dict[str, ClassQueue]
) -> None:
    assert taken(workers["a"], 3) == []
    assert store.forward(leading("led"), placed("urgent", order("urgent"))) == [True, True]
    assert waits(store) == 1
    assert taken(workers["a"], 3) == ["led", "urgent"]


def full(store: Store, workers: dict[str, ClassQueue]) -> None:
    """It said that it has no capacity, the other has."""
    workers["a"].take(QUEUE, 0)
    workers["b"].take(QUEUE, 4)


def silent(store: Store, workers: dict[str, ClassQueue]) -> None:
    """It does not wait."""
    workers["b"].take(QUEUE, 4)


def busier(store: Store, workers: dict[str, ClassQueue]) -> None:
    workers["a"].take(QUEUE, 3)
    workers["b"].take(QUEUE, 4)


def outnumbered(store: Store, workers: dict[str, ClassQueue]) -> None:
    """More waits than has a slot."""
    workers["a"].take(QUEUE, 1)
    store.client.lpush(priority_list(QUEUE, 2), order("waiting"))


def unled(store: Store, workers: dict[str, ClassQueue]) -> None:
    """The one that had it takes no messages that prefer it."""
    workers["a"].take(QUEUE, 4)
    workers["plain"].take(QUEUE, 4)
    store.client.hset(job_key(BEFORE), "holder", "plain@host#3 1.5")


def gone(store: Store, workers: dict[str, ClassQueue]) -> None:
    """Another worker had it, which is no candidate."""
    workers["a"].take(QUEUE, 4)
    store.client.hset(job_key(BEFORE), "holder", "c@host#3 1.5")


def given_back(store: Store, workers: dict[str, ClassQueue]) -> None:
    """Nobody holds the job that had it."""
    workers["a"].take(QUEUE, 4)
    store.client.hset(job_key(BEFORE), "holder", "")


@pytest.mark.parametrize("case", [full, silent, busier, outnumbered, unled, gone, given_back])
def test_a_message_goes_to_all_workers_of_the_class_where_leading_it_would_cost_something(
    store: Store, workers: dict[str, ClassQueue], case: object
) -> None:
    assert callable(case)
    case(store, workers)
    before = waits(store)
    assert store.forward(leading("j", most=0)) == [True]
    assert waits(store) == before + 1
    assert "led" not in store.record("j")
    assert store.client.hlen(UNACKED[0]) == 0


def test_no_more_is_led_to_a_worker_than_it_has_slots(store: Store, workers: dict[str, ClassQueue]) -> None:
    assert taken(workers["a"], 2) == []
    workers["b"].take(QUEUE, 4)
    store.forward(*(leading(job) for job in "uvwx"))
    assert taken(workers["a"], 2) == ["u", "v"]
    assert taken(workers["b"], 4) == ["w", "x"]


def test_what_a_worker_that_died_does_not_take_returns_to_the_class_and_no_more_is_led_there(
    store: Store, workers: dict[str, ClassQueue]
) -> None:
    workers["a"].take(QUEUE, 4)
    store.forward(leading("j"))
    assert (waits(store), store.client.llen(affinity_key("a@host"))) == (0, 1)
    assert until(lambda: workers["b"].recover() == 1, timeout=HANDOVER + 60)
    assert taken(workers["b"]) == ["j"]
    workers["b"].take(QUEUE, 4)
    assert store.client.exists(capacity_key("a@host")) == 1
    store.forward(leading("k"))
    assert taken(workers["b"]) == ["k"]
    assert taken(workers["a"]) == []  # it is back, and finds only what is gone
    assert store.client.exists(affinity_key("a@host")) == 0
