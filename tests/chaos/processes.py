"""The fleet's router and worker processes by name, each restarted when it exits."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from local.children import kill_group
from local.supervisor import SupervisedProcess

_PAUSE = 0.5  # seconds between an exit and the restart
_GRACE = 15.0  # seconds to exit after SIGTERM


@dataclass(slots=True)
class _Slot:
    process: SupervisedProcess
    ended: float = 0.0


class Processes:
    """Routers and workers. For one thread: children end with the thread that started them."""

    def __init__(self, processes: Mapping[str, SupervisedProcess]) -> None:
        self._slots = {name: _Slot(process) for name, process in processes.items()}
        self.ends: Counter[str] = Counter()

    def start(self) -> None:
        """Start all processes."""
        for slot in self._slots.values():
            slot.process.start()

    @property
    def ready(self) -> bool:
        """Whether all processes run and reported that they are ready."""
        self.poll()
        return all(slot.process.alive and slot.process.ready for slot in self._slots.values())

    def poll(self) -> None:
        """Read the processes' output and restart those that exited."""
        for name, slot in self._slots.items():
            slot.process.listen()
            if slot.process.alive:
                continue
            if not slot.ended:
                slot.ended = time.monotonic()
                self.ends[f"{name.partition('-')[0]} {slot.process.process.returncode}"] += 1
            elif time.monotonic() - slot.ended > _PAUSE:
                slot.process.start()
                slot.ended = 0.0

    def pid(self, name: str) -> int:
        """The process id of that name, or its last one."""
        return self._slots[name].process.process.pid

    def named(self, pid: int) -> str:
        """The name of a process id; empty if unknown."""
        return next((name for name in self._slots if self.pid(name) == pid), "")

    def signal(self, name: str, what: signal.Signals) -> bool:
        """Send a signal; False if the process is not running."""
        process = self._slots[name].process
        if not process.alive:
            return False
        os.kill(process.process.pid, what)
        return True

    def stop(self) -> dict[str, bool]:
        """Terminate all, workers first; whether each exited before it was killed."""
        order = sorted(self._slots, reverse=True)
        return {name: _ended(self._slots[name].process) for name in order}


def _ended(process: SupervisedProcess) -> bool:
    child = process.process
    child.send_signal(signal.SIGCONT)
    child.terminate()
    end = time.monotonic() + _GRACE
    while child.poll() is None and time.monotonic() < end:
        process.listen()
        time.sleep(0.05)
    by_itself = child.poll() is not None
    kill_group(child)
    child.wait()
    process.close()
    return by_itself
