"""`python -m router.audit`: the receipts of labelled work, and whether an exported file of them is whole.

Data to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.table import Table

from tasks.queues.receipts import PlacementReceipt, flaws, read_line
from tasks.settings import SettingsError
from taxiway.cli import JOB_FAILED, USAGE, CommandError, exit_on_error
from taxiway.cli.address import find_store
from taxiway.cli.fleet import run
from taxiway.cli.show import stdout_console
from taxiway.connection import ConnectionPool
from taxiway.contract.keys import RECEIPTS

_TOGETHER = 1000  # receipts read by one call


def stored(url: str, since: float) -> Iterator[bytes]:
    """The lines of the audit log that were written since a Unix time. Raises `BrokerUnavailableError`."""
    connections, begin = ConnectionPool(url, server="state store"), str(int(since * 1000))
    while entries := connections.call("XRANGE", RECEIPTS, begin, "+", "COUNT", _TOGETHER):
        yield from (bytes(fields[1]) for _, fields in entries)
        begin = f"({bytes(entries[-1][0]).decode()}"
    connections.close()


@click.command()
@click.option("--url", help="The state store, redis://… [TAXIWAY_BROKER, else the local fleet].")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Data directory of a local fleet [TAXIWAY_DATA, else .taxiway]."
)
@click.option("--job", help="Only this job's receipts. What is left out counts as missing when they are verified.")
@click.option("--since", type=click.DateTime(), help="Only receipts written since this time, UTC.")
@click.option("--json", "as_json", is_flag=True, help="Export: print the signed receipts, one JSON object a line.")
@click.option("--verify", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Verify an exported file.")
@click.option("--key", metavar="PUBLIC", help="The site's public key, for --verify.")
@click.option("--public", type=click.Path(path_type=Path), help="Print the public key of the site's key in this file.")
def main(
    url: str | None,
    data: Path | None,
    job: str | None,
    since: datetime | None,
    *,
    as_json: bool,
    verify: Path | None,
    key: str | None,
    public: Path | None,
) -> None:
    """Print where labelled work was placed, by which rule, and which classes could not have it.

    With --verify and --key: exit with 1, and name what is wrong, if a line of an exported file was altered or left out.
    """
    if public is not None:
        click.echo(_public(public))
        return
    if verify is not None:
        _verify(verify, key)
        return
    lines = stored(find_store(url, data, os.environ), since.replace(tzinfo=UTC).timestamp() if since else 0.0)
    found = ((line, receipt) for line in lines if job in (None, (receipt := read_line(line)[0]).job))
    if as_json:
        for line, _ in found:
            click.echo(line)
    else:
        stdout_console().print(_table(receipt for _, receipt in found))


def _public(path: Path) -> str:
    from tasks.site_key import load_site_key, public_text  # what lists receipts needs no cryptography

    try:
        return public_text(load_site_key(path))
    except SettingsError as error:
        raise CommandError(str(error), hint="", code=USAGE) from error


def _verify(path: Path, key: str | None) -> None:
    """Raises `CommandError` if there is something wrong."""
    from tasks.site_key import verifier  # as above

    try:
        check = verifier(key or "")
    except ValueError as error:
        message = f"--key: expected the site's public key, 64 hexadecimal digits, got {key!r}"
        raise CommandError(message, hint="`taxiway audit --public site.key` prints it", code=USAGE) from error
    lines = path.read_bytes().splitlines()
    found = list(flaws(lines, check))
    for flaw in found:
        click.echo(flaw)
    if found:
        raise CommandError(f"{path}: {len(found)} flaws in {len(lines)} receipts", hint="", code=JOB_FAILED)
    click.echo(f"{len(lines)} receipts verified: each is signed with this key, and none is missing between two others")


def _table(receipts: Iterator[PlacementReceipt]) -> Table:
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("time", "job", "labels by rule", "classes without them", "event", "class"):
        shown.add_column(name, overflow="fold")
    for one in receipts:
        at = datetime.fromtimestamp(one.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        shown.add_row(at, one.job, _named(one.labels), _named(one.lacking), one.event, one.hardware_class or one.error)
    return shown


def _named(values: Mapping[str, tuple[str, ...]]) -> str:
    return "; ".join(f"{name}: {', '.join(ones)}" for name, ones in values.items())


if __name__ == "__main__":
    with exit_on_error():
        run(main, "taxiway audit")
