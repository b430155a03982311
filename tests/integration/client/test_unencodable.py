"""A request or an answer that something cannot take ends its own job; the worker that met it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from taxiway.contract.keys import result_key
from taxiway.errors import ExecutionError
from tests.working import Tower, WorkerProcess


def nested(levels: int) -> Any:
    value: Any = "a"
    for _ in range(levels):
        value = [value]
    return value


def test_an_answer_that_cannot_be_encoded_ends_its_job_alone_and_the_worker_lives(
    worker: WorkerProcess, tower: Tower
) -> None:
    poison = [tower.order("echo", {"payload": [nested(levels)]}) for levels in (70, 520, 900)]
    beside = tower.order("echo", "beside")
    for job in poison:
        with pytest.raises(ExecutionError, match=r"no form on the wire|cannot"):
            tower.result(job)
    assert tower.result(beside).outputs == {"payload": "beside"}
    assert tower.result(tower.order("echo", "next")).outputs == {"payload": "next"}
    assert worker.process.poll() is None
    assert all(tower.state.exists(result_key(job)) for job in poison)
