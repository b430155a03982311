"""The twin and the search: plays tell what an assignment costs, and the search finds better ones."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.changes import ChangingSimulation as Simulation
from lab.changes import simulate
from lab.fleet_file import parse_fleet, prepare
from lab.rows import joined, make_trace, synthetic_trace
from lab.trials.warm import WarmPolicy
from router.decide.plan import STALE, Cell, ClassPlan, Density, Depth, Handover, Plan
from simulator.policies.policy import Assignment, Fixed
from simulator.policies.taxiway import Taxiway, TunedPolicy
from simulator.tuning.search import Search, fresh
from simulator.tuning.tuner import FEWEST_ARRIVALS, FIRST, PERIODS, REST, TUNE_EVERY, Decision, Tuner, TuningWatch
from simulator.tuning.twin import RETURNS, ClassReplay, ClassState, DeviceState, Twin, Window, usual
from simulator.workload import Workload, jobs
from tasks.history import LAG
from tests.builders import recorded
from workers.decide.endpoints import Bucket, EndpointRates

FLEET = recorded("fleets/tuning.yaml")


@cache
def workload(fleet: str = FLEET, duration: int = 120, output: int = 0) -> Workload:
    each = [
        synthetic_trace(f"poisson:rate={rate},duration={duration},size=1,output={output},seed={seed}", model=model)
        for seed, (model, rate) in enumerate((("quick", 4), ("heavy", 1)))
    ]
    return prepare(joined(each), parse_fleet(fleet), seed=1)


def twin(begin: float = 0.0, end: float = 120.0, pace: float = 1.0) -> Twin:
    work = workload()
    slow = {name: (row[0], row[1] and row[1].slower(pace)) for name, row in work.fleet.timings.items()}
    window = Window.of(replace(work, fleet=replace(work.fleet, timings=slow)), begin, end)
    return Twin(window, usual(work.fleet, fresh(work.fleet)))


def everything_on(place: int) -> Assignment:
    return Assignment({(m, s): place for m in range(2) for s in range(3)}, (Density(), Density()))


def test_a_plan_for_a_class_that_has_no_device_any_more_is_played_and_replaced() -> None:
    work = workload()
    tuner = Tuner(seed=1)
    tuner.assignment = everything_on(0)
    gone = (ClassState((), 0), ClassState((DeviceState(),), 4))
    window = Window.of(work, 0.0, 120.0)
    assert not Twin(window, gone).play(everything_on(0)).timely.any()
    used = tuner.tune(window, gone, 120.0, plays=10).assignment.classes
    assert {used[job.model, job.service] for job in window.jobs} == {1}


def test_a_play_reports_what_the_simulator_reports() -> None:
    work, assignment = workload(), everything_on(1)
    played = twin().play(assignment)
    simulated = simulate("fixed", work, Fixed(assignment), seed=0)
    live = work.trace.service == 0
    assert played.timely[live].mean() == pytest.approx(simulated.attainment["live"], abs=0.02)
    assert played.score == pytest.approx(simulated.score * 30, rel=0.15)


@given(places=st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=2, max_size=4))
@settings(max_examples=10, deadline=None)
def test_a_play_is_the_same_whatever_was_played_before(places: list[list[int]]) -> None:
    cells = [(model, service) for model in range(2) for service in range(3)]
    rules = (Density(), Depth(jobs=4.0))
    assignments = [Assignment(dict(zip(cells, each, strict=True)), rules) for each in places]
    together, best = twin(), None
    for assignment in assignments:
        together.play(assignment, best, 1.0)
        best = best or together.play(assignment)
    for assignment in assignments:
        again, alone = together.play(assignment), twin().play(assignment)
        assert (again.score, again.partial, again.powered) == (alone.score, alone.partial, alone.powered)
        assert (again.timely == alone.timely).all()


def test_a_play_begins_with_what_the_devices_have_loaded() -> None:
    work = workload()
    work = replace(work, fleet=parse_fleet(FLEET.replace("load: 0.1", "load: 20")))
    window, (cheap, dear) = Window.of(work, 0.0, 120.0), usual(work.fleet, fresh(work.fleet))
    warm = replace(dear, devices=(DeviceState(loaded=frozenset({0, 1})),))
    late = [(~Twin(window, (cheap, state)).play(everything_on(1)).timely).sum() for state in (dear, warm)]
    assert late[0] > 40
    assert late[1] == 0


def test_a_play_begins_with_what_an_endpoint_allows_now() -> None:
    text = FLEET.replace("dear: {count: 4,", "dear: {count: 4, endpoint: true, rate: {requests_per_minute: 150},")
    work = replace(workload(), fleet=parse_fleet(text))
    window, (cheap, api) = Window.of(work, 0.0, 10.0), usual(work.fleet, (1, 1))
    used = replace(api, rates=EndpointRates(Bucket(600.0, 10.0, -50.0, 0.0)))
    full, empty = (Twin(window, (cheap, state)).play(everything_on(1)).timely.mean() for state in (api, used))
    assert empty < 0.8 < full


def test_an_estimate_counts_what_the_use_of_an_endpoint_costs() -> None:
    hosted = "dear: {count: 1, endpoint: true, initial: 1, price: {usd_per_request: 0.01}, memory: 8GiB, start: 0,"
    text = FLEET.replace("dear: {count: 4, initial: 1, price: {usd_per_hour: 2}, memory: 8GiB, start: 5,", hosted)
    work = replace(workload(), fleet=parse_fleet(text))
    window = Window.of(work, 0.0, 120.0)
    costs = Search(Twin(window, usual(work.fleet, (1, 1))), seed=1).costs
    requests = sum(job.model == job.service == 0 for job in window.jobs)
    assert costs.dollars[0, 0][1] == pytest.approx(0.01 * requests * 3600 / window.span)


def test_a_class_lets_its_planned_devices_go_once_its_load_has_ended() -> None:
    terms = {"size": 1, "output": 0, "deadline": 20.0, "service": 1}
    early = [{"arrival": at / 2, "model": "quick", **terms} for at in range(20)]
    work = prepare(make_trace(early), parse_fleet(FLEET), seed=1)
    replay = ClassReplay(work, 1, ClassState((), 4), 3, Density(), 120.0, list(jobs(work)))
    replay.play(400.0)
    seconds = replay.pool.spent(400.0) / replay.pool.usd_per_second
    assert 3 * 120 < seconds < 3 * (120 + 15)


def test_a_play_has_late_what_must_wait_for_what_waits_already() -> None:
    work, window = workload(), Window.latest(workload(), 120.0, 60.0)
    now = usual(work.fleet, fresh(work.fleet))
    heavy = np.flatnonzero(work.trace.model == work.trace.models.index("heavy"))
    full = window.behind(work, np.sort(np.resize(heavy, 300)), 0.0)
    calm, busy = (Twin(one, now).play(everything_on(0)).timely[-len(window.jobs) :] for one in (window, full))
    assert busy.mean() < 0.9 * calm.mean()


def bursty(pause: float, deadline: float = 2.0) -> Twin:
    """Bursts of 20 requests, with pauses in between."""
    terms = {"model": "quick", "size": 1, "output": 0, "deadline": deadline, "service": 0}
    rows = [{"arrival": burst * (pause + 10) + n / 2, **terms} for burst in range(3) for n in range(20)]
    work = prepare(make_trace(rows), parse_fleet(FLEET), seed=1)
    return Twin(Window.all(work, 3 * (pause + 10)), usual(work.fleet, fresh(work.fleet)))


def test_a_pause_costs_at_most_what_its_end_would_with_the_chance_that_the_load_returns() -> None:
    now, everything = bursty(pause=60.0), Assignment({(0, 0): 1}, (Density(), Density()))
    cold = 7 / 60 * 48 * 210 / 3600  # in the 5 s of a start come ten requests, of which seven cannot wait for its end
    usd = 2 * 2 / 3600
    assert now.pauses(everything, (0, 2))[1] == pytest.approx(5 + RETURNS * cold / usd, rel=0.01)
    assert now.pauses(everything, (0, 1))[1] > now.pauses(everything, (0, 2))[1]
    patient = bursty(pause=60.0, deadline=50.0)
    assert patient.pauses(everything, (0, 2)) == [STALE, 5.0], "nothing is late, so only the start is saved"


@given(most=st.integers(50, 900), span=st.floats(30, 120))
def test_a_busy_window_is_sampled_in_pieces_of_its_whole_span(most: int, span: float) -> None:
    work = workload()
    whole, found = Window.of(work, 120.0 - span, 120.0), Window.latest(work, 120.0, span, most)
    arrivals = [job.arrival for job in found.jobs]
    assert arrivals == sorted(arrivals)
    assert all(0 <= arrival <= found.span + 1e-6 for arrival in arrivals)
    if len(whole.jobs) <= most:
        assert arrivals == [job.arrival for job in whole.jobs]
        return
    assert found.span == pytest.approx(span * most / len(whole.jobs))
    assert len(found.jobs) == pytest.approx(most, rel=0.5, abs=30), "pieces have about the rate of the whole"


@cache
def first_tuning() -> tuple[Tuner, Twin, Decision]:
    tuner, now = Tuner(seed=1), twin()
    return tuner, now, tuner.tune(now.window, now.conditions, 100.0, plays=30)


def tuned_once() -> tuple[Tuner, Twin, Decision]:
    """A tuner of its own after its first tuning, at 100 s."""
    tuner, now, decision = first_tuning()
    return deepcopy(tuner), now, decision


@pytest.mark.parametrize("planned", [True, False])
def test_late_live_work_starts_a_class_only_where_no_plan_says_what_is_started(*, planned: bool) -> None:
    work = workload()
    work = replace(work, fleet=parse_fleet(FLEET.replace("dear: {count: 4, initial: 1", "dear: {count: 4")))
    policy = Taxiway(work)
    if planned:
        moving = Handover(former="cheap", devices=4, latest=1000.0)
        cells = tuple(
            Cell(model=f"{model}:1", service=service, classes=("cheap", "dear"), handover=moving)
            for model in work.trace.models
            for service in ("live", "standard")
        )
        used = {"cheap": ClassPlan(rule=Density(), devices=4)}
        policy._reader.follow(Plan(number=1, made=0.0, cells=cells, classes=used))
    engine = Simulation(work, policy, seed=1)
    engine.run()
    assert bool(engine.pools[1].started) is not planned


def test_devices_that_start_yet_are_released_before_those_that_serve() -> None:
    engine = Simulation(workload(), Fixed(everything_on(0)), seed=1)
    pool = engine.pools[0]
    pool.switch_on(0.0, after=5.0)
    pool.switch_on(0.0, after=0.0)
    engine.process_until(1.0)
    assert (pool.powered, pool.serving) == (2, 1)
    pool.release(1, 1.0)
    pool.tick(2.0)
    assert (pool.powered, pool.serving) == (1, 1)


def test_a_class_that_the_plan_does_not_use_scales_by_the_rule_of_routers() -> None:
    policy = TunedPolicy(workload(), seed=1)
    engine = Simulation(workload(), policy, seed=1)
    unused = engine.pools[1]
    unused.switch_on(0.0, after=0.0)
    plan = Assignment(everything_on(0).classes, (Density(), Depth(jobs=4.0, keep=300.0)))
    found = replace(first_tuning()[2], assignment=plan, adopted=True, devices=(1, 0), begin=(1, 1), pauses=(300.0, 0.0))
    policy._adopt(found, engine.pools, 0.0)
    powered = []
    for seconds in (4.0, 6.0):
        unused.tick(seconds)
        powered.append(unused.powered)
    assert powered == [1, 0], "a device stays for as long as it takes to start, which is 5 s"


def test_cells_that_move_find_the_devices_that_a_burst_needs() -> None:
    steady = synthetic_trace("poisson:rate=4,duration=40,size=1,output=0,seed=1", model="quick")
    burst = synthetic_trace("poisson:rate=180,duration=8,size=1,output=0,seed=2", model="heavy")
    both = joined([steady, replace(burst, arrival=burst.arrival + 32)])
    window = Window.all(prepare(both, parse_fleet(FLEET), seed=1), 40.0)
    tuner = Tuner(seed=1)
    tuner.assignment = everything_on(0)
    decision = tuner.tune(window, usual(window.workload.fleet, (4, 0)), 300.0, plays=10)
    assert decision.adopted
    places = {decision.assignment.classes[cell] for cell in decision.moves}
    assert places
    assert all(decision.devices[place] >= decision.begin[place] for place in places)
    assert any(decision.begin[place] > 1 for place in places)


def test_work_moves_where_the_class_that_it_leaves_needs_a_device_less() -> None:
    own = FLEET.replace("cheap: {count: 4,", "cheap: {count: 1, minimum: 1,").replace("max_batch: 16", "max_batch: 1")
    rows = [
        {"arrival": n * apart, "model": "heavy", "size": 1, "output": 0, "service": service, "deadline": due}
        for service, (apart, due) in enumerate(((0.45, 2.0), (0.7, 20.0)))
        for n in range(int(120 / apart))
    ]
    work = prepare(make_trace(rows), parse_fleet(own.replace("base: 0.05, slope: 0.02", "base: 0.3, slope: 0")), seed=1)
    now = Twin(Window.all(work, 120.0), usual(work.fleet, (1, 2)))
    start = replace(everything_on(1), rules=(Depth(jobs=4.0, keep=300.0),) * 2)
    found = {lean: Search(now, seed=1, lean=lean).descend(start, 40.0) for lean in (False, True)}
    assert {lean: now.devices(one) for lean, one in found.items()} == {False: [1, 2], True: [1, 1]}


@pytest.mark.parametrize("factor", [0.95, 1.0, 1.05])
def test_a_plan_is_kept_unless_another_is_clearly_better(factor: float) -> None:
    tuner, now, first = tuned_once()
    window = now.window
    trace = replace(window.workload.trace, arrival=window.workload.trace.arrival * factor)
    shifted = Window.all(replace(window.workload, trace=trace), window.span * factor)
    again = tuner.tune(shifted, now.conditions, 300.0, plays=10)
    assert (again.adopted, again.moves, again.assignment.key) == (False, {}, first.assignment.key)


def test_a_tuning_is_due_by_period_and_by_alarm() -> None:
    watch, pace = TuningWatch(tuned=100.0, span=450.0, pace=(1.0, 1.0)), (1.0, 1.0)
    late = [False] * 20 + [True] * 40
    assert not watch.due(100.0 + REST, pace, late)
    assert watch.due(100.0 + REST, (1.0, 2.0), [])
    assert not watch.due(100.0 + REST - 1, (1.0, 2.0), [])
    assert watch.due(100.0 + 3 * REST, pace, late)
    assert not watch.due(100.0 + 3 * REST - 1, pace, [], recalls=True)
    assert watch.due(100.0 + 3 * REST, pace, [], recalls=True)
    assert not watch.due(100.0 + TUNE_EVERY - 1, pace, [])
    assert watch.due(100.0 + TUNE_EVERY, pace, [])
    few = TuningWatch(tuned=100.0, span=45.0, pace=(1.0,))
    assert [few.due(now, (1.0,), []) for now in (144.0, 145.0)] == [False, True], "twice as much is known"


def test_before_anything_has_arrived_there_is_a_guess_without_devices_where_models_displace_one_another() -> None:
    work = workload()
    large = {
        name: tuple(timing and replace(timing, memory=5 << 30) for timing in row)
        for name, row in work.fleet.timings.items()
    }
    displacing = replace(work, fleet=replace(work.fleet, timings=large))
    for fleet, guesses in ((work, False), (displacing, True)):
        policy = TunedPolicy(fleet, seed=1)
        run = Simulation(fleet, policy, seed=1)
        assert not [*policy.look(run.pools, 0.0)]
        plan = policy._reader.plan
        assert plan is None if not guesses else plan is not None and plan.guessed and not plan.classes
        run.run()
        assert policy.decisions[0][0] >= FIRST + LAG


def test_no_plan_is_made_of_the_first_seconds_whenever_the_tuner_looks() -> None:
    work = workload()
    policy = TunedPolicy(work, seed=1)
    policy._next_look = LAG + FIRST / 2
    assert (work.trace.arrival < FIRST / 2).sum() > FEWEST_ARRIVALS
    Simulation(work, policy, seed=1).run()
    assert FIRST + LAG <= policy.decisions[0][0] < FIRST + LAG + 1


def test_a_history_gives_a_plan_at_once_and_the_policy_drops_it_if_it_is_worse_than_predicted() -> None:
    work = Window.of(workload(), 0.0, 5.0).workload
    policy = WarmPolicy(work, workload(), seed=1)
    run = Simulation(work, policy, seed=1)
    run.run()
    at, decision = policy.decisions[0]
    assert at < 1
    assert decision.adopted
    for _ in range(PERIODS):
        assert policy._tuner.assignment is not None
        for _ in range(100):
            policy._trust.note((0, 0), timely=False)
        policy._fails(run.pools, policy._trust.since + TUNE_EVERY + 1)
    assert policy._tuner.assignment is None
