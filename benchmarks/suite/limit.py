"""The in-process limit of a workload: parallel batch loops without a queue or a server."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from benchmarks.harness.processes import TIMEOUT, NotReadyError, running
from benchmarks.suite.batch_loop import MODELS
from benchmarks.suite.workloads import Plan


@dataclass(frozen=True, slots=True)
class Limit:
    """The loops' total throughput in items per second, and processor seconds per item."""

    rate: float
    cpu: float


def measure_limit(plan: Plan, models: Path, folder: Path, *, seconds: float) -> Limit:
    """Run the plan's loops in parallel.

    Raises:
        NotReadyError: one failed to load its model, or exited.
    """
    command = [sys.executable, "-m", "benchmarks.suite.batch_loop", "--seconds", str(seconds)]
    variables, log = plan.environment() | {MODELS: str(models)}, folder / "limit.log"
    with ExitStack() as stack:
        loops = [
            stack.enter_context(running(command, variables, log, output=subprocess.PIPE)) for _ in range(plan.workers)
        ]
        pipes = [(loop.stdin, loop.stdout) for loop in loops]
        for _, says in pipes:
            _line(says, log, TIMEOUT)
        for start, _ in pipes:
            assert start is not None
            start.write(b"go\n")
            start.flush()
        done = [_line(says, log, TIMEOUT + 4 * seconds) for _, says in pipes]
    items = sum(each["items"] for each in done)
    return Limit(sum(each["items"] / each["seconds"] for each in done), sum(each["cpu"] for each in done) / items)


def layouts(plan: Plan) -> Iterator[Plan]:
    """The possible layouts on the machine's cores: threads of one process, or a process per core."""
    cores = os.cpu_count() or 1
    if not plan.workload.computes or cores == 1:
        yield plan
        return
    yield replace(plan, workers=cores, threads=1)
    yield replace(plan, workers=1, threads=cores)


def best_layout(plan: Plan, models: Path, folder: Path, *, seconds: float) -> Plan:
    """The layout with the highest throughput, which every contestant uses."""
    reached = [(measure_limit(each, models, folder, seconds=seconds).rate, each) for each in layouts(plan)]
    return max(reached, key=lambda pair: pair[0])[1]


def _line(says: IO[bytes] | None, log: Path, timeout: float) -> dict[str, float]:
    assert says is not None
    readable, _, _ = select.select([says], [], [], timeout)
    line = says.readline() if readable else b""
    if not line:
        raise NotReadyError(
            f"a batch loop printed nothing within {timeout:g} s; {log} ends with:\n{log.read_text()[-500:]}"
        )
    figures: dict[str, float] = json.loads(line)
    return figures
