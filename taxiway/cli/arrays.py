"""`taxiway array`: one request for each line of a file, as one submission that the fleet keeps."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import click

from taxiway.cli import JOB_FAILED
from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.cli.jobs import json_or_text
from taxiway.client.arrays import WITHIN
from taxiway.client.asyncio_client import AsyncClient
from taxiway.contract.job import Result
from taxiway.contract.values import to_wire
from taxiway.errors import TaxiwayError

_EXAMPLES = """\b
Examples:
  taxiway array sentiment reviews.txt > answers.jsonl
  taxiway array ising sweep.jsonl --within 1h --no-wait
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model")
@click.argument("lines", metavar="FILE|-", type=click.File("rb"))
@click.option("--within", default=WITHIN, metavar="TIME", show_default=True, help="Time for all of it: 30m, 24h, 7d.")
@click.option("--tenant", help="The tenant that the requests belong to.")
@click.option("--locality", help="A label that every device on the requests' path must carry.")
@click.option("--budget", type=float, metavar="USD", help="Maximum cost of each answer.")
@click.option("--wait/--no-wait", default=True, help="Wait for the answers (default), or print the array's id.")
@fleet_options
def array(
    model: str,
    *,
    lines: BinaryIO,
    within: str,
    wait: bool,
    fleet: AskedFleet,
    **terms: Any,
) -> None:
    """Send each line of FILE to MODEL as one array, and print a line of JSON for each answer, in order, as they come.

    A line is the input as JSON if it reads so, else as text. The array goes on if this command ends; a router keeps it.
    """
    inputs = [json_or_text(line) for line in lines.read().splitlines() if line.strip()]

    async def send(client: AsyncClient) -> tuple[str, int]:
        made, failed = await client.array(model, inputs, within=within, **terms), 0
        if not wait:
            return made.id, 0
        from taxiway.cli.show import array_bar

        with array_bar() as watch:
            async for outcome in made.outcomes(watch=watch):
                failed += isinstance(outcome, TaxiwayError)
                print_json(_shown(outcome))
        return made.id, failed

    name, failed = fleet.ask(send)
    if not wait:
        fleet.echo({"id": name}, name)
    if failed:
        sys.exit(JOB_FAILED)


def _shown(outcome: Result | TaxiwayError) -> dict[str, Any]:
    if isinstance(outcome, TaxiwayError):
        return {"error": outcome.message, "code": outcome.code}
    return {"outputs": to_wire(outcome.outputs), "report": outcome.report}
