"""Starts a fleet's processes, keeps them running, and stops them in order: workers, router, Flower, broker.

If a process fails during the start, the start fails. A process that fails later is restarted, without a limit.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from local.children import kill_group, start_child
from local.embedded import EmbeddedValkey, EmbeddedValkeyError
from tasks.settings import TREE
from taxiway.cli import EXIT_CODES, MISSING, CommandError

TICK = 0.1
"""Seconds between checks of the processes."""

AT_ONCE = 5.0
"""Seconds that a process has to end after the second request."""

FIRST_DELAY = 0.5
"""Seconds before the first restart of a failed process; doubled with each further failure."""

LONGEST_DELAY = 30.0
"""Maximum seconds before a restart: a process is never given up."""

HEALTHY_AFTER = 60.0
"""Seconds for which a process must have been ready before its earlier failures no longer count."""

_TAIL = 2000  # characters of a log in an error
_LINE = 300  # characters of a log's last line


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: time (seconds since the epoch), reason, and the last line of its log."""

    at: float
    why: str
    last_line: str


def restart_delay(failures: int) -> float:
    """Seconds before a process is restarted that failed so many times in a row, 1 or more."""
    return min(FIRST_DELAY * 2.0 ** min(failures - 1, 16), LONGEST_DELAY)


def exit_reason(status: int) -> str:
    """What an exit status says; negative for a signal, as `subprocess` has it."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def exit_of(status: int, log: Path) -> Exit:
    """The exit of a process that ended just now with this status, and wrote this log."""
    said = [plain for line in _tail(log).splitlines() if (plain := _plain(line))]
    return Exit(time.time(), exit_reason(status), said[-1][:_LINE] if said else "")


def _plain(line: str) -> str:
    """What a line of a log says to people; nothing for the line that a process is ready."""
    fields = _object(line.encode())
    if "ready" in fields:
        return ""
    error = str(fields.get("error", "")).strip().rpartition("\n")[2]
    return ": ".join(filter(None, (str(fields.get("event", "")), error))) or line.strip()


def own_command(*arguments: str) -> list[str]:
    """`python -m local` with `arguments`, to be run `in_tree`: a folder named tasks at hand does no harm."""
    return [sys.executable, "-P", "-m", "local", *arguments]


def in_tree(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with this checkout's packages importable, whatever the current folder."""
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, (str(TREE), environment.get("PYTHONPATH"))))}


class SupervisedProcess:
    """A `python` command whose stdout and stderr go to a log file.

    Args:
        name: unique in the fleet; also the log's name.
        arguments: of the interpreter.
        announces: whether it writes a JSON line with the field `ready` to stdout once it is.
        patience: seconds that it has to end when it is asked to.

    `said` is what its last line that it is ready said, also while it is started again. It is `wanted` until it is told
    to `retire`; who supervises it starts it. `resting` ones do not run and need not.
    `restarts` counts how often it was restarted after it failed, `last_exit` says how it failed last, and `due` when it
    is to be restarted, by the monotonic clock; None while it runs.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        logs: Path,
        *,
        announces: bool,
        patience: float = 10.0,
    ) -> None:
        self.name = name
        self.patience = patience
        self.log = logs / f"{name}.log"
        self.restarts = 0
        self.last_exit: Exit | None = None
        self.due: float | None = None
        self._failures = 0
        self._ready_since: float | None = None
        self.said: Mapping[str, Any] = {}
        self.wanted = self.resting = True
        self.retired = False
        self._arguments = [sys.executable, "-u", *arguments]
        self._environment = dict(environment)
        self._announces = announces
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The child process, also when it has ended."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it said that it is ready, where it does say so."""
        return self._ready_since is not None

    def start(self) -> None:
        """Start it, in the checkout; it dies with the calling thread."""
        self.rest()
        self.resting = False
        if not self._announces:
            self._ready_since = time.monotonic()
        with self.log.open("ab") as log:
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
        """Ask it to finish and end; it is not wanted any more."""
        self.wanted = False
        if self.resting or not self.alive:
            self.resting = True
        else:
            self.retired = True
            self.process.terminate()

    def rest(self) -> None:
        """Its end is expected: it does not run, and need not."""
        self.close()
        self.due = self._ready_since = None
        self._unread = b""
        self.retired, self.resting = False, True

    def listen(self) -> None:
        """Move what it wrote to stdout since the last time into its log, and look for the line that it is ready."""
        stream = self.process.stdout
        if stream is None or stream.closed:
            return
        written = stream.read()
        if written:
            with self.log.open("ab") as log:
                log.write(written)
            self._look_for_ready(written)
        elif written == b"":
            stream.close()

    def close(self) -> None:
        """Take what an ended process left to read, and let go of it."""
        if self._process is not None and self._process.stdout is not None:
            self.listen()
            self._process.stdout.close()

    def note_exit(self) -> None:
        """Note that it failed just now, how, and when it is due to be restarted."""
        self.close()
        now = time.monotonic()
        healthy = self._ready_since is not None and now - self._ready_since >= HEALTHY_AFTER
        self._failures = 1 if healthy else self._failures + 1
        self.due = now + restart_delay(self._failures)
        self.last_exit = exit_of(self.process.returncode, self.log)

    def restart(self) -> None:
        """Start it again after it failed."""
        self.restarts += 1
        self.start()

    def tail(self) -> str:
        """The end of its log."""
        return _tail(self.log)

    def _look_for_ready(self, written: bytes) -> None:
        *lines, self._unread = (self._unread + written).split(b"\n")
        for line in lines:
            said = _object(line)
            if "ready" in said:
                self.said, self._ready_since = said, time.monotonic()


def _object(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return {}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_TAIL:].strip()


logger = logging.getLogger(__name__)


class StartError(Exception):
    """The fleet did not come up: which process, why, and the end of its log."""


_ERROR = re.compile(r"^error: (.*?)(?:\nhint: (.*))?\Z", re.MULTILINE | re.DOTALL)


def ended_with(said: str, status: int) -> CommandError:
    """What a `taxiway up` that did not come up wrote to stderr, as this command's own error, with its exit code."""
    found = _ERROR.search(said.strip())
    message, hint = (found[1], found[2] or "") if found else (said.strip(), "")
    return CommandError(message, hint=hint, code=status if status in EXIT_CODES else MISSING)


class Supervisor:
    """Keeps processes running until told to stop. For one thread: children die with the thread that started them.

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
        """Start wanted processes and restart failed ones, until told to stop.

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
        """Restart the broker if it ended; other restarts wait until it is running."""
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
        """Record the failure, and kill the orphaned children of the process."""
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
