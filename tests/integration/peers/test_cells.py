"""A front that has nothing but other fleets: it sends jobs where they are in time, and loses none with a fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import taxiway
from tests.builders import recorded
from tests.routing import eventually
from tests.sites import FAR, OpenSite, open_fleet
from tests.stored import record_of
from tests.working import WorkerProcess

CELL = FAR.replace("warm: [echo, slab]", "warm: [slow]")
"""Of batches that take 50 ms: what a busy machine adds does not make one cell the cheaper one."""

BATCHES = {"east": 1, "west": 4}
"""Rows that a cell runs together: the west serves almost four times as many."""

FRONT = recorded("fleets/cells.yaml")

JOBS, ROWS = 60, 2
"""A second of the east has ten such jobs."""


@contextmanager
def cells(valkey_url: str, folder: Path) -> Iterator[tuple[OpenSite, dict[str, tuple[OpenSite, WorkerProcess]]]]:
    """A front, and its cells with their workers, once each has made offers."""
    with ExitStack() as stack:
        opened: dict[str, tuple[OpenSite, WorkerProcess]] = {}
        queues = FRONT
        for name, rows in BATCHES.items():
            cell = CELL.replace("site: cloud", f"site: {name}").replace("max_batch: 16", f"max_batch: {rows}")
            site, workers = stack.enter_context(open_fleet(valkey_url, folder / name, cell, "cpu.batch"))
            opened[name] = site, workers["cpu.batch"]
            queues = queues.replace(name.upper(), site.url)
        front, _ = stack.enter_context(open_fleet(valkey_url, folder / "front", queues, *opened))
        eventually(lambda: offering(front) == set(opened))
        yield front, opened


def offering(front: OpenSite) -> set[str]:
    """The cells that offer to run a job."""
    considered = front.client.what_if("slow", "x")["considered"]
    return {one["hardware_class"] for one in considered if str(one["warning"]).startswith("offer of site")}


def rows_of(number: int) -> list[str]:
    """A job's inputs."""
    return [f"row {row} of job {number}" for row in range(ROWS)]


def at_each(front: OpenSite, jobs: list[taxiway.Job], *states: str) -> Counter[str]:
    """How many of the jobs are in one of these states, by cell."""
    records = [record_of(front.state, job.id) for job in jobs]
    return Counter(record.hardware_class for record in records if record.state in states)


@pytest.mark.slow
def test_cells_share_a_burst_by_what_they_take_and_none_of_it_is_lost_when_one_is_killed(
    valkey_url: str, tmp_path: Path
) -> None:
    with cells(valkey_url, tmp_path) as (front, opened), ThreadPoolExecutor(16) as callers:
        jobs = list(callers.map(lambda n: front.client.submit("slow", rows_of(n), deadline=500), range(JOBS)))
        share = at_each(front, jobs, "queued", "running", "succeeded")["west"] / JOBS
        assert 0.55 < share < 1
        eventually(lambda: at_each(front, jobs, "succeeded")["west"])
        cell, worker = opened["west"]
        cell.router.process.kill()
        worker.process.kill()

        results = [job.result(timeout=120) for job in jobs]

        assert [result.outputs["payload"] for result in results] == [rows_of(number) for number in range(JOBS)]
        ran = Counter(result.report.hardware_class for result in results)
        assert ran["east"] > (1 - share) * JOBS, "what waited for the cell, or ran there, ran in the other"
        assert any(record_of(front.state, job.id).attempts > 1 for job in jobs), "what ran in the cell ran again"
        assert not front.client.fleet()["dead"]
