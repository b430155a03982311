"""How long is one idle round trip of `echo`: taxiway's Python client and its HTTP door, beside plain Celery?

`python -m benchmarks.idle_round_trip` starts one Valkey (append-only file, flushed every second), a router, a cpu.batch
worker and a plain Celery worker with an echo task, and asks one request at a time. Within a round the paths alternate
after a few requests each, so other load on the machine affects all alike. It prints the p50 and p99 of each path, and
the ratios of the client's and the HTTP door's p50 to plain Celery's in the same round.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import taxiway
from benchmarks.measure import Line, answer, percentile, say
from benchmarks.plain_celery import echo
from benchmarks.processes import Doors, fleet_and_peer
from benchmarks.workloads import TEXT

TARGETS = {"client": 0.6, "http": 0.65}
"""Target: the largest ratios to plain Celery's p50."""

WARM_UP = 50
"""Requests of each path before the first round."""

TURN = 20
"""Consecutive requests of a path before the next path follows."""

RoundTrip = Callable[[], object]


def main() -> None:
    """Measure, and print one JSON line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle_round_trip", description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="requests of each path in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each gives one figure of the median and spread")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fleet_and_peer(Path(folder)) as doors:
        times = measured(doors, requests=given.requests, rounds=given.rounds)
    for line in lines(times):
        say(line)


def measured(doors: Doors, *, requests: int, rounds: int) -> dict[str, list[list[float]]]:
    """For each path, per round, the seconds of each request."""
    with taxiway.Client(doors.broker) as client, taxiway.Client(doors.http) as http:
        paths: dict[str, RoundTrip] = {
            "celery": lambda: echo.delay(TEXT).get(timeout=10),
            "client": lambda: client.infer("echo", TEXT),
            "http": lambda: http.infer("echo", TEXT),
        }
        for ask in paths.values():
            timed(ask, WARM_UP)
        each_round = [_one_round(paths, turns=requests // TURN) for _ in range(rounds)]
        return {name: [times[name] for times in each_round] for name in paths}


def _one_round(paths: Mapping[str, RoundTrip], *, turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(turns):
        for name, ask in paths.items():
            times[name] += timed(ask, TURN)
    return times


def timed(ask: RoundTrip, requests: int) -> list[float]:
    """Seconds of each of `requests` sequential round trips."""
    gc.collect()
    taken = []
    for _ in range(requests):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return taken


def lines(times: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[Line]:
    """What is printed: milliseconds for each path, then each ratio with its target."""
    for name, rounds in times.items():
        for share in (50, 99):
            figures = [1000 * percentile(taken, share) for taken in rounds]
            yield answer(f"idle round trip of echo, {name} p{share} ms", figures)
    for name, target in TARGETS.items():
        pairs = zip(times[name], times["celery"], strict=True)
        ratios = [statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs]
        yield answer(f"idle round trip of echo, {name}_ratio to plain Celery", ratios, target=target)


if __name__ == "__main__":
    main()
