"""Which hardware classes a device may serve besides its own: routers decide by it, workers enforce it."""

from __future__ import annotations

from tasks.heartbeat import DeviceFacts
from tasks.topology import DeviceKind, HardwareClass, Topology

NOMINAL = 0.9
"""Share of a class's memory that a device must have: a card sold with 24 GiB tells its driver of 22.5 (NVIDIA L4)."""


def unfit_for(name: str, device: DeviceFacts, topology: Topology) -> str | None:
    """Why the device may not serve the class `name`; None where it may, as it may its own."""
    if name == device.hardware_class:
        return None
    if name not in topology.hardware:
        return f"expected one of {', '.join(sorted(topology.hardware))}, got {name!r}"
    own, other = topology.hardware[device.hardware_class], topology.hardware[name]
    return _other_device(device, own, other) or _other_place(own, other)


def is_emulated(kind: DeviceKind, hardware: HardwareClass) -> bool:
    """Whether a device that really is of `kind` stands in for another where it serves the class."""
    return kind != hardware.device


def _other_device(device: DeviceFacts, own: HardwareClass, other: HardwareClass) -> str | None:
    """A device emulates only if it was started so, and only the kind of its own class."""
    if other.device != device.kind and not (device.emulated and other.device == own.device):
        return f"the class is for {other.device}, {device.device} is {device.kind}"
    memory = min(own.memory or device.memory_total, device.memory_total)
    if other.memory is not None and memory < NOMINAL * other.memory:
        return f"the class has {other.memory} bytes of memory, {device.device} may use {memory}"
    if not set(other.runtimes) & set(device.runtimes):
        return f"the class runs {', '.join(other.runtimes)}, of which {device.worker} has none"
    return None


def _other_place(own: HardwareClass, other: HardwareClass) -> str | None:
    """A retargeted device must not run work bound to a location it lacks, or work that may not run on spot capacity."""
    elsewhere = sorted(set(other.labels) - set(own.labels))
    if elsewhere:
        return f"the class is labelled {', '.join(elsewhere)}, which the device's own is not"
    if own.capacity == "spot" and other.capacity != "spot":
        return "the device is spot capacity, and the class is not"
    return None
