"""Every fault of an engine, many times under load: what becomes of the jobs, and how often each was sent.

The fleet has two classes: `engine`, over TLS, fails, and `spare`, which costs more, does not. A *faulty* prompt fails
when it comes for the first time; the faults of the whole server last for a moment, again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from taxiway import AsyncClient
from taxiway.errors import ResultTimeoutError, TaxiwayError
from tests.builders import recorded
from tests.certificates import authority, self_signed
from tests.engine import Engine, serving

QUEUES = recorded("fleets/faults.yaml")

CLASSES = ("engine", "spare")

OF_PROMPTS = {
    "5xx": "status=500",
    "429": "status=429",
    "JSON instead of a stream": "status=200",
    "malformed SSE": "one garble",
    "truncated": "one cut",
    "broken connection": "one break",
    "stall": "one stall",
}
"""Scripts of the faults that single requests meet."""

OF_SERVERS = ("refused", "TLS", "other models")

NEVER_RAN = ("429",)
"""Faults of requests that the engine surely did not run."""

CALLERS = 16
AT_LEAST = 0.6
"""Seconds for which a whole server fails, and then works."""


@dataclass(slots=True)
class Tally:
    """What became of the jobs during one kind of fault.

    `lost` had no answer in time, `stated` ended with an error, `silent` with a wrong text and no error. `again` counts
    what was sent more often than once, and `known` those of them whose first attempt surely did not run. `errors` has
    the first error of each kind.
    """

    fault: str
    faults: int
    jobs: int = 0
    lost: int = 0
    stated: int = 0
    silent: int = 0
    again: int = 0
    known: int = 0
    errors: dict[str, str] = field(default_factory=dict)


class FaultyEngine:
    """The failing engine and its spare, with the servers that they run in."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.spare = Engine(), Engine()
        authority(folder)
        (folder / "bad").mkdir()
        self.authorities = folder / "ca.pem"
        self._good = _context(folder / "server.pem", folder / "server.key")
        self._bad = _context(*self_signed(folder / "bad"))
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The text of queues.yaml while both serve."""
        with serving(self.spare), self._stack:
            self.up()
            yield QUEUES.format(url=self.engine.url, spare=self.spare.url, authorities=self.authorities)

    def up(self, *, well: bool = True) -> None:
        """Serve, with a certificate that holds or one that does not."""
        self._stack.enter_context(serving(self.engine, self._good if well else self._bad))

    def down(self) -> None:
        """Stop serving: connections are refused."""
        self._stack.close()

    @contextlib.contextmanager
    def failing(self, fault: str) -> Iterator[None]:
        """The whole server fails in the block."""
        if fault == "other models":
            self.engine.models = ["other"]
            yield
            self.engine.models = ["served"]
            return
        self.down()
        if fault == "TLS":
            self.up(well=False)
        yield
        self.down()
        self.up()

    def came(self, prompt: str) -> int:
        """How often a prompt was sent, to either."""
        return self.engine.came[prompt] + self.spare.came[prompt]


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def table(url: str, faulty: FaultyEngine, count: int, timeout: float = 110.0) -> AsyncIterator[Tally]:
    """One tally for each fault, which happens `count` times. `timeout` is seconds for one job."""
    async with AsyncClient(url) as client:
        for place, (fault, script) in enumerate(OF_PROMPTS.items()):
            tally = Tally(fault, count)
            faulty.engine.faults = {f"kind {place} {number}": script for number in range(count)}
            prompts = [f"{word} {place} {number}" for number in range(count) for word in ("kind", "beside")]
            await _called(client, faulty, tally, iter(prompts), timeout)
            tally.faults = count - len(faulty.engine.faults)
            yield tally
        for fault in OF_SERVERS:
            yield await _toggled(client, faulty, fault, count, timeout)


async def _toggled(client: AsyncClient, faulty: FaultyEngine, fault: str, count: int, timeout: float) -> Tally:
    """Jobs come as long as the server fails and works, `count` times."""
    tally, going = Tally(fault, count), True

    def prompts() -> Iterator[str]:
        number = 0
        while going:
            number += 1
            yield f"{fault} {number} wait=0.05 two three"

    calling = asyncio.create_task(_called(client, faulty, tally, prompts(), timeout, pause=0.05))
    for _ in range(count):
        await asyncio.sleep(AT_LEAST)
        failing = faulty.failing(fault)
        await asyncio.to_thread(failing.__enter__)
        await asyncio.sleep(AT_LEAST)
        await asyncio.to_thread(failing.__exit__, None, None, None)
    going = False
    await calling
    return tally


async def _called(
    client: AsyncClient, faulty: FaultyEngine, tally: Tally, prompts: Iterator[str], timeout: float, pause: float = 0.0
) -> None:
    asked: list[str] = []

    async def caller() -> None:
        for prompt in prompts:
            asked.append(prompt)
            await _one(client, tally, prompt, timeout)
            await asyncio.sleep(pause)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    tally.jobs = len(asked)
    tally.again = sum(max(faulty.came(prompt) - 1, 0) for prompt in asked)
    tally.known = tally.again if tally.fault in NEVER_RAN else 0


async def _one(client: AsyncClient, tally: Tally, prompt: str, timeout: float) -> None:
    words = " ".join(word for word in prompt.split() if not word.startswith("wait="))
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16}
    try:
        result = await client.infer("chat", chat, timeout=timeout)
    except ResultTimeoutError:
        tally.lost += 1
    except TaxiwayError as error:
        tally.stated += 1
        tally.errors.setdefault(type(error).__name__, error.message)
    else:
        tally.silent += result.outputs["text"] != f"{words} "
