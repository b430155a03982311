"""What no process of the fleet can take is dead-lettered and counted, or ends its own job (a million: `make fuzz`)."""

import subprocess
from typing import Any

import msgspec
import pytest
from celery import Celery

from broker.port import DeadLetter
from tasks.settings import Settings
from taxiway.contract.keys import DEAD, INFER, job_key, result_key
from taxiway.errors import ExecutionError, InvalidRequestError
from tests.builders import nested
from tests.fuzzing.broker import attack
from tests.routing import eventually, router_process
from tests.working import CLASS, Tower, WorkerProcess


def test_malformed_messages_stop_neither_a_router_nor_a_worker(fleet: Settings, worker: WorkerProcess) -> None:
    with router_process(fleet, subprocess.DEVNULL) as router:
        assert attack(fleet, router, worker, messages=2_000, seed=6) == []


@pytest.mark.parametrize("serializer", ["application/x-python-serialize", "application/x-yaml"])
def test_a_body_that_could_hold_code_is_not_read_even_in_a_message_of_the_first_protocol(
    worker: WorkerProcess, tower: Tower, serializer: str
) -> None:
    message = tower.message("echo", "hello")
    for header in ("task", "taxiway"):  # what Celery takes for a message of its first protocol, and reads at once
        del message.headers[header]
    message.content_type, message.content_encoding = serializer, "binary"
    tower.queue(message)
    assert "ContentDisallowed" in dead_lettered(tower)
    assert worker.process.poll() is None


def test_a_compressed_body_is_not_unpacked_before_its_ticket_is_checked(worker: WorkerProcess, tower: Tower) -> None:
    message = tower.message("echo", "hello")
    message.headers["compression"] = "zlib"
    tower.queue(message)
    assert "compressed" in dead_lettered(tower)
    with pytest.raises(InvalidRequestError, match=r"a worker refused the message: .*compressed"):
        tower.result(message.headers["id"])
    assert worker.process.poll() is None


def test_an_answer_that_cannot_be_encoded_ends_its_job_alone_and_the_worker_lives(
    worker: WorkerProcess, tower: Tower
) -> None:
    poison = [tower.order("echo", {"payload": [nested(levels, "a")]}) for levels in (70, 520, 900)]
    beside = tower.order("echo", "beside")
    for job in poison:
        with pytest.raises(ExecutionError, match=r"no form on the wire|cannot"):
            tower.result(job)
    assert tower.result(beside).outputs == {"payload": "beside"}
    assert tower.result(tower.order("echo", "next")).outputs == {"payload": "next"}
    assert worker.process.poll() is None
    assert all(tower.state.exists(result_key(job)) for job in poison)


ODD: tuple[dict[str, Any], ...] = (
    {"eta": "x"},
    {"stamped_headers": 5},
    {"timelimit": "abc"},
    {"timelimit": 5},
    {"compression": "klingon"},
)
"""Headers that no router lets through, in messages that one ordered."""


def test_a_job_whose_message_celery_refuses_ends_with_the_reason(worker: WorkerProcess, tower: Tower) -> None:
    messages = [tower.message("echo", "hello") for _ in ODD]
    for message, odd in zip(messages, ODD, strict=True):
        message.headers |= odd
        tower.queue(message)
    for message in messages:
        tower.await_meta(message.headers["id"])  # some Celery takes after all
    with pytest.raises(InvalidRequestError, match=r"a worker refused the message: .*invalid ETA"):
        tower.result(messages[0].headers["id"])
    assert tower.result(tower.order("echo", "good")).outputs == {"payload": "good"}
    assert worker.process.poll() is None


def test_plain_celery_in_a_classs_queue_is_refused_with_the_right_queue(
    worker: WorkerProcess, tower: Tower, producer: Celery
) -> None:
    answer = producer.send_task(INFER, kwargs={"model": "echo", "inputs": "hello"}, queue=CLASS)
    with pytest.raises(
        Exception, match=r"got 'cpu.batch': send the task 'taxiway.infer' with queue='taxiway.arrivals'"
    ) as caught:
        answer.get(timeout=20)
    assert type(caught.value).__name__ == "InvalidRequestError"


def test_a_message_without_a_ticket_ends_no_job_that_was_accepted(worker: WorkerProcess, tower: Tower) -> None:
    tower.state.hset(job_key("theirs"), mapping={"state": "queued"})
    message = tower.message("echo", "hello", job="theirs")
    message.headers["taxiway"] = "forged"
    tower.queue(message)
    assert "ticket" in dead_lettered(tower)
    assert not tower.state.exists(result_key("theirs"))


def dead_lettered(tower: Tower) -> str:
    """Why the last message was dead-lettered."""
    letter = eventually(lambda: tower.state.lindex(DEAD, 0))
    eventually(lambda: tower.waiting() + tower.unacknowledged() == 0)
    return msgspec.json.decode(letter, type=DeadLetter).reason
