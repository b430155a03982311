"""What do a callable's report and its checkpoint cost it? `python -m benchmarks.runs`.

The checkpoint's time is from the callable's call to its return, with a real store; beside it is that of writing the
same bytes to the store by the worker's own connection.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.harness.measure import answer, say
from broker.valkey.worker_store import WorkerStore
from local.embedded import EmbeddedValkey
from tasks.models.files import Code
from tasks.queues.limits import Limits
from taxiway import Run
from taxiway.contract.keys import blob_key
from workers.calling.child import Child, FollowedRun
from workers.decide.checkpoints import checksum

REPEATS = 9
REPORTS = 20_000
CHECKPOINTS = 50
STATES = 8  # unlike ones, as those of a run are: the processor's caches do not have them all
SIZES = (2**20, 2**24)
"""Bytes of a state: the lattice of a small simulation, and a large one's."""


def main() -> None:
    """Print a line for the report, and one for each size of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
        store = WorkerStore(server.url, "benchmark", Limits(lease=3600.0))
        _, (claim,) = store.claim([("run", 0.0)])
        run = StoredRun(store, claim.token)
        times = [_called("report", REPORTS, run) * 1e6 for _ in range(REPEATS)]
        say(answer("microseconds of a report", times, least=round(min(times), 2)))
        for size in SIZES:
            _say_checkpoints(store, run, size)


def _say_checkpoints(store: WorkerStore, run: FollowedRun, size: int) -> None:
    contents = itertools.cycle([np.random.default_rng(seed).bytes(size) for seed in range(STATES)])
    pairs = [
        (_called("checkpoint", size, run) * 1e3, _timed(lambda: store.keep_blobs({"beside": next(contents)})) * 1e3)
        for _ in range(REPEATS)
    ]
    times, beside = zip(*pairs, strict=True)
    facts = {
        "bytes": size,
        "least": round(min(times), 3),
        "written": round(statistics.median(beside), 3),
        "least_written": round(min(beside), 3),
        "ratio": round(statistics.median(one / other for one, other in pairs), 2),
    }
    say(answer("milliseconds of a checkpoint", times, **facts))


class StoredRun(FollowedRun):
    """A run whose checkpoints go to the store, as a worker writes them."""

    def __init__(self, store: WorkerStore, token: str) -> None:
        self._store, self._token, self._number = store, token, 0

    def keep(self, form: str, content: memoryview, *, portable: bool) -> bool:
        """Write a checkpoint."""
        self._number += 1
        key = blob_key(f"checkpoint.{self._number}")
        facts = msgspec.json.encode({"key": key, "checksum": checksum(content), "form": form})
        return self._store.keep_checkpoint("run", self._token, key, content, facts, 0.0)


def report(count: int, run: Run) -> dict[str, float]:
    """Seconds of a report."""
    return {"seconds": _timed(lambda: run.report(0.5, "1,240 of 2,480 steps", {"energy": -1.25}), count)}


def checkpoint(size: int, run: Run) -> dict[str, float]:
    """Seconds of a checkpoint of an array of so many bytes."""
    states = itertools.cycle([np.random.default_rng(seed).random(int(size) // 8) for seed in range(STATES)])
    return {"seconds": _timed(lambda: run.checkpoint(next(states)))}


def _called(deed: str, number: int, run: FollowedRun) -> float:
    """What the deed measures in a process of its own."""
    child = Child(Code(f"benchmarks.runs:{deed}"))
    child.await_ready()
    try:
        name = "count" if deed == "report" else "size"
        return float(child.call({name: np.asarray(number)}, lambda: None, run)["seconds"])
    finally:
        child.end()


def _timed(call: Callable[[], object], count: int = CHECKPOINTS) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
