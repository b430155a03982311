"""`keys`: who may use the HTTP door; the fleet's own code does the work, in the process that this one becomes."""

from __future__ import annotations

import click

from taxiway.cli.fleet import become

OPTIONS = """\b
new --tenant NAME --scope submit|read|admin … [--expires DAYS]
                 make a key, and print it this once
list [--json]    every key that is known, but for itself
revoke ID        forget a key: routers refuse it within a second
--file FILE      the keys file [TAXIWAY_KEYS]

docs/security.md tells what each scope may do."""


@click.command(context_settings={"ignore_unknown_options": True}, options_metavar="", epilog=OPTIONS)
@click.argument("arguments", metavar="new|list|revoke [...]", nargs=-1, type=click.UNPROCESSED)
def keys(arguments: tuple[str, ...]) -> None:
    """Make, list and revoke keys of the HTTP door."""
    become("router.access", list(arguments), verb="keys")
