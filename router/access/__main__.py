"""`taxiway keys`: makes, lists and revokes the keys in a keys file. A key is shown once and not stored."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec

from router.access.file import read_keys, write_keys
from router.access.keyring import PREFIX, SCOPES, Key, Keyring, KeysError, Scope, digest_of
from taxiway.cli.fleet import shown_as
from taxiway.contract.request import MAX_NAME

_BYTES = 32  # of randomness in a key

_file = click.option(
    "--file",
    type=click.Path(path_type=Path),
    envvar="TAXIWAY_KEYS",
    required=True,
    help="The keys file [TAXIWAY_KEYS].",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group(name="taxiway keys")
def main() -> None:
    """Make, list and revoke keys of the HTTP door."""


@main.command()
@click.option("--tenant", required=True, help="The tenant that all requests with this key belong to.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=("submit", "read"), show_default=True
)
@click.option("--expires", type=click.FloatRange(0, min_open=True), metavar="DAYS", help="Days until the key expires.")
@_file
@_json
def new(tenant: str, *, scopes: Sequence[Scope], expires: float | None, file: Path, as_json: bool) -> None:
    """Make a key and print it. It cannot be shown again."""
    if not (0 < len(tenant) <= MAX_NAME and tenant.isprintable()):
        raise click.BadParameter(f"expected 1 to {MAX_NAME} printable characters", param_hint="--tenant")
    known = read_keys(file) if file.exists() else Keyring()
    secret = PREFIX + secrets.token_urlsafe(_BYTES)
    until = None if expires is None else (datetime.now(UTC) + timedelta(days=expires)).replace(microsecond=0)
    key = Key(
        id=secrets.token_hex(4),
        digest=digest_of(secret),
        tenant=tenant,
        scopes=tuple(dict.fromkeys(scopes)),
        expires=until,
    )
    write_keys(file, [*known.keys, key])
    click.echo(msgspec.json.encode({"key": secret, **_shown(key)}).decode() if as_json else secret)
    click.echo(f"key {key.id} of the tenant {tenant!r} may {', '.join(key.scopes)}; it is not shown again", err=True)


@main.command("list")
@_file
@_json
def listed(file: Path, *, as_json: bool) -> None:
    """List all keys, without the secret part."""
    keys = read_keys(file).keys
    if as_json:
        click.echo(msgspec.json.encode([_shown(key) for key in keys]).decode())
        return
    for key in keys:
        until = "never expires" if key.expires is None else f"until {key.expires.isoformat()}"
        click.echo(f"{key.id}  {key.tenant}  {','.join(key.scopes)}  {until}")


@main.command()
@click.argument("id")
@_file
def revoke(id: str, *, file: Path) -> None:
    """Revoke a key: routers refuse it within a second."""
    keys = read_keys(file).keys
    left = [key for key in keys if key.id != id]
    if len(left) == len(keys):
        raise KeysError(f"{file}: no key has the id {id!r}; `taxiway keys list` shows them")
    write_keys(file, left)
    click.echo(f"key {id} is revoked", err=True)


def _shown(key: Key) -> dict[str, object]:
    """A key without its digest."""
    return {"id": key.id, "tenant": key.tenant, "scopes": key.scopes, "expires": key.expires}


if __name__ == "__main__":
    try:
        main(prog_name=shown_as("python -m router.access"))
    except (KeysError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
