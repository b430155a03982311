"""What an operator tunes on the first half of a trace: it is found, it is the same again, and it knows no more."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from lab.changes import HardwareChange, changed
from lab.fleet_file import parse_fleet, prepare
from lab.rows import make_trace
from simulator.policies.policy import Assignment
from simulator.tuning.opponents import pinned, tuned_split
from simulator.workload import Workload
from tests import builders
from tests.random_fleets import leads
from tests.unit.simulator import test_tuning

FLEET = builders.recorded("fleets/opponents.yaml")
Tune = Callable[[Workload, int], Assignment]
opponents = pytest.mark.parametrize("tune", [tuned_split, pinned])
workload = partial(test_tuning.workload, FLEET, 80, 1)


def changed_later(work: Workload) -> Workload:
    """The same until half time; then a class becomes slow, and all requests are heavy."""
    trace, middle = work.trace, float(work.trace.arrival[-1]) / 2
    model = np.where(trace.arrival < middle, trace.model, trace.models.index("heavy"))
    slow = HardwareChange(at=middle, hardware_class="cheap", slower=9.0)
    return changed(replace(work, trace=replace(trace, model=model)), slow)


@opponents
def test_what_happens_in_the_second_half_is_unknown(tune: Tune) -> None:
    assert tune(changed_later(workload()), 1).key == tune(workload(), 1).key


@opponents
def test_requests_that_all_arrive_at_once_leave_nothing_to_tune_on(tune: Tune) -> None:
    work = prepare(make_trace([{"arrival": 0.0, "model": "quick", "size": 1}] * 3), parse_fleet(FLEET), seed=1)
    assert tune(work, 1).classes.keys() == {(0, service) for service in range(3)}


def test_a_search_finds_more_than_operators_do_on_a_fleet_that_nobody_tuned_on() -> None:
    assert leads([11]).max() <= 1.02  # tests/lab/test_search.py asks many
