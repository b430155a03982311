"""A site that drains: what waits and may leave goes to its peers, the rest stays and is listed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from taxiway.contract.keys import DRAINING
from taxiway.errors import UnplaceableError
from tests.command_line import CommandLine
from tests.routing import eventually
from tests.sites import NEAR, PEER, two_sites
from tests.stored import record_of
from tests.working import LASTING, release

QUICK = {"samples": [4], "seed": [3]}
CHEAP = NEAR.replace("usd_per_hour: 30", "usd_per_hour: 0.001").replace("max_batch: 16", "max_batch: 1", 1)
HELD = 3  # messages that the busy worker has, at most: they are not moved


def staying(url: str) -> set[str]:
    """The jobs that a drain lists."""
    answer = CommandLine().succeed("drain", "--url", url, "--json")
    assert answer.stderr == "work goes to cloud; what stays is listed once no more leaves\n"
    return {one["id"] for one in msgspec.json.decode(answer.stdout)}


def test_a_draining_site_hands_on_what_may_leave_and_lists_what_stays(valkey_url: str, tmp_path: Path) -> None:
    with two_sites(valkey_url, tmp_path / "sites", "cpu.batch", queues=CHEAP) as sites:
        client, state = sites.near.client, sites.near.state
        running = client.submit("slab", LASTING, service="bulk", locality="home")
        eventually(lambda: record_of(state, running.id).state == "running")
        private = [client.submit("slab", QUICK, service="bulk", locality="ward") for _ in range(20)]
        public = [client.submit("slab", QUICK, service="bulk") for _ in range(60)]
        assert {record_of(state, job.id).hardware_class for job in (*private, *public)} == {"cpu.batch"}

        stay = eventually(lambda: (found := staying(sites.near.url)) <= {job.id for job in private} and found)

        assert len(stay) >= len(private) - HELD
        assert {job.result(timeout=60).report.hardware_class for job in public[HELD:]} == {PEER}
        eventually(lambda: client.infer("slab", QUICK, timeout=60).report.hardware_class == PEER)
        assert {one["subject"] for one in client.fleet()["problems"]} >= {"site"}
        why = "the site drains, and another one offers to run it"
        eventually(lambda: why in {one["reason"] for one in client.what_if("slab", QUICK)["refused"]})
        release(sites.near.settings)
        for job in (running, *private):
            assert job.result(timeout=60).report.hardware_class == "cpu.batch"

        CommandLine().succeed("drain", "--end", "--url", sites.near.url)
        eventually(lambda: client.infer("slab", QUICK, timeout=60).report.hardware_class == "cpu.batch")
        assert not [one for one in client.fleet()["problems"] if one["subject"] == "site"]


def test_a_site_that_drains_offers_nothing_and_one_without_peers_cannot(valkey_url: str, tmp_path: Path) -> None:
    with two_sites(valkey_url, tmp_path / "sites", "cpu.batch") as sites:
        with pytest.raises(UnplaceableError, match="hands work to no other"):
            sites.far.client.drain()
        sites.far.state.set(DRAINING, "1")
        eventually(lambda: not sites.offered())
