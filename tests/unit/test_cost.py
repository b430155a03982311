from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.classify import Candidate, Needs, classify
from router.cost import Estimate, estimate
from router.fleet import FleetSnapshot
from tasks.catalogue import Model, Profile, TensorSpec, Variant
from tasks.document import Size
from tasks.facts import DeviceFacts
from tasks.topology import HardwareClass, Price, Topology
from tests.unit.strategies import situations

KEY = "sentiment:1/fast"
PROFILE = Profile(base=0.1, slope=0.01, load=2.0)
TEXT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))
VARIANT = Variant(runtime="onnx", memory=Size(1), profiles={"cpu": PROFILE, "cuda": Profile(0.02, 0.0, load=1.0)})
MODEL = Model(
    name="sentiment",
    version=1,
    summary="",
    licence="",
    pipeline="text",
    inputs=(TEXT,),
    outputs=(TEXT,),
    variants={"fast": VARIANT},
    reference="fast",
)
CLASS = HardwareClass(device="cpu", runtimes=("onnx",), max_batch=8, max_wait=0.05, price=Price(3.6))
COLD = DeviceFacts(
    worker="a",
    hardware_class="cpu",
    device="cpu:0",
    kind="cpu",
    emulated=False,
    name="",
    memory_total=10,
    memory_free=10,
)
WARM = msgspec.structs.replace(COLD, worker="b", warm=(KEY,))
ONE_ROW = Needs(deadline=None, level=1, rows=1, size=10)


def estimated(*devices: DeviceFacts, needs: Needs = ONE_ROW, work: tuple[float, ...] = ()) -> Estimate:
    candidate = Candidate("cpu", CLASS, "fast", VARIANT, devices)
    return estimate(candidate, MODEL, needs, FleetSnapshot(devices, {"cpu": work}))


def test_a_warm_device_pays_no_load() -> None:
    figures = estimated(WARM)
    assert (figures.load, figures.run, figures.warm) == (0.0, pytest.approx(0.2), True)
    assert figures.cost == pytest.approx(0.2 * 3.6 / 3600)
    assert figures.finish == pytest.approx(0.05 + 0.2)


def test_a_cold_device_pays_its_load_in_time_and_in_money() -> None:
    figures = estimated(COLD)
    assert (figures.load, figures.warm) == (2.0, False)
    assert figures.cost == pytest.approx(2.2 * 3.6 / 3600)


def test_a_warm_devices_observed_pace_corrects_its_profile() -> None:
    slow = msgspec.structs.replace(WARM, pace={KEY: 3.0})
    assert estimated(slow).run == pytest.approx(0.6)
    assert estimated(slow, WARM).run == pytest.approx(0.4)


def test_each_device_is_reckoned_by_its_own_kind() -> None:
    cuda = msgspec.structs.replace(WARM, worker="c", kind="cuda")
    assert estimated(cuda).run == pytest.approx(0.02)
    assert estimated(cuda, WARM).run == pytest.approx(0.11)


def test_queued_work_up_to_the_level_is_waited_for_and_shared_by_the_devices() -> None:
    assert estimated(WARM, COLD, work=(1.0, 2.0, 40.0, 40.0)).wait == pytest.approx(1.5)


def test_rows_beyond_the_largest_batch_run_in_more_batches() -> None:
    figures = estimated(WARM, needs=replace(ONE_ROW, rows=20))
    assert figures.run == pytest.approx(2 * (0.1 + 0.01 * 80) + (0.1 + 0.01 * 40))


def test_without_a_device_the_class_is_reckoned_cold_and_not_live() -> None:
    figures = estimated()
    assert (figures.live, figures.warm, figures.load) == (False, False, 2.0)


@given(situation=situations(), more=st.integers(1, 40))
def test_more_rows_never_take_less_time_or_money(
    situation: tuple[Model, Needs, Topology, FleetSnapshot], more: int
) -> None:
    model, needs, topology, fleet = situation
    candidates, _ = classify(model, needs, topology, fleet)
    assume(candidates)
    for candidate in candidates:
        few = estimate(candidate, model, needs, fleet)
        many = estimate(candidate, model, replace(needs, rows=needs.rows + more), fleet)
        assert many.finish >= few.finish * (1 - 1e-9)
        assert many.cost >= few.cost * (1 - 1e-9)
        assert min(few.wait, few.forming, few.load, few.run, few.cost) >= 0
