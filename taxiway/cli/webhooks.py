"""`taxiway webhooks`: where events go, their secrets, and the events that could not be delivered."""

from __future__ import annotations

from typing import get_args

import click

from taxiway.cli.address import AskedFleet, fleet_options, print_json
from taxiway.contract.request import EventType

_ENDPOINT = click.argument("endpoint")
_TYPES = get_args(EventType)


@click.group()
def webhooks() -> None:
    """Register webhook endpoints, and list undelivered events.

    An endpoint is notified when a tenant's jobs, batches and responses end. Verbs take its name or its id, and --json.
    """


@webhooks.command("list")
@fleet_options
def list_(*, fleet: AskedFleet) -> None:
    """List endpoints, most recent first."""
    fleet.present(fleet.ask(lambda client: client.webhooks.list()), "show_endpoints")


@webhooks.command()
@click.argument("name")
@click.argument("address")
@click.option(
    "--event",
    "events",
    type=click.Choice([*_TYPES, "*"]),
    multiple=True,
    required=True,
    help="A type of event, * for all; repeat it for several.",
)
@click.option("--tenant", help="The tenant whose events it gets [the key's].")
@click.option("--only-named", is_flag=True, help="Notify it only of requests that name it.")
@fleet_options
def add(
    name: str,
    address: str,
    *,
    events: tuple[str, ...],
    tenant: str | None,
    only_named: bool,
    fleet: AskedFleet,
) -> None:
    """Register the endpoint at ADDRESS under NAME, and print its secret. It cannot be shown again."""
    options = {"only_named": only_named, **({"tenant": tenant} if tenant else {})}
    made = fleet.ask(lambda client: client.webhooks.add(name, address, events, **options))
    fleet.echo(made, made["signing_secret"])
    if not fleet.as_json:
        click.echo(f"endpoint {made['id']} of the tenant {made['tenant']!r}; its secret is not shown again", err=True)


@webhooks.command()
@_ENDPOINT
@click.option("--at-once", is_flag=True, help="Do not sign with the old secret any more.")
@fleet_options
def rotate(endpoint: str, *, at_once: bool, fleet: AskedFleet) -> None:
    """Give ENDPOINT a new secret, and print it. Events are signed with both for a day."""
    made = fleet.ask(lambda client: client.webhooks.rotate(endpoint, overlap=not at_once))
    fleet.echo(made, made["signing_secret"])


@webhooks.command()
@_ENDPOINT
@fleet_options
def remove(endpoint: str, *, fleet: AskedFleet) -> None:
    """Remove ENDPOINT, with the events that wait for it."""
    fleet.ask(lambda client: client.webhooks.remove(endpoint))
    if fleet.as_json:
        print_json({"removed": endpoint})


@webhooks.command()
@_ENDPOINT
@click.option(
    "--event", type=click.Choice(_TYPES), default="job.completed", show_default=True, help="The type of the sample."
)
@fleet_options
def test(endpoint: str, *, event: str, fleet: AskedFleet) -> None:
    """Send a sample event to ENDPOINT now, and print the status of its answer."""
    status = fleet.ask(lambda client: client.webhooks.test(endpoint, event))
    fleet.echo({"status": status}, status)


@webhooks.command()
@_ENDPOINT
@click.option("--most", type=click.IntRange(1, 1000), default=100, show_default=True, help="Events to list.")
@fleet_options
def dead(endpoint: str, *, most: int, fleet: AskedFleet) -> None:
    """List events that could not be delivered to ENDPOINT in time, most recent first."""
    fleet.present(fleet.ask(lambda client: client.webhooks.dead(endpoint, most)), "show_dead_events")


@webhooks.command()
@_ENDPOINT
@click.argument("events", metavar="[EVENT...]", nargs=-1)
@fleet_options
def replay(endpoint: str, events: tuple[str, ...], *, fleet: AskedFleet) -> None:
    """Send undelivered events to ENDPOINT again: each EVENT, or all."""
    replayed = fleet.ask(lambda client: client.webhooks.replay(endpoint, events))
    fleet.echo({"replayed": replayed}, replayed)
