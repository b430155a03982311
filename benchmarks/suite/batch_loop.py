"""A workload's model in a plain batch loop in one process: what every contestant runs, and by itself the upper limit.

`python -m benchmarks.suite.batch_loop --seconds 3` loads the model of its plan, announces that it is ready, waits for a
line on stdin, and prints how many items it processed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.workloads import Plan, payloads, plan_from_environment, row_of
from tasks.models.folder import load_catalogue
from workers.port import Placed, Row, import_runtime, open_pipeline

MODELS = "TAXIWAY_MODELS"
"""The variable with the catalogue's folder, the same as the fleet's."""


class BatchLoop:
    """The plan's model, loaded. A call with payloads returns JSON values for each. Thread-safe.

    Args:
        models: the catalogue's folder.
    """

    def __init__(self, plan: Plan, models: Path) -> None:
        self.workload = plan.workload
        model = load_catalogue(models).resolve(self.workload.model)
        variant = model.variants[self.workload.variant]
        files = {role: Path(path) for role, path in plan.files.items()}
        placed = Placed(
            self.workload.variant, variant.precision, variant.entry, files, "cpu", plan.threads, folder=model.folder
        )
        self._runtime = import_runtime(variant.runtime)(placed)
        self._runtime.load()
        self._pipeline = open_pipeline(model, variant, placed)
        self._parameters = {name: p.default for name, p in model.parameters.items()}
        self.rows = plan.rows
        self._device = nullcontext() if plan.workload.reentrant else threading.Lock()

    def __call__(self, given: Sequence[Any]) -> list[Any]:
        """Answer each payload, in batches of at most the plan's rows."""
        items = [self._pipeline.prepare(row_of(self.workload, one), self._parameters) for one in given]
        answers: list[Row] = []
        for first in range(0, len(items), self.rows):
            with self._device:
                answers += self._pipeline.run(self._runtime, items[first : first + self.rows])
        return [_plain(answer) for answer in answers]


def open_loop() -> BatchLoop:
    """The batch loop of this process's plan."""
    return BatchLoop(plan_from_environment(), Path(os.environ[MODELS]))


def _plain(answer: Row) -> Any:
    values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in answer.items()}
    return next(iter(values.values())) if len(values) == 1 else values


def main() -> None:
    """Run full batches for a while."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite.batch_loop", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    plan, loop = plan_from_environment(), open_loop()
    asked = payloads(plan)
    batches = [asked[first : first + plan.rows] for first in range(0, len(asked), plan.rows)]
    loop(batches[0])
    _say({"ready": True})
    sys.stdin.readline()
    items, number, began, cpu = 0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + given.seconds:
        items += len(loop(batches[number % len(batches)]))
        number += 1
    _say({"items": items, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
