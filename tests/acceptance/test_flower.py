"""Flower shows the whole fleet on its pages, checked with a real browser."""

import asyncio
import html
import json
import re
from collections.abc import Callable

import pytest

import taxiway
from local.fleet import LocalFleet
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.client.sync_client import Job
from tests.browser import CHROMIUM, opened
from tests.routing import HTTP, eventually

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def page(fleet: LocalFleet) -> Callable[..., str]:
    """A function that gives the text of one of Flower's pages once something stands there so many times."""

    async def read(path: str, shown: str, times: int = 1) -> str:
        async with opened(f"{fleet.flower}{path}") as page:
            await page.until(f"document.body.textContent.split({json.dumps(shown)}).length > {times}", within=240)
            return " ".join(str(await page.value("document.body.textContent")).split())

    return lambda *asked: asyncio.run(read(*asked))


@pytest.fixture(scope="module")
def finished(fleet: LocalFleet) -> str:
    """The id of a job that ended, whose events have reached Flower."""
    with taxiway.Client(fleet.broker) as client:
        job = client.submit("echo", "seen from the tower", deadline=30)
        job.result(timeout=60)
    eventually(lambda: HTTP.get(f"{fleet.flower}/task/{job.id}").status_code == 200)
    return job.id


def test_the_first_page_shows_a_worker_of_every_class_as_online(page: Callable[..., str]) -> None:
    classes = load_topology(TREE / "queues.yaml").hardware
    shown = page("/workers", "Online", len(classes))

    for hardware_class in classes:
        assert re.search(rf"{re.escape(hardware_class)}\.\S+@\S*?\s*Online", shown), f"no {hardware_class} in:\n{shown}"


def test_the_page_of_tasks_shows_the_task_by_its_name_and_state(page: Callable[..., str], finished: str) -> None:
    shown = page("/tasks", finished)

    assert "taxiway.infer" in shown
    assert "SUCCESS" in shown


def test_jobs_that_expired_or_were_cancelled_are_shown_as_such(fleet: LocalFleet) -> None:
    with taxiway.Client(fleet.http) as client:
        expired = client.submit("echo", "too late", deadline=1e-6)
        cancelled = client.submit("generate", "Count slowly.", deadline=3000, parameters={"max_tokens": 512})
        cancelled.cancel()

    def shown(job: Job) -> str:
        return html.unescape(HTTP.get(f"{fleet.flower}/task/{job.id}").text)

    eventually(lambda: "FAILURE" in shown(expired) and "REVOKED" in shown(cancelled))
    assert "DeadlineExceededError('deadline of 1e-06 s exceeded" in shown(expired)
    assert "JobCancelledError(" in shown(cancelled)
