"""Injects planned faults, each at its time, and repairs them afterwards."""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import redis

from taxiway.contract.keys import LEAD
from tests.chaos.fleet import Fleet
from tests.chaos.history import Parted, Recorder, Struck
from tests.chaos.plan import LEADER, Fault, Kind

STEP = 300
"""Seconds by which a clock steps."""

SLOW = 0.15
"""Seconds that a slow cable takes."""

Act = Callable[[], Any]


class SkippedError(Exception):
    """A fault that cannot be here; the text says why."""


class Breaker:
    """Acts on a fleet from the thread that tends it; the plan counts from now. `ask` asks for a harmful model."""

    def __init__(self, fleet: Fleet, recorder: Recorder, ask: Callable[[str], None]) -> None:
        self._fleet, self._recorder, self._ask = fleet, recorder, ask
        self._due: list[tuple[float, int, Act]] = []
        self._turn = itertools.count()
        self._began = time.monotonic()
        self._acts: dict[Kind, Callable[[Fault], Act | None]] = {
            Kind.KILL: self._kill,
            Kind.FREEZE: self._freeze,
            Kind.RESTART: self._restart,
            Kind.FAIL_OVER: self._fail_over,
            Kind.CUT: self._cut,
            Kind.PULL: self._pull,
            Kind.DELAY: self._delay,
            Kind.FILL: self._fill,
            Kind.STEP: self._step,
            Kind.ASK: self._harm,
        }

    @property
    def done(self) -> bool:
        """Whether all planned faults have been injected and repaired."""
        return not self._due

    def expect(self, fault: Fault) -> None:
        """Strike when it is time."""
        self._at(self._began + fault.at, lambda: self._strike(fault))

    def tend(self) -> None:
        """Do what is due."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()

    def _at(self, when: float, act: Act) -> None:
        heapq.heappush(self._due, (when, next(self._turn), act))

    def _strike(self, fault: Fault) -> None:
        try:
            repair = self._acts[fault.kind](fault)
        except SkippedError as why:
            self._recorder.note(Struck(fault=fault.kind, target=fault.target, skipped=str(why)))
            return
        self._recorder.note(Struck(fault=fault.kind, target=fault.target))
        if repair is not None:
            self._at(time.monotonic() + fault.seconds, repair)

    def _kill(self, fault: Fault) -> None:
        if not self._fleet.crew.signal(self._named(fault.target), signal.SIGKILL):
            raise SkippedError("it starts just now")

    def _freeze(self, fault: Fault) -> Act:
        if fault.target in ("store", "broker"):
            pid = self._server_pid(fault.target)
        else:
            pid = self._fleet.crew.pid(self._named(fault.target))
        _signal(pid, signal.SIGSTOP)
        return lambda: _signal(pid, signal.SIGCONT)

    def _restart(self, fault: Fault) -> None:
        fleet = self._fleet
        if fault.target == "broker" and fleet.broker is not None:
            fleet.broker.kill()
            fleet.broker.start()
        else:
            fleet.store.kill()
            fleet.store.restart()

    def _fail_over(self, fault: Fault) -> None:
        store = self._fleet.store
        if not store.in_step(0.0):
            raise SkippedError("the replica is not in step yet")
        window = store.fail_over()
        if window is None:
            raise SkippedError("the replica is too far behind")
        self._recorder.note(Parted(window=window))
        for name, cable in self._fleet.cables.items():
            if name.endswith("to store"):
                cable.redirect("127.0.0.1", store.port)
        store.rejoin()

    def _cut(self, fault: Fault) -> None:
        self._fleet.cables[fault.target].cut()

    def _pull(self, fault: Fault) -> Act:
        cable = self._fleet.cables[fault.target]
        cable.pull()
        return cable.plug

    def _delay(self, fault: Fault) -> Act:
        cable = self._fleet.cables[fault.target]
        cable.delay = SLOW
        return lambda: setattr(cable, "delay", 0.0)

    def _fill(self, fault: Fault) -> Act:
        store = self._fleet.store
        if not store.has_disks:
            raise SkippedError("only root can make a small disk")
        store.fill()
        return store.empty

    def _step(self, fault: Fault) -> Act:
        clock = self._fleet.clocks.get(fault.target)
        if clock is None:
            raise SkippedError("libfaketime is not there (Debian: faketime)")
        clock.write_text(f"+{STEP}")
        return lambda: clock.write_text("+0")

    def _harm(self, fault: Fault) -> None:
        self._ask(fault.target)

    def _named(self, target: str) -> str:
        """The process that is meant: who leads is asked for."""
        if target != LEADER:
            return target
        try:
            with redis.Redis.from_url(self._fleet.store.primary.url, socket_timeout=1) as client:
                token: bytes = client.get(LEAD) or b""
        except redis.RedisError as error:
            raise SkippedError("the store does not say who leads") from error
        parts = token.decode().rsplit("-", 2)
        name = self._fleet.crew.named(int(parts[1])) if len(parts) == 3 else ""
        if not name:
            raise SkippedError("there is no leader")
        return name

    def _server_pid(self, target: str) -> int:
        broker = self._fleet.broker
        pid = broker.pid if target == "broker" and broker is not None else self._fleet.store.primary.pid
        assert pid is not None
        return pid


def _signal(pid: int, what: signal.Signals) -> None:
    """To the whole group: each child has one of its own."""
    try:
        os.killpg(pid, what)
    except ProcessLookupError:
        return  # it was killed meanwhile
