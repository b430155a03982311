"""How late is a waiter notified of its deadline when no worker is alive, and what does a replica cost a submit?

`python -m lab.drills.guarantees` starts a Valkey with a replica (append-only files, flushed every second), a
router, and a worker that is stopped before any request. Jobs have deadlines spread over two seconds; a waiter's
lateness is the time from its job's recorded deadline to its notification. Submits that wait for the replica alternate
with submits that do not.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis

from benchmarks.harness.measure import Line, answer, percentile, say
from benchmarks.harness.processes import broker_settings, serving
from local.embedded import EmbeddedValkey
from tasks.settings import TREE
from taxiway import AsyncClient, DeadlineExceededError
from taxiway.client.asyncio_client import AsyncJob
from taxiway.contract.keys import job_key

WORKER = ["--class", "cpu.batch", "--device", "cpu:0"]


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.guarantees", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs that wait for their deadline")
    parser.add_argument("--submits", type=int, default=500, help="submits of each durability")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _pair(Path(folder)) as url:
        settings = broker_settings(url, TREE / "benchmarks" / "queues.yaml", TREE / "models")
        with serving(Path(folder), settings, [WORKER]) as interfaces:
            psutil.Process(interfaces.processes["worker"][0]).suspend()
            late = asyncio.run(_lateness(url, given.jobs))
        for share in (50, 99, 100):
            say(_line(f"waiter hears after its deadline, no worker lives, p{share} ms", percentile(late, share)))
        taken = asyncio.run(_submits(url, given.submits))
    for durability, seconds in taken.items():
        for share in (50, 99):
            say(_line(f"submit at the broker, {durability}, p{share} ms", percentile(seconds, share)))


@contextmanager
def _pair(folder: Path) -> Iterator[str]:
    """A broker's address; it has a replica."""
    with EmbeddedValkey(folder / "broker") as first, EmbeddedValkey(folder / "replica") as second:
        address = urlsplit(first.url)
        with redis.Redis.from_url(second.url) as replica:
            replica.config_set("masterauth", address.password)
            replica.execute_command("REPLICAOF", address.hostname, address.port)
            while replica.info("replication")["master_link_status"] != "up":
                time.sleep(0.1)
        yield first.url


async def _lateness(url: str, jobs: int) -> list[float]:
    """Seconds from each job's deadline to its waiter's notification."""
    async with AsyncClient(url) as client:
        asked = [await client.submit("echo", n, deadline=2 + 2 * n / jobs) for n in range(jobs)]
        notified = await asyncio.gather(*map(_notified_at, asked))
    with redis.Redis.from_url(url) as state:
        due = [float(state.hget(job_key(job.id), "deadline_at") or 0) for job in asked]
    return [at - deadline for at, deadline in zip(notified, due, strict=True)]


async def _notified_at(job: AsyncJob) -> float:
    try:
        await job.result(10)
    except DeadlineExceededError:
        return time.time()
    raise AssertionError(f"job {job.id} was answered by a stopped worker")


async def _submits(url: str, submits: int) -> dict[str, list[float]]:
    """Seconds that submits took, by durability."""
    taken: dict[str, list[float]] = {"written": [], "replicated": []}
    async with AsyncClient(url) as written, AsyncClient(url, durability="replicated") as replicated:
        for _ in range(submits):
            for client, seconds in zip((written, replicated), taken.values(), strict=True):
                began = time.perf_counter()
                await client.submit("echo", "hello")
                seconds.append(time.perf_counter() - began)
    return taken


def _line(question: str, seconds: float) -> Line:
    return answer(question, [1000 * seconds])


if __name__ == "__main__":
    main()
