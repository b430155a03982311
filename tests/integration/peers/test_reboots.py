"""An edge that is switched off while it is cut off: what it accepted is on its disk, and goes out when the line is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

import taxiway
from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway.contract.keys import job_key
from tests.narrowing import as_bytes
from tests.routing import eventually, router_process
from tests.sites import FAR, NEAR, PEER, OpenSite, line_to, open_fleet
from tests.stored import record_of
from tests.working import LASTING, empty_fleet, release, worker_process, worker_settings

JOBS = 20
"""Accepted before the edge is switched off, and as many after."""


@contextmanager
def switched_on(server: EmbeddedValkey, settings: Settings) -> Iterator[taxiway.Client]:
    """The edge's processes; at the end the power goes: the store, the router and the worker are killed."""
    with router_process(settings) as router, worker_process(settings, "--class", PEER) as worker:
        with taxiway.Client(router.http) as client:
            yield client
        assert server.pid is not None
        for pid in (server.pid, router.process.pid, worker.process.pid):
            os.kill(pid, signal.SIGKILL)
    server.stop()


def asked(number: int) -> dict[str, list[int]]:
    """A job's inputs; its answer is a quarter of the number."""
    return {"samples": [4], "seed": [number]}


def offering(client: taxiway.Client) -> bool:
    """Whether the cloud offers to run a job."""
    considered = client.what_if("slab", asked(0))["considered"]
    return any(str(one["warning"]).startswith("offer of site") for one in considered)


def accepted(client: taxiway.Client, numbers: range) -> dict[int, str]:
    """The ids of jobs that the edge took for the cloud."""
    return {number: client.submit("slab", asked(number), service="bulk").id for number in numbers}


def ran_at(site: OpenSite) -> list[str]:
    """How the jobs of a site ended."""
    names = [as_bytes(key).decode().removeprefix(job_key("")) for key in site.state.scan_iter(job_key("*"))]
    return [record_of(site.state, name).state for name in names]


@pytest.mark.slow
def test_what_an_edge_accepted_is_answered_once_though_it_is_switched_off_before_the_line_is_back(
    valkey_url: str, tmp_path: Path
) -> None:
    with (
        open_fleet(valkey_url, tmp_path / "far", FAR, "cpu.batch") as (far, _),
        line_to(far.url) as line,
        EmbeddedValkey(tmp_path / "disk") as server,
    ):
        (tmp_path / "near").mkdir()
        queues = NEAR.replace("URL", f"http://127.0.0.1:{line.port}")
        settings = worker_settings(empty_fleet(server.url), tmp_path / "near", queues)
        with switched_on(server, settings) as client:
            eventually(lambda: offering(client))
            running = client.submit("slab", LASTING, service="bulk").id
            eventually(lambda: ran_at(far) == ["running"])
            line.pull()
            eventually(lambda: not offering(client))
            jobs = accepted(client, range(JOBS))
        server.start()
        with switched_on(server, settings) as client, redis.Redis.from_url(settings.broker) as state:
            jobs |= accepted(client, range(JOBS, 2 * JOBS))
            assert not offering(client)
            line.plug()
            release(far.settings)

            results = {number: client.job(id).result(timeout=120) for number, id in jobs.items()}

            answers = {number: result.outputs["estimate"] for number, result in results.items()}
            assert answers == {number: [number / 4] for number in jobs}
            assert {result.report.hardware_class for result in results.values()} == {PEER}
            assert client.job(running).result(timeout=120).report.hardware_class == PEER
            assert record_of(state, running).attempts == 2, "the edge forgot that it ran there, and it ran again"
            assert ran_at(far) == ["succeeded"] * (2 * JOBS + 2)
            assert {number: client.job(id).result(timeout=120) for number, id in jobs.items()} == results
            assert not client.fleet()["dead"]
