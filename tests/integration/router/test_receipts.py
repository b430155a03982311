"""Labelled work leaves signed receipts: placed, moved or refused; exported, they verify offline."""

import secrets
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis

import taxiway
from tasks.queues.receipts import PlacementReceipt, read_line
from tasks.settings import Settings
from taxiway.contract.keys import ARRIVALS, RECEIPTS, priority_list, priority_lists
from taxiway.contract.request import Request
from taxiway.contract.wire import infer_message
from tests.builders import recorded
from tests.command_line import program
from tests.routing import EchoDevice, RouterProcess, eventually, router_process

QUEUES = recorded("fleets/clinic.yaml")

CANARY = "canary-4711-of-a-patient"


@dataclass
class Ward:
    """A router with a site key, before a ward and a cloud that is cheaper."""

    settings: Settings
    router: RouterProcess
    key: Path
    store: redis.Redis

    def send(self, **terms: Any) -> str:
        job = str(uuid.uuid4())
        request = Request(model="paced", inputs=f"{CANARY} {job}", **terms)
        self.store.lpush(priority_list(ARRIVALS, 1), infer_message(job, request, reply="", origin="test"))
        return job

    def receipts(self, job: str) -> list[PlacementReceipt]:
        entries: Any = self.store.xrange(RECEIPTS)
        found = [read_line(fields[b"line"])[0] for _, fields in entries]
        return [one for one in found if one.job == job]

    def audit(self, *arguments: str) -> tuple[int, str]:
        done = program("router.audit", *arguments, settings=self.settings)
        return done.returncode, done.stdout


@pytest.fixture
def ward(settings: Settings, tmp_path: Path) -> Iterator[Ward]:
    (tmp_path / "queues.yaml").write_text(QUEUES)
    key = tmp_path / "site.key"
    key.write_text(secrets.token_hex(32))
    settings = replace(settings, queues=tmp_path / "queues.yaml")
    with ExitStack() as stack:
        store = stack.enter_context(redis.Redis.from_url(settings.broker))
        stack.enter_context(EchoDevice(settings, hardware_class="ward.a", answering=False))
        stack.enter_context(EchoDevice(settings, hardware_class="cloud"))
        router = stack.enter_context(router_process(settings, environment={"TAXIWAY_SITE_KEY": str(key)}))
        yield Ward(settings, router, key, store)


def test_private_work_has_a_receipt_of_its_class_and_of_those_without_its_label(ward: Ward) -> None:
    job, public = ward.send(tenant="clinic", locality="ward"), ward.send()
    (receipt,) = eventually(lambda: ward.receipts(job))
    assert (receipt.event, receipt.hardware_class, receipt.site, receipt.number) == ("placed", "ward.a", "clinic-7", 1)
    assert (receipt.tenant, receipt.model) == ("clinic", "paced:1")
    assert receipt.labels == {"ward": ("request", "tenant")}
    assert receipt.lacking == {"cloud": ("ward",)}
    eventually(lambda: ward.store.exists(f"celery-task-meta-{public}"))
    assert ward.receipts(public) == []
    with taxiway.Client(ward.router.http) as client:
        posted = client.submit("paced", CANARY, locality="ward")
    assert [one.number for one in ward.receipts(posted.id)] == [2]


def test_what_no_class_may_have_leaves_a_receipt_of_its_refusal_at_every_interface(ward: Ward) -> None:
    jobs = [ward.send(locality="cloud+ward")]
    for address in (ward.router.http, ward.settings.broker):
        with taxiway.Client(address) as client, pytest.raises(taxiway.UnplaceableError):
            client.infer("paced", CANARY, locality="cloud+ward", timeout=30)
    refused = eventually(lambda: found if len(found := refusals(ward)) == 3 else None)
    assert jobs[0] in [one.job for one in refused]
    for one in refused:
        assert (one.error, one.hardware_class) == ("unplaceable", "")
        assert one.lacking == {"cloud": ("ward",), "ward.a": ("cloud",), "ward.b": ("cloud",)}


def refusals(ward: Ward) -> list[PlacementReceipt]:
    entries: Any = ward.store.xrange(RECEIPTS)
    found = [read_line(fields[b"line"])[0] for _, fields in entries]
    return [one for one in found if one.event == "refused"]


def test_moved_work_has_a_receipt_and_an_export_is_verified_offline(ward: Ward, tmp_path: Path) -> None:
    jobs = [ward.send(tenant="clinic") for _ in range(300)]
    eventually(lambda: sum(int(ward.store.llen(name)) for name in priority_lists("ward.a")) == 300)
    with EchoDevice(ward.settings, hardware_class="ward.b") as idle:
        eventually(lambda: len(idle.done) > 20)
    placed, moved, *_ = ward.receipts(idle.done[0])
    assert (placed.event, placed.hardware_class, moved.event) == ("placed", "ward.a", "moved")
    assert (moved.source, moved.hardware_class, moved.move) == ("ward.a", "ward.b", 1)
    assert (moved.labels, moved.lacking) == ({"ward": ("earlier",)}, {"cloud": ("ward",)})
    status, exported = ward.audit("--json")
    assert (status, CANARY in exported) == (0, False)
    assert {read_line(line)[0].job for line in exported.encode().splitlines()} == set(jobs)
    file, (_, public) = tmp_path / "audit.jsonl", ward.audit("--public", str(ward.key))
    verify = ("--verify", str(file), "--key", public.strip())
    file.write_text(exported)
    assert ward.audit(*verify)[0] == 0
    assert ward.audit("--verify", str(file), "--key", "0" * 63 + "1")[0] == 1
    file.write_text(exported.replace('"hardware_class":"ward.b"', '"hardware_class":"ward.a"', 1))
    status, flaws = ward.audit(*verify)
    assert (status, "the line was altered" in flaws) == (1, True)
    file.write_text("".join(exported.splitlines(keepends=True)[:7] + exported.splitlines(keepends=True)[8:]))
    status, flaws = ward.audit(*verify)
    assert (status, "receipts 8 to 8 of router" in flaws) == (1, True)
    assert ward.audit("--job", jobs[0])[1].count(jobs[0][:8]) >= 1
