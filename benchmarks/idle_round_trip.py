"""How long is one idle round trip of `echo`: taxiway's Python client and its HTTP API, beside plain Celery?

`python -m benchmarks.idle_round_trip` starts one Valkey (append-only file, flushed every second), a router, a cpu.batch
worker and a plain Celery worker with an echo task, and asks one request at a time. Within a round the paths alternate
after a few requests each, so other load on the machine affects all alike. It prints the p50 and p99 of each path, the
ratios of the client's and the HTTP API's p50 to plain Celery's in the same round, and for each path and process the
thread switches and the processor time of a request, which other load affects less than the times.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import taxiway
from benchmarks.harness.measure import Line, answer, cpu_seconds, percentile, say, thread_switches
from benchmarks.harness.plain_celery import echo
from benchmarks.harness.processes import Interfaces, fleet_and_peer
from benchmarks.suite.workloads import TEXT

TARGETS = {"client": 0.58, "http": 0.64}
"""Target: the largest ratios to plain Celery's p50."""

WARM_UP = 50
"""Requests of each path before the first round."""

TURN = 20
"""Consecutive requests of a path before the next path follows."""

RoundTrip = Callable[[], object]

SERVING = {
    "celery": ("broker", "celery"),
    "client": ("broker", "router", "worker"),
    "http": ("broker", "router", "worker"),
}
"""The processes that serve each path, besides this one."""


@dataclass(slots=True)
class Figures:
    """What a path's requests in one round took: seconds each, and in each process all switches and processor time."""

    times: list[float] = field(default_factory=list)
    switches: Counter[str] = field(default_factory=Counter)
    cpu: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_round_trip", description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="requests of each path in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each gives one figure of the median and spread")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fleet_and_peer(Path(folder)) as interfaces:
        rounds = measured(interfaces, requests=given.requests, rounds=given.rounds)
    for line in lines(rounds):
        say(line)


def measured(interfaces: Interfaces, *, requests: int, rounds: int) -> list[dict[str, Figures]]:
    """The figures of each path, per round."""
    with taxiway.Client(interfaces.broker) as client, taxiway.Client(interfaces.http) as http:
        paths: dict[str, RoundTrip] = {
            "celery": lambda: echo.delay(TEXT).get(timeout=10),
            "client": lambda: client.infer("echo", TEXT),
            "http": lambda: http.infer("echo", TEXT),
        }
        for ask in paths.values():
            timed(ask, WARM_UP)
        return [_one_round(paths, interfaces.processes, turns=requests // TURN) for _ in range(rounds)]


def _one_round(paths: Mapping[str, RoundTrip], pids: Mapping[str, Sequence[int]], *, turns: int) -> dict[str, Figures]:
    figures = {name: Figures() for name in paths}
    for _ in range(turns):
        for name, ask in paths.items():
            one = figures[name]
            gc.collect()  # here: it takes as long as several requests
            before, began = _spent(pids), (_own_switches(), time.process_time())
            one.times += timed(ask, TURN)
            one.cpu["client"] += time.process_time() - began[1]
            one.switches["client"] += _own_switches() - began[0]
            for role, (switches, cpu) in _spent(pids).items():
                one.switches[role] += switches - before[role][0]
                one.cpu[role] += cpu - before[role][1]
    return figures


def _spent(pids: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, float]]:
    """Thread switches and processor time of each role's processes so far."""
    return {
        role: (sum(map(thread_switches, of_role)), sum(map(cpu_seconds, of_role))) for role, of_role in pids.items()
    }


def _own_switches() -> int:
    """How often this process's threads waited for something so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def timed(ask: RoundTrip, requests: int) -> list[float]:
    """Seconds of each of `requests` sequential round trips."""
    taken = []
    for _ in range(requests):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return taken


def lines(rounds: Sequence[Mapping[str, Figures]]) -> Iterator[Line]:
    """What is printed: milliseconds for each path, each ratio with its target, then what each process did."""
    for name in SERVING:
        for share in (50, 99):
            figures = [1000 * percentile(one[name].times, share) for one in rounds]
            yield answer(f"idle round trip of echo, {name} p{share} ms", figures)
    for name, target in TARGETS.items():
        ratios = [statistics.median(one[name].times) / statistics.median(one["celery"].times) for one in rounds]
        yield answer(f"idle round trip of echo, {name}_ratio to plain Celery", ratios, target=target)
    for name, roles in SERVING.items():
        for role in ("client", *roles):
            switches = [one[name].switches[role] / len(one[name].times) for one in rounds]
            yield answer(f"idle round trip of echo by {name}, thread switches of the {role} a request", switches)
            cpu = [1e6 * one[name].cpu[role] / len(one[name].times) for one in rounds]
            yield answer(f"idle round trip of echo by {name}, processor time of the {role} a request in us", cpu)


if __name__ == "__main__":
    main()
