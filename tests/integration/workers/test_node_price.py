"""Workers of one class on nodes of different prices: each bills its own, and placement goes by what they cost."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.settings import Settings
from taxiway import Client
from tests.builders import recorded
from tests.routing import HTTP, eventually, router_process
from tests.working import worker_process

QUEUES = recorded("fleets/by_night.yaml")

PRICES = {"cpu:0": 0.02, "cpu:1": 0.38}
"""Of the nodes of cpu.day, by device: 0.20 on average, above cpu.night, which by queues.yaml is dearer."""


def test_workers_bill_the_price_of_their_node_and_placement_prefers_what_is_cheaper_by_it(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    fleet = replace(settings, queues=tmp_path / "queues.yaml")
    with ExitStack() as stack:
        router = stack.enter_context(router_process(fleet))
        for device, price in PRICES.items():
            options = ("--class", "cpu.day", "--device", device, "--usd-per-hour", str(price))
            stack.enter_context(worker_process(fleet, *options))
        stack.enter_context(worker_process(fleet, "--class", "cpu.night"))

        def classes() -> dict[str, Any]:
            found: dict[str, Any] = HTTP.get(f"{router.http}/v2/fleet").json()["classes"]
            return found if [found[name]["devices"] for name in ("cpu.day", "cpu.night")] == [2, 1] else {}

        found = eventually(classes)
        assert found["cpu.day"]["usd_per_hour"] == pytest.approx(0.20)
        assert (found["cpu.day"]["spending"], found["cpu.night"]["spending"]) == pytest.approx((0.40, 0.05))
        client = stack.enter_context(Client(router.http))
        assert client.submit("echo", 1).result(60).report.hardware_class == "cpu.night"
        billed: dict[str, float] = {}
        while billed.keys() != PRICES.keys():
            for result in client.map("echo", range(20), tenant="lark"):
                report = result.report
                billed[report.device] = 3600 * report.cost / report.run_time
        assert billed == pytest.approx(PRICES, rel=1e-3)
