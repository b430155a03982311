"""`result`, `status`, `jobs`, `explain`, `cancel`: inspect and cancel jobs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from taxiway.cli.address import ask, fleet_options, print_json, processes_here
from taxiway.cli.failure import UNAVAILABLE, USAGE, CommandError
from taxiway.cli.request_options import inputs_of, request_options
from taxiway.cli.submit import print_result
from taxiway.client.asyncio_client import AsyncClient, AsyncJob
from taxiway.contract.job import FINAL, JobState, JobStatus
from taxiway.contract.listing import MOST, JobPage
from taxiway.errors import FleetUnavailable, RequestError

_CANCEL = 3.0  # seconds to wait for the end of a cancelled job
_LOOK = 0.1  # seconds between polls

_USUAL = 20  # jobs listed by default

_JOBS_EXAMPLES = """\b
Examples:
  taxiway jobs --state failed --state dead
  taxiway jobs --model sentiment --tenant lab --limit 100 --json
"""

_EXPLAIN_EXAMPLES = """\b
Examples:
  taxiway explain 1c0f8a3e-6d5b-4a52-8a3c-0f6f8f8d8a11
  taxiway explain --what-if generate --text "Once upon a time" -p max_tokens=200 --deadline 2
"""


@click.command()
@click.argument("job", metavar="ID")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait up to this long for the job to end.")
@fleet_options
def result(job: str, *, wait: float, url: str | None, data: Path | None, as_json: bool) -> None:
    """Print the answer of job ID."""
    print_result(job, ask(url, data, lambda client: client.job(job).result(wait)), as_json=as_json)


@click.command()
@click.argument("job", metavar="[ID]", required=False)
@fleet_options
def status(job: str | None, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Show the state of job ID. Without an ID, show the fleet: classes, devices, warm variants and queue depths."""
    if job is None:
        _show_fleet(_fleet_with_processes(url, data), as_json=as_json)
    else:
        _show_status(ask(url, data, lambda client: client.job(job).status()), as_json=as_json)


@click.command(epilog=_JOBS_EXAMPLES)
@click.option(
    "--state", "states", multiple=True, type=click.Choice([*map(str, JobState)]), help="Only jobs in this state."
)
@click.option("--model", default="", metavar="MODEL", help="Only jobs of this model: name or name:version.")
@click.option("--tenant", default="", help="Only this tenant's jobs.")
@click.option("--limit", type=click.IntRange(1, MOST), default=_USUAL, show_default=True, help="Jobs that are listed.")
@click.option("--cursor", default="", help="Continue after an earlier list, with the cursor that it printed.")
@fleet_options
def jobs(
    *,
    states: tuple[str, ...],
    model: str,
    tenant: str,
    limit: int,
    cursor: str,
    url: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """List the fleet's jobs, most recently accepted first.

    Jobs that wait in arrivals are not listed: no router has seen them yet.
    """

    async def listed(client: AsyncClient) -> JobPage:
        """One list, fetched in as many pages as needed."""
        page = await client.jobs(states=states, model=model, tenant=tenant, limit=limit, cursor=cursor)
        found = [*page.jobs]
        while page.next is not None and len(found) < limit:
            left = limit - len(found)
            page = await client.jobs(states=states, model=model, tenant=tenant, limit=left, cursor=page.next)
            found += page.jobs
        return JobPage(jobs=tuple(found), next=page.next)

    page = ask(url, data, listed)
    if as_json:
        print_json(msgspec.to_builtins(page))
        return
    from taxiway.cli.show import show_jobs

    show_jobs(page.jobs)
    if page.next is not None:
        click.echo(f"more: --cursor {page.next}", err=True)


@click.command(epilog=_EXPLAIN_EXAMPLES)
@click.argument("job", metavar="[ID]", required=False)
@click.option("--what-if", metavar="MODEL", help="Explain a request to MODEL without submitting it.")
@request_options
@fleet_options
def explain(
    job: str | None,
    *,
    what_if: str | None,
    url: str | None,
    data: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Show why job ID was placed where it is: the reason, and the figures of every candidate and why it was not chosen.

    With --what-if, the same for a request in the fleet's current state, without submitting it; the options describe it.
    """
    if job is not None and what_if is None:
        question = _why(job, asked)
    elif what_if is not None and job is None:
        question = _what_if(what_if, **asked)
    else:
        raise click.UsageError("expected the ID of a job, or --what-if MODEL")
    placement = ask(url, data, question)
    if as_json:
        print_json(placement)
        return
    from taxiway.cli.show import show_placement

    show_placement(placement)


@click.command()
@click.argument("job", metavar="ID")
@fleet_options
def cancel(job: str, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Cancel job ID before it is answered. Exits with 2 if it had already ended."""

    async def cancelled(client: AsyncClient) -> JobStatus:
        await client.job(job).cancel()
        return await _ended(client.job(job))

    status = ask(url, data, cancelled)
    state = status.record.state
    _show_status(status, as_json=as_json, cancelled=state == JobState.CANCELLED)
    if state not in FINAL:
        raise CommandError(
            f"job {job} is not cancelled yet", hint=f"`taxiway status {job}` shows its state", code=UNAVAILABLE
        )
    if state != JobState.CANCELLED:
        raise CommandError(f"job {job} had already ended: {state}", hint="", code=USAGE)


async def _ended(job: AsyncJob) -> JobStatus:
    """The job's status once it has ended, or after `_CANCEL` seconds: routers read the broker's messages in order."""
    end = time.monotonic() + _CANCEL
    status = await job.status()
    while status.record.state not in FINAL and time.monotonic() < end:
        await asyncio.sleep(_LOOK)
        status = await job.status()
    return status


def _why(job: str, asked: Mapping[str, Any]) -> Callable[[AsyncClient], Awaitable[dict[str, Any]]]:
    if any(value not in (None, (), {}) for value in asked.values()):
        raise click.UsageError("expected no request with a job ID; request options need --what-if MODEL")
    return lambda client: client.job(job).placement()


def _what_if(
    model: str,
    *,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    as_text: str | None,
    parameters: dict[str, Any],
    **terms: Any,
) -> Callable[[AsyncClient], Awaitable[dict[str, Any]]]:
    inputs = inputs_of(texts=texts, files=files, as_text=as_text)
    return lambda client: client.what_if(model, inputs, parameters=parameters or None, **terms)


def _fleet_with_processes(url: str | None, data: Path | None) -> dict[str, Any]:
    """The fleet's overview; a local fleet's has its `processes`, which are shown even if no router answers.

    Raises:
        FleetUnavailable: no router answers.
    """
    processes = processes_here(url, data, os.environ)
    try:
        fleet = ask(url, data, _fleet)
    except FleetUnavailable:
        if processes:
            from taxiway.cli.show import show_processes

            show_processes(processes)
        raise
    return {**fleet, "processes": processes} if processes else fleet


async def _fleet(client: AsyncClient) -> dict[str, Any]:
    """The fleet's overview, or its models if the router provides no overview."""
    try:
        return await client.fleet()
    except RequestError as error:
        if error.status != 404 and error.details.get("status") != 404:
            raise
        return {"models": await client.models(), "note": "this router provides no overview of its fleet"}


def _show_status(status: JobStatus, *, as_json: bool, **more: bool) -> None:
    if as_json:
        plain = msgspec.to_builtins(status)
        print_json({**plain.pop("record"), **plain, **more})
        return
    from taxiway.cli.show import show_status

    show_status(status)


def _show_fleet(fleet: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(fleet)
        return
    from taxiway.cli.show import show_fleet

    show_fleet(fleet)
