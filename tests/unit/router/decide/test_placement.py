from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.decide.classify import LATENCY_CRITICAL, Allowance, Constraints, Needs
from router.decide.placement import NEAR, WARM_PREFERENCE, Placement
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.heartbeat import ANY, DeviceFacts
from tasks.models.model import Model, Profile, Variant
from tasks.models.profiles import UNSURE
from tasks.topology import HardwareClass, Topology
from taxiway.errors import InvalidRequestError, NoDeviceError, OverloadedError, TaxiwayError, UnplaceableError
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.router.decide.choosing import Option, choice_of, options_of, place
from tests.unit.strategies import situations

Situation = tuple[Model, Needs, Topology, FleetSnapshot]


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


@given(situation=situations() | situations(locality="edge"))
def test_a_placement_keeps_every_hard_constraint(situation: Situation) -> None:
    model, needs, topology, fleet = situation
    chosen = choice_of(placed(situation)).candidate
    hardware = topology.hardware[chosen.hardware_class]
    assert chosen.variant.runtime in hardware.runtimes
    assert needs.constraints.locality is None or needs.constraints.locality in hardware.labels
    assert hardware.capacity == "on-demand" or needs.constraints.preemptible
    assert needs.constraints.classes is None or set(placed(situation).variants()) <= set(needs.constraints.classes)
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


@given(situation=situations(), left=st.floats(1e-4, 1))
def test_a_placement_costs_no_more_than_its_tenant_may_still_spend(situation: Situation, left: float) -> None:
    model, needs, topology, fleet = situation
    allowance = Allowance("lab", "2026-01-31", 1.0, left, 3600.0)
    placement = placed((model, replace(needs, allowance=allowance), topology, fleet))
    assert all(option.estimate.cost <= left for option in options_of(placement))
    assert placement.cost <= left


@given(situation=situations(), budget=st.floats(1e-4, 1))
def test_a_placement_costs_no_more_than_the_budget(situation: Situation, budget: float) -> None:
    model, needs, topology, fleet = situation
    placement = placed((model, replace(needs, budget=budget), topology, fleet))
    assert all(option.estimate.cost <= budget for option in options_of(placement))


@given(situation=situations())
def test_a_decision_is_the_same_when_it_is_made_again(situation: Situation) -> None:
    assert outcome(situation) == outcome(situation)


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
def test_more_work_before_a_class_never_makes_it_the_choice(
    situation: Situation, data: st.DataObject, more: float
) -> None:
    model, needs, topology, fleet = situation
    name = data.draw(st.sampled_from(sorted(topology.hardware)))
    queued = list(fleet.work.get(name, (0.0,) * 4))
    queued[data.draw(st.integers(0, 3))] += more
    busier = replace(fleet, work={**fleet.work, name: tuple(queued)})
    if chosen_class((model, needs, topology, busier)) == name:
        assert chosen_class(situation) == name


@given(situation=situations(), deadline=st.floats(0.01, 100), more=st.floats(0.001, 100))
def test_a_longer_deadline_never_raises_the_least_cost_that_meets_it(
    situation: Situation, deadline: float, more: float
) -> None:
    model, needs, topology, fleet = situation
    without = placed((model, replace(needs, deadline=None), topology, fleet))
    options = options_of(without)

    def least(by: float) -> float:
        return min((o.estimate.cost for o in options if o.estimate.at_most <= by), default=math.inf)

    assert least(deadline + more) <= least(deadline)
    with_one = placed((model, replace(needs, deadline=deadline), topology, fleet))
    assert with_one.held != without.held or options_of(with_one) == options  # what is held runs in company


@given(situation=situations(), deadline=st.floats(1, 100), seed=st.integers(0, 2**64))
def test_a_sure_choice_costs_little_more_than_the_cheapest_sure_option(
    situation: Situation, deadline: float, seed: int
) -> None:
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
def test_a_request_is_held_only_where_every_class_that_is_not_kept_from_it_is_past_its_horizon(
    situation: Situation,
) -> None:
    placement, service = placed(situation), situation[1].constraints.service
    if placement.held:
        free = [o for o in options_of(placement) if o.candidate.hardware.reserve_for in (None, service)]
        assert not any(has_capacity(option, situation[1]) for option in free)


@given(situation=situations(deadline=None))
def test_without_a_deadline_the_cheapest_option_with_room_is_the_choice(situation: Situation) -> None:
    placement = placed(situation)
    needs = situation[1]
    free = [o for o in options_of(placement) if o.candidate.hardware.reserve_for in (None, needs.constraints.service)]
    if not placement.held:
        open_now = [o for o in free if has_capacity(o, needs)] or [
            o for o in options_of(placement) if has_capacity(o, needs)
        ]
        assert choice_of(placement).estimate.cost <= min(o.estimate.cost for o in open_now)


@given(situation=situations())
def test_a_stale_fleet_is_placed_by_the_topology_among_the_classes_last_seen_and_says_so(situation: Situation) -> None:
    model, needs, topology, fleet = situation
    placement = placed((model, needs, topology, replace(fleet, stale=True)))
    seen = {device.hardware_class for device in fleet.devices} or set(topology.hardware)
    assert "from queues.yaml only" in placement.reason
    assert {o.candidate.hardware_class for o in options_of(placement)} <= seen
    unread = options_of(placed((model, needs, topology, FleetSnapshot(stale=True))))
    assert all(option in unread for option in options_of(placement))


@given(situation=situations())
def test_a_job_may_move_only_between_classes_that_are_options(situation: Situation) -> None:
    placement = placed(situation)
    pairs = {(o.candidate.hardware_class, o.candidate.variant_name) for o in options_of(placement)}
    assert set(placement.variants().items()) <= pairs
    chosen = choice_of(placement).candidate
    assert placement.variants()[chosen.hardware_class] == chosen.variant_name


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


def test_the_cheaper_class_takes_what_it_can_finish_in_time() -> None:
    placement = place(model(), needs_by(1.0), CHEAP_AND_DEAR, fleet(*BOTH))
    assert choice_of(placement).candidate.hardware_class == "cheap"


def test_the_dearer_class_takes_what_the_cheaper_one_would_finish_late_and_the_reason_says_so() -> None:
    placement = place(model(), needs_by(1.0), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[9]))
    assert choice_of(placement).candidate.hardware_class == "dear"
    assert "cheap/fast is cheaper and may take 27.3 s" in placement.reason


def test_work_of_lower_levels_does_not_delay_a_request() -> None:
    placement = place(model(), needs_by(1.0, level=0), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[0, 0, 0, 9]))
    assert choice_of(placement).candidate.hardware_class == "cheap"


@pytest.mark.parametrize(("dollars", "expected"), [(0.36 * WARM_PREFERENCE * 2, "cold"), (0.05, "warm")])
def test_a_warm_class_is_preferred_while_it_is_not_much_dearer(dollars: float, expected: str) -> None:
    quick_load = model(fast=variant(profiles={"cpu": Profile(0.1, 0.0, load=0.0)}))
    classes = topology(cold=hardware(0.05 / 1.1), warm=hardware(dollars))
    placement = place(quick_load, needs_by(5.0), classes, fleet(device("cold", warm=()), device("warm")))
    assert choice_of(placement).candidate.hardware_class == expected


@pytest.mark.parametrize(("strays", "expected"), [(1.2, "cold"), (1.8, "warm"), (9.0, "warm")])
def test_a_warm_class_is_kept_while_another_saves_less_than_its_estimate_may_err(strays: float, expected: str) -> None:
    quick_load = model(fast=variant(profiles={"cpu": Profile(0.1, 0.0, load=0.0)}))
    classes = topology(cold=hardware(1.0), warm=hardware(1.5))
    unlike = device("cold", warm=(), residual={"sentiment:1/fast": (strays,)})
    placement = place(quick_load, needs_by(5.0), classes, fleet(unlike, device("warm")))
    assert choice_of(placement).candidate.hardware_class == expected


def test_no_warm_class_is_kept_that_costs_much_more_however_wild_the_estimate_of_the_other() -> None:
    quick_load = model(fast=variant(profiles={"cpu": Profile(0.1, 0.0, load=0.0)}))
    classes = topology(cold=hardware(1.0), warm=hardware(1.1 * UNSURE))
    unlike = device("cold", warm=(), residual={"sentiment:1/fast": (9.0,)})
    placement = place(quick_load, needs_by(5.0), classes, fleet(unlike, device("warm")))
    assert choice_of(placement).candidate.hardware_class == "cold"


def test_a_request_with_no_time_to_spare_goes_where_it_ends_first() -> None:
    placement = place(model(), needs_by(0.15), CHEAP_AND_DEAR, fleet(*BOTH, cheap=[0.02]))
    assert choice_of(placement).candidate.hardware_class == "dear"
    assert placement.reason.startswith("earliest (expected in 0.1 s, at most 0.3 s)")


def test_a_deadline_that_no_idle_device_meets_is_tried_at_the_earliest() -> None:
    placement = place(model(), needs_by(0.01), topology(), fleet(device(), cpu=[3]))
    assert "no idle device would meet 0.01 s" in placement.reason


def test_queues_that_are_too_long_refuse_with_the_time_after_which_they_are_not() -> None:
    with pytest.raises(OverloadedError) as caught:
        place(model(), needs_by(1.0), topology(), fleet(device(), cpu=[0, 5]))
    assert caught.value.retry_after == pytest.approx(4.1)


def test_other_models_batches_move_urgent_work_elsewhere_but_never_refuse_it() -> None:
    cheap, dear = (
        msgspec.structs.replace(each, blocking={ANY: seconds}) for each, seconds in zip(BOTH, (3.0, 0.0), strict=True)
    )
    alone = msgspec.structs.replace(device(), blocking={ANY: 3.0})

    moved = place(model(), needs_by(1.0, level=0), CHEAP_AND_DEAR, fleet(cheap, dear))
    stayed = place(model(), needs_by(1.0, level=0), topology(), fleet(alone))

    assert choice_of(moved).candidate.hardware_class == "dear"
    assert "nothing is sure to meet 1 s" in stayed.reason


def test_a_slow_idle_class_does_not_hide_that_a_fast_one_is_only_overloaded() -> None:
    variants = model(fast=variant(0.1), slow=variant(4.0, runtime="torch"))
    classes = topology(fast=hardware(), slow=hardware(runtimes=("torch",)))
    slow = device("slow", runtimes=("torch",), warm=("sentiment:1/slow",))
    with pytest.raises(OverloadedError):
        place(variants, needs_by(1.0), classes, fleet(device("fast"), slow, fast=[0, 9]))


@pytest.mark.parametrize(
    ("run", "hardware_class", "asked", "reason"),
    [
        (variant(runtime="jax"), hardware(), needs_by(), "the class runs onnx, not jax"),
        (
            variant(),
            hardware(labels=("lab",)),
            needs_by(constraints=Constraints(locality="edge")),
            "the data must stay on 'edge'",
        ),
        (
            variant(),
            hardware(),
            needs_by(constraints=Constraints(classes=("tpu", "gpu"))),
            "the tenant may use tpu, gpu, not this class",
        ),
        (variant(), hardware(memory=Size(10)), needs_by(), "needs 100 bytes of memory, the class has 10"),
        (variant(profiles={"tpu": Profile(1, 0)}), hardware(), needs_by(), "the variant has no profile for cpu"),
    ],
)
def test_what_no_class_can_ever_run_is_unplaceable_with_each_reason(
    run: Variant, hardware_class: HardwareClass, asked: Needs, reason: str
) -> None:
    with pytest.raises(UnplaceableError, match=reason) as caught:
        place(model(fast=run), asked, topology(cpu=hardware_class), fleet(device()))
    [refusal] = caught.value.details["refusals"]
    assert (refusal["hardware_class"], refusal["variant"]) == ("cpu", "fast")


def test_a_reason_that_holds_for_several_variants_of_a_class_is_said_once() -> None:
    asked = needs_by(constraints=Constraints(locality="edge"))
    with pytest.raises(UnplaceableError) as caught:
        place(model(fast=variant(0.1), slow=variant(4.0)), asked, topology(cpu=hardware()), fleet(device()))
    assert caught.value.message.endswith("cpu/fast, slow: the data must stay on 'edge', which the class is not")


def test_data_that_must_stay_somewhere_is_placed_there_though_it_costs_more() -> None:
    classes = topology(cheap=hardware(0.36), dear=hardware(3.6, labels=("edge",)))
    placement = place(model(), needs_by(constraints=Constraints(locality="edge")), classes, fleet(*BOTH))
    assert placement.variants() == {"dear": "fast"}


@pytest.mark.parametrize(
    ("live", "reason"),
    [
        ([], "cpu/fast: no device of the class is live"),
        ([device(serves=(), fault="no answer")], "cpu/fast: cpu@host is out of service: no answer"),
        ([device(runtimes=())], "onnx is not installed on cpu@host"),
        ([device(kind="tpu")], "the variant has no profile for tpu"),
        ([device(memory_total=10)], "needs 100 bytes of memory, cpu@host has 10"),
        ([device(unavailable={"sentiment:1/fast": "bad file"})], "unavailable on cpu@host: bad file"),
    ],
)
def test_a_fleet_without_the_right_device_now_says_why_and_when_to_try_again(
    live: list[DeviceFacts], reason: str
) -> None:
    with pytest.raises(NoDeviceError, match=reason) as caught:
        place(model(), needs_by(), topology(), fleet(*live))
    assert caught.value.retry_after


def test_a_budget_below_every_option_names_the_least_that_is_enough() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        place(model(), needs_by(budget=1e-9), CHEAP_AND_DEAR, fleet(*BOTH))
    assert caught.value.details == {"field": "budget", "least": pytest.approx(0.36 / 3600 * 0.1)}


def test_no_job_moves_to_an_option_over_its_budget() -> None:
    placement = place(model(), needs_by(budget=2e-5), CHEAP_AND_DEAR, fleet(*BOTH))
    assert placement.variants() == {"cheap": "fast"}


def spent(left: float) -> Allowance:
    return Allowance("lab", "2026-01-31", 1.0, left, 3600.0)


@pytest.mark.parametrize("left", [-0.5, 0.0, 9e-6])
def test_a_tenant_past_its_budget_is_refused_until_midnight(left: float) -> None:
    with pytest.raises(OverloadedError, match=r"the tenant 'lab' has .* of 1 USD left for today") as caught:
        place(model(), needs_by(allowance=spent(left)), CHEAP_AND_DEAR, fleet(*BOTH))
    assert caught.value.retry_after == 3600
    assert caught.value.details["least"] == pytest.approx(0.36 / 3600 * 0.1)


def test_a_tenant_near_its_budget_gets_only_what_still_fits() -> None:
    placement = place(model(), needs_by(allowance=spent(2e-5)), CHEAP_AND_DEAR, fleet(*BOTH))
    assert placement.variants() == {"cheap": "fast"}


def test_a_request_whose_own_budget_is_too_small_is_at_fault_whatever_its_tenant_has_left() -> None:
    with pytest.raises(InvalidRequestError):
        place(model(), needs_by(budget=1e-9, allowance=spent(-1.0)), CHEAP_AND_DEAR, fleet(*BOTH))


FULL_AND_FREE = topology(cheap=hardware(0.36, horizon=2.0), dear=hardware(3.6, horizon=2.0))


def test_what_a_queue_past_its_horizon_would_run_in_time_goes_to_one_that_has_room_and_the_reason_says_so() -> None:
    placement = place(model(), needs_by(100.0), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 3]))
    assert (placement.held, choice_of(placement).candidate.hardware_class) == (False, "dear")
    assert "cheap/fast is cheaper and past its horizon (3 s of work)" in placement.reason


@pytest.mark.parametrize("deadline", [None, 100.0])
def test_a_request_that_only_queues_past_their_horizons_can_take_is_held(deadline: float | None) -> None:
    placement = place(model(), needs_by(deadline), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 3], dear=[0, 4]))
    assert placement.held
    assert placement.reason == (
        "held: every queue that could take it is past its horizon; cheap/fast has 3 s of work ahead (limit 2)"
    )


@pytest.mark.parametrize("deadline", [None, 3600.0, 1.0])
def test_of_a_tenant_that_crowds_no_more_than_the_next_batch_is_bound(deadline: float | None) -> None:
    free, busy = fleet(device(), cpu=[0, 0.09]), fleet(device(), cpu=[0, 0.2])
    crowding = needs_by(deadline, work_limit=0.04)

    assert not place(model(), crowding, topology(), free).held
    held = place(model(), crowding, topology(), busy)
    assert held.held
    assert held.reason.startswith("held: its tenant is over its fair share")
    assert not place(model(), needs_by(deadline), topology(), busy).held


def test_a_queue_is_past_its_horizon_only_for_what_it_would_serve_later() -> None:
    placement = place(
        model(), needs_by(level=1), topology(cpu=hardware(horizon=2.0)), fleet(device(), cpu=[0, 1, 0, 9])
    )
    assert not placement.held


def test_a_live_request_is_never_held() -> None:
    placement = place(model(), needs_by(1.0), topology(cpu=hardware(horizon=0.1)), fleet(device(), cpu=[0, 0.3]))
    assert not placement.held


def test_holding_does_not_hide_that_a_request_cannot_be_in_time() -> None:
    with pytest.raises(OverloadedError):
        place(model(), needs_by(5.0), FULL_AND_FREE, fleet(*BOTH, cheap=[0, 30], dear=[0, 40]))
