"""Injects planned faults at their times, and repairs them afterwards."""

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
from tests.chaos.history import FailedOver, FaultInjected, Recorder
from tests.chaos.plan import LEADER, Fault, Kind

CLOCK_STEP = 300
"""Seconds by which a clock is stepped."""

DELAY = 0.15
"""Seconds of delay on a slow cable."""

Action = Callable[[], Any]


class SkippedError(Exception):
    """A fault cannot be injected; the text says why."""


class FaultInjector:
    """Injects faults into a fleet, from the thread that runs it. Times count from its creation.

    Args:
        ask: submits a job for a harmful model.
    """

    def __init__(self, fleet: Fleet, recorder: Recorder, ask: Callable[[str], None]) -> None:
        self._fleet, self._recorder, self._ask = fleet, recorder, ask
        self._due: list[tuple[float, int, Action]] = []
        self._sequence = itertools.count()
        self._began = time.monotonic()
        self._actions: dict[Kind, Callable[[Fault], Action | None]] = {
            Kind.KILL: self._kill,
            Kind.FREEZE: self._freeze,
            Kind.RESTART: self._restart,
            Kind.FAIL_OVER: self._fail_over,
            Kind.CUT: self._cut,
            Kind.PULL: self._pull,
            Kind.DELAY: self._delay,
            Kind.FILL: self._fill,
            Kind.STEP: self._step,
            Kind.ASK: self._ask_for_harmful_model,
        }

    @property
    def done(self) -> bool:
        """Whether all planned faults were injected and repaired."""
        return not self._due

    def schedule(self, fault: Fault) -> None:
        """Schedule a fault."""
        self._at(self._began + fault.at, lambda: self._inject(fault))

    def poll(self) -> None:
        """Inject and repair what is due."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()

    def _at(self, when: float, action: Action) -> None:
        heapq.heappush(self._due, (when, next(self._sequence), action))

    def _inject(self, fault: Fault) -> None:
        try:
            repair = self._actions[fault.kind](fault)
        except SkippedError as why:
            self._recorder.record(FaultInjected(fault=fault.kind, target=fault.target, skipped=str(why)))
            return
        self._recorder.record(FaultInjected(fault=fault.kind, target=fault.target))
        if repair is not None:
            self._at(time.monotonic() + fault.seconds, repair)

    def _kill(self, fault: Fault) -> None:
        if not self._fleet.processes.signal(self._named(fault.target), signal.SIGKILL):
            raise SkippedError("the process is starting")

    def _freeze(self, fault: Fault) -> Action:
        if fault.target in ("store", "rabbit"):
            pid = self._server_pid(fault.target)
        else:
            pid = self._fleet.processes.pid(self._named(fault.target))
        _signal(pid, signal.SIGSTOP)
        return lambda: _signal(pid, signal.SIGCONT)

    def _restart(self, fault: Fault) -> None:
        fleet = self._fleet
        if fault.target == "rabbit" and fleet.rabbit is not None:
            fleet.rabbit.kill()
            fleet.rabbit.start()
        else:
            fleet.store.kill()
            fleet.store.restart()

    def _fail_over(self, fault: Fault) -> None:
        store = self._fleet.store
        if not store.in_sync(0.0):
            raise SkippedError("the replica is not in sync yet")
        window = store.fail_over()
        if window is None:
            raise SkippedError("the replica is too far behind")
        self._recorder.record(FailedOver(window=window))
        for name, cable in self._fleet.cables.items():
            if name.endswith("to store"):
                cable.redirect("127.0.0.1", store.port)
        store.rejoin()

    def _cut(self, fault: Fault) -> None:
        self._fleet.cables[fault.target].cut()

    def _pull(self, fault: Fault) -> Action:
        cable = self._fleet.cables[fault.target]
        cable.pull()
        return cable.plug

    def _delay(self, fault: Fault) -> Action:
        cable = self._fleet.cables[fault.target]
        cable.delay = DELAY
        return lambda: setattr(cable, "delay", 0.0)

    def _fill(self, fault: Fault) -> Action:
        store = self._fleet.store
        if not store.has_disks:
            raise SkippedError("only root can mount a small disk")
        store.fill()
        return store.empty

    def _step(self, fault: Fault) -> Action:
        clock = self._fleet.clocks.get(fault.target)
        if clock is None:
            raise SkippedError("libfaketime is not installed (Debian: faketime)")
        clock.write_text(f"+{CLOCK_STEP}")
        return lambda: clock.write_text("+0")

    def _ask_for_harmful_model(self, fault: Fault) -> None:
        self._ask(fault.target)

    def _named(self, target: str) -> str:
        """The target's process; the leader is looked up."""
        if target != LEADER:
            return target
        try:
            with redis.Redis.from_url(self._fleet.store.primary.url, socket_timeout=1) as client:
                token: bytes = client.get(LEAD) or b""
        except redis.RedisError as error:
            raise SkippedError("the store is unavailable: the leader is unknown") from error
        parts = token.decode().rsplit("-", 2)
        name = self._fleet.processes.named(int(parts[1])) if len(parts) == 3 else ""
        if not name:
            raise SkippedError("there is no leader")
        return name

    def _server_pid(self, target: str) -> int:
        rabbit = self._fleet.rabbit
        pid = rabbit.pid if target == "rabbit" and rabbit is not None else self._fleet.store.primary.pid
        assert pid is not None
        return pid


def _signal(pid: int, what: signal.Signals) -> None:
    """Signal the process group: each child has one of its own."""
    try:
        os.killpg(pid, what)
    except ProcessLookupError:
        return  # it has exited
