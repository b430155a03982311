"""A device costs what the node costs that it is on, which may not be what queues.yaml says of its class."""

from dataclasses import replace

import msgspec
import pytest

from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Constraints, Needs
from router.decide.cost import shadow_prices
from router.decide.snapshot import FleetSnapshot
from router.decide.working_snapshot import Template
from tasks.document import Size
from tasks.heartbeat import DeviceFacts
from tasks.models.model import Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.topology import Price, Topology
from taxiway.errors import InvalidRequestError
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.router.decide.choosing import place

MODEL = a_text_model(fast=Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(base=3.6, slope=0.0)}))
SPOT = a_class(price=Price(1.0, 0.4), capacity="spot", runtimes=("onnx",), max_batch=1)
FIRM = a_class(0.5, runtimes=("onnx",), max_batch=1)
TOPOLOGY: Topology = a_topology(firm=FIRM, spot=SPOT)
NEEDS = Needs(deadline=None, level=1, rows=1, size=1, constraints=Constraints(preemptible=True))


def a_node(hardware_class: str, usd_per_hour: float | None, **facts: object) -> DeviceFacts:
    worker = f"{hardware_class}@{usd_per_hour}"
    return a_device(
        hardware_class,
        worker=worker,
        runtimes=("onnx",),
        warm=("sentiment:1/fast",),
        usd_per_hour=usd_per_hour,
        **facts,
    )


def table_of(*devices: DeviceFacts) -> CandidateTable:
    return build_table(MODEL, NEEDS.constraints, TOPOLOGY, FleetSnapshot(devices), ProfileBook())


def test_a_budget_bears_the_class_s_dearest_node() -> None:
    fleet = FleetSnapshot((a_node("spot", 0.4), a_node("spot", 1.0)))
    enough = replace(NEEDS, budget=1.01 * 3.6 / 3600)
    assert place(MODEL, enough, TOPOLOGY, fleet).cost == pytest.approx(0.7 * 3.6 / 3600)
    with pytest.raises(InvalidRequestError, match="budget: expected at least"):
        place(MODEL, replace(NEEDS, budget=0.99 * 3.6 / 3600), TOPOLOGY, fleet)


def test_a_heartbeat_that_tells_no_price_is_at_the_class_s() -> None:
    stated = msgspec.json.encode(a_node("spot", None))
    assert b"usd_per_hour" not in stated
    assert msgspec.json.decode(stated, type=DeviceFacts).usd_per_hour is None
    assert table_of(a_node("spot", None), a_node("spot", 1.0)).dollars.tolist()[-1] == pytest.approx(0.7 / 3600)
    lent = table_of(a_node("firm", 9.0, serves=("firm", "spot")))
    assert lent.dollars.tolist() == pytest.approx([9.0 / 3600, 0.4 / 3600]), "where it is lent it costs as the class"


def test_a_shadow_price_is_in_proportion_to_the_price_paid() -> None:
    def shadow(price: float | None) -> float:
        return shadow_prices(TOPOLOGY, FleetSnapshot((a_node("spot", price, utilisation=1.0),)))["spot"]

    assert 0 < shadow(1.0) == pytest.approx(2.5 * shadow(None))


def test_the_ticket_of_spot_capacity_has_the_spot_price() -> None:
    placement = place(MODEL, NEEDS, TOPOLOGY, FleetSnapshot((a_node("firm", None), a_node("spot", None))))
    template = Template(placement, TOPOLOGY, "lab", "")
    assert template.ticket("j", "", 0.0, 0.0).prices == {"firm": 0.5, "spot": 0.4}
