"""An engine that lies, answers junk and never ends, behind a real worker, beside an honest engine that costs more.

`python -m tests.fuzzing.engines --seconds 60` fails where the worker ends or grows by more than `MEMORY`, where a chat
is billed more than it reserved or is answered with a 500, and where an honest chat has no answer.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.builders import add_engine_models, recorded
from tests.engine import Engine, serving
from tests.fuzzing.growth import Growth
from tests.fuzzing.malformed import NUMBERS
from tests.fuzzing.session import a_store, options, say
from tests.routing import eventually, router_process
from tests.working import worker_process, worker_settings

MEMORY = 256 * 2**20
"""Bytes by which the worker may grow: its slots, times what one answer may hold, decoded."""

BILL = 0.01
"""US dollars: a chat of eight tokens at the prices of the hostile class reserves a tenth of it."""

SLOTS = 4
LARGE = 32 * 2**20

QUEUES = recorded("fleets/hostile.yaml")

_JUNK = (
    b"{nonsense", b"[" * 100_000, b"", b'{"choices":' + b"[" * 100_000, b"null", b"[]", b"{}", b"\xff\xfe",
    b'{"choices":null}',
    b'{"choices":[{"index":7,"delta":{"content":"a"}}]}', b'{"choices":[{"index":0,"delta":{"content":{"a":1}}}]}',
    b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":1e9,"function":{"arguments":"a"}}]}}]}',
    b'{"choices":[{"index":0,"delta":{"content":"a","logprobs":[1]}}]}', b'{"error":{"message":"%s"}}' % (b"m" * 2**20),
)  # fmt: skip
_STATUSES = ("200", "204", "301", "400", "429", "500", "503", "999")


@dataclass
class HostileEngine(Engine):
    """Answers the prompt `honest` as it should, and every other one with whatever chance brings."""

    chance: random.Random = field(default_factory=random.Random)

    async def _answer(self, path: str, headers: dict[str, str], body: bytes, *streams: Any) -> bool:
        writer = streams[1]
        if not path.endswith("/chat/completions") or json.loads(body)["messages"][-1]["content"] == "honest":
            return await super()._answer(path, headers, body, *streams)
        odd = self.chance.choice((self._endless, self._line, self._counts, self._junk, self._status, self._bomb))
        return await odd(writer)

    async def _pieces(self, writer: asyncio.StreamWriter, pieces: Iterator[bytes]) -> bool:
        self._head(writer, "200", "text/event-stream", {"Transfer-Encoding": "chunked"})
        for piece in pieces:
            self._chunk(writer, piece)
            await writer.drain()
        return await self._end(writer)

    async def _endless(self, writer: asyncio.StreamWriter) -> bool:
        size = self.chance.choice((1, 100, 60_000))
        event = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"w" * size)
        return await self._pieces(writer, (event for _ in range(LARGE // len(event))))

    async def _line(self, writer: asyncio.StreamWriter) -> bool:
        return await self._pieces(writer, (b"x" * 65536 for _ in range(LARGE // 65536)))

    async def _counts(self, writer: asyncio.StreamWriter) -> bool:
        prompt, completion, cached = (self.chance.choice(NUMBERS) for _ in range(3))
        usage = b'{"prompt_tokens":%s,"completion_tokens":%s,"prompt_tokens_details":{"cached_tokens":%s}}'
        said = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
        stated = b'data: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n' % (usage % (prompt, completion, cached))
        return await self._pieces(writer, iter((said, stated)))

    async def _junk(self, writer: asyncio.StreamWriter) -> bool:
        events = [b"data: " + self.chance.choice(_JUNK) + b"\n\n" for _ in range(self.chance.randrange(4))]
        return await self._pieces(writer, iter(events))

    async def _status(self, writer: asyncio.StreamWriter) -> bool:
        body = self.chance.choice((b"", *_JUNK)).decode("latin-1")
        more = {"Retry-After": self.chance.choice(("1e400", "-5", "soon", "9" * 500))}
        return await self._whole(writer, body, self.chance.choice(_STATUSES), more)

    async def _bomb(self, writer: asyncio.StreamWriter) -> bool:
        body = gzip.compress(b" " * LARGE)
        self._head(writer, "200", "text/event-stream", {"Content-Encoding": "gzip", "Content-Length": str(len(body))})
        writer.write(body)
        await writer.drain()
        return True


def _ask(http: httpx.Client, prompt: str) -> tuple[str, list[str]]:
    """Ask for a chat; what it was answered, and what is wrong with that."""
    asked = {"model": "talk", "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    answer = http.post("/v1/chat/completions", json=asked)
    faults = [f"{prompt}: answered 500"] if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR else []
    if prompt == "honest" and not answer.is_success:
        faults.append(f"an honest chat was answered {answer.status_code}: {answer.text[:200]}")
    report = answer.json().get("taxiway", {}) if answer.is_success else {}
    if report.get("hardware_class") == "cpu.batch" and report["cost"] > BILL:
        faults.append(f"{prompt}: billed {report['cost']:g} USD")
    return f"{'honest' if prompt == 'honest' else 'hostile'} {answer.status_code}", faults


def _faults(http: httpx.Client) -> list[str]:
    """Why endpoints are out of service now."""
    return [device["fault"] for device in http.get("/v2/fleet").json()["devices"] if device.get("fault")]


@contextmanager
def _fleet(folder: Path, seed: int) -> Iterator[tuple[httpx.Client, Growth, list[str]]]:
    """A router's HTTP client, what the worker grows by, and a list of what went wrong with the worker."""
    engine, honest, faults = HostileEngine(chance=random.Random(seed)), Engine(), list[str]()
    with a_store(folder) as base, serving(engine), serving(honest):
        queues = QUEUES.replace("URL", engine.url).replace("HONEST", honest.url).replace("SLOTS", str(SLOTS))
        settings = worker_settings(base, folder, queues)
        add_engine_models(settings.models, "talk")
        with (
            worker_process(settings, log=subprocess.DEVNULL) as worker,
            worker_process(settings, "--class", "honest", log=subprocess.DEVNULL),
            router_process(settings) as router,
            httpx.Client(base_url=router.http, timeout=60, trust_env=False) as http,
        ):
            eventually(lambda: http.get("/v2/models/talk/ready").is_success, within=60)
            _ask(http, "honest")
            with Growth(worker.process.pid) as growth:
                yield http, growth, faults
            if worker.process.poll() is not None:
                faults.append(f"the worker ended with status {worker.process.returncode}")


def main() -> int:
    """Run; 1 where the engine did harm."""
    given, counts = options("engines", __doc__, seconds=60), Counter[str]()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(SLOTS) as pool:
        with _fleet(Path(name), given.seed) as (http, growth, faults):
            end = time.monotonic() + given.seconds
            while time.monotonic() < end:
                eventually(lambda: not _faults(http), within=30)
                prompts = [f"hostile {counts.total()} {n}" for n in range(SLOTS - 1)]
                for answered, wrong in pool.map(lambda prompt: _ask(http, prompt), ["honest", *prompts]):
                    counts[answered] += 1
                    faults += wrong
        if growth.most > MEMORY:
            faults.append(f"the worker grew by {growth.most / 2**20:.0f} MiB")
    return say(given.seed, counts, faults, f"the worker grew by {growth.most / 2**20:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
