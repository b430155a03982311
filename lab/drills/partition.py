"""Does an edge lose anything while it is cut off from its cloud, and processes die on both sides?

`python -m lab.drills.partition` runs two fleets of real processes, a small edge and a cloud that it may hand work to,
and the line between them. Live requests and bulk come to the edge at random times; half of each is private. The line is
cut for ten minutes, and 50 times, until shortly after it is back, a worker or router of either site is killed and
started again. It counts jobs without an end, answers that are another's or changed, private jobs that ran in the cloud,
and live requests in time during the cut. Then the same happens to an edge without a cloud.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

import taxiway
from benchmarks.harness.measure import Line, machine, say
from benchmarks.harness.processes import broker_settings
from lab.drills.places import Place, outcome_of
from local.embedded import EmbeddedValkey, free_port
from local.sites import ScriptedLine
from tasks.settings import TREE
from taxiway.errors import TaxiwayError

CALM, BACK = 20.0, 40.0
"""Seconds of load before the cut, and after it."""

LIVE, BULK = 15.0, 15.0
"""Requests a second, each: with a pace of 0.01 s a third of one of the edge's two workers."""

PACE = 0.01
"""Seconds that a job runs."""

DEADLINE = 2.0
"""Seconds within which a live request is answered."""

DELAY = 0.02
"""Seconds that the line takes, each way."""

TIMEOUT = 180.0
"""Seconds without a result after which a job counts as lost; for bulk, once the line is back."""

CLASS = """
    device: cpu
    runtimes: [python]
    max_batch: 8
    max_wait: 0.005
    horizon: 2
    warm: [noted]
"""

TERMS = f"""
service:
  live: {{deadline: {DEADLINE}, priority: high}}
  bulk: {{deadline: 3600, priority: low}}
default_service: bulk
limits: {{lease: 3, keep_result: 3600}}
"""

CLOUD = f"site: cloud\nhardware:\n  cpu.batch:{CLASS}    price: {{usd_per_hour: 0.02}}\n{TERMS}"

EDGE = f"""
site: edge
hardware:
  cpu.batch:{CLASS}    price: {{usd_per_hour: 0.2}}
    labels: [ward]
PEER{TERMS}tenants: {{clinic: {{locality: ward}}}}
"""

PEER = """  cloud:
    device: endpoint
    endpoint: {protocol: taxiway, url: URL, slots: 32, models: {noted: noted}, health: {every: 0.5}}
"""

WORKERS = 2
"""Of the class cpu.batch, at each site."""

PLACES = 2 * (1 + WORKERS) + 1
"""Processes of both sites."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its seconds since the start, its end and how it ended; `id` if it was accepted."""

    number: int
    live: bool
    began: float
    ended: float
    how: str
    id: str = ""

    @property
    def in_time(self) -> bool:
        """Whether a live request was answered within its deadline."""
        return self.how == "answered" and self.ended - self.began <= DEADLINE

    @property
    def private(self) -> bool:
        """Whether it may not leave the edge."""
        return _is_private(self.number)


def main() -> None:
    """Run both sides, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m lab.drills.partition", description=__doc__)
    parser.add_argument("--cut", type=float, default=600.0, help="seconds without a line")
    parser.add_argument("--kills", type=int, default=50, help="of workers and routers, at both sites")
    given = parser.parse_args()
    for title, peer in (("with a cloud that is cut off", PEER), ("without a cloud", "")):
        with tempfile.TemporaryDirectory() as name:
            say({"question": f"an edge {title}", **machine(), **uvloop.run(_drill(Path(name), peer, given))})


async def _drill(folder: Path, peer: str, given: argparse.Namespace) -> Line:
    line, port = ScriptedLine("edge", "cloud"), free_port()
    line.there, line.delay = ("127.0.0.1", port), DELAY
    edge = EDGE.replace("PEER", peer.replace("URL", await line.open()))
    with ExitStack() as stack:
        there = stack.enter_context(_site(folder / "cloud", CLOUD, port))[1] if peer else []
        classes = ["cloud"] if peer else []
        site = _site(folder / "edge", edge, free_port(), *classes)
        broker, here = await asyncio.to_thread(stack.enter_context, site)
        places = here + there
        async with taxiway.AsyncClient(broker) as client:
            asked = await _load(client, line, places, given)
            changed = sum([await _changed(client, one) for one in asked if one.how == "answered"])
        line.cut()  # nothing of it outlives the loop
    return _line(asked, changed, folder, given.cut)


@contextmanager
def _site(folder: Path, queues: str, port: int, *classes: str) -> Iterator[tuple[str, list[Place]]]:
    """A site's broker, and the places of its router, its workers, and one for each of these classes."""
    folder.mkdir()
    (folder / "queues.yaml").write_text(queues)
    with EmbeddedValkey(folder) as valkey, ExitStack() as stack:
        settings = broker_settings(valkey.url, folder / "queues.yaml", TREE / "lab" / "models")
        variables = settings.environment() | {"TAXIWAY_NOTED": str(folder / "notes")}
        crew = [["--class", "cpu.batch", "--device", f"cpu:{n}"] for n in range(WORKERS)]
        crew += [["--class", name] for name in classes]
        commands = [["-m", "api", "--host", "127.0.0.1", "--port", str(port)]]
        commands += [["-m", "workers", *arguments] for arguments in crew]
        yield (
            valkey.url,
            [stack.enter_context(Place(command, variables, folder / f"{n}.log")) for n, command in enumerate(commands)],
        )


async def _load(
    client: taxiway.AsyncClient, line: ScriptedLine, places: Sequence[Place], given: argparse.Namespace
) -> list[Asked]:
    """Send everything, and cut and kill meanwhile."""
    began = time.perf_counter()
    seconds = CALM + given.cut + BACK
    loop = asyncio.get_running_loop()
    loop.call_later(CALM, line.cut)
    loop.call_later(CALM + given.cut, line.restore)
    kills = asyncio.create_task(_kill(places, given.kills, CALM + given.cut + BACK / 2))

    async def sent(live: bool, seed: int, rate: float) -> list[Asked]:
        draw, running, due = random.Random(seed), list[asyncio.Task[Asked]](), 0.0
        while (due := due + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(began + due - time.perf_counter())
            number = 4 * len(running) + 2 * live + int(draw.random() < 0.5) + 4
            timeout = TIMEOUT + (0 if live else seconds - due)
            running.append(asyncio.create_task(_ask(client, number, began, live=live, timeout=timeout)))
        return list(await asyncio.gather(*running))

    live, bulk = await asyncio.gather(sent(True, 7, LIVE), sent(False, 8, BULK))
    await kills
    return live + bulk


async def _kill(places: Sequence[Place], kills: int, seconds: float) -> None:
    """Kill at random; what is not there is left out, so that the same processes of the edge die without a cloud."""
    draw, began = random.Random(9), time.perf_counter()
    for number in range(kills):
        await asyncio.sleep(max(0.0, began + (number + 0.5) * seconds / kills - time.perf_counter()))
        if (place := draw.randrange(PLACES)) < len(places):
            await places[place].replace()


async def _ask(client: taxiway.AsyncClient, number: int, began: float, *, live: bool, timeout: float) -> Asked:
    sent, tenant = time.perf_counter() - began, "clinic" if _is_private(number) else None
    job: taxiway.AsyncJob | None = None
    right = True

    async def answer() -> None:
        nonlocal job, right
        inputs = {"number": number, "seconds": PACE}
        job = await client.submit("noted", inputs, service="live" if live else "bulk", tenant=tenant)
        right = (await job.result(timeout)).outputs["number"] == number

    how = await outcome_of(answer())
    ended = time.perf_counter() - began
    return Asked(number, live, sent, ended, how if right else "wrong", job.id if job is not None else "")


async def _changed(client: taxiway.AsyncClient, one: Asked) -> bool:
    """Whether the store has another end of a job by now."""
    try:
        return bool((await client.job(one.id).result(TIMEOUT)).outputs["number"] != one.number)
    except TaxiwayError:
        return True


def _is_private(number: int) -> bool:
    return bool(number % 2)


def _line(asked: Sequence[Asked], changed: int, folder: Path, cut: float) -> Line:
    ran = {site: Counter(map(int, _notes(folder / site))) for site in ("edge", "cloud")}
    during = [one for one in asked if one.live and CALM <= one.began < CALM + cut]
    everywhere = ran["edge"] + ran["cloud"]
    return {
        "jobs": len(asked),
        "ended": dict(Counter(one.how for one in asked)),
        "lost": sum(one.how == "lost" for one in asked),
        "answers wrong or changed": changed + sum(one.how == "wrong" for one in asked),
        "ran in the cloud": sum(number >= 4 for number in ran["cloud"]),
        "private jobs in the cloud": sum(number >= 4 and _is_private(number) for number in ran["cloud"]),
        "run to the end twice": sum(times > 1 for number, times in everywhere.items() if number >= 4),
        "live in time during the cut": _share([one.in_time for one in during]),
        "private live in time during the cut": _share([one.in_time for one in during if one.private]),
    }


def _share(of: Sequence[bool]) -> float:
    return round(sum(of) / max(len(of), 1), 4)


def _notes(folder: Path) -> list[str]:
    notes = folder / "notes"
    return notes.read_text().split() if notes.exists() else []


if __name__ == "__main__":
    main()
