"""LitServe: `python -m benchmarks.suite.peers.litserve`. A photograph comes as base64 text in JSON."""

from __future__ import annotations

from typing import Any

import litserve  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.suite.batch_loop import open_loop
from benchmarks.suite.workloads import plan_from_environment


class Api(litserve.LitAPI):  # type: ignore[misc]  # in an environment of its own
    """One batch loop a worker process."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self._loop = open_loop()

    def predict(self, payloads: list[Any]) -> list[Any]:
        """Answers to a batch."""
        return self._loop(payloads)


def main() -> None:
    """Serve until SIGTERM."""
    plan = plan_from_environment()
    api = Api(max_batch_size=plan.rows, batch_timeout=plan.workload.wait)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=plan.workers, timeout=300)
    server.run(host="127.0.0.1", port=plan.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
