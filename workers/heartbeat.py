"""Says once a second what the device is doing, and keeps the claims of jobs that make progress.

A worker that can do neither ends itself, so that whatever started it starts another.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tasks.heartbeat import HEARTBEAT, DeviceFacts, Done, told_briefly
from taxiway.errors import BrokerFullError, BrokerUnavailableError
from workers.decide.pace import Track
from workers.device import memory_free, utilisation
from workers.drain import Departure
from workers.stages.device import DeviceLoop

logger = logging.getLogger(__name__)

RENEWALS = 3
"""A claim is renewed this many times within its lease, so that two may be lost."""

HUNG = 75
"""Exit status of a worker whose batch does not end (EX_TEMPFAIL of sysexits.h): its jobs run elsewhere."""

STUCK = 120.0
"""Seconds after which a process in which no thread got to run is ended, with every thread's traceback on stderr."""

UNREACHED = 300.0
"""Seconds without an answer of the store after which a worker that holds nothing ends: a new one looks it up again."""


class Pulse:
    """One device's heartbeat.

    Args:
        serves: names of the queues that the worker takes from.
        held: messages fetched and not finished.
        keep: renews what the worker has held for so many seconds: what is younger needs none yet.
        done: what it did so far, by class.
        alive: a file that is touched with each heartbeat that the store took.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        departure: Departure,
        hardware_class: str,
        *,
        serves: Callable[[], Sequence[str]],
        held: Callable[[], int],
        keep: Callable[[float], None],
        done: Callable[[], Mapping[str, Done]],
        alive: Path | None = None,
    ) -> None:
        self._loop = loop
        self._departure = departure
        self._hardware_class = hardware_class
        self._serves = serves
        self._held = held
        self._keep = keep
        self._done = done
        self._alive = alive
        self._answered_at = time.monotonic()
        self._store = loop.store
        due = self._store.limits.lease / RENEWALS
        self._period = min(HEARTBEAT, due)
        self._young = due - self._period
        self._stopped = threading.Event()
        self._retired = False
        self._away = False
        self._seen = (time.monotonic(), 0.0)
        self.facts = self._look()

    def run(self) -> None:
        """Beat until stopped."""
        beat_at = time.monotonic() + HEARTBEAT
        while not self._stopped.wait(self._period):
            expect_life(STUCK)
            self._watch()
            kept = self._say(lambda: self._keep(self._young))
            if self._retired and kept:
                self._sign()
            elif time.monotonic() >= beat_at and not self._retired:
                beat_at = time.monotonic() + HEARTBEAT
                self.beat()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Publish the facts now."""
        self.facts = self._look()
        if self._say(lambda: self._store.beat(self.facts)):
            self._sign()

    def retire(self) -> None:
        """Take the facts back, for good."""
        self._retired = True
        self._say(self._store.retire)

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()

    def shown(self) -> dict[str, Any]:
        """The last facts, for Celery's `inspect stats` and Flower; without the histograms, which nobody reads there."""
        plain: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(self.facts, done={}))
        return plain

    def _sign(self) -> None:
        """Show whoever looks at the file that the worker is alive."""
        if self._alive is not None:
            self._alive.touch()

    def _watch(self) -> None:
        """End the process when its batch hangs: the claims end with their lease, and other workers take the jobs.

        One that holds nothing ends, too, when the store has not answered it for long.
        """
        if time.monotonic() - self._answered_at > UNREACHED and not self._held():
            logger.critical("the state store has not answered for long: the worker ends", extra={"seconds": UNREACHED})
            os._exit(HUNG)
        if self._loop.hung(time.monotonic()):
            logger.critical(
                "a batch or a load does not end: the worker gives its jobs up", extra={"jobs": self._held()}
            )
            os._exit(HUNG)

    def _say(self, call: Callable[[], Any]) -> bool:
        """Tell the store; False where it did not take it. While it is away, say so once in the log."""
        try:
            call()
        except BrokerUnavailableError as error:
            if not self._away:
                logger.warning("no heartbeat", extra={"error": error.message})
            self._away = True
            if isinstance(error, BrokerFullError):
                self._answered_at = time.monotonic()
            return False
        self._away, self._answered_at = False, time.monotonic()
        return True

    def _look(self) -> DeviceFacts:
        executor = self._loop.executor
        device, loaded = executor.device, executor.all_loaded()
        tracks = {one.key: executor.track(one) for one in loaded}
        measured = utilisation(device)
        busy = self._busy_share()
        blocked, blocked_by = self._loop.blocked(time.monotonic())
        return DeviceFacts(
            worker=self._store.worker,
            hardware_class=self._hardware_class,
            device=device.label,
            kind=device.kind,
            emulated=device.emulated,
            name=device.name,
            memory_total=device.memory,
            memory_free=memory_free(device),
            memory_used=executor.memory_used(),
            utilisation=busy if measured is None else measured,
            instruction_sets=device.instruction_sets,
            runtimes=device.runtimes,
            warm=tuple(sorted(one.key for one in loaded)),
            unavailable=dict(executor.unavailable),
            held=self._held(),
            running=self._loop.running,
            batch_age=told_briefly(self._loop.batch_age(time.monotonic())),
            occupied=told_briefly(self._loop.occupied(time.monotonic())),
            blocked=told_briefly(blocked),
            blocked_by=blocked_by,
            pace={key: told_briefly(track.pace) for key, track in tracks.items()},
            residual={key: _residuals(track) for key, track in tracks.items()},
            drifted=tuple(sorted(key for key, track in tracks.items() if track.drifted)),
            serves=self._served(),
            draining=self._departure.told,
            done=dict(self._done()),
        )

    def _served(self) -> tuple[str, ...] | None:
        """The classes that the worker takes from, its own first, as facts have them."""
        own = self._hardware_class
        serves = tuple(sorted(self._serves(), key=lambda name: (name != own, name)))
        return None if serves == (own,) else serves

    def _busy_share(self) -> float:
        """Share of the time since the last look that the device computed."""
        now = time.monotonic()
        computed = self._loop.computed(now)
        then, had_computed = self._seen
        self._seen = (now, computed)
        return min(max((computed - had_computed) / max(now - then, 1e-9), 0.0), 1.0)


def expect_life(seconds: float) -> None:
    """End the process unless this is called again within so many seconds. It needs no thread of Python's for that."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


def _residuals(track: Track) -> tuple[float, ...]:
    """The residuals by level as facts have them: without the last ones, where they repeat the one before."""
    told = [told_briefly(residual) for residual in track.residuals]
    while len(told) > 1 and told[-1] == told[-2]:
        told.pop()
    return tuple(told)
