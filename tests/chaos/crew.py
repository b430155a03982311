"""The fleet's own processes, under names, each started again whenever it ends."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from local.children import kill_group
from local.supervisor import SupervisedProcess

_PAUSE = 0.5  # seconds between an end and the next start
_GRACE = 15.0  # seconds to end when asked


@dataclass(slots=True)
class _Seat:
    process: SupervisedProcess
    ended: float = 0.0


class Crew:
    """Routers and workers. All calls come from one thread: children are tied to it."""

    def __init__(self, processes: Mapping[str, SupervisedProcess]) -> None:
        self._seats = {name: _Seat(process) for name, process in processes.items()}
        self.ends: Counter[str] = Counter()

    def start(self) -> None:
        """Start all."""
        for seat in self._seats.values():
            seat.process.start()

    @property
    def ready(self) -> bool:
        """Whether all run, and said that they are ready."""
        self.tend()
        return all(seat.process.alive and seat.process.ready for seat in self._seats.values())

    def tend(self) -> None:
        """Take what they said, and start those that ended."""
        for name, seat in self._seats.items():
            seat.process.listen()
            if seat.process.alive:
                continue
            if not seat.ended:
                seat.ended = time.monotonic()
                self.ends[f"{name.partition('-')[0]} {seat.process.process.returncode}"] += 1
            elif time.monotonic() - seat.ended > _PAUSE:
                seat.process.start()
                seat.ended = 0.0

    def pid(self, name: str) -> int:
        """The process of that name, or the last that was."""
        return self._seats[name].process.process.pid

    def named(self, pid: int) -> str:
        """Which of them this is; empty where it is none."""
        return next((name for name in self._seats if self.pid(name) == pid), "")

    def signal(self, name: str, what: signal.Signals) -> bool:
        """Send a signal; False where it does not run just now."""
        process = self._seats[name].process
        if not process.alive:
            return False
        os.kill(process.process.pid, what)
        return True

    def stop(self) -> dict[str, bool]:
        """Ask all to end, workers first; which did by themselves."""
        order = sorted(self._seats, reverse=True)
        return {name: _ended(self._seats[name].process) for name in order}


def _ended(process: SupervisedProcess) -> bool:
    child = process.process
    child.send_signal(signal.SIGCONT)
    child.terminate()
    end = time.monotonic() + _GRACE
    while child.poll() is None and time.monotonic() < end:
        process.listen()
        time.sleep(0.05)
    asked = child.poll() is not None
    kill_group(child)
    child.wait()
    process.close()
    return asked
