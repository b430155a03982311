"""A real fleet for the acceptance tests, started as an operator starts it."""

from collections.abc import Iterator

import pytest

from local.fleet import LocalFleet
from local.plan import absent
from tasks.machine import look
from tasks.settings import TREE
from tasks.topology import load_topology
from tests.acceptance.running import start_fleet, taxiway


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """One fleet for all these tests: Flower and a worker of each class, emulated where the device is absent."""
    data = tmp_path_factory.mktemp("fleet")
    emulated = absent(load_topology(TREE / "queues.yaml"), look())
    yield start_fleet(data, "--workers", "cpu.batch=1", *(word for name in emulated for word in ("--emulate", name)))
    taxiway("down", "--data", str(data))
