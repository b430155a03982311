"""The sites in `taxiway status`: what they offer, and which are silent."""

from __future__ import annotations

from typing import Any

import pytest

from taxiway.cli.show import show_fleet

DEVICE: dict[str, Any] = {
    "worker": "cloud.endpoint-0@edge",
    "hardware_class": "cloud",
    "device": "endpoint:0",
    "kind": "endpoint",
    "emulated": False,
    "name": "fleet.example.org",
    "memory_total": 0,
    "memory_free": 0,
}


def shown(capsys: pytest.CaptureFixture[str], **facts: Any) -> str:
    show_fleet({"devices": [{**DEVICE, **facts}]})
    return " ".join(capsys.readouterr().out.split())


def test_a_site_is_listed_with_its_distance_and_its_offers(capsys: pytest.CaptureFixture[str]) -> None:
    peer = {"site": "cloud", "round_trip": 0.084, "age": 0.4, "offers": {"generate:1/taxiway": {}}, "dropped": 2}
    text = shown(capsys, endpoint={"state": "closed", "peer": peer})
    assert "cloud cloud 84 ms generate" in text
    text = shown(capsys, endpoint={"state": "closed", "peer": {**peer, "bytes_per_second": 9.84e6}})
    assert "cloud cloud 84 ms, 9.84 MB/s generate" in text
    done = {"cloud": {"dollars": {"generate:1": {"": 0.25, "clinic": 0.5}, "embed:1": {"": 0.5}}}}
    assert "$1.25" in shown(capsys, endpoint={"state": "closed", "peer": peer}, done=done)
    assert "sites" in text


def test_a_site_without_a_line_is_silent_and_offers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = {"state": "open", "peer": {"site": "cloud"}}
    text = shown(capsys, endpoint=endpoint, fault="site cloud: cannot connect")
    assert "silent: cannot connect" in text
    assert "nothing" in text


def test_other_devices_are_no_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sites" not in shown(capsys, endpoint={"state": "closed"})
