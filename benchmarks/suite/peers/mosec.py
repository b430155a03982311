"""mosec: `python -m benchmarks.suite.peers.mosec`. A photograph comes as it is, everything else as JSON."""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.suite.batch_loop import open_loop
from benchmarks.suite.workloads import plan_from_environment

_PLAN = plan_from_environment()


class Inference(Worker):  # type: ignore[misc]  # in an environment of its own
    """One batch loop a worker process."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = open_loop()

    def deserialize(self, data: bytes) -> Any:
        """The payload."""
        return data if _PLAN.workload.name == "W3" else super().deserialize(data)

    def forward(self, payloads: Any) -> Any:
        """Answers to a batch."""
        return self._loop(payloads)


def main() -> None:
    """Serve until SIGTERM."""
    settings = {"ADDRESS": "127.0.0.1", "PORT": str(_PLAN.port), "TIMEOUT": "300000", "CAPACITY": "16384"}
    os.environ |= {f"MOSEC_{name}": value for name, value in settings.items()}
    wait = max(1, round(1000 * _PLAN.workload.wait))
    server = Server()
    server.append_worker(Inference, num=_PLAN.workers, max_batch_size=_PLAN.rows, max_wait_time=wait, timeout=300)
    server.run()


if __name__ == "__main__":
    main()
