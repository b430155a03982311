"""How much processor time does a message cost on its way through a router, and how much of the broker's?

`python -m benchmarks.router_speed` starts one Valkey (append-only file, flushed every second) and a router, puts echo
requests into the arrivals all at once, and waits until the last one is in its class queue, placed, signed and recorded.
Nothing else runs: the device that the router sees only sends heartbeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import redis

from benchmarks.harness.measure import answer, cpu_seconds, say
from benchmarks.harness.processes import Interfaces, fleet
from broker.valkey import run
from broker.valkey.processes import heartbeat_call
from tasks.heartbeat import HEARTBEAT as BEAT
from tasks.heartbeat import DeviceFacts, variant_key
from tasks.settings import TREE
from taxiway.contract.keys import ARRIVALS, priority_lists
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message

HARDWARE_CLASS = "cpu.batch"

STAGED = "benchmark:staged"
"""The list for messages before they all arrive at once."""

TEXT = "What a smooth and friendly flight, thank you!"

TARGET = 35.0
"""Target: microseconds of router time per message."""

TIMEOUT = 120.0
"""Seconds within which all messages must be placed."""


def main() -> None:
    """Measure, and print one JSON line for each process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_speed", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="messages in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each gives one figure of the median and spread")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), TREE / "queues.yaml", []) as interfaces:
        store = redis.Redis.from_url(interfaces.broker)
        with living_device(interfaces.broker):
            drain(interfaces, store, given.messages // 10)
            rounds = [drain(interfaces, store, given.messages) for _ in range(given.rounds)]
        store.close()
    for process, target in (("router", {"at_most": TARGET}), ("broker", {})):
        question = f"microseconds of the {process}'s processor time for a message on its way through the router"
        say(answer(question, [costs[process] for costs in rounds], **target))
    say(answer("messages/s through one router", [costs["rate"] for costs in rounds]))


@contextmanager
def living_device(url: str) -> Iterator[None]:
    """Heartbeats of one device at a worker's rate, for the duration of the block."""
    facts = DeviceFacts(
        worker="benchmark",
        hardware_class=HARDWARE_CLASS,
        device="cpu:0",
        kind="cpu",
        emulated=False,
        name="benchmark",
        memory_total=2**34,
        memory_free=2**34,
        runtimes=("echo",),
        warm=(variant_key("echo:1", "echo"),),
    )
    store, stopping = redis.Redis.from_url(url), threading.Event()

    def beat() -> None:
        while True:
            run(store, heartbeat_call(facts.worker, msgspec.json.encode(facts)))
            if stopping.wait(BEAT):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        time.sleep(2 * BEAT)
        yield
    finally:
        stopping.set()
        thread.join()
        store.close()


def drain(interfaces: Interfaces, store: redis.Redis, messages: int) -> dict[str, float]:
    """Let messages arrive; returns each process's microseconds per message, and messages per second as `rate`."""
    _stage(store, messages)
    before, began = _used(interfaces), time.perf_counter()
    store.rename(STAGED, ARRIVALS)
    while _placed(store) < messages:
        if time.perf_counter() - began > TIMEOUT:
            sys.exit(f"{_placed(store)} of {messages} messages were placed within {TIMEOUT:g} s")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    costs = {name: (used - before[name]) / messages * 1e6 for name, used in _used(interfaces).items()}
    store.delete(*priority_lists(HARDWARE_CLASS))
    return {**costs, "rate": messages / seconds}


def _stage(store: redis.Redis, messages: int) -> None:
    request = Request(model="echo", inputs=TEXT, deadline=600)
    pipeline = store.pipeline(transaction=False)
    for _ in range(messages):
        pipeline.lpush(STAGED, infer_message(str(uuid.uuid4()), request, reply="benchmark", origin="benchmark"))
    pipeline.execute()


def _placed(store: redis.Redis) -> int:
    return sum(int(store.llen(name)) for name in priority_lists(HARDWARE_CLASS))


def _used(interfaces: Interfaces) -> dict[str, float]:
    return {name: sum(map(cpu_seconds, pids)) for name, pids in interfaces.processes.items() if pids}


if __name__ == "__main__":
    main()
