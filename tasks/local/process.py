"""One process that a supervisor keeps up: its log, its line when it is ready, and when to start it anew."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tasks.children import start_child
from tasks.settings import TREE

FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
WINDOW = 120.0
MOST_DEATHS = 6
_TAIL = 2000  # characters of a log in an error


def restart_delay(deaths: Sequence[float], now: float) -> float | None:
    """Seconds to wait before a process that died at `deaths` is started anew; None: it died too often, give it up.

    The delay doubles with each death within `WINDOW` seconds, up to `LONGEST_DELAY`.
    """
    recent = sum(now - death < WINDOW for death in deaths)
    if recent > MOST_DEATHS:
        return None
    return min(FIRST_DELAY * 2.0 ** max(recent - 1, 0), LONGEST_DELAY)


def own_command(*arguments: str) -> list[str]:
    """`python -m tasks.local` with `arguments`, to be run `in_tree`: a folder named tasks at hand does no harm."""
    return [sys.executable, "-P", "-m", "tasks.local", *arguments]


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

    It is `wanted` until it is told to `retire`; who supervises it starts it. `resting` ones do not run and need not.
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
        self.deaths: list[float] = []
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
        return bool(self.said) or not self._announces

    def start(self) -> None:
        """Start it, in the checkout; it dies with the calling thread."""
        self.rest()
        self.resting = False
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
        """It has ended, and nobody is to wonder at that."""
        self.close()
        self.said = {}
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

    def note_death(self) -> float | None:
        """Remember that it died now, and when it is due to be started anew (monotonic); None: no more."""
        now = time.monotonic()
        self.deaths.append(now)
        delay = restart_delay(self.deaths, now)
        return None if delay is None else now + delay

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_TAIL:].strip()

    def _look_for_ready(self, written: bytes) -> None:
        *lines, self._unread = (self._unread + written).split(b"\n")
        for line in lines:
            said = _object(line)
            if "ready" in said:
                self.said = said


def _object(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return {}
