from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs
from router.decide.cost import estimate_figures, has_capacity
from router.decide.moves.rebalance import Group, GroupBlock
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import Allowed, DeviceFacts, EndpointFacts
from tasks.models.model import Profile, Variant
from tasks.models.profiles import ProfileBook
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.router.decide.choosing import place

KEY = "sentiment:1/fast"
MODEL = a_text_model(fast=Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(base=0.1, slope=0.0)}))
TOPOLOGY = a_topology(
    other=a_class(20.0, runtimes=("onnx",), horizon=100.0), rated=a_class(1.0, runtimes=("onnx",), horizon=100.0)
)
NEEDS = Needs(deadline=30.0, level=1, rows=1, size=50)


def device(name: str, worker: str = "", **allowed: Any) -> DeviceFacts:
    stated = EndpointFacts(state="closed", allowed=Allowed(**allowed)) if allowed else None
    made = a_device(name, runtimes=("onnx",), warm=(KEY,), endpoint=stated, residual={KEY: (1.0,)})
    return msgspec.structs.replace(made, worker=worker or made.worker)


def table_of(*devices: DeviceFacts) -> CandidateTable:
    return build_table(MODEL, Constraints(), TOPOLOGY, FleetSnapshot(devices), ProfileBook())


def waits(*devices: DeviceFacts, ahead: float = 0.0, needs: Needs = NEEDS) -> float:
    return float(estimate_figures(table_of(*devices), needs, np.array([0.0, ahead])).wait[-1])


def test_a_request_waits_for_a_rate_limit_and_not_while_something_is_left() -> None:
    assert waits(device("rated", requests=0.5, requests_left=1.0)) == 0.0
    assert waits(device("rated", requests=0.5, requests_left=0.0)) == pytest.approx(2.0)
    assert waits(device("rated", tokens=10.0, tokens_left=20.0)) == pytest.approx(3.0)
    work = estimate_figures(table_of(device("rated")), NEEDS, np.zeros(2)).work[-1]
    ahead = waits(device("rated", requests=0.5, requests_left=2.0), ahead=4 * float(work))
    assert ahead == pytest.approx((5 - 2) / 0.5)


def test_what_would_wait_for_longer_than_the_horizon_is_held() -> None:
    fleet = FleetSnapshot((device("rated", requests=0.001, requests_left=0.0),))
    needs = replace(NEEDS, deadline=None)
    assert place(MODEL, needs, TOPOLOGY, fleet).held
    table = table_of(*fleet.devices)
    assert not has_capacity(table, 1, np.zeros((2, 4)))
    assert has_capacity(table_of(device("rated", requests=0.001, requests_left=2.0)), 1, np.zeros((2, 4)))


@given(
    rate=st.floats(0.01, 100),
    left=st.floats(-5, 50),
    ahead=st.lists(st.floats(0, 20), min_size=2, max_size=2),
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4),
)
def test_a_move_keeps_the_limits_of_a_placement(rate: float, left: float, ahead: list[float], sizes: list[int]) -> None:
    table = table_of(
        device("other"), device("rated", requests=rate, requests_left=left, tokens=50 * rate, tokens_left=left)
    )
    needs = [replace(NEEDS, size=size) for size in sizes]
    block = GroupBlock([Group(table, one, 0, 0.0, ("j",)) for one in needs], frozenset())
    before = np.tile(np.array(ahead), (4, 1))
    view = block.view(before)
    for row, one in enumerate(needs):
        alone = estimate_figures(table, one, np.array(ahead))
        assert view.wait[row, 1] == pytest.approx(alone.wait[1])
        assert view.finish[row, 1] == pytest.approx(alone.finish[1])
