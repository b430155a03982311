"""What a device is found to be and is told, and what is refused."""

import psutil
import pytest

from tasks.machine import look
from tasks.settings import TREE, SettingsError
from tasks.topology import HardwareClass, load_topology
from tests.builders import a_class, a_topology
from workers.device import USD_PER_HOUR, DeviceMissingError, find_device, memory_free, options_from, utilisation

HARDWARE = load_topology(TREE / "queues.yaml").hardware


def test_the_cpu_is_found_with_its_memory_and_instruction_sets() -> None:
    device = find_device(HARDWARE["cpu.batch"], "cpu:0-1", emulate=False)
    assert (device.kind, device.label, device.address, device.emulated) == ("cpu", "cpu:0-1", "cpu", False)
    assert device.memory == psutil.virtual_memory().total
    assert device.instruction_sets == look().instruction_sets
    assert 0 < memory_free(device) < device.memory
    assert {"echo", "python"} <= set(device.runtimes), "they need no package"
    assert utilisation(device) is None


@pytest.mark.parametrize(
    ("name", "label", "found"),
    [
        ("cpu.batch", "", ("cpu:0", False)),
        ("cpu.batch", "cpu:1", ("cpu:1", False)),
        ("tpu.bulk", "tpu:0", ("tpu:0", True)),
    ],
)
def test_an_emulated_class_runs_on_the_cpu_and_says_so(name: str, label: str, found: tuple[str, bool]) -> None:
    device = find_device(HARDWARE[name], label, emulate=True)
    assert (device.kind, device.address, (device.label, device.emulated)) == ("cpu", "cpu", found)


@pytest.mark.parametrize("label", ["cuda:0", "cpu:x", "cpu:0:1", "gpu"])
def test_a_label_of_another_kind_is_refused(label: str) -> None:
    with pytest.raises(DeviceMissingError, match="expected a device like cpu:0"):
        find_device(HARDWARE["cpu.batch"], label, emulate=False)


@pytest.mark.parametrize("name", ["gpu.realtime", "tpu.bulk"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    hardware: HardwareClass = HARDWARE[name]
    with pytest.raises(DeviceMissingError, match=r"this machine has|on this machine"):
        find_device(hardware, f"{hardware.device}:31", emulate=False)


@pytest.mark.gpu
def test_an_nvidia_device_is_found_with_its_memory_and_capability() -> None:
    if not look().cuda:
        pytest.skip("this machine has no NVIDIA device")
    device = find_device(HARDWARE["gpu.realtime"], "cuda:0", emulate=False)
    assert (device.kind, device.address, device.emulated) == ("cuda", "cuda:0", False)
    assert device.name == look().cuda[0]
    assert device.memory > 2**30
    assert any(name.startswith("sm_") for name in device.instruction_sets)
    assert 0 < memory_free(device) <= device.memory
    share = utilisation(device)
    assert share is not None and 0 <= share <= 1


TOPOLOGY = a_topology(cpu=a_class())


def test_a_worker_may_be_told_what_its_node_costs() -> None:
    assert options_from({"TAXIWAY_CLASS": "cpu"}, TOPOLOGY).usd_per_hour is None
    assert options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: "0.28"}, TOPOLOGY).usd_per_hour == 0.28


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "free"])
def test_a_price_that_is_none_is_refused_by_name(price: str) -> None:
    with pytest.raises(SettingsError, match="TAXIWAY_USD_PER_HOUR: expected US dollars an hour, above 0"):
        options_from({"TAXIWAY_CLASS": "cpu", USD_PER_HOUR: price}, TOPOLOGY)
