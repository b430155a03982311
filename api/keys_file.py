"""The keys file, and `taxiway keys`, which makes, lists and revokes its keys.

Routers read it again when it changes, and it is written atomically. A key is shown once and not stored.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec

from api.access import PREFIX, SCOPES, Caller, Key, Keyring, KeysError, Scope, digest_of, parse_keys, written
from tasks.models.files import stamp_of
from taxiway.cli import USAGE, report
from taxiway.cli.fleet import run
from taxiway.contract.request import MAX_NAME
from taxiway.errors import flaw

logger = logging.getLogger(__name__)

CHECK_EVERY = 1.0
"""Seconds between two checks for changes of the file: a revoked key stays valid for at most this long."""


class KeyFile:
    """The keys in a file. While it is missing or invalid, the last valid keys stay in force and the error is logged.

    Raises:
        KeysError: the file cannot be read initially.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp_of(path)
        self._keyring = read_keys(path)
        self._next = time.monotonic() + CHECK_EVERY

    def caller(self, secret: bytes) -> Caller | None:
        """The caller whose key `secret` is, now."""
        if time.monotonic() >= self._next:
            self._check()
        return self._keyring.caller(secret, time.time())

    def _check(self) -> None:
        self._next = time.monotonic() + CHECK_EVERY
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keyring = read_keys(self._path)
        except KeysError as error:
            logger.error("keys not reloaded", extra={"error": str(error)})
        else:
            logger.info("keys reloaded", extra={"keys": len(self._keyring.keys)})


def read_keys(path: Path) -> Keyring:
    """The keys in the file at `path`.

    Raises:
        KeysError: the file cannot be read, or is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: expected a readable file of keys, got {flaw(error)}") from error
    return parse_keys(text, str(path))


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write these keys to the file. A new file is readable only by its owner; an existing one keeps its mode.

    Raises:
        OSError: the file cannot be written; its content is left unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner alone
    try:
        if path.exists():
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(written(keys))
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_BYTES = 32  # of randomness in a key

_file = click.option(
    "--file",
    type=click.Path(path_type=Path),
    envvar="TAXIWAY_KEYS",
    required=True,
    show_envvar=True,
    help="The keys file.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group(name="taxiway keys")
def main() -> None:
    """Create, list and revoke API keys of the HTTP API. docs/security.md describes their scopes."""


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
        run(main, "python -m api.keys_file")
    except KeysError as error:
        report(str(error), "`taxiway keys new` makes a keys file")
        sys.exit(USAGE)
    except OSError as error:
        report(f"{error.filename}: {flaw(error)}", "name a file in a folder that can be written")
        sys.exit(USAGE)
