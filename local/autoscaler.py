"""Resizes the classes of this machine to the number of workers that a router wants for each."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from local.plan import StartPlan, StartPlanError, WorkerPlan, devices_of
from local.supervisor import SupervisedProcess
from tasks.machine import Machine
from tasks.queues.queues_file import QueuesFile
from tasks.topology import Topology
from tasks.web import ask

EVERY = 1.0
"""Seconds between two requests for a router's targets, which it computes as often."""

_ANSWER_WITHIN = 1.0  # seconds for one answer of a router on loopback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerBounds:
    """The initial workers of each class, and the machine's cores."""

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
    """Workers of each class: as many as `wanted`, at most `most`.

    Classes `on_cpu` share the machine's cores in turn; each class that is wanted gets at least one worker, even if
    there are fewer cores than classes.
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
    """Resizes classes by marking their processes as wanted or not; the supervisor starts wanted ones.

    Args:
        workers: every worker that may run here, with its plan; more may be added, not wanted yet.
        ask: returns the number of workers that a class should have; None while that is unknown.
    """

    def __init__(
        self,
        workers: Sequence[tuple[WorkerPlan, SupervisedProcess]],
        bounds: WorkerBounds,
        ask: Callable[[str], int | None],
    ) -> None:
        self._workers, self._cores, self._ask = workers, bounds.cores, ask
        self._due = 0.0
        for _, process in workers:
            process.wanted = False
        self._resize(lambda name: bounds.least.get(name, 0))

    def tend(self) -> None:
        """Periodically ask and resize; classes without an answer are left unchanged."""
        if time.monotonic() >= self._due:
            self._resize(self._ask)
            self._due = time.monotonic() + EVERY

    def _resize(self, ask: Callable[[str], int | None]) -> None:
        slots = defaultdict[str, list[SupervisedProcess]](list)
        for plan, process in self._workers:
            slots[plan.hardware_class].append(process)
        before = {name: sum(process.wanted for process in those) for name, those in slots.items()}
        wanted = {name: before[name] if (count := ask(name)) is None else count for name in slots}
        most = {name: len(those) for name, those in slots.items()}
        on_cpu = {plan.hardware_class for plan, _ in self._workers if plan.emulated or plan.device.startswith("cpu")}
        for name, count in resize(wanted, most, on_cpu=on_cpu, cores=self._cores).items():
            if count != before[name]:
                logger.info("class resized", extra={"class": name, "workers": count, "before": before[name]})
            _set(slots[name], count)


def _set(slots: Sequence[SupervisedProcess], count: int) -> None:
    """Have `count` processes run: start resting ones before ones that are still ending, and retire the last."""
    wanted = [process for process in slots if process.wanted]
    free = sorted((process for process in slots if not process.wanted), key=lambda process: not process.resting)
    for process in free[: max(count - len(wanted), 0)]:
        process.wanted = True
    for process in wanted[count:]:
        process.retire()


@dataclass(slots=True, eq=False)
class Replanner:
    """Adds the workers of new classes, and fits those of endpoints to their replicas, when queues.yaml changes."""

    queues: QueuesFile
    plan: Callable[[Topology], StartPlan]
    """Plans this machine's workers by queues.yaml."""
    workers: list[tuple[WorkerPlan, SupervisedProcess]]
    """The running ones; new ones are added."""
    make: Callable[[WorkerPlan], SupervisedProcess]
    """Creates a worker's process from its plan."""
    scaled: bool
    """Whether an `Autoscaler` fits the classes; only new ones are added then."""
    _due: float = 0.0

    def tend(self) -> None:
        """Periodically check queues.yaml, and adapt the workers to it."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        known = self.queues.topology.hardware.keys()
        if not self.queues.look():
            return
        try:
            plan = self.plan(self.queues.topology)
        except StartPlanError as error:
            logger.error("queues.yaml changed, and cannot be followed", extra={"error": str(error)})
            return
        for name, hardware in self.queues.topology.hardware.items():
            if name not in known or (hardware.endpoint is not None and not self.scaled):
                self._fit([worker for worker in plan.workers if worker.hardware_class == name], name)
        for name in plan.left_out.keys() - known:
            logger.warning("class not started", extra={"class": name, "reason": plan.left_out[name]})

    def _fit(self, planned: Sequence[WorkerPlan], name: str) -> None:
        running = {plan.device: process for plan, process in self.workers if plan.hardware_class == name}
        for plan in planned:
            process = running.pop(plan.device, None)
            if process is None:
                process = self.make(plan)
                process.wanted = not self.scaled
                self.workers.append((plan, process))
            else:
                process.wanted = True
        for process in running.values():
            if process.wanted:
                process.retire()


Ask = Callable[[str, str, str], int | None]
"""As `ask_router`."""


def ask_router(url: str, key: str, name: str) -> int | None:
    """The number of devices that the router at `url` wants of a class; None if unknown.

    The request declares that devices of the class are started here. `key` is the API key, if the API requires one.
    """
    found = ask(f"{url}/v1/scaling/{name}/starts", method="POST", key=key, timeout=_ANSWER_WITHIN)
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(found or b"", type=_Answer).replicas
    return None
