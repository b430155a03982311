"""Jobs that end the worker that runs them, before workers that a supervisor keeps up."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.supervisor import SupervisedProcess, Supervisor
from tasks.settings import Settings
from taxiway.errors import DeadLetteredError
from tests.working import CLASS, QUEUES, SLAB, Tower, add_callable

POISON = SLAB.replace("slab", "poison").replace("samples", "number")
POISON = POISON.replace("  - {name: seed, datatype: INT64, shape: [-1]}\n", "").replace("estimate", "number")


@pytest.fixture
def workers(fleet: Settings, tmp_path: Path) -> Iterator[list[SupervisedProcess]]:
    """Two workers of one class, kept up; leases of a second."""
    fleet.queues.write_text(QUEUES.replace("warm: [echo, slab]", ""))
    add_callable(fleet.models, "poison", POISON)
    processes = [
        SupervisedProcess(
            f"worker-{number}",
            ["-W", "ignore", "-m", "workers", "--class", CLASS, "--device", f"cpu:{number}"],
            {**os.environ, **fleet.environment()},
            tmp_path,
            announces=True,
            timeout=60,
        )
        for number in range(2)
    ]
    supervisor, up = Supervisor(None, [processes]), threading.Event()

    def keep_up() -> None:  # children are tied to the thread that starts them
        supervisor.start(lambda: True, timeout=120)
        up.set()
        supervisor.watch(lambda: None, [])
        supervisor.stop()

    keeping = threading.Thread(target=keep_up)
    keeping.start()
    assert up.wait(120)
    yield processes
    supervisor.request_stop()
    keeping.join(60)


def test_jobs_that_end_two_workers_each_are_given_up_and_the_fleet_serves_on(
    workers: list[SupervisedProcess], tower: Tower
) -> None:
    poisons = [tower.order("poison", {"number": [n]}, variant="python") for n in range(2)]
    for job in poisons:
        with pytest.raises(DeadLetteredError):
            tower.result(job, within=60)
    assert tower.result(tower.order("echo", "after"), within=60).outputs == {"payload": "after"}
    assert sum(worker.restarts for worker in workers) <= 2 * len(poisons)
