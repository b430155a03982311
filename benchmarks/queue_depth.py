"""Does a job cost the same in a queue of a million as in one of ten thousand: to submit, to drain, and in memory?

`python -m benchmarks.queue_depth [--jobs 1000000]` submits `echo` jobs by the client while no router and no worker
runs, so all of them wait; then it starts both and polls the queues until they are empty. The small queue is filled and
drained before and after the large one. At the end it reads the results of a sample of jobs, which must have succeeded.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
import uvloop
from celery import states

import taxiway
from benchmarks.harness.bars import Bar, Panel, write_chart
from benchmarks.harness.measure import CHARTS, Line, answer, machine, say
from benchmarks.harness.processes import broker_settings, serving
from benchmarks.suite.catalogue import CLASS, queues_of
from benchmarks.suite.workloads import TEXT
from local.embedded import EmbeddedValkey
from taxiway.contract.job import read_meta
from taxiway.contract.keys import ARRIVALS, priority_lists, result_key

SMALL = 10_000

TARGET = 1.2
"""Target: the largest ratio of a job's cost in the large queue to that in the small one."""

SUBMITTERS = 256
"""Concurrent submissions."""

SAMPLE = 1000
"""Jobs whose results are read at the end."""

STUCK = 60.0
"""Seconds without progress after which a drain has failed."""

UNACKED = "unacked"
"""Kombu's hash of messages that workers hold."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one job in a queue of `jobs`: microseconds to submit and to drain, bytes while it waits."""

    jobs: int
    submit: float
    drain: float
    memory: float


def main() -> None:
    """Measure, print each figure and ratio, and write the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue_depth", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="jobs in the large queue")
    parser.add_argument("--chart", type=Path, default=CHARTS / "queue_depth.html", help="where the chart is written")
    given = parser.parse_args()
    costs = [one_queue(jobs) for jobs in (SMALL, SMALL, given.jobs, SMALL)]
    for line in lines(costs):
        say(line)
    panels = [Panel(title, unit, _bars(costs, name)) for name, (title, unit) in _MEASURES.items()]
    write_chart(given.chart, "A job's cost by the depth of its queue", str(machine()["device"]), panels)


def one_queue(jobs: int) -> Cost:
    """Fill and drain a queue on a new broker."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "queues.yaml").write_text(queues_of("echo", rows=64, keep=3600))
        with EmbeddedValkey(folder) as valkey, redis.Redis.from_url(valkey.url) as store:
            before, began = _memory(store), time.perf_counter()
            sample = uvloop.run(submit(valkey.url, jobs))
            submitted = time.perf_counter() - began
            memory = _memory(store) - before
            settings = broker_settings(valkey.url, folder / "queues.yaml")
            with serving(folder, settings, [["--class", CLASS, "--device", "cpu:0"]]):
                drained = drain(store, jobs)
            results = store.mget([result_key(job) for job in sample])
    succeeded = sum(meta is not None and read_meta(meta).status == states.SUCCESS for meta in results)
    assert succeeded == len(sample), f"{len(sample) - succeeded} of {len(sample)} sampled jobs have no answer"
    cost = Cost(jobs, 1e6 * submitted / jobs, 1e6 * drained, memory / jobs)
    sys.stderr.write(f"{cost}\n")
    return cost


async def submit(broker: str, jobs: int) -> list[str]:
    """Submit this many jobs; returns a sample of their ids."""
    numbers, sample = iter(range(jobs)), []
    step = max(1, jobs // SAMPLE)
    async with taxiway.AsyncClient(broker) as client:

        async def submitter() -> None:
            for number in numbers:
                job = await client.submit("echo", TEXT)
                if number % step == 0:
                    sample.append(job.id)

        await asyncio.gather(*(submitter() for _ in range(SUBMITTERS)))
    return sample


def drain(store: redis.Redis, jobs: int) -> float:
    """Seconds per job between 5 % and 95 % of the jobs, which excludes the start of processes.

    Raises:
        TimeoutError: no progress for `STUCK` seconds.
    """
    seen, moved = [(time.perf_counter(), depth(store))], time.perf_counter()
    while seen[-1][1]:
        time.sleep(0.02)
        seen.append((time.perf_counter(), depth(store)))
        if seen[-1][1] < seen[-2][1]:
            moved = seen[-1][0]
        elif seen[-1][0] > moved + STUCK:
            raise TimeoutError(f"{seen[-1][1]} jobs wait, and none was done for {STUCK:g} s")
    inside = [(at, waiting) for at, waiting in seen if 0.05 * jobs <= waiting <= 0.95 * jobs]
    (first, most), (last, least) = inside[0], inside[-1]
    return (last - first) / (most - least)


def depth(store: redis.Redis) -> int:
    """Jobs that wait for, or are held by, the router or the worker."""
    with store.pipeline(transaction=False) as asked:
        for queue in itertools.chain(priority_lists(ARRIVALS), priority_lists(CLASS)):
            asked.llen(queue)
        asked.hlen(UNACKED)
        counts: list[int] = asked.execute()
    taken = sum(store.hlen(key) for key in store.keys("taxiway:in-flight:*")) if sum(counts) == 0 else 0
    return sum(counts) + taken


def lines(costs: Sequence[Cost]) -> Iterator[Line]:
    """What is printed: each measure at both depths, then their ratio."""
    small, large = (
        [cost for cost in costs if (cost.jobs == SMALL) == is_small] or list(costs) for is_small in (True, False)
    )
    for name, (title, unit) in _MEASURES.items():
        few, many = ([getattr(cost, name) for cost in some] for some in (small, large))
        yield answer(f"{title}, {unit}, {SMALL:,} queued", few)
        yield answer(f"{title}, {unit}, {large[0].jobs:,} queued", many)
        ratios = [each / statistics.median(few) for each in many]
        question = f"{title}, ratio at {large[0].jobs:,} to that at {SMALL:,}"
        yield answer(question, ratios, target=TARGET, holds=statistics.median(ratios) <= TARGET)


_MEASURES = {
    "submit": ("time to submit a job", "µs"),
    "drain": ("time to drain a job", "µs"),
    "memory": ("memory of a waiting job", "bytes"),
}
"""Title and unit of each field of `Cost` that is measured."""


def _bars(costs: Sequence[Cost], name: str) -> list[Bar]:
    depths = sorted({cost.jobs for cost in costs})
    return [Bar(f"{jobs:,} queued", [getattr(c, name) for c in costs if c.jobs == jobs], own=True) for jobs in depths]


def _memory(store: redis.Redis) -> int:
    return int(store.info("memory")["used_memory"])


if __name__ == "__main__":
    main()
