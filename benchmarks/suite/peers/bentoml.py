"""BentoML: `bentoml serve benchmarks.suite.peers.bentoml:Inference`. A photograph comes as base64 text in JSON."""

from __future__ import annotations

from typing import Any

import bentoml  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.suite.batch_loop import open_loop
from benchmarks.suite.workloads import plan_from_environment

_PLAN = plan_from_environment()


@bentoml.service(
    workers=_PLAN.workers,
    traffic={"timeout": 300, "max_concurrency": 1024},
    logging={"access": {"enabled": False}},  # no other server here writes a line a request
)
class Inference:
    """One batch loop a worker process."""

    def __init__(self) -> None:
        self._loop = open_loop()

    @bentoml.api(  # type: ignore[untyped-decorator]  # in an environment of its own
        batchable=True, max_batch_size=_PLAN.rows, max_latency_ms=60_000
    )
    def predict(self, payloads: list[Any]) -> list[Any]:
        """Answers to a batch."""
        return self._loop(payloads)
