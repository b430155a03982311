"""`result`, `status`, `explain`, `cancel`: what became of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.cli.submit import print_result
from taxiway.client.asyncio_client import AsyncClient
from taxiway.errors import RequestError
from taxiway.job import JobStatus


@click.command()
@click.argument("job", metavar="ID")
@click.option("--wait", type=float, default=0.0, metavar="SECONDS", help="Wait so long for the job to end.")
@fleet_options
def result(job: str, *, wait: float, url: str | None, data: Path | None, as_json: bool) -> None:
    """Print the answer of job ID."""
    print_result(job, ask(url, data, lambda client: client.job(job).result(wait)), as_json=as_json)


@click.command()
@click.argument("job", metavar="[ID]", required=False)
@fleet_options
def status(job: str | None, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Show where job ID is, or without one the fleet: classes, devices, warm variants and queue depths."""
    if job is None:
        _show_fleet(ask(url, data, _fleet), as_json=as_json)
    else:
        _show_status(ask(url, data, lambda client: client.job(job).status()), as_json=as_json)


@click.command()
@click.argument("job", metavar="ID")
@fleet_options
def explain(job: str, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Show why job ID runs where it does: the reason, and the figures it was decided from."""
    placement = ask(url, data, lambda client: client.job(job).placement())
    if as_json:
        print_json(placement)
        return
    from taxiway.cli.show import show_placement

    show_placement(placement)


@click.command()
@click.argument("job", metavar="ID")
@fleet_options
def cancel(job: str, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Ask that job ID does not run. One that runs already may still succeed."""

    async def cancelled(client: AsyncClient) -> JobStatus:
        await client.job(job).cancel()
        return await client.job(job).status()

    _show_status(ask(url, data, cancelled), as_json=as_json)


async def _fleet(client: AsyncClient) -> dict[str, Any]:
    """The fleet's overview, or the models that it serves where the router gives none."""
    try:
        return await client.fleet()
    except RequestError as error:
        if error.status != 404 and error.details.get("status") != 404:
            raise
        return {"models": await client.models(), "note": "this router gives no overview of its fleet"}


def _show_status(status: JobStatus, *, as_json: bool) -> None:
    if as_json:
        print_json({**msgspec.to_builtins(status.record), "position": status.position, "eta": status.eta})
        return
    from taxiway.cli.show import show_status

    show_status(status)


def _show_fleet(fleet: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(fleet)
        return
    from taxiway.cli.show import show_fleet

    show_fleet(fleet)
