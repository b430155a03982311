"""`taxiway drain`: hands the fleet's work to other fleets, and lists what stays."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import click

from taxiway.cli.address import AskedFleet, fleet_options
from taxiway.client.asyncio_client import AsyncClient
from taxiway.contract.job import JobRecord

_QUIET = 3.0  # seconds in which no job left, after which the others stay


@click.command()
@click.option("--end", is_flag=True, help="Serve again.")
@fleet_options
def drain(*, end: bool, fleet: AskedFleet) -> None:
    """Hand the fleet's work to other fleets, its classes of `protocol: taxiway`.

    Waiting jobs whose locality allows it move there, as far as they are offered to be in time, and so does what comes;
    running jobs end here. Returns once no more leave, with the jobs that stay: they run here.
    """
    if end:
        fleet.echo(fleet.ask(lambda client: client.resume()), "it serves again")
        return
    peers = fleet.ask(lambda client: client.drain())["peers"]
    click.echo(f"work goes to {', '.join(peers)}; these jobs stay:", err=True)
    fleet.present(fleet.ask(lambda client: _staying(client, peers)), "show_jobs")


async def _staying(client: AsyncClient, peers: Collection[str]) -> list[JobRecord]:
    """The jobs that wait here once none has left for a while, the latest first."""
    began = latest = (await client.fleet())["now"]
    now = began
    while now - latest < _QUIET:
        await asyncio.sleep(0.5)
        fleet = await client.fleet()
        now = fleet["now"]
        latest = max([began, *(move["at"] for move in fleet["moves"] if move["target"] in peers)])
    found: list[JobRecord] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await client.jobs(states=("queued", "held"), cursor=cursor)
        found += (job for job in page.jobs if job.hardware_class not in peers)
        cursor = page.next
    return found
