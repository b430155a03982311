"""Another fleet among the candidates: its offer is what placement reckons with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.peers.offers import changed, offers_of
from router.decide.candidates import build_table
from router.decide.classify import Constraints, Needs
from router.decide.cost import estimate_figures
from router.decide.placement import choose, seed_of
from router.decide.snapshot import Backlog, FleetSnapshot
from router.decide.working_snapshot import WorkingSnapshot
from tasks.document import Size
from tasks.heartbeat import EndpointFacts, PeerFacts
from tasks.models.catalogue import Catalogue
from tasks.models.discovered import PEER, with_peers
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.queues.endpoints import HOME, Endpoint
from tasks.topology import Link, Price, Topology, parse_topology
from taxiway.contract.peers import SiteOffer
from taxiway.contract.request import Terms
from tests.builders import a_class, a_device, a_text_model, a_topology

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
    for place, names in {None: ["far"], ("cpu.batch", "fp32"): ["cpu.batch", "far"]}.items():
        table = build_table(handed(topology), Constraints(), topology, drained, BOOK, place)
        assert [one.hardware_class for one in table.candidates] == names
        assert table.live.tolist() == [name == "far" for name in names], "what waits here is to leave"
    kept = build_table(handed(topology), Constraints(locality=HOME), topology, drained, BOOK)
    assert [one.hardware_class for one in kept.candidates] == ["cpu.batch"], "what may not leave runs here"
    without = replace(drained, devices=(here,))
    table = build_table(handed(topology), Constraints(), topology, without, BOOK)
    assert table.live[[one.hardware_class for one in table.candidates].index("cpu.batch")], "nobody offers to run it"
