"""What a device is found to be, and what is refused."""

import psutil
import pytest

from tasks.machine import look
from tasks.settings import TREE
from tasks.topology import HardwareClass, load_topology
from workers.device import DeviceMissingError, find_device, memory_free, utilisation

HARDWARE = load_topology(TREE / "queues.yaml").hardware


def test_the_cpu_is_found_with_its_memory_and_instruction_sets() -> None:
    device = find_device(HARDWARE["cpu.batch"], "cpu:0-1", emulate=False)
    assert (device.kind, device.label, device.address, device.emulated) == ("cpu", "cpu:0-1", "cpu", False)
    assert device.memory == psutil.virtual_memory().total
    assert device.instruction_sets == look().instruction_sets
    assert 0 < memory_free(device) < device.memory


def test_a_device_without_a_label_is_the_first_of_its_kind() -> None:
    assert find_device(HARDWARE["cpu.batch"], "", emulate=False).label == "cpu:0"


def test_runtimes_that_need_no_package_are_always_there() -> None:
    assert {"echo", "python"} <= set(find_device(HARDWARE["cpu.batch"], "", emulate=False).runtimes)


def test_an_emulated_class_runs_on_the_cpu_and_says_so() -> None:
    device = find_device(HARDWARE["tpu.bulk"], "tpu:0", emulate=True)
    assert (device.kind, device.label, device.address, device.emulated) == ("cpu", "tpu:0", "cpu", True)


def test_a_class_of_cpus_is_never_marked_as_emulated() -> None:
    assert not find_device(HARDWARE["cpu.batch"], "cpu:0", emulate=True).emulated


@pytest.mark.parametrize("label", ["cuda:0", "cpu:x", "cpu:0:1", "gpu"])
def test_a_label_of_another_kind_is_refused(label: str) -> None:
    with pytest.raises(DeviceMissingError, match="expected a device like cpu:0"):
        find_device(HARDWARE["cpu.batch"], label, emulate=False)


@pytest.mark.parametrize("name", ["gpu.realtime", "tpu.bulk"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    hardware: HardwareClass = HARDWARE[name]
    with pytest.raises(DeviceMissingError, match=r"this machine has|on this machine"):
        find_device(hardware, f"{hardware.device}:31", emulate=False)


def test_the_cpu_does_not_measure_its_own_utilisation() -> None:
    assert utilisation(find_device(HARDWARE["cpu.batch"], "", emulate=False)) is None


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
