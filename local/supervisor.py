"""Starts a fleet's processes, keeps them running, and stops them in order: workers, router, Flower, broker.

If a process fails during the start, the start fails. A process that ends later is restarted, without a limit.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from local.children import kill_group, open_log, start_child, tail
from local.embedded import EmbeddedValkey, EmbeddedValkeyError
from tasks.settings import TREE
from taxiway.backoff import Backoff
from taxiway.cli import EXIT_CODES, MISSING, CommandError

CHECK_EVERY = 0.1
"""Seconds between checks of the processes."""

START_TIMEOUT = 240.0
"""Seconds within which all processes must be ready: the first start compiles JAX programs, possibly on one core."""

SECOND_STOP = 5.0
"""Seconds that a process has to end after the second request."""

RESTARTS = Backoff(0.5, 30.0)
"""Before a failed process is restarted: it is never given up."""

HEALTHY_AFTER = 60.0
"""Seconds for which a process must have been ready before its earlier failures no longer count."""

CLEAN = (0, -signal.SIGTERM)
"""Exit statuses of a process that was asked to end: its end is no failure."""

_LINE = 300  # characters of a log's last line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: time (seconds since the epoch), reason, and the last line of its log."""

    at: float
    why: str
    last_line: str


def exit_reason(status: int) -> str:
    """An exit status in words; negative for a signal, as in `subprocess`."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def exit_of(status: int, log: Path) -> Exit:
    """The exit of a process that has just ended with this status, and wrote this log."""
    lines = [text for line in tail(log).splitlines() if (text := _readable(line))]
    return Exit(time.time(), exit_reason(status), lines[-1][:_LINE] if lines else "")


def _readable(line: str) -> str:
    """A line of a log as text for people; empty for the line that announces a ready process."""
    fields = _object(line.encode())
    if "ready" in fields:
        return ""
    error = str(fields.get("error", "")).strip().rpartition("\n")[2]
    return ": ".join(filter(None, (str(fields.get("event", "")), error))) or line.strip()


def own_command(*arguments: str) -> list[str]:
    """`python -m local` with `arguments`, to be run `in_tree`, whatever packages the current folder has."""
    return [sys.executable, "-P", "-m", "local", *arguments]


def in_tree(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this checkout's packages importable, whatever the current folder."""
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, (str(TREE), environment.get("PYTHONPATH"))))}


class SupervisedProcess:
    """A `python` command whose stdout and stderr go to a log file.

    Args:
        name: unique in the fleet; also the log's name.
        arguments: of the interpreter.
        announces: whether it writes a JSON line with the field `ready` to stdout once it is ready.
        timeout: seconds that it has to end when asked.

    `announced` has the fields of its last ready line, also while it restarts. It is `wanted` until `retire`; its
    supervisor starts wanted processes. A `resting` process is not running, as intended. `restarts` counts its failures
    and `last_exit` says how it failed last, until it has been healthy for a minute. `due` is the time of its next
    restart by the monotonic clock, None while it runs.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        *,
        announces: bool,
        timeout: float = 10.0,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self.log = logs / f"{name}.log"
        self.restarts = 0
        self.last_exit: Exit | None = None
        self.due: float | None = None
        self._failures = 0
        self._ready_since: float | None = None
        self.announced: Mapping[str, Any] = {}
        self.wanted = self.resting = True
        self.retired = False
        self._arguments = [sys.executable, "-u", *arguments]
        self._environment = dict(environment)
        self._announces = announces
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The child process, running or ended."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it is ready, as far as it announces that."""
        return self._ready_since is not None

    def start(self) -> None:
        """Start it in the checkout; it is killed when the calling thread ends."""
        self.rest()
        self.resting = False
        if not self._announces:
            self._ready_since = time.monotonic()
        with open_log(self.log) as log:
            self._process = start_child(
                self._arguments,
                environment=self._environment,
                folder=TREE,
                output=subprocess.PIPE if self._announces else log.fileno(),
                errors=log.fileno(),
            )
        if self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    def retire(self) -> None:
        """Ask it to finish its work and end; it is no longer wanted."""
        self.wanted = False
        if self.resting or not self.alive:
            self.resting = True
        else:
            self.retired = True
            self.process.terminate()

    def rest(self) -> None:
        """Mark it as resting, after an expected end."""
        self.close()
        self.due = self._ready_since = None
        self._unread = b""
        self.retired, self.resting = False, True

    def listen(self) -> None:
        """Copy new output from stdout to its log, and look for the ready line."""
        stream = self.process.stdout
        if stream is None or stream.closed:
            return
        written = stream.read()
        if written:
            with suppress(OSError), open_log(self.log) as log:  # a full disk
                log.write(written)
            self._look_for_ready(written)
        elif written == b"":
            stream.close()

    def close(self) -> None:
        """Read the remaining output of an ended process, and close the pipe."""
        if self._process is not None and self._process.stdout is not None:
            self.listen()
            self._process.stdout.close()

    @property
    def healthy(self) -> bool:
        """Whether it has been ready for so long that earlier failures no longer count."""
        return self._ready_since is not None and time.monotonic() - self._ready_since >= HEALTHY_AFTER

    def forget_failures(self) -> None:
        """Let it count as one that never failed."""
        self.restarts, self.last_exit, self._failures = 0, None, 0

    def note_exit(self) -> bool:
        """Record that it has just ended, and the time of the restart; returns whether that was a failure."""
        self.close()
        self._failures = 1 if self.healthy else self._failures + 1
        self.due = time.monotonic() + RESTARTS.pause(self._failures)
        if self.process.returncode in CLEAN:
            return False
        self.restarts += 1
        self.last_exit = exit_of(self.process.returncode, self.log)
        return True

    def _look_for_ready(self, written: bytes) -> None:
        *lines, self._unread = (self._unread + written).split(b"\n")
        for line in lines:
            fields = _object(line)
            if "ready" in fields:
                self.announced, self._ready_since = fields, time.monotonic()


def _object(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return {}


class StartError(Exception):
    """The fleet did not come up: which process, why, and the end of its log."""


_ERROR = re.compile(r"^error: (.*?)(?:\nhint: (.*))?\Z", re.MULTILINE | re.DOTALL)


def ended_with(said: str, status: int) -> CommandError:
    """What a `taxiway up` that did not come up wrote to stderr, as this command's own error, with its exit code."""
    found = _ERROR.search(said.strip())
    message, hint = (found[1], found[2] or "") if found else (said.strip(), "")
    return CommandError(message, hint=hint, code=status if status in EXIT_CODES else MISSING)


class Supervisor:
    """Keeps processes running until `request_stop`. For one thread: children are killed when it ends.

    Args:
        broker: the embedded server; None if the user has servers.
        groups: processes in stop order; those of one group stop together.
    """

    def __init__(self, broker: EmbeddedValkey | None, groups: Sequence[Sequence[SupervisedProcess]]) -> None:
        self._broker = broker
        self._groups = groups
        self._broker_failures = 0
        self._broker_due = 0.0
        self.broker_restarts = 0
        self.broker_exit: Exit | None = None
        self._changed = self._untold = False
        self._stops = 0
        self._wake = SimpleQueue[None]()

    def request_stop(self) -> None:
        """Make `start` and `watch` return soon, and the second time `stop` too.

        Safe in a signal handler, also in one that interrupts this: an Event's lock would be held by the interrupted.
        """
        self._stops += 1
        self._wake.put(None)

    def start(self, healthy: Callable[[], bool], *, timeout: float) -> bool:
        """Start all, and wait until each is ready and then `healthy()`; False if `request_stop` was called meanwhile.

        Raises:
            StartError: a process ended, or is not ready after `timeout` seconds.
        """
        for process in self._all():
            if process.wanted:
                process.start()
        end = time.monotonic() + timeout
        while not self._stopping():
            self._check_start()
            if all(p.ready for p in self._running()) and healthy():
                return True
            if time.monotonic() > end:
                raise self._too_late(timeout)
        return False

    def watch(
        self,
        changed: Callable[[], object],
        tending: Iterable[Callable[[], None]],
        ended: Callable[[SupervisedProcess], None] = lambda _: None,
    ) -> None:
        """Start wanted processes and restart those that ended, until `request_stop`.

        `changed` is called after a process became ready or ended, and again if it raises `OSError`, as it does while
        the disk is full; `ended` before that with one that ended. `tending` may change which processes are wanted.
        """
        while not self._stopping():
            self._watch_broker()
            for tend in tending:
                tend()
            for process in self._all():
                if not process.resting:
                    self._watch_process(process, ended)
                elif process.wanted:
                    process.start()
            if self._changed:
                self._tell(changed)

    def stop(self) -> None:
        """Stop everything in order; each process has its timeout, or until `request_stop`, then it is killed."""
        self._stops = max(self._stops, 1)
        for group in self._groups:
            _stop_group([p for p in group if not p.resting], lambda: self._stops > 1)
        if self._broker is not None:
            self._broker.stop()

    def _stopping(self) -> bool:
        """Whether it was asked to stop, or is within `CHECK_EVERY` seconds."""
        if not self._stops:
            with suppress(Empty):
                self._wake.get(timeout=CHECK_EVERY)
        return self._stops > 0

    def _all(self) -> Iterable[SupervisedProcess]:
        """Every process in start order, the reverse of the stop order."""
        return [process for group in reversed(self._groups) for process in group]

    def _running(self) -> list[SupervisedProcess]:
        return [process for process in self._all() if not process.resting]

    def _check_start(self) -> None:
        for process in self._running():
            process.listen()
            if not process.alive:
                why = exit_reason(process.process.returncode)
                raise StartError(f"{process.name} {why}; {process.log} ends with:\n{tail(process.log)}")

    def _too_late(self, timeout: float) -> StartError:
        waiting = [p for p in self._running() if not p.ready]
        if not waiting:
            return StartError(f"all processes run, and the fleet was not healthy within {timeout:g} s")
        first = waiting[0]
        names = ", ".join(p.name for p in waiting)
        return StartError(f"not ready within {timeout:g} s: {names}; {first.log} ends with:\n{tail(first.log)}")

    def _tell(self, changed: Callable[[], object]) -> None:
        try:
            changed()
        except OSError as error:
            if not self._untold:
                logger.error("cannot describe the fleet", extra={"error": str(error)})
            self._untold = True
        else:
            self._changed = self._untold = False

    def _watch_broker(self) -> None:
        """Restart the broker if it ended; other restarts wait until it is running."""
        now = time.monotonic()
        if self.broker_exit is not None and now - self._broker_due >= HEALTHY_AFTER:
            self.broker_restarts, self.broker_exit, self._changed = 0, None, True
        if self._broker is None or self._broker.pid is not None or now < self._broker_due:
            return
        if self._broker.status is not None:
            self.broker_exit = exit_of(self._broker.status, self._broker.log)
            extra = {"why": self.broker_exit.why, "log": str(self._broker.log)}
            logger.error("broker ended, restarting", extra=extra)
        try:
            self._broker.start()
        except (EmbeddedValkeyError, OSError) as error:  # a read-only disk
            self._broker_failures += 1
            self._broker_due = now + RESTARTS.pause(self._broker_failures)
            logger.error("broker cannot be started", extra={"error": str(error)})
            return
        self._broker_failures, self._broker_due = 0, now
        self.broker_restarts += 1
        self._changed = True

    def _watch_process(self, process: SupervisedProcess, ended: Callable[[SupervisedProcess], None]) -> None:
        was_ready = process.ready
        process.listen()
        if process.ready and not was_ready:
            self._changed = True
        if process.alive:
            if process.last_exit is not None and process.healthy:
                process.forget_failures()
                self._changed = True
            return
        if process.retired:
            process.rest()
            self._changed = True
        elif process.due is None:
            self._note_exit(process)
            ended(process)
            self._changed = True
        elif time.monotonic() >= process.due:
            process.start()
            self._changed = True

    def _note_exit(self, process: SupervisedProcess) -> None:
        """Record the exit, and kill the orphaned children of the process."""
        level = logging.WARNING if process.note_exit() else logging.INFO
        kill_group(process.process)
        why = exit_reason(process.process.returncode)
        facts = {"child": process.name, "why": why, "log": str(process.log)}
        logger.log(level, "process ended, restarting", extra=facts)


def _stop_group(group: Sequence[SupervisedProcess], hurried: Callable[[], bool]) -> None:
    _terminate(group)
    asked, again = time.monotonic(), False
    while left := [p for p in group if p.alive and time.monotonic() < asked + (SECOND_STOP if again else p.timeout)]:
        for process in left:
            process.listen()
        if hurried() and not again:
            _terminate(group)  # the second request: stop at once
            asked, again = time.monotonic(), True
        time.sleep(CHECK_EVERY / 2)
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
