"""The state store's scripts, workers' hold on their queues, and a server that a careful operator runs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.valkey.class_queue import ClassQueue
from tasks.queues.limits import Limits
from tasks.settings import Settings
from tests.guarded import Guarded, guarded_valkey
from tests.scripting import Store


@pytest.fixture
def store(scripts: Store) -> Store:
    return scripts


@pytest.fixture
def class_queue(settings: Settings) -> Iterator[Callable[..., ClassQueue]]:
    """Opens the queues of a class for the worker of a name."""
    opened: list[ClassQueue] = []

    def open_queue(worker: str, limits: Limits | None = None, **options: Any) -> ClassQueue:
        opened.append(ClassQueue(settings.broker, worker, limits or Limits(), **options))
        return opened[-1]

    yield open_queue
    for queue in opened:
        queue.wake()
        queue._bell.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_valkey(tmp_path_factory.mktemp("guarded"), ["cpu.batch", "gpu.realtime"]) as server:
        yield server
