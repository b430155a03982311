"""A small fleet of a queues.yaml with one model, as the tests of `simulator.own_fleet` have it."""

from pathlib import Path

import msgspec
import pytest

from router.decide.snapshot import FleetSnapshot
from tasks.settings import TREE
from tasks.topology import Planning, Service
from tests.builders import a_class, a_device, a_topology

ECHO = a_class(2.0, max_batch=1)
TOPOLOGY = msgspec.structs.replace(
    a_topology(cpu=ECHO),
    service={"live": Service(deadline=0.25, priority="high"), "standard": Service(deadline=5.0)},
    plan=Planning(enabled=False),
)


def a_folder(folders: pytest.TempPathFactory) -> Path:
    """A models folder with echo alone."""
    folder = folders.mktemp("models")
    (folder / "echo").symlink_to(TREE / "models" / "echo")
    return folder


def seen(count: int, startable: tuple[str, ...] = (), **facts: object) -> FleetSnapshot:
    """So many devices of the class."""
    devices = tuple(a_device("cpu", worker=f"cpu.{n}", runtimes=("echo",), **facts) for n in range(count))
    return FleetSnapshot(devices=devices, startable=startable)
