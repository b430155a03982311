from __future__ import annotations

import msgspec

from router.service.counters import OutcomeCounters
from tasks.heartbeat import BOUNDS, DeviceFacts, Done, Ran, Use, count, empty
from tests.builders import a_device


def a_worker(name: str, succeeded: int, *latencies: float) -> DeviceFacts:
    figures = empty()
    for seconds in latencies:
        count(figures, seconds)
    return a_device("cpu", worker=name, done={"cpu": Done({"succeeded": succeeded}, {"run": tuple(figures)})})


def test_what_workers_did_before_the_first_look_is_not_counted() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([a_worker("a", 10)])
    outcomes.update([a_worker("a", 13)])
    assert outcomes.outcomes["cpu", "succeeded"] == 3


def test_all_that_a_worker_did_which_came_later_is_counted() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([a_worker("a", 10)])
    outcomes.update([a_worker("a", 10), a_worker("b", 4)])
    assert outcomes.outcomes["cpu", "succeeded"] == 4


def test_sums_never_fall_when_workers_leave_or_restart() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([a_worker("a", 0), a_worker("b", 0)])
    outcomes.update([a_worker("a", 5), a_worker("b", 5)])
    outcomes.update([a_worker("a", 2)])
    assert outcomes.outcomes["cpu", "succeeded"] == 12


def test_rejected_messages_are_counted_also_by_a_worker_that_ends_no_job() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([])
    for rejected in (3, 5, 1):  # the last is another process under that name
        outcomes.update([msgspec.structs.replace(a_worker("a", 0), done={"cpu": Done(rejected=rejected)})])
    assert outcomes.rejected["cpu",] == 6


def test_what_was_done_for_a_model_adds_up_over_workers_and_classes() -> None:
    def done(**classes: int) -> dict[str, Done]:
        ran = {name: Ran(answered=n, run=n / 4) for name, n in classes.items()}
        return {name: Done({"succeeded": n}, models={"echo:1": ran[name]}) for name, n in classes.items()}

    outcomes = OutcomeCounters()
    outcomes.update([msgspec.structs.replace(a_worker("a", 0), done=done(cpu=4))])
    both = [msgspec.structs.replace(a_worker(name, 0), done=done(cpu=8, gpu=2)) for name in "ab"]
    outcomes.update(both)
    outcomes.update(both)
    assert outcomes.models == {"echo:1": Ran(answered=16, run=4.0)}


def test_latencies_add_up_over_workers_by_bucket() -> None:
    outcomes = OutcomeCounters()
    outcomes.update([])
    outcomes.update([a_worker("a", 1, 0.001, 7200.0), a_worker("b", 1, 0.0005)])
    figures = outcomes.latency["cpu", "run"]
    assert (figures[0], figures[len(BOUNDS)], figures[-1]) == (2, 1, 7200.0015)
    assert sum(figures[:-1]) == 3


def test_use_and_dollars_add_up_over_workers() -> None:
    def done(rows: int, dollars: float) -> dict[str, Done]:
        return {"cpu": Done({"succeeded": rows}, used={"m:1": Use(rows=rows)}, dollars={"m:1": {"lab": dollars}})}

    outcomes = OutcomeCounters()
    outcomes.update([msgspec.structs.replace(a_worker("a", 0), done=done(2, 0.5))])
    outcomes.update([msgspec.structs.replace(a_worker(name, 0), done=done(3, 0.75)) for name in "ab"])
    assert outcomes.used == {("cpu", "m:1"): Use(rows=4)}
    assert outcomes.dollars == {("cpu", "m:1", "lab"): 1.0}
