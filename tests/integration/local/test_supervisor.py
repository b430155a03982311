import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from local.children import start_child, stop_child
from local.fleet import AlreadyRunningError, LocalFleet, read_fleet, stop_fleet, supervising, write_fleet
from local.supervisor import StartError, SupervisedProcess, Supervisor
from taxiway.backoff import Backoff
from tests.waiting import gone, in_thread, until

READY = (
    "import json, sys, time; print('all well', file=sys.stderr, flush=True);"
    "print(json.dumps({'ready': 'test', 'number': 7}), flush=True); time.sleep(600)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{\"ready\": 1}'); time.sleep(600)"
BUSY = (
    "import signal, sys, time\n"
    "def asked(*_):\n"
    "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    "    print('finishing', flush=True)\n"
    "signal.signal(signal.SIGTERM, asked)\n"
    "print('{\"ready\": 1}', flush=True)\n"
    "while True: time.sleep(600)"
)
NEVER_READY = "import time; print('still loading', flush=True); time.sleep(600)"
BROKEN = "raise SystemExit('no such device')"


Make = Callable[[str, str], SupervisedProcess]
"""Makes a process of this name that runs a program."""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(name: str, program: str) -> SupervisedProcess:
        return SupervisedProcess(name, ["-c", program], dict(os.environ), tmp_path, announces=True)

    return make


@contextmanager
def stopped_after(supervisor: Supervisor) -> Iterator[None]:
    try:
        yield
    finally:
        supervisor.stop()


def test_a_fleet_is_ready_once_every_process_is(make: Make) -> None:
    worker, router = make("worker", READY), make("router", READY)
    supervisor = Supervisor(None, [[worker], [router]])
    with stopped_after(supervisor):
        assert supervisor.start(lambda: True, timeout=60)
        assert worker.announced["number"] == router.announced["number"] == 7
    assert not worker.alive
    assert not router.alive


@pytest.mark.parametrize(
    ("program", "timeout", "log"),
    [(BROKEN, 60, "no such device"), (NEVER_READY, 1.5, r"slow-worker(.|\n)*still loading")],
)
def test_a_process_that_ends_or_is_not_ready_in_time_stops_the_fleet_with_its_log(
    make: Make, program: str, timeout: float, log: str
) -> None:
    supervisor = Supervisor(None, [[make("slow-worker", program)]])
    with stopped_after(supervisor), pytest.raises(StartError, match=log):
        supervisor.start(lambda: True, timeout=timeout)


@contextmanager
def watched(supervisor: Supervisor, changed: Callable[[], None] = lambda: None) -> Iterator[list[str]]:
    """A supervisor that starts and watches its processes until the block ends; which of them failed, in order."""
    failed: list[str] = []
    up = threading.Event()

    def watch() -> None:  # children are tied to the thread that starts them
        assert supervisor.start(lambda: True, timeout=60)
        up.set()
        supervisor.watch(changed, [], lambda process: failed.append(process.name))
        supervisor.stop()

    with in_thread(watch, stop=supervisor.request_stop):
        assert up.wait(60)
        yield failed


def test_a_process_that_is_killed_is_restarted_and_its_exit_is_explained(make: Make) -> None:
    worker = make("worker", READY)
    with watched(Supervisor(None, [[worker]])) as failed:
        first = worker.process.pid
        os.kill(first, signal.SIGKILL)
        known: list[bool] = []  # what it said, such as where its interface is

        def restarted() -> bool:
            known.append("number" in worker.announced)
            return worker.restarts == 1 and worker.ready and worker.due is None

        assert until(restarted)
        assert all(known)
        assert worker.process.pid != first
        assert failed == ["worker"]
        assert worker.last_exit is not None
        assert worker.last_exit.why == "killed by SIGKILL (out of memory?)"
        assert worker.last_exit.last_line == "all well"


def test_a_fleet_that_cannot_be_described_while_the_disk_is_full_runs_and_is_described_later(make: Make) -> None:
    worker, attempts, described = make("worker", READY), [3], list[int]()

    def describe() -> None:
        attempts[0] -= 1
        if attempts[0] > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        described.append(worker.restarts)

    with watched(Supervisor(None, [[worker]]), describe):
        worker.log.unlink()
        worker.log.mkdir()  # neither read nor written, as on a read-only disk
        os.kill(worker.process.pid, signal.SIGKILL)
        assert until(lambda: 1 in described)
        assert until(lambda: worker.ready)


def test_a_process_whose_log_the_disk_has_no_space_for_is_ready(make: Make, tmp_path: Path) -> None:
    (tmp_path / "worker.log").symlink_to("/dev/full")
    worker = make("worker", "import time; print('{\"ready\": 1}', flush=True); time.sleep(600)")
    supervisor = Supervisor(None, [[worker]])
    with stopped_after(supervisor):
        assert supervisor.start(lambda: True, timeout=60)


def test_a_process_that_was_ready_is_restarted_however_often_it_fails(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.supervisor.RESTARTS", Backoff(0.01, 0.01))
    broken = tmp_path / "broken"
    program = (
        "import pathlib, time; print('{\"ready\": 1}', flush=True)\n"
        f"while not pathlib.Path({str(broken)!r}).exists(): time.sleep(0.01)\n"
        "raise SystemExit('broken again')"
    )
    worker = make("worker", program)
    with watched(Supervisor(None, [[worker]])):
        broken.touch()
        assert until(lambda: worker.restarts >= 10, timeout=30)
        assert worker.last_exit is not None
        assert worker.last_exit.last_line == "broken again"


def test_a_process_that_is_asked_to_end_comes_back_and_did_not_fail(make: Make) -> None:
    drains = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    drains += "print('{\"ready\": 1}', flush=True); time.sleep(600)"
    workers = [make("worker", drains), make("flower", READY)]
    with watched(Supervisor(None, [workers])):
        for worker in workers:
            os.kill(worker.process.pid, signal.SIGTERM)
        before = [worker.process.pid for worker in workers]
        assert until(lambda: all(w.process.pid not in before and w.ready for w in workers))
    assert [(worker.restarts, worker.last_exit) for worker in workers] == [(0, None)] * 2


def test_a_failure_is_forgotten_after_a_minute_of_health(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local.supervisor.HEALTHY_AFTER", 0.5)
    worker, stated = make("worker", READY), list[int]()
    with watched(Supervisor(None, [[worker]]), changed=lambda: stated.append(worker.restarts)):
        os.kill(worker.process.pid, signal.SIGKILL)
        assert until(lambda: 1 in stated)
        assert until(lambda: stated[-1] == 0)
        assert worker.last_exit is None


def test_a_failed_process_takes_what_it_had_started_along(make: Make, tmp_path: Path) -> None:
    deaf_child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    program = (
        "import json, subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf_child!r}]);"
        "print(json.dumps({'ready': 1, 'child': child.pid}), flush=True); time.sleep(600)"
    )
    worker = make("worker", program)
    with watched(Supervisor(None, [[worker]])):
        child = worker.announced["child"]
        os.kill(worker.process.pid, signal.SIGKILL)
        assert until(lambda: gone(child))


def test_a_process_that_does_not_stop_when_asked_is_killed(make: Make) -> None:
    deaf = make("deaf", DEAF)
    deaf.timeout = 0.5
    supervisor = Supervisor(None, [[deaf]])
    with stopped_after(supervisor):
        supervisor.start(lambda: True, timeout=60)
    assert not deaf.alive


def test_a_process_that_finishes_its_work_is_waited_for_until_asked_again(make: Make) -> None:
    busy = make("busy", BUSY)
    busy.timeout = 600
    supervisor = Supervisor(None, [[busy]])
    assert supervisor.start(lambda: True, timeout=60)
    with in_thread(supervisor.stop, stop=supervisor.request_stop):
        assert until(lambda: b"finishing" in busy.log.read_bytes())
        assert busy.alive
    assert busy.process.returncode == 7


def test_requests_to_stop_that_interrupt_each_other_are_heeded() -> None:
    program = (
        "import signal; from local.supervisor import Supervisor; supervisor = Supervisor(None, []);"
        "signal.signal(signal.SIGALRM, lambda *_: supervisor.request_stop());"
        "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4);"
        "[supervisor.request_stop() for _ in range(20_000)];"
        "signal.setitimer(signal.ITIMER_REAL, 0); supervisor.watch(lambda: None, [])"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_a_child_that_ends_when_asked_is_not_killed() -> None:
    child = start_child([sys.executable, "-c", "import time; time.sleep(600)"])
    assert stop_child(child, timeout=60)


def a_fleet(data: Path) -> LocalFleet:
    address = "redis://:secret@127.0.0.1:1/0"
    return LocalFleet(
        broker=address,
        http="http://127.0.0.1:2",
        flower=None,
        pid=os.getpid(),
        router_pid=1,
        data=str(data),
        workers=(),
        timeout=1.0,
    )


def test_a_second_supervisor_on_the_same_data_is_refused_and_names_the_first(tmp_path: Path) -> None:
    with supervising(tmp_path), pytest.raises(AlreadyRunningError, match=str(os.getpid())), supervising(tmp_path):
        pass


def test_the_fleets_addresses_are_readable_by_their_owner_while_it_runs(tmp_path: Path) -> None:
    with supervising(tmp_path):
        write_fleet(tmp_path, a_fleet(tmp_path))
        assert (tmp_path / "fleet.json").stat().st_mode & 0o077 == 0
        assert read_fleet(tmp_path) == a_fleet(tmp_path)
    assert read_fleet(tmp_path) is None
    assert not (tmp_path / "fleet.json").exists()


def test_stopping_a_fleet_that_is_not_there_is_no_error_and_tidies_up(tmp_path: Path) -> None:
    write_fleet(tmp_path, a_fleet(tmp_path))
    assert stop_fleet(tmp_path) is False
    assert not (tmp_path / "fleet.json").exists()
