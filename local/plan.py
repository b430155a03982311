"""Which workers to run on a machine: at the start, and while a router scales the classes.

The start is planned from queues.yaml, the machine and the user's options. Later, workers are started and stopped to
match the number that a router wants for each class.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import msgspec
import psutil

from local.supervisor import SupervisedProcess
from tasks.machine import Machine
from tasks.queues_file import QueuesFile
from tasks.topology import DeviceKind, HardwareClass, Topology

HTTP_PORT = 8080
"""Where the HTTP door is, unless another program listens there."""

FLOWER_PORT = 5555
"""Where Flower is, unless another program listens there."""

_DRIVER: Mapping[DeviceKind, str] = {"cuda": "torch", "tpu": "jax"}
"""The runtime without which a worker cannot drive an accelerator."""


_NOTHING_TO_EMULATE: Mapping[DeviceKind, str] = {"cpu": "on this machine's own CPU", "endpoint": "on its endpoint"}


class PlanError(ValueError):
    """The requested fleet cannot be started; the text says what could be."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker process; an emulated one has the label of the device that it stands in for.

    One `with_engine` starts the engine of its endpoint, too.
    """

    hardware_class: str
    device: str
    emulated: bool
    with_engine: bool = False

    @property
    def name(self) -> str:
        """`cpu.batch.cpu-0`: unique on one machine, and the worker's node name up to the @."""
        return f"{self.hardware_class}.{self.device.replace(':', '-')}"

    @property
    def computes_on_cpu(self) -> bool:
        """Whether it takes a core of the machine."""
        return self.emulated or self.device.startswith("cpu")

    def command(self) -> list[str]:
        """Arguments of `python` that start it."""
        module = "local.engine" if self.with_engine else "workers"
        command = ["-m", module, "--class", self.hardware_class, "--device", self.device]
        return [*command, "--emulate"] if self.emulated else command


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers to start, why each other class gets none, and the seconds that a worker has to finish and leave."""

    workers: tuple[WorkerPlan, ...]
    left_out: Mapping[str, str]
    grace: float


def plan_fleet(
    topology: Topology, machine: Machine, *, emulate: Collection[str] = (), counts: Mapping[str, int] | None = None
) -> Plan:
    """The workers that the machine can run, classes in `emulate` on its CPU; `counts` overrides processes a class.

    Raises:
        PlanError: a class is not in queues.yaml, is emulated without need, or nothing is left to start.
    """
    counts = counts or {}
    _check_names(topology, {*emulate, *counts})
    workers: list[WorkerPlan] = []
    left_out: dict[str, str] = {}
    for name, hardware in sorted(topology.hardware.items()):
        missing = _missing(hardware, machine)
        if hardware.device in _NOTHING_TO_EMULATE and name in emulate:
            raise PlanError(f"{name} runs {_NOTHING_TO_EMULATE[hardware.device]}: there is nothing to emulate")
        if missing is not None and name not in emulate:
            left_out[name] = missing
            continue
        workers += _workers(name, hardware, machine, emulated=name in emulate, count=counts.get(name))
    if not workers:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "every class has 0 workers"
        raise PlanError(f"no worker can be started: {reasons}")
    return Plan(tuple(workers), left_out, topology.limits.grace)


def absent(topology: Topology, machine: Machine) -> tuple[str, ...]:
    """The classes that this machine can serve by emulation only."""
    return tuple(name for name, hardware in sorted(topology.hardware.items()) if _missing(hardware, machine))


def _missing(hardware: HardwareClass, machine: Machine) -> str | None:
    """Why the machine cannot serve the class on a device of its kind; None where it can."""
    if not devices_of(hardware, machine, hardware.device):
        return f"this machine has no {hardware.device} device"
    driver = _DRIVER.get(hardware.device)
    if driver is not None and driver not in machine.runtimes:
        return f"this machine has a {hardware.device} device, and {driver}, which drives it, is not installed"
    return None


def _workers(
    name: str, hardware: HardwareClass, machine: Machine, *, emulated: bool, count: int | None
) -> list[WorkerPlan]:
    kind = "cpu" if emulated else hardware.device
    if count is None:
        count = _usual_count(hardware, machine, kind)
    most = devices_of(hardware, machine, kind)
    if kind != "cpu" and count > most:
        raise PlanError(f"{name}: expected at most one worker a device ({most}), got {count}")
    return _planned(name, hardware, emulated, count)


def _planned(name: str, hardware: HardwareClass, emulated: bool, count: int) -> list[WorkerPlan]:
    start = None if hardware.endpoint is None else hardware.endpoint.start
    engine = start is not None and start.command is not None
    return [WorkerPlan(name, f"{hardware.device}:{index}", emulated, engine) for index in range(count)]


def _usual_count(hardware: HardwareClass, machine: Machine, kind: DeviceKind) -> int:
    if kind != "cpu":
        return devices_of(hardware, machine, kind)
    return machine.cores if hardware.concurrency == "per-core" else hardware.concurrency


def devices_of(hardware: HardwareClass, machine: Machine, kind: DeviceKind) -> int:
    """How many devices of the kind workers of the class can drive from this machine."""
    return machine.devices(kind) if hardware.endpoint is None else len(hardware.endpoint.replicas)


def _check_names(topology: Topology, names: Collection[str]) -> None:
    unknown = sorted(set(names) - set(topology.hardware))
    if unknown:
        raise PlanError(f"expected classes of queues.yaml ({', '.join(sorted(topology.hardware))}), got {unknown[0]!r}")


class PortTakenError(Exception):
    """A port that was asked for cannot be had; names the option, and why."""

    def __init__(self, option: str, port: int, why: str) -> None:
        super().__init__(f"{option} {port}: {why}")
        self.option = option
        self.port = port


def check_ports(asked: Mapping[str, int]) -> None:
    """Check that the loopback ports asked for, by option, can be listened on; 0 asks for none in particular.

    Raises:
        PortTakenError: another program listens there, this user may not, or the same port is asked for twice.
    """
    seen: dict[int, str] = {}
    for option, port in asked.items():
        if not port:
            continue
        if port in seen:
            raise PortTakenError(option, port, f"{seen[port]} asks for the same port")
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
            raise PortTakenError(option, port, why) from error


def _owner(port: int) -> str:
    """` by` and the program that listens on a port; empty where this user may not know."""
    try:
        listening = psutil.net_connections("tcp")
        pids = [one.pid for one in listening if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
        return next((f" by {psutil.Process(pid).name()} (process {pid})" for pid in pids if pid is not None), "")
    except psutil.Error:
        return ""


EVERY = 1.0
"""Seconds between two looks at what a router wants, which itself looks as often."""

_QUICK = 1.0  # seconds for one answer of a router on loopback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The workers of each class to begin with, and the machine's cores."""

    least: Mapping[str, int]
    cores: int


class _Answer(msgspec.Struct, frozen=True):
    replicas: int


def most_workers(
    topology: Topology, machine: Machine, *, emulate: Collection[str], counts: Mapping[str, int]
) -> Mapping[str, int]:
    """The most workers that a class may have here: its `scaling.maximum`, the machine's devices or cores, `counts`."""
    most = {}
    for name, hardware in topology.hardware.items():
        here = devices_of(hardware, machine, "cpu" if name in emulate else hardware.device)
        bounds = (here, hardware.scaling.maximum, counts.get(name))
        most[name] = min(bound for bound in bounds if bound is not None)
    return most


def resize(
    wanted: Mapping[str, int], most: Mapping[str, int], *, on_cpu: Collection[str], cores: int
) -> dict[str, int]:
    """Workers of each class: as many as are wanted, at most `most`.

    Classes `on_cpu` share the machine's cores in turn; each that is wanted has one worker, also where cores are fewer.
    """
    counts = {name: min(want, most.get(name, 0)) for name, want in wanted.items()}
    sharing = sorted(name for name in on_cpu if counts.get(name))
    given = dict.fromkeys(sharing, 1)
    for _ in range(cores - len(sharing)):
        short = [name for name in sharing if given[name] < counts[name]]
        if short:
            given[min(short, key=lambda name: (given[name], name))] += 1
    return counts | given


class Autoscaler:
    """Resizes classes by marking their processes as wanted or not; the supervisor starts those that are wanted.

    Args:
        workers: every worker that may run here, with its plan.
        ask: how many workers a class should have; None while that is unknown.
    """

    def __init__(
        self,
        workers: Sequence[tuple[WorkerPlan, SupervisedProcess]],
        bounds: Bounds,
        ask: Callable[[str], int | None],
    ) -> None:
        self._cores = bounds.cores
        self._ask = ask
        self._slots: dict[str, list[SupervisedProcess]] = {}
        for plan, process in workers:
            process.wanted = False
            self._slots.setdefault(plan.hardware_class, []).append(process)
        self._on_cpu = {plan.hardware_class for plan, _ in workers if plan.computes_on_cpu}
        self._due = 0.0
        self._resize({name: bounds.least.get(name, 0) for name in self._slots})

    def tend(self) -> None:
        """Periodically ask and resize; classes without an answer are left unchanged."""
        if time.monotonic() < self._due:
            return
        asked = {name: self._ask(name) for name in self._slots}
        self._resize({name: self._running(name) if want is None else want for name, want in asked.items()})
        self._due = time.monotonic() + EVERY

    def _running(self, name: str) -> int:
        return sum(process.wanted for process in self._slots[name])

    def _resize(self, wanted: Mapping[str, int]) -> None:
        most = {name: len(slots) for name, slots in self._slots.items()}
        for name, count in resize(wanted, most, on_cpu=self._on_cpu, cores=self._cores).items():
            running = self._running(name)
            if count != running:
                logger.info("class resized", extra={"class": name, "workers": count, "before": running})
            self._set(self._slots[name], count)

    def _set(self, slots: Sequence[SupervisedProcess], count: int) -> None:
        """Want `count` of the processes: those that rest before those that still end; the last that run are retired."""
        wanted = [process for process in slots if process.wanted]
        free = sorted((process for process in slots if not process.wanted), key=lambda process: not process.resting)
        for process in free[: max(count - len(wanted), 0)]:
            process.wanted = True
        for process in wanted[count:]:
            process.retire()


class Replicas:
    """Runs a worker for each replica of an endpoint, as queues.yaml changes while the fleet runs.

    Args:
        workers: those that run; new ones are added, with the process that `make` makes of a plan.
    """

    def __init__(
        self,
        queues: QueuesFile,
        workers: list[tuple[WorkerPlan, SupervisedProcess]],
        make: Callable[[WorkerPlan], SupervisedProcess],
    ) -> None:
        self._queues, self._workers, self._make = queues, workers, make
        self._classes = {plan.hardware_class for plan, _ in workers}
        self._due = 0.0

    def tend(self) -> None:
        """Periodically look at queues.yaml, and fit the workers to it."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        if self._queues.look():
            for name, hardware in self._queues.topology.hardware.items():
                if hardware.endpoint is not None and name in self._classes:
                    self._fit(_planned(name, hardware, False, len(hardware.endpoint.replicas)), name)

    def _fit(self, planned: Sequence[WorkerPlan], name: str) -> None:
        running = {plan.device: process for plan, process in self._workers if plan.hardware_class == name}
        for plan in planned:
            process = running.pop(plan.device, None)
            if process is None:
                self._workers.append((plan, self._make(plan)))
            else:
                process.wanted = True
        for process in running.values():
            if process.wanted:
                process.retire()


Ask = Callable[[str, str, str], int | None]
"""As `ask_router`."""


def ask_router(url: str, key: str, name: str) -> int | None:
    """How many devices of a class the router at `url` wants, told that they are started here; None if it cannot say.

    `key` is for a door that wants one.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with suppress(httpx.HTTPError, msgspec.DecodeError):
        answer = httpx.post(f"{url}/v1/scaling/{name}/starts", headers=headers, timeout=_QUICK, trust_env=False)
        if answer.status_code == httpx.codes.OK:
            return msgspec.json.decode(answer.content, type=_Answer).replicas
    return None
