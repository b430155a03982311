"""Where a process of a fleet runs: it may be killed there, and another one started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.harness.processes import started


class Place:
    """A place for one process, which is started as the block begins."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._command, self._variables, self._log = list(command), variables, log
        self._life = ExitStack()
        self._pid = 0

    def __enter__(self) -> Place:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._life.close()

    def _start(self) -> None:
        self._pid = self._life.enter_context(started(self._command, self._variables, self._log))["pid"]

    def tell(self, what: signal.Signals) -> None:
        """Send the process a signal, if it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, what)

    async def replace(self) -> None:
        """Kill the process, and start another."""
        self.tell(signal.SIGKILL)
        await asyncio.to_thread(self._life.close)
        await asyncio.to_thread(self._start)
