"""The fleet file: the example, and what is said of wrong ones."""

from pathlib import Path

import pytest

from lab.fleet_file import FileClass, FleetError, load_fleet, parse_fleet
from tests.unit.simulator.public_data import rows_of

EXAMPLE = Path(__file__).parents[2] / "lab" / "fleets" / "azure-mixed.yaml"
DEVICES = {"gpu.l4": "NVIDIA L4", "gpu.a100": "NVIDIA A100-SXM4-40GB", "tpu.v5e": "Google TPU v5e"}
INSTANCES = {
    "cpu.amx": "c3-standard-44",
    "gpu.l4": "g2-standard-4",
    "gpu.a100": "a2-highgpu-1g",
    "tpu.v5e": "tpu-v5litepod-1",
}


def test_the_example_has_the_published_prices() -> None:
    fleet = load_fleet(EXAMPLE)
    rows = [row for row in rows_of("prices.csv") if row["region"] == "us-central1"]
    prices = {row["instance"]: (row["usd_per_hour"], row["usd_per_hour_spot"]) for row in rows}
    for name, instance in INSTANCES.items():
        price = fleet.classes[name].price
        assert (price.usd_per_hour, price.spot_usd_per_hour) == tuple(map(float, prices[instance]))


def test_the_example_has_the_published_rooflines() -> None:
    fleet = load_fleet(EXAMPLE)
    published = {row["name"]: row for row in rows_of("accelerators.csv")}
    for name, device in DEVICES.items():
        found, row = fleet.classes[name], published[device]
        assert isinstance(found, FileClass) and found.roofline is not None
        limits = found.roofline
        assert limits.peak_flops == float(row["peak_bf16_flops"])
        assert limits.bandwidth == float(row["memory_bandwidth_bytes_per_s"])
        assert limits.host_link == pytest.approx(float(row["host_link_bytes_per_s"]), rel=0.001)
        assert fleet.classes[name].memory == int(row["memory_bytes"])


@pytest.mark.cases("old, new, path")
def test_what_is_wrong_is_named_by_its_path(old: str, new: str, path: str) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(FleetError) as caught:
        parse_fleet(text.replace(old, new, 1), "mine.yaml")
    assert caught.value.path == path
    assert str(caught.value).startswith("mine.yaml: ")


def test_a_class_too_small_for_a_model_does_not_run_it() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("memory: 16000000000", "memory: 6000000000")
    fleet = parse_fleet(text)
    able = dict(zip(fleet.classes, fleet.timings["chat"], strict=True))
    assert able["tpu.v5e"] is None
    assert able["gpu.l4"] is not None


@pytest.mark.cases("event, message")
def test_an_event_that_cannot_happen_is_refused(event: str, message: str) -> None:
    with pytest.raises(FleetError, match=message.replace("[", r"\[").replace("]", r"\]")):
        parse_fleet(EXAMPLE.read_text(encoding="utf-8") + f"events: [{event}]")
