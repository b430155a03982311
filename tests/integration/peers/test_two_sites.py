"""A fleet that hands work to another one: it is answered there, explained here, and goes on when the line is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import taxiway
from taxiway.contract.keys import job_key, priority_lists
from tests.engine import Engine, serving
from tests.narrowing import as_bytes
from tests.routing import HTTP, eventually
from tests.sites import FAR, NEAR, PEER, TwoSites, served_sites, two_sites, with_engine
from tests.stored import record_of
from tests.working import LASTING, release

QUICK = {"samples": [4], "seed": [3]}

BOTH = pytest.mark.parametrize("opens", [two_sites, pytest.param(served_sites, marks=pytest.mark.slow)])
"""Which opens the connection: the near site, or the far one."""


@pytest.fixture(scope="module", params=[two_sites, served_sites])
def sites(
    request: pytest.FixtureRequest, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoSites]:
    with request.param(valkey_url, tmp_path_factory.mktemp("sites"), "cpu.batch", lasting=True) as opened:
        yield opened


def explained(sites: TwoSites, job: str) -> Any:
    """Why a job of the near fleet is where it is."""
    answer = HTTP.get(f"{sites.near.url}/v2/jobs/{job}/placement", timeout=60)
    return answer.raise_for_status().json()


def running_there(sites: TwoSites) -> list[str]:
    """The far fleet's jobs that run."""
    keys: list[Any] = list(sites.far.state.scan_iter(job_key("*")))
    found = [as_bytes(key).decode().removeprefix(job_key("")) for key in keys]
    return [job for job in found if record_of(sites.far.state, job).state == "running"]


def lasting_there(sites: TwoSites) -> tuple[taxiway.Job, str]:
    """A job that lasts, and the far fleet's job of it, which runs."""
    eventually(sites.offered)
    job = sites.near.client.submit("slab", LASTING, deadline=600)
    (there,) = eventually(lambda: running_there(sites))
    return job, there


def test_a_job_runs_at_the_other_site_where_that_is_cheaper_and_explains_the_offer(sites: TwoSites) -> None:
    job = sites.near.client.submit("slab", QUICK)
    result = job.result(timeout=60)
    assert (result.report.hardware_class, result.outputs["estimate"]) == (PEER, [0.75])
    (chosen,) = [one for one in explained(sites, job.id)["considered"] if one["chosen"]]
    assert chosen["hardware_class"] == PEER
    assert chosen["warning"].startswith("offer of site cloud, ")
    assert " s old, " in chosen["warning"]


def test_labelled_work_is_neither_sent_nor_named_there(sites: TwoSites) -> None:
    job = sites.near.client.submit("slab", QUICK, locality="ward", idempotency_key="canary-4711")
    assert job.result(timeout=60).report.hardware_class == "cpu.batch"
    refusals = explained(sites, job.id)["refused"]
    (refused,) = [one for one in refusals if (one["hardware_class"], one["variant"]) == (PEER, "taxiway")]
    assert refused["reason"] == "the data must stay on 'ward', which the class is not"
    assert not sites.far.state.exists(job_key(job.id))
    assert sites.near.client.infer("slab", QUICK, locality="home", timeout=60).report.hardware_class == "cpu.batch"


def test_a_cancelled_job_is_cancelled_there(sites: TwoSites) -> None:
    job, there = lasting_there(sites)
    job.cancel()
    eventually(lambda: record_of(sites.far.state, there).state == "cancelled")


@BOTH
def test_a_short_cut_of_the_line_is_not_noticed_by_what_runs(opens: Any, valkey_url: str, tmp_path: Path) -> None:
    with opens(valkey_url, tmp_path / "sites", queues=NEAR.replace("lease: 3", "lease: 60")) as sites:
        job, there = lasting_there(sites)
        sites.line.pull()
        eventually(lambda: not sites.offered())
        sites.line.plug()
        eventually(sites.offered)
        release(sites.far.settings)
        assert job.result(timeout=60).report.hardware_class == PEER
        assert record_of(sites.near.state, job.id).attempts == 1
        assert record_of(sites.far.state, there).state == "succeeded"


@pytest.mark.parametrize("opens", [two_sites, served_sites])
def test_after_a_lease_without_a_line_it_runs_at_home_and_the_other_attempt_is_cancelled(
    opens: Any, valkey_url: str, tmp_path: Path
) -> None:
    with opens(valkey_url, tmp_path / "sites", "cpu.batch") as sites:
        job, there = lasting_there(sites)
        sites.line.pull()
        eventually(lambda: record_of(sites.near.state, job.id).hardware_class == "cpu.batch")
        eventually(lambda: record_of(sites.near.state, job.id).state == "running")
        release(sites.near.settings)
        assert job.result(timeout=60).report.hardware_class == "cpu.batch"
        assert record_of(sites.far.state, there).state == "running"
        sites.line.plug()
        eventually(lambda: record_of(sites.far.state, there).state == "cancelled")


def test_work_that_only_the_other_site_can_do_waits_for_the_line(valkey_url: str, tmp_path: Path) -> None:
    with two_sites(valkey_url, tmp_path / "sites") as sites:
        sites.line.pull()
        eventually(lambda: not sites.offered())
        job = eventually(lambda: submitted(sites))
        assert any(sites.near.state.llen(name) for name in priority_lists(PEER))
        sites.line.plug()
        assert job.result(timeout=60).report.hardware_class == PEER


def test_bulk_work_that_waits_there_leaves_slots_to_urgent_work(valkey_url: str, tmp_path: Path) -> None:
    with two_sites(valkey_url, tmp_path / "sites", queues=NEAR.replace("slots: 32", "slots: 8")) as sites:
        near = sites.near.client
        jobs = [near.submit("slab", LASTING, service="bulk") for _ in range(9)]
        eventually(lambda: len([*sites.far.state.scan_iter(job_key("*"))]) == 4)
        assert near.infer("echo", {"payload": "now"}, timeout=60).report.hardware_class == PEER
        for job in jobs:
            job.cancel()


def submitted(sites: TwoSites) -> taxiway.Job | None:
    """A bulk job, if the fleet takes one."""
    job = sites.near.client.submit("slab", QUICK, service="bulk")
    reason = sites.near.client.what_if("slab", QUICK, service="bulk")["considered"][0]["warning"]
    return job if reason.startswith("no line to the site") else None


def test_tokens_stream_from_an_engine_of_the_other_site(valkey_url: str, tmp_path: Path) -> None:
    with serving(Engine(script="calm wait=0.5 skies ahead")) as engine:
        far = with_engine(FAR, engine.url)
        near = NEAR.replace("models: {", "models: {chat: chat, ")
        with two_sites(valkey_url, tmp_path / "sites", far=far, queues=near, classes=("engine",)) as sites:
            eventually(lambda: "chat:1/taxiway" in sites.facts().offers)
            asked = {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 9}
            job = sites.near.client.submit("chat", asked, stream=True)
            parts = [part for part in job.stream() if isinstance(part, str)]
            assert "".join(parts).split() == ["calm", "skies", "ahead"]
            assert len(parts) > 1
            report = job.result(timeout=60).report
            assert report.hardware_class == PEER
            assert report.tokens is not None and report.tokens.output == 3
