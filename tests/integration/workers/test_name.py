"""A worker's name is one live process's, and a killed worker's successor gets it."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.heartbeat import GONE_AFTER
from tasks.settings import Settings
from taxiway.contract.keys import name_key
from tests.command_line import program
from tests.routing import eventually
from tests.working import CLASS, Tower, worker_process
from workers.heartbeat import NAME_TAKEN

HERE = f"{CLASS}.cpu-0@{socket.gethostname()}"


@pytest.mark.parametrize(
    "command",
    [("workers", "--class", CLASS), ("celery", "-A", "workers.app", "worker", "-n", HERE)],
    ids=["own command", "Celery's"],
)
def test_a_second_worker_under_a_name_is_refused_and_the_first_goes_on(
    fleet: Settings, tower: Tower, command: tuple[str, ...]
) -> None:
    with worker_process(fleet) as first:
        refused = program(*command, settings=fleet, TAXIWAY_CLASS=CLASS)
        assert first.name == HERE
        assert refused.returncode == NAME_TAKEN
        assert f"the worker name '{HERE}' is taken by process {first.process.pid} on" in refused.stderr
        assert "--name NAME" in refused.stderr
        assert tower.result(tower.order("echo", "still here")).outputs == {"payload": "still here"}


def test_what_a_killed_worker_last_sent_keeps_its_name_only_for_a_while(fleet: Settings, tower: Tower) -> None:
    """As when the store stood still, or the way to it was slow, while the worker was killed."""
    with worker_process(fleet) as first, ThreadPoolExecutor() as pool:
        first.process.kill()
        first.process.wait()
        key, longest = name_key(first.name), round(GONE_AFTER * 1000)

        def arrive_late() -> None:
            eventually(lambda: tower.state.pttl(key) < longest / 2)
            tower.state.pexpire(key, longest, xx=True)

        late = pool.submit(arrive_late)
        with worker_process(fleet) as successor:
            late.result()
            assert successor.name == first.name


def test_a_worker_that_stopped_leaves_its_name_at_once(fleet: Settings, tower: Tower) -> None:
    with worker_process(fleet) as first:
        first.process.terminate()
        first.process.wait()
        assert not tower.state.exists(name_key(first.name))


def test_a_worker_outlives_what_a_store_that_lost_writes_remembers_of_its_predecessor(
    fleet: Settings, tower: Tower
) -> None:
    with worker_process(fleet) as worker:
        key = name_key(worker.name)
        own = tower.state.get(key)
        tower.state.set(key, "its predecessor", px=round(GONE_AFTER * 1000))
        eventually(lambda: tower.state.get(key) == own)
        assert worker.process.poll() is None


def test_a_worker_that_was_silent_while_another_took_its_name_exits(fleet: Settings) -> None:
    with worker_process(fleet) as first:
        first.process.send_signal(signal.SIGSTOP)
        with worker_process(fleet) as successor:
            first.process.send_signal(signal.SIGCONT)
            assert first.process.wait(GONE_AFTER + 20) == NAME_TAKEN
            assert successor.process.poll() is None
