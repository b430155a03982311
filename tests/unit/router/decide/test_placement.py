"""What a request asks for, which classes may run it, and which one does."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.decide.candidates import build_table
from router.decide.classify import LATENCY_CRITICAL, Allowance, Constraints, Needs, classify, level_of, needs_of
from router.decide.placement import NEAR, RESERVED_SHARE, WARM_PREFERENCE, Placement, choose, reserved_and_busy
from router.decide.plan import Plan
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import ANY, DeviceFacts
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import UNSURE, ProfileBook
from tasks.queues.endpoints import Endpoint, ServedVariant
from tasks.topology import HardwareClass, Scaling, Service, Topology
from taxiway.contract.keys import LEVELS
from taxiway.contract.request import Priority, Terms
from taxiway.errors import InvalidRequestError, NoDeviceError, OverloadedError, TaxiwayError, UnplaceableError
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.router.decide.choosing import Option, choice_of, options_of, place, work_in
from tests.unit.strategies import Situation, plans, situations


def spent(left: float) -> Allowance:
    return Allowance("lab", "2026-01-31", 1.0, left, 3600.0)


def placed(situation: Situation) -> Placement:
    """The placement; situations without one are of no interest."""
    try:
        return place(*situation)
    except (UnplaceableError, NoDeviceError, OverloadedError, InvalidRequestError):
        assume(False)
        raise


def summary_of(placement: Placement) -> Any:
    """All that a placement says."""
    decided = choice_of(placement), placement.held, placement.reason
    return *decided, options_of(placement), placement.table.refusals, placement.variants()


def outcome(situation: Situation) -> Any:
    try:
        return summary_of(place(*situation))
    except TaxiwayError as error:
        return type(error), error.message, error.details


def chosen_class(situation: Situation) -> str | None:
    try:
        placement = place(*situation)
    except TaxiwayError:
        return None
    return None if placement.held else choice_of(placement).candidate.hardware_class


@given(situation=situations() | situations(locality="edge"), plan=st.none() | plans())
def test_a_placement_and_its_moves_keep_each_hard_constraint(situation: Situation, plan: Plan | None) -> None:
    model, needs, topology, fleet = situation
    placement = placed((model, needs, topology, replace(fleet, plan=plan)))
    chosen, variants = choice_of(placement).candidate, placement.variants()
    hardware = topology.hardware[chosen.hardware_class]
    assert variants[chosen.hardware_class] == chosen.variant_name
    assert variants.items() <= {(o.candidate.hardware_class, o.candidate.variant_name) for o in options_of(placement)}
    assert chosen.variant.runtime in hardware.runtimes
    labels = [topology.hardware[name].labels for name in variants]
    assert needs.constraints.locality is None or all(needs.constraints.locality in one for one in labels)
    assert hardware.capacity == "on-demand" or needs.constraints.preemptible
    assert needs.constraints.classes is None or variants.keys() <= set(needs.constraints.classes)
    assert (chosen.variant.accuracy or 0) >= (needs.constraints.min_accuracy or 0)
    assert hardware.memory is None or chosen.variant.memory <= hardware.memory
    assert chosen.devices
    for device in chosen.devices:
        assert device in fleet.devices
        assert device.hardware_class == chosen.hardware_class
        assert chosen.variant.runtime in device.runtimes
        assert chosen.variant.memory <= device.memory_total
        if f"{model.id}/{chosen.variant_name}" not in device.warm:
            assert chosen.variant.memory <= device.memory_free + device.memory_used
        assert set(chosen.variant.instruction_sets) <= set(device.instruction_sets)
        assert f"{model.id}/{chosen.variant_name}" not in device.unavailable


@given(situation=situations(), data=st.data())
def test_a_decision_does_not_depend_on_any_order(situation: Situation, data: st.DataObject) -> None:
    model, needs, topology, fleet = situation

    def shuffled(values: dict[str, Any]) -> dict[str, Any]:
        return dict(data.draw(st.permutations(list(values.items()))))

    turned = (
        msgspec.structs.replace(model, variants=shuffled(model.variants)),
        needs,
        msgspec.structs.replace(topology, hardware=shuffled(topology.hardware)),
        replace(fleet, devices=tuple(data.draw(st.permutations(fleet.devices)))),
    )
    assert outcome(turned) == outcome(situation)


@given(situation=situations(), data=st.data(), more=st.floats(0.001, 50))
def test_more_work_never_makes_a_class_the_choice(situation: Situation, data: st.DataObject, more: float) -> None:
    model, needs, topology, fleet = situation
    name = data.draw(st.sampled_from(sorted(topology.hardware)))
    queued = list(fleet.work.get(name, (0.0,) * 4))
    queued[data.draw(st.integers(0, 3))] += more
    busier = replace(fleet, work={**fleet.work, name: tuple(queued)})
    if chosen_class((model, needs, topology, busier)) == name:
        assert chosen_class(situation) == name


@given(situation=situations(), deadline=st.floats(1, 100), seed=st.integers(0, 2**64))
def test_a_sure_choice_is_hardly_dearer_than_the_cheapest(situation: Situation, deadline: float, seed: int) -> None:
    model, needs, topology, fleet = situation
    try:
        placement = place(model, replace(needs, deadline=deadline), topology, fleet, seed=seed)
    except TaxiwayError:
        return
    anyones = (None, needs.constraints.service)
    if not placement.held:
        sure = [o for o in options_of(placement) if o.estimate.at_most <= deadline and has_capacity(o, needs)]
        least = min((o.estimate.cost for o in sure if o.candidate.hardware.reserve_for in anyones), default=math.inf)
        assert choice_of(placement).estimate.cost <= UNSURE * NEAR * least


@given(situation=situations(), deadline=st.none() | st.floats(0.1, 100))
def test_a_request_is_bound_within_a_horizon_unless_it_is_live(situation: Situation, deadline: float | None) -> None:
    model, needs, topology, fleet = situation
    placement = placed((model, replace(needs, deadline=deadline), topology, fleet))
    urgent = deadline is not None and deadline <= LATENCY_CRITICAL
    within = choice_of(placement).estimate.wait <= placement.candidate.hardware.horizon
    assert placement.held == (not urgent and not within)
    assert placement.held == placement.reason.removeprefix(STALE).startswith("held: ")


@given(situation=situations(deadline=None))
def test_a_request_is_held_where_no_class_has_room_else_goes_to_the_cheapest(situation: Situation) -> None:
    placement, needs = placed(situation), situation[1]
    with_room = [option for option in options_of(placement) if has_capacity(option, needs)]
    free = [o for o in with_room if o.candidate.hardware.reserve_for in (None, needs.constraints.service)]
    if placement.held:
        assert not free
    else:
        table = placement.table
        busy = reserved_and_busy(table, work_in(situation[3], table))
        closed = [candidate for candidate, is_busy in zip(table.candidates, busy, strict=True) if is_busy]
        first = [*(option for option in with_room if option.candidate not in closed), *with_room][0]
        assert choice_of(placement).estimate.cost <= first.estimate.cost, "the cheapest comes first"


@given(situation=situations())
def test_a_stale_fleet_is_placed_by_the_topology_among_the_classes_last_seen_and_says_so(situation: Situation) -> None:
    model, needs, topology, fleet = situation
    placement = placed((model, needs, topology, replace(fleet, stale=True)))
    seen = {device.hardware_class for device in fleet.devices} or set(topology.hardware)
    assert "from queues.yaml only" in placement.reason
    assert {o.candidate.hardware_class for o in options_of(placement)} <= seen
    unread = options_of(placed((model, needs, topology, FleetSnapshot(stale=True))))
    assert all(option in unread for option in options_of(placement))


STALE = "from queues.yaml only, the fleet snapshot is stale: "


def has_capacity(option: Option, needs: Needs) -> bool:
    urgent = needs.deadline is not None and needs.deadline <= LATENCY_CRITICAL
    return urgent or option.estimate.wait <= option.candidate.hardware.horizon


def model(**variants: Variant) -> Model:
    return a_text_model("sentiment", **(variants or {"fast": variant()}))


def variant(run: float = 0.1, **fields: Any) -> Variant:
    given: dict[str, Any] = {"runtime": "onnx", "memory": Size(100), "profiles": {"cpu": Profile(run, 0.0, load=1.0)}}
    return Variant(**(given | fields))


def hardware(dollars: float = 0.36, **fields: Any) -> HardwareClass:
    return a_class(dollars, **({"runtimes": ("onnx",), "max_batch": 8} | fields))


def topology(**classes: HardwareClass) -> Topology:
    return a_topology(**(classes or {"cpu": hardware()}))


def device(hardware_class: str = "cpu", **fields: Any) -> DeviceFacts:
    return a_device(hardware_class, **({"runtimes": ("onnx",), "warm": ("sentiment:1/fast",)} | fields))


def fleet(*live: DeviceFacts, **work: Sequence[float]) -> FleetSnapshot:
    return FleetSnapshot(devices=live, work={name: tuple(levels) for name, levels in work.items()})


def needs_by(deadline: float | None = None, **fields: Any) -> Needs:
    return Needs(**({"deadline": deadline, "level": 1, "rows": 1, "size": 1} | fields))


CHEAP_AND_DEAR = topology(cheap=hardware(0.36), dear=hardware(3.6))
BOTH = (device("cheap"), device("dear"))
FULL_AND_FREE = topology(cheap=hardware(0.36, horizon=2.0), dear=hardware(3.6, horizon=2.0))
KEPT = topology(cheap=hardware(0.36), kept=hardware(3.6, reserve_for="live", horizon=4.0))
WITH_KEPT = (device("cheap"), device("kept"))
BEHIND_OTHERS = tuple(msgspec.structs.replace(one, blocking={ANY: 3.0}) for one in (device("cheap"), device()))
LIVE, OTHER = Constraints(service="live"), Constraints(service="standard")
SHORT_OF_IT = fleet(*WITH_KEPT, cheap=[0, 9], kept=[0, 0, 0, RESERVED_SHARE * 4.0 + 0.1])
HELD = "held: every queue that could take it is past its horizon; cheap/fast has 3 s of work ahead (limit 2)"
CHOICES: dict[str, tuple[Needs, Topology, FleetSnapshot, str, str]] = {
    "cheapest in time": (needs_by(1.0), CHEAP_AND_DEAR, fleet(*BOTH), "cheap", "cheapest that meets 1 s"),
    "the cheaper would be late": (
        *(needs_by(1.0), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[9])),
        *("dear", "cheap/fast is cheaper and may take 27.3 s"),
    ),
    "lower levels do not delay": (
        *(needs_by(1.0, level=0), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[0, 0, 0, 9]), "cheap", ""),
    ),
    "no time to spare": (
        *(needs_by(0.15), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[0.02])),
        *("dear", "earliest (expected in 0.1 s, at most 0.3 s)"),
    ),
    "no idle device is in time": (
        *(needs_by(0.01), topology(), fleet(device(), cpu=[3])),
        *("cpu", "no idle device would meet 0.01 s"),
    ),
    "other models' batches move urgent work": (
        *(needs_by(1.0, level=0), CHEAP_AND_DEAR, fleet(BEHIND_OTHERS[0], device("dear")), "dear", ""),
    ),
    "other models' batches refuse nothing": (
        *(needs_by(1.0, level=0), topology(), fleet(BEHIND_OTHERS[1]), "cpu", "nothing is sure to meet 1 s"),
    ),
    "past its horizon": (
        *(needs_by(100.0), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 3])),
        *("dear", "cheap/fast is cheaper and past its horizon (3 s of work)"),
    ),
    "held without a deadline": (needs_by(), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 3], dear=[0, 4]), "held", HELD),
    "held": (needs_by(100.0), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 3], dear=[0, 4]), "held", HELD),
    "a horizon is for what runs before": (
        *(needs_by(level=1), topology(cpu=hardware(horizon=2.0)), fleet(device(), cpu=[0, 1, 0, 9]), "cpu", ""),
    ),
    "live work is never held": (
        *(needs_by(1.0), topology(cpu=hardware(horizon=0.1)), fleet(device(), cpu=[0, 0.3]), "cpu", ""),
    ),
    "a kept class helps while it has little": (
        *(needs_by(1.0, constraints=OTHER), KEPT, fleet(*WITH_KEPT, cheap=[0, 9]), "kept", ""),
    ),
    "a kept class serves its own": (needs_by(1.0, constraints=LIVE), KEPT, SHORT_OF_IT, "kept", ""),
    "only a kept class runs it": (
        *(needs_by(30.0, constraints=OTHER), KEPT, fleet(device("kept"), kept=[0.9, 0.5]), "kept", ""),
    ),
}


@pytest.mark.parametrize(("asked", "classes", "now", "chosen", "reason"), CHOICES.values(), ids=CHOICES)
def test_a_request_goes_where_it_should(
    asked: Needs, classes: Topology, now: FleetSnapshot, chosen: str, reason: str
) -> None:
    placement = place(model(), asked, classes, now)
    assert ("held" if placement.held else choice_of(placement).candidate.hardware_class) == chosen
    assert reason in placement.reason


@pytest.mark.parametrize(
    ("dollars", "strays", "expected"),
    [
        (1.1 * 7.2 * WARM_PREFERENCE * 2, 1.0, "cold"),
        (1.1, 1.0, "warm"),  # hardly dearer
        (1.5, 1.2, "cold"),
        (1.5, 1.8, "warm"),  # the other saves less than its estimate may err
        (1.5, 9.0, "warm"),
        (1.1 * UNSURE, 9.0, "cold"),  # however wild the estimate of the other
    ],
)
def test_a_warm_class_is_kept_while_it_is_not_much_dearer(dollars: float, strays: float, expected: str) -> None:
    quick_load = model(fast=variant(profiles={"cpu": Profile(0.1, 0.0, load=0.0)}))
    classes = topology(cold=hardware(1.0), warm=hardware(dollars))
    unlike = device("cold", warm=(), residual={"sentiment:1/fast": (strays,)})
    placement = place(quick_load, needs_by(5.0), classes, fleet(unlike, device("warm")))
    assert choice_of(placement).candidate.hardware_class == expected


STARTING = hardware(horizon=60.0, scaling=Scaling(start=4.0, maximum=3))


@pytest.mark.parametrize(
    ("scaled", "startable", "finish"),
    [
        (STARTING, ("cpu",), (20.0 + 2 * 4.0) / 3 + 0.1),
        (hardware(horizon=60.0, scaling=Scaling(start=4.0, maximum=2)), ("cpu",), (20.0 + 4.0) / 2 + 0.1),
        (STARTING, (), None),
        (hardware(horizon=60.0, scaling=Scaling(start=30.0, maximum=3)), ("cpu",), None),
    ],
    ids=["two start", "one may start", "nothing starts devices", "they start too late"],
)
def test_devices_that_start_keep_it_in_time(
    scaled: HardwareClass, startable: tuple[str, ...], finish: float | None
) -> None:
    now = replace(fleet(device(), cpu=[0, 20]), startable=startable)
    classes = msgspec.structs.replace(topology(cpu=scaled), service={"standard": Service(deadline=15.0)})
    if finish is None:
        with pytest.raises(OverloadedError):
            place(model(), needs_by(15.0), classes, now)
    else:
        reason = place(model(), needs_by(15.0), classes, now).reason
        assert f"more of cpu start: expected in {finish:.3g} s with them" in reason


@pytest.mark.cases(
    "run, facts, limits, reason",
    [
        ({}, {"memory": Size(10)}, {}, "needs 100 bytes of memory, the class has 10"),
        ({"profiles": {"tpu": Profile(1, 0)}}, {}, {}, "the variant has no profile for cpu"),
    ],
)
def test_what_no_class_can_ever_run_is_unplaceable_with_each_reason(
    run: dict[str, Any], facts: dict[str, Any], limits: dict[str, Any], reason: str
) -> None:
    asked = needs_by(constraints=Constraints(**limits))
    with pytest.raises(UnplaceableError, match=reason) as caught:
        place(model(fast=variant(**run)), asked, topology(cpu=hardware(**facts)), fleet(device()))
    [refusal] = caught.value.details["refusals"]
    assert (refusal["hardware_class"], refusal["variant"]) == ("cpu", "fast")


@pytest.mark.cases("live, reason")
def test_a_fleet_without_the_right_device_says_why_and_until_when(live: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(NoDeviceError, match=reason) as caught:
        place(model(), needs_by(), topology(), fleet(*(device(**facts) for facts in live)))
    assert caught.value.retry_after


@pytest.mark.parametrize("tenant", [{}, {"allowance": spent(-1.0)}])
def test_a_budget_below_every_option_names_the_least_that_is_enough(tenant: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        place(model(), needs_by(budget=1e-9, **tenant), CHEAP_AND_DEAR, fleet(*BOTH))
    assert caught.value.details == {"field": "budget", "least": pytest.approx(0.36 / 3600 * 0.1)}


@pytest.mark.parametrize("left", [-0.5, 0.0, 9e-6])
def test_a_tenant_past_its_budget_is_refused_until_midnight(left: float) -> None:
    with pytest.raises(OverloadedError, match=r"the tenant 'lab' has .* of 1 USD left for today") as caught:
        place(model(), needs_by(allowance=spent(left)), CHEAP_AND_DEAR, fleet(*BOTH))
    assert caught.value.retry_after == 3600
    assert caught.value.details["least"] == pytest.approx(0.36 / 3600 * 0.1)


@pytest.mark.parametrize("deadline", [None, 3600.0, 1.0])
def test_of_a_tenant_that_crowds_no_more_than_the_next_batch_is_bound(deadline: float | None) -> None:
    free, busy = fleet(device(), cpu=[0, 0.09]), fleet(device(), cpu=[0, 0.2])
    crowding = needs_by(deadline, work_limit=0.04)
    assert not place(model(), crowding, topology(), free).held
    held = place(model(), crowding, topology(), busy)
    assert held.held
    assert held.reason.startswith("held: its tenant is over its fair share")
    assert not place(model(), needs_by(deadline), topology(), busy).held


@pytest.mark.cases("deadline, priority, level")
def test_a_level_follows_from_deadline_and_priority(deadline: float | None, priority: Priority, level: int) -> None:
    assert level_of(deadline, priority) == level


@given(situation=situations())
def test_every_class_and_variant_is_a_candidate_or_refused_whatever_the_fleet(situation: Situation) -> None:
    model, needs, topology, fleet = situation
    candidates, refusals = classify(model, needs.constraints, topology, fleet)
    pairs = [(c.hardware_class, c.variant_name) for c in candidates] + [(r.hardware_class, r.variant) for r in refusals]
    assert sorted(pairs) == sorted((h, v) for h in topology.hardware for v in model.variants)
    assert all(r.reason and r.reason != "None" for r in refusals)
    assert [r for r in refusals if r.ever] == classify(model, needs.constraints, topology, FleetSnapshot())[1]


NEEDS = 6 * 2**30


@pytest.mark.cases("facts, able")
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
