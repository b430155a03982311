"""What do jobs leave behind in the broker after they expired?

`python -m lab.drills.leaks [--jobs 100000]` sends jobs that end in every way: succeeded, failed, refused,
cancelled, expired; with large values beside their messages, with reused idempotency keys, held for their tenant, and
streamed, at the broker and at the HTTP API. Results and records are kept for two seconds. It prints how many
more keys, and how much more memory, there are than before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import redis
import uvloop

from benchmarks.harness.measure import answer, say
from benchmarks.harness.processes import fleet
from taxiway import AsyncClient
from taxiway.contract.keys import DEADLINES, LEAD, capacity_key, session_key, stream_key
from taxiway.errors import TaxiwayError
from tests.engine import Engine, serving

QUEUES = """
hardware:
  cpu.batch:
    device: cpu
    runtimes: [echo]
    max_batch: 64
    max_wait: 0.002
    horizon: 0.3
    price: {{usd_per_hour: 0.05}}
    warm: [echo, paced]
  engine:
    device: endpoint
    endpoint: {{protocol: openai, url: "{url}", slots: 64, models: {{generate: served}}}}
    price: {{usd_per_hour: 0.1}}
service:
  standard: {{deadline: 20}}
default_service: standard
limits: {{keep_result: 2, keep_record: 2, keep_explanation: 2}}
"""

SUBMITTERS = 256
"""Concurrent jobs."""

WARM = 1_000
"""Jobs of every kind before the baseline, so it includes keys that are kept permanently."""

SETTLED = 300.0
"""Longest wait until all traces of jobs have expired: streams are kept for two minutes."""

RENEWED = (session_key(""), capacity_key(""), LEAD)
"""Prefixes of keys that a running router or worker renews."""

FOR_GOOD = -1
"""The server's TTL of a key without an expiry."""

LARGE = b"x" * 20_000
"""A value that travels beside its message."""

Kind = Callable[[AsyncClient, int], Awaitable[Any]]


async def _cancelled(client: AsyncClient, number: int) -> Any:
    job = await client.submit("paced", number)
    await job.cancel()
    return await job.result(60)


async def _streamed(client: AsyncClient, number: int) -> Any:
    return [event async for event in client.stream("generate", f"Say {number}.", parameters={"max_tokens": 2})]


KINDS: dict[str, tuple[int, Kind]] = {
    "plain": (1, lambda client, number: client.infer("echo", number)),
    "of a tenant": (3, lambda client, number: client.infer("paced", number, tenant=f"tenant-{number % 50}")),
    "large": (10, lambda client, _: client.infer("echo", LARGE)),
    "under a key": (7, lambda client, number: client.infer("echo", LARGE, idempotency_key=f"{number // 64}")),
    "wrong inputs": (11, lambda client, _: client.infer("generate", {"no": "text"})),
    "refused": (13, lambda client, _: client.infer("no-such-model", LARGE)),
    "past its deadline": (17, lambda client, number: client.infer("paced", number, deadline=0.002)),
    "cancelled": (19, _cancelled),
    "streamed": (997, _streamed),
}
"""The kinds of jobs: a job is of the last kind whose figure divides its number."""


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.leaks", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs to send")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, serving(Engine()) as engine:
        folder = Path(name)
        (folder / "queues.yaml").write_text(QUEUES.format(url=engine.url))
        workers = [["--class", "cpu.batch", "--device", "cpu:0"], ["--class", "engine", "--device", "endpoint:0"]]
        with (
            fleet(folder, folder / "queues.yaml", workers) as interfaces,
            redis.Redis.from_url(interfaces.broker) as store,
        ):
            uvloop.run(send(interfaces.broker, interfaces.http, WARM))
            streams: Any = store.keys(stream_key("*"))
            base, memory = settled(store, set(streams)) - set(streams), _memory(store)
            outcomes, most = uvloop.run(send(interfaces.broker, interfaces.http, given.jobs)), store.dbsize()
            left, after = settled(store, base) - base, _memory(store)
    question = f"keys that {given.jobs:,} jobs left behind"
    names = sorted({key.decode().rpartition(":")[0] for key in left})
    more = {"keys_before": len(base), "keys_at_the_end_of_sending": most, "left": names, "outcomes": outcomes}
    say(answer(question, [len(left)], **more, memory_before=memory, memory_after=after))


async def send(broker: str, http: str, jobs: int) -> Counter[str]:
    """Send jobs by both interfaces in alternation; returns how they ended."""
    numbers, outcomes = iter(range(1, jobs + 1)), Counter[str]()
    async with AsyncClient(broker, connect_timeout=60) as one, AsyncClient(http, connect_timeout=60) as other:

        async def submitter() -> None:
            for number in numbers:
                kind = [kind for every, kind in KINDS.values() if number % every == 0][-1]
                try:
                    await kind(one if number % 8 else other, number)
                except TaxiwayError as error:
                    outcomes[error.code] += 1
                else:
                    outcomes["succeeded"] += 1

        await asyncio.gather(*(submitter() for _ in range(SUBMITTERS)))
    return outcomes


def settled(store: redis.Redis, base: set[bytes]) -> set[bytes]:
    """The keys that are not in `base`, once all that expire without being renewed have expired."""
    end = time.monotonic() + SETTLED
    while True:
        found: Any = store.keys()
        keys: set[bytes] = set(found)
        others = [key for key in keys - base if not key.decode().startswith(RENEWED)]
        with store.pipeline(transaction=False) as asked:
            for key in others:
                asked.pttl(key)
            passing = any(left != FOR_GOOD for left in asked.execute()) or store.exists(DEADLINES)
        if not passing or time.monotonic() > end:
            return keys
        time.sleep(1)


def _memory(store: redis.Redis) -> int:
    with contextlib.suppress(redis.ResponseError):
        store.memory_purge()
    return int(store.info("memory")["used_memory"])


if __name__ == "__main__":
    main()
