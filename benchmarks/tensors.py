"""What does a large tensor's round trip cost, compared to writing and reading its bytes at the broker, once each way?

`python -m benchmarks.tensors` starts a broker, a router and a worker that returns its input, and sends tensors of 1 MB
and 8 MB (float32) one at a time, by the client and at the HTTP API. In alternation it writes and reads the same bytes
in the same Valkey twice, which is the minimum for any queue.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import redis

import taxiway
from benchmarks.harness.bars import Bar, Panel, write_chart
from benchmarks.harness.measure import CHARTS, Line, answer, machine, say
from benchmarks.harness.processes import Interfaces, fleet
from benchmarks.suite.catalogue import CLASS, OWN, queues_of
from taxiway.errors import TaxiwayError

SIZES = {"1 MB": 10**6, "8 MB": 8 * 10**6}
"""Bytes."""

TARGET = 1.5
"""Target: the largest ratio to writing and reading the bytes."""

MODEL = "echo-tensor"

SEED = 7

RoundTrip = Callable[[], Any]
"""Returns the tensor."""

Rounds = dict[str, list[float]]
"""Milliseconds of each round's median by path."""


def main() -> None:
    """Measure, print each figure and ratio, and write the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensors", description=__doc__)
    parser.add_argument("--requests", type=int, default=20, help="requests of each path in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of each figure counts")
    parser.add_argument("--chart", type=Path, default=CHARTS / "tensors.html", help="where the chart is written")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "queues.yaml").write_text(queues_of(MODEL, rows=4))
        worker = ["--class", CLASS, "--device", "cpu:0"]
        with fleet(folder, folder / "queues.yaml", [worker], OWN) as interfaces:
            measured = {
                size: round_trips(interfaces, count, requests=given.requests, rounds=given.rounds)
                for size, count in SIZES.items()
            }
    for line in lines(measured):
        say(line)
    panels = [Panel(f"Round trip of {size}, p50", "ms", _bars(rounds)) for size, rounds in measured.items()]
    write_chart(given.chart, "Large tensors, in and out", str(machine()["device"]), panels)


def round_trips(interfaces: Interfaces, size: int, *, requests: int, rounds: int) -> Rounds:
    """The rounds of one size in bytes; within a round the paths take turns of one request each."""
    tensor = np.random.default_rng(SEED).random(size // 4, np.float32)
    with (
        taxiway.Client(interfaces.broker, arrays=True) as client,
        taxiway.Client(interfaces.http, arrays=True) as http,
        redis.Redis.from_url(interfaces.broker) as store,
    ):
        paths: Mapping[str, RoundTrip] = {
            "bytes": lambda: write_and_read(store, tensor),
            "client": lambda: client.infer(MODEL, tensor).outputs["tensor"],
            "http": lambda: http.infer(MODEL, tensor).outputs["tensor"],
        }
        able = {path: ask for path, ask in paths.items() if _is_able(path, ask, tensor)}
        each_round = [_one_round(able, requests) for _ in range(rounds)]
    return {path: [1000 * taken[path] for taken in each_round] for path in able}


def _is_able(path: str, ask: RoundTrip, tensor: np.ndarray) -> bool:
    """Warm up a path and check that it returns the tensor; a path with a lower size limit is reported."""
    try:
        got = np.asarray(ask(), np.float32)
    except TaxiwayError as error:
        question = f"round trip of a tensor of {tensor.nbytes} bytes, {path}"
        say({"question": question, **machine(), "absent": str(error)})
        return False
    assert np.array_equal(tensor, got), f"another tensor came back by {path}"
    return True


def write_and_read(store: redis.Redis, tensor: np.ndarray) -> np.ndarray:
    """Write and read the tensor's bytes twice: once for each way."""
    read = b""
    for key in ("benchmark:in", "benchmark:out"):
        store.set(key, tensor.data)
        read = cast(bytes, store.get(key))
    return np.frombuffer(read, np.float32)


def _one_round(paths: Mapping[str, RoundTrip], requests: int) -> dict[str, float]:
    """The median of each path's seconds."""
    taken: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(requests):
        for path, ask in paths.items():
            began = time.perf_counter()
            ask()
            taken[path].append(time.perf_counter() - began)
    return {path: statistics.median(times) for path, times in taken.items()}


def lines(measured: Mapping[str, Rounds]) -> Iterator[Line]:
    """The output: milliseconds of each path, then our ratio to writing and reading the bytes."""
    for size, rounds in measured.items():
        for path, taken in rounds.items():
            yield answer(f"round trip of a tensor of {size}, {path} p50 ms", taken)
        for path in (path for path in rounds if path != "bytes"):
            ratios = [ours / least for ours, least in zip(rounds[path], rounds["bytes"], strict=True)]
            question = f"round trip of a tensor of {size}, ratio of {path} to writing and reading its bytes each way"
            yield answer(question, ratios, target=TARGET, holds=statistics.median(ratios) <= TARGET)


def _bars(rounds: Rounds) -> list[Bar]:
    return [Bar(path, taken, own=path != "bytes") for path, taken in rounds.items()]


if __name__ == "__main__":
    main()
