"""What a running callable reports, at every interface of a real router and worker."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

import taxiway
from tasks.settings import Settings
from taxiway.cli.show import progress_bar
from tests.command_line import CommandLine
from tests.integration.workers.test_runs import STEPS
from tests.routing import HTTP, eventually
from tests.serving import ServedFleet, served_fleet
from tests.working import QUEUES, add_callable, worker_settings

INPUTS = {"steps": STEPS, "seed": 7, "every": 25}


@pytest.fixture(scope="module")
def fleet(lasting: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedFleet]:
    queues = QUEUES.replace("warm: [echo, slab]", "warm: [echo, walk]")
    settings = worker_settings(lasting, tmp_path_factory.mktemp("fleet"), queues)
    add_callable(settings.models, "walk")
    with served_fleet(settings, "walk") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def interfaces(fleet: ServedFleet) -> dict[str, str]:
    return fleet.interfaces


@pytest.fixture
def half(fleet: ServedFleet) -> Iterator[Path]:
    """While this file is there, walks stand still after half of their steps."""
    file = fleet.settings.models.parent / "held"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def held(half: Path, client: taxiway.Client) -> Iterator[taxiway.Job]:
    """A walk that stands still until the test ends."""
    job = client.submit("walk", INPUTS, deadline=600)
    eventually(lambda: (seen := job.status().record.progress) is not None and seen.fraction > 0.5)
    yield job
    half.unlink()
    job.result(timeout=60)


def test_a_job_s_reports_are_iterated_over_until_it_ends(client: taxiway.Client) -> None:
    job = client.submit("walk", INPUTS)
    seen = [*job.progress(timeout=60)]
    fractions = [one.fraction for one in seen]
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] <= 1
    assert all(one.message.endswith(" steps") and "at" in one.partial for one in seen)
    assert any(one.left is not None for one in seen)
    assert job.result().outputs["resumed"] == 0


@pytest.mark.parametrize("interface", ["broker", "http"])
async def test_reports_are_iterated_over_on_an_event_loop_and_a_job_without_any_has_none(
    fleet: ServedFleet, interface: str
) -> None:
    async with taxiway.AsyncClient(fleet.interfaces[interface]) as client:
        walk, echo = await client.submit("walk", INPUTS), await client.submit("echo", "hello")
        walked, echoed = [one async for one in walk.progress(60)], [one async for one in echo.progress(60)]
    assert walked and not echoed


def test_a_job_that_fails_raises_its_error_after_its_reports(client: taxiway.Client) -> None:
    job = client.submit("walk", INPUTS | {"steps": 0, "every": 0, "seed": -1})
    with pytest.raises(taxiway.ExecutionError):
        list(job.progress(timeout=60))


def test_a_job_s_status_and_the_list_of_jobs_have_the_last_report(
    held: taxiway.Job, client: taxiway.Client, fleet: ServedFleet
) -> None:
    progress = {"fraction": (STEPS // 2 + 1) / STEPS, "message": f"{STEPS // 2 + 1} steps"}
    eventually(lambda: held.status().record.progress.message == progress["message"])  # type: ignore[union-attr]  # there is one
    for found in (
        HTTP.get(f"{fleet.router.http}/v2/jobs/{held.id}").json(),
        msgspec.to_builtins(held.status().record),
        *[msgspec.to_builtins(one) for one in client.jobs().jobs if one.id == held.id],
    ):
        assert {name: found["progress"][name] for name in progress} == progress
    with HTTP.stream("GET", f"{fleet.router.http}/v2/jobs/{held.id}/stream") as response:
        lines = response.iter_lines()
        kind, _, data = next(lines), next(lines), next(lines)
    assert kind == "event: progress"
    assert 0 < json.loads(data.removeprefix("data: "))["fraction"] < 1


def test_the_command_line_shows_how_far_a_job_is(held: taxiway.Job, cli: CommandLine, fleet: ServedFleet) -> None:
    for url in fleet.interfaces.values():
        shown, stated = (cli.succeed("status", held.id, "--url", url, *option).stdout for option in ((), ("--json",)))
        assert "progress  50 %: " in shown
        assert json.loads(stated)["progress"]["fraction"] > 0.5


def test_a_bar_has_the_share_the_time_left_and_the_message() -> None:
    drawn = io.StringIO()
    with progress_bar(Console(file=drawn, force_terminal=True, width=100)) as show:
        show(taxiway.RunProgress(fraction=0.42, message="[b]1,240 steps", left=75.0))
    assert "42%" in drawn.getvalue() and "left" in drawn.getvalue() and "[b]1,240 steps" in drawn.getvalue()


def test_what_is_submitted_on_a_terminal_is_followed_by_the_bar(fleet: ServedFleet, half: Path) -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "taxiway", "submit", "walk", "--inputs", json.dumps(INPUTS)]
    environment: dict[str, Any] = {**os.environ, "TAXIWAY_URL": fleet.router.http, "TERM": "xterm"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=its) as process:
        os.close(its)
        shown = b""
        with suppress(OSError):  # Linux's end of a terminal
            while shown := shown + os.read(ours, 4096):
                if b"%" in shown and b" steps" in shown:
                    half.unlink(missing_ok=True)
        assert process.stdout is not None and b"resumed" in process.stdout.read()
    os.close(ours)
