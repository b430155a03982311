"""`simulate`: replays a trace on a modelled fleet, in the process that this one becomes."""

from __future__ import annotations

import click

from taxiway.cli.fleet import become

OPTIONS = """\b
--trace TRACE    a CSV file, or poisson:rate=50,duration=600,seed=1
--fleet FILE     a fleet file, such as simulator/fleets/azure-mixed.yaml
--policy NAME    one policy [taxiway]; --compare runs them all
--load X         times the requests
--seed N         decides all chance
--json           one JSON object a policy
--plot FILE      a chart, one HTML file

docs/simulator.md tells what is modelled."""


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=OPTIONS)
@click.argument("arguments", metavar="--trace TRACE --fleet FILE [...]", nargs=-1, type=click.UNPROCESSED)
def simulate(arguments: tuple[str, ...]) -> None:
    """Replay a trace on a modelled fleet, under taxiway's placement and under others."""
    become("simulator", ["simulate", *arguments], verb="simulate")
