"""How long does a placement take? Printed as JSON lines: 1,000 in a row over 100 candidates, and single ones over 6.

Run `python -m benchmarks.placement_speed`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.idle_round_trip import machine
from router.board import Board, lay_out
from router.classify import Constraints, Needs
from router.fleet import Backlog, FleetSnapshot
from router.placement import choose
from tasks.catalogue import Model, Profile, TensorSpec, Variant
from tasks.document import Size
from tasks.facts import DeviceFacts
from tasks.profiles import ProfileBook
from tasks.topology import HardwareClass, Price, Service, Topology

REPEATS = 9
TEXT = TensorSpec(name="text", datatype="BYTES", shape=(-1,))


def board_of(classes: int, variants: int) -> Board:
    """A board of `classes` × `variants` candidates, each class with four live devices."""
    model = Model(
        name="m",
        version=1,
        summary="",
        licence="",
        pipeline="text",
        inputs=(TEXT,),
        outputs=(TEXT,),
        reference="v0",
        variants={
            f"v{n}": Variant(runtime="onnx", memory=Size(1), profiles={"cpu": Profile(0.001 * (n + 1), 1e-5)})
            for n in range(variants)
        },
    )
    hardware = {
        f"c{n}": HardwareClass(
            device="cpu", runtimes=("onnx",), max_batch=32, max_wait=0.002, price=Price(0.05 * (n + 1))
        )
        for n in range(classes)
    }
    topology = Topology(hardware=hardware, service={"standard": Service(deadline=5.0)}, default_service="standard")
    devices = tuple(
        DeviceFacts(
            worker=f"{name}.{n}",
            hardware_class=name,
            device="cpu:0",
            kind="cpu",
            emulated=False,
            name="x",
            memory_total=2**34,
            memory_free=2**34,
            runtimes=("onnx",),
            warm=("m:1/v0",),
        )
        for name in hardware
        for n in range(4)
    )
    return lay_out(model, Constraints("standard"), topology, FleetSnapshot(devices, rates={"m:1": 20.0}), ProfileBook())


def seconds_of_each(board: Board, requests: int) -> list[float]:
    """Seconds of each of `requests` placements in a row, each counting the work of those before."""
    backlog = Backlog(board.classes, {})
    taken = []
    for seed in range(requests):
        needs = Needs(deadline=5.0, level=1, rows=1, size=20 + seed % 40)
        started = time.perf_counter()
        placement = choose(board, needs, backlog.seconds, seed=seed)
        backlog.add(placement.candidate.hardware_class, 1, placement.work)
        taken.append(time.perf_counter() - started)
    return taken


def report(question: str, measure: Callable[[], float], *, at_most: float) -> None:
    """Print one line: the median and spread of `REPEATS` measurements, in microseconds."""
    values = sorted(measure() * 1e6 for _ in range(REPEATS))
    line = {
        "question": question,
        **machine(),
        "repeats": REPEATS,
        "median": round(statistics.median(values), 1),
        "spread": round(values[-1] - values[0], 1),
        "at_most": at_most,
    }
    sys.stdout.write(json.dumps(line) + "\n")


def main() -> None:
    """Measure and print."""
    wide, narrow = board_of(50, 2), board_of(3, 2)
    report(
        "microseconds a placement, 1,000 in bulk over 100 candidates",
        lambda: statistics.fmean(seconds_of_each(wide, 1000)),
        at_most=100,
    )
    report(
        "microseconds of a single placement over 6 candidates, p99 of 1,000",
        lambda: sorted(seconds_of_each(narrow, 1000))[989],
        at_most=50,
    )


if __name__ == "__main__":
    main()
