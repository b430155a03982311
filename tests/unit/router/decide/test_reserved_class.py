"""What a class that is kept for a service takes from others, and what its own service finds there."""

from __future__ import annotations

import pytest

from router.decide.classify import Constraints
from router.decide.placement import RESERVED_SHARE
from taxiway.errors import OverloadedError
from tests.unit.router.decide.choosing import place
from tests.unit.router.decide.test_placement import device, fleet, hardware, model, needs_by, topology, variant

LIVE, OTHER = Constraints(service="live"), Constraints(service="standard")
CLASSES = topology(cheap=hardware(0.36), kept=hardware(3.6, reserve_for="live", horizon=4.0))
BOTH = (device("cheap"), device("kept"))


def test_a_kept_class_takes_what_no_other_has_in_time_while_little_is_there() -> None:
    placement = place(model(), needs_by(1.0, constraints=OTHER), CLASSES, fleet(*BOTH, cheap=[0, 9]))
    assert placement.candidate.hardware_class == "kept"


def test_a_busy_kept_class_takes_nothing_from_others_even_where_they_will_be_refused() -> None:
    busy = fleet(*BOTH, cheap=[0, 9], kept=[0, 0, 0, RESERVED_SHARE * 4.0 + 0.1])
    with pytest.raises(OverloadedError):
        place(model(), needs_by(1.0, constraints=OTHER), CLASSES, busy)
    assert place(model(), needs_by(1.0, constraints=LIVE), CLASSES, busy).candidate.hardware_class == "kept"


def test_a_model_that_only_a_kept_class_runs_goes_there_however_busy_it_is() -> None:
    alone = fleet(device("kept"), kept=[0.9, 0.5])
    placement = place(model(), needs_by(30.0, constraints=OTHER), CLASSES, alone)
    assert placement.candidate.hardware_class == "kept"


@pytest.mark.parametrize(("constraints", "expected"), [(LIVE, "kept"), (OTHER, "quick")])
def test_what_no_class_has_in_time_goes_to_the_one_that_is_kept_for_its_service(
    constraints: Constraints, expected: str
) -> None:
    variants = model(fast=variant(0.1), slow=variant(0.2, runtime="torch"))
    classes = topology(quick=hardware(), kept=hardware(runtimes=("torch",), reserve_for="live"))
    live = (device("quick"), device("kept", runtimes=("torch",), warm=("sentiment:1/slow",)))
    placement = place(variants, needs_by(0.05, constraints=constraints), classes, fleet(*live))
    assert placement.candidate.hardware_class == expected
