"""How much of long simulations' work is kept when their workers are killed and reclaimed again and again?

`python -m lab.drills.interruptions` runs a router and two workers, with simulations of models/ising and
examples/science/argon (OpenMM) always in progress. At random moments a worker is killed, or gets a reclaim notice and
is killed later, and another takes its place. It counts the share of computed seconds that was not done again, and
answers that are not byte for byte those of an undisturbed run. Then the same interruptions come to runs without
checkpoints, which start from zero.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio
import uvloop

import taxiway
from benchmarks.harness.measure import machine, say
from benchmarks.harness.processes import broker_settings, started
from lab.drills.places import Place
from local.embedded import EmbeddedValkey
from tasks.models.files import Code
from tasks.settings import TREE
from taxiway import Run
from taxiway.contract.keys import job_key
from taxiway.errors import TaxiwayError
from workers.drain import SIGNAL

WORKERS = 2

NOTICE = 3.0
"""Seconds from a notice to the kill."""

RUNS: Sequence[tuple[str, Path, dict[str, Any]]] = (
    ("ising", TREE / "models" / "ising", {"sweeps": 60_000, "size": 16, "temperature": 2.1, "seed": 3}),
    ("argon", TREE / "examples" / "science" / "argon", {"steps": 6_000, "temperature": 94.4, "seed": 1}),
)
"""The simulations: each some ten seconds of one core."""

QUEUES = """
hardware:
  cpu.spot:
    device: cpu
    runtimes: [python]
    max_batch: 1
    max_wait: 0.01
    price: {{usd_per_hour: 0.05, spot_usd_per_hour: 0.02}}
    capacity: spot
    notice: {{grace: {notice}}}
    warm: [ising, argon]
service:
  bulk: {{deadline: 86400, priority: low, preemptible: true}}
default_service: bulk
limits: {{lease: 3, attempts: 1000, checkpoint: {checkpoint}}}
"""


@dataclass
class Tally:
    """What became of the simulations; `ran` and `redone` are seconds."""

    answered: int = 0
    unlike: int = 0
    failed: int = 0
    ran: float = 0.0
    redone: float = 0.0
    kills: int = 0
    notices: int = 0
    took: list[float] = field(default_factory=list)


def main() -> None:
    """Run both sides, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.interruptions", description=__doc__)
    parser.add_argument("--interruptions", type=int, default=100, help="kills and notices, alternately, of each side")
    parser.add_argument("--seconds", type=float, default=1800.0, help="in which they come, at random times")
    given = parser.parse_args()
    expected = {
        name: _answer(Code(f"{folder / name}.py:call").load()(**inputs, run=Run())) for name, folder, inputs in RUNS
    }
    for side, checkpoint in (("from checkpoints", "64MiB"), ("from zero", "1")):
        with tempfile.TemporaryDirectory() as folder, _broker(Path(folder), checkpoint) as (variables, broker):
            began = time.perf_counter()
            tally = uvloop.run(_drill(Path(folder), variables, broker, given, expected))
            _say(side, tally, time.perf_counter() - began)


def _say(side: str, tally: Tally, seconds: float) -> None:
    say(
        {
            "question": f"share of computed seconds that was kept through kills and notices, {side}",
            **machine(),
            "kept": round(1.0 - tally.redone / max(tally.ran, 1e-9), 4),
            "answered": tally.answered,
            "not byte-identical": tally.unlike,
            "failed": tally.failed,
            "kills": tally.kills,
            "notices": tally.notices,
            "mean seconds of an answer": round(sum(tally.took) / max(len(tally.took), 1), 1),
            "answers an hour": round(3600 * tally.answered / seconds, 1),
        }
    )


@contextmanager
def _broker(folder: Path, checkpoint: str) -> Iterator[tuple[Mapping[str, str], str]]:
    """A broker; the variables of its fleet's processes, and its address."""
    queues, models = folder / "queues.yaml", folder / "models"
    queues.write_text(QUEUES.format(notice=NOTICE, checkpoint=checkpoint))
    models.mkdir()
    for name, place, _ in RUNS:
        (models / name).symlink_to(place)
    with EmbeddedValkey(folder) as valkey:
        yield broker_settings(valkey.url, queues, models).environment(), valkey.url


async def _drill(
    folder: Path, variables: Mapping[str, str], broker: str, given: argparse.Namespace, expected: Mapping[str, bytes]
) -> Tally:
    tally, over = Tally(), asyncio.Event()
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(folder, variables, number)) for number in range(WORKERS)]
        router = ["-m", "api", "--host", "127.0.0.1", "--port", "0"]
        stack.enter_context(started(router, variables, folder / "router.log"))
        async with taxiway.AsyncClient(broker) as client, redis.asyncio.Redis.from_url(broker) as store:
            callers = [_simulate(client, store, number, tally, over, expected) for number in range(2 * WORKERS)]
            running = asyncio.gather(*callers)
            await _interrupt(workers, tally, given)
            over.set()
            await running
    return tally


def _worker(folder: Path, variables: Mapping[str, str], number: int) -> Place:
    command = ["-m", "workers", "--class", "cpu.spot", "--device", f"cpu:{number}"]
    return Place(command, variables, folder / f"worker-{number}.log")


async def _interrupt(workers: Sequence[Place], tally: Tally, given: argparse.Namespace) -> None:
    """Kill workers, with a notice and without one in turn."""
    draw, began = random.Random(7), time.perf_counter()
    for number in range(given.interruptions):
        due = began + (number + draw.random()) * given.seconds / given.interruptions
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        worker = draw.choice(workers)
        if number % 2:
            worker.tell(SIGNAL)
            await asyncio.sleep(NOTICE)
        tally.notices += number % 2
        tally.kills += 1 - number % 2
        await worker.replace()


async def _simulate(
    client: taxiway.AsyncClient,
    store: redis.asyncio.Redis,
    caller: int,
    tally: Tally,
    over: asyncio.Event,
    expected: Mapping[str, bytes],
) -> None:
    """Submit one simulation after another."""
    for turn in count(caller):
        if over.is_set():
            return
        name, _, inputs = RUNS[turn % len(RUNS)]
        job, began = await client.submit(name, inputs), time.perf_counter()
        try:
            result = await job.result()
        except TaxiwayError:
            tally.failed += 1
            continue
        tally.took.append(time.perf_counter() - began)
        tally.answered += 1
        tally.unlike += _answer(result.outputs) != expected[name]
        tally.ran += float(await store.hget(job_key(job.id), "ran") or 0.0)
        tally.redone += result.report.redone


def _answer(outputs: Mapping[str, Any]) -> bytes:
    """The bytes of an answer's numbers."""
    return b"".join(np.asarray(outputs[name], np.float64).tobytes() for name in sorted(outputs))


if __name__ == "__main__":
    main()
