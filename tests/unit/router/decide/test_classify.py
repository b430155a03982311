from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given

from router.decide.candidates import build_table
from router.decide.classify import Constraints, classify, level_of, needs_of
from router.decide.placement import choose
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.models.model import Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.queues.endpoints import Endpoint, ServedVariant
from tasks.topology import Service, Topology
from taxiway.contract.keys import LEVELS
from taxiway.contract.request import Priority, Terms
from taxiway.errors import InvalidRequestError
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.strategies import Situation, situations

SERVICES = {
    "live": Service(deadline=0.25, priority="high"),
    "standard": Service(deadline=5.0),
    "bulk": Service(deadline=3600.0, priority="low", preemptible=True),
}
TOPOLOGY = Topology(hardware={}, service=SERVICES, default_service="standard")


@pytest.mark.cases("deadline, priority, level")
def test_a_level_follows_from_deadline_and_priority(deadline: float | None, priority: Priority, level: int) -> None:
    assert level_of(deadline, priority) == level


def test_an_unknown_service_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"service: expected one of \['bulk', 'live', 'standard'\], got 'x'"):
        needs_of(Terms(service="x"), TOPOLOGY, rows=1, size=1)


@given(situation=situations())
def test_every_class_and_variant_is_a_candidate_or_refused_whatever_the_fleet(situation: Situation) -> None:
    model, needs, topology, fleet = situation
    candidates, refusals = classify(model, needs.constraints, topology, fleet)
    pairs = [(c.hardware_class, c.variant_name) for c in candidates] + [(r.hardware_class, r.variant) for r in refusals]
    assert sorted(pairs) == sorted((h, v) for h in topology.hardware for v in model.variants)
    assert all(r.reason and r.reason != "None" for r in refusals)
    assert [r for r in refusals if r.ever] == classify(model, needs.constraints, topology, FleetSnapshot())[1]


NEEDS = 6 * 2**30


@pytest.mark.parametrize(
    ("facts", "able"),
    [
        ({"memory_free": NEEDS}, True),
        ({"memory_free": NEEDS - 1}, False),
        ({"memory_free": NEEDS - 1, "memory_used": 1}, True),  # of other variants, which would be unloaded
        ({"memory_free": 0, "warm": ("m:1/v",)}, True),
        ({"memory_free": 0, "warm": ("m:1/other",)}, False),
    ],
)
def test_a_device_whose_memory_others_use_gets_no_work_that_does_not_fit(facts: dict[str, Any], able: bool) -> None:
    memory = {"memory_total": 8 * 2**30, **facts}
    device = a_device("gpu", worker="a", kind="cuda", runtimes=("torch",), **memory)
    variant = Variant(runtime="torch", memory=Size(NEEDS), profiles={"cuda": Profile(base=1, slope=1)})
    topology = a_topology(gpu=a_class(device="cuda", runtimes=("torch",)))
    candidates, refusals = classify(a_text_model("m", v=variant), Constraints(), topology, FleetSnapshot((device,)))
    assert [one.devices for one in candidates] == ([(device,)] if able else [])
    assert [one.ever for one in refusals] == ([] if able else [False])
    assert all("others leave a" in one.reason for one in refusals)


CHAT = msgspec.structs.replace(
    a_text_model(
        "talk",
        process=Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(base=1, slope=1)}),
        engine=Variant(runtime="openai", honours=("tools",), profiles={"endpoint": Profile(base=1, slope=1)}),
    ),
    pipeline="chat",
)
ENGINE = Endpoint(protocol="openai", url="http://e/v1", slots=2, models={"talk": "t"})
TALKING = a_topology(
    cpu=a_class(), engine=a_class(device="endpoint", runtimes=("openai",), endpoint=ENGINE, max_batch=2)
)


@pytest.mark.parametrize(
    ("asks", "able"), [((), ["cpu", "engine"]), (("tools",), ["engine"]), (("images", "tools"), []), (("images",), [])]
)
def test_a_chat_goes_only_to_variants_that_honour_what_it_asks_for(asks: tuple[str, ...], able: list[str]) -> None:
    candidates, refusals = classify(CHAT, Constraints(asks=asks), TALKING, FleetSnapshot())
    assert [one.hardware_class for one in candidates] == able
    assert sorted({name for one in refusals for name in one.asked}) == sorted(
        set(asks) if "engine" not in able else asks
    )
    if not able:
        table = build_table(CHAT, Constraints(asks=asks), TALKING, FleetSnapshot(), ProfileBook())
        with pytest.raises(InvalidRequestError, match=r"inputs.text: expected what some variant honours, got images"):
            choose(table, needs_of(Terms(), TALKING, rows=1, size=1), np.zeros((2, LEVELS)), seed=1)


def test_two_engines_may_have_two_variants_of_one_model() -> None:
    on_engine = Variant(runtime="openai", profiles={"endpoint": Profile(base=1, slope=1)})
    model = msgspec.structs.replace(a_text_model("talk", fp16=on_engine, q4=on_engine), pipeline="chat")
    served: dict[str, str | ServedVariant] = {
        "any": "talk-any",
        "small": ServedVariant(server="talk-q4", variant="q4"),
        "large": ServedVariant(server="talk-fp16", variant="fp16"),
    }
    classes = {
        name: a_class(
            device="endpoint",
            runtimes=("openai",),
            endpoint=Endpoint(protocol="openai", url="http://e/v1", slots=2, models={"talk": one}),
        )
        for name, one in served.items()
    }
    candidates, refusals = classify(model, Constraints(), a_topology(**classes), FleetSnapshot())
    pairs = [("any", "fp16"), ("any", "q4"), ("large", "fp16"), ("small", "q4")]
    assert sorted((one.hardware_class, one.variant_name) for one in candidates) == pairs
    assert {one.reason for one in refusals} == {
        "the class's endpoint serves talk:1 as q4",
        "the class's endpoint serves talk:1 as fp16",
    }


def test_the_place_of_waiting_work_is_a_candidate_also_while_its_device_refuses_it() -> None:
    facts = a_device("engine", worker="e", kind="endpoint", runtimes=("openai",), unavailable={"talk:1/engine": "gone"})
    fleet = FleetSnapshot((facts, a_device("cpu", runtimes=("echo",))))
    assert [one.hardware_class for one in classify(CHAT, Constraints(), TALKING, fleet)[0]] == ["cpu"]
    table = build_table(CHAT, Constraints(), TALKING, fleet, ProfileBook(), ("engine", "engine"))
    assert [(one.hardware_class, len(one.devices)) for one in table.candidates] == [("cpu", 1), ("engine", 0)]
    assert list(table.live) == [True, False]
    never = build_table(CHAT, Constraints(), TALKING, fleet, ProfileBook(), ("cpu", "engine"))
    assert [one.hardware_class for one in never.candidates] == ["cpu"]
