"""What does it cost to call a Python callable in a process of its own? `python -m benchmarks.calling`.

Compares calls with a number, and round trips of arrays, with the same in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness.measure import answer, say
from tasks.models.files import Code
from workers.calling.child import Child

REPEATS = 9
CALLS = 1000
SIZES = (2**20, 2**24)
"""Array sizes in bytes: a photograph, and the default limit of a request."""


def main() -> None:
    """Print a line for the small call, and one for each size."""
    echo, small = Code("benchmarks.calling:give_back"), {"value": np.asarray(1)}
    with_process, alone = _in_turns(echo, small, lambda: give_back(1), CALLS)
    added = [one - other for one, other in zip(with_process, alone, strict=True)]
    say(answer("milliseconds that its own process adds to a small call", added, least=round(min(added), 3)))
    for size in SIZES:
        array = {"value": np.zeros(size, np.uint8)}
        with_process, _ = _in_turns(echo, array, lambda: None, CALLS // 50)
        say(
            answer(
                "milliseconds of a call with an array there and back",
                with_process,
                bytes=size,
                least=round(min(with_process), 2),
            )
        )


def give_back(value: object) -> dict[str, object]:
    """The value."""
    return {"value": value}


def _in_turns(
    code: Code, inputs: dict[str, np.ndarray], direct: Callable[[], object], calls: int
) -> tuple[list[float], list[float]]:
    """Milliseconds a call, by process and direct, of each repeat."""
    child = Child(code)
    child.await_ready()
    try:
        times = [
            (_milliseconds(lambda: child.call(inputs, _unwatched), calls), _milliseconds(direct, calls))
            for _ in range(REPEATS)
        ]
    finally:
        child.end()
    return [by_process for by_process, _ in times], [alone for _, alone in times]


def _milliseconds(call: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls * 1000


def _unwatched() -> None:
    """The calls of the benchmark are never cancelled."""


if __name__ == "__main__":
    main()
