"""Which workers to start on a machine: planned from queues.yaml, the machine and the user's options."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import psutil

from tasks.machine import Machine
from tasks.topology import DeviceKind, HardwareClass, Topology

HTTP_PORT = 8080
"""The HTTP API's port, unless another program has it."""

FLOWER_PORT = 5555
"""Flower's port, unless another program has it."""

MOST_PER_CORE = 32
"""Most workers of a class for each core of the machine, if queues.yaml does not specify more."""

_DRIVER: Mapping[DeviceKind, str] = {"cuda": "torch", "tpu": "jax", "mps": "torch"}
"""The runtime without which a worker cannot drive an accelerator."""


_NOTHING_TO_EMULATE: Mapping[DeviceKind, str] = {"cpu": "on this machine's own CPU", "endpoint": "on its endpoint"}


class StartPlanError(ValueError):
    """The requested fleet cannot be started; the message says which could be."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker process; an emulated one has the label of the device that it emulates.

    A worker `with_engine` also starts the engine of its endpoint.
    """

    hardware_class: str
    device: str
    emulated: bool
    with_engine: bool = False

    @property
    def name(self) -> str:
        """`cpu.batch.cpu-0`: unique on one machine, and the worker's node name up to the @."""
        return f"{self.hardware_class}.{self.device.replace(':', '-')}"

    def command(self) -> list[str]:
        """Arguments of `python` that start it."""
        module = "local.engine" if self.with_engine else "workers"
        command = ["-m", module, "--class", self.hardware_class, "--device", self.device]
        return [*command, "--emulate"] if self.emulated else command


@dataclass(frozen=True, slots=True)
class StartPlan:
    """The workers to start, why each other class gets none, and the seconds that a worker has to finish its jobs."""

    workers: tuple[WorkerPlan, ...]
    left_out: Mapping[str, str]
    grace: float


def plan_fleet(
    topology: Topology,
    machine: Machine,
    *,
    emulate: Collection[str] = (),
    counts: Mapping[str, int] | None = None,
    without_engine: Mapping[str, str] | None = None,
) -> StartPlan:
    """The workers that the machine can run, classes in `emulate` on its CPU; `counts` overrides processes a class.

    Classes `without_engine`, which cannot be started for the reason given, get none.

    Raises:
        PlanError: a class is not in queues.yaml, is emulated without need, or nothing is left to start.
    """
    counts = counts or {}
    _check_names(topology, {*emulate, *counts})
    workers: list[WorkerPlan] = []
    left_out: dict[str, str] = {}
    for name, hardware in sorted(topology.hardware.items()):
        missing = (without_engine or {}).get(name) or _missing(name, hardware, machine)
        if hardware.device in _NOTHING_TO_EMULATE and name in emulate:
            raise StartPlanError(f"{name} runs {_NOTHING_TO_EMULATE[hardware.device]}: there is nothing to emulate")
        if missing is not None and name not in emulate:
            left_out[name] = missing
            continue
        workers += _workers(name, hardware, machine, emulated=name in emulate, count=counts.get(name))
    if not workers:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "every class has 0 workers"
        raise StartPlanError(f"no worker can be started: {reasons}")
    return StartPlan(tuple(workers), left_out, topology.limits.grace)


def absent(topology: Topology, machine: Machine) -> tuple[str, ...]:
    """The classes that this machine can serve by emulation only."""
    return tuple(name for name, hardware in sorted(topology.hardware.items()) if _missing(name, hardware, machine))


def _missing(name: str, hardware: HardwareClass, machine: Machine) -> str | None:
    """Why the machine cannot serve the class on a device of its kind; None if it can."""
    if not devices_of(hardware, machine, hardware.device):
        return f"this machine has no {hardware.device} device (--emulate {name} serves it on the CPU)"
    driver = _DRIVER.get(hardware.device)
    if driver is not None and driver not in machine.runtimes:
        return f"this machine has a {hardware.device} device, but {driver}, which drives it, is not installed"
    return None


def _workers(
    name: str, hardware: HardwareClass, machine: Machine, *, emulated: bool, count: int | None
) -> list[WorkerPlan]:
    kind = "cpu" if emulated else hardware.device
    if kind == "cpu":
        usual = machine.cores if hardware.concurrency == "per-core" else hardware.concurrency
        most, bound = max(usual, MOST_PER_CORE * machine.cores), f"{MOST_PER_CORE} workers per core"
    else:
        usual = most = devices_of(hardware, machine, kind)
        bound = "one worker per device"
    count = usual if count is None else count
    if count > most:
        raise StartPlanError(f"{name}: expected at most {bound} ({most}), got {count}")
    engine = hardware.endpoint is not None and hardware.endpoint.starts
    return [WorkerPlan(name, f"{hardware.device}:{index}", emulated, engine) for index in range(count)]


def devices_of(hardware: HardwareClass, machine: Machine, kind: DeviceKind) -> int:
    """The number of devices of a kind that workers of the class can drive from this machine."""
    return machine.devices(kind) if hardware.endpoint is None else len(hardware.endpoint.replicas)


def _check_names(topology: Topology, names: Collection[str]) -> None:
    unknown = sorted(set(names) - set(topology.hardware))
    if unknown:
        raise StartPlanError(
            f"expected classes of queues.yaml ({', '.join(sorted(topology.hardware))}), got {unknown[0]!r}"
        )


class PortTakenError(Exception):
    """A requested port cannot be used; names the option, and why."""


def check_ports(asked: Mapping[str, int]) -> None:
    """Check that the requested loopback ports, by option, are free; 0 requests none in particular.

    Raises:
        PortTakenError: another program listens there, this user may not, or a port is requested twice.
    """
    seen: dict[int, str] = {}
    for option, port in asked.items():
        if not port:
            continue
        if port in seen:
            raise PortTakenError(f"{option} {port}: {seen[port]} requests the same port")
        seen[port] = option
        _check(option, port)


def _check(option: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = f"the port is taken{_owner(port)}" if taken else f"the port cannot be used: {error.strerror}"
            raise PortTakenError(f"{option} {port}: {why}") from error


def _owner(port: int) -> str:
    """` by` and the program that listens on a port; empty if this user may not see it."""
    try:
        listening = psutil.net_connections("tcp")
        pids = [one.pid for one in listening if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
        return next((f" by {psutil.Process(pid).name()} (process {pid})" for pid in pids if pid is not None), "")
    except psutil.Error:
        return ""
