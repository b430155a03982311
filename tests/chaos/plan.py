"""What breaks when: a list of faults that a seed decides. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    """What can be done to a fleet."""

    KILL = "kill -9"  # of a process, which is started again
    FREEZE = "SIGSTOP"  # of a process or a server, and SIGCONT
    RESTART = "kill -9 and restart"  # of a server, from its log
    FAIL_OVER = "failover"  # from the store to its replica
    CUT = "cut"  # all connections of a cable
    PULL = "unplug"  # a cable
    DELAY = "delay"  # what goes through a cable
    FILL = "disk full"  # of a server's log
    STEP = "clock step"  # of a process
    ASK = "ask for"  # a model that does harm


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, `at` seconds after the load begins, for so many `seconds`."""

    at: float
    kind: Kind
    target: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Kit:
    """What there is to break, by name. `servers` are the store and, where it is another one, the broker."""

    workers: Sequence[str]
    routers: Sequence[str]
    servers: Sequence[str]
    cables: Sequence[str]
    clocks: Sequence[str]
    replicated: bool


@dataclass(frozen=True, slots=True)
class _Habit:
    """How often a minute a kind of fault befalls one of `targets`, and for how long at most."""

    kind: Kind
    targets: Sequence[str]
    a_minute: float
    longest: float = 0.0


LEADER = "leader"
"""The router that moves waiting work when the fault is due, whichever that is."""

HARMFUL = ("hang", "hog", "leak", "crash", "spin", "starve")
"""Models that do harm: Python callables to their own process, `spin` and `starve` (ONNX) to their worker."""

_SHORTEST = 0.2  # of the longest that a fault of its kind lasts
_SERVED = 0.6  # of the time between two faults of servers: the rest is calm


def plan_faults(seed: int, seconds: float, kit: Kit, kills: int) -> tuple[Fault, ...]:
    """The faults of a run of so many `seconds`, in order; exactly `kills` of them kill workers."""
    random = Random(seed)
    faults = [*_kills(random, seconds, kit, kills), *_scattered(random, seconds, kit), *_served(random, seconds, kit)]
    return tuple(sorted(faults, key=lambda fault: (fault.at, fault.kind, fault.target)))


def _kills(random: Random, seconds: float, kit: Kit, kills: int) -> Iterator[Fault]:
    """Each worker in its turn, at a time by chance within an even share of the whole."""
    for number in range(kills):
        at = (number + random.random()) * seconds / kills
        yield Fault(at, Kind.KILL, kit.workers[number % len(kit.workers)])


def _scattered(random: Random, seconds: float, kit: Kit) -> Iterator[Fault]:
    """What may befall several at once."""
    for habit in (
        _Habit(Kind.KILL, kit.routers, 2),
        _Habit(Kind.KILL, [LEADER], 1),
        _Habit(Kind.FREEZE, kit.workers, 1, 20),
        _Habit(Kind.FREEZE, [*kit.routers, LEADER], 1, 20),
        _Habit(Kind.CUT, kit.cables, 2),
        _Habit(Kind.PULL, kit.cables, 0.5, 5),
        _Habit(Kind.DELAY, kit.cables, 1, 10),
        _Habit(Kind.STEP, kit.clocks, 0.5, 20),
        *(_Habit(Kind.ASK, [model], 0.7) for model in HARMFUL),
    ):
        for _ in range(_times(habit, seconds)):
            yield _fault(random, habit, random.uniform(0, seconds), seconds)


def _served(random: Random, seconds: float, kit: Kit) -> Iterator[Fault]:
    """What befalls servers: one after the other, with calm between."""
    habits = [
        _Habit(Kind.RESTART, kit.servers, 0.7),
        _Habit(Kind.FREEZE, kit.servers, 0.3, 5),
        _Habit(Kind.FILL, kit.servers[:1], 0.3, 5),
        *([_Habit(Kind.FAIL_OVER, kit.servers[:1], 0.5)] if kit.replicated else []),
    ]
    due = [habit for habit in habits for _ in range(_times(habit, seconds))]
    random.shuffle(due)
    share = seconds / len(due)
    for place, habit in enumerate(due):
        yield _fault(random, habit, (place + random.random() * (1 - _SERVED)) * share, share * _SERVED)


def _times(habit: _Habit, seconds: float) -> int:
    return max(1, round(habit.a_minute * seconds / 60))


def _fault(random: Random, habit: _Habit, at: float, most: float) -> Fault:
    lasting = min(habit.longest * random.uniform(_SHORTEST, 1), most)
    return Fault(at, habit.kind, random.choice(habit.targets), lasting)
