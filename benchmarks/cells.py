"""What does a job cost a front that spreads work over cells, and what does it cost a cell?

`python -m benchmarks.cells` starts one, two and three whole fleets, each with a Valkey, a router and a worker, and in
front of them one whose only classes are these. Each cell has a copy of the model `paced` of its own name, and callers
ask for them in turn, so that the cells have equal shares; `benchmarks.decision_speed` has what a choice among many
costs. It prints processor time for each job, by process, which other load on the machine affects less than the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import taxiway
from benchmarks.harness.measure import answer, cpu_seconds, say
from benchmarks.harness.processes import Interfaces, fleet
from tasks.settings import TREE

SLOTS = 256
"""Jobs outstanding for each cell."""

_CELL = """
site: SITE
hardware:
  cpu.batch:
    device: cpu
    runtimes: [echo]
    max_batch: 16
    max_wait: 0
    price: {usd_per_hour: 0.05}
    warm: [SITE]
service: {standard: {deadline: 60}}
default_service: standard
"""
_FRONT = """
site: front
hardware:
CELLS
service: {standard: {deadline: 60}}
default_service: standard
"""
_PEER = """  SITE:
    device: endpoint
    endpoint: {protocol: taxiway, url: "URL", slots: 256, models: {SITE: SITE}}
"""


def main() -> None:
    """Measure, and print a JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells", description=__doc__)
    parser.add_argument("--cells", type=int, default=3, help="the most cells")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of a round, for each cell")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each gives one figure of the median and spread")
    given = parser.parse_args()
    for count in range(1, given.cells + 1):
        with tempfile.TemporaryDirectory() as folder, front(Path(folder), count) as (interfaces, cells):
            asyncio.run(_drive(interfaces, cells, given.jobs, given.rounds))


@contextmanager
def front(folder: Path, count: int) -> Iterator[tuple[Interfaces, list[Interfaces]]]:
    """A front with so many cells."""
    with ExitStack() as stack:
        for number in range(count):
            _add_model(folder / "models", f"cell-{number}")
        cells = [
            stack.enter_context(_fleet(folder, site, _CELL.replace("SITE", site), ["cpu.batch", "cpu:0"]))
            for site in (f"cell-{number}" for number in range(count))
        ]
        peers = [_PEER.replace("SITE", f"cell-{n}").replace("URL", cell.http) for n, cell in enumerate(cells)]
        queues = _FRONT.replace("CELLS", "".join(peers))
        workers = [[f"cell-{number}", "endpoint:0"] for number in range(count)]
        yield stack.enter_context(_fleet(folder, "front", queues, *workers)), cells


@contextmanager
def _fleet(folder: Path, site: str, text: str, *workers: Sequence[str]) -> Iterator[Interfaces]:
    own = folder / site
    own.mkdir()
    (own / "queues.yaml").write_text(text)
    arguments = [["--class", name, "--device", device] for name, device in workers]
    with fleet(own, own / "queues.yaml", arguments, folder / "models") as interfaces:
        yield interfaces


def _add_model(models: Path, site: str) -> None:
    text = (TREE / "models" / "paced" / "model.yaml").read_text()
    (models / site).mkdir(parents=True)
    (models / site / "model.yaml").write_text(text.replace("name: paced", f"name: {site}", 1))


async def _drive(interfaces: Interfaces, cells: Sequence[Interfaces], jobs: int, rounds: int) -> None:
    """Let callers send jobs, and print what each took."""
    at, total = {"front": interfaces.processes, "cell": _joined(cells)}, jobs * len(cells)
    rates, costs = [], list[dict[str, float]]()
    async with taxiway.AsyncClient(interfaces.broker) as client:
        await _round(client, total // 4, len(cells))
        for _ in range(rounds):
            before, began = _used(at), time.perf_counter()
            await _round(client, total, len(cells))
            rates.append(total / (time.perf_counter() - began))
            costs.append({role: 1e6 * (used - before[role]) / total for role, used in _used(at).items()})
    where = f"of {len(cells)} cells" if len(cells) > 1 else "of one cell"
    for role in costs[0]:
        question = f"microseconds of processor time for a job, {role} {where}"
        say(answer(question, [one[role] for one in costs]))
    say(answer(f"jobs/s {where}", rates))


async def _round(client: taxiway.AsyncClient, jobs: int, cells: int) -> None:
    """So many jobs, in equal shares."""

    async def share(cell: int) -> None:
        texts = (f"job {number}" for number in range(jobs // cells))
        async for _ in client.map(f"cell-{cell}", texts, window=SLOTS):
            pass

    await asyncio.gather(*map(share, range(cells)))


def _joined(cells: Sequence[Interfaces]) -> dict[str, list[int]]:
    """The processes of all cells by role."""
    return {role: [pid for cell in cells for pid in cell.processes[role]] for role in cells[0].processes}


def _used(at: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """Processor time of each role's processes so far."""
    return {f"{side}'s {role}": sum(map(cpu_seconds, pids)) for side, its in at.items() for role, pids in its.items()}


if __name__ == "__main__":
    main()
