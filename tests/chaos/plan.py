"""The plan: which faults are injected when, generated from a seed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    """A kind of fault."""

    KILL = "kill -9"  # of a process, which is restarted
    FREEZE = "SIGSTOP"  # of a process or a server, and SIGCONT
    RESTART = "kill -9 and restart"  # of a server, from its log
    FAIL_OVER = "failover"  # from the store to its replica
    CUT = "cut"  # all connections of a cable
    PULL = "unplug"  # a cable
    DELAY = "delay"  # of a cable's traffic
    FILL = "disk full"  # of a server's log
    STEP = "clock step"  # of a process
    ASK = "ask for"  # a harmful model


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, `at` seconds after the load begins, that lasts `seconds`."""

    at: float
    kind: Kind
    target: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Targets:
    """The names of possible targets. `servers` are the store and, if there is a bridge to one, RabbitMQ."""

    workers: Sequence[str]
    routers: Sequence[str]
    servers: Sequence[str]
    cables: Sequence[str]
    clocks: Sequence[str]
    replicated: bool


@dataclass(frozen=True, slots=True)
class _FaultRate:
    """How often per minute a kind of fault is injected into one of `targets`, and its longest duration in seconds."""

    kind: Kind
    targets: Sequence[str]
    per_minute: float
    longest: float = 0.0


LEADER = "leader"
"""Whichever router is the leader when the fault is due."""

HARMFUL = ("hang", "hog", "leak", "crash", "spin", "starve")
"""Harmful models: Python callables harm their own process, `spin` and `starve` (ONNX) their worker."""

_SHORTEST = 0.2  # of the longest duration of a kind: the shortest
_SERVER_SHARE = 0.6  # of the time between two server faults that one may last


def plan_faults(seed: int, seconds: float, targets: Targets, kills: int) -> tuple[Fault, ...]:
    """The faults of a run of `seconds`, in order; exactly `kills` of them kill workers."""
    random = Random(seed)
    faults = [
        *_worker_kills(random, seconds, targets, kills),
        *_overlapping_faults(random, seconds, targets),
        *_server_faults(random, seconds, targets),
    ]
    return tuple(sorted(faults, key=lambda fault: (fault.at, fault.kind, fault.target)))


def _worker_kills(random: Random, seconds: float, targets: Targets, kills: int) -> Iterator[Fault]:
    """Kills of workers in rotation, each at a random time within an equal share of the run."""
    for number in range(kills):
        at = (number + random.random()) * seconds / kills
        yield Fault(at, Kind.KILL, targets.workers[number % len(targets.workers)])


def _overlapping_faults(random: Random, seconds: float, targets: Targets) -> Iterator[Fault]:
    """Faults that may overlap."""
    for rate in (
        _FaultRate(Kind.KILL, targets.routers, 2),
        _FaultRate(Kind.KILL, [LEADER], 1),
        _FaultRate(Kind.FREEZE, targets.workers, 1, 20),
        _FaultRate(Kind.FREEZE, [*targets.routers, LEADER], 1, 20),
        _FaultRate(Kind.CUT, targets.cables, 2),
        _FaultRate(Kind.PULL, targets.cables, 0.5, 5),
        _FaultRate(Kind.DELAY, targets.cables, 1, 10),
        _FaultRate(Kind.STEP, targets.clocks, 0.5, 20),
        *(_FaultRate(Kind.ASK, [model], 0.7) for model in HARMFUL),
    ):
        for _ in range(_times(rate, seconds)):
            yield _fault(random, rate, random.uniform(0, seconds), seconds)


def _server_faults(random: Random, seconds: float, targets: Targets) -> Iterator[Fault]:
    """Server faults: one at a time, with pauses between."""
    rates = [
        _FaultRate(Kind.RESTART, targets.servers, 0.7),
        _FaultRate(Kind.FREEZE, targets.servers, 0.3, 5),
        _FaultRate(Kind.FILL, targets.servers[:1], 0.3, 5),
        *([_FaultRate(Kind.FAIL_OVER, targets.servers[:1], 0.5)] if targets.replicated else []),
    ]
    due = [rate for rate in rates for _ in range(_times(rate, seconds))]
    random.shuffle(due)
    share = seconds / len(due)
    for place, rate in enumerate(due):
        yield _fault(random, rate, (place + random.random() * (1 - _SERVER_SHARE)) * share, share * _SERVER_SHARE)


def _times(rate: _FaultRate, seconds: float) -> int:
    return max(1, round(rate.per_minute * seconds / 60))


def _fault(random: Random, rate: _FaultRate, at: float, most: float) -> Fault:
    duration = min(rate.longest * random.uniform(_SHORTEST, 1), most)
    return Fault(at, rate.kind, random.choice(rate.targets), duration)
