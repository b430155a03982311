"""Starts a fleet's processes, keeps them up, and stops them in order: workers, router, Flower, broker.

A process that does not come up when the fleet starts ends the start; one that fails later is restarted, however often.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from local.children import kill_group
from local.embedded import EmbeddedValkey, EmbeddedValkeyError
from local.process import Exit, SupervisedProcess, exit_of, exit_reason, restart_delay

TICK = 0.1
"""Seconds between two looks at the processes."""

AT_ONCE = 5.0
"""Seconds that a process has to end once it was asked for the second time."""

logger = logging.getLogger(__name__)


class StartError(Exception):
    """The fleet did not come up: which process, why, and the end of its log."""


class Supervisor:
    """Keeps processes up until it is told to stop, from one thread: children are tied to that of their start.

    Args:
        broker: the embedded server; None where the user has servers.
        groups: processes in the order in which they are stopped; those of one group stop together.
    """

    def __init__(self, broker: EmbeddedValkey | None, groups: Sequence[Sequence[SupervisedProcess]]) -> None:
        self._broker = broker
        self._groups = groups
        self._broker_failures = 0
        self._broker_due = 0.0
        self.broker_restarts = 0
        self.broker_exit: Exit | None = None
        self._stopping = threading.Event()
        self._hurried = threading.Event()

    def request_stop(self) -> None:
        """Make `start` and `watch` return soon; for the second time, `stop` too. Safe in a signal handler."""
        (self._hurried if self._stopping.is_set() else self._stopping).set()

    def start(self, healthy: Callable[[], bool], *, patience: float) -> bool:
        """Start all, and wait until each said that it is ready and then `healthy()`. False: told to stop meanwhile.

        Raises:
            StartError: a process ended, or is not ready after `patience` seconds.
        """
        for process in self._all():
            if process.wanted:
                process.start()
        end = time.monotonic() + patience
        while not self._stopping.wait(TICK):
            self._check_start()
            if all(p.ready for p in self._running()) and healthy():
                return True
            if time.monotonic() > end:
                raise self._too_late(patience)
        return False

    def watch(
        self,
        changed: Callable[[], None],
        tend: Callable[[], None],
        failed: Callable[[SupervisedProcess], None] = lambda _: None,
    ) -> None:
        """Start what is wanted and restart what fails, until told to stop.

        `changed` is called after a process came up or ended, `failed` before that with one that ended unasked; `tend`
        may change what is wanted.
        """
        while not self._stopping.wait(TICK):
            self._watch_broker(changed)
            tend()
            for process in self._all():
                if not process.resting:
                    self._watch_process(process, changed, failed)
                elif process.wanted:
                    process.start()

    def stop(self) -> None:
        """Stop everything in order; each process has its patience, or until `request_stop`, then it is killed."""
        self._stopping.set()
        for group in self._groups:
            _stop_group([p for p in group if not p.resting], self._hurried)
        if self._broker is not None:
            self._broker.stop()

    def _all(self) -> Iterable[SupervisedProcess]:
        """Every process, in the order of their start: the reverse of that of their end."""
        return [process for group in reversed(self._groups) for process in group]

    def _running(self) -> list[SupervisedProcess]:
        return [process for process in self._all() if not process.resting]

    def _check_start(self) -> None:
        for process in self._running():
            process.listen()
            if not process.alive:
                why = exit_reason(process.process.returncode)
                raise StartError(f"{process.name} {why}; {process.log} ends with:\n{process.tail()}")

    def _too_late(self, patience: float) -> StartError:
        waiting = [p for p in self._running() if not p.ready]
        if not waiting:
            return StartError(f"all processes run, and the fleet was not healthy within {patience:g} s")
        first = waiting[0]
        names = ", ".join(p.name for p in waiting)
        return StartError(f"not ready within {patience:g} s: {names}; {first.log} ends with:\n{first.tail()}")

    def _watch_broker(self, changed: Callable[[], None]) -> None:
        """Restart the broker where it ended; while it cannot be started, the others wait for it."""
        if self._broker is None or self._broker.pid is not None or time.monotonic() < self._broker_due:
            return
        if self._broker.status is not None:
            self.broker_exit = exit_of(self._broker.status, self._broker.log)
            extra = {"why": self.broker_exit.why, "log": str(self._broker.log)}
            logger.error("broker ended, restarting", extra=extra)
        try:
            self._broker.start()
        except EmbeddedValkeyError as error:
            self._broker_failures += 1
            self._broker_due = time.monotonic() + restart_delay(self._broker_failures)
            logger.error("broker cannot be started", extra={"error": str(error)})
            return
        self._broker_failures = 0
        self.broker_restarts += 1
        changed()

    def _watch_process(
        self, process: SupervisedProcess, changed: Callable[[], None], failed: Callable[[SupervisedProcess], None]
    ) -> None:
        was_ready = process.ready
        process.listen()
        if process.ready and not was_ready:
            changed()
        if process.alive:
            return
        if process.retired:
            process.rest()
            changed()
        elif process.due is None:
            self._note_exit(process)
            failed(process)
            changed()
        elif time.monotonic() >= process.due:
            process.restart()
            changed()

    def _note_exit(self, process: SupervisedProcess) -> None:
        """Note the failure, and end what the process had started: it belongs to nobody now."""
        process.note_exit()
        kill_group(process.process)
        assert process.last_exit is not None
        facts = {"child": process.name, "why": process.last_exit.why, "log": str(process.log)}
        logger.warning("process ended, restarting", extra=facts)


def _stop_group(group: Sequence[SupervisedProcess], hurried: threading.Event) -> None:
    _terminate(group)
    asked, again = time.monotonic(), False
    while left := [p for p in group if p.alive and time.monotonic() < asked + (AT_ONCE if again else p.patience)]:
        for process in left:
            process.listen()
        if hurried.is_set() and not again:
            _terminate(group)  # for the second time: now
            asked, again = time.monotonic(), True
        time.sleep(TICK / 2)
    for process in group:
        if process.alive:
            logger.warning("process did not stop, killed", extra={"child": process.name})
        kill_group(process.process)
        process.process.wait()
        process.close()


def _terminate(group: Sequence[SupervisedProcess]) -> None:
    for process in group:
        if process.alive:
            process.process.terminate()
