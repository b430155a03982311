"""`taxiway webhooks`: where events go, their secrets, and the events that could not be delivered."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from taxiway.cli.address import ask, fleet_options, present, print_json
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
def list_(*, url: str | None, data: Path | None, as_json: bool) -> None:
    """List endpoints, most recent first."""
    present(ask(url, data, lambda client: client.webhooks.list()), "show_endpoints", as_json=as_json)


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
    url: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Register the endpoint at ADDRESS under NAME, and print its secret. It cannot be shown again."""
    options = {"only_named": only_named, **({"tenant": tenant} if tenant else {})}
    made = ask(url, data, lambda client: client.webhooks.add(name, address, events, **options))
    if as_json:
        print_json(made)
        return
    click.echo(made["signing_secret"])
    click.echo(f"endpoint {made['id']} of the tenant {made['tenant']!r}; its secret is not shown again", err=True)


@webhooks.command()
@_ENDPOINT
@click.option("--at-once", is_flag=True, help="Do not sign with the old secret any more.")
@fleet_options
def rotate(endpoint: str, *, at_once: bool, url: str | None, data: Path | None, as_json: bool) -> None:
    """Give ENDPOINT a new secret, and print it. Events are signed with both for a day."""
    made = ask(url, data, lambda client: client.webhooks.rotate(endpoint, overlap=not at_once))
    print_json(made) if as_json else click.echo(made["signing_secret"])


@webhooks.command()
@_ENDPOINT
@fleet_options
def remove(endpoint: str, *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Remove ENDPOINT, with the events that wait for it."""
    ask(url, data, lambda client: client.webhooks.remove(endpoint))
    if as_json:
        print_json({"removed": endpoint})


@webhooks.command()
@_ENDPOINT
@click.option(
    "--event", type=click.Choice(_TYPES), default="job.completed", show_default=True, help="The type of the sample."
)
@fleet_options
def test(endpoint: str, *, event: str, url: str | None, data: Path | None, as_json: bool) -> None:
    """Send a sample event to ENDPOINT now, and print the status of its answer."""
    status = ask(url, data, lambda client: client.webhooks.test(endpoint, event))
    print_json({"status": status}) if as_json else click.echo(status)


@webhooks.command()
@_ENDPOINT
@click.option("--most", type=click.IntRange(1, 1000), default=100, show_default=True, help="Events to list.")
@fleet_options
def dead(endpoint: str, *, most: int, url: str | None, data: Path | None, as_json: bool) -> None:
    """List events that could not be delivered to ENDPOINT in time, most recent first."""
    present(ask(url, data, lambda client: client.webhooks.dead(endpoint, most)), "show_dead_events", as_json=as_json)


@webhooks.command()
@_ENDPOINT
@click.argument("events", metavar="[EVENT...]", nargs=-1)
@fleet_options
def replay(endpoint: str, events: tuple[str, ...], *, url: str | None, data: Path | None, as_json: bool) -> None:
    """Send undelivered events to ENDPOINT again: each EVENT, or all."""
    replayed = ask(url, data, lambda client: client.webhooks.replay(endpoint, events))
    print_json({"replayed": replayed}) if as_json else click.echo(replayed)
