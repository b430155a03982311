"""Does a new worker get its half of the jobs that wait for another class, while leaders are killed?

`python -m lab.drills.misplaced` starts two routers and a worker, and submits `paced` jobs
until 20,000 wait for its class. Then a worker of another class of the same price joins, and the leader is killed
(`kill -9`) as soon as jobs begin to move, 20 times; a standby takes over, and a new router starts. All jobs must be
answered within 1.15 times the time of a perfect split. That time is measured before and after, with the same workers
and jobs placed on both, because other load on the machine varies. That each job ran once is checked from its record,
which counts claims and runs, and from the announcements of results. The exit status is 1 if any check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis

import taxiway
from benchmarks.harness.measure import answer, say
from benchmarks.harness.processes import broker_settings, running, started
from broker.port import Moved
from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway.contract.job import decode_moves, read_meta, read_result
from taxiway.contract.keys import DEVICES, LEAD, MOVES, WORK, job_key, result_key, work_cell

HERE, THERE = "cpu.here", "cpu.there"

ROWS = 16
"""Rows of a job, which fill the largest batch: a job takes 6.6 ms of its device."""

QUEUES = f"""
hardware:
  {HERE}: &twin
    device: cpu
    runtimes: [echo]
    max_batch: {ROWS}
    max_wait: 0.005
    horizon: 3600
    price: {{usd_per_hour: 0.05}}
    warm: [paced]
  {THERE}: *twin
service:
  bulk: {{deadline: 3600, preemptible: true}}
default_service: bulk
"""

SECONDS = 0.0066
"""Device seconds of a job."""

LEVEL = 2
"""The priority level of bulk work."""

TARGET = 1.15
"""Target: largest time as a multiple of a perfect split's."""

MEASURED = 2000
"""Jobs placed on both classes before and after, to measure a perfect split."""

SUBMITTERS = 64
"""Concurrent submissions."""

ANYWHERE = ("--host", "127.0.0.1", "--port", "0")
"""A router's port."""

SEED = 7

JOINING = 600
"""Approximate number of jobs that the first worker finishes while the second one starts."""

SHARE = 0.7
"""Approximate share of the jobs that move; the kills are spread evenly over them."""

STUCK = 60.0
"""Seconds without a finished job after which the run has failed."""


@dataclass(slots=True)
class Fleet:
    """Processes on one broker, and the store's announcements: `written` counts those of each job's result.

    `sent` maps jobs to their inputs, and `recorded` are the times of moves that a router recorded before it was killed.
    """

    settings: Settings
    folder: Path
    store: Any  # redis-py's own types do not tell bytes from text
    stack: contextlib.ExitStack
    sent: dict[str, list[str]] = field(default_factory=dict)
    written: Counter[str] = field(default_factory=Counter)
    recorded: set[float] = field(default_factory=set)
    _logs: Iterator[int] = field(default_factory=itertools.count)

    @property
    def unanswered(self) -> int:
        """Jobs without a result."""
        return len(self.sent) - len(self.written)

    def start(self, module: str, *options: str) -> Callable[[], None]:
        """Start a worker or a router; it ends with the fleet, or when the returned function is called."""
        alone = self.stack.enter_context(contextlib.ExitStack())
        log = self.folder / f"{module}-{next(self._logs)}.log"
        command = [sys.executable, "-m", module, *options]
        alone.enter_context(running(command, self.settings.environment(), log))
        return alone.close

    def interface(self) -> str:
        """A router's address, once it is ready."""
        log = self.folder / "router.log"
        return str(
            self.stack.enter_context(started(["-m", "api", *ANYWHERE], self.settings.environment(), log))["http"]
        )

    def work(self, hardware_class: str) -> float:
        """Device seconds that are bound to a class."""
        return float(self.store.hget(WORK, work_cell(hardware_class, LEVEL)) or 0)

    def listen(self) -> None:
        """Count the store's announcements until it stops."""
        subscription = self.store.pubsub(ignore_subscribe_messages=True)
        subscription.psubscribe(f"{result_key('')}*")
        with contextlib.suppress(redis.ConnectionError):
            for message in subscription.listen():
                self.written[message["channel"].decode().removeprefix(result_key(""))] += 1

    def hear_of_moves(self) -> None:
        """Collect the moves that routers recorded recently."""
        raw: Any = self.store.lrange(MOVES, 0, -1)
        self.recorded |= {msgspec.json.decode(one, type=Moved).at for one in raw}

    def leader(self) -> tuple[str, int]:
        """The leader's token and its process id; empty and 0 without a leader."""
        token = (self.store.get(LEAD) or b"").decode()
        return token, int(token.split("-")[-2]) if token else 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of the waiting jobs.

    `cut` counts ticks that were partly done when their router was killed. `lost` jobs have no result or a wrong one;
    jobs done `again` were claimed, run or answered more than once.
    """

    jobs: int
    seconds: float
    perfect: float
    killed: int
    moved: int
    cut: int
    lost: int
    again: int

    @property
    def ratio(self) -> float:
        """Their time as a multiple of a perfect split's."""
        return self.seconds / self.perfect


def main() -> int:
    """Run once and print the line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.misplaced", description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000, help="jobs that wait for one class")
    parser.add_argument("--kills", type=int, default=20, help="how often the router that leads is killed")
    given = parser.parse_args()
    with own_fleet() as fleet:
        outcome = misplaced(fleet, given.jobs, given.kills)
    holds = outcome.ratio <= TARGET and not outcome.lost and not outcome.again and outcome.killed == given.kills
    where = f"{given.jobs:,} jobs on one class, another idle"
    figures = {name: figure for name, figure in asdict(outcome).items() if name not in ("seconds", "perfect")}
    took = {"seconds": round(outcome.seconds, 1), "perfect": round(outcome.perfect, 1)}
    say(answer(f"{where}: time to a perfect split's", [outcome.ratio], target=TARGET, holds=holds, **took, **figures))
    return 0 if holds else 1


@contextlib.contextmanager
def own_fleet() -> Iterator[Fleet]:
    """A fleet without processes yet."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "queues.yaml").write_text(QUEUES)
        valkey = stack.enter_context(EmbeddedValkey(folder))
        settings = broker_settings(valkey.url, folder / "queues.yaml")
        store = stack.enter_context(redis.Redis.from_url(valkey.url))
        fleet = Fleet(settings, folder, store, stack.enter_context(contextlib.ExitStack()))
        threading.Thread(target=fleet.listen, daemon=True).start()
        yield fleet


def misplaced(fleet: Fleet, jobs: int, kills: int) -> Outcome:
    """Let `jobs` wait for one class, start a worker of the other, and return the outcome."""
    interface = fleet.interface()
    fleet.start("workers", "--class", HERE, "--device", "cpu:0")
    stop = fleet.start("workers", "--class", THERE, "--device", "cpu:1")
    await_that(fleet, lambda: fleet.store.hlen(DEVICES) == 2)
    before = seconds_each(fleet, interface)
    stop()
    await_that(fleet, lambda: fleet.store.hlen(DEVICES) == 1)
    asyncio.run(submit(fleet, interface, lambda: fleet.unanswered < jobs + JOINING))
    fleet.start("router", *ANYWHERE)
    fleet.start("workers", "--class", THERE, "--device", "cpu:1")
    await_that(fleet, lambda: fleet.store.hlen(DEVICES) == 2)
    began, waiting = time.monotonic(), fleet.unanswered
    sys.stderr.write(f"{waiting} jobs wait\n")
    killed = kill_leaders(fleet, kills, jobs)
    await_that(fleet, lambda: not fleet.unanswered)
    seconds = time.monotonic() - began
    after = seconds_each(fleet, fleet.interface())
    sys.stderr.write(f"took {seconds:.1f} s; {1000 * before:.2f} and {1000 * after:.2f} ms a job before and after\n")
    fleet.hear_of_moves()
    fleet.stack.close()
    return outcome_of(fleet, waiting, seconds=seconds, perfect=waiting * (before + after) / 2, killed=killed)


def seconds_each(fleet: Fleet, interface: str) -> float:
    """Seconds per job when jobs are placed on both classes, from the 10th to the 90th percent of `MEASURED`."""
    already, seen = len(fleet.sent), list[tuple[float, int]]()
    asyncio.run(submit(fleet, interface, lambda: len(fleet.sent) - already < MEASURED))
    while fleet.unanswered:
        seen.append((time.monotonic(), fleet.unanswered))
        time.sleep(0.01)
    inside = [(at, left) for at, left in seen if 0.1 * MEASURED <= left <= 0.9 * MEASURED]
    (first, most), (last, least) = inside[0], inside[-1]
    return (last - first) / (most - least)


async def submit(fleet: Fleet, interface: str, more: Callable[[], bool]) -> None:
    """Submit jobs until `more` is false."""
    async with taxiway.AsyncClient(interface) as client:

        async def submitter(number: int) -> None:
            while more():
                inputs = [f"{number}.{row}" for row in range(ROWS)]
                fleet.sent[(await client.submit("paced", inputs)).id] = inputs

        await asyncio.gather(*map(submitter, range(SUBMITTERS)))


def kill_leaders(fleet: Fleet, kills: int, jobs: int) -> int:
    """Kill the leader while it moves jobs and start another router, `kills` times; returns how many were killed.

    Each is killed after a random number of moves.
    """
    numbers, dead, moved, before = random.Random(SEED), set[str](), 0.0, fleet.work(THERE)
    longest = SHARE * jobs / kills * SECONDS
    most = numbers.uniform(0, longest)
    while len(dead) < kills and fleet.unanswered:
        fleet.hear_of_moves()
        token, process = fleet.leader()
        now = fleet.work(THERE)
        moved, before = moved + max(now - before, 0.0), now
        if not token or token in dead or not moved > most:
            time.sleep(0.001)
            continue
        os.kill(process, signal.SIGKILL)
        dead.add(token)
        moved, most = 0.0, numbers.uniform(0, longest)
        fleet.start("router", *ANYWHERE)
    return len(dead)


def await_that(fleet: Fleet, condition: Callable[[], bool]) -> None:
    """Wait until the condition is true.

    Raises:
        TimeoutError: no job was finished for `STUCK` seconds.
    """
    answered, since = len(fleet.written), time.monotonic()
    while not condition():
        fleet.hear_of_moves()
        if len(fleet.written) > answered:
            answered, since = len(fleet.written), time.monotonic()
        if time.monotonic() - since > STUCK:
            raise TimeoutError(f"{fleet.unanswered} jobs wait, and none was answered for {STUCK:g} s")
        time.sleep(0.05)


def outcome_of(fleet: Fleet, jobs: int, *, seconds: float, perfect: float, killed: int) -> Outcome:
    """Read the record of every job that was sent."""
    moves, lost, again = Counter[float](), 0, 0
    for job, inputs in fleet.sent.items():
        meta = fleet.store.get(result_key(job))
        lost += meta is None or read_result(read_meta(meta)).outputs["payload"] != inputs
        names = ["attempts", "claims", "released", "moves"]
        attempts, claims, released, moved = fleet.store.hmget(job_key(job), names)
        again += (int(attempts), int(claims) - int(released or 0), fleet.written[job]) != (1, 1, 1)
        moves.update(move.at for move in decode_moves(moved or b"[]"))
    cut = len(moves.keys() - fleet.recorded)
    return Outcome(jobs, seconds, perfect, killed, moves.total(), cut, lost, again)


if __name__ == "__main__":
    sys.exit(main())
