"""What a batch is expected to take and cost, from profiles and from what devices learned."""

import math
from dataclasses import replace
from math import inf
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.candidates import SHARED_ROWS, CandidateTable, build_table, expected
from router.decide.classify import Constraints, Needs
from router.decide.cost import Estimate, batch_limit, estimate_figures, run_alone, shadow_prices
from router.decide.snapshot import FleetSnapshot, with_hosts
from tasks.document import Size
from tasks.heartbeat import ANY, DeviceFacts, EndpointFacts
from tasks.models.model import Model, Parameter, Profile, Variant
from tasks.models.profiles import ProfileBook
from tasks.queues.hours import Hours
from tasks.topology import RUN_STRETCH, HardwareClass, Link, Price
from tests.builders import a_class, a_device, a_text_model, a_topology
from tests.unit.strategies import Situation, situations
from workers.decide.batcher import BatchPolicy, Row, form
from workers.decide.occupation import Track, begin, observe, residuals, seen, unseen

KEY = "sentiment:1/fast"
FLOW = "cpu|sentiment:1"
PROFILE = Profile(base=0.1, slope=0.01, load=2.0)
VARIANT = Variant(runtime="onnx", memory=Size(1), profiles={"cpu": PROFILE, "cuda": Profile(0.02, 0.0, load=1.0)})
MODEL = a_text_model(fast=VARIANT)
CLASS = a_class(3.6, runtimes=("onnx",), max_batch=8, max_wait=0.05)
COLD = a_device("cpu", worker="a", runtimes=("onnx",))
WARM = msgspec.structs.replace(COLD, worker="b", warm=(KEY,))
ONE_ROW = Needs(deadline=None, level=1, rows=1, size=10)


def table_of(
    *devices: DeviceFacts, hardware: HardwareClass = CLASS, model: Model = MODEL, **fleet: Any
) -> CandidateTable:
    limits = Constraints(preemptible=True)
    return build_table(model, limits, a_topology(cpu=hardware), FleetSnapshot(devices, **fleet), ProfileBook())


def estimated(*devices: DeviceFacts, needs: Needs = ONE_ROW, ahead: float = 0.0, **terms: Any) -> Estimate[float]:
    return estimate_figures(table_of(*devices, **terms), needs, np.array([ahead])).at(0)


def test_a_load_is_paid_in_time_and_money_as_often_as_a_device_is_cold() -> None:
    warm, cold, either = estimated(WARM), estimated(COLD), estimated(WARM, COLD, ahead=3.0)
    assert (warm.load, warm.run, warm.finish) == pytest.approx((0.0, 0.2, 0.2))
    assert (warm.cost, cold.cost) == pytest.approx((0.2 * 3.6 / 3600, 2.2 * 3.6 / 3600))
    assert (cold.load, either.load, either.wait) == pytest.approx((2.0, 1.0, 1.5)), "they share the work ahead"


def test_a_closed_class_takes_work_that_can_wait_until_it_opens() -> None:
    night = msgspec.structs.replace(CLASS, available=Hours(hours="22:00-07:00"))
    closed: dict[str, Any] = {"hardware": night, "now": 21.5 * 3600}  # of the first of January 1970, UTC
    assert table_of(**closed).live.all()
    assert estimated(**closed).load == pytest.approx(1800 + CLASS.scaling.start + 2.0)
    assert not table_of(hardware=night, now=23 * 3600.0).live.any()  # it is open, and has no device


GENERATING = msgspec.structs.replace(
    MODEL, pipeline="generation", parameters={"max_tokens": Parameter(type="integer", default=8)}, expected_size=10
)


@pytest.mark.parametrize(("max_batch", "rows"), [(8, 8), (64, SHARED_ROWS)])
def test_a_generated_row_costs_its_share_of_a_full_batch_whatever_batch_it_has_now(max_batch: int, rows: int) -> None:
    hardware = msgspec.structs.replace(CLASS, max_batch=max_batch)
    quiet, busy = (estimated(WARM, hardware=hardware, model=GENERATING, rates=rates) for rates in ({}, {FLOW: 8.0}))
    assert quiet.cost == busy.cost == pytest.approx(PROFILE.latency(rows, 10) / rows * 3.6 / 3600)
    assert quiet.work > busy.work


def wait_of(level: int, *devices: DeviceFacts) -> float:
    return estimated(*devices, needs=replace(ONE_ROW, level=level)).wait


def test_more_urgent_work_waits_until_the_first_device_has_ended_a_long_batch() -> None:
    long = {"blocked": 3.0, "blocked_by": 2}
    one, other = (msgspec.structs.replace(device, **long) for device in (WARM, COLD))
    shorter = msgspec.structs.replace(other, blocked=1.0)
    assert [wait_of(level, one, shorter) for level in range(4)] == [1.0, 1.0, 0.0, 0.0]
    assert wait_of(0, one, COLD) == 0.0


@pytest.mark.parametrize(
    ("max_run", "rows", "seconds"),
    [
        (None, 20, 2 * (0.1 + 0.01 * 80) + (0.1 + 0.01 * 40)),
        (0.45, 6, 2 * (0.1 + 0.01 * 30)),
        (0.01, 6, 6 * (0.1 + 0.01 * 10)),  # each row alone takes longer than it may
        (9.0, 6, 0.1 + 0.01 * 60),
    ],
)
def test_rows_beyond_a_full_batch_run_in_more_of_them(max_run: float | None, rows: int, seconds: float) -> None:
    bounded = msgspec.structs.replace(CLASS, max_run=max_run)
    found = estimated(WARM, hardware=bounded, needs=replace(ONE_ROW, rows=rows))
    assert found.run == pytest.approx(seconds)


@given(
    base=st.floats(0, 0.1),
    slope=st.floats(0, 0.05),
    floor=st.floats(0, 0.2),
    size=st.integers(1, 20),
    max_run=st.floats(0.001, 1),
)
def test_placement_expects_the_batches_that_workers_form(
    base: float, slope: float, floor: float, size: int, max_run: float
) -> None:
    profile = Profile(base=base, slope=slope, floor=floor)
    table = replace(
        table_of(WARM),
        base=np.array([base]),
        slope=np.array([slope]),
        floor=np.array([floor]),
        max_run=np.array([max_run]),
    )
    rows, policy = [Row(0, inf, size)] * 8, BatchPolicy(8, 0.0, max_run)
    formed = len(form(rows, policy, lambda rows, total: profile.latency(rows, total / rows), 0.0))
    expected = float(batch_limit(table, np.array([base]), np.array([slope * size]))[0])
    assert abs(expected - formed) <= 1e-6 or profile.latency(min(formed, expected) + 1, size) == pytest.approx(
        max(max_run, RUN_STRETCH * profile.latency(1, size))
    )  # what is just at the bound may be on either side of it


def test_a_link_takes_its_delay_and_its_bytes_and_egress_is_paid() -> None:
    link = Link(delay=0.01, bytes_per_second=1e6, egress_usd_per_gib=0.1)
    far = msgspec.structs.replace(CLASS, link=link)
    figures = estimated(WARM, hardware=far, needs=replace(ONE_ROW, payload=2**20))
    assert figures.transfer == pytest.approx(0.01 + 2**20 / 1e6)
    assert figures.cost == pytest.approx(0.2 * 3.6 / 3600 + 0.1 / 1024)


def test_spot_capacity_has_its_own_price_and_pays_for_what_a_reclaim_wastes() -> None:
    price = Price(3.6, spot_usd_per_hour=1.8)
    spot = msgspec.structs.replace(CLASS, max_wait=0.0, price=price, capacity="spot", reclaims_per_hour=360.0)
    assert estimated(WARM, hardware=spot).cost == pytest.approx(0.2 * (1 + 0.1 * 0.2 / 2) * 1.8 / 3600)


@pytest.mark.parametrize(("utilisation", "rises"), [(1.0, True), (0.5, False)])
def test_a_shadow_price_rises_above_its_target_and_falls_below_it(utilisation: float, rises: bool) -> None:
    busy = msgspec.structs.replace(WARM, utilisation=utilisation)
    price = shadow_prices(a_topology(cpu=CLASS), FleetSnapshot((busy,), shadow={"cpu": 1e-4}))["cpu"]
    assert (price > 1e-4) is rises


@given(situation=situations(), more=st.integers(1, 40))
def test_more_rows_never_take_less_time_or_money(situation: Situation, more: int) -> None:
    model, needs, topology, fleet = situation
    table = build_table(model, needs.constraints, topology, fleet, ProfileBook())
    ahead = np.zeros(len(table.classes))
    few, many = (estimate_figures(table, replace(needs, rows=rows), ahead) for rows in (needs.rows, needs.rows + more))
    assert np.all(many.finish >= few.finish * (1 - 1e-9))
    assert np.all(many.cost >= few.cost * (1 - 1e-9))
    for name in Estimate.__slots__:
        assert np.all(getattr(few, name) >= 0)


def test_a_learned_curve_has_prompts_and_answers_apart() -> None:
    learned = Profile(base=0.2, step=0.01, slope=0.001, prompt_step=0.0001, prompt_slope=0.0)
    stated = EndpointFacts(state="closed", curves={KEY: learned})
    device = msgspec.structs.replace(WARM, endpoint=stated)
    needs = replace(ONE_ROW, size=1100, output=100)
    assert estimated(device, needs=needs).run == pytest.approx(0.2 + 0.011 * 100 + 0.0001 * 1000)
    assert estimated(WARM, needs=needs).run == pytest.approx(PROFILE.latency(1, 1100))
    mean = (1.4 + PROFILE.latency(1, 1100)) / 2
    assert estimated(device, WARM, needs=needs).run == pytest.approx(mean), "of both devices"
    assert run_alone(table_of(device), needs) == pytest.approx([0.2 + 0.011 * 100 + 0.1])


LEVEL = 1


def after(track: Track, ratios_seen: list[float]) -> Track:
    for ratio in ratios_seen:
        track = observe(track, predicted=2.0, seconds=2.0 * ratio, levels=(LEVEL,))
    return track


def residual(track: Track) -> float:
    return track.residuals[LEVEL]


@pytest.mark.parametrize(
    ("ratios", "pace", "drifted"),
    [
        ([3.0] * 40, 3.0, True),
        ([1.0] * 40, 1.0, False),
        ([3.0] * 50 + [1.0] * 60, 1.0, False),  # recovered
        ([1.0] * 50 + [1000.0], 1.3, False),  # one slow batch counts for little
    ],
)
def test_a_device_that_is_slower_than_its_profile_is_found_out(ratios: list[float], pace: float, drifted: bool) -> None:
    track = after(begin(), ratios)
    assert math.isclose(track.pace, pace, rel_tol=0.02)
    assert track.drifted is drifted


def test_a_residual_is_about_the_pace_and_not_about_the_profile() -> None:
    assert residual(after(begin(), [3.0] * 150)) < 1.2
    assert residual(after(begin(), [1.0] * 180 + [3.0] * 20)) >= 1.5


def test_a_prediction_of_nothing_teaches_nothing() -> None:
    assert observe(begin(), predicted=0.0, seconds=1.0, levels=(LEVEL,)) == begin()


several = st.floats(0.2, 8)
learned = st.dictionaries(st.sampled_from(["x", "y", "z", ANY]), several)


@given(st.lists(several, min_size=2, max_size=5), st.lists(several, min_size=2, max_size=5))
def test_an_unmeasured_pace_is_that_of_elsewhere_by_the_device(
    of_devices: list[float], of_variants: list[float]
) -> None:
    table = [{f"v{n}": slow * own for n, own in enumerate(of_variants)} | {ANY: slow} for slow in of_devices]
    wanted = table[0].pop("v0")
    assert math.isclose(expected(table, "v0")[0], wanted)


def test_one_odd_batch_counts_in_part_for_other_variants() -> None:
    odd, often = (after(begin(), [4.0] * times) for times in (1, 30))
    assert odd.pace == 4.0
    assert math.isclose(odd.hedged, 4 ** (2 / 3))
    assert often.hedged > 3.8
    assert begin().hedged == 1.0


def test_a_miss_raises_what_the_next_job_takes_at_most() -> None:
    histograms = unseen(1.0)
    for ratio in [1.0] * 8:
        histograms = seen(histograms, ratio, {LEVEL})
    assert residuals(histograms)[LEVEL] < 1.1
    assert 9.0 <= residuals(seen(histograms, 9.0, {LEVEL}))[LEVEL] < 9.9


def test_a_new_cpu_is_expected_to_be_like_those_of_its_machine_and_no_other_device_is() -> None:
    slow = a_device("a", worker="a@here", pace={"x": 9.0, ANY: 4.0}, loading={ANY: 3.0}, residual={ANY: (2.0, 5.0)})
    slower = a_device("a", worker="b@here", pace={ANY: 6.0}, residual={ANY: (3.0,)})
    far, gpu = a_device("b", worker="c@far"), a_device("c", worker="d@here", kind="cuda")
    known, new, *others = with_hosts([slow, a_device("b", worker="e@here"), slower, far, gpu])
    assert known == slow
    assert (new.pace, new.loading, new.residual) == ({ANY: 5.0}, {ANY: 3.0}, {ANY: (3.0, 5.0, 5.0, 5.0)})
    assert others[0].pace == {ANY: 6.0} and others[0].loading == {ANY: 3.0}
    assert others[1:] == [far, gpu]
