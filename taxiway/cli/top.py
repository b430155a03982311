"""`top`: what `status` shows of the fleet, redrawn until it is stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click
from rich.live import Live

from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.cli.show import fleet_view, stdout_console
from taxiway.errors import FleetUnavailable


@click.command()
@click.option("--every", type=click.FloatRange(0.2), default=1.0, show_default=True, help="Seconds between updates.")
@fleet_options
def top(*, every: float, fleet: AskedFleet) -> None:
    """Show what `taxiway status` shows of the fleet, live. Ctrl-C exits."""

    def look() -> Mapping[str, Any]:
        return fleet.ask(lambda client: client.fleet())

    now = look()
    if fleet.as_json:
        print_json(now)
        return
    first = fleet_view(now)
    with Live(first, console=stdout_console(), screen=True, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(every)
            trouble = ""
            try:
                now = look()
            except FleetUnavailable as error:  # the last overview, with the reason
                trouble = error.message
            live.update(fleet_view(now, trouble), refresh=True)
