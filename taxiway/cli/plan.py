"""`plan`: finds the cheapest instances for a load, in the process that this one becomes."""

from __future__ import annotations

import click

from taxiway.cli.fleet import become

OPTIONS = """\b
--trace TRACE         a CSV file, or poisson:rate=50,duration=600,seed=1
--rate MODEL=R        instead: R requests a second of a model; may be repeated
--slo SERVICE=SHARE   share to answer in time, such as live=0.95; may be repeated
--prices FILE         a price file: instance, accelerator, accelerator_count, usd_per_hour, usd_per_hour_spot
--fleet FILE          a fleet file [simulator/fleets/azure-plan.yaml]
--seed N              decides all chance
--json                one JSON object

docs/planner.md tells how the mix is found."""


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=OPTIONS)
@click.argument(
    "arguments", metavar="--trace TRACE --slo SERVICE=SHARE --prices FILE [...]", nargs=-1, type=click.UNPROCESSED
)
def plan(arguments: tuple[str, ...]) -> None:
    """Find the cheapest instances that serve a load in time, and check them by a simulation."""
    become("simulator", ["plan", *arguments], verb="plan")
