"""A whole small fleet: a router and the worker behind it, as real processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tasks.settings import Settings
from tests.routing import HTTP, RouterProcess, eventually, router_process
from tests.working import WorkerProcess, worker_process


@dataclass(frozen=True)
class ServedFleet:
    """A router and a worker."""

    settings: Settings
    router: RouterProcess
    worker: WorkerProcess

    @property
    def interfaces(self) -> dict[str, str]:
        """The address of each interface that has a client of ours."""
        return {"broker": self.settings.broker, "http": self.router.http}


@contextmanager
def served_fleet(
    settings: Settings, model: str = "echo", options: Sequence[str] = (), *, worker: Sequence[str] = (), log: Any = None
) -> Iterator[ServedFleet]:
    """The fleet, once its router can place the model. `options` are the router's, `worker` and `log` the worker's."""
    with worker_process(settings, *worker, log=log) as served, router_process(settings, options=options) as router:
        eventually(lambda: is_ready(router, model))
        yield ServedFleet(settings, router, served)


def is_ready(router: RouterProcess, model: str = "echo") -> bool:
    """Whether a router that has no keys can place the model."""
    return HTTP.get(f"{router.http}/v2/models/{model}/ready").is_success
