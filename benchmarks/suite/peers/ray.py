"""Ray Serve: `python -m benchmarks.suite.peers.ray`. A photograph comes as it is, everything else as JSON."""

from __future__ import annotations

import signal
from typing import Any

import ray  # type: ignore[import-not-found]  # in an environment of its own
from ray import serve
from starlette.requests import Request  # type: ignore[import-not-found]  # in an environment of its own
from starlette.responses import JSONResponse  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.suite.batch_loop import open_loop
from benchmarks.suite.workloads import plan_from_environment

_PLAN = plan_from_environment()


@serve.deployment(
    num_replicas=_PLAN.workers, max_ongoing_requests=_PLAN.workload.outstanding, ray_actor_options={"num_cpus": 0.5}
)
class Inference:
    """One batch loop a replica."""

    def __init__(self) -> None:
        self._loop = open_loop()

    async def __call__(self, request: Request) -> Any:
        """The answer to one request."""
        photograph = _PLAN.workload.name == "W3"
        return JSONResponse(await self.together(await request.body() if photograph else await request.json()))

    @serve.batch(  # type: ignore[untyped-decorator]  # in an environment of its own
        max_batch_size=_PLAN.rows, batch_wait_timeout_s=_PLAN.workload.wait
    )
    async def together(self, payloads: list[Any]) -> list[Any]:
        """Answers to a batch."""
        return self._loop(payloads)


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4, object_store_memory=2**28)
    serve.start(http_options={"host": "127.0.0.1", "port": _PLAN.port})
    try:
        serve.run(Inference.bind(), blocking=True)  # type: ignore[attr-defined]  # the decorator's
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
