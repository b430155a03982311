"""Processes of a drill that end and are started again, and how requests to them end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import started
from taxiway.errors import OverloadedError, ResultTimeoutError, TaxiwayError


@dataclass
class Restartable:
    """A process that is killed and started again."""

    make: Callable[[], AbstractContextManager[Any]]
    stack: ExitStack = field(default_factory=ExitStack)
    now: Any = None

    def start(self) -> None:
        """Start it."""
        self.now = self.stack.enter_context(self.make())

    def kill(self) -> None:
        """Kill it."""
        self.stack.close()


async def to_its_end(call: Callable[[], None]) -> None:
    """Run a call in a thread. A cancelled caller waits for it, too: what it starts is ended with all else."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await running
        raise


class Place(Restartable):
    """A process of the fleet, by its command, which takes signals; it is started as the block begins."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        super().__init__(lambda: started(list(command), variables, log))

    def __enter__(self) -> Place:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, what: signal.Signals) -> None:
        """Send the process a signal, if it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self.now["pid"], what)

    async def replace(self) -> None:
        """Kill the process, and start another."""
        self.tell(signal.SIGKILL)
        await to_its_end(self.kill)
        await to_its_end(self.start)


async def outcome_of(answer: Awaitable[object]) -> str:
    """How a request ended: `answered`, `lost` (no result in time), `refused`, or the name of its error."""
    try:
        await answer
    except ResultTimeoutError:
        return "lost"
    except OverloadedError:
        return "refused"
    except TaxiwayError as error:
        return type(error).__name__
    return "answered"
