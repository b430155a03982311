"""What happens to jobs when three of four workers are reclaimed at once under load?

`python -m lab.drills.spot` runs a router and four workers, with live requests that arrive at random over a
backlog of bulk. Three workers get a notice of five seconds (SIGUSR2), and are killed when these are over, as a cloud
does. It counts lost jobs, jobs that ran to their end twice, and live requests answered within their deadline before the
notice, from then until five seconds after the kill, and later. Then it does the same without a notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis.asyncio
import uvloop

import taxiway
from benchmarks.harness.measure import Line, machine, say
from benchmarks.harness.processes import broker_settings, started
from lab.drills.places import outcome_of
from local.embedded import EmbeddedValkey
from tasks.settings import TREE
from taxiway.contract.keys import ARRIVALS, priority_lists
from workers.drain import SIGNAL

WORKERS, RECLAIMED = 4, 3

NOTICE = 5.0
"""Seconds from the notice to the kill."""

BEFORE = 5.0
"""Seconds of load before the notice."""

AFTER = 5.0
"""Seconds after the kill that count as recovery."""

LATER = 5.0
"""Seconds of load beyond these."""

PACE = 0.01
"""Seconds that a job runs: a worker finishes nearly 100 per second."""

LIVE = 30.0
"""Live requests a second: a third of what one worker can do."""

BULK = 4500

DEADLINE = 1.0
"""Seconds within which a live request is answered."""

TIMEOUT = 120.0
"""Seconds without a result after which a job counts as lost."""

QUEUES = f"""
hardware:
  cpu.spot:
    device: cpu
    runtimes: [python]
    max_batch: 8
    max_wait: 0.005
    horizon: 2
    price: {{usd_per_hour: 0.05, spot_usd_per_hour: 0.02}}
    capacity: spot
    notice: {{grace: {NOTICE}}}
    warm: [noted]
service:
  live: {{deadline: {DEADLINE}, priority: high, preemptible: true}}
  bulk: {{deadline: 3600, priority: low, preemptible: true}}
default_service: bulk
limits: {{lease: 5}}
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its start and end (`time.perf_counter`), and its outcome: answered, refused, lost, an error."""

    number: int
    began: float
    ended: float
    how: str


@dataclass(frozen=True, slots=True)
class Drill:
    """All requests, the time at which workers were reclaimed, and how many of these still ran at the kill."""

    live: Sequence[Asked]
    bulk: Sequence[Asked]
    reclaimed: float
    killed: int


def main() -> None:
    """Run both drills, and print a line for each."""
    for noticed in (True, False):
        with tempfile.TemporaryDirectory() as name, _fleet(Path(name)) as (broker, workers):
            notes = Path(name) / "notes"
            notes.unlink()  # the workers' warm-up calls
            drill = uvloop.run(_load(broker, workers[:RECLAIMED], noticed=noticed))
            ran = Counter(notes.read_text().split())
        say(line(drill, ran, noticed=noticed))


def line(drill: Drill, ran: Counter[str], *, noticed: bool) -> Line:
    """The output line; `ran` counts how often each number ran to its end."""
    recovered = drill.reclaimed + NOTICE + AFTER
    spans = {
        "before": [one for one in drill.live if one.ended < drill.reclaimed],
        "during": [one for one in drill.live if drill.reclaimed <= one.ended and one.began < recovered],
        "later": [one for one in drill.live if one.began >= recovered],
    }
    asked = (*drill.live, *drill.bulk)
    return {
        "question": f"{RECLAIMED} of {WORKERS} workers reclaimed, {f'{NOTICE:g} s notice' if noticed else 'no notice'}",
        **machine(),
        "jobs": len(asked),
        "ended": dict(Counter(one.how for one in asked)),
        "lost": sum(one.how == "lost" for one in asked),
        "run to the end twice": sum(times > 1 for times in ran.values()),
        "workers killed": drill.killed,
        "live attainment": {name: attainment(some) for name, some in spans.items()},
    }


def attainment(asked: Sequence[Asked]) -> float:
    """The share answered within the deadline; refused requests count as not answered."""
    good = sum(one.how == "answered" and one.ended - one.began <= DEADLINE for one in asked)
    return round(good / len(asked), 4) if asked else 1.0


@contextlib.contextmanager
def _fleet(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """A router and the workers; the broker's address, and the workers' process ids."""
    (folder / "queues.yaml").write_text(QUEUES)
    with EmbeddedValkey(folder) as valkey, contextlib.ExitStack() as stack:
        settings = broker_settings(valkey.url, folder / "queues.yaml", TREE / "lab" / "models")
        variables = settings.environment() | {"TAXIWAY_NOTED": str(folder / "notes")}
        router = ["-m", "api", "--host", "127.0.0.1", "--port", "0"]
        stack.enter_context(started(router, variables, folder / "router.log"))
        worker = ["-m", "workers", "--class", "cpu.spot", "--device"]
        crew = [
            stack.enter_context(started([*worker, f"cpu:{n}"], variables, folder / f"worker-{n}.log"))
            for n in range(WORKERS)
        ]
        yield valkey.url, [one["pid"] for one in crew]


async def _load(broker: str, reclaimed: Sequence[int], *, noticed: bool) -> Drill:
    """Generate load, and reclaim some workers meanwhile."""
    async with taxiway.AsyncClient(broker) as client:
        jobs = await asyncio.gather(*(client.submit("noted", _inputs(n), service="bulk") for n in range(BULK)))
        await _placed(broker)
        bulk = asyncio.gather(*(_answered(job.result(TIMEOUT), n) for n, job in enumerate(jobs)))
        live = asyncio.create_task(_arrivals(client, BEFORE + NOTICE + AFTER + LATER))
        await asyncio.sleep(BEFORE)
        at = time.perf_counter()
        if noticed:
            _tell(reclaimed, SIGNAL)
            await asyncio.sleep(NOTICE)
        killed = _tell(reclaimed, signal.SIGKILL)
        return Drill(await live, await bulk, at, killed)


async def _placed(broker: str) -> None:
    """Return when routers have placed all arrivals, to exclude the initial backlog from the measurement."""
    async with redis.asyncio.Redis.from_url(broker) as store:
        while await store.exists(*priority_lists(ARRIVALS)):
            await asyncio.sleep(0.05)


async def _arrivals(client: taxiway.AsyncClient, seconds: float) -> list[Asked]:
    """Open-loop live requests at random times."""
    draw, running = random.Random(7), list[asyncio.Task[Asked]]()
    due = time.perf_counter()
    ends = due + seconds
    while (due := due + draw.expovariate(LIVE)) < ends:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        number = BULK + len(running)
        answer = client.infer("noted", _inputs(number), service="live", timeout=TIMEOUT)
        running.append(asyncio.create_task(_answered(answer, number)))
    return list(await asyncio.gather(*running))


async def _answered(answer: Awaitable[taxiway.Result], number: int) -> Asked:
    began = time.perf_counter()
    how = await outcome_of(answer)
    return Asked(number, began, time.perf_counter(), how)


def _inputs(number: int) -> dict[str, float]:
    return {"number": number, "seconds": PACE}


def _tell(workers: Sequence[int], what: signal.Signals) -> int:
    """Send a signal to the processes that still run; returns how many."""
    alive = [pid for pid in workers if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    for pid in alive:
        os.kill(pid, what)
    return len(alive)


if __name__ == "__main__":
    main()
