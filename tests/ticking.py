"""A router as it ships, whose event loop also tells how long it stood still: `python -m tests.ticking`.

A ticker in the loop writes a line for each stall to the file that `TAXIWAY_TEST_STALLS` names: the seconds of processor
time that this process spent between two of its ticks. Time during which others had the processor does not count, and
time that another thread held the interpreter's lock does.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import api.__main__ as shipped
from api.routing.router import HttpRouter
from tasks.settings import Settings
from tests.routing import RouterProcess, router_process

TICK = 0.002
"""Seconds between two ticks."""

LEAST = 0.01
"""Least seconds of a reported stall."""

LONGEST = 0.1
"""Seconds for which no request may hold the event loop."""

_FILE = "TAXIWAY_TEST_STALLS"


ATTEMPTS = 3
"""Times that a busy machine may make a stall seem longer than it is."""


class Stalls:
    """The stalls that a ticking router reported so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def longest(self) -> float:
        """Seconds of the longest stall since the last call; 0 where there was none to tell."""
        answer = [float(line) for line in self._path.read_text().splitlines()]
        new, self._read = answer[self._read :], len(answer)
        return max(new, default=0.0)

    def least(self, ask: Callable[[], object]) -> float:
        """Seconds of the longest stall while something is asked: the least of some attempts."""
        least = math.inf
        for _ in range(ATTEMPTS):
            self.longest()
            ask()
            least = min(least, self.longest())
            if least < LONGEST:
                break
        return least


@contextmanager
def ticking_router(
    settings: Settings, folder: Path, log: Any = None, options: Sequence[str] = ()
) -> Iterator[tuple[RouterProcess, Stalls]]:
    """A router that is ready, and its stalls from now on."""
    path = folder / "stalls"
    path.touch()
    with router_process(settings, log, options, module="tests.ticking", environment={_FILE: str(path)}) as process:
        stalls = Stalls(path)
        stalls.longest()
        yield process, stalls


async def _tick(file: IO[str]) -> None:
    before = time.process_time()
    while True:
        await asyncio.sleep(TICK)
        now = time.process_time()
        if now - before > LEAST:
            file.write(f"{now - before:.4f}\n")
        before = now


def main() -> int:
    """The router's own command."""
    serve = shipped.serve

    async def ticking(
        make: Callable[[], HttpRouter], listening: shipped.Listening, environment: Mapping[str, str]
    ) -> int:
        with Path(os.environ[_FILE]).open("a", buffering=1) as file:
            ticker = asyncio.create_task(_tick(file))
            try:
                return await serve(make, listening, environment)
            finally:
                ticker.cancel()

    shipped.serve = ticking
    return shipped.main(os.environ)


if __name__ == "__main__":
    sys.exit(main())
