"""What a request costs where use is paid for, nodes have prices of their own or another fleet offers to run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.peers.offers import changed, offers_of
from router.decide.candidates import CandidateTable, build_table
from router.decide.classify import Allowance, Constraints, Needs
from router.decide.cost import estimate_figures, has_capacity
from router.decide.moves.rebalance import Group, GroupBlock
from router.decide.placement import choose, seed_of
from router.decide.snapshot import Backlog, FleetSnapshot
from router.decide.working_snapshot import Template, WorkingSnapshot
from tasks.document import Size
from tasks.heartbeat import Allowed, DeviceFacts, EndpointFacts, PeerFacts
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import PEER, with_peers
from tasks.models.model import Model, Parameter, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.queues.endpoints import HOME, Endpoint, Tariff
from tasks.topology import Link, Price, Topology, parse_topology
from taxiway.contract.job import Tokens
from taxiway.contract.peers import SiteOffer
from taxiway.contract.request import Terms
from taxiway.errors import InvalidRequestError, TaxiwayError
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.router.decide.choosing import place

VARIANT = Variant(
    runtime="openai", memory=Size(0), profiles={"endpoint": Profile(base=0.1, slope=0.0), "cpu": Profile(0.1, 0.0)}
)
MODEL: Model = msgspec.structs.replace(
    a_text_model("talk", engine=VARIANT),
    pipeline="generation",
    size_unit="tokens",
    parameters={"max_tokens": Parameter(type="integer", default=512, minimum=1, maximum=4096)},
)
PRICE = Price(usd_per_million_input=1.0, usd_per_million_output=10.0, usd_per_request=0.001)
NEEDS = Needs(deadline=None, level=1, rows=2, size=1000, output=200, longest=500)
EXPECTED = 2 * (0.001 + 800 * 1e-6 + 200 * 10e-6)
DEAREST = EXPECTED + 2 * 300 * 10e-6


def fleet_of(*names: str) -> FleetSnapshot:
    key = "talk:1/engine"
    return FleetSnapshot(tuple(a_device(name, kind="cpu", runtimes=("openai",), warm=(key,)) for name in names))


def topology_of(**prices: Price) -> Topology:
    return a_topology(**{name: a_class(price=price, runtimes=("openai",)) for name, price in prices.items()})


def table_of(**prices: Price) -> CandidateTable:
    return build_table(MODEL, Constraints(), topology_of(**prices), fleet_of(*prices), ProfileBook())


def test_a_job_is_not_moved_to_a_provider_that_may_exceed_its_budget() -> None:
    table = table_of(hourly=Price(0.001), provider=PRICE)
    home = table.classes.index("hourly")

    def in_time(budget: float) -> bool:
        needs = replace(NEEDS, budget=budget)
        block = GroupBlock([Group(table, needs, home, 0.0, ("j",))], frozenset())
        return bool(block.view(np.zeros((4, 2))).in_time[0, table.classes.index("provider")])

    assert in_time(DEAREST * 1.01)
    assert not in_time(DEAREST * 0.99)


def test_the_ticket_and_the_record_have_the_price_of_use() -> None:
    topology = topology_of(provider=PRICE)
    needs = replace(NEEDS, allowance=Allowance("lab", "2026-01-31", 1.0, 1.0, 3600.0))
    template = Template(place(MODEL, needs, topology, fleet_of("provider")), topology, "lab", "")
    ticket = template.ticket("j", "", 0.0, 0.0)
    assert (ticket.tariffs, ticket.runs) == ({"provider": PRICE.tariff}, 0)
    assert float(template.record(0.0, 0.0)["cost"]) == pytest.approx(DEAREST)


def test_a_class_that_charges_for_tokens_does_not_run_what_is_not_sized_in_tokens() -> None:
    model = msgspec.structs.replace(MODEL, size_unit="rows")
    with pytest.raises(TaxiwayError, match="the class charges for tokens, which the model's size_unit"):
        place(model, NEEDS, topology_of(provider=PRICE), fleet_of("provider"))
    by_request = topology_of(provider=Price(usd_per_request=0.001))
    assert place(model, NEEDS, by_request, fleet_of("provider")).cost == pytest.approx(0.002)


@given(
    prices=st.tuples(*[st.floats(0, 100)] * 2, st.floats(1e-4, 0.1), st.floats(0, 1)),
    read=st.integers(1, 5000),
    written=st.integers(0, 2000),
    expected=st.tuples(st.integers(1, 5000), st.integers(0, 2000)),
    rows=st.integers(1, 4),
    beyond=st.floats(1.0, 3.5),
)
def test_no_bill_of_all_runs_exceeds_the_budget_whatever_was_expected(
    prices: tuple[float, ...], read: int, written: int, expected: tuple[int, int], rows: int, beyond: float
) -> None:
    """`read` and `written` are what the provider counts for each row at most."""
    of_input, of_output, of_request, cached = prices
    price = Price(
        usd_per_million_input=of_input,
        usd_per_million_cached_input=of_input * cached,
        usd_per_million_output=of_output,
        usd_per_request=of_request,
    )
    size, output = sum(expected), expected[1]
    needs = Needs(None, 1, rows, size, output=output, longest=written, most_read=read)
    topology, fleet = topology_of(provider=price), fleet_of("provider")
    budget = beyond * place(MODEL, needs, topology, fleet).dearest
    placement = place(MODEL, replace(needs, budget=budget), topology, fleet)
    tariff = price.tariff
    assert tariff is not None
    bill = tariff.bill(Tokens(read * rows, 0, written * rows), rows)
    assert bill <= placement.dearest * (1 + 1e-9)
    assert placement.runs >= 1
    assert bill * placement.runs <= budget * (1 + 1e-9)


tokens = st.builds(Tokens, *[st.integers(0, 10**6)] * 3)
tariffs = st.builds(Tariff, *[st.floats(0, 1e-3)] * 4)


FAST = a_text_model(fast=Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(base=3.6, slope=0.0)}))
SPOT = a_class(price=Price(1.0, 0.4), capacity="spot", runtimes=("onnx",), max_batch=1)
FIRM = a_class(0.5, runtimes=("onnx",), max_batch=1)
TOPOLOGY: Topology = a_topology(firm=FIRM, spot=SPOT)
PATIENT = Needs(deadline=None, level=1, rows=1, size=1, constraints=Constraints(preemptible=True))


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


def nodes(*devices: DeviceFacts) -> CandidateTable:
    return build_table(FAST, PATIENT.constraints, TOPOLOGY, FleetSnapshot(devices), ProfileBook())


def test_a_budget_bears_the_class_s_dearest_node() -> None:
    fleet = FleetSnapshot((a_node("spot", 0.4), a_node("spot", 1.0)))
    enough = replace(PATIENT, budget=1.01 * 3.6 / 3600)
    assert place(FAST, enough, TOPOLOGY, fleet).cost == pytest.approx(0.7 * 3.6 / 3600)
    with pytest.raises(InvalidRequestError, match="budget: expected at least"):
        place(FAST, replace(PATIENT, budget=0.99 * 3.6 / 3600), TOPOLOGY, fleet)


KEY = "sentiment:1/fast"
QUICK = a_text_model(fast=Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(base=0.1, slope=0.0)}))
RATED = a_topology(
    other=a_class(20.0, runtimes=("onnx",), horizon=100.0), rated=a_class(1.0, runtimes=("onnx",), horizon=100.0)
)
LATER = Needs(deadline=30.0, level=1, rows=1, size=50)


def device(name: str, worker: str = "", **allowed: Any) -> DeviceFacts:
    stated = EndpointFacts(state="closed", allowed=Allowed(**allowed)) if allowed else None
    made = a_device(name, runtimes=("onnx",), warm=(KEY,), endpoint=stated, residual={KEY: (1.0,)})
    return msgspec.structs.replace(made, worker=worker or made.worker)


def rated_table(*devices: DeviceFacts) -> CandidateTable:
    return build_table(QUICK, Constraints(), RATED, FleetSnapshot(devices), ProfileBook())


def waits(*devices: DeviceFacts, ahead: float = 0.0, needs: Needs = LATER) -> float:
    return float(estimate_figures(rated_table(*devices), needs, np.array([0.0, ahead])).wait[-1])


def test_what_would_wait_for_longer_than_the_horizon_is_held() -> None:
    fleet = FleetSnapshot((device("rated", requests=0.001, requests_left=0.0),))
    needs = replace(LATER, deadline=None)
    assert place(QUICK, needs, RATED, fleet).held
    table = rated_table(*fleet.devices)
    assert not has_capacity(table, 1, np.zeros((2, 4)))
    assert has_capacity(rated_table(device("rated", requests=0.001, requests_left=2.0)), 1, np.zeros((2, 4)))


@given(
    rate=st.floats(0.01, 100),
    left=st.floats(-5, 50),
    ahead=st.lists(st.floats(0, 20), min_size=2, max_size=2),
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4),
)
def test_a_move_keeps_the_limits_of_a_placement(rate: float, left: float, ahead: list[float], sizes: list[int]) -> None:
    table = rated_table(
        device("other"), device("rated", requests=rate, requests_left=left, tokens=50 * rate, tokens_left=left)
    )
    needs = [replace(LATER, size=size) for size in sizes]
    block = GroupBlock([Group(table, one, 0, 0.0, ("j",)) for one in needs], frozenset())
    before = np.tile(np.array(ahead), (4, 1))
    view = block.view(before)
    for row, one in enumerate(needs):
        alone = estimate_figures(table, one, np.array(ahead))
        assert view.wait[row, 1] == pytest.approx(alone.wait[1])
        assert view.finish[row, 1] == pytest.approx(alone.finish[1])


BOOK = ProfileBook()
OFFER = SiteOffer(0.2, 0.01, 0.05, 1.5, 0.001, 0.0001, 0.0, 70.0)


def a_peer(*labels: str, link: Link | None = None) -> Topology:
    endpoint = Endpoint(protocol="taxiway", url="https://far", slots=8, models={"sentiment": "mood"})
    far = a_class(device="endpoint", endpoint=endpoint, runtimes=(PEER,), max_batch=8, price=Price(), labels=labels)
    far = msgspec.structs.replace(far, link=link or Link())
    return a_topology(**{"cpu.batch": a_class(labels=(HOME,)), "far": far})


def handed(topology: Topology) -> Model:
    model = a_text_model(fp32=Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(base=0.01)}))
    return with_peers(Catalogue({model.id: model}), topology).models[model.id]


def there(offers: dict[str, SiteOffer], **line: float) -> EndpointFacts:
    made = {f"sentiment:1/{PEER}": offers}
    peer = PeerFacts(site="cloud", age=0.4, offers=made, **{"round_trip": 0.1, **line})  # type: ignore[arg-type]  # by name
    return EndpointFacts(state="closed", peer=peer)


def fleet(offers: dict[str, SiteOffer], *others: object, **line: float) -> FleetSnapshot:
    facts = there(offers, **line)
    far = a_device("far", kind="endpoint", runtimes=(PEER,), warm=(f"sentiment:1/{PEER}",), endpoint=facts)
    return FleetSnapshot(devices=(far, *others))  # type: ignore[arg-type]  # of devices


def needs(size: int = 10, **fields: object) -> Needs:
    return Needs(deadline=60.0, level=1, rows=1, size=size, **fields)  # type: ignore[arg-type]  # of its own kinds


def two_cells(rates: Mapping[str, float], price: float = 1.0) -> tuple[Topology, Model, FleetSnapshot]:
    """Cells that answer a lone row in 5 ms; the last one's `price` is that of the first one's."""
    endpoint = Endpoint(protocol="taxiway", url="https://far", slots=64, models={"sentiment": "mood"})
    cell = a_class(device="endpoint", endpoint=endpoint, runtimes=(PEER,), max_batch=64, price=Price(), horizon=100.0)
    topology = a_topology(**dict.fromkeys(rates, cell))
    usd = dict(zip(rates, (0.001, 0.001 * price), strict=True))
    made = {name: SiteOffer(0.005, 0, 0, 1.5, usd[name], 0, 0, rate) for name, rate in rates.items()}
    offers = {name: there({"": offer}, round_trip=0.0) for name, offer in made.items()}
    warm = (f"sentiment:1/{PEER}",)
    devices = [
        a_device(name, worker=name, kind="endpoint", runtimes=(PEER,), warm=warm, endpoint=facts)
        for name, facts in offers.items()
    ]
    return topology, handed(topology), FleetSnapshot(devices=tuple(devices))


def shared(seen: tuple[Topology, Model, FleetSnapshot], rows: int) -> Counter[str]:
    """How many jobs of a burst each cell gets, of 200."""
    topology, model, fleet = seen
    working, took = WorkingSnapshot(topology, BOOK, fleet), Counter[str]()
    asked = replace(needs(), rows=rows, deadline=1000.0)
    for number in range(200):
        placed = working.place(model, asked, "acme", seed_of(str(number))).placement
        working.count(placed, "acme")
        took[placed.candidate.hardware_class] += 1
    return took


@given(
    east=st.floats(500, 1000), share=st.floats(0.3, 0.7), rows=st.integers(1, 20), price=st.sampled_from((1, 0.75, 1.4))
)
def test_a_burst_is_shared_by_what_each_site_takes(east: float, share: float, rows: int, price: float) -> None:
    """Prices that differ by less than the offers err are alike. A site serves at least a row in the time of one."""
    took = shared(two_cells({"east": east, "west": east * share / (1 - share)}, price), rows)
    assert took["west"] / 200 == pytest.approx(share, abs=0.1)


def test_the_offer_of_the_requests_own_service_counts_first() -> None:
    topology = a_peer()
    offers = {"": OFFER, "live": SiteOffer(0.05, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}
    for service, seconds in {"live": 0.15, "bulk": 0.4}.items():
        table = build_table(handed(topology), Constraints(service), topology, fleet(offers), BOOK)
        figures = estimate_figures(table, needs(), Backlog(table.classes, {}).seconds.sum(axis=1))
        place = [one.hardware_class for one in table.candidates].index("far")
        assert float(figures.finish[place]) == pytest.approx(seconds)


def test_a_site_gets_no_requests_of_a_service_for_which_it_offers_nothing() -> None:
    topology, busy = a_peer(), fleet({"live": OFFER})
    tables = {name: build_table(handed(topology), Constraints(name), topology, busy, BOOK) for name in ("live", "bulk")}
    taking = {name: {one.hardware_class for one in table.candidates if one.devices} for name, table in tables.items()}
    assert taking == {"live": {"far"}, "bulk": set()}
    refused = next(one for one in tables["bulk"].refusals if (one.hardware_class, one.variant) == ("far", PEER))
    assert (refused.ever, refused.reason) == (False, "site cloud offers none for bulk now")


def test_a_site_that_cannot_be_reached_takes_only_what_nothing_else_can() -> None:
    topology = a_peer()
    model = handed(topology)
    here = a_device(runtimes=("echo",))
    both = build_table(model, Constraints(), topology, FleetSnapshot(devices=(here,)), BOOK)
    assert [c.hardware_class for c, live in zip(both.candidates, both.live, strict=True) if live] == ["cpu.batch"]
    alone = build_table(model, Constraints(), topology, FleetSnapshot(), BOOK)
    assert [c.hardware_class for c, live in zip(alone.candidates, alone.live, strict=True) if live] == ["far"]


def test_work_that_must_stay_home_has_no_other_fleet_among_its_candidates() -> None:
    topology = a_peer("ward")
    for locality in (HOME, f"{HOME}+ward"):
        table = build_table(handed(topology), Constraints(locality=locality), topology, fleet({"": OFFER}), BOOK)
        assert "far" not in {one.hardware_class for one in table.candidates}


def test_every_class_but_another_fleet_is_home() -> None:
    text = """
hardware:
  cpu.batch: {device: cpu, runtimes: [onnx], max_batch: 8, max_wait: 0.01, price: {usd_per_hour: 0.1}, labels: [ward]}
  cloud: {device: endpoint, endpoint: {protocol: taxiway, url: "https://far", slots: 4, models: {sentiment: mood}}}
service: {standard: {deadline: 5}}
default_service: standard
locality: {default: home}
"""
    labels = {name: one.labels for name, one in parse_topology(text).hardware.items()}
    assert labels == {"cpu.batch": ("ward", HOME), "cloud": ()}


def far_fleet(work: float) -> tuple[Topology, Model, WorkingSnapshot]:
    topology = a_topology(**{"cpu.batch": a_class(horizon=10.0)})
    model = a_text_model(fp32=Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(base=0.1, slope=0.01)}))
    device = a_device(runtimes=("echo",), warm=("sentiment:1/fp32",))
    snapshot = FleetSnapshot(devices=(device,), work={"cpu.batch": (0.0, work, 0.0, 0.0)})
    return topology, model, WorkingSnapshot(topology, BOOK, snapshot)


@given(work=st.floats(0, 9), read=st.integers(1, 64))
def test_an_offer_is_the_line_through_what_placement_would_promise(work: float, read: int) -> None:
    topology, model, working = far_fleet(work)
    offer = offers_of(model, Terms(), (), topology, working)[""]
    table = working.table(model, Constraints(topology.default_service))
    placed = choose(table, needs(read), working.ahead(), seed=0)
    assert offer.seconds(read, 0) == pytest.approx(placed.finish, rel=0.02)
    assert offer.price(read, 0) == pytest.approx(placed.cost, rel=0.02)
    assert offer.bound * offer.seconds(read, 0) == pytest.approx(placed.at_most, rel=0.03)


def test_nothing_is_offered_that_would_be_held_refused_or_is_unknown() -> None:
    topology, model, working = far_fleet(50.0)
    assert offers_of(model, Terms(), ("unknown",), topology, working) == {}
    nobody = WorkingSnapshot(topology, BOOK, FleetSnapshot())
    assert offers_of(model, Terms(), (), topology, nobody) == {}
    labelled = Terms(locality="ward")
    assert offers_of(model, labelled, (), topology, far_fleet(0.0)[2]) == {}


def test_small_changes_are_not_told() -> None:
    before = {"mood": {"": OFFER}}
    assert not changed(before, {"mood": {"": SiteOffer(0.21, 0.01, 0.05, 1.5, 0.001, 0.0001, 0.0, 70.0)}})
    assert changed(before, {"mood": {"": SiteOffer(0.4, 0.01, 0.05, 1.5, 0.001, 0.0001, 0.0, 70.0)}})
    assert changed(before, {"mood": {"": OFFER, "live": OFFER}})
    assert changed(before, {})


def test_while_the_site_drains_other_fleets_alone_get_what_they_offer_to_run() -> None:
    topology = a_peer()
    here = a_device(runtimes=("echo",))
    drained = replace(fleet({"": OFFER}, here), draining=True, startable=("cpu.batch",))
    for chosen, names in {None: ["far"], ("cpu.batch", "fp32"): ["cpu.batch", "far"]}.items():
        table = build_table(handed(topology), Constraints(), topology, drained, BOOK, chosen)
        assert [one.hardware_class for one in table.candidates] == names
        assert table.live.tolist() == [name == "far" for name in names], "what waits here is to leave"
    kept = build_table(handed(topology), Constraints(locality=HOME), topology, drained, BOOK)
    assert [one.hardware_class for one in kept.candidates] == ["cpu.batch"], "what may not leave runs here"
    without = replace(drained, devices=(here,))
    table = build_table(handed(topology), Constraints(), topology, without, BOOK)
    assert table.live[[one.hardware_class for one in table.candidates].index("cpu.batch")], "nobody offers to run it"
