"""The plan: which hardware classes each kind of request prefers, and by which rule each class scales.

A tuner makes it from the fleet's recent arrivals (`simulator/tuning`); routers follow it. It crosses the state store as
JSON, so it is a msgspec value. The router's autoscaler and the simulator's classes have one size
(`ClassSize`), by the same rules, with a plan and without one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

TARGET = 0.65
"""Target utilisation of devices (0.6–0.7 where live work runs)."""

DONE_WITHIN = 3600.0
"""Seconds within which work without a deadline must be done."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

KEEP_ALIVE = 300.0
"""Seconds before a device that is not needed is switched off, for rules on queue depth. Source: KEDA's cooldown."""


class Density(msgspec.Struct, frozen=True, tag="density", kw_only=True):
    """As many devices as the jobs' deadlines require at `target` utilisation.

    A device that is not needed is kept for `keep` seconds; for as long as its start takes if None.
    """

    target: Positive = TARGET
    keep: Seconds | None = None


class Depth(msgspec.Struct, frozen=True, tag="depth", kw_only=True):
    """One device per `jobs` waiting and running jobs, as autoscalers on queue depth do.

    `poll` is the seconds between two evaluations that may add devices.
    """

    jobs: Positive
    keep: Seconds = KEEP_ALIVE
    poll: Seconds = 15.0


ScalingRule = Density | Depth


def density(work: float, deadline: float, alone: float) -> float:
    """Devices that one job occupies until it is due: its device seconds over the seconds available.

    The sum of the densities of all jobs in a class is about the number of devices that earliest-deadline-first needs
    (Liu and Layland, 1973).
    """
    return work / max(min(deadline, DONE_WITHIN), alone, work)


class ClassSize:
    """How many devices a class should have: as many as a rule wants, and a plan's floor. The same for product and twin.

    It grows at once, by a rule on depth only when that polls. A device goes when it was not needed for the rule's
    keep-alive time, which is that of a start unless the rule says another one: ski rental, which costs at most twice
    what knowing the future would (Karlin et al., 1988).
    """

    def __init__(self, start: float, minimum: int = 0) -> None:
        self.rule: ScalingRule = Density()
        self._start, self._minimum = start, minimum
        self._floor, self._pause = minimum, start
        self._worked = self._polled = -math.inf
        self._needed: list[float] = []  # when each further device was last needed

    @property
    def keep_alive(self) -> float:
        """Seconds for which a device stays that is not needed."""
        return self._start if self.rule.keep is None else self.rule.keep

    def follow(self, rule: ScalingRule, floor: int = 0, pause: float = 0.0, now: float = -math.inf) -> None:
        """Scale by this rule from `now` on, to `floor` devices at least until there was no job for `pause` seconds."""
        if floor > self._floor:
            self._worked = now
        self.rule, self._floor = rule, max(floor, self._minimum)
        self._pause = max(pause, self.keep_alive)

    def use(self, now: float) -> None:
        """Record that there are jobs."""
        self._worked = now

    def floor(self, now: float) -> int:
        """The least devices now."""
        return self._minimum if now - self._worked >= self._pause else self._floor

    def wanted(self, load: float, jobs: int, now: float) -> int:
        """Devices for `jobs` with a total density of `load`; at least one if there are jobs."""
        needed = load / self.rule.target if isinstance(self.rule, Density) else jobs / self.rule.jobs
        return max(self.floor(now), 1 if jobs else 0, math.ceil(needed - 1e-9))

    def grown(self, devices: int, load: float, jobs: int, now: float, most: int) -> int:
        """How many devices to have instead of these, if not fewer; at most `most`."""
        if isinstance(self.rule, Depth) and now < self._polled + self.rule.poll:
            return devices
        self._polled = now
        return max(devices, min(self.wanted(load, jobs, now), most))

    def kept(self, devices: int, load: float, jobs: int, now: float, most: int) -> int:
        """How many of these devices stay; `load` is the highest since the last look."""
        floor = self.floor(now)
        if floor < self._floor:
            self._needed.clear()
        self.need(min(self.wanted(load, jobs, now), most), now)
        stay = min(devices, len(self._needed))
        while stay and now > self._needed[stay - 1] and now - self._needed[stay - 1] >= self.keep_alive:
            stay -= 1
        return max(stay, min(floor, most))

    def need(self, devices: int, now: float) -> None:
        """Record that so many devices are needed now."""
        self._needed[:devices] = [now] * devices

    def release(self, devices: int, now: float) -> None:
        """Let all but so many devices go that are not needed now, without their keep-alive time."""
        self._needed = [now] * devices


STALE = 600.0
"""Seconds after which a plan is no longer followed: five periods of the tuner."""

PLAN_AT_MOST = 64 * 1024
"""Bytes of a stored plan: 400 cells. It is kept with every snapshot that explanations are computed from."""

SCARCE = 0.5
"""Requests of which a plan expects a smaller share in time have more work than the hardware that it gives them."""

FULL = 0.7
"""A class is full by a plan that expects a smaller share of some planned requests there in time: no others may come.

The search has weighed by its penalties what is late. Source: the trial with more work than hardware, where standard
images moved to where they made live chats late."""

SPILL_RUN = 0.25
"""The longest run that planned work may have to wait for at its preferred class, as a share of its deadline.

Source: lab/trials. Other limits of leaving a plan were worse than never leaving it."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that moves to another class stays on its `former` one until `devices` of the new class serve.

    Without a former class, its requests are placed one by one until then. It moves at `latest` seconds of the store's
    clock in any case.
    """

    former: str | None
    devices: Count
    latest: float


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of a model, a service and a locality, and the classes that they prefer, best first.

    `model` is the model's id. `deadline` is the tightest deadline among its recent requests, in seconds; None if none
    had one. `in_time` is the share of its requests that the plan expects in time, 0 to 1.
    """

    model: str
    service: str
    locality: str | None = None
    classes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    deadline: float | None = None
    handover: Handover | None = None
    in_time: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


class ClassPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a class scales, how many devices the plan expects it to need, and for how long it has them without a job.

    A class that shrinks in a pause between bursts is late in the next one: `pause` is how many seconds of its devices
    are cheaper than that. It begins with `begin` devices: those that the plan would have by now, bursts included.
    """

    rule: ScalingRule
    devices: Count
    pause: Seconds = 0.0
    begin: Count = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner decided at `made` seconds of the store's clock.

    `score` is the predicted cost and penalties in US dollars an hour. A class that is not among `classes` serves no
    planned cell: it may be switched off once all handovers are over. One that was `guessed`, before anything had
    arrived, binds no request that would be late by it. Its assignment may have been `adopted` earlier, and kept.
    """

    number: int
    made: float
    cells: tuple[Cell, ...]
    classes: Mapping[str, ClassPlan]
    score: float = 0.0
    guessed: bool = False
    adopted: float = 0.0

    def stale(self, now: float) -> bool:
        """Whether it is too old to be followed at `now` seconds of the store's clock."""
        return now - self.made > STALE

    def cell(self, model: str, service: str, locality: str | None = None) -> Cell | None:
        """The plan for these requests; None if it says nothing about them."""
        wanted = (model, service, locality)
        return next((cell for cell in self.cells if (cell.model, cell.service, cell.locality) == wanted), None)


class LatestTuning(msgspec.Struct, frozen=True, kw_only=True):
    """What the last tuning found, as operators see it: by which tuner, when by the store's clock, and in words.

    `score` is that of the best plan that it found, in US dollars an hour; None if it did not search.
    """

    tuner: str
    at: float
    adopted: bool
    why: str
    score: float | None = None


def moves(cell: Cell, serving: int, now: float) -> bool:
    """Whether the cell still waits for devices of its new class, of which `serving` serve."""
    handover = cell.handover
    return handover is not None and now <= handover.latest and serving < handover.devices


def preferred_class(cell: Cell, serving: Mapping[str, int], now: float) -> str | None:
    """The class that the cell's requests go to: its first one, or its former one while the first starts.

    None if there is no former one. `serving` maps each class to its devices that serve.
    """
    first, handover = cell.classes[0], cell.handover
    return handover.former if handover is not None and moves(cell, serving.get(first, 0), now) else first


_decode = msgspec.json.Decoder(Plan).decode


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """What is stored as the plan, the plan in it, None if it cannot be read, and `why` it is not followed.

    All are empty if none is stored.
    """

    raw: bytes = b""
    stored: Plan | None = None
    why: str = ""

    @property
    def plan(self) -> Plan | None:
        """The plan to follow."""
        return None if self.why else self.stored


NO_PLAN = Followed()


def follow(raw: bytes, now: float, before: Followed = NO_PLAN) -> Followed:
    """The plan to follow at `now` seconds of the store's clock; what `before` read is not parsed again."""
    if not raw:
        return NO_PLAN
    if len(raw) > PLAN_AT_MOST:
        return Followed(raw, why=f"the stored plan cannot be read: expected at most {PLAN_AT_MOST} bytes")
    try:
        plan = before.stored if raw == before.raw and before.stored is not None else _decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        return Followed(raw, why=f"the stored plan cannot be read: {error}")
    stale = f"plan {plan.number} is stale (older than {STALE:g} s)" if plan.stale(now) else ""
    return Followed(raw, plan, stale)


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """What a plan says about one kind of request, as columns over its candidates, in their order.

    Candidates are `preferred` if their class is the one to use now, `hardware_class`, and `serve` if they have devices.
    A request may leave its class for a candidate whose device it blocks for at most `spill` seconds
    (`cost.blocks_for`): then it does not delay what the plan places there. None may leave for a class without devices,
    or one that the plan does not use. The plan expects the share `in_time` of these requests in time. If it was
    `guessed`, those that would be late go anywhere.
    """

    hardware_class: str
    preferred: np.ndarray
    serve: np.ndarray
    spill: np.ndarray
    in_time: float = 1.0
    guessed: bool = False

    @property
    def scarce(self) -> bool:
        """Whether the plan gives these requests less hardware than they need."""
        return self.in_time < SCARCE


def guide_of(plan: Plan, cell: Cell, candidates: Sequence[str], serve: Collection[str], now_in: str) -> Guide | None:
    """The guide for a cell's requests; None if they have no candidate on the classes that the plan prefers.

    `candidates` has the class of each, `serve` those on which candidates have devices, and `now_in` is the cell's class
    at present (`preferred_class`).
    """
    preferred = next((name for name in (now_in, *cell.classes) if name in candidates), None)
    if preferred is None:
        return None
    longest = _longest_runs(plan, cell.model)
    return Guide(
        preferred,
        preferred=np.array([name == preferred for name in candidates], dtype=bool),
        serve=np.array([name in serve for name in candidates], dtype=bool),
        spill=np.array([longest.get(name, 0.0) if name in serve else 0.0 for name in candidates], dtype=np.float64),
        in_time=cell.in_time,
        guessed=plan.guessed,
    )


def _longest_runs(plan: Plan, model: str) -> dict[str, float]:
    """The longest run of the model's requests on each class in use that does not hold up what the plan places there."""
    longest = dict.fromkeys(plan.classes, math.inf)
    own = set()
    for cell in plan.cells:
        name = cell.classes[0]
        if cell.model == model:
            own.add(name)
        elif cell.deadline is not None and name in longest:
            longest[name] = min(longest[name], SPILL_RUN * cell.deadline)
    full = {cell.classes[0] for cell in plan.cells if cell.in_time < FULL}
    return longest | {name: math.inf for name in own if name in longest} | dict.fromkeys(full, 0.0)
