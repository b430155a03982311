"""Producers with RabbitMQ as their Celery broker, before a fleet on Valkey whose router bridges the two."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
import redis
from celery import Celery, chain, chord
from kombu import Connection, Queue

from broker.port import DeadLetter
from tasks.settings import Settings
from taxiway.contract.keys import AMQP_OUTBOX, ARRIVALS, CANCEL, DEAD, INFER, job_key
from tests.cable import cable_to
from tests.command_line import program
from tests.producing import QUORUM, infer, payload, producing
from tests.routing import EchoDevice, eventually, router_process
from tests.stored import record_of
from tests.working import Tower, worker_process

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def producer(settings: Settings, rabbit: str) -> Iterator[Celery]:
    with producing(settings, rabbit) as app:
        app.conf.task_queues = [QUORUM]
        yield app


def channel_of(connection: Connection) -> Any:
    """Its channel; kombu's types lack what it can do."""
    return connection.default_channel


def depth(url: str, queue: str = ARRIVALS) -> int:
    """The messages that wait in a queue of RabbitMQ."""
    with Connection(url) as connection:
        return int(channel_of(connection).queue_declare(queue, passive=True).message_count)


def next_of(connection: Connection, name: str) -> Any:
    """The next message of a queue, acknowledged; the queue need not be there yet."""

    def found() -> Any:
        with connection.channel() as channel:
            try:
                return Queue(name, channel=channel).get(no_ack=True)
            except Exception:
                return None

    return eventually(found)


def test_a_job_of_rabbitmq_is_answered_by_celerys_backend_and_its_message_acknowledged(
    fleet: Settings, producer: Celery, rabbit: str
) -> None:
    with worker_process(fleet), router_process(fleet, options=["--amqp", rabbit]) as router:
        answers = [infer(producer, n).apply_async() for n in range(50)]
        assert [payload(answer) for answer in answers] == list(range(50))
        router.process.terminate()
        assert router.process.wait(60) == 0
    with Connection(rabbit) as connection:
        assert channel_of(connection).queue_delete(ARRIVALS) == 0


def test_what_follows_a_job_goes_on_at_rabbitmq(fleet: Settings, producer: Celery, rabbit: str) -> None:
    with worker_process(fleet), router_process(fleet, options=["--amqp", rabbit]), Connection(rabbit) as connection:
        mark = uuid.uuid4().hex
        assert payload(chain(infer(producer, "first"), infer(producer, "second")).apply_async()) == "second"
        header = [infer(producer, n) for n in range(3)]
        assert payload(chord(header, body=infer(producer, "all ended")).apply_async()) == "all ended"

        linked = producer.signature("lab.linked", queue=f"{mark}.linked", priority=3)  # a queue that nobody declared
        infer(producer, "hello").apply_async(link=linked)
        answer = next_of(connection, f"{mark}.linked")
        assert (answer.headers["task"], answer.properties["priority"]) == ("lab.linked", 3)
        assert answer.payload[0][0]["outputs"] == {"payload": "hello"}

        for model in ("slab", "ehco"):  # one fails on its worker, and one is refused by the router
            failing = infer(producer, {"samples": [0], "seed": [1]}, model)
            sent = failing.apply_async(link_error=producer.signature("lab.failed", queue=f"{mark}.{model}"))
            call = next_of(connection, f"{mark}.{model}")
            assert (call.headers["task"], call.payload[0][0]) == ("lab.failed", sent.id)
        with redis.Redis.from_url(fleet.broker) as state:
            eventually(lambda: not state.exists(AMQP_OUTBOX))


def test_a_message_that_is_delivered_again_runs_once(fleet: Settings, producer: Celery, rabbit: str) -> None:
    with (
        cable_to(rabbit) as (cable, address),
        EchoDevice(fleet) as device,
        router_process(fleet, options=["--amqp", address]),
    ):
        sent = []
        for n in range(200):
            sent.append(infer(producer, n).apply_async(task_id=uuid.uuid4().hex))
            if n % 40 == 20:
                cable.cut()
        sent += [infer(producer, "again").apply_async(task_id=answer.id) for answer in sent[:20]]
        answers = [payload(answer) for answer in sent]
        eventually(lambda: depth(rabbit) == 0)
    assert answers == [*range(200), *range(20)]
    assert sorted(device.done) == sorted(answer.id for answer in sent[:200])


def test_what_a_killed_router_had_not_acknowledged_is_placed_by_another(
    fleet: Settings, producer: Celery, rabbit: str
) -> None:
    with EchoDevice(fleet) as device:
        with router_process(fleet, options=["--amqp", rabbit]) as victim:
            sent = [infer(producer, n).apply_async() for n in range(200)]
            eventually(lambda: device.done)
            victim.process.kill()
        with router_process(fleet, options=["--amqp", rabbit]):
            assert [payload(answer) for answer in sent] == list(range(200))
    assert len(device.done) == 200


def test_refusals_cancellations_and_dead_letters_are_as_on_valkey(
    fleet: Settings, producer: Celery, rabbit: str
) -> None:
    with (
        EchoDevice(fleet, answering=False),
        router_process(fleet, options=["--amqp", rabbit]),
        redis.Redis.from_url(fleet.broker) as state,
    ):
        with pytest.raises(Exception, match="unknown model 'ehco'"):
            infer(producer, "first", "ehco").apply_async().get(timeout=60)

        waiting = infer(producer, "waits").apply_async()
        eventually(lambda: state.exists(job_key(waiting.id)))
        producer.send_task(CANCEL, args=[waiting.id], queue=ARRIVALS)
        eventually(lambda: record_of(state, waiting.id).state == "cancelled")

        with Connection(rabbit) as connection, connection.Producer() as raw:
            raw.publish(b"no task", exchange=ARRIVALS, routing_key=ARRIVALS, content_type="text/plain")
            raw.publish(b"x", exchange=ARRIVALS, routing_key=ARRIVALS, headers={"id": "\ud800", "at": b"\xff"})
        letters = eventually(lambda: state.llen(DEAD) == 2 and state.lrange(DEAD, 0, -1))
    reasons = sorted(msgspec.json.decode(raw, type=DeadLetter).reason for raw in letters)
    assert reasons[0] == "id: expected 1 to 256 characters, got None"
    assert reasons[1].startswith("task: expected taxiway.infer")


def nested(levels: int) -> object:
    return {"a": nested(levels - 1)} if levels else 1


AMQP_ODD: tuple[dict[str, Any], ...] = (
    {"x": "\ud800"},
    {"id": "i\ud800"},
    {"x": b"\xff\xfe"},
    {"x": datetime(2020, 1, 1, tzinfo=UTC)},
    {"x": Decimal("1.5")},
    {"eta": datetime(2020, 1, 1, tzinfo=UTC)},
    {"traceparent": b"\xff"},
    {"argsrepr": b"abc"},
    {"stamped_headers": "x"},
    {"taxiway": {"reply": b"x"}},
    {"x": nested(150)},
)
"""Headers that AMQP can carry, and JSON or UTF-8 cannot."""


def test_odd_headers_end_neither_a_router_nor_a_worker_and_every_job_that_can_be_named_ends(
    fleet: Settings, rabbit: str, tower: Tower
) -> None:
    body = msgspec.json.encode([[], {"model": "echo", "inputs": "a", "deadline": 30}, {}])
    with worker_process(fleet) as worker, router_process(fleet, options=["--amqp", rabbit]) as router:
        with Connection(rabbit) as connection, connection.Producer() as raw:
            for n, odd in enumerate(AMQP_ODD):
                headers = {"task": INFER, "id": f"odd-{n}", **odd}
                plain: Any = {"content_type": "application/json", "content_encoding": "utf-8"}
                raw.publish(body, exchange=ARRIVALS, routing_key=ARRIVALS, headers=headers, **plain)
        for n, odd in enumerate(AMQP_ODD):
            if "id" not in odd:
                tower.await_meta(f"odd-{n}")
        assert (router.process.poll(), worker.process.poll()) == (None, None)


def test_the_bridge_declares_a_queue_that_is_missing_and_keeps_the_type_of_one_that_is_there(
    fleet: Settings, producer: Celery, rabbit: str
) -> None:
    for declared in (None, {}, QUORUM.queue_arguments):
        with Connection(rabbit) as connection:
            channel = channel_of(connection)
            channel.queue_delete(ARRIVALS)
            if declared is not None:
                channel.queue_declare(ARRIVALS, durable=True, auto_delete=False, arguments=declared)
        with EchoDevice(fleet), router_process(fleet, options=["--amqp", rabbit]), Connection(rabbit) as connection:
            eventually(lambda: connected(rabbit))
            with connection.Producer() as raw:
                message = infer(producer, "hello")
                answer = producer.AsyncResult(message.freeze().id)
                headers, properties, body, _ = producer.amqp.as_task_v2(answer.id, INFER, kwargs=message.kwargs)
                raw.publish(body, routing_key=ARRIVALS, headers=headers, serializer="json", **properties)
            assert payload(answer) == "hello"


def test_a_queue_that_is_deleted_is_declared_and_served_again(fleet: Settings, producer: Celery, rabbit: str) -> None:
    with EchoDevice(fleet), router_process(fleet, options=["--amqp", rabbit]), Connection(rabbit) as connection:
        eventually(lambda: connected(rabbit))
        channel_of(connection).queue_delete(ARRIVALS)
        eventually(lambda: connected(rabbit))
        assert payload(infer(producer, "hello").apply_async()) == "hello"


def connected(url: str) -> bool:
    """Whether the arrivals are there, and somebody consumes them."""
    try:
        with Connection(url) as connection:
            return bool(channel_of(connection).queue_declare(ARRIVALS, passive=True).consumer_count)
    except Exception:
        return False


def test_an_address_that_is_not_of_rabbitmq_is_refused(settings: Settings) -> None:
    done = program("router", "--amqp", "redis://:word@host", settings=settings)
    assert done.returncode == 2
    assert "--amqp: expected an address that starts with amqp:// or amqps://, got 'redis://…'" in done.stderr
