"""`jobs`: the fleet's jobs, the latest first."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from taxiway.cli.address import ask, fleet_options, print_json
from taxiway.client.asyncio_client import AsyncClient
from taxiway.contract.job import JobState
from taxiway.contract.listing import MOST, JobPage

_USUAL = 20

_EXAMPLES = """\b
Examples:
  taxiway jobs --state failed --state dead
  taxiway jobs --model sentiment --tenant lab --limit 100 --json
"""


@click.command(epilog=_EXAMPLES)
@click.option(
    "--state", "states", multiple=True, type=click.Choice([*map(str, JobState)]), help="Only jobs in this state."
)
@click.option("--model", default="", metavar="MODEL", help="Only jobs of this model: name or name:version.")
@click.option("--tenant", default="", help="Only this tenant's jobs.")
@click.option("--limit", type=click.IntRange(1, MOST), default=_USUAL, show_default=True, help="Jobs that are listed.")
@click.option("--cursor", default="", help="Go on behind the last job of an earlier list, which says how.")
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
    """List the fleet's jobs, the latest accepted first.

    Jobs that wait in the arrivals are not listed: no router has seen them yet.
    """

    async def listed(client: AsyncClient) -> JobPage:
        """One list out of as many pages as it takes."""
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
