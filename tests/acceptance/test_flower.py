"""Flower shows the whole fleet on its pages, checked with a real browser."""

import html
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import taxiway
from local.fleet import LocalFleet
from tasks.settings import TREE
from tasks.topology import load_topology
from taxiway.client.sync_client import Job
from tests.routing import HTTP, eventually

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> str:
    """Chromium's path."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and os.environ.get("CI"):
        pytest.fail("no Chromium here: in CI Flower's pages must be looked at")
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    return path


@pytest.fixture(scope="module")
def page(browser: str, fleet: LocalFleet, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that gives the text of one of Flower's pages once its scripts have run for some seconds."""

    def read(path: str) -> str:
        profile = tmp_path_factory.mktemp("chromium")
        flags = [*QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]
        done = subprocess.run(
            [browser, *flags, f"{fleet.flower}{path}"], capture_output=True, text=True, timeout=240, check=True
        )
        return text_of(done.stdout)

    return read


def text_of(page: str) -> str:
    """What a page says, words apart where cells and blocks are; names stay whole across the marks inside them."""
    said = re.sub(r"<(script|style)\b.*?</\1>|</?(td|th|tr|div|p|li|dt|dd|br|h\d)\b[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", said)).split())


@pytest.fixture(scope="module")
def finished(fleet: LocalFleet) -> str:
    """The id of a job that ended, whose events have reached Flower."""
    with taxiway.Client(fleet.broker) as client:
        job = client.submit("echo", "seen from the tower", deadline=30)
        job.result(timeout=60)
    eventually(lambda: HTTP.get(f"{fleet.flower}/task/{job.id}").status_code == 200)
    return job.id


def test_the_first_page_shows_a_worker_of_every_class_as_online(page: Callable[[str], str]) -> None:
    shown = page("/workers")

    for hardware_class in load_topology(TREE / "queues.yaml").hardware:
        assert re.search(rf"{re.escape(hardware_class)}\.\S+@\S+\s+Online", shown), f"no {hardware_class} in:\n{shown}"


def test_the_page_of_tasks_shows_the_task_by_its_name_and_state(page: Callable[[str], str], finished: str) -> None:
    shown = page("/tasks")

    assert "taxiway.infer" in shown
    assert finished in shown
    assert "SUCCESS" in shown


def test_the_page_of_one_task_shows_where_it_was_placed(
    page: Callable[[str], str], finished: str, fleet: LocalFleet
) -> None:
    with taxiway.Client(fleet.broker) as client:
        report = client.job(finished).result(timeout=60).report
    shown = page(f"/task/{finished}")

    assert "taxiway.infer" in shown
    assert report.hardware_class in shown
    assert report.variant in shown


def test_jobs_that_expired_or_were_cancelled_are_shown_as_such(fleet: LocalFleet) -> None:
    with taxiway.Client(fleet.http) as client:
        expired = client.submit("echo", "too late", deadline=1e-6)
        cancelled = client.submit("generate", "Count slowly.", deadline=3000, parameters={"max_tokens": 512})
        cancelled.cancel()

    def shown(job: Job) -> Any | str:
        page = HTTP.get(f"{fleet.flower}/task/{job.id}")
        return text_of(page.text) if page.status_code == 200 else ""

    eventually(lambda: "FAILURE" in shown(expired) and "REVOKED" in shown(cancelled))
    assert "DeadlineExceededError('deadline of 1e-06 s exceeded" in shown(expired)
    assert "JobCancelledError(" in shown(cancelled)
