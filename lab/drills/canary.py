"""Does anything of private requests leave their site, in any form, under load and faults?

`python -m lab.drills.canary [--requests 10000] [--rate 60] [--json]` starts an edge and a cloud, each with a router,
workers and a Valkey of its own, and a line between them that is recorded. Private requests bear a canary: those of the
label `ward` may not leave; those of `vault` may, sealed. Others bear a marker, and go anywhere. Meanwhile workers and
the cloud's router are killed, and the line is cut. Then the line's bytes and all that the cloud keeps are searched:
append-only file and snapshot, live keys, logs, metrics, and the spans of all processes.

The same private requests pass at the same time through two proxies, `lab.drills.fallbacks`. One of ten bears no
header: its tenant alone makes it private. Exits with 1 if a canary of ours was found, or a marker was not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import redis
import uvloop
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from rich.console import Console
from rich.table import Table

from lab.drills.fallbacks import EdgeServer, Opponent, opponents
from lab.drills.places import Restartable, to_its_end
from lab.drills.wire_tap import WireTap
from local.embedded import EmbeddedValkey
from tasks.settings import Settings
from taxiway import AsyncClient
from taxiway.contract.keys import job_key
from taxiway.errors import TaxiwayError
from taxiway.sealing import SealKeys
from tests.routing import RouterProcess, router_process
from tests.scanning import files_in, forms, hits, values_of
from tests.spans import export_to
from tests.working import WorkerProcess, empty_fleet, worker_process, worker_settings

SHARED = """
service:
  standard: {{deadline: 20}}
default_service: standard
limits: {{lease: 2}}
rebalance: {{tick: 0.2}}
locality: {{sealed: {{vault: [{key}]}}}}
"""

EDGE = """
site: edge
hardware:
  ward.a: &ward
    {{device: cpu, runtimes: [echo], labels: [ward], max_batch: 4, max_wait: 0, horizon: 2, max_depth: 40,
      price: {{usd_per_hour: 0.05}}, warm: [paced]}}
  ward.b: {{<<: *ward, price: {{usd_per_hour: 0.5}}}}
  cloud:
    device: endpoint
    labels: [vault]
    endpoint:
      {{protocol: taxiway, url: "{url}", slots: 32, models: {{echo: echo, paced: paced}}, health: {{every: 0.2}}}}
tenants:
  clinic: {{locality: ward}}
"""

CLOUD = """
site: cloud
hardware:
  cpu.batch:
    {{device: cpu, runtimes: [echo], labels: [vault], max_batch: 16, max_wait: 0, price: {{usd_per_hour: 0.01}},
      warm: [echo, paced]}}
"""

BURST = 64
"""Private requests that come at the same moment: more than the edge takes."""

QUIET = 1.0
"""Seconds between two faults."""

DOWN = 1.0
"""Seconds for which the line is cut, or a process is gone."""

UNLABELLED = 10
"""One of so many private requests has no label of its own."""


@dataclass
class Fleet:
    """One site: its processes by name, its store, and the folder that has all that it writes."""

    settings: Settings
    folder: Path
    processes: dict[str, Restartable]

    @property
    def url(self) -> str:
        """Of its HTTP API."""
        router: RouterProcess = self.processes["router"].now
        return router.http


@contextmanager
def fleet(folder: Path, queues: str, key: bytes, classes: tuple[str, ...], *, opening: bool) -> Iterator[Fleet]:
    """A site with a worker for each class; its router has the key, too, if `opening`."""
    folder.mkdir()
    with EmbeddedValkey(folder / "store") as store, ExitStack() as stack:
        settings = replace(worker_settings(empty_fleet(store.url), folder, queues), seals=(key,))
        routing = settings if opening else replace(settings, seals=())

        def logged(name: str, make: Callable[[Any], AbstractContextManager[Any]]) -> Restartable:
            log = stack.enter_context((folder / f"{name}.log").open("ab"))
            return Restartable(lambda: make(log))

        processes = {name: logged(name, _worker(settings, name)) for name in classes}
        processes["router"] = logged("router", lambda log: router_process(routing, log))
        for process in processes.values():
            process.start()
            stack.callback(process.kill)
        yield Fleet(settings, folder, processes)


def _worker(settings: Settings, name: str) -> Callable[[Any], AbstractContextManager[WorkerProcess]]:
    return lambda log: worker_process(settings, "--class", name, log=log)


@dataclass
class Sites:
    """Both fleets and the line between them."""

    edge: Fleet
    cloud: Fleet
    tap: WireTap
    server: EdgeServer
    """The opponents' server at the edge, which has the faults of ours."""
    faults: Counter[str] = field(default_factory=Counter)

    async def break_down(self) -> None:
        """One fault after the other, until cancelled."""
        faults = (self.cut, self.kill_home, self.kill_router, self.kill_peer, self.kill_cloud)
        for fault in itertools.cycle(faults):
            await asyncio.sleep(QUIET)
            await fault()
            self.faults[fault.__name__] += 1

    async def cut(self) -> None:
        """Cut the line."""
        self.tap.pull()
        await asyncio.sleep(DOWN)
        self.tap.plug()

    async def kill_home(self) -> None:
        """Kill a worker of the edge."""
        self.server.down = True
        await self._restart(self.edge.processes["ward.a"])
        self.server.down = False

    async def kill_cloud(self) -> None:
        """Kill the cloud's worker."""
        await self._restart(self.cloud.processes["cpu.batch"])

    async def kill_peer(self) -> None:
        """Kill the edge's worker at the line."""
        await self._restart(self.edge.processes["cloud"])

    async def kill_router(self) -> None:
        """Kill the cloud's router."""
        await self._restart(self.cloud.processes["router"])
        there = urlsplit(self.cloud.url)
        self.tap.redirect(str(there.hostname), there.port or 0)

    @staticmethod
    async def _restart(process: Restartable) -> None:
        process.kill()
        await asyncio.sleep(DOWN)
        await to_its_end(process.start)


KINDS = ("ward", "vault", "others")


@dataclass(frozen=True)
class Marks:
    """What requests bear, by kind."""

    ward: str = field(default_factory=lambda: f"canary-{secrets.token_hex(12)}")
    vault: str = field(default_factory=lambda: f"canary-{secrets.token_hex(12)}")
    others: str = field(default_factory=lambda: f"marker-{secrets.token_hex(12)}")


@dataclass
class Load:
    """Sends requests of three kinds to the edge, and the private ones through the opponents, too."""

    client: AsyncClient
    others: list[Opponent]
    marks: Marks
    ended: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    async def send(self, requests: int, rate: float) -> None:
        """Send so many private ones, `rate` a second in bursts, and a third as many of each other kind."""
        senders, sending = dict(zip(KINDS, (self._private, self._sealed, self._open), strict=True)), []
        for first in range(0, requests, BURST):
            burst = range(first, min(first + BURST, requests))
            for kind, send in senders.items():
                numbers = burst if kind == "ward" else burst[::3]
                sending += [asyncio.create_task(self._one(kind, send, number)) for number in numbers]
            await asyncio.sleep(len(burst) / rate)
        await asyncio.gather(*sending)

    async def _one(self, kind: str, send: Callable[[int], Awaitable[None]], number: int) -> None:
        try:
            await send(number)
            self.ended[kind]["answered"] += 1
        except TaxiwayError as error:
            self.ended[kind][error.code] += 1

    async def _private(self, number: int) -> None:
        text = f"{self.marks.ward} {number}"
        label = None if number % UNLABELLED == 0 else "ward"
        headers = {} if label is None else {"x-locality": label}
        ours = self.client.infer("paced", text, tenant="clinic", idempotency_key=text, timeout=60, locality=label)
        done = await asyncio.gather(ours, *(one.send(text, headers) for one in self.others), return_exceptions=True)
        if isinstance(done[0], BaseException):
            raise done[0]

    async def _sealed(self, number: int) -> None:
        text = f"{self.marks.vault} {number}"
        result = await self.client.infer("echo", text, locality="vault", idempotency_key=f"v{number}", timeout=60)
        assert result.outputs["payload"] == text

    async def _open(self, number: int) -> None:
        await self.client.infer("echo", f"{self.marks.others} {number}", timeout=60)


class Found(msgspec.Struct, frozen=True):
    """How often the text of each kind was found in a place."""

    place: str
    bytes: int
    ward: int
    vault: int
    others: int


def search(place: str, contents: Iterator[bytes], marks: Marks) -> Found:
    """Search all of these contents."""
    sought = {kind: forms(getattr(marks, kind)) for kind in KINDS}
    found, size = Counter[str](), 0
    for content in contents:
        size += len(content)
        found.update({name: hits(content, texts) for name, texts in sought.items()})
    return Found(place, size, **{name: found[name] for name in sought})


def places(sites: Sites, spans: Path, metrics: bytes) -> Iterator[tuple[str, Iterator[bytes]]]:
    """All that is searched: what crossed the line, and what the cloud keeps; and the edge's store, as a control."""
    yield "line", sites.tap.contents()
    for name, site in (("cloud", sites.cloud), ("edge", sites.edge)):
        with redis.Redis.from_url(site.settings.broker) as store:
            yield f"{name}: keys", values_of(store)
            store.config_set("rdbcompression", "no")
            store.save()
        yield f"{name}: snapshot and append-only file", files_in(site.folder / "store")
    logs = (path.read_bytes() for path in sites.cloud.folder.glob("*.log"))
    yield "cloud: logs", logs
    yield "cloud: metrics", iter([metrics])
    yield "spans of all processes", files_in(spans)


async def run(requests: int, rate: float, folder: Path) -> dict[str, Any]:
    """Run, and say what was found."""
    key, marks = secrets.token_bytes(32), Marks()
    (name,) = SealKeys([key]).names
    shared = SHARED.format(key=SealKeys([key]).public(name).hex())
    spans = folder / "spans"
    spans.mkdir()
    os.environ.update(export_to(spans))
    trace.set_tracer_provider(TracerProvider())
    with fleet(folder / "cloud", CLOUD.format() + shared, key, ("cpu.batch",), opening=False) as cloud:
        there, server = urlsplit(cloud.url), EdgeServer()
        tap = WireTap(str(there.hostname), there.port or 0)
        queues = EDGE.format(url=f"http://127.0.0.1:{tap.port}") + shared
        classes = ("ward.a", "ward.b", "cloud")
        with fleet(folder / "edge", queues, key, classes, opening=True) as edge:
            sites = Sites(edge, cloud, tap, server)
            async with opponents(server) as others, AsyncClient(edge.url, connect_timeout=30) as client:
                await offered(client)
                load = Load(client, others, marks)
                seconds = await under_faults(load.send(requests, rate), sites)
                tap.plug()
                metrics = httpx.get(f"{cloud.url}/metrics", trust_env=False).content
                moved = httpx.get(f"{edge.url}/metrics", trust_env=False).text
                found = [search(place, contents, marks) for place, contents in places(sites, spans, metrics)]
                repeated = ran_again(edge)
                leaks = {one.name: leaked(one.tap, marks.ward) for one in others}
    return {
        "requests": {kind: dict(ended) for kind, ended in load.ended.items()},
        "seconds": round(seconds, 1),
        "faults": dict(sites.faults),
        "moved": moves_in(moved),
        "ran again": repeated,
        "found": msgspec.to_builtins(found),
        "private requests abroad": {"taxiway": leaked(tap, marks.ward), **leaks},
        "opponents": {one.name: {"answered": one.answered, "refused": one.refused} for one in others},
    }


async def under_faults(load: Coroutine[Any, Any, None], sites: Sites) -> float:
    """Send a load while faults come; returns its seconds."""
    began, breaking = time.monotonic(), asyncio.create_task(sites.break_down())
    await load
    seconds = time.monotonic() - began
    breaking.cancel()
    await asyncio.gather(breaking, return_exceptions=True)
    return seconds


async def offered(client: AsyncClient) -> None:
    """Wait until the cloud takes sealed work."""
    while (await client.what_if("echo", "x", locality="vault"))["hardware_class"] is None:
        await asyncio.sleep(0.1)


def leaked(tap: WireTap, mark: str) -> int:
    """How many requests with a mark crossed a line in plain text."""
    sought, numbers = mark.encode() + b" ", set[bytes]()
    for content in tap.contents():
        for part in content.split(sought)[1:]:
            numbers.update(re.findall(rb"\A\d+", part[:9]))
    return len(numbers)


def moves_in(metrics: str) -> int:
    """Jobs that the edge's router moved between classes."""
    lines = (line for line in metrics.splitlines() if line.startswith("taxiway_moved_total{"))
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


def ran_again(site: Fleet) -> int:
    """Jobs of a site that ran more than once."""
    with redis.Redis.from_url(site.settings.broker) as store:
        attempts = [store.hget(key, "attempts") for key in store.scan_iter(job_key("*"), count=1000)]
    return sum(int(count or 0) > 1 for count in attempts)


def failed(result: Mapping[str, Any]) -> list[str]:
    """What the run did not show: a canary outside the edge, or a marker nowhere on the line."""
    abroad = [one for one in result["found"] if not one["place"].startswith("edge")]
    wrong = [f"{one['place']}: {one['ward'] + one['vault']} canaries" for one in abroad if one["ward"] + one["vault"]]
    seen = {one["place"]: one["others"] for one in result["found"]}
    return [*wrong, *(f"{place}: no marker" for place in ("line", "cloud: keys") if not seen[place])]


def show(result: Mapping[str, Any]) -> None:
    """Print the result as tables."""
    console = Console()
    table = Table("searched", "MB", "canary: stays", "canary: sealed", "marker", title="Texts that were found")
    for one in result["found"]:
        figures = (f"{one['bytes'] / 1e6:.1f}", *(str(one[kind]) for kind in ("ward", "vault", "others")))
        table.add_row(one["place"], *figures)
    console.print(table)
    table = Table("", "private requests abroad", title="In the same run")
    for name, count in result["private requests abroad"].items():
        table.add_row(name, str(count))
    console.print(table)
    for name in ("requests", "faults", "moved", "ran again", "seconds", "opponents"):
        console.print(f"{name}: {result[name]}")


def main() -> int:
    """Run, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.canary", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="private requests")
    parser.add_argument("--rate", type=float, default=60.0, help="of them a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = uvloop.run(run(given.requests, given.rate, Path(folder)))
    if given.json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        show(result)
    for one in (wrong := failed(result)):
        sys.stderr.write(f"{one}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
