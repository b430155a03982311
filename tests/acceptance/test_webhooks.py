"""Webhooks on a fleet as an operator starts it: by the command line, and with its router killed as it delivers."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import openai
from standardwebhooks import Webhook

from taxiway import Client
from tests.acceptance.running import start_fleet, taxiway
from tests.receiver import receiving
from tests.waiting import until

QUEUES = """
hardware:
  cpu.batch: {device: cpu, runtimes: [echo], max_batch: 16, max_wait: 0.005, price: {usd_per_hour: 0.05}}
service: {standard: {deadline: 60}}
default_service: standard
webhooks: {http: true, networks: [127.0.0.0/8], timeout: 1}
"""
JOBS = 20


def listed(settings: dict[str, str]) -> dict[str, Any]:
    """The only endpoint, as the command line lists it."""
    found: list[dict[str, Any]] = msgspec.json.decode(taxiway("webhooks", "list", "--json", settings=settings))
    (endpoint,) = found
    return endpoint


def test_a_fleet_whose_router_is_killed_as_it_delivers_loses_no_event(tmp_path: Path) -> None:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    settings = {"TAXIWAY_QUEUES": str(tmp_path / "queues.yaml"), "TAXIWAY_DATA": str(tmp_path / "data")}
    fleet = start_fleet(tmp_path / "data", "--no-flower", "--workers", "cpu.batch=1", settings=settings)
    killed = threading.Event()
    try:
        with receiving() as receiver, Client(fleet.broker) as client:
            receiver.answer = lambda _: (200 if killed.wait(60) else 500, {})
            told = ("--event", "job.completed", "--event", "job.failed", "--json")
            made = msgspec.json.decode(taxiway("webhooks", "add", "mine", receiver.url, *told, settings=settings))
            jobs = [client.submit("echo", str(turn), webhook="mine").id for turn in range(JOBS)]
            assert until(lambda: bool(receiver.deliveries))
            os.kill(fleet.router_pid, signal.SIGKILL)
            killed.set()
            assert until(lambda: {one["data"]["id"] for one in receiver.events} == {*jobs}, patience=60)

        with openai.OpenAI(api_key="none", webhook_secret=made["signing_secret"]) as sdk:
            for delivery in receiver.deliveries:
                Webhook(made["signing_secret"]).verify(delivery.body, delivery.headers)
                event: object = sdk.webhooks.unwrap(delivery.body, delivery.headers)
                assert getattr(event, "type", None) == "job.completed"
        ids = {one.event["data"]["id"]: one.headers["webhook-id"] for one in receiver.deliveries}
        assert len({one.headers["webhook-id"] for one in receiver.deliveries}) == len(ids) == JOBS
        assert until(lambda: listed(settings)["waiting"] == 0)  # the receiver knows a little sooner
        assert (listed(settings)["dead"], "signing_secret" in listed(settings)) == (0, False)
    finally:
        taxiway("down", "--data", str(tmp_path / "data"))
