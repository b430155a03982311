"""Kills a worker's process groups when the worker is gone, even after `kill -9`.

Run as a script, it reads lines from a pipe whose other end only the worker holds: `+GROUP` to watch a group,
`-GROUP` to release it. When the pipe closes, it kills the watched groups. It runs in its own session, which a signal to
the worker's group does not reach, and ignores termination signals.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path


class Keeper:
    """This process's keeper, which starts with the first group. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self, group: int) -> None:
        """Kill the group when this process is gone."""
        with self._lock:
            self._groups.add(group)
            self._send(b"+%d\n" % group)

    def release(self, group: int) -> None:
        """The group has exited."""
        with self._lock:
            self._groups.discard(group)
            self._send(b"-%d\n" % group)

    def _send(self, line: bytes) -> None:
        try:
            self._write(line)
        except BrokenPipeError:  # it was killed
            self._process = None
            self._write(b"".join(b"+%d\n" % group for group in self._groups))

    def _write(self, lines: bytes) -> None:
        if self._process is None:
            command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True
            )
            atexit.register(self._process.communicate)  # closes the pipe and waits for it to exit
        assert self._process.stdin is not None
        self._process.stdin.write(lines)


@cache
def own_keeper() -> Keeper:
    """The keeper of this process."""
    return Keeper()


def _watch(lines: Iterable[bytes]) -> None:
    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(which, signal.SIG_IGN)
    groups: set[int] = set()
    for line in lines:
        change = groups.add if line[:1] == b"+" else groups.discard
        change(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    _watch(sys.stdin.buffer)
