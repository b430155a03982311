"""Python callables in a real worker: a misbehaving one ends only its own job, and a call without a waiter is ended."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

from tasks.heartbeat import DeviceFacts
from tasks.settings import Settings
from taxiway.contract.keys import DEVICES, job_key, result_key
from taxiway.errors import DeadlineExceededError, ExecutionError, JobCancelledError
from tests.routing import eventually
from tests.waiting import gone, until
from tests.working import (
    QUEUES,
    Tower,
    WorkerProcess,
    add_callable,
    add_spinner,
    empty_fleet,
    worker_process,
    worker_settings,
)

AT_ONCE = 30.0
"""Seconds within which a worker is done with what was ended: some tenths, and a busy machine."""


@dataclass(frozen=True)
class Site:
    """A worker that lives through all the tests, which are bad to its callables only, and what stands before it."""

    fleet: Settings
    tower: Tower
    worker: WorkerProcess
    notes: Path
    log: Path

    def noted(self, count: int = 1) -> list[int]:
        """The processes that noted themselves in this test, once there are so many."""
        assert until(lambda: self.notes.exists() and len(self.notes.read_text().splitlines()) >= count)
        return [int(line) for line in self.notes.read_text().splitlines()]


def small_fleet(valkey_url: str, folder: Path) -> Settings:
    queues = QUEUES.replace("warm: [echo, slab]", "warm: [echo, deeds]").replace("lease: 1", "lease: 1, stall: 60")
    fleet = worker_settings(empty_fleet(valkey_url), folder, queues)
    add_callable(fleet.models, "deeds")
    add_spinner(fleet)
    return fleet


@contextmanager
def site(valkey_url: str, folder: Path) -> Iterator[Site]:
    fleet, log, notes = small_fleet(valkey_url, folder), folder / "log", folder / "notes"
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as file, Tower(fleet) as tower:
        patch.setenv("TAXIWAY_NOTED", str(notes))
        with worker_process(fleet, log=file) as worker:
            yield Site(fleet, tower, worker, notes, log)


@pytest.fixture(scope="module")
def lasting(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(valkey_url, tmp_path_factory.mktemp("site")) as opened:
        yield opened
        assert opened.worker.process.poll() is None


@pytest.fixture
def fleet(lasting: Site) -> Settings:
    """The one that the fixture `producer` writes to."""
    return lasting.fleet


@pytest.fixture
def here(lasting: Site) -> Site:
    lasting.notes.unlink(missing_ok=True)
    return lasting


def order(tower: Tower, deed: str, number: int = 1, **terms: object) -> str:
    return tower.order("deeds", {"deed": deed, "number": number}, **{"variant": "python"} | terms)


def attempts(tower: Tower, job: str) -> int:
    return int(tower.state.hget(job_key(job), "attempts") or 0)


@pytest.mark.parametrize("deed", ["sleep", "spin"])
def test_a_cancelled_call_is_ended_and_the_device_serves_the_next_at_once(here: Site, deed: str) -> None:
    tower = here.tower
    running = order(tower, deed, 600)
    (process,) = here.noted()
    others = [tower.order("echo", 1), order(tower, "echo", 2), order(tower, "echo", 3)]
    began = time.monotonic()
    tower.cancel(running)
    assert [next(iter(tower.result(job).outputs.values())) for job in others] == [1, 2, 3]
    assert time.monotonic() - began < AT_ONCE
    assert gone(process)
    with pytest.raises(JobCancelledError):
        tower.result(running)
    assert {attempts(tower, job) for job in others} == {1}
    eventually(lambda: tower.unacknowledged() == 0)


def test_a_call_ends_at_its_job_s_deadline_also_where_no_router_lives(here: Site) -> None:
    tower = here.tower
    deadline = time.time() + 5
    running = order(tower, "sleep", 600, deadline_at=deadline)
    (process,) = here.noted()
    with pytest.raises(DeadlineExceededError, match=r"deadline of [\d.]+ s exceeded: .*ran [\d.]+ s"):
        tower.result(running)
    assert time.time() - deadline < AT_ONCE
    assert until(lambda: gone(process), timeout=AT_ONCE)
    assert tower.result(order(tower, "echo", 2)).outputs == {"given": 2}


def test_what_is_more_urgent_is_answered_while_a_call_runs_and_what_is_not_waits_for_its_end(here: Site) -> None:
    tower = here.tower
    running = order(tower, "sleep", 600, deadline_at=time.time() + 600)
    (process,) = here.noted()
    patient = tower.order("paced", "later")
    urgent = [tower.order("echo", n, deadline_at=time.time() + 30) for n in range(3)]
    assert [tower.result(job, within=AT_ONCE).outputs["payload"] for job in urgent] == [0, 1, 2]
    assert not gone(process)
    assert tower.state.get(result_key(patient)) is None
    tower.cancel(running)
    assert tower.result(patient).outputs == {"payload": "later"}


def test_another_call_waits_for_the_one_that_runs_however_urgent_it_is(here: Site) -> None:
    tower = here.tower
    running = order(tower, "sleep", 1)
    here.noted()
    urgent = order(tower, "echo", 7, deadline_at=time.time() + 30)
    assert tower.result(running).outputs == {"given": None}
    assert tower.result(urgent).outputs == {"given": 7}


def test_other_rows_of_a_batch_with_an_ended_call_are_answered_and_run_once(here: Site) -> None:
    tower = here.tower
    block = order(tower, "sleep", 600)
    here.noted()
    messages = [
        tower.message("deeds", {"deed": deed, "number": number}, variant="python")
        for deed, number in [("echo", 1), ("sleep", 600), ("echo", 2), ("crash", 1), ("echo", 3), ("echo", 4)]
    ]
    first, sleeping, second, crashing, *rest = [str(message.headers["id"]) for message in messages]
    tower.queue(*messages)
    eventually(lambda: tower.unacknowledged() == 7)
    tower.cancel(block)
    here.noted(2)
    tower.cancel(sleeping)
    assert [tower.result(job).outputs["given"] for job in (first, second, *rest)] == [1, 2, 3, 4]
    with pytest.raises(ExecutionError, match="SIGSEGV"):
        tower.result(crashing)
    assert {attempts(tower, job) for job in (first, second, crashing, *rest)} == {1}


def test_a_job_of_many_rows_is_not_run_on_once_it_is_cancelled(here: Site) -> None:
    tower = here.tower
    job = tower.order("deeds", {"deed": ["sleep"] * 40, "number": [1] * 40}, variant="python")
    here.noted()
    tower.cancel(job)
    assert tower.result(order(tower, "echo", 2), within=AT_ONCE + 1).outputs == {"given": 2}


def test_a_job_of_many_batches_that_cannot_be_ended_is_left_after_the_one_that_runs(here: Site) -> None:
    tower, turns = here.tower, [1_000_000] * 16
    tower.result(tower.order("spinner", {"turns": [1]}))
    one = tower.result(tower.order("spinner", {"turns": turns})).report.run_time
    job = tower.order("spinner", {"turns": turns * 60})
    eventually(lambda: tower.state.hget(job_key(job), "state") == b"running")
    began = time.monotonic()
    tower.cancel(job)
    tower.result(tower.order("echo", 1), within=240)
    assert time.monotonic() - began < 30 * one  # of 60, and of half a second or more each


@pytest.mark.cases("deed, number, text")
def test_whatever_a_call_does_ends_its_own_job_alone(here: Site, deed: str, number: int, text: str) -> None:
    tower = here.tower
    mates = [order(tower, "echo", n) for n in range(3)]
    bad = order(tower, deed, number)
    mates += [order(tower, "echo", n) for n in range(3, 6)]
    with pytest.raises(ExecutionError, match=text) as raised:
        tower.result(bad)
    assert len(raised.value.message.encode()) <= 5000
    assert [tower.result(job).outputs["given"] for job in mates] == list(range(6))
    assert here.worker.process.poll() is None


def test_the_rows_behind_one_that_failed_are_not_run(here: Site) -> None:
    job = here.tower.order("deeds", {"deed": ["exit", "sleep"], "number": [1, 600]}, variant="python")
    with pytest.raises(ExecutionError, match="row 0: deeds:1/python: SystemExit: 3"):
        here.tower.result(job)
    assert here.tower.result(order(here.tower, "echo", 2)).outputs == {"given": 2}
    assert not here.notes.exists()


def test_a_call_over_its_own_time_limit_fails_and_says_where_that_is_set(here: Site) -> None:
    tower = here.tower
    with pytest.raises(ExecutionError, match=r"did not end within 3 s \(limits\.time in its model\.yaml\)"):
        tower.result(order(tower, "sleep", 600, variant="brief"))
    assert tower.result(order(tower, "echo", 2, variant="brief")).outputs == {"given": 2}


def test_what_earlier_calls_left_in_memory_fails_no_later_one(here: Site) -> None:
    tower = here.tower
    jobs = [order(tower, "hold", 60) for _ in range(6)]  # four of them are over the limit together
    assert max(tower.result(job).outputs["given"] for job in jobs) < 5


def test_the_traceback_and_what_was_printed_are_in_the_worker_s_log(here: Site) -> None:
    tower = here.tower
    job = order(tower, "surrogate")
    with pytest.raises(ExecutionError):
        tower.result(job)
    tower.result(order(tower, "print"))
    lines = here.log.read_text().splitlines()
    (said,) = [msgspec.json.decode(line) for line in lines if job in line and "a callable failed" in line]
    assert said["variant"] == "deeds:1/python"
    assert "deeds.py" in said["traceback"] and "ValueError" in said["traceback"]
    assert "\\ud800 printed" in lines


def test_a_lost_process_is_there_again_before_the_next_job_asks(here: Site) -> None:
    tower = here.tower
    with pytest.raises(ExecutionError):
        tower.result(order(tower, "crash"))
    eventually(lambda: "deeds:1/python" in facts(here).warm)


def facts(at: Site) -> DeviceFacts:
    return msgspec.json.decode(at.tower.state.hget(DEVICES, at.worker.name) or b"", type=DeviceFacts)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_leaves_no_process_and_no_memory_behind(
    valkey_url: str, tmp_path: Path, how: signal.Signals
) -> None:
    with site(valkey_url, tmp_path) as own:
        job = order(own.tower, "stubborn", 600)
        processes, process = own.noted(2), own.worker.process
        memory = shared_memory_of([process.pid])
        assert memory
        process.send_signal(how)
        if how == signal.SIGTERM:
            eventually(lambda: facts(own).draining)
            process.send_signal(how)  # for the second time: now
        assert process.wait(60) == (0 if how == signal.SIGTERM else -how)
        assert until(lambda: all(map(gone, processes)), timeout=AT_ONCE)
        assert until(lambda: not memory & shared_memory_of(psutil.pids()), timeout=AT_ONCE)
        if how == signal.SIGTERM:
            assert (own.tower.waiting(), attempts(own.tower, job)) == (1, 0)


def descriptors(process: int) -> list[Path]:
    with suppress(OSError):  # it ended
        return list(Path(f"/proc/{process}/fd").iterdir())
    return []


def shared_memory_of(processes: Iterable[int]) -> set[int]:
    """The inodes of the memory for calls that any of the processes has open."""
    found = set()
    for descriptor in (one for process in processes for one in descriptors(process)):
        with suppress(OSError):  # it was closed meanwhile
            if str(descriptor.readlink()).startswith("/memfd:taxiway-call"):
                found.add(descriptor.stat().st_ino)
    return found
