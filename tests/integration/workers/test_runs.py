"""Runs of callables in real workers: what they report is seen, and no more is done again than since a checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker.valkey import run
from broker.valkey.jobs import YieldAnswer, YieldAsk, yield_call
from tasks.settings import Settings
from taxiway import Run
from taxiway.contract.job import Result, RunProgress
from taxiway.contract.keys import job_key
from tests.callables import walk
from tests.narrowing import as_bytes
from tests.routing import eventually
from tests.stored import record_of
from tests.working import QUEUES, Tower, add_callable, worker_process, worker_settings
from workers.decide.checkpoints import Checkpoint

STEPS = 400


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Settings:
    fleet = worker_settings(settings, tmp_path, QUEUES.replace("warm: [echo, slab]", "warm: [echo, walk]"))
    add_callable(fleet.models, "walk")
    (tmp_path / "held").touch()
    return fleet


def order(tower: Tower, *, every: int = 25, seed: int = 7, **terms: Any) -> str:
    return tower.order("walk", {"steps": STEPS, "seed": seed, "every": every}, variant="python", **terms)


def undisturbed(seed: int = 7) -> float:
    return walk.call(STEPS, seed, 0, Run())["end"]


def progress(tower: Tower, job: str) -> RunProgress | None:
    return record_of(tower.state, job).progress


def reached(tower: Tower, job: str, fraction: float) -> None:
    eventually(lambda: (seen := progress(tower, job)) is not None and seen.fraction > fraction)


def checkpoints(tower: Tower, job: str) -> list[Checkpoint]:
    kept = tower.state.hmget(job_key(job), "checkpoint", "checkpoint_before")
    return [msgspec.json.decode(one, type=Checkpoint) for one in kept if one]


def go(fleet: Settings) -> None:
    (fleet.models.parent / "held").unlink()


def finished_elsewhere(fleet: Settings, tower: Tower, job: str) -> Result:
    """The result of a job that another worker takes up."""
    go(fleet)
    with worker_process(fleet, "--device", "cpu:1"):
        result = tower.result(job)
    assert result.report.device == "cpu:1"
    return result


def test_a_killed_worker_s_run_goes_on_from_its_last_checkpoint_and_ends_as_if_nothing_had_been(
    fleet: Settings, tower: Tower
) -> None:
    job = order(tower)
    with worker_process(fleet) as first:
        reached(tower, job, 0.5)
        kept = checkpoints(tower, job)
        first.process.kill()
    result = finished_elsewhere(fleet, tower, job)
    assert result.outputs == {"end": undisturbed(), "resumed": STEPS // 2}
    assert [one.fraction for one in kept] == [STEPS // 2 / STEPS, (STEPS // 2 - 25) / STEPS]
    assert result.report.checkpoints.startswith("resumed from a checkpoint at 50%")
    assert 0 < result.report.redone < 30
    assert not tower.state.exists(*(one.key for one in kept))


@pytest.mark.parametrize("every", [0, -1])
def test_a_drain_ends_a_run_at_a_checkpoint_where_it_yields_and_at_its_last_one_where_it_does_not(
    fleet: Settings, tower: Tower, every: int
) -> None:
    job = order(tower, every=every)
    with worker_process(fleet) as first:
        reached(tower, job, 0.5)
        first.process.send_signal(signal.SIGTERM)
        if every < 0:
            eventually(lambda: b'"draining":true' in (tower.state.hget("taxiway:devices", first.name) or b""))
            first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
    claims, attempts = (int(tower.state.hget(job_key(job), name) or 0) for name in ("claims", "attempts"))
    assert attempts == 0
    assert claims <= 2, "only the wait that was under way may have taken it again, and returned it"
    result = finished_elsewhere(fleet, tower, job)
    assert result.outputs == {"end": undisturbed(), "resumed": STEPS // 2 + 1 if every == 0 else 0}
    assert (result.report.redone > 0) == (every < 0)


@pytest.mark.parametrize("every", [0, -1])
def test_a_run_that_is_asked_to_yield_returns_to_its_queue_in_time_whatever_it_does(
    fleet: Settings, tower: Tower, every: int
) -> None:
    job = order(tower, every=every)
    with worker_process(fleet):
        reached(tower, job, 0.5)
        eventually(lambda: tower.state.hget(job_key(job), "state") == b"running")
        token = as_bytes(tower.state.hget(job_key(job), "holder") or b"").decode().split(" ")[0]
        assert run(tower.state, yield_call(1.0, [YieldAsk(job, token, "live chats wait")])) == [YieldAnswer.ASKED]
        eventually(lambda: tower.state.hget(job_key(job), "yields") == b"1")
        go(fleet)
        result = tower.result(job)
    assert result.outputs == {"end": undisturbed(), "resumed": STEPS // 2 + 1 if every == 0 else 0}
    assert tower.state.hget(job_key(job), "attempts") == b"1"
    assert (result.report.redone > 0) == (every < 0)


def test_a_checkpoint_over_the_limit_is_refused_by_name_and_the_one_before_counts(
    fleet: Settings, tower: Tower
) -> None:
    fleet.queues.write_text(fleet.queues.read_text().replace("lease: 1", "lease: 1, checkpoint: 100"))
    job = order(tower)
    with worker_process(fleet):
        go(fleet)
        report = tower.result(job).report
    assert "over limits.checkpoint (100)" in report.checkpoints
    assert report.redone == 0


@pytest.mark.cases("harm, why")
def test_a_checkpoint_that_cannot_be_used_is_refused_by_name_and_the_run_starts_from_the_one_before(
    fleet: Settings, tower: Tower, harm: str, why: str
) -> None:
    job = order(tower)
    with worker_process(fleet) as first:
        reached(tower, job, 0.5)
        first.process.kill()
    latest, before = checkpoints(tower, job)
    changed = {"version": {"digest": "0"}, "kind": {"kind": "cuda"}, "foreign": {"job": "another"}}.get(harm)
    if changed is not None:
        facts = msgspec.json.encode(msgspec.structs.replace(latest, **changed))
        tower.state.hset(job_key(job), "checkpoint", facts)
    content = tower.state.get(latest.key) or b""
    if harm == "truncate":
        tower.state.set(latest.key, content[:3])
    if harm == "replace":
        tower.state.set(latest.key, bytes(len(content)))
    if harm == "expire":
        tower.state.delete(latest.key)
    result = finished_elsewhere(fleet, tower, job)
    assert result.outputs == {"end": undisturbed(), "resumed": STEPS // 2 - 25}
    refused, resumed = result.report.checkpoints.split("; ")
    assert "refused" in refused and why in refused
    assert resumed.startswith("resumed from a checkpoint")
    assert before.fraction < latest.fraction


def test_a_worker_that_lost_its_claim_writes_no_checkpoint_and_no_report(fleet: Settings, tower: Tower) -> None:
    job = order(tower)
    with worker_process(fleet) as first:
        reached(tower, job, 0.5)
        first.process.send_signal(signal.SIGSTOP)
        kept, over = checkpoints(tower, job), time.time() + 5
        stolen: dict[Any, Any] = {
            "holder": f"another#9 {time.time()}",
            "held_until": over,
            "progress": '{"fraction":0.75}',
        }
        tower.state.hset(job_key(job), mapping=stolen)
        go(fleet)
        first.process.send_signal(signal.SIGCONT)
        eventually(lambda: time.time() > over - 2)
        assert checkpoints(tower, job) == kept
        seen = progress(tower, job)
        assert seen is not None and seen.fraction == 0.75
        assert tower.result(job).outputs["end"] == undisturbed()
