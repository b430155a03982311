from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console

from taxiway.cli.top import page
from tests.builders import recorded

SHOWN: dict[str, Any] = yaml.safe_load(recorded("documents/top.yaml"))


def a_class(**facts: Any) -> dict[str, Any]:
    return SHOWN["class"] | facts


def a_device(number: int, done: int) -> dict[str, Any]:
    named = {"worker": f"gpu.realtime.cuda-{number}@rack{number % 2}.example", "device": f"cuda:{number}"}
    return SHOWN["device"] | named | {"done": {"gpu.realtime": {"outcomes": {"succeeded": done, "failed": 1}}}}


def a_fleet(now: float = 100.0, done: int = 50, devices: int = 12) -> dict[str, Any]:
    classes = {"gpu.realtime": a_class(), "cpu.batch": a_class(devices=0, replicas=0)}
    seen = {"now": now, "classes": classes, "devices": [a_device(number, done) for number in range(devices)]}
    return SHOWN["fleet"] | seen | {"moves": [SHOWN["move"] | {"at": now - 200}]}


def a_plan(**facts: Any) -> dict[str, Any]:
    return SHOWN["plan"] | facts


def drawn(fleet: Mapping[str, Any], before: Mapping[str, Any] | None = None, **how: Any) -> list[str]:
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(page(fleet, before, **({"rows": 20} | how)))
    return capture.get().splitlines()


def test_a_busy_fleet_fits_into_80_columns_with_nothing_cut_off() -> None:
    lines = drawn(a_fleet(now=101.0, done=3_000), a_fleet())
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "12 devices  800642 waiting  7 held  2 dead letters" in lines[0]
    assert drawn(a_fleet(), trouble="no answer")[1] == "stale: no answer"


def test_what_a_class_did_a_second_is_known_from_two_looks() -> None:
    lines = drawn(a_fleet(now=110.0, done=100), a_fleet(now=100.0, done=50))
    row = next(line for line in lines if line.startswith("gpu.realtime"))
    assert row.split()[-3:] == ["60", "12→15", "8.52"]
    assert "-" not in "".join(drawn(a_fleet(now=110.0, done=0), a_fleet(now=100.0, done=50))), "a worker restarted"


def test_devices_that_find_no_room_are_counted_and_those_of_several_hosts_show_theirs() -> None:
    lines = drawn(a_fleet(devices=12), rows=4)
    assert lines[-1] == "… and 8 more"
    assert sum("cuda:" in line for line in lines) == 4
    assert any(line.startswith("cuda:1@rack1 ") for line in lines)
    assert not any("@" in line for line in drawn(a_fleet(devices=1)))


def test_the_plan_shows_first_classes_its_followers_and_the_tuner() -> None:
    lines = drawn(a_fleet() | {"plan": a_plan()})
    assert max(map(len, lines)) <= 80
    first = next(number for number, line in enumerate(lines) if line.startswith("plan 7"))
    assert lines[first].rstrip() == "plan 7, 45.0 s old, followed by 1 of 2 routers"
    assert [line.split() for line in lines[first + 1 : first + 4]] == [
        ["model", "live", "bulk"],
        ["sentiment:1", "cpu.batch", "gpu.realtime"],
        ["image:1", "lab", "tpu.bulk"],
    ]
    assert lines[first + 4].startswith("tuner vm-12, 45.0 s ago: adopted, 16% better than the plan in use")


def test_without_a_plan_there_is_still_a_line_on_the_tuner() -> None:
    lines = drawn(a_fleet() | {"plan": a_plan(number=None, cells=[], adopted=False, found="too few arrivals")})
    at = lines.index("no plan: each request is placed by itself")
    assert lines[at + 1].startswith("tuner vm-12, 45.0 s ago: unchanged, too few arrivals")
    assert not any(line.startswith(("plan", "tuner", "no plan")) for line in drawn(a_fleet()))
