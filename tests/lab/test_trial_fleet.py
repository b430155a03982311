from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.trial_fleet.__main__ import Answers, Run, Scene, Side, described, foreseen, result, verdict
from lab.trial_fleet.emulated_models import CHEAP, COLD, DEAR, LIGHT, MODELS, QUEUES, Weights, requests, write_models
from lab.trial_fleet.generations import CLASS, SLOTS, STORIES, STORY, Pace, write_model
from lab.trial_fleet.queue_scaling import QueueScaling
from local.autoscaler import ask_router
from router.decide.classify import Constraints, classify
from router.decide.plan import Density, Depth
from router.decide.snapshot import FleetSnapshot
from simulator.engine import RunSummary
from simulator.policies.policy import Assignment
from tasks.models.folder import load_catalogue
from tasks.topology import load_topology, parse_topology
from tests.builders import a_report

TOPOLOGY = load_topology(QUEUES)
FORESEEN = RunSummary(policy="pinned", requests=1, attainment={}, cost_usd=0.9, score=1.9)


def a_run(side: str, score: float, seed: int = 7, foreseen: float = 0.0) -> Run:
    figures: Any = {"seconds": 600, "warm": 0, "requests": 10, "refused": 1, "failed": 0, "cost_usd": 0.5}
    figures |= {"simulated_usd": 0.52, "simulated": foreseen or score}
    attained = {"live": 0.9, "standard": 1.0, "bulk": 1.0}
    live, first = {"chat": 0.8, "image": 1.0}, {"chat": "gpu.realtime 100 %"}
    of: Any = {"attainment": attained, "live_by_model": live, "powered": {CHEAP: 600.0}, "first_classes": first}
    return Run(side=side, seed=seed, score=score, planned=0.7, **figures, **of)


@pytest.mark.parametrize("weights", [LIGHT, COLD])
def test_each_class_runs_its_own_variant_of_every_model(weights: Weights, tmp_path: Path) -> None:
    write_models(tmp_path, weights)
    catalogue = load_catalogue(tmp_path)
    assert not catalogue.disabled
    for name in MODELS:
        candidates, _ = classify(catalogue.resolve(name), Constraints(), TOPOLOGY, FleetSnapshot(now=0.0))
        pairs = {(one.hardware_class, one.variant_name) for one in candidates}
        assert (CHEAP, "cpu") in pairs and (DEAR, "gpu") in pairs and (CHEAP, "gpu") not in pairs


def test_images_double_and_the_language_model_halves_at_half_time() -> None:
    trace = requests(200, 7)
    for name, share in {"image": 2 / 3, "chat": 1 / 3, "embed": 1 / 2}.items():
        mine = trace.arrival[trace.model == trace.models.index(name)]
        assert float((mine >= 100).mean()) == pytest.approx(share, abs=0.01)


def test_what_is_late_or_unanswered_is_missed_and_requests_before_the_trial_do_not_count() -> None:
    trace = requests(20, 7, warm=10)
    answers = Answers(len(trace))
    answers.seconds[:] = np.where(trace.arrival < 10, 1e9, 0.1)
    live = np.flatnonzero((trace.service == 0) & (trace.arrival >= 10))
    answers.seconds[live[: len(live) // 2]] = np.nan
    report = a_report(hardware_class=DEAR, variant="gpu", reason="planned: cheapest")
    answers.reports = [report] * len(trace)
    answers.refused[:] = True
    scene, one = Scene(trace, 20, 10, 7), Side("pinned", {}, ask_router, Assignment({}, ()))
    found = result(one, scene, answers, {DEAR: 1800.0}, TOPOLOGY, FORESEEN)
    assert (found.simulated_usd, found.simulated) == (0.9, 1.9)
    missed = len(live) // 2 / len(live)
    assert found.attainment == {"live": pytest.approx(1 - missed), "standard": 1.0, "bulk": 1.0}
    assert found.cost_usd == pytest.approx(1.0)
    assert found.score == pytest.approx(1.0 + 48 * missed * 20 / 3600)
    assert found.planned == 1.0 and found.first_classes["chat"] == f"{DEAR} 100.0 %"
    assert found.refused == found.requests == int((trace.arrival >= 10).sum())


def test_queue_scaling_grows_with_the_queue_and_keeps_devices_for_a_while() -> None:
    scaling = QueueScaling(Depth(jobs=4, keep=300, poll=15), {CHEAP: 3})
    counts = []
    for jobs, now in ((0, 0.0), (5, 15.0), (99, 30.0), (0, 45.0), (0, 329.0), (0, 331.0)):
        scaling.look(CHEAP, jobs, now)
        counts.append(scaling.target(CHEAP))
    assert counts == [0, 2, 3, 3, 3, 0]


def test_a_better_score_counts_only_beyond_the_spread_of_several_runs() -> None:
    scores = {"taxiway": 1, "pinned": 3, "tuned-split": 4}
    far = [a_run(side, score, seed) for side, score in scores.items() for seed in (7, 8)]
    assert verdict(far).startswith("holds")
    near = [*far, a_run("pinned", 6, 9), a_run("taxiway", 1, 9), a_run("tuned-split", 4, 9)]
    assert verdict(near).startswith("FAILS")
    assert "one run a side" in verdict([a_run("taxiway", 1), a_run("pinned", 3)])
    assert verdict([a_run("taxiway", 1)]) == "nothing to compare"


def test_a_side_is_simulated_on_the_same_requests() -> None:
    trace = requests(20, 7)
    dear = Assignment({(model, service): 1 for model in range(4) for service in range(3)}, (Density(), Density()))
    one = Side("pinned", {}, ask_router, dear)
    light, cold = (foreseen(one, Scene(trace, 20, 0, 7, weights), TOPOLOGY) for weights in (LIGHT, COLD))
    assert light.requests == len(trace) and light.usd_by_class[DEAR] == light.cost_usd > 0
    assert (cold.attainment["live"] or 0) < (light.attainment["live"] or 0)


def test_a_generation_is_played_at_the_pace_that_was_measured_and_on_its_engines_alone(tmp_path: Path) -> None:
    pace = Pace(read=0.1, step=0.01, row=0.005)
    write_model(tmp_path, pace)
    profile = load_catalogue(tmp_path).resolve(STORY).variants["engine"].profiles["endpoint"]
    whole = STORIES.size + STORIES.output
    for rows in (1, SLOTS):
        expected = rows * pace.read + STORIES.output * (pace.step + rows * pace.row)
        assert profile.latency(rows, whole, STORIES.size) == pytest.approx(expected)
    topology = parse_topology(described(llama=True))
    trace = requests(20, 7, models={**MODELS, STORY: STORIES})
    scene = Scene(trace, 20, 0, 7, pace=pace)
    fleet = scene.fleet(topology)
    assert [timing is not None for timing in fleet.timings[STORY]] == [False, False, True]
    assert all(row[2] is None for name, row in fleet.timings.items() if name != STORY)
    one = np.ones(1)
    alone = fleet.timings[STORY][2].answer(STORIES.size * one, STORIES.output * one, 1)  # type: ignore[union-attr]
    assert alone[0] == pytest.approx(profile.latency(1, whole, STORIES.size), rel=0.02)
    homes = {(model, service): 2 * (model == 4) for model in range(5) for service in range(3)}
    played = foreseen(Side("pinned", {}, ask_router, Assignment(homes, (Density(),) * 3)), scene, topology)
    assert played.live_by_model[STORY] > 0.5 and played.usd_by_class[CLASS] > 0
