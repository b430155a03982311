from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from router.metrics import Done, exposition
from router.view import ClassView, FleetView
from tests.unit.test_rebalance import two_classes

ROOT = Path(__file__).parents[2]


def a_class(**changes: object) -> ClassView:
    facts: dict[str, object] = {
        "device": "cuda",
        "devices": 2,
        "emulated": 1,
        "usd_per_hour": 0.71,
        "spending": 1.42,
        "utilisation": 0.5,
        "depth": (1, 2, 0, 4),
        "oldest": 1.5,
        "work": (0.1, 0.2, 0.0, 3.0),
        "held": (0.0, 0.0, 0.0, 9.0),
        "rows_per_second": 12.5,
        "running": 3,
        "warm": ("generate:1",),
        "replicas": 3,
        "why": "the test says so",
    }
    return ClassView(**(facts | changes))  # type: ignore[arg-type]


def samples(view: FleetView, done: Done) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(exposition(view, done).decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def view(**classes: ClassView) -> FleetView:
    _, _, fleet = two_classes()
    return FleetView(stale=False, now=0.0, classes=classes, devices=fleet.devices, moves=())


def test_every_figure_of_a_class_is_a_sample_that_prometheus_reads() -> None:
    done = Done({("gpu", "generate:1"): 7}, {("gpu", "cpu", "save"): 2})
    found = samples(view(gpu=a_class()), done)
    assert found["taxiway_devices", "gpu"] == 2
    assert found["taxiway_waiting", "gpu", "3"] == 4
    assert found["taxiway_held_seconds", "gpu", "3"] == 9
    assert found["taxiway_wanted_replicas", "gpu"] == 3
    assert found["taxiway_placed_total", "gpu", "generate:1"] == 7
    assert found["taxiway_moved_total", "save", "gpu", "cpu"] == 2
    assert found["taxiway_stale",] == 0


def test_what_is_not_known_has_no_sample() -> None:
    found = samples(view(gpu=a_class(replicas=None)), Done({}, {}))
    assert ("taxiway_wanted_replicas", "gpu") not in found


def test_the_metrics_page_lists_each_metric_and_no_other() -> None:
    found = {name for name, *_ in samples(view(gpu=a_class()), Done({("g", "m"): 1}, {("a", "b", "c"): 1}))}
    assert set(documented()) == found


def documented() -> Iterator[str]:
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("| `taxiway_"):
            yield line.split("`")[1]
