"""What does an engine behind the fleet cost its callers, and what do aborted chats leave behind?

`python -m benchmarks.engines [--aborts 10000]` puts the tests' scripted engine behind a router and an endpoint's
worker, asks it alone and by both interfaces in turn, and prints the time to the first token that the fleet adds; the
CPU of worker and router for each token with all slots busy, and the worker's memory; and how long aborts take to reach
the engine, with what is left of them. With `--llama` the engine is llama.cpp with SmolLM2: the question is its tokens
per second alone and behind the fleet, under 16 callers, and the time to the first token that the fleet adds to one
caller; each in turn. `--mixed` has live chats arrive beside a backlog of bulk ones: how long live ones wait for the
first token with two llama.cpp alone, first in, first out, and behind a fleet whose bulk chats yield, or do not.
`--faults 100` has every fault of an engine so often, under load, and counts what became of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, product
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
import psutil
import uvloop

from benchmarks.harness.measure import answer, cpu_seconds, percentile, say
from benchmarks.harness.processes import Interfaces, fleet
from taxiway import AsyncClient
from taxiway.contract.job import Result
from taxiway.errors import DeadlineExceededError, JobCancelledError
from tests.engine import Engine, serving
from tests.engine_faults import CLASSES, FaultyEngine, table
from tests.llama import NAME, llama_server

ENGINE = """
  engine:
    device: endpoint
    endpoint: {{protocol: openai, url: "{url}", slots: {slots}, models: {{chat: {name}}}}}
    price: {{usd_per_hour: 0.1}}
    horizon: 60
"""
"""The class of an engine that serves the model `chat`; the fleets of several benchmarks have it."""

QUEUES = (
    "hardware:"
    + ENGINE
    + """service:
  standard: {{deadline: 120}}
default_service: standard
"""
)

MIXED_QUEUES = (
    "hardware:"
    + ENGINE.replace('"{url}"', "{url}")
    + """service:
  live: {{deadline: 40, priority: high}}
  bulk: {{deadline: 3600, priority: low, preemptible: true}}
  firm: {{deadline: 3600, priority: low}}
default_service: live
"""
)

SLOTS = 200
PROBES = 200
"""Chats, one after the other, for the time to the first token."""

LLAMA_PROBES, WARM = 40, 5

CALLERS, LLAMA_SLOTS, ROUNDS = 16, 16, 2

TALKS, TURNS, TALK_SLOTS, OPENING = 3, 4, 8, 300
"""Conversations of each kind, turns of each, slots of each of two engines, and words at a conversation's beginning."""

MIXED_SLOTS, BULK_CALLERS, BULK_TOKENS, LIVE_EVERY, MIXED_SECONDS = 4, 16, 96, 2.0, 40.0
"""The slots of each of two engines; bulk chats in progress at any time, and their tokens; seconds between two live
chats; and seconds of each turn."""

Ask = Callable[[str, int], AsyncIterator[str]]
"""Asks with a prompt and the most tokens; yields the text as it comes."""


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--aborts", type=int, default=10_000, help="chats that are cancelled while they run")
    parser.add_argument("--llama", action="store_true", help="measure llama.cpp instead")
    parser.add_argument("--prefixes", action="store_true", help="measure conversations on two llama.cpp instead")
    parser.add_argument("--mixed", action="store_true", help="measure live chats beside bulk ones instead")
    parser.add_argument(
        "--faults", type=int, default=0, help="count what becomes of so many faults of each kind instead"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if given.faults:
            _faults(Path(name), given.faults)
        elif given.prefixes:
            _prefixes(Path(name))
        elif given.mixed:
            _mixed(Path(name))
        elif given.llama:
            _llama(Path(name))
        else:
            _scripted(Path(name), given.aborts)


def _scripted(folder: Path, aborts: int) -> None:
    with serving(Engine()) as engine, _behind(folder, engine.url, "served", SLOTS) as interfaces:
        uvloop.run(first_tokens(engine.url, "served", interfaces, "wait=0.002 one two three", PROBES))
        uvloop.run(busy_slots(interfaces))
        uvloop.run(aborted(engine, interfaces, aborts))


def _behind(folder: Path, url: str, name: str, slots: int) -> Any:
    queues = folder / "queues.yaml"
    queues.write_text(QUEUES.format(url=url, name=name, slots=slots))
    return fleet(folder, queues, [["--class", "engine", "--device", "endpoint:0"]])


def _chat(text: str, tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}


async def first_tokens(url: str, name: str, interfaces: Interfaces, prompt: str, probes: int) -> None:
    """The time to the first token: of the engine alone, and what each interface adds. The three are asked in turn."""
    times: dict[str, list[float]] = {"alone": [], "broker": [], "http": []}
    async with (
        _direct_session() as session,
        AsyncClient(interfaces.broker) as broker,
        AsyncClient(interfaces.http) as http,
    ):
        asks: dict[str, Ask] = {
            "alone": lambda text, most: _direct(session, url, name, text, most),
            "broker": lambda text, most: _through(broker, text, most),
            "http": lambda text, most: _through(http, text, most),
        }
        for number, turn in product(range(-WARM, probes), range(len(asks))):
            way = [*asks][(number + turn) % len(asks)]
            taken = await _first(asks[way], f"{prompt} {way} {number}")  # engines keep what they read of a prompt
            if number >= 0:
                times[way].append(taken)
    alone = percentile(times["alone"], 50)
    for interface in ("broker", "http"):
        added = [with_fleet - without for with_fleet, without in zip(times[interface], times["alone"], strict=True)]
        figures = {"alone_p50": alone, "added_p50": percentile(times[interface], 50) - alone}
        say(answer(f"seconds added to the time to the first token, {interface} interface", added, **figures))


async def _first(ask: Ask, prompt: str) -> float:
    """Seconds until the first text; the rest is read, so that the engine is idle afterwards."""
    began, first = time.perf_counter(), 0.0
    async for text in ask(prompt, 4):
        if text and not first:
            first = time.perf_counter() - began
    return first


async def _first_in_time(ask: Ask, prompt: str) -> float:
    """The same; a chat that is late counts with the seconds until it was given up."""
    began = time.perf_counter()
    with contextlib.suppress(DeadlineExceededError):
        return await _first(ask, prompt)
    return time.perf_counter() - began


async def busy_slots(interfaces: Interfaces) -> None:
    """CPU for each token with all slots busy, and the worker's memory."""
    words = " ".join(["wait=0.05", *["word"] * 100])
    (worker,), (router,) = interfaces.processes["worker"], interfaces.processes["router"]
    async with AsyncClient(interfaces.broker) as client:
        await _drained(_through(client, words, 100))
        before, began = (cpu_seconds(worker), cpu_seconds(router)), time.perf_counter()
        await asyncio.gather(*(_drained(_through(client, words, 100)) for _ in range(SLOTS)))
        seconds = time.perf_counter() - began
        tokens = SLOTS * 100
        spent = [
            1e6 * (now - then) / tokens for now, then in zip(map(cpu_seconds, (worker, router)), before, strict=True)
        ]
    more = {"router": spent[1], "tokens_a_second": tokens / seconds, "memory": psutil.Process(worker).memory_info().rss}
    say(answer(f"microseconds of the worker's CPU for each token, {SLOTS} slots busy", [spent[0]], **more))


async def aborted(engine: Engine, interfaces: Interfaces, jobs: int) -> None:
    """How long a cancellation takes to reach the engine, and what is left of them."""
    numbers, taken, done = iter(range(jobs)), [], len(engine.aborts)
    async with AsyncClient(interfaces.broker) as client:

        async def canceller() -> None:
            for number in numbers:
                prompt = f"one stall {number}"
                job = await client.submit("chat", _chat(prompt, 8))
                while prompt not in engine.begun:
                    await asyncio.sleep(0.002)
                cancelled = time.monotonic()
                await job.cancel()
                with contextlib.suppress(JobCancelledError):
                    await job.result(30)
                while prompt not in engine.aborts:
                    await asyncio.sleep(0.002)
                taken.append(engine.aborts[prompt] - cancelled)

        await asyncio.gather(*(canceller() for _ in range(16)))
        result = await client.infer("chat", _chat("well again", 8), timeout=30)
    assert result.outputs["text"] == "well again "
    left = {"aborts_seen": len(engine.aborts) - done, "running_after": engine.running}
    say(answer(f"seconds from cancel to the engine's end, {jobs:,} chats", taken, p99=percentile(taken, 99), **left))


def _faults(folder: Path, count: int) -> None:
    faulty = FaultyEngine(folder)
    with faulty.serving() as queues:
        (folder / "queues.yaml").write_text(queues)
        with fleet(folder, folder / "queues.yaml", [["--class", name] for name in CLASSES]) as interfaces:
            uvloop.run(_tallied(interfaces.http, faulty, count))


async def _tallied(url: str, faulty: FaultyEngine, count: int) -> None:
    async for tally in table(url, faulty, count):
        say({"question": f"what became of the jobs: {tally.fault}", **asdict(tally)})


def _llama(folder: Path) -> None:
    with llama_server(LLAMA_SLOTS) as url, _behind(folder, f"{url}/v1", NAME, LLAMA_SLOTS) as interfaces:
        uvloop.run(_compare(f"{url}/v1", interfaces))
        uvloop.run(first_tokens(f"{url}/v1", NAME, interfaces, "Say", LLAMA_PROBES))


async def _compare(url: str, interfaces: Interfaces) -> None:
    alone, behind = [], []
    async with _direct_session() as session, AsyncClient(interfaces.broker) as client:
        for _ in range(ROUNDS):
            alone.append(await _rate(lambda text, most: _direct(session, url, NAME, text, most)))
            behind.append(await _rate(lambda text, most: _through(client, text, most)))
    say(answer(f"llama.cpp's tokens a second alone, {CALLERS} callers", alone))
    say(
        answer(
            f"llama.cpp's tokens a second behind the fleet, {CALLERS} callers", behind, share=sum(behind) / sum(alone)
        )
    )


def _prefixes(folder: Path) -> None:
    workers = [["--class", "engine", "--device", f"endpoint:{number}"] for number in range(2)]
    with llama_server(TALK_SLOTS) as one, llama_server(TALK_SLOTS) as other:
        queues = folder / "queues.yaml"
        text = QUEUES.format(url="{url}", name=NAME, slots=TALK_SLOTS).replace('"{url}"', f'["{one}/v1", "{other}/v1"]')
        queues.write_text(text)
        with fleet(folder, queues, workers) as interfaces:
            uvloop.run(_conversations(interfaces))


async def _first_token(client: AsyncClient, messages: list[dict[str, str]], tenant: str) -> float:
    """Seconds until a chat has its first token; returns at its end."""
    asked, began, first = {"messages": messages, "max_tokens": 4, "temperature": 0}, time.perf_counter(), 0.0
    async for event in client.stream("chat", asked, timeout=120, tenant=tenant):
        if isinstance(event, str) and event and not first:
            first = time.perf_counter() - began
    return first


async def _conversations(interfaces: Interfaces) -> None:
    """The time to the first token of conversations, one chat at a time.

    Half of them come from another tenant in each turn, so that they are not led to the replica that has their prefix.
    """
    taken: dict[str, list[float]] = {"led": [], "not led": []}
    async with AsyncClient(interfaces.broker) as client:
        for turn, talk, way in product(range(TURNS), range(TALKS), taken):
            words = Random(f"{talk} {way}").choices(["river", "stone", "garden", "window", "paper"], k=OPENING)
            messages = [{"role": "system", "content": " ".join(words)}]
            messages += [{"role": "user", "content": f"Say {number}"} for number in range(turn + 1)]
            tenant = "one" if way == "led" else f"tenant-{turn}"
            first = await _first_token(client, messages, tenant)
            if turn:
                taken[way].append(first)
    for way, seconds in taken.items():
        mean = sum(seconds) / len(seconds)
        say(answer(f"seconds to the first token of a conversation's later turns, {way}", seconds, mean=mean))
    say(answer("led, as a share of not led, in the mean", [sum(taken["led"]) / sum(taken["not led"])]))


def _mixed(folder: Path) -> None:
    workers = [["--class", "engine", "--device", f"endpoint:{number}"] for number in (0, 1)]
    with llama_server(MIXED_SLOTS) as one, llama_server(MIXED_SLOTS) as other:
        urls, queues = [f"{url}/v1" for url in (one, other)], folder / "queues.yaml"
        queues.write_text(MIXED_QUEUES.format(url=json.dumps(urls), name=NAME, slots=MIXED_SLOTS))
        with fleet(folder, queues, workers) as interfaces:
            uvloop.run(_live_beside_bulk(urls, interfaces))


async def _live_beside_bulk(urls: Sequence[str], interfaces: Interfaces) -> None:
    first: dict[str, list[float]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    turns = cycle(urls)
    async with _direct_session() as session, AsyncClient(interfaces.broker) as client:

        def alone(text: str, most: int) -> AsyncIterator[str]:
            return _direct(session, next(turns), NAME, text, most)

        live = partial(_through, client, service="live")
        sides: dict[str, tuple[Ask, Ask | None]] = {
            "on an idle fleet": (live, None),
            "llama.cpp alone": (alone, alone),
            "behind the fleet, bulk does not yield": (live, partial(_through, client, service="firm")),
            "behind the fleet, bulk yields": (live, partial(_through, client, service="bulk")),
        }
        for number, (side, (urgent, bulk)) in product(range(ROUNDS), sides.items()):
            taken, rate = await _mixture(urgent, bulk, f"{side} {number}")
            first[side] += taken
            rates[side].append(rate)
    for side, taken in first.items():
        question = f"seconds to a live chat's first token beside {BULK_CALLERS} bulk chats, {side}"
        say(answer(question, taken, p99=percentile(taken, 99)))
    for side, found in rates.items():
        say(answer(f"live and bulk tokens a second, {side}", found))


async def _mixture(live: Ask, bulk: Ask | None, turn: str) -> tuple[list[float], float]:
    """Seconds to each live chat's first token, and all chats' tokens a second, in `MIXED_SECONDS`."""
    loop, tokens = asyncio.get_running_loop(), 0
    ends = loop.time() + MIXED_SECONDS

    async def caller(number: int) -> None:
        nonlocal tokens
        while loop.time() < ends:
            assert bulk is not None
            async for text in bulk(f"Write about {turn}, {number} and {loop.time()}.", BULK_TOKENS):
                tokens += bool(text) and loop.time() < ends

    async with asyncio.TaskGroup() as group:
        for number in range(BULK_CALLERS if bulk is not None else 0):
            group.create_task(caller(number))
        chats = list[asyncio.Task[float]]()
        while loop.time() < ends:
            chats.append(group.create_task(_first_in_time(live, f"Say {turn} {len(chats)}")))
            await asyncio.sleep(LIVE_EVERY)
    return [chat.result() for chat in chats], tokens / MIXED_SECONDS


async def _rate(ask: Ask) -> float:
    """Pieces of text a second, each a token, under the callers; 64 tokens a chat."""
    began = time.perf_counter()
    chats = [[f"Write about the number {caller} and {turn}." for turn in range(3)] for caller in range(CALLERS)]

    async def call(prompts: list[str]) -> int:
        return sum([await _drained(ask(prompt, 64)) for prompt in prompts])

    pieces = sum(await asyncio.gather(*map(call, chats)))
    return pieces / (time.perf_counter() - began)


async def _drained(texts: AsyncIterator[str]) -> int:
    return sum([1 async for text in texts if text])


def _direct_session() -> aiohttp.ClientSession:
    """A connection for each request: llama.cpp closes kept ones, which a client without retries takes for a fault."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


async def _direct(session: aiohttp.ClientSession, url: str, name: str, text: str, most: int) -> AsyncIterator[str]:
    asked = _chat(text, most) | {"model": name, "stream": True}
    async with session.post(f"{url}/chat/completions", json=asked) as response:
        async for line in response.content:
            for choice in msgspec.json.decode(line[6:])["choices"] if line.startswith(b"data: {") else ():
                yield choice["delta"].get("content") or ""


async def _through(client: AsyncClient, text: str, most: int, **terms: Any) -> AsyncIterator[str]:
    text = ""
    async for event in client.stream("chat", _chat(text, most), timeout=600, **terms):
        if isinstance(event, str):
            text += event
            yield event
        elif not isinstance(event, Result) or event.outputs["text"] != text:
            raise TypeError(f"expected the text that was streamed, got {event!r}")


if __name__ == "__main__":
    main()
