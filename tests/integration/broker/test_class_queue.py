"""A worker's hold on its queue: what wakes an idle worker comes with it, and nothing else is taken behind its back."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

import tests.recorded
from broker.valkey import run
from broker.valkey.class_queue import ClassQueue, TakenMessages
from broker.valkey.jobs import Verdict
from broker.valkey.processes import heartbeat_call
from taxiway.contract.keys import UNACKED, job_key, priority_list
from tests.scripting import Store
from tests.waiting import until

QUEUE = "cpu.batch"
OTHER = "gpu.realtime"
LONG = 30.0


@pytest.fixture
def broker(store: Store) -> redis.Redis:
    return store.client


@pytest.fixture
def queue(class_queue: Callable[..., ClassQueue]) -> ClassQueue:
    return class_queue("a@host")


class Waiter(threading.Thread):
    """Waits for what the last take was short of."""

    def __init__(
        self, queue: ClassQueue, broker: redis.Redis, *queues: str, longest: float = LONG, capacity: int = 0
    ) -> None:
        super().__init__(daemon=True)
        self.fetches: list[TakenMessages] = []
        blocked = broker.info("clients")["blocked_clients"] + 1
        self._wait = lambda: queue.wait(queues or [QUEUE], longest, capacity=capacity)
        self.start()
        assert until(lambda: broker.info("clients")["blocked_clients"] >= blocked)

    def run(self) -> None:
        self.fetches = self._wait()

    def messages(self) -> list[bytes]:
        """What it took."""
        self.join(LONG)
        assert not self.is_alive()
        return [one.raw for fetched in self.fetches for one in fetched.messages]


def calls(broker: redis.Redis) -> dict[str, int]:
    """How often each command was called."""
    return {name.removeprefix("cmdstat_"): stated["calls"] for name, stated in broker.info("commandstats").items()}


def waiting(broker: redis.Redis, queue: str = QUEUE) -> int:
    return broker.llen(queue) + sum(broker.llen(priority_list(queue, level)) for level in (1, 2, 3))


def test_what_wakes_an_idle_worker_comes_with_all_that_it_has_room_for(queue: ClassQueue, broker: redis.Redis) -> None:
    broker.lpush(priority_list(QUEUE, 1), b"first")
    assert [one.raw for one in queue.take(QUEUE, 3).messages] == [b"first"]
    waiter = Waiter(queue, broker)
    broker.lpush(priority_list(QUEUE, 2), b"second", b"third", b"fourth")
    assert waiter.messages() == [b"second", b"third"]
    assert waiting(broker) == 1
    assert broker.hlen(UNACKED[0]) == 3


def test_a_worker_that_was_woken_blocks_again_with_its_room_in_one_packet(
    queue: ClassQueue, broker: redis.Redis
) -> None:
    queue.take(QUEUE, 9)
    first = Waiter(queue, broker)
    broker.lpush(QUEUE, b"first")
    assert first.messages() == [b"first"]
    before = calls(broker)
    again = Waiter(queue, broker, capacity=2)
    broker.lpush(priority_list(QUEUE, 1), b"second", b"third", b"fourth")
    assert again.messages() == [b"second", b"third"]
    after = calls(broker)
    assert waiting(broker) == 1
    assert after["evalsha"] - before["evalsha"] == 1
    takes = [int(fetched.messages[0].tag.split(".")[1]) for fetched in (*first.fetches, *again.fetches)]
    assert takes == sorted(set(takes))


def test_what_came_before_a_worker_blocked_again_is_taken_at_once_or_by_the_next_take(
    queue: ClassQueue, broker: redis.Redis
) -> None:
    queue.take(QUEUE, 9)
    waiter = Waiter(queue, broker)
    broker.lpush(QUEUE, b"first")
    assert waiter.messages() == [b"first"]
    broker.lpush(QUEUE, b"second")
    assert [one.raw for fetched in queue.wait([QUEUE], LONG, capacity=9) for one in fetched.messages] == [b"second"]
    broker.lpush(priority_list(QUEUE, 2), b"of a list that is still waited for")
    assert queue.wait([QUEUE], LONG, capacity=9) == []
    assert [one.raw for one in queue.take(QUEUE, 9).messages] == [b"of a list that is still waited for"]


def test_a_worker_that_waits_for_every_list_cannot_announce_its_capacity_and_takes(
    queue: ClassQueue, broker: redis.Redis
) -> None:
    queue.take(QUEUE, 9)
    assert Waiter(queue, broker, longest=0.05).messages() == []
    assert queue.wait([QUEUE], LONG, capacity=9) == []
    broker.lpush(QUEUE, b"movable")
    assert (waiting(broker), broker.hlen(UNACKED[0])) == (1, 0)


def test_the_tags_of_what_was_waited_for_follow_those_of_the_take_before(
    queue: ClassQueue, broker: redis.Redis
) -> None:
    messages = [b'{"properties": {"priority": 0}, "body": "%d"}' % number for number in range(3)]
    broker.lpush(QUEUE, messages[0])
    [first] = queue.take(QUEUE, 9).messages
    waiter = Waiter(queue, broker)
    broker.lpush(QUEUE, messages[1])
    waiter.messages()
    broker.lpush(QUEUE, messages[2])
    [third] = queue.take(QUEUE, 9).messages
    tags = [first.tag, waiter.fetches[0].messages[0].tag, third.tag]
    takes = [int(tag.split(".")[1]) for tag in tags]
    assert takes == sorted(set(takes))
    queue.put_back(tags)
    assert [one.raw for one in queue.take(QUEUE, 9).messages] == messages


def test_a_worker_that_is_full_takes_nothing_though_its_connections_wait(
    queue: ClassQueue, broker: redis.Redis
) -> None:
    queue.take(QUEUE, 1)
    assert Waiter(queue, broker, longest=0.05).messages() == []
    broker.lpush(priority_list(QUEUE, 3), b"only")
    assert [one.raw for one in queue.take(QUEUE, 1).messages] == [b"only"]  # no capacity is left
    broker.lpush(QUEUE, b"movable")
    assert queue.wait([QUEUE], LONG) == []
    assert waiting(broker) == 1


def test_the_room_is_used_once_whichever_queue_wakes_first(queue: ClassQueue, broker: redis.Redis) -> None:
    queue.take(QUEUE, 2)
    queue.take(OTHER, 2)
    waiter = Waiter(queue, broker, QUEUE, OTHER)
    with broker.pipeline(transaction=True) as at_once:
        at_once.lpush(QUEUE, b"here", b"here too", b"and here")
        at_once.lpush(OTHER, b"there")
        at_once.execute()
    assert len(waiter.messages()) in (1, 2)
    assert broker.hlen(UNACKED[0]) == len(waiter.messages())
    assert waiting(broker) + waiting(broker, OTHER) == 4 - len(waiter.messages())


def test_a_worker_that_is_woken_for_its_end_waits_no_longer(queue: ClassQueue, broker: redis.Redis) -> None:
    queue.take(QUEUE, 5)
    waiter = Waiter(queue, broker)
    queue.wake()
    assert waiter.messages() == []
    broker.lpush(QUEUE, b"movable")
    assert (waiting(broker), broker.hlen(UNACKED[0])) == (1, 0)


def test_a_worker_leaves_nothing_behind_that_it_takes_as_it_is_woken_for_its_end(
    class_queue: Callable[..., ClassQueue], broker: redis.Redis
) -> None:
    for number in range(60):
        queue = class_queue(f"{number}@host")
        waiter = Waiter(queue, broker, capacity=9)
        broker.lpush(QUEUE, b"first")
        assert waiter.messages() == [b"first"]
        broker.lpush(QUEUE, b"second")
        queue.wake()
        with broker.client() as other:
            # What comes while this runs is answered in any order
            other.connection.send_command("EVAL", "for _ = 1, 5e5 do end", 0)
            taken = [one.raw for fetched in queue.wait([QUEUE], LONG, capacity=1) for one in fetched.messages]
            other.connection.read_response()
        assert (taken, broker.lpop(QUEUE)) in (([b"second"], None), ([], b"second"))


def test_a_server_that_forgot_the_script_is_given_it_again(queue: ClassQueue, broker: redis.Redis) -> None:
    queue.take(QUEUE, 5)
    waiter = Waiter(queue, broker)
    broker.script_flush()
    broker.lpush(QUEUE, b"message")
    assert waiter.messages() == []
    assert [one.raw for one in queue.take(QUEUE, 5).messages] == [b"message"]


ORDER = b'{"properties":{"taxiway_job":{"job":"lost","deadline_at":0.0},"priority":0},"headers":{"eta":null}}'


PREVIOUS = json.loads((Path(tests.recorded.__file__).parent / "0.1.0.json").read_text())["order"].encode()
"""What a router of the previous release put into a class queue."""


def claimed(queue: ClassQueue, broker: redis.Redis, message: bytes) -> list[tuple[str, Verdict]]:
    broker.lpush(QUEUE, message)
    return [(one.job, one.claim.verdict) for one in queue.take(QUEUE, 9).messages if one.claim is not None]


def test_a_message_of_the_previous_release_is_claimed_by_its_ticket(queue: ClassQueue, broker: redis.Redis) -> None:
    headers = json.loads(PREVIOUS)["headers"]
    assert "taxiway_job" not in json.loads(PREVIOUS)["properties"]
    assert claimed(queue, broker, PREVIOUS) == [(headers["id"], Verdict.LATE)]
    ticket = json.loads(headers["taxiway"][64:])
    without = {**headers, "taxiway": "0" * 64 + json.dumps({**ticket, "deadline_at": 0.0})}
    assert claimed(queue, broker, json.dumps({"headers": without}).encode()) == [(headers["id"], Verdict.RUN)]


def test_a_message_that_kombu_wrote_again_is_claimed_by_its_property(queue: ClassQueue, broker: redis.Redis) -> None:
    assert claimed(queue, broker, json.dumps(json.loads(ORDER)).encode()) == [("lost", Verdict.RUN)]


SCHEDULED = PREVIOUS.replace(b'"headers":{', b'"headers":{"eta":"2030-01-01T00:00:00",')


@pytest.mark.cases("message")
def test_a_message_that_names_no_job_to_claim_is_taken_without_a_claim(
    queue: ClassQueue, broker: redis.Redis, message: bytes
) -> None:
    assert claimed(queue, broker, message) == []
    assert broker.keys(job_key("*")) == []


def lose(broker: redis.Redis, worker: str, *, ago: float) -> None:
    """Let a job wait whose worker ended while it held it, and whose lease was over `ago` seconds ago."""
    seconds, micros = broker.time()
    held_until = seconds + micros / 1e6 - ago
    broker.hset(job_key("lost"), mapping={"state": "running", "holder": f"{worker}#1 5", "held_until": held_until})
    broker.lpush(QUEUE, ORDER)


def beat(broker: redis.Redis, worker: str, facts: bytes) -> None:
    run(broker, heartbeat_call(worker, facts))


def test_a_job_that_may_have_ended_its_worker_is_run_by_another_device_of_the_class(
    queue: ClassQueue, class_queue: Callable[..., ClassQueue], broker: redis.Redis
) -> None:
    another = class_queue("b@host")
    beat(broker, "b@host", b'{"hardware_class": "gpu.realtime", "serves": ["gpu.realtime", "cpu.batch"]}')
    lose(broker, "a@host", ago=0.1)
    broker.lpush(QUEUE, b"other")
    assert [one.raw for one in queue.take(QUEUE, 9).messages] == [b"other"]
    assert waiting(broker) == 0
    assert another.recover() == 0
    assert until(lambda: another.recover() == 1 or waiting(broker) == 1)
    [taken] = another.take(QUEUE, 9).messages
    assert (taken.raw, taken.job) == (ORDER, "lost")
    assert taken.claim is not None
    assert (taken.claim.verdict, taken.claim.blamed) == (Verdict.RUN, 1)


@pytest.mark.cases("facts, ago")
def test_a_job_is_not_kept_waiting_for_a_device_that_does_not_take_it(
    queue: ClassQueue, broker: redis.Redis, facts: bytes, ago: float
) -> None:
    if facts:
        beat(broker, "b@host", facts)
    lose(broker, "a@host", ago=ago)
    assert [one.raw for one in queue.take(QUEUE, 9).messages] == [ORDER]


@pytest.fixture
def bounded(class_queue: Callable[..., ClassQueue]) -> ClassQueue:
    return class_queue("c@host", ahead=1.0)


def queued(broker: redis.Redis, level: int, *jobs: str, work: float) -> None:
    """Let jobs wait that take so many device seconds each."""
    for job in jobs:
        broker.hset(job_key(job), mapping={"state": "queued", "work": work})
        broker.lpush(priority_list(QUEUE, level), ORDER.replace(b"lost", job.encode()))


def taken_jobs(fetched: TakenMessages) -> list[str]:
    return [one.job for one in fetched.messages]


def test_no_more_patient_work_is_taken_at_once_than_its_seconds_allow_and_all_that_is_urgent(
    bounded: ClassQueue, broker: redis.Redis
) -> None:
    queued(broker, 3, *"abcde", work=0.4)
    queued(broker, 1, *"uvw", work=5.0)

    assert taken_jobs(bounded.take(QUEUE, 9)) == ["u", "v", "w", "a", "b", "c"]  # the third goes beyond a second
    assert taken_jobs(bounded.take(QUEUE, 1)) == ["d"]
    assert taken_jobs(bounded.take(QUEUE, 9)) == ["e"]


def test_a_worker_with_enough_patient_work_takes_and_waits_for_what_is_urgent_alone(
    bounded: ClassQueue, broker: redis.Redis
) -> None:
    queued(broker, 2, "patient", work=0.1)
    assert taken_jobs(bounded.take(QUEUE, 9, levels=2)) == []
    assert bounded.wait([QUEUE], 0.05, levels=2) == []

    assert taken_jobs(bounded.take(QUEUE, 9, levels=2)) == []
    queued(broker, 0, "urgent", work=0.1)
    [fetched] = bounded.wait([QUEUE], LONG, levels=2)
    assert taken_jobs(fetched) == ["urgent"]
    assert taken_jobs(bounded.take(QUEUE, 9)) == ["patient"]


def test_patient_work_behind_a_job_that_is_longer_than_those_before_it_stays_in_its_order(
    bounded: ClassQueue, broker: redis.Redis
) -> None:
    queued(broker, 3, "a", "b", work=0.1)
    queued(broker, 3, "c", work=5.0)
    queued(broker, 3, *"def", work=0.1)

    assert taken_jobs(bounded.take(QUEUE, 9)) == ["a", "b", "c"]
    assert taken_jobs(bounded.take(QUEUE, 9)) == ["d", "e", "f"]
