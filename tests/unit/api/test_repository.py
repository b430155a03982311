from typing import Any

import pytest

from api.routing.repository import LoadProgress, progress
from router.decide.snapshot import FleetSnapshot
from tasks.document import Size
from tasks.models.model import Profile, Variant
from tests.builders import a_class, a_device, a_text_model, a_topology

MODEL = a_text_model(
    echo=Variant(runtime="echo", memory=Size(0), profiles={"cpu": Profile(0.1, 0.0)}),
    big=Variant(runtime="echo", memory=Size(2**40), profiles={"cpu": Profile(0.1, 0.0)}),
)
TOPOLOGY = a_topology(fast=a_class(), slow=a_class(), other=a_class(runtimes=("onnx",)))
WARM = {"warm": (f"{MODEL.id}/echo",)}
FAILED = {"unavailable": {f"{MODEL.id}/echo": "no such file"}}


def device(name: str, **fields: Any) -> Any:
    return a_device(name.partition("@")[0], worker=name, runtimes=("echo",), **fields)


ONE, TWO, LOADED = device("fast@1"), device("fast@2"), device("fast@1", **WARM)
WAITS = "not loaded yet: it is still loading, or other models use the memory that it needs"
NO_ROOM = "big: needs 1099511627776 bytes of memory, fast@1 has 17179869184; echo: unavailable on fast@1: no"


@pytest.mark.parametrize(
    ("devices", "loaded", "pending", "text"),
    [
        ([], 0, 0, "no live device"),
        ([ONE], 0, 1, WAITS),
        ([LOADED], 1, 0, "loaded on 1 of 1 devices"),
        ([LOADED, TWO], 1, 1, "loaded on 1 of 2 devices"),
        ([LOADED, device("fast@2", draining=True)], 1, 0, "loaded on 1 of 1 devices"),
        ([device("fast@1", **FAILED)], 0, 0, NO_ROOM),
        ([device("fast@1", **FAILED), TWO], 0, 1, "not loaded yet"),
    ],
)
def test_a_load_is_reported_by_class(devices: list[Any], loaded: int, pending: int, text: str) -> None:
    found = progress(MODEL, TOPOLOGY, FleetSnapshot(devices=tuple(devices)))
    assert found.keys() == {"fast", "slow"}
    assert (found["fast"].loaded, found["fast"].pending) == (loaded, pending)
    assert found["fast"].text.startswith(text)


def test_a_worker_without_a_heartbeat_since_may_still_load_it() -> None:
    fleet = FleetSnapshot(devices=(device("fast@1", **FAILED), device("slow@1", **WARM)))
    found = progress(MODEL, TOPOLOGY, fleet, reporting=())
    assert found == {"fast": LoadProgress(0, 1), "slow": LoadProgress(0, 1)}
    assert progress(MODEL, TOPOLOGY, fleet, reporting={"fast@1", "slow@1"})["slow"] == LoadProgress(1, 0)
